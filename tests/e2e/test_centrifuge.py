"""The Centrifuge clients as they are published, unchanged, against a real server."""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, cast

import pytest
from starlette.responses import FileResponse, HTMLResponse
from starlette.types import Receive, Scope, Send

from asgi_ws import CommandError, Connection, Grant, Hub, Limits, PubSubConnection, TokenExpired, WebSocketMiddleware
from examples import dashboard_centrifuge
from tests.e2e.centrifuge_clients import Client, Failed, client_of
from tests.e2e.node import HERE, Browser, chromium, node
from tests.endpoints.test_pubsub import no_page
from tests.servers import OURS, ROOT, UvicornServer, serve

pytestmark = pytest.mark.anyio

each_kind = pytest.mark.parametrize("kind", ["websocket", "py"])
every_transport = pytest.mark.parametrize("kind", ["websocket", "py", "http_stream", "sse"])


def make_hub(**limits: Any) -> Hub:
    """A hub with something of everything."""
    hub = Hub(limits=Limits(**limits))

    async def authenticate(conn: PubSubConnection, token: str) -> Grant | None:
        if token == "expired":
            raise TokenExpired
        if token == "banned":
            raise CommandError(101)
        if token == "busy" and not hub.__dict__.setdefault("was busy", 0):
            hub.__dict__["was busy"] = 1
            raise CommandError(111, temporary=True)
        if token == "wrong":
            return None
        lasts = {"short": 1, "shorter": 0.01}.get(token)
        return Grant(
            user=token or None,
            info={"token": token},
            data={"heard": conn.data},
            expires_at=None if lasts is None else time.time() + lasts,
        )

    async def channels(conn: Connection) -> list[str]:
        return [f"user:{conn.user_id}"] if conn.user_id else []

    async def on_message(conn: Connection, data: Any) -> None:
        await conn.send(data)

    hub.serve_pubsub("/live", authenticate=authenticate, channels=channels, on_message=on_message)

    @hub.channel("news", history=10)
    async def news(conn: Connection, data: Any) -> bool | Grant:
        return Grant(data=data) if data else True

    @hub.channel("room:{name}", presence=True, publish=True, history=300)
    async def room(conn: Connection, name: str) -> bool:
        return name != "secret"

    @hub.channel("private", history=10)
    async def private(conn: Connection, token: str) -> bool | Grant:
        if token == "expired":
            raise TokenExpired
        lasts = 1 if token == "short" else 60
        return token in ("good", "short") and Grant(expires_at=time.time() + lasts)

    @hub.channel("user:{name}", history=10)
    async def nobody(conn: Connection, name: str) -> bool:
        return False

    @hub.rpc("echo")
    async def echo(conn: Connection, data: Any) -> Any:
        return data

    @hub.rpc("slow")
    async def slow(conn: Connection) -> str:
        await asyncio.sleep(0.2)
        return "slow"

    @hub.rpc("big")
    async def big(conn: Connection, size: int) -> str:
        return "ü" * size

    @hub.rpc("fail")
    async def fail(conn: Connection, code: int) -> None:
        raise CommandError(code, "as asked for", temporary=code == 500)

    @hub.rpc("close")
    async def close(conn: Connection, code: int) -> None:
        await conn.close(code, "as asked for")

    @hub.rpc("subscribe")
    async def subscribe(conn: PubSubConnection, channel: str) -> None:
        await conn.subscribe(channel)

    @hub.rpc("unsubscribe")
    async def unsubscribe(conn: PubSubConnection, options: dict[str, Any]) -> None:
        await conn.unsubscribe(**options)

    return hub


@contextlib.asynccontextmanager
async def serving(hub: Hub) -> AsyncIterator[UvicornServer]:
    async with serve(WebSocketMiddleware(no_page, hub=hub), ws=OURS) as server:
        yield server


@contextlib.asynccontextmanager
async def connected(kind: str, server: UvicornServer, **options: Any) -> AsyncIterator[Client]:
    async with client_of(kind, server, **options) as client:
        await client.do("connect")
        await client.event("connected")
        yield client


def cut_off(hub: Hub) -> None:
    """Have all connections lost, without a word."""
    for conn in list(hub.context.clients.values()):
        cast(Any, conn)._link.abort()


