"""Clients of the Centrifuge protocol, from the first command to the last: what they say and what they are told."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from asgi_ws import (
    BrokerError,
    CommandError,
    Connection,
    ConnectionClosed,
    Grant,
    Hub,
    InvalidChannel,
    InvalidToken,
    Limits,
    PubSubConnection,
    SubscriptionDenied,
    TokenExpired,
    WebSocketMiddleware,
)
from asgi_ws.brokers import MemoryBroker
from asgi_ws.testing import Client, Refused, connect, request

pytestmark = pytest.mark.anyio


async def no_page(scope: Any, receive: Any, send: Any) -> None:
    """An application that has nothing of its own."""
    if scope["type"] == "lifespan":
        raise AssertionError("no lifespan")
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body"})


class Talk:
    """A client that numbers its commands and reads one line after the other."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.lines: list[str] = []
        self._id = 0

    async def say(self, *commands: dict[str, Any]) -> None:
        await self.client.send("\n".join(json.dumps(each) for each in commands))

    def command(self, name: str, /, **fields: Any) -> dict[str, Any]:
        self._id += 1
        return {"id": self._id, name: fields}

    async def hear(self) -> Any:
        if not self.lines:
            self.lines = str(await self.client.receive()).split("\n")
        return json.loads(self.lines.pop(0))

    async def ask(self, name: str, /, **fields: Any) -> Any:
        """The result, or the error. Nothing else may come before it."""
        await self.say(self.command(name, **fields))
        return self.of_reply(await self.hear(), name)

    def of_reply(self, answer: dict[str, Any], name: str) -> Any:
        assert answer.pop("id") == self._id
        assert len(answer) == 1
        return answer.get(name, answer.get("error"))

    async def ask_nothing(self) -> None:
        """Nothing comes for a moment."""
        waiting = asyncio.create_task(self.hear())
        await asyncio.sleep(0.02)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait([waiting])

    async def pushed(self, kind: str) -> Any:
        answer = await self.hear()
        assert kind in answer.get("push", {}), answer
        return answer["push"]

    async def closed(self) -> tuple[int, str]:
        with pytest.raises(ConnectionClosed) as raised:
            while True:
                await self.hear()
        return raised.value.code, raised.value.reason


def app_of(hub: Hub) -> WebSocketMiddleware:
    return WebSocketMiddleware(no_page, hub=hub)


@contextlib.asynccontextmanager
async def talk(hub: Hub, path: str = "/live", **options: Any) -> AsyncIterator[Talk]:
    """A client that says nothing yet."""
    app = hub.__dict__.setdefault("app", app_of(hub))
    async with connect(app, path, **options) as client:
        yield Talk(client)


@contextlib.asynccontextmanager
async def connected(hub: Hub, **fields: Any) -> AsyncIterator[Talk]:
    async with talk(hub) as client:
        assert "client" in await client.ask("connect", **fields)
        yield client


def open_hub(**options: Any) -> Hub:
    """A hub in which everybody may read the news, and chat in rooms."""
    hub = Hub(**options)
    hub.serve_pubsub("/live")

    @hub.channel("news", history=5)
    async def news(conn: Connection) -> bool:
        return True

    @hub.channel("room:{name}", presence=True, publish=True)
    async def room(conn: Connection, name: str) -> bool:
        return name != "secret"

    hub.channel("inner")
    return hub


# Connecting


async def test_the_connect_reply_has_what_clients_need() -> None:
    hub = open_hub()
    async with talk(hub) as first, talk(hub) as second:
        results = [await each.ask("connect", name="js") for each in (first, second)]
    assert results[0].pop("client") != results[1].pop("client")
    assert results == [{"version": "asgi_ws", "ping": 25, "pong": True}] * 2


async def test_without_pings_none_are_promised() -> None:
    hub = open_hub(limits=Limits(ping_interval=None))
    async with talk(hub) as client:
        assert set(await client.ask("connect")) == {"client", "version"}
    async with talk(open_hub(), "/live?cf_ws_frame_ping_pong=true") as client:
        assert set(await client.ask("connect")) == {"client", "version"}


async def test_the_application_says_who_connects() -> None:
    hub = Hub()
    users = []

    async def authenticate(conn: PubSubConnection, token: str) -> Grant | None:
        if token == "expired":
            raise TokenExpired
        if token == "banned":
            raise CommandError(403, "you are banned")
        if token == "later":
            raise CommandError(100, temporary=True)
        if token == "forbidden":
            raise HTTPException(403, "no")
        if token == "bug":
            raise ZeroDivisionError
        if token == "forged":
            raise InvalidToken("not signed by us")
        return Grant(user=token[1:], data={"heard": conn.data, "token": conn.token}) if token.startswith("=") else None

    hub.serve_pubsub("/live", authenticate=authenticate)

    @hub.rpc("whoami")
    async def whoami(conn: Connection) -> str | None:
        users.append(conn.user)
        return conn.user_id

    async with talk(hub) as client:
        result = await client.ask("connect", token="=ann", data={"a": 1})
        assert result["data"] == {"heard": {"a": 1}, "token": "=ann"}
        assert "expires" not in result
        assert await client.ask("rpc", method="whoami", data="ignored") == {"data": "ann"}
    assert users == ["ann"]
    for token, error in {
        "expired": {"code": 109, "message": "token expired"},
        "banned": {"code": 403, "message": "you are banned"},
        "later": {"code": 100, "message": "internal server error", "temporary": True},
        "forbidden": {"code": 103, "message": "permission denied"},
        "bug": {"code": 100, "message": "internal server error", "temporary": True},
        "": {"code": 101, "message": "unauthorized"},
    }.items():
        async with talk(hub) as client:
            assert await client.ask("connect", token=token) == error
            await client.say(client.command("rpc", method="whoami"))
            assert await client.closed() == (3501, "bad request")
    for token in ("wrong", "forged"):
        async with talk(hub) as client:
            await client.say(client.command("connect", token=token))
            assert await client.closed() == (3500, "invalid token")


@pytest.mark.parametrize(
    "frame",
    [
        '{"subscribe":{"channel":"news"},"id":1}',
        "{}",
        "",
        "\n",
        "not JSON",
        "[1]",
        '{"connect":{}}',
        '{"id":1}',
        '{"id":-1,"connect":{}}',
        '{"id":1,"connect":{"token":7}}',
        '{"id":1,"connect":{}}\n\n{"id":2,"rpc":{}}',
        '{"id":1,"connect":{}}\n{"id":2,"connect":{}}',
        '{"id":1,"connect":{}}\n{}',
        '{"id":1,"connect":{}}\n{"id":2,"fly":{}}',
        '{"id":1,"connect":{}}\n{"fly":{},"id":true}',
        '{"id":1,"connect":{}}\n{"id":2,"subscribe":{}}',
        '{"id":1,"connect":{}}\n{"rpc":{"method":"x"}}',
        '{"id":1,"connect":{}}\n{"id":2,"refresh":{"token":"x"}}',
        '{"id":1,"connect":{}}\n' + "[" * 100_000,
        b'{"id":1,"connect":{}}',
    ],
)
async def test_what_the_protocol_forbids_ends_the_connection(frame: str | bytes) -> None:
    async with talk(open_hub()) as client:
        await client.client.send(frame)
        assert await client.closed() == (3501, "bad request")


async def test_a_command_that_can_be_numbered_gets_its_error() -> None:
    async with connected(open_hub()) as client:
        await client.client.send(r'{"id":2,"publish":{"channel":"room:a","data":"\ud83d"}}')
        assert await client.hear() == {"id": 2, "error": {"code": 107, "message": "bad request"}}
        await client.client.send('{"id":3,"history":{"channel":"room:a","limit":"all"}}')
        assert (await client.hear())["error"]["code"] == 107


async def test_unknown_fields_and_flags_do_no_harm() -> None:
    async with talk(open_hub()) as client:
        assert "client" in await client.ask("connect", name="js", flag=1, profile="x", headers={"a": "b"})
        assert await client.ask("subscribe", channel="room:a", flag=1, delta="fossil", positioned=True) == {}


async def test_whoever_does_not_connect_is_closed_as_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.endpoints.pubsub._CONNECT_TIME", 0.05)
    hub = Hub()

    async def authenticate(conn: PubSubConnection, token: str) -> Grant | None:
        if token == "hang":
            await asyncio.sleep(0.1)
            return Grant()
        return None

    hub.serve_pubsub("/live", authenticate=authenticate)
    async with talk(hub) as client:
        assert await client.closed() == (3502, "stale")
    async with talk(hub) as client:
        assert (await client.ask("connect"))["code"] == 101
        assert await client.closed() == (3502, "stale")
    async with talk(hub) as client:
        await client.say(client.command("connect", token="hang"))
        assert await client.closed() == (3502, "stale")


async def test_protobuf_is_refused_and_the_json_subprotocol_agreed_on() -> None:
    hub = open_hub()
    for path in ("/live?cf_protocol=protobuf", "/live?format=protobuf"):
        with pytest.raises(Refused) as raised:
            async with talk(hub, path):
                pass
        assert raised.value.status_code == 400
    with pytest.raises(Refused):
        async with talk(hub, subprotocols=["centrifuge-protobuf"]):
            pass
    for offered, chosen in ((["centrifuge-json", "centrifuge-protobuf"], "centrifuge-json"), ([""], None), ([], None)):
        async with talk(hub, subprotocols=offered) as client:
            assert client.client.subprotocol == chosen
            assert "client" in await client.ask("connect")


async def test_pages_of_other_origins_are_refused() -> None:
    with pytest.raises(Refused) as raised:
        async with talk(open_hub(), headers={"origin": "https://elsewhere.example"}):
            pass
    assert raised.value.status_code == 403


async def test_plain_http_is_told_to_upgrade() -> None:
    response = await request(app_of(open_hub()), "GET", "/live")
    assert response.status_code == 426


# Subscribing and publishing


async def test_only_rules_let_clients_subscribe() -> None:
    async with connected(open_hub()) as client:
        for channel, code in {
            "unknown": 102,
            "inner": 103,
            "room:secret": 103,
            "x" * 256: 107,
            "new\nline": 107,
        }.items():
            assert (await client.ask("subscribe", channel=channel))["code"] == code, channel
        assert await client.ask("subscribe", channel="room:a") == {}
        assert (await client.ask("subscribe", channel="room:a"))["code"] == 105


async def test_a_connection_can_have_so_many_channels() -> None:
    async with connected(open_hub(limits=Limits(channels=1))) as client:
        assert await client.ask("subscribe", channel="room:a") == {}
        assert (await client.ask("subscribe", channel="room:b"))["code"] == 106
        assert await client.ask("unsubscribe", channel="room:a") == {}
        assert await client.ask("subscribe", channel="room:b") == {}


async def test_what_is_not_offered_is_refused() -> None:
    async with connected(open_hub()) as client:
        for kind in (1, 2, 3, 4):
            assert (await client.ask("subscribe", channel="news", type=kind))["code"] == 108
        assert (await client.ask("subscribe", channel="news", tf={"key": "a", "cmp": "ex"}))["code"] == 107
        assert (await client.ask("publish", channel="room:a", type=1, key="k", data=1))["code"] == 108
        assert (await client.ask("sub_refresh", channel="room:a", type=1))["code"] == 108
        assert (await client.ask("rpc", method="x"))["code"] == 108
        await client.say({"send": {"data": 1}})
        assert await client.closed() == (3508, "not available")


async def test_a_publication_reaches_everybody_with_who_sent_it() -> None:
    hub = open_hub()

    @hub.websocket("/room")
    async def plain(conn: Connection) -> None:
        await conn.subscribe("room:a")
        await conn.send("ready")
        await conn.receive()

    async with connected(hub) as ann, connected(hub) as bob, connect(hub.__dict__["app"], "/room") as eve:
        assert await eve.receive() == "ready"
        for client in (ann, bob):
            assert await client.ask("subscribe", channel="room:a") == {}
        await ann.say(
            ann.command("publish", channel="room:a", data={"n": 1}),
            ann.command("publish", channel="room:a", data="text"),
        )
        heard = [await ann.hear() for _ in range(4)]
        assert [each for each in heard if "id" in each] == [{"id": 3, "publish": {}}, {"id": 4, "publish": {}}]
        pushes = [each["push"] for each in heard if "push" in each]
        assert [await bob.pushed("pub"), await bob.pushed("pub")] == pushes
        info = pushes[0]["pub"]["info"]
        assert info["user"] == ""
        assert set(info) == {"user", "client"}
        assert pushes[0] == {"channel": "room:a", "pub": {"data": {"n": 1}, "info": pushes[1]["pub"]["info"]}}
        # Others get the data, and nothing around it.
        assert [await eve.receive(), await eve.receive()] == ['{"n":1}', "text"]


async def test_publications_by_the_server_come_without_info() -> None:
    hub = open_hub()
    async with connected(hub) as client:
        await client.ask("subscribe", channel="room:a")
        for data in ("text", None, {"a": [1]}, b"\x00\xff"):
            await hub.publish("room:a", data)
        pubs = [(await client.pushed("pub"))["pub"] for _ in range(4)]
        assert pubs == [
            {"data": "text"},
            {"data": None},
            {"data": {"a": [1]}},
            {"data": "AP8=", "tags": {"encoding": "base64"}},
        ]


async def test_clients_publish_where_a_rule_allows_it() -> None:
    hub = open_hub()
    asked = []

    async def may_post(conn: Connection, name: str) -> bool:
        asked.append(name)
        return name == "open"

    hub.channel("wall:{name}", publish=may_post)
    async with connected(hub) as client:
        for channel, code in {
            "unknown": 102,
            "news": 103,
            "inner": 103,
            "room:a": 103,
            "wall:closed": 103,
            "": 0,
        }.items():
            if code:
                assert (await client.ask("publish", channel=channel, data=1))["code"] == code
        assert await client.ask("publish", channel="wall:open", data=1) == {}
        assert asked == ["closed", "open"]
        await client.say({"id": 99, "publish": {"channel": "wall:open"}})
        assert (await client.hear())["error"]["code"] == 107