async def subscribed(client: Client, channel: str, **options: Any) -> dict[str, Any]:
    await client.do("subscribe", channel=channel, **options)
    return await client.event("subscribed", channel)


@every_transport
async def test_connecting_and_calling(kind: str) -> None:
    async with serving(make_hub()) as server, client_of(kind, server, data={"hello": "ü"}) as client:
        await client.do("connect")
        context = await client.event("connected")
        assert context["client"]
        assert context["data"] == {"heard": {"hello": "ü"}}
        for data in ({"a": [1, {"b": None}]}, 0, "", "\u2028 \U0001f388", None, [True, 1.5]):
            assert (await client.do("rpc", method="echo", data=data))["data"] == data
        slow = client.start("rpc", method="slow")
        assert (await client.do("rpc", method="echo", data="quick"))["data"] == "quick"
        assert not slow.done()
        assert (await slow)["data"] == "slow"
        assert (await client.do("rpc", method="big", data=1_000_000))["data"] == "ü" * 1_000_000
        with pytest.raises(Failed) as failed:
            await client.do("rpc", method="fail", data=500)
        assert (failed.value.code, failed.value.message, failed.value.temporary) == (500, "as asked for", True)
        with pytest.raises(Failed) as failed:
            await client.do("rpc", method="unknown")
        assert failed.value.code == 104


@every_transport
async def test_publishing_and_subscribing(kind: str) -> None:
    hub = make_hub()
    async with serving(hub) as server, connected(kind, server, token="ann") as ann, connected("py", server) as bob:
        for client in (ann, bob):
            await subscribed(client, "room:a")
        await ann.do("publish", channel="room:a", data={"n": 1})
        await hub.publish("room:a", "by the server")
        for client in (ann, bob):
            first, second = [await client.event("publication", "room:a") for _ in range(2)]
            assert (first["data"], first["offset"]) == ({"n": 1}, 1)
            assert first["info"]["user"] == "ann"
            assert first["info"]["info"] == {"token": "ann"}
            assert (second["data"], second["info"]) == ("by the server", None)
        presence = await ann.do("presence", channel="room:a")
        assert {each["user"] for each in presence.values()} == {"ann", ""}
        assert await ann.do("presence_stats", channel="room:a") == {"num_clients": 2, "num_users": 2}
        await ann.do("unsubscribe", channel="room:a")
        assert (await ann.event("unsubscribed", "room:a"))["code"] == 0
        await hub.publish("room:a", "nobody hears it")
        await ann.do("rpc", method="echo")
        assert not ann.has("publication", "room:a")
        result = await subscribed(bob, "news", data={"from": "bob"})
        assert result["data"] == {"from": "bob"}
        for channel, code in {"unknown": 102, "room:secret": 103, "user:ann": 103}.items():
            await bob.do("subscribe", channel=channel)
            assert (await bob.event("unsubscribed", channel))["code"] == code
        with pytest.raises(Failed) as failed:
            await bob.do("publish", channel="news", data=1)
        assert failed.value.code == 103


@each_kind
async def test_order_under_many_publishers(kind: str) -> None:
    hub = make_hub()
    async with serving(hub) as server, connected(kind, server) as client:
        await subscribed(client, "room:a")
        await asyncio.gather(*(hub.publish("room:a", number) for number in range(200)))
        assert [(await client.event("publication", "room:a"))["offset"] for _ in range(200)] == list(range(1, 201))


@each_kind
async def test_histories(kind: str) -> None:
    hub = make_hub()
    async with serving(hub) as server, connected(kind, server) as client:
        position = (await subscribed(client, "news"))["streamPosition"]
        for number in range(5):
            await hub.publish("news", number)
        top = await client.do("history", channel="news")
        assert top == {"publications": [], "offset": 5, "epoch": position["epoch"]}

        async def read(**options: Any) -> list[int]:
            result = await client.do("history", channel="news", **options)
            return [each["offset"] for each in result["publications"]]

        since = {"offset": 3, "epoch": position["epoch"]}
        assert await read(limit=2) == [1, 2]
        assert await read(limit=2, reverse=True) == [5, 4]
        assert await read(limit=-1, since=since) == [4, 5]
        assert await read(limit=-1, since=since, reverse=True) == [2, 1]
        with pytest.raises(Failed) as failed:
            await read(limit=1, since={"offset": 3, "epoch": "another"})
        assert failed.value.code == 112