async def test_commands_of_one_channel_are_done_in_their_order() -> None:
    hub = Hub()
    hub.serve_pubsub("/live")
    waits = asyncio.Event()

    @hub.channel("slow", publish=True)
    async def slow(conn: Connection) -> bool:
        await waits.wait()
        return True

    @hub.channel("quick")
    async def quick(conn: Connection) -> bool:
        waits.set()
        return True

    async with connected(hub) as client:
        await client.say(
            client.command("subscribe", channel="slow"),
            client.command("publish", channel="slow", data=1),
            client.command("unsubscribe", channel="slow"),
            client.command("unsubscribe", channel="slow"),
            client.command("subscribe", channel="slow"),
            client.command("subscribe", channel="quick"),
        )
        heard = [await client.hear() for _ in range(7)]
    assert [each.get("id", "push") for each in heard if each.get("id") != 7] in (
        [2, "push", 3, 4, 5, 6],
        [2, 3, "push", 4, 5, 6],
    )
    assert all("error" not in each for each in heard)


async def test_nothing_comes_behind_the_answer_to_unsubscribe() -> None:
    hub = open_hub()
    async with connected(hub) as client:
        await client.ask("subscribe", channel="room:a")
        assert await client.ask("unsubscribe", channel="room:a") == {}
        await hub.publish("room:a", 1)
        assert await client.ask("unsubscribe", channel="room:a") == {}
        assert await client.ask("unsubscribe", channel="never") == {}


async def test_rules_say_and_hear_more_than_yes() -> None:
    hub = Hub()
    hub.serve_pubsub("/live")

    @hub.channel("private:{name}", presence=True)
    async def private(conn: Connection, name: str, token: str, data: Any) -> Grant | bool:
        if token == "expired":
            raise TokenExpired
        if token == "unknown":
            raise CommandError(102)
        return token == name and Grant(data={"heard": data}, info={"name": name})

    async with connected(hub) as client:
        for token, code in {"expired": 109, "unknown": 102, "wrong": 103, "": 103}.items():
            assert (await client.ask("subscribe", channel="private:a", token=token))["code"] == code
        result = await client.ask("subscribe", channel="private:a", token="a", data=[1])
        assert result == {"data": {"heard": [1]}}
        (info,) = (await client.ask("presence", channel="private:a"))["presence"].values()
        assert info["conn_info"] == {"name": "a"}


# Messages and procedures


async def test_procedures_get_what_they_ask_for_and_give_any_json() -> None:
    hub = Hub()
    hub.serve_pubsub("/live")

    @dataclasses.dataclass
    class Pair:
        a: int
        b: int

    @hub.rpc("echo")
    async def echo(conn: Connection, data: Any) -> Any:
        return data

    @hub.rpc("untyped")
    async def untyped(conn, data):  # type: ignore[no-untyped-def]
        return [data]

    @hub.rpc("add")
    async def add(conn: Connection, pair: Pair) -> int:
        return pair.a + pair.b

    @hub.rpc("fail")
    async def fail(conn: Connection, code: int) -> None:
        raise CommandError(code, "as asked for", temporary=code == 500)

    @hub.rpc("status")
    async def status(conn: Connection, code: int) -> None:
        raise HTTPException(code)

    @hub.rpc("other")
    async def other(conn: Connection, kind: str) -> Any:
        raise {"denied": SubscriptionDenied("x"), "name": InvalidChannel("x"), "broker": BrokerError("x")}[kind]

    @hub.rpc("set")
    async def no_json(conn: Connection) -> Any:
        return object()

    async with connected(hub) as client:
        for data in (None, 0, "", [], {"a": [1, {"b": None}]}, "\u2028 \U0001f388", 1.5, -(2**53), True):
            assert await client.ask("rpc", method="echo", data=data) == {"data": data}
        assert await client.ask("rpc", method="untyped") == {"data": [None]}
        assert await client.ask("rpc", method="add", data={"a": 1, "b": 2}) == {"data": 3}
        invalid = await client.ask("rpc", method="add", data={"a": 1, "b": "x"})
        assert invalid["code"] == 107
        assert "$.b" in invalid["message"]
        assert (await client.ask("rpc", method="nope"))["code"] == 104
        assert await client.ask("rpc", method="fail", data=400) == {"code": 400, "message": "as asked for"}
        assert await client.ask("rpc", method="fail", data=500) == {
            "code": 500,
            "message": "as asked for",
            "temporary": True,
        }
        for status_code, code in {401: 101, 403: 103, 404: 102, 429: 111, 418: 107, 500: 100}.items():
            assert (await client.ask("rpc", method="status", data=status_code))["code"] == code
        for kind, code in {"denied": 103, "name": 107, "broker": 100, "nothing": 100}.items():
            assert (await client.ask("rpc", method="other", data=kind))["code"] == code
        assert (await client.ask("rpc", method="set"))["code"] == 100


async def test_a_slow_procedure_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    hub.serve_pubsub("/live")
    go_on = asyncio.Event()

    @hub.rpc("slow")
    async def slow(conn: Connection) -> str:
        await go_on.wait()
        return "slow"

    @hub.rpc("quick")
    async def quick(conn: Connection) -> str:
        go_on.set()
        return "quick"

    async with connected(hub) as client:
        await client.say(client.command("rpc", method="slow"), client.command("rpc", method="quick"))
        assert [(await client.hear())["rpc"]["data"] for _ in range(2)] == ["quick", "slow"]


async def test_so_many_commands_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.endpoints.pubsub._AT_ONCE", 2)
    hub = Hub()
    hub.serve_pubsub("/live")
    begun: list[int] = []
    go_on = asyncio.Event()

    @hub.rpc("work")
    async def work(conn: Connection, number: int) -> int:
        begun.append(number)
        if number == 2:
            go_on.set()
        await go_on.wait()
        return number

    async with connected(hub) as client:
        go_on.clear()
        await client.say(*(client.command("rpc", method="work", data=number) for number in range(2)))
        await client.say(*(client.command("rpc", method="work", data=number) for number in range(2, 5)))
        asyncio.get_running_loop().call_later(0.05, lambda: (begun.append(-1), go_on.set()))
        heard = [(await client.hear())["rpc"]["data"] for _ in range(5)]
    assert begun == [0, 1, -1, 2, 3, 4]
    assert sorted(heard) == [0, 1, 2, 3, 4]


async def test_messages_go_both_ways_without_an_answer() -> None:
    hub = Hub()
    heard: list[int] = []

    async def on_message(conn: Connection, number: int) -> None:
        heard.append(number)
        if number == 3:
            raise CommandError(400, "nobody hears this")
        await conn.send({"got": number})

    hub.serve_pubsub("/live", on_message=on_message)
    async with connected(hub) as client:
        await client.say(*({"send": {"data": number}} for number in (1, 2, 3)), {"id": 9, "send": {"data": 4}})
        assert [await client.pushed("message") for _ in range(3)] == [
            {"message": {"data": {"got": n}}} for n in (1, 2, 4)
        ]
    assert heard == [1, 2, 3, 4]


async def test_a_client_that_asks_too_much_is_sent_away_for_a_while() -> None:
    hub = open_hub(limits=Limits(messages_per_second=1, burst=3))
    async with connected(hub) as client:
        await client.say(*(client.command("presence", channel="x") for _ in range(3)))
        assert await client.closed() == (3013, "too many requests")


async def test_commands_are_not_limited_where_nothing_is() -> None:
    async with connected(open_hub(limits=Limits(messages_per_second=None, channels=None))) as client:
        assert await client.ask("subscribe", channel="room:a") == {}


async def test_a_frame_with_too_many_commands_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.protocols.centrifuge._MAX_COMMANDS", 3)
    async with connected(open_hub()) as client:
        await client.client.send(chr(10).join(["{}"] * 4))
        assert await client.closed() == (3013, "too many commands")


async def test_what_is_being_done_ends_with_the_connection() -> None:
    hub = Hub()
    hub.serve_pubsub("/live")
    ended: list[str] = []
    begun = asyncio.Event()

    @hub.rpc("finishes")
    async def finishes(conn: Connection) -> None:
        begun.set()
        while conn.id in hub.context.clients and not conn._closed:
            await asyncio.sleep(0.01)
        ended.append("finished")

    async with connected(hub) as client:
        await client.say(client.command("rpc", method="finishes"))
        await begun.wait()
        await client.client.vanish()
    assert ended == ["finished"]


async def test_what_does_not_end_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.connection._FINISH", 0.05)
    hub = Hub()
    hub.serve_pubsub("/live")
    cancelled: list[bool] = []
    begun = asyncio.Event()

    @hub.rpc("hangs")
    async def hangs(conn: Connection) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(True)

    async with connected(hub) as client:
        await client.say(client.command("rpc", method="hangs"))
        await begun.wait()
        await client.client.vanish()
    assert cancelled == [True]


# History and recovery


async def publish_all(hub: Hub, channel: str, data: Iterable[Any]) -> None:
    for each in data:
        await hub.publish(channel, each)


async def test_a_channel_with_a_history_has_positions() -> None:
    hub = open_hub()
    async with connected(hub) as client:
        result = await client.ask("subscribe", channel="news")
        epoch = result.pop("epoch")
        assert epoch
        assert result == {"recoverable": True, "positioned": True}
        await publish_all(hub, "news", range(2))
        assert [(await client.pushed("pub"))["pub"] for _ in range(2)] == [
            {"data": 0, "offset": 1},
            {"data": 1, "offset": 2},
        ]
        assert await client.ask("unsubscribe", channel="news") == {}
        result = await client.ask("subscribe", channel="news")
        assert (result["offset"], result["epoch"]) == (2, epoch)
        assert await client.ask("history", channel="news") == {"publications": [], "offset": 2, "epoch": epoch}


def offsets(result: dict[str, Any]) -> list[int]:
    return [each["offset"] for each in result["publications"]]


async def test_who_comes_back_gets_what_it_missed_in_the_reply() -> None:
    hub = open_hub()
    async with connected(hub) as keeps_it, connected(hub) as client:
        epoch = (await keeps_it.ask("subscribe", channel="news"))["epoch"]
        await publish_all(hub, "news", range(7))

        async def recover(**fields: Any) -> Any:
            result = await client.ask("subscribe", channel="news", recover=True, **fields)
            await client.ask("unsubscribe", channel="news")
            return result

        assert await recover(offset=5, epoch=epoch) == {
            "recoverable": True,
            "positioned": True,
            "epoch": epoch,
            "offset": 5,
            "was_recovering": True,
            "recovered": True,
            "publications": [{"data": 5, "offset": 6}, {"data": 6, "offset": 7}],
        }
        nothing_missed = await recover(offset=7, epoch=epoch)
        assert nothing_missed["recovered"]
        assert "publications" not in nothing_missed
        assert nothing_missed["offset"] == 7
        for lost in ({"offset": 1, "epoch": epoch}, {"offset": 5, "epoch": "_"}, {"offset": 9, "epoch": epoch}, {}):
            result = await recover(**lost)
            assert result == {
                "recoverable": True,
                "positioned": True,
                "epoch": epoch,
                "offset": 7,
                "was_recovering": True,
            }, lost
            assert (await recover(**lost, flag=3))["code"] == 112
        assert offsets(await recover(offset=2)) == [3, 4, 5, 6, 7]
        # And what is published next follows.
        await client.ask("subscribe", channel="news", recover=True, offset=6, epoch=epoch)
        await hub.publish("news", "next")
        assert (await client.pushed("pub"))["pub"] == {"data": "next", "offset": 8}


async def test_who_asks_from_the_beginning_gets_the_whole_stream() -> None:
    hub = open_hub()
    async with connected(hub) as client:
        await publish_all(hub, "news", range(3))
        assert offsets(await client.ask("subscribe", channel="news", recover=True)) == [1, 2, 3]


async def test_recovering_where_there_is_no_history_is_an_ordinary_beginning() -> None:
    async with connected(open_hub()) as client:
        assert await client.ask("subscribe", channel="room:a", recover=True, offset=5, epoch="x", flag=2) == {}


async def test_publications_that_come_with_the_reply_are_not_repeated() -> None:
    hub = open_hub()
    async with connected(hub) as client:
        epoch = (await client.ask("subscribe", channel="news"))["epoch"]
        await client.ask("unsubscribe", channel="news")
        await publish_all(hub, "news", range(2))
        await client.say(client.command("subscribe", channel="news", recover=True, offset=0, epoch=epoch))
        await publish_all(hub, "news", range(2, 4))
        heard = [await client.hear()]
        seen = offsets(heard[0]["subscribe"])
        while len(seen) < 4:
            seen.append((await client.pushed("pub"))["pub"]["offset"])
        assert seen == [1, 2, 3, 4]


async def test_histories_are_read_forwards_and_backwards() -> None:
    hub = open_hub()
    async with connected(hub) as client:
        epoch = (await client.ask("subscribe", channel="news"))["epoch"]
        assert await client.ask("history", channel="news", limit=-1) == {
            "publications": [],
            "offset": 0,
            "epoch": epoch,
        }
        await publish_all(hub, "news", range(7))
        for _ in range(7):
            await client.pushed("pub")

        async def read(**fields: Any) -> list[int]:
            return offsets(await client.ask("history", channel="news", **fields))

        def since(offset: int, epoch: str = epoch) -> dict[str, Any]:
            return {"offset": offset, "epoch": epoch}

        assert await read() == await read(limit=0) == []
        assert await read(limit=2) == [3, 4]
        assert await read(limit=-1) == await read(limit=1000) == [3, 4, 5, 6, 7]
        assert await read(limit=2, reverse=True) == [7, 6]
        assert await read(limit=-1, reverse=True) == [7, 6, 5, 4, 3]
        assert await read(limit=-1, since=since(5)) == [6, 7]
        assert await read(limit=1, since=since(5, "")) == [6]
        assert await read(limit=-1, since=since(0)) == [3, 4, 5, 6, 7]
        assert await read(limit=2, since=since(6), reverse=True) == [5, 4]
        assert await read(limit=2, since=since(99), reverse=True) == [7, 6]
        assert await read(limit=-1, since=since(4), reverse=True) == [3]
        assert await read(limit=-1, since=since(2), reverse=True) == []
        assert (await client.ask("history", channel="news", limit=1, since=since(1, "x")))["code"] == 112
        assert (await client.ask("history", channel="news", limit=1, since=since(0), reverse=True))["code"] == 107


async def test_history_and_presence_are_for_subscribers_of_channels_that_have_them() -> None:
    async with connected(open_hub()) as client:
        for command in ("history", "presence", "presence_stats"):
            assert (await client.ask(command, channel="unknown"))["code"] == 102
            assert (await client.ask(command, channel="news"))["code"] == 103
        await client.ask("subscribe", channel="news")
        await client.ask("subscribe", channel="room:a")
        assert (await client.ask("history", channel="room:a"))["code"] == 108
        assert (await client.ask("presence", channel="news"))["code"] == 108
        assert (await client.ask("presence_stats", channel="news"))["code"] == 108