@every_transport
async def test_what_was_missed_is_recovered_when_the_connection_was_lost(kind: str) -> None:
    hub = make_hub()
    async with serving(hub) as server, connected(kind, server) as client:
        assert (await subscribed(client, "room:a"))["recoverable"]
        seen = []
        for number in range(5):
            await hub.publish("room:a", number)
            seen.append((await client.event("publication", "room:a"))["offset"])
            cut_off(hub)
            # Nobody is there to hear it.
            await hub.publish("room:a", -number)
            context = await client.event("subscribed", "room:a")
            assert (context["wasRecovering"], context["recovered"]) == (True, True)
            seen.append((await client.event("publication", "room:a"))["offset"])
        assert seen == list(range(1, 11))
        # Nothing was missed.
        cut_off(hub)
        context = await client.event("subscribed", "room:a")
        assert context["recovered"]
        assert context["streamPosition"]["offset"] == 10


@each_kind
async def test_what_can_not_be_recovered_is_said(kind: str) -> None:
    hub = make_hub()
    async with serving(hub) as server, connected(kind, server) as client:
        await subscribed(client, "news")
        cut_off(hub)
        for number in range(12):
            await hub.publish("news", number)
        context = await client.event("subscribed", "news")
        assert (context["wasRecovering"], context["recovered"]) == (True, False)
        assert context["streamPosition"]["offset"] == 12
        await hub.publish("news", "live")
        assert (await client.event("publication", "news"))["offset"] == 13


@each_kind
async def test_nothing_is_lost_or_doubled_while_it_is_cut_off_again_and_again(kind: str) -> None:
    hub = make_hub()
    async with serving(hub) as server, connected(kind, server) as client:
        await subscribed(client, "room:a")

        async def publish() -> None:
            for number in range(150):
                await hub.publish("room:a", number)
                await asyncio.sleep(0.004)

        publishing = asyncio.create_task(publish())
        while not publishing.done():
            await asyncio.sleep(0.15)
            cut_off(hub)
        seen = [(await client.event("publication", "room:a"))["offset"] for _ in range(150)]
        assert seen == list(range(1, 151))


@each_kind
async def test_state_is_loaded_again_where_recovery_fails(kind: str) -> None:
    hub = make_hub()
    async with serving(hub) as server, connected(kind, server) as client:
        epoch = cast(Any, await hub.publish("news", 0)).epoch
        assert (await subscribed(client, "news", state={"offset": 1, "epoch": epoch}))["recovered"]
        await client.event("state", "news")
        cut_off(hub)
        for number in range(12):
            await hub.publish("news", number)
        # Refused, asked for the state, and again, as that is no newer here.
        await client.event("state", "news")


@each_kind
async def test_channels_that_the_server_chooses(kind: str) -> None:
    hub = make_hub()
    async with serving(hub) as server, connected(kind, server, token="ann") as client:
        assert (await client.event("server subscribed", "user:ann"))["recoverable"]
        await hub.publish("user:ann", 1)
        assert (await client.event("server publication", "user:ann"))["data"] == 1
        cut_off(hub)
        await hub.publish("user:ann", 2)
        context = await client.event("server subscribed", "user:ann")
        assert (context["wasRecovering"], context["recovered"]) == (True, True)
        assert (await client.event("server publication", "user:ann"))["data"] == 2
        await client.do("rpc", method="subscribe", data="room:b")
        await client.event("server subscribed", "room:b")
        await hub.publish("room:b", 3)
        assert (await client.event("server publication", "room:b"))["data"] == 3
        await client.do("subscribe", channel="room:b")
        assert (await client.event("unsubscribed", "room:b"))["code"] == 105
        await client.do("rpc", method="unsubscribe", data={"channel": "room:b"})
        await client.event("server unsubscribed", "room:b")


@each_kind
async def test_the_server_unsubscribes_for_good_or_for_a_moment(kind: str) -> None:
    async with serving(make_hub()) as server, connected(kind, server) as client:
        await subscribed(client, "room:a")
        await client.do("rpc", method="unsubscribe", data={"channel": "room:a", "code": 2500, "reason": "again"})
        await client.event("subscribed", "room:a")
        await client.do("rpc", method="unsubscribe", data={"channel": "room:a"})
        assert (await client.event("unsubscribed", "room:a"))["code"] == 2000