class Forgetful(MemoryBroker):
    """One that loses what it kept, as one does that was started again."""

    def forget(self, channel: str) -> None:
        entry = self._channels[channel]
        entry.epoch, entry.offset = "another", 0
        if entry.kept:
            entry.kept.clear()


async def test_a_client_is_told_of_a_loss_and_comes_back() -> None:
    broker = Forgetful()
    hub = open_hub(broker=broker)
    async with connected(hub) as client:
        await client.ask("subscribe", channel="news")
        broker.forget("news")
        await hub.publish("news", "after")
        push = await client.pushed("unsubscribe")
        assert push == {"channel": "news", "unsubscribe": {"code": 2500, "reason": "insufficient state"}}
        result = await client.ask("subscribe", channel="news")
        assert (result["epoch"], result["offset"]) == ("another", 1)
        await hub.publish("news", "more")
        assert (await client.pushed("pub"))["pub"] == {"data": "more", "offset": 2}


async def test_a_loss_in_a_channel_of_the_servers_ends_the_connection() -> None:
    broker = Forgetful()
    hub = Hub(broker)

    async def channels(conn: Connection) -> list[str]:
        return ["news"]

    hub.serve_pubsub("/live", channels=channels)
    hub.channel("news", history=5)
    async with connected(hub) as client:
        broker.forget("news")
        await hub.publish("news", "after")
        assert await client.closed() == (3010, "insufficient state")


# Presence


async def test_who_is_there_is_known() -> None:
    hub = Hub()

    async def authenticate(conn: PubSubConnection, token: str) -> Grant:
        return Grant(user=token, info={"name": token.title()})

    hub.serve_pubsub("/live", authenticate=authenticate)

    @hub.channel("room", presence=True)
    async def room(conn: Connection) -> bool:
        return True

    async with connected(hub, token="ann") as ann, connected(hub, token="bob") as bob:
        await ann.ask("subscribe", channel="room", join_leave=True)
        push = await ann.pushed("join")
        info = push["join"]["info"]
        assert info["user"] == "ann"
        assert info["conn_info"] == {"name": "Ann"}
        await bob.ask("subscribe", channel="room")
        push = await ann.pushed("join")
        assert push["channel"] == "room"
        assert push["join"]["info"]["user"] == "bob"
        present = (await ann.ask("presence", channel="room"))["presence"]
        assert present[info["client"]] == info
        assert len(present) == 2
        assert await bob.ask("presence_stats", channel="room") == {"num_clients": 2, "num_users": 2}
        await ann.ask("unsubscribe", channel="room")
        assert await bob.ask("presence_stats", channel="room") == {"num_clients": 1, "num_users": 1}


async def test_who_goes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.presence.GRACE", 0.0)
    hub = open_hub()
    async with connected(hub) as ann, connected(hub) as bob:
        await ann.ask("subscribe", channel="room:a", join_leave=True)
        await ann.pushed("join")
        await bob.ask("subscribe", channel="room:a")
        joined = (await ann.pushed("join"))["join"]
        await bob.client.vanish()
        assert (await ann.pushed("leave"))["leave"] == joined


async def test_joining_and_leaving_is_told_only_where_there_is_presence() -> None:
    async with connected(open_hub()) as client:
        assert "error" not in await client.ask("subscribe", channel="news", join_leave=True)


# Channels that the server chooses


async def test_the_servers_channels_come_with_the_connect_reply() -> None:
    hub = Hub()

    async def channels(conn: Connection) -> list[str]:
        return ["user:ann", "news"]

    hub.serve_pubsub("/live", channels=channels)
    hub.channel("news", history=5)

    @hub.channel("user:{name}")
    async def nobody(conn: Connection, name: str) -> bool:
        return False

    async with connected(hub), talk(hub) as client:
        result = await client.ask("connect")
        epoch = result["subs"]["news"]["epoch"]
        assert result["subs"] == {
            "user:ann": {},
            "news": {"recoverable": True, "positioned": True, "epoch": epoch},
        }
        await hub.publish("user:ann", "hello")
        assert await client.pushed("pub") == {"channel": "user:ann", "pub": {"data": "hello"}}
        assert (await client.ask("subscribe", channel="news"))["code"] == 103
        await publish_all(hub, "news", range(3))
        for _ in range(3):
            await client.pushed("pub")
        positions = {"news": {"recover": True, "offset": 1, "epoch": epoch}, "other": {"recover": True}}
        async with talk(hub) as back:
            news = (await back.ask("connect", subs=positions))["subs"]["news"]
            assert news["recovered"]
            assert offsets(news) == [2, 3]
            assert news["offset"] == 1
            await hub.publish("news", "next")
            assert (await back.pushed("pub"))["pub"] == {"data": "next", "offset": 4}
        async with talk(hub) as back:
            news = (await back.ask("connect", subs={"news": {"recover": True, "offset": 1, "epoch": "_"}}))["subs"][
                "news"
            ]
            assert news == {
                "recoverable": True,
                "positioned": True,
                "epoch": epoch,
                "offset": 4,
                "was_recovering": True,
            }
        async with talk(hub) as back:
            assert offsets((await back.ask("connect", subs={"news": {"recover": True}}))["subs"]["news"]) == [
                1,
                2,
                3,
                4,
            ]


async def test_a_client_side_subscription_to_a_channel_of_the_servers_is_one_too_many() -> None:
    hub = open_hub()

    async def channels(conn: Connection) -> list[str]:
        return ["news"]

    hub.serve_pubsub("/both", channels=channels)
    async with talk(hub, "/both") as client:
        await client.ask("connect")
        assert (await client.ask("subscribe", channel="news"))["code"] == 105
        assert (await client.ask("sub_refresh", channel="news", token="x"))["code"] == 103
        assert await client.ask("unsubscribe", channel="news") == {}
        assert "epoch" in await client.ask("subscribe", channel="news")


async def test_nothing_overtakes_the_connect_reply() -> None:
    hub = Hub()
    hub.channel("first", history=5)

    async def channels(conn: PubSubConnection) -> AsyncIterator[str]:
        await conn.subscribe("first")
        await hub.publish("first", 1)
        await hub.publish("first", 2)
        return ["second"]  # type: ignore[return-value]

    hub.serve_pubsub("/live", channels=channels)  # type: ignore[arg-type]
    async with talk(hub) as client:
        result = await client.ask("connect")
        assert set(result["subs"]) == {"first", "second"}
        assert [(await client.pushed("pub"))["pub"]["data"] for _ in range(2)] == [1, 2]


async def test_what_waits_for_the_connect_reply_is_bounded() -> None:
    hub = Hub(limits=Limits(outbox_size=1000))

    async def channels(conn: PubSubConnection) -> list[str]:
        await conn.subscribe("first")
        for _ in range(3):
            await hub.publish("first", "x" * 500)
        return []

    hub.serve_pubsub("/live", channels=channels)
    async with talk(hub) as client:
        await client.say(client.command("connect"))
        assert await client.closed() == (3008, "slow")


async def test_the_server_subscribes_and_unsubscribes_whenever_it_likes() -> None:
    hub = open_hub()

    @hub.rpc("subscribe")
    async def subscribe(conn: PubSubConnection, options: dict[str, Any]) -> Any:
        recovery = await conn.subscribe(**options)
        return [recovery.recovered, sorted(conn.channels)]

    @hub.rpc("unsubscribe")
    async def unsubscribe(conn: PubSubConnection, options: dict[str, Any]) -> None:
        await conn.unsubscribe(**options)

    async with connected(hub) as client:

        async def server_does(method: str, **options: Any) -> tuple[list[Any], Any]:
            await client.say(client.command("rpc", method=method, data=options))
            pushes = []
            while "id" not in (heard := await client.hear()):
                pushes.append(heard["push"])
            return pushes, client.of_reply(heard, "rpc")

        pushes, answer = await server_does("subscribe", channel="room:a", info="x")
        assert pushes == [{"channel": "room:a", "subscribe": {}}]
        assert answer == {"data": [False, ["room:a"]]}
        assert await server_does("subscribe", channel="room:a") == ([], {"data": [False, ["room:a"]]})
        assert (await client.ask("subscribe", channel="room:a"))["code"] == 105
        pushes, _ = await server_does("unsubscribe", channel="room:a")
        assert pushes == [{"channel": "room:a", "unsubscribe": {"code": 2000, "reason": "server unsubscribe"}}]
        assert (await server_does("unsubscribe", channel="room:a"))[0] == []
        # Those that the client has asked for, too, and with other codes.
        await client.ask("subscribe", channel="room:b")
        pushes, _ = await server_does("unsubscribe", channel="room:b", code=2400, reason="be gone")
        assert pushes == [{"channel": "room:b", "unsubscribe": {"code": 2400, "reason": "be gone"}}]
        # With what it has missed.
        await publish_all(hub, "news", range(3))
        epoch = str((await hub.publish("news", 3)).epoch)  # type: ignore[union-attr]
        pushes, answer = await server_does("subscribe", channel="news", since=f"2:{epoch}")
        assert answer == {"data": [True, ["news"]]}
        assert pushes[0]["subscribe"]["offset"] == 2
        assert "publications" not in pushes[0]["subscribe"]
        assert [each["pub"]["offset"] for each in pushes[1:]] == [3, 4]
        for method, options in (
            ("subscribe", {"channel": "room:secret"}),
            ("subscribe", {"channel": "a" * 300}),
            ("subscribe", {"channel": "x", "info": 1}),
            ("subscribe", {"channel": "x", "join_leave": True}),
            ("unsubscribe", {"channel": "x", "code": 1000}),
            ("unsubscribe", {"channel": "x", "reason": ""}),
        ):
            assert "code" in (await server_does(method, **options))[1], (method, options)


# What expires


def expiring_hub() -> Hub:
    hub = Hub()

    async def authenticate(conn: PubSubConnection, token: str) -> Grant | None:
        user, _, seconds = token.partition("/")
        if user == "busy":
            raise CommandError(111, temporary=True)
        if user == "banned":
            raise CommandError(403, "banned")
        return (
            Grant(user=user or None, expires_at=time.time() + float(seconds) if seconds else None)
            if user != "?"
            else None
        )

    hub.serve_pubsub("/live", authenticate=authenticate)

    @hub.channel("private", presence=True)
    async def private(conn: Connection, token: str) -> Grant | bool:
        return token != "no" and Grant(expires_at=time.time() + float(token) if token else None)

    @hub.channel("simple")
    async def simple(conn: Connection) -> bool:
        return True

    return hub


async def test_a_connection_lasts_as_long_as_its_token_and_some_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = expiring_hub()
    async with talk(hub) as client:
        result = await client.ask("connect", token="ann/60")
        assert (result["expires"], result["ttl"]) == (True, 60)
        assert await client.ask("refresh", token="busy") == {
            "code": 111,
            "message": "too many requests",
            "temporary": True,
        }
        result = await client.ask("refresh", token="ann/30")
        assert (result["expires"], result["ttl"]) == (True, 30)
        # Of the same user, as far as is said.
        assert (await client.ask("refresh", token="/20"))["ttl"] == 20
        # From now on it doesn't expire at all.
        assert "expires" not in await client.ask("refresh", token="ann")
        await client.say(client.command("refresh", token="ann"))
        assert await client.closed() == (3501, "bad request")
    for token, closed in {
        "?": (3500, "invalid token"),
        "banned": (3500, "invalid token"),
        "bob/60": (3500, "invalid token"),
        "ann/-1": (3005, "connection expired"),
    }.items():
        async with talk(hub) as client:
            await client.ask("connect", token="ann/60")
            await client.say(client.command("refresh", token=token))
            assert await client.closed() == closed
    monkeypatch.setattr("asgi_ws.endpoints.pubsub._GRACE", -0.98)
    async with talk(hub) as client:
        await client.ask("connect", token="ann/0.5")
        assert await client.closed() == (3005, "connection expired")
    async with talk(hub) as client:
        assert (await client.ask("connect", token="ann/-1"))["code"] == 109


async def test_a_user_that_expires_without_a_token_is_not_asked_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()

    async def authenticate(conn: PubSubConnection, token: str) -> Grant:
        return Grant(expires_at=time.time() + 0.01)

    hub.serve_pubsub("/live", authenticate=authenticate)
    monkeypatch.setattr("asgi_ws.endpoints.pubsub.math.ceil", lambda left: 0.01)
    async with talk(hub) as client:
        assert "expires" not in await client.ask("connect")
        assert await client.closed() == (3005, "connection expired")


async def test_a_subscription_lasts_as_long_as_its_token_and_some_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = expiring_hub()
    async with connected(hub) as client:
        assert await client.ask("subscribe", channel="private", token="60") == {"expires": True, "ttl": 60}
        refreshed = await client.ask("sub_refresh", channel="private", token="30")
        assert refreshed == {"expires": True, "ttl": 30}
        assert await client.ask("sub_refresh", channel="private", token="") == {}
        assert (await client.ask("sub_refresh", channel="private", token="-1"))["code"] == 109
        assert (await client.ask("sub_refresh", channel="simple", token="1"))["code"] == 103
        await client.ask("subscribe", channel="simple")
        assert await client.ask("sub_refresh", channel="simple", token="1") == {}
        monkeypatch.setattr("asgi_ws.endpoints.pubsub._GRACE", -0.98)
        await client.ask("sub_refresh", channel="private", token="0.5")
        push = await client.pushed("unsubscribe")
        assert push["unsubscribe"] == {"code": 2501, "reason": "subscription expired"}
        await client.ask("subscribe", channel="private", token="60")
        await client.say(client.command("sub_refresh", channel="private", token="no"))
        assert await client.closed() == (3500, "invalid token")


async def test_an_expiring_subscription_that_was_left_ends_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.endpoints.pubsub._GRACE", -0.95)
    async with connected(expiring_hub()) as client:
        await client.ask("subscribe", channel="private", token="0.5")
        await client.ask("unsubscribe", channel="private")
        await asyncio.sleep(0.08)
        assert (await client.ask("sub_refresh", channel="private", token="1"))["code"] == 103


# Pings


async def test_clients_are_pinged_and_answer() -> None:
    hub = open_hub(limits=Limits(ping_interval=0.06, ping_timeout=0.05))
    async with connected(hub) as client:
        for _ in range(3):
            assert await client.hear() == {}
            await client.say({})
        assert await client.hear() == {}
        await client.say({}, {})
        assert await client.closed() == (3501, "bad request")


async def test_a_client_that_does_not_answer_is_closed() -> None:
    hub = open_hub(limits=Limits(ping_interval=0.05, ping_timeout=0.04))
    async with connected(hub) as client:
        assert await client.closed() == (3012, "no pong")