@each_kind
async def test_who_comes_and_goes_is_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.presence.GRACE", 0.0)
    hub = make_hub()
    async with serving(hub) as server, connected("py", server, token="ann") as ann:
        await subscribed(ann, "room:a", joinLeave=True)
        assert (await ann.event("join", "room:a"))["user"] == "ann"
        async with connected(kind, server, token="bob") as bob:
            await subscribed(bob, "room:a", joinLeave=True)
            await bob.event("join", "room:a")
            assert (await ann.event("join", "room:a"))["user"] == "bob"
            await bob.do("unsubscribe", channel="room:a")
            assert (await ann.event("leave", "room:a"))["user"] == "bob"
            await bob.do("subscribe", channel="room:a")
            assert (await ann.event("join", "room:a"))["user"] == "bob"
        left = await ann.event("leave", "room:a")
        assert (left["user"], left["info"]) == ("bob", {"token": "bob"})


@every_transport
async def test_codes_say_whether_to_come_back(kind: str) -> None:
    async with serving(make_hub()) as server, connected(kind, server) as client:
        await client.event("connecting")
        with contextlib.suppress(Exception):
            await client.do("rpc", method="close", data=3011)
        again = await client.event("connecting")
        assert (again["code"], again["reason"]) == (3011, "as asked for")
        await client.event("connected")
        with contextlib.suppress(Exception):
            await client.do("rpc", method="close", data=4501)
        ended = await client.event("disconnected")
        assert (ended["code"], ended["reason"]) == (4501, "as asked for")


@each_kind
async def test_whoever_is_disconnected_stays_away_and_who_meets_a_restart_comes_back(kind: str) -> None:
    hub = make_hub()
    async with serving(hub) as server, connected(kind, server, token="ann") as ann, connected(kind, server) as bob:
        await hub.disconnect(user="ann")
        ended = await ann.event("disconnected")
        assert (ended["code"], ended["reason"]) == (3503, "disconnected")
        await bob.event("connecting")
        for conn in hub.context.clients.values():
            cast(Any, conn).server_stopping()
        assert (await bob.event("connecting"))["code"] == 3001
        await bob.event("connected")


@each_kind
async def test_tokens(kind: str) -> None:
    async def ends(token: str, code: int) -> None:
        async with client_of(kind, server, token=token) as client:
            await client.do("connect")
            assert (await client.event("disconnected"))["code"] == code

    async def comes_back(token: str, code: int, tokens: list[str] | None) -> None:
        async with client_of(kind, server, token=token, tokens=tokens) as client:
            await client.do("connect")
            assert (await client.event("error"))["code"] == code
            await client.event("connected")

    async with serving(make_hub()) as server:
        await asyncio.gather(
            ends("wrong", 3500), ends("banned", 101), comes_back("expired", 109, ["ann"]), comes_back("busy", 111, None)
        )


async def for_both(check: Callable[[str], Awaitable[None]]) -> None:
    """Where a client waits, the other may wait at the same time."""
    await asyncio.gather(check("websocket"), check("py"))


async def test_tokens_are_renewed() -> None:
    async def check(kind: str) -> None:
        async with client_of(kind, server, token="short", tokens=["short"]) as client:
            await client.do("connect")
            await client.event("connected")
            assert (await subscribed(client, "private", tokens=["expired", "short", "good"]))["recoverable"]
            assert (await client.event("error", "private"))["code"] == 109
            await client.event("token")
            await asyncio.sleep(0.2)
            assert (await client.do("rpc", method="echo", data=1))["data"] == 1
            assert not client.has("disconnected")
            assert not client.has("unsubscribed", "private")

    async with serving(make_hub()) as server:
        await for_both(check)


async def test_what_is_not_renewed_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.endpoints.pubsub._GRACE", -0.9)

    async def check(kind: str) -> None:
        async with client_of(kind, server, tokens=["ann"]) as client:
            await client.do("connect")
            await client.event("connected")
            await subscribed(client, "private", tokens=["short"])
            await client.event("subscribing", "private")
            assert (await client.event("subscribing", "private"))["code"] == 2501
            await client.event("subscribed", "private")
        async with client_of(kind, server, token="short", tokens=["ann"]) as client:
            await client.do("connect")
            await client.event("connected")
            await client.event("connecting")
            assert (await client.event("connecting"))["code"] == 3005

    async with serving(make_hub()) as server:
        await for_both(check)