async def test_pongs_need_not_come_where_nobody_waits_for_them() -> None:
    hub = open_hub(limits=Limits(ping_interval=0.02, ping_timeout=None))
    async with connected(hub) as client:
        assert [await client.hear() for _ in range(3)] == [{}] * 3


async def test_a_pong_that_was_not_read_yet_is_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.endpoints.pubsub._AT_ONCE", 1)
    hub = Hub(limits=Limits(ping_interval=0.05, ping_timeout=0.03))
    hub.serve_pubsub("/live")

    @hub.rpc("slow")
    async def slow(conn: Connection) -> None:
        await asyncio.sleep(0.2)

    async with connected(hub) as client:
        await client.say(client.command("rpc", method="slow"), client.command("rpc", method="slow"))
        while (heard := await client.hear()) != {"id": 2, "rpc": {"data": None}}:
            assert heard == {}


# The end


@pytest.mark.parametrize(
    ("code", "reason", "seen"),
    [
        (1000, "", (3503, "force disconnect")),
        (1008, "disconnected", (3503, "disconnected")),
        (1011, "", (3004, "internal server error")),
        (1012, "", (3001, "shutdown")),
        (3000, "", (3000, "disconnected")),
        (4500, "be gone", (4500, "be gone")),
        # JSON would be an order to the JavaScript client.
        (4500, "42", (4500, "disconnected")),
        (4500, '{"reconnect":true}', (4500, "disconnected")),
        (4500, "[" * 120, (4500, "[" * 120)),
        (4500, "x" * 200, (4500, "x" * 123)),
    ],
)
async def test_close_codes_are_those_that_clients_know(code: int, reason: str, seen: tuple[int, str]) -> None:
    hub = Hub()
    hub.serve_pubsub("/live")

    @hub.rpc("close")
    async def close(conn: Connection) -> None:
        await conn.close(code, reason)

    async with connected(hub) as client:
        await client.say(client.command("rpc", method="close"))
        assert await client.closed() == seen


async def test_messages_that_are_too_big_end_the_connection() -> None:
    async with connected(open_hub(limits=Limits(message_size=1000))) as client:
        await client.client.send("x" * 2000)
        code, reason = await client.closed()
        assert code == 1009
        assert reason


async def test_a_slow_client_is_closed_whatever_the_hub_does_with_others() -> None:
    hub = open_hub(limits=Limits(outbox_size=1000), overflow="drop_oldest")
    async with connected(hub) as client:
        await client.ask("subscribe", channel="room:a")
        for _ in range(200):
            await hub.publish("room:a", "x" * 10_000)
        assert await client.closed() == (3008, "slow consumer")


async def test_an_endpoint_without_its_hub_says_so() -> None:
    hub = open_hub()
    with pytest.raises(RuntimeError, match="add WebSocketMiddleware"):
        async with connect(hub.routes[0].app, "/live"):
            pass


# What breaks


class Broken(MemoryBroker):
    """One whose parts fail when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: set[str] = set()
        self.waits: dict[str, asyncio.Event] = {}
        self.reached = asyncio.Event()

    async def _check(self, what: str, channel: str) -> None:
        if what in self.waits:
            self.reached.set()
            await self.waits[what].wait()
        if what in self.fails or f"{what} {channel}" in self.fails:
            raise BrokerError("broken")

    async def subscribe(self, channel: str) -> None:
        await self._check("events" if channel.startswith("\x1f") else "subscribe", channel)
        await super().subscribe(channel)

    async def publish(self, channel: str, payload: Any, **options: Any) -> Any:
        await self._check("publish", channel)
        return await super().publish(channel, payload, **options)

    async def enter(self, channel: str, connection: str, key: str, value: str, *, expiry: float) -> bool:
        await self._check("enter", channel)
        return await super().enter(channel, connection, key, value, expiry=expiry)

    async def leave(self, channel: str, connection: str, *, grace: float) -> None:
        await self._check("leave", channel)
        await super().leave(channel, connection, grace=grace)


async def test_a_broker_that_fails_is_an_error_for_the_moment() -> None:
    broker = Broken()
    later = {"code": 100, "message": "internal server error", "temporary": True}
    async with connected(open_hub(broker=broker)) as client:
        broker.fails = {"subscribe"}
        assert await client.ask("subscribe", channel="room:a") == later
        broker.fails = {"publish"}
        assert await client.ask("subscribe", channel="room:b") == {}
        push = await client.pushed("unsubscribe")
        assert push["unsubscribe"]["code"] == 2500
        broker.fails = {"events"}
        await client.say(client.command("subscribe", channel="room:c", join_leave=True))
        assert (await client.hear())["subscribe"] == {}
        await client.pushed("unsubscribe")
        broker.fails = set()
        assert await client.ask("subscribe", channel="room:d") == {}
        broker.fails = {"publish"}
        assert await client.ask("publish", channel="room:d", data=1) == later


async def test_a_broker_that_fails_while_a_client_connects_fails_that() -> None:
    broker = Broken()
    hub = Hub(broker)

    async def channels(conn: Connection) -> list[str]:
        return ["first", "second"]

    hub.serve_pubsub("/live", channels=channels)
    broker.fails = {"subscribe second"}
    async with hub, talk(hub) as client:
        assert (await client.ask("connect"))["temporary"]
        assert not hub.context.pubsub.has_subscribers("first")
        broker.fails = set()
        async with talk(hub) as again:
            assert set((await again.ask("connect"))["subs"]) == {"first", "second"}


async def test_what_is_nested_too_deeply_is_nobodys_error(caplog: pytest.LogCaptureFixture) -> None:
    async with connected(open_hub()) as client:
        await client.ask("subscribe", channel="room:a")
        with pytest.raises(ConnectionClosed) as raised:
            for depth in range(900, 1100):
                data = "[" * depth + "]" * depth
                await client.client.send(f'{{"id":{depth},"publish":{{"channel":"room:a","data":{data}}}}}')
                answers = [str(await client.client.receive()) for _ in range(2)]
                assert f'{{"id":{depth},"publish":{{}}}}' in answers
        assert raised.value.code == 3501
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_the_servers_channels_count_and_a_closed_connection_takes_none() -> None:
    hub = Hub(limits=Limits(channels=1))
    hub.serve_pubsub("/live")
    failures = []

    @hub.rpc("subscribe")
    async def subscribe(conn: PubSubConnection) -> None:
        await conn.subscribe("a")
        with pytest.raises(SubscriptionDenied, match="1 channels"):
            await conn.subscribe("b")
        closing = asyncio.create_task(conn.close(4500, "done"))
        await asyncio.sleep(0)
        with pytest.raises(ConnectionClosed):
            await conn.subscribe("c")
        failures.append(await closing)
        await conn.send("nobody hears it")

    async with connected(hub) as client:
        await client.say(client.command("rpc", method="subscribe"))
        assert await client.closed() == (4500, "done")
    assert failures == [None]


async def test_a_loss_is_told_once() -> None:
    hub = open_hub()
    async with hub, connected(hub) as client:
        await client.ask("subscribe", channel="news")
        (conn,) = hub.context.clients.values()
        subscription = conn._subscriptions["news"]  # type: ignore[attr-defined]
        subscription.lost("news")
        subscription.lost("news")
        await client.pushed("unsubscribe")
        assert "epoch" in await client.ask("subscribe", channel="news")


async def test_a_channel_may_be_left_again_before_the_client_is_told_of_it() -> None:
    hub = Hub()

    async def channels(conn: PubSubConnection) -> list[str]:
        await conn.subscribe("first")
        await conn.unsubscribe("first")
        return ["second", "second"]

    hub.serve_pubsub("/live", channels=channels)
    async with talk(hub) as client:
        assert list((await client.ask("connect"))["subs"]) == ["second"]
        await hub.publish("first", 1)
        await client.ask_nothing()


async def test_a_rule_may_end_what_it_is_asked_to_renew() -> None:
    hub = Hub()
    hub.serve_pubsub("/live")

    @hub.channel("private")
    async def private(conn: PubSubConnection, token: str) -> bool:
        if token == "again":
            await conn.unsubscribe("private")
        return True

    async with connected(hub) as client:
        await client.ask("subscribe", channel="private")
        await client.say(client.command("sub_refresh", channel="private", token="again"))
        await client.pushed("unsubscribe")
        assert (await client.hear())["error"]["code"] == 103


async def test_whoever_leaves_while_it_comes_back_to_a_channel_leaves_nothing_behind() -> None:
    broker = Broken()
    hub = open_hub(broker=broker)
    async with hub:
        async with connected(hub) as client:
            await client.ask("subscribe", channel="room:a")
            broker.waits = {"leave": asyncio.Event()}
            await client.say(client.command("unsubscribe", channel="room:a"))
            await broker.reached.wait()
            (conn,) = hub.context.clients.values()
            again = asyncio.create_task(conn.subscribe("room:a"))  # type: ignore[attr-defined]
            await asyncio.sleep(0)
            await client.client.vanish()
            await asyncio.sleep(0.02)
            broker.waits.pop("leave").set()
            await asyncio.wait([again])
        assert await hub.presence("room:a") == []
        assert not hub.context.pubsub.has_subscribers("room:a")


async def test_what_others_see_has_to_be_json() -> None:
    hub = Hub()
    hub.serve_pubsub("/live")

    @hub.channel("room", presence=True)
    async def room(conn: Connection) -> Grant:
        return Grant(info=object())

    async with connected(hub) as client:
        assert (await client.ask("subscribe", channel="room"))["code"] == 100
        # Nothing is left of it.
        assert (await client.ask("presence", channel="room"))["code"] == 103


async def test_a_subscription_can_be_ended_while_it_begins() -> None:
    broker = Broken()
    hub = open_hub(broker=broker)

    @hub.rpc("unsubscribe")
    async def unsubscribe(conn: PubSubConnection, channel: str) -> None:
        await conn.unsubscribe(channel)

    @hub.rpc("subscribe")
    async def subscribe(conn: PubSubConnection, channel: str) -> None:
        await conn.subscribe(channel)

    async with connected(hub) as client:
        for what in ("subscribe", "enter"):
            for by_server in (True, False):
                broker.reached.clear()
                broker.waits = {what: asyncio.Event()}
                if by_server:
                    await client.say(client.command("rpc", method="subscribe", data="room:a"))
                else:
                    await client.say(client.command("subscribe", channel="room:a"))
                await broker.reached.wait()
                await client.say(client.command("rpc", method="unsubscribe", data="room:a"))
                while not broker.waits[what].is_set():
                    await asyncio.sleep(0.01)
                    broker.waits[what].set()
                heard = [await client.hear() for _ in range(4 if by_server else 3)]
                kinds = [next(iter(each.get("push", {}).keys() - {"channel"}), "") for each in heard]
                assert "unsubscribe" in kinds
                if by_server:
                    assert kinds.index("subscribe") < kinds.index("unsubscribe")
                broker.waits = {}
                await hub.publish("room:a", "nobody hears it")
                assert await client.ask("subscribe", channel="room:a") == {}
                await client.ask("unsubscribe", channel="room:a")


async def test_whoever_leaves_while_it_subscribes_leaves_nothing_behind() -> None:
    broker = Broken()
    hub = open_hub(broker=broker)
    async with hub:
        for what in ("subscribe", "enter"):
            broker.reached.clear()
            broker.waits = {what: asyncio.Event()}
            async with connected(hub) as client:
                await client.say(client.command("subscribe", channel="room:a"))
                await broker.reached.wait()
                await client.client.vanish()
                broker.waits[what].set()
            broker.waits = {}
            assert not hub.context.pubsub.has_subscribers("room:a")
            assert await hub.presence("room:a") == []


async def test_who_comes_back_to_a_channel_waits_until_it_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broken()
    hub = open_hub(broker=broker)
    monkeypatch.setattr("asgi_ws.endpoints.pubsub._LEAVE_TIME", 0.02)
    async with hub, connected(hub) as client:
        await client.ask("subscribe", channel="room:a")
        broker.waits = {"leave": asyncio.Event()}
        await client.ask("unsubscribe", channel="room:a")
        await broker.reached.wait()
        await client.say(client.command("subscribe", channel="room:a"))
        await client.ask_nothing()
        broker.waits.pop("leave").set()
        assert client.of_reply(await client.hear(), "subscribe") == {}
        assert len(await hub.presence("room:a")) == 1


async def test_errors_of_the_application_are_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    hub = Hub()
    hub.serve_pubsub("/live")

    @hub.rpc("bug")
    async def bug(conn: Connection) -> None:
        raise ZeroDivisionError("secret")

    async with connected(hub) as client:
        assert "secret" not in json.dumps(await client.ask("rpc", method="bug"))
    assert [record.levelno for record in caplog.records if record.name == "asgi_ws"] == [logging.ERROR]


# Mistakes of the developer


def test_functions_that_can_not_work_are_refused_at_once() -> None:
    hub = Hub()

    async def right(conn: Connection, token: str) -> Grant | None:
        return None

    def not_async(conn: Connection, token: str) -> None:
        return None

    async def takes_nothing() -> None:
        return None

    for name in ("authenticate", "channels", "on_message"):
        for function in (not_async, takes_nothing):
            with pytest.raises(TypeError):
                hub.serve_pubsub("/live", **{name: function})  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        hub.channel("a:{b}", publish=right)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        hub.channel("b:{b}", publish=not_async)  # type: ignore[arg-type]
    hub.serve_pubsub("/live", authenticate=right)
    with pytest.raises(ValueError, match="already"):
        hub.serve_pubsub("/live")
    with pytest.raises(ValueError, match="begin with"):
        hub.serve_pubsub("live")

    async def rpc(conn: Connection, a: int, b: int) -> None:
        return None

    with pytest.raises(TypeError):
        hub.rpc("name")(rpc)
    with pytest.raises(TypeError):
        hub.rpc("name")(not_async)  # type: ignore[type-var]
    hub.rpc("name")(right)
    with pytest.raises(ValueError, match="already"):
        hub.rpc("name")(right)


async def test_names_of_a_pattern_are_never_what_the_client_says() -> None:
    hub = Hub()
    hub.serve_pubsub("/live")
    heard = []

    @hub.channel("{token}:{data}")
    async def rule(conn: Connection, token: str, data: str) -> bool:
        heard.append((token, data))
        return True

    async with connected(hub) as client:
        await client.ask("subscribe", channel="a:b", token="x", data="y")
    assert heard == [("a", "b")]