async def test_pings_come_however_much_is_said() -> None:
    hub = make_hub(ping_interval=0.3, ping_timeout=0.25)

    async def check(kind: str) -> None:
        delay = {"maxServerPingDelay": 200} if kind != "py" else {"max_server_ping_delay": 0.2}
        async with connected(kind, server, **delay) as client:
            await client.event("connecting")
            await subscribed(client, "room:a")
            for number in range(16):
                await hub.publish("room:a", number)
                await asyncio.sleep(0.1)
            assert not client.has("connecting")
            assert not client.has("disconnected")

    async with serving(hub) as server:
        await for_both(check)


async def test_commands_in_one_frame_and_messages() -> None:
    async with serving(make_hub()) as server, connected("websocket", server) as client:
        commands = [{"do": "rpc", "method": "echo", "data": number} for number in range(3)]
        assert [each["data"] for each in await client.do("batch", commands=commands)] == [0, 1, 2]
        await client.do("send", data={"a": 1})
        assert (await client.event("message"))["data"] == {"a": 1}


async def test_what_is_not_offered_is_declined_in_words_that_clients_understand() -> None:
    async with serving(make_hub()) as server, connected("websocket", server) as client:
        await client.do("subscribe", channel="news", tagsFilter={"key": "a", "cmp": "ex"})
        assert (await client.event("unsubscribed", "news"))["code"] == 107
        await subscribed(client, "room:a", delta="fossil")


# In Chromium


LIBRARY = HERE / "node_modules/centrifuge/dist/centrifuge.js"


def page_without_a_network(**replaced: str) -> Any:
    """examples/dashboard_centrifuge.py, whose page has its library from here."""
    html = (ROOT / "examples/dashboard_centrifuge.html").read_text()
    html = re.sub(r'src="https:[^"]*"', 'src="/centrifuge.js"', html)
    for old, new in replaced.items():
        assert old in html
        html = html.replace(old, new)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/":
            await HTMLResponse(html)(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == "/centrifuge.js":
            await FileResponse(LIBRARY)(scope, receive, send)
        else:
            await dashboard_centrifuge.app(scope, receive, send)

    return app


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def shows(selector: str, text: str) -> str:
    return f"document.querySelector({json.dumps(selector)})?.textContent === {json.dumps(text)}"


@pytest.mark.parametrize("transport", ["http_stream", "sse"])
async def test_the_dashboard_in_a_browser(browser: Browser, transport: str) -> None:
    node("centrifuge")
    # WebSockets that can't pass: the client goes on to the next of its list.
    replaced = {'"ws")}//${at}`': '"ws")}//${at}/none`'}
    if transport == "sse":
        replaced["//${at}/http_stream`"] = "//${at}/none`"
    metric = f"load-{transport}"
    async with serve(page_without_a_network(**replaced)) as server, browser.page("about:blank") as page:
        await page.goto(server.http)
        await page.until(shows("#transport", f"by {transport}"))
        for name, value in ((metric, "0.25"), (metric, "0.5")):
            await page.fill("#metric", name)
            await page.fill("#value", value)
            await page.click("#report button")
        await page.fill("#name", metric)
        await page.click("#watch button")
        card = f"[id='metrics:{metric}']"
        await page.until(shows(f"{card} .value", "0.5"))
        await page.until(shows(f"{card} small", "nobody else watches"))
        await dashboard_centrifuge.hub.publish(f"metrics:{metric}", {"value": 0.75})
        await page.until(shows(f"{card} .value", "0.75"))
        (connection,) = dashboard_centrifuge.hub.context.clients
        await dashboard_centrifuge.hub.disconnect(connection=connection, code=3011, reason="force reconnect")
        await dashboard_centrifuge.hub.publish(f"metrics:{metric}", {"value": 1.5})
        await page.until(shows(f"{card} .value", "1.5"))
        points = await page.getAttribute(f"{card} polyline", "points")
        assert points is not None
        assert len(points.split()) == 4
        await page.fill("#name", "secret-plans")
        await page.click("#watch button")
        await page.until(shows("[id='metrics:secret-plans'] small", "permission denied"))
