"""Engine.IO clients of an application without a network: sessions, the move to a WebSocket, and what is refused."""

import asyncio
import contextlib
import json
import logging
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import WebSocketRoute
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from asgi_ws import Connection, ConnectionClosed, Hub, Limits, WebSocketMiddleware
from asgi_ws.origins import OriginPolicy
from asgi_ws.testing import Refused, connect, request, stream
from asgi_ws.transports import EngineTransport
from tests.bus import Bus, BusBroker
from tests.transports.clients import EngineClient

pytestmark = pytest.mark.anyio


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "http", scope
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b"nothing here"})


class Site:
    """An application with a chat, and what its handlers have seen."""

    def __init__(self, **options: Any) -> None:
        self.hub = Hub(**options)
        self.app = WebSocketMiddleware(nothing, hub=self.hub)
        self.engine = self.app.engine
        self.connections: list[Connection] = []
        self.ended: list[tuple[str, ConnectionClosed | None]] = []
        self.go = asyncio.Event()

        @self.hub.websocket("/chat/{room}")
        async def chat(conn: Connection, room: str) -> None:
            self.connections.append(conn)
            await conn.subscribe(f"chat:{room}")
            async for message in conn:
                await conn.publish(f"chat:{room}", message)

        @self.hub.websocket("/busy")
        async def busy(conn: Connection) -> None:
            self.connections.append(conn)
            await self.go.wait()
            async for message in conn:
                await conn.send(message)

        @self.hub.websocket("/ends/{how}")
        async def ends(conn: Connection, how: str) -> None:
            await conn.send("bye")
            if how == "badly":
                raise ValueError("on purpose")

        @self.hub.websocket("/waits")
        async def waits(conn: Connection) -> None:
            try:
                await conn.receive()
            except ConnectionClosed as closed:
                self.ended.append((conn.transport, closed))

    def client(self, path: str = "/chat/lobby/", **headers: str) -> EngineClient:
        return EngineClient(self.app, path, {name.replace("_", "-"): value for name, value in headers.items()})


@contextlib.asynccontextmanager
async def running(site: Site) -> AsyncIterator[Site]:
    async with site.hub:
        yield site
        await site.engine.aclose()
    assert site.engine.sessions == 0
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("asgi_ws")]
    assert site.hub.context.connections._count == 0


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with running(Site()) as site:
        yield site


async def until_ended(site: Site) -> None:
    """Until the last session is over, and its handler."""
    async with asyncio.timeout(2):
        while site.engine.sessions or site.hub.context.connections._count:
            await asyncio.sleep(0.001)


# Polling


async def test_open_packet_says_what_the_limits_are(site: Site) -> None:
    client = site.client()
    values = await client.open()
    assert values == {
        "sid": client.sid,
        "upgrades": ["websocket"],
        "pingInterval": 25000,
        "pingTimeout": 10000,
        "maxPayload": 1398105,
    }
    assert len(client.sid) == 32
    assert site.connections[0].transport == "polling"
    assert site.connections[0].path_params == {"room": "lobby"}


async def test_payload_without_limit_has_none() -> None:
    async with running(Site(limits=Limits(message_size=None, ping_interval=None, ping_timeout=None))) as site:
        values = await site.client().open()
        assert "maxPayload" not in values
        assert (values["pingInterval"], values["pingTimeout"]) == (25000, 20000)


async def test_polling_client_meets_plain_websockets(site: Site) -> None:
    client = site.client()
    await client.open()
    async with connect(site.app, "/chat/lobby", lifespan=False) as plain:
        await plain.send("hello")
        assert await client.poll() == "4hello"
        await client.post("4grüße\x1ebAQL/")
        assert [await plain.receive() for _ in range(3)] == ["hello", "grüße", b"\x01\x02\xff"]
        assert await client.receive(2) == ["4grüße", "bAQL/"]


async def test_parked_poll_is_answered_behind_middleware_with_tasks_of_its_own(site: Site) -> None:
    async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    client = EngineClient(BaseHTTPMiddleware(site.app, pass_on), "/chat/lobby/")
    await client.open()
    for text in ("one", "two"):
        async with client.parked() as poll:
            await site.hub.publish("chat:lobby", text)
            assert (await poll).text == f"4{text}"


async def poll_with(site: Site, client: EngineClient, receive: Receive) -> None:
    """A poll, of which nobody hears the answer."""

    async def send(_: Message) -> None:
        pass

    query = f"EIO=4&transport=polling&sid={client.sid}".encode()
    scope = {"type": "http", "method": "GET", "path": "/waits", "headers": [], "query_string": query}
    await site.app(scope, receive, send)


async def test_session_ends_with_a_server_that_fails_to_receive(site: Site) -> None:
    async def fail() -> Message:
        raise RuntimeError("on purpose")

    client = site.client("/waits")
    await client.open()
    await poll_with(site, client, fail)
    await until_ended(site)


async def test_session_ends_with_a_poll_that_is_cancelled(site: Site) -> None:
    waits = asyncio.Event()

    async def wait() -> Message:
        waits.set()
        await asyncio.sleep(60)
        raise AssertionError

    client = site.client("/waits")
    await client.open()
    poll = asyncio.create_task(poll_with(site, client, wait))
    await waits.wait()
    poll.cancel()
    with pytest.raises(asyncio.CancelledError):
        await poll
    await until_ended(site)


async def test_parked_poll_is_answered_as_soon_as_there_is_something(site: Site) -> None:
    client = site.client()
    await client.open()
    async with client.parked() as poll:
        assert not poll.done()
        await site.hub.publish("chat:lobby", "a")
        await site.hub.publish("chat:lobby", "b")
        response = await poll
    assert response.text == "4a\x1e4b"
    assert response.headers["content-type"] == "text/plain; charset=UTF-8"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["vary"] == "Origin"


async def test_application_sees_the_query_without_the_secret(site: Site) -> None:
    client = site.client("/chat/lobby?colour=red&t=abc")
    await client.open()
    assert dict(site.connections[0].query_params) == {"colour": "red", "t": "abc"}
    async with site.client("/chat/lobby?colour=blue").websocket():
        assert dict(site.connections[1].query_params) == {"colour": "blue"}


async def test_large_message_is_polled_whole(site: Site) -> None:
    client = site.client()
    await client.open()
    text = "x" * 500_000
    await client.post("4" + text)
    assert await client.poll() == "4" + text


async def test_post_waits_while_the_handler_has_enough() -> None:
    async with running(Site(limits=Limits(inbox_messages=2))) as site:
        client = site.client("/busy")
        await client.open()
        posting = asyncio.create_task(client.post("\x1e".join(f"4{n}" for n in range(6))))
        await asyncio.sleep(0.02)
        assert not posting.done()
        site.go.set()
        await posting
        assert await client.receive(6) == [f"4{n}" for n in range(6)]


async def test_client_that_leaves_while_its_post_waits_is_gone() -> None:
    async with running(Site(limits=Limits(inbox_messages=2))) as site:
        client = site.client("/busy")
        await client.open()
        body = b"\x1e".join(b"4%d" % n for n in range(6))
        with pytest.raises((TimeoutError, AssertionError)):
            await client.request("POST", content=body, timeout=0.05)
        await until_ended(site)
        site.go.set()


async def test_client_that_does_not_poll_is_bounded_like_any_slow_one() -> None:
    async with running(Site(limits=Limits(outbox_size=100_000))) as site:
        client = site.client()
        await client.open()
        async with connect(site.app, "/chat/lobby", lifespan=False) as other:
            for _ in range(30):
                await site.hub.publish("chat:lobby", "x" * 10_000)
                await other.receive()
            async with asyncio.timeout(2):
                while site.hub.context.connections._count > 1:
                    # It is told with its next poll, or not at all.
                    poll = await client.request("GET")
                    assert poll.status_code in (200, 400)
            await other.send("on")
            assert await other.receive() == "on"


async def test_connections_are_counted_and_refused_over_polling_too() -> None:
    async with running(Site(limits=Limits(connections=1))) as site:
        client = site.client()
        await client.open()
        response = await site.client().request("GET")
        assert response.status_code == 503
        assert "retry-after" in response.headers
        await client.post("1")
        await until_ended(site)
        async with site.client().websocket():
            with pytest.raises(Refused):
                async with site.client().websocket():
                    raise AssertionError
            assert (await site.client().request("GET")).status_code == 503


# The end of a session


async def test_handler_that_returns_closes_the_session(site: Site) -> None:
    client = site.client("/ends/well")
    await client.open()
    assert await client.receive(2) == ["4bye", "1"]
    response = await client.request("GET")
    assert (response.status_code, response.json()) == (400, {"code": 1, "message": "Session ID unknown"})


async def test_handler_that_raises_closes_the_session(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    client = site.client("/ends/badly")
    await client.open()
    assert await client.receive(2) == ["4bye", "1"]
    assert "the handler of '/ends/badly' failed" in caplog.text


async def test_handler_closes_while_a_poll_waits(site: Site) -> None:
    client = site.client()
    await client.open()
    async with client.parked() as poll:
        await site.connections[0].close(4000, "enough")
        assert (await poll).text == "1"
    await until_ended(site)


async def test_close_packet_ends_the_session_at_once(site: Site) -> None:
    client = site.client("/waits")
    await client.open()
    async with client.parked() as poll:
        await client.post("1")
        assert (await poll).text == "6"
    await until_ended(site)
    assert [(transport, closed.code) for transport, closed in site.ended if closed] == [("polling", 1005)]
    assert (await client.request("POST", content="4x")).json()["code"] == 1


async def test_client_that_drops_its_poll_is_gone(site: Site) -> None:
    client = site.client("/waits")
    await client.open()
    with pytest.raises(TimeoutError):
        async with stream(site.app, "GET", client.path + f"polling&sid={client.sid}", lifespan=False, timeout=0.05):
            raise AssertionError
    await until_ended(site)
    assert [closed.code for _, closed in site.ended if closed] == [1006]


async def test_client_that_answers_no_ping_is_gone() -> None:
    async with running(Site(limits=Limits(ping_interval=0.05, ping_timeout=0.05))) as site:
        client = site.client("/waits")
        await client.open()
        for _ in range(3):
            assert await client.poll() == "2"
            await client.post("3")
        assert await client.poll() == "2"
        async with client.parked() as poll:
            assert (await poll).text == "1"
        await asyncio.sleep(0)
        assert [closed.code for _, closed in site.ended if closed] == [1006]


async def test_client_that_can_not_be_heard_is_not_asked_to_answer() -> None:
    limits = Limits(ping_interval=0.03, ping_timeout=0.03, inbox_messages=1)
    async with running(Site(limits=limits)) as site:
        client = site.client("/busy")
        await client.open()
        posting = asyncio.create_task(client.post("4a\x1e4b\x1e3"))
        for _ in range(4):
            assert await client.poll() == "2"
        site.go.set()
        await posting
        assert "4a" in await client.poll()


async def test_server_that_stops_ends_polls_with_what_waits(site: Site) -> None:
    client, other = site.client(), site.client()
    await client.open()
    await other.open()
    async with client.parked() as poll:
        await site.engine.aclose()
        assert (await poll).text == "1"
    assert site.engine.sessions == 0


# WebSockets


async def test_session_may_begin_with_a_websocket(site: Site) -> None:
    async with site.client().websocket() as socket:
        packet = str(await socket.receive())
        assert json.loads(packet[1:])["upgrades"] == []
        assert site.connections[0].transport == "websocket"
        await socket.send("4hello")
        assert await socket.receive() == "4hello"
        await socket.send(b"\x00\xff")
        assert await socket.receive() == b"\x00\xff"
        sid = json.loads(packet[1:])["sid"]
        response = await site.client().request("GET", query=f"polling&sid={sid}")
        assert (response.status_code, response.json()) == (400, {"code": 3, "message": "Bad request"})
    await until_ended(site)


async def test_session_moves_to_a_websocket(site: Site) -> None:
    client = site.client()
    await client.open()
    async with client.upgraded() as socket:
        await site.hub.publish("chat:lobby", "over there")
        assert await socket.receive() == "4over there"
        assert site.connections[0].transport == "websocket"
        await socket.send("4hello")
        assert await socket.receive() == "4hello"
        for method in ("GET", "POST"):
            response = await client.request(method, content="4x" if method == "POST" else "")
            assert (response.status_code, response.json()["code"]) == (400, 3)
    await until_ended(site)


async def test_what_waits_for_a_poll_goes_over_the_websocket(site: Site) -> None:
    client = site.client()
    await client.open()
    async with client.websocket() as socket:
        await socket.send("2probe")
        assert await socket.receive() == "3probe"
        for n in range(3):
            await site.hub.publish("chat:lobby", str(n))
        await socket.send("5")
        await site.hub.publish("chat:lobby", "3")
        assert [await socket.receive() for _ in range(4)] == ["40", "41", "42", "43"]


async def test_client_that_is_behind_catches_up_over_the_websocket() -> None:
    async with running(Site(limits=Limits(outbox_size=1_000_000))) as site:
        client = site.client()
        await client.open()
        for n in range(20):
            await site.hub.publish("chat:lobby", f"{n}:".ljust(10_000))
        async with client.websocket() as socket:
            await socket.send("5")
            for n in range(20):
                assert str(await socket.receive()).startswith(f"4{n}:")
            await socket.send("4more")
            assert await socket.receive() == "4more"


async def test_polls_are_answered_at_once_while_the_client_wants_to_stop_them(site: Site) -> None:
    client = site.client()
    await client.open()
    async with client.websocket() as socket:
        await socket.send("2probe")
        assert await socket.receive() == "3probe"
        begin = time.monotonic()
        assert await client.poll() == "6"
        assert time.monotonic() - begin < 1
        await site.hub.publish("chat:lobby", "still here")
        assert await client.poll() == "4still here"


async def test_poll_that_still_waits_when_the_session_moves_is_let_go(site: Site) -> None:
    client = site.client()
    await client.open()
    async with client.websocket() as socket, client.parked() as poll:
        await socket.send("5")
        assert (await poll).text == "6"
        await socket.send("4hello")
        assert await socket.receive() == "4hello"


@pytest.mark.parametrize("word", ["2", "4hello", "x", b"\x00", "1", ""])
async def test_wrong_word_on_the_tried_socket_closes_that_socket_alone(site: Site, word: str | bytes) -> None:
    client = site.client()
    await client.open()
    async with client.websocket() as socket:
        await socket.send(word)
        with pytest.raises(ConnectionClosed):
            await socket.receive()
    await client.post("4on")
    assert await client.poll() == "4on"
    async with client.upgraded() as socket:
        await socket.send("4and on")
        assert await socket.receive() == "4and on"


async def test_second_tried_socket_is_refused_and_the_first_one_stays(site: Site) -> None:
    client = site.client()
    await client.open()
    async with client.websocket() as socket:
        with pytest.raises(Refused) as refused:
            async with client.websocket():
                raise AssertionError
        assert refused.value.status_code == 400
        await socket.send("5")
        await socket.send("4on")
        assert await socket.receive() == "4on"


async def test_tried_socket_that_is_left_costs_nothing(site: Site) -> None:
    client = site.client()
    await client.open()
    async with client.websocket() as socket:
        await socket.send("2probe")
        assert await socket.receive() == "3probe"
        await socket.vanish()
    await client.post("4on")
    assert await client.poll() == "4on"


async def test_tried_socket_has_a_limited_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.transports.engineio._UPGRADE_TIME", 0.02)
    client = site.client()
    await client.open()
    async with client.websocket() as socket:
        with pytest.raises(ConnectionClosed):
            await socket.receive()
    await client.post("4on")
    assert await client.poll() == "4on"


async def test_session_that_ends_while_a_socket_is_tried_ends_it(site: Site) -> None:
    client = site.client()
    await client.open()
    async with client.websocket() as socket:
        await client.post("1")
        await socket.send("2probe")
        with pytest.raises(ConnectionClosed):
            await socket.receive()


async def test_close_that_waits_for_a_poll_goes_over_the_websocket(site: Site) -> None:
    client = site.client("/ends/well")
    await client.open()
    async with client.websocket() as socket:
        await socket.send("5")
        assert await socket.receive() == "4bye"
        with pytest.raises(ConnectionClosed) as closed:
            await socket.receive()
        assert closed.value.code == 1000


@pytest.mark.parametrize("word", ["x", "2", "0", "5", "6", "2probe"])
async def test_wrong_word_on_the_websocket_ends_the_session(site: Site, word: str) -> None:
    client = site.client("/waits")
    await client.open()
    async with client.upgraded() as socket:
        await socket.send(word)
        with pytest.raises(ConnectionClosed) as closed:
            await socket.receive()
        assert closed.value.code == 1002
    await until_ended(site)
    assert [closed.code for _, closed in site.ended if closed] == [1002]


async def test_close_packet_over_the_websocket_ends_the_session(site: Site) -> None:
    async with site.client("/waits").websocket() as socket:
        await socket.receive()
        await socket.send("1")
        with pytest.raises(ConnectionClosed):
            await socket.receive()
    await until_ended(site)
    assert [closed.code for _, closed in site.ended if closed] == [1005]


async def test_websocket_that_is_lost_ends_the_session(site: Site) -> None:
    client = site.client("/waits")
    await client.open()
    async with client.upgraded() as socket:
        await socket.vanish()
    await until_ended(site)
    assert [(transport, closed.code) for transport, closed in site.ended if closed] == [("websocket", 1006)]


async def test_heartbeat_goes_on_over_the_websocket() -> None:
    async with running(Site(limits=Limits(ping_interval=0.05, ping_timeout=0.05))) as site:
        client = site.client("/waits")
        await client.open()
        async with client.websocket() as socket:
            await socket.send("5")
            for _ in range(3):
                assert await socket.receive() == "2"
                await socket.send("3")
            assert await socket.receive() == "2"
            await until_ended(site)


async def test_upgrades_under_load_lose_double_and_reorder_nothing(site: Site) -> None:
    """While everybody publishes all the time, clients move from polling to a WebSocket."""
    count, each = 40, 60
    done = 0

    async def publish() -> None:
        n = 0
        while done < count:
            await site.hub.publish("chat:lobby", str(n))
            n += 1
            await asyncio.sleep(0)

    async def one() -> None:
        nonlocal done
        client = site.client()
        await client.open()
        received: list[str] = []

        def take(body: str) -> None:
            received.extend(packet[1:] for packet in body.split("\x1e") if packet[0] == "4")

        for _ in range(3):
            take(await client.poll())
        async with client.websocket() as socket:
            poll = client.park()
            await socket.send("2probe")
            assert await socket.receive() == "3probe"
            take((await poll).text)
            await socket.send("5")
            while len(received) < each:
                take(str(await socket.receive()))
        done += 1
        first = int(received[0])
        assert received == [str(n) for n in range(first, first + len(received))]

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(publish())
        for _ in range(count):
            tasks.create_task(one())


# What is refused


@pytest.mark.parametrize(
    ("method", "query", "status", "code"),
    [
        ("GET", "EIO=4", 400, 0),
        ("GET", "EIO=4&transport=carrier-pigeon", 400, 0),
        ("GET", "EIO=3&transport=polling", 400, 5),
        ("GET", "EIO=5&transport=polling", 400, 5),
        ("GET", "EIO=&transport=polling", 400, 5),
        ("GET", "transport=polling", 400, 5),
        ("GET", "EIO=4&transport=polling&sid=unknown", 400, 1),
        ("GET", "EIO=4&transport=polling&sid=", 400, 1),
        ("GET", "EIO=4&transport=polling&sid=__proto__", 400, 1),
        ("POST", "EIO=4&transport=polling", 400, 2),
        ("GET", "EIO=4&transport=websocket", 400, 3),
        ("GET", "EIO=4&transport=polling&j=0", 400, 3),
        ("GET", "EIO=4&transport=polling" + "&x=1" * 200, 400, 3),
    ],
)
async def test_what_is_wrong_is_answered_by_its_code(
    site: Site, method: str, query: str, status: int, code: int
) -> None:
    response = await request(site.app, method, f"/chat/lobby/?{query}", lifespan=False)
    assert response.status_code == status
    assert response.json()["code"] == code
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("EIO=4&transport=polling", 3),
        ("EIO=4&transport=websocket&sid=unknown", 1),
        ("EIO=3&transport=websocket", 5),
        ("EIO=4", 0),
    ],
)
async def test_websocket_is_refused_before_it_is_accepted(site: Site, query: str, code: int) -> None:
    with pytest.raises(Refused) as refused:
        async with connect(site.app, f"/chat/lobby/?{query}", lifespan=False):
            raise AssertionError
    assert refused.value.status_code == 400
    assert refused.value.json()["code"] == code


async def test_websocket_that_names_no_version_is_not_of_engine_io(site: Site) -> None:
    async with connect(site.app, "/chat/lobby?transport=polling", lifespan=False) as client:
        await client.send("hello")
        assert await client.receive() == "hello"


async def test_websocket_is_refused_where_the_server_takes_no_response(site: Site) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/chat/a", "query_string": b"EIO=3&transport=websocket", "headers": []}
    await site.app(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize(
    "query", ["EIO=%34&transport=polling", "x=a+b&EIO=4&&transport=polling", "&EIO=4&y&transport=polling&"]
)
async def test_query_may_be_written_in_any_way(site: Site, query: str) -> None:
    response = await request(site.app, "GET", f"/chat/lobby/?{query}", lifespan=False)
    assert response.status_code == 200
    assert response.text.startswith("0{")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH"])
async def test_other_methods_leave_the_session_alone(site: Site, method: str) -> None:
    client = site.client()
    await client.open()
    response = await client.request(method)
    assert (response.status_code, response.json()["code"]) == (400, 2)
    await client.post("4on")
    assert await client.poll() == "4on"


async def test_path_without_an_endpoint_is_the_applications(site: Site) -> None:
    response = await request(site.app, "GET", "/elsewhere/?EIO=4&transport=polling", lifespan=False)
    assert (response.status_code, response.text) == (404, "nothing here")


BAD_BODIES = {
    "empty": b"",
    "separator alone": b"\x1e",
    "unknown type": b"7",
    "open": b"0{}",
    "ping": b"2",
    "probe": b"2probe",
    "upgrade": b"5",
    "noop": b"6",
    "bad base64": b"bAQL",
    "bad UTF-8": b"4\xff\xfe",
    "separators": b"\x1e" * 65536,
    "too many packets": b"\x1e".join([b"3"] * 10_001),
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
async def test_bad_body_ends_its_session_and_no_other(site: Site, body: bytes) -> None:
    bad, good = site.client("/waits"), site.client()
    await bad.open()
    await good.open()
    async with bad.parked() as poll:
        response = await bad.request("POST", content=body)
        assert (response.status_code, response.json()["code"]) == (400, 3)
        assert (await poll).text == "1"
    assert (await bad.request("GET")).json()["code"] == 1
    await good.post("4on")
    assert await good.poll() == "4on"


async def test_binary_body_is_of_another_version(site: Site) -> None:
    client = site.client()
    await client.open()
    response = await client.request("POST", content=b"\x00", headers={"content-type": "application/octet-stream"})
    assert (response.status_code, response.json()["code"]) == (400, 3)
    await until_ended(site)


async def test_second_poll_ends_the_session(site: Site) -> None:
    client = site.client()
    await client.open()
    async with client.parked() as poll:
        response = await client.request("GET")
        assert (response.status_code, response.json()["code"]) == (400, 3)
        assert (await poll).text == "1"
    await until_ended(site)


async def test_second_post_ends_the_session() -> None:
    async with running(Site(limits=Limits(inbox_messages=1))) as site:
        client = site.client("/busy")
        await client.open()
        first = asyncio.create_task(client.request("POST", content="4a\x1e4b\x1e4c"))
        await asyncio.sleep(0.01)
        response = await client.request("POST", content="4d")
        assert (response.status_code, response.json()["code"]) == (400, 3)
        assert (await first).text == "ok"
        await until_ended(site)
        site.go.set()


async def test_body_that_is_too_large_is_refused_while_it_comes() -> None:
    async with running(Site(limits=Limits(message_size=1_000))) as site:
        client = site.client()
        await client.open()
        response = await client.request("POST", content=b"4" + b"x" * 2_000)
        assert (response.status_code, response.text) == (413, "")
        await client.post("4on")
        assert await client.poll() == "4on"


async def test_message_that_is_too_large_closes_the_session() -> None:
    async with running(Site(limits=Limits(message_size=1_000))) as site:
        client = site.client()
        await client.open()
        await client.post(b"4" + b"x" * 1_200)
        assert await client.poll() == "1"
        async with site.client().websocket() as socket:
            await socket.receive()
            await socket.send("4" + "x" * 1_001)
            with pytest.raises(ConnectionClosed) as closed:
                await socket.receive()
            assert closed.value.code == 1009


class Slow:
    """A request whose body comes in pieces."""

    def __init__(self, site: Site, client: EngineClient, pieces: list[bytes], last: Message | None) -> None:
        self.pieces = pieces
        self.last = last
        self.sent: list[Message] = []
        query = client.path.partition("?")[2] + f"polling&sid={client.sid}"
        self.scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": "/chat/lobby/",
            "query_string": query.encode(),
            "headers": [],
        }
        self.app = site.app

    async def receive(self) -> Message:
        if self.pieces:
            return {"type": "http.request", "body": self.pieces.pop(), "more_body": True}
        if self.last is not None:
            last, self.last = self.last, None
            return last
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def run(self) -> int | None:
        await self.app(self.scope, self.receive, self.send)
        return self.sent[0]["status"] if self.sent else None


async def test_body_in_tiny_pieces_takes_no_longer(site: Site) -> None:
    """engine.io before 6.6.12: quadratic."""
    client = site.client()
    await client.open()
    slow = Slow(site, client, [b"x"] * 500_000 + [b"4"], {"type": "http.request", "body": b""})
    begin = time.perf_counter()
    assert await slow.run() == 200
    assert time.perf_counter() - begin < 2


async def test_body_that_does_not_end_is_not_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.transports.base._BODY_TIME", 0.02)
    client = site.client()
    await client.open()
    assert await Slow(site, client, [b"4"], None).run() == 408
    await until_ended(site)


async def test_client_that_leaves_in_the_middle_of_a_body_is_gone(site: Site) -> None:
    client = site.client()
    await client.open()
    assert await Slow(site, client, [b"4"], {"type": "http.disconnect"}).run() is None
    await until_ended(site)


# Origins, and whose a session is


OTHER = "https://evil.example"


@pytest.mark.parametrize("headers", [{"origin": OTHER}, {"sec_fetch_site": "cross-site"}, {"origin": "null"}])
async def test_page_of_another_origin_may_do_nothing(site: Site, headers: dict[str, str]) -> None:
    response = await site.client(**headers).request("GET")
    assert (response.status_code, response.json()) == (403, {"code": 4, "message": "Forbidden"})
    assert "access-control-allow-origin" not in response.headers
    assert site.connections == []
    client = site.client()
    await client.open()
    intruder = site.client(**headers)
    intruder.sid = client.sid
    assert (await intruder.request("POST", content="4hello")).status_code == 403
    assert (await intruder.request("GET")).status_code == 403
    with pytest.raises(Refused):
        async with intruder.websocket():
            raise AssertionError
    await client.post("4on")
    assert await client.poll() == "4on"


async def test_allowed_origin_may_read_the_answers_with_its_cookies() -> None:
    async with running(Site(allowed_origins=["https://a.example", "https://b.example"])) as site:
        client = site.client(origin="https://a.example")
        await client.open()
        response = await client.request("POST", content="4hello")
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        assert response.headers["access-control-allow-credentials"] == "true"
        assert response.headers["vary"] == "Origin"
        other = site.client(origin="https://b.example")
        other.sid = client.sid
        response = await other.request("GET")
        assert (response.status_code, response.json()["code"]) == (403, 4)
        assert response.headers["access-control-allow-origin"] == "https://b.example"
        assert await client.poll() == "4hello"


async def test_preflight_is_answered() -> None:
    async with running(Site(allowed_origins=["https://a.example"])) as site:
        headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
        asked = {**headers, "access-control-request-headers": "content-type, x-token"}
        response = await site.client(**{k.replace("-", "_"): v for k, v in asked.items()}).request("OPTIONS")
        assert (response.status_code, response.text) == (204, "")
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        assert response.headers["access-control-allow-methods"] == "GET, POST"
        assert response.headers["access-control-allow-headers"] == "content-type, x-token"
        response = await site.client().request("OPTIONS", headers={**headers, "origin": OTHER})
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers
        odd = {**headers, "access-control-request-headers": "x\ty"}
        response = await site.client().request("OPTIONS", headers=odd)
        assert "access-control-allow-headers" not in response.headers
        # One that isn't a preflight is a method that there isn't.
        assert (await site.client().request("OPTIONS")).json()["code"] == 2


async def test_origin_that_is_said_later_is_the_sessions(site: Site) -> None:
    """A browser says no origin with a GET to its own, and does with a POST and a WebSocket."""
    client = site.client()
    await client.open()
    client.headers = {"origin": "http://testserver"}
    await client.post("4hello")
    client.headers = {}
    assert await client.poll() == "4hello"


async def test_session_is_its_paths(site: Site) -> None:
    client = site.client()
    await client.open()
    other = site.client("/chat/garden")
    other.sid = client.sid
    assert (await other.request("GET")).json()["code"] == 4
    same = site.client("/chat/lobby")
    same.sid = client.sid
    await same.post("4hello")
    assert await client.poll() == "4hello"


async def test_session_is_its_users(site: Site) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        users = [value.decode() for name, value in scope["headers"] if name == b"x-user"]
        await site.app({**scope, "user": users[0]}, receive, send)

    ann, bob = EngineClient(app, "/chat/lobby", {"x-user": "ann"}), EngineClient(app, "/chat/lobby", {"x-user": "bob"})
    await ann.open()
    assert site.connections[0].user_id == "ann"
    bob.sid = ann.sid
    assert (await bob.request("GET")).json()["code"] == 4
    await ann.post("4hello")
    assert await ann.poll() == "4hello"


async def test_session_ids_can_not_be_guessed(site: Site) -> None:
    values = [await site.client().open() for _ in range(20)]
    sids = {value["sid"] for value in values}
    assert len(sids) == 20
    assert {len(sid) for sid in sids} == {32}
    assert not sids & {conn.id for conn in site.connections}


# Refused by the application


@pytest.fixture
def refusing(site: Site) -> Site:
    @site.hub.on_connect
    async def hook(conn: Connection) -> None:
        raise HTTPException(401, "who are you?", headers={"WWW-Authenticate": "Bearer"})

    return site


async def test_application_refuses_with_its_own_answer(refusing: Site) -> None:
    response = await refusing.client().request("GET")
    assert (response.status_code, response.text) == (401, "who are you?")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-content-type-options"] == "nosniff"
    with pytest.raises(Refused) as refused:
        async with refusing.client().websocket():
            raise AssertionError
    assert refused.value.status_code == 401


async def test_client_that_does_not_wait_for_the_handshake_is_gone() -> None:
    site = Site()
    seen: list[str] = []
    entered = asyncio.Event()

    @site.hub.on_connect
    async def hook(conn: Connection) -> None:
        entered.set()
        try:
            await asyncio.sleep(0.1)
        finally:
            seen.append(conn.transport)

    async with running(site):
        with pytest.raises(TimeoutError):
            await site.client().request("GET", timeout=0.02)
        await entered.wait()
        async with asyncio.timeout(2):
            while not seen:
                await asyncio.sleep(0.01)
        assert site.connections == []


# Endpoints of the application's own, and applications without connections


async def test_endpoint_in_the_applications_router_is_served() -> None:
    hub = Hub()

    async def echo(conn: Connection) -> None:
        async for message in conn:
            await conn.send(message)

    app = Starlette(routes=[WebSocketRoute("/echo", hub.endpoint(echo))])
    app.add_middleware(WebSocketMiddleware, hub=hub)
    async with hub:
        client = EngineClient(app, "/echo/")
        await client.open()
        await client.post("4hello")
        assert await client.poll() == "4hello"
        await client.post("1")


@contextlib.asynccontextmanager
async def engine(app: Any) -> AsyncIterator[EngineTransport]:
    transport = EngineTransport(app, origins=OriginPolicy(), ping_interval=10, ping_timeout=10)
    yield transport
    await transport.aclose()
    assert transport.sessions == 0


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """A WebSocket as Starlette has it."""
    websocket = WebSocket(scope, receive, send)
    await websocket.accept(headers=[(b"x-mine", b"yes")])
    while (message := await websocket.receive())["type"] == "websocket.receive":
        text = message.get("text")
        if text == "close":
            await websocket.close(4000, "asked to")
        elif text is None:
            await websocket.send_bytes(message["bytes"])
        else:
            await websocket.send_text(text)


async def test_any_websocket_application_is_served_by_polling() -> None:
    async with engine(echo) as transport:
        client = EngineClient(transport, "/")
        response = await client.request("GET")
        assert response.headers["x-mine"] == "yes"
        client.sid = json.loads(response.text[1:])["sid"]
        await client.post("4hello\x1ebAQL/")
        assert await client.receive(2) == ["4hello", "bAQL/"]
        texts = [str(n) for n in range(50)]
        await client.post("\x1e".join("4" + text for text in texts))
        assert await client.receive(50) == ["4" + text for text in texts]
        async with client.upgraded() as socket:
            await socket.send("4over")
            assert await socket.receive() == "4over"
            await socket.send("4close")
            with pytest.raises(ConnectionClosed) as closed:
                await socket.receive()
            assert (closed.value.code, closed.value.reason) == (4000, "asked to")


async def test_any_websocket_application_is_served_by_websocket() -> None:
    async with engine(echo) as transport, EngineClient(transport, "/").websocket() as socket:
        await socket.receive()
        await socket.send("4hello")
        assert await socket.receive() == "4hello"
        await socket.send(b"\x00")
        assert await socket.receive() == b"\x00"


async def test_application_that_waits_for_its_slow_client_goes_on_when_that_polls() -> None:
    sent: list[int] = []

    async def firehose(scope: Scope, receive: Receive, send: Send) -> None:
        websocket = WebSocket(scope, receive, send)
        await websocket.accept()
        for n in range(20):
            await websocket.send_text(f"{n}:".ljust(10_000))
            sent.append(n)

    async with engine(firehose) as transport:
        client = EngineClient(transport, "/")
        await client.open()
        await asyncio.sleep(0.01)
        assert len(sent) == 6
        received: list[str] = []
        while "1" not in received:
            received += (await client.poll()).split("\x1e")
        assert [packet.strip() for packet in received] == [f"4{n}:" for n in range(20)] + ["1"]


async def test_application_is_told_that_the_server_stops() -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        websocket = WebSocket(scope, receive, send)
        await websocket.accept()
        seen.append((await websocket.receive())["code"])
        try:
            await send({"type": "websocket.send", "text": "too late"})
        except OSError as error:
            seen.append(str(error))

    async with engine(app) as transport:
        client = EngineClient(transport, "/")
        await client.open()
        async with client.parked() as poll:
            await transport.aclose()
            assert (await poll).text == "1"
    assert seen == [1012, "the client is gone"]


@pytest.mark.parametrize("kind", ["websocket.close", "websocket.http.response.body"])
async def test_application_that_refuses_without_a_response_is_forbidden(kind: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": kind})

    async with engine(app) as transport:
        response = await EngineClient(transport, "/").request("GET")
        assert (response.status_code, response.json()["code"]) == (403, 4)


async def test_application_that_says_nothing_at_all_has_failed() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    async with engine(app) as transport:
        response = await EngineClient(transport, "/").request("GET")
        assert (response.status_code, response.text) == (500, "Internal Server Error")


async def test_application_that_fails_is_logged_and_the_client_told(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        with pytest.raises(RuntimeError):
            await send({"type": "websocket.accept"})
        raise ValueError("on purpose")

    async with engine(app) as transport:
        client = EngineClient(transport, "/")
        with caplog.at_level(logging.ERROR, "asgi_ws"):
            await client.open()
            assert await client.poll() == "1"
        assert "a session at '/' failed" in caplog.text


async def test_application_that_does_not_end_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.transports.engineio._STOP_TIME", 0.02)
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        try:
            await asyncio.sleep(3600)
        finally:
            seen.append("cancelled")

    async with engine(app) as transport:
        polling, client = EngineClient(transport, "/"), EngineClient(transport, "/")
        await client.open()
        await polling.open()
        async with client.upgraded() as socket, polling.parked() as poll:
            await transport.aclose()
            assert (await poll).text == "1"
            with pytest.raises(ConnectionClosed):
                await socket.receive()
    assert seen == ["cancelled", "cancelled"]


async def test_application_that_never_receives_may_send_over_both() -> None:
    go = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "one"})
        await go.wait()
        await send({"type": "websocket.send", "text": "two"})

    async with engine(app) as transport:
        client = EngineClient(transport, "/")
        await client.open()
        assert await client.poll() == "4one"
        async with client.upgraded() as socket:
            go.set()
            assert await socket.receive() == "4two"
            with pytest.raises(ConnectionClosed) as closed:
                await socket.receive()
            assert closed.value.code == 1000


async def test_refusal_in_several_pieces_is_answered_whole() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.http.response.start", "status": 418, "headers": [(b"content-type", b"x/y")]})
        await send({"type": "websocket.http.response.body", "body": b"a tea", "more_body": True})
        await send({"type": "websocket.http.response.body", "body": b"pot"})

    async with engine(app) as transport:
        response = await EngineClient(transport, "/").request("GET")
        assert (response.status_code, response.text) == (418, "a teapot")
        assert response.headers["content-type"] == "x/y"


# Servers that do odd things


class Server:
    """A websocket of a server that says what it is told to; what it can't say any more raises."""

    def __init__(self, *messages: Message, takes: int = 100) -> None:
        self.messages = list(messages)
        self.takes = takes
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        for _ in range(20):
            # What the last one led to comes first.
            await asyncio.sleep(0)
        if not self.messages:
            raise RuntimeError("on purpose")
        return self.messages.pop(0)

    async def send(self, message: Message) -> None:
        if len(self.sent) >= self.takes:
            raise OSError("on purpose")
        self.sent.append(message)

    async def run(self, transport: EngineTransport, sid: str = "") -> None:
        query = "EIO=4&transport=websocket" + (f"&sid={sid}" if sid else "")
        scope = {"type": "websocket", "path": "/", "query_string": query.encode(), "headers": []}
        await transport(scope, self.receive, self.send)


CONNECT: Message = {"type": "websocket.connect"}
GONE: Message = {"type": "websocket.disconnect", "code": 1006}


async def test_server_that_takes_no_response_for_a_handshake_will_do() -> None:
    async with engine(echo) as transport:
        server = Server(CONNECT, {"type": "websocket.receive", "bytes": b"\x01", "text": None}, GONE)
        await server.run(transport)
        assert [message.get("bytes") for message in server.sent[2:]] == [b"\x01"]


async def test_websocket_that_does_not_close_is_cut_off_when_the_server_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.transports.engineio._STOP_TIME", 0.02)

    class Stuck(Server):
        async def send(self, message: Message) -> None:
            await super().send(message)
            if message["type"] == "websocket.close":
                await asyncio.Event().wait()

        async def receive(self) -> Message:
            if not self.messages:
                await asyncio.Event().wait()
            return await super().receive()

    async with engine(echo) as transport:
        server = Stuck(CONNECT)
        running = asyncio.create_task(server.run(transport))
        while not transport.sessions:
            await asyncio.sleep(0)
        await transport.aclose()
        await running
        assert server.sent[-1]["code"] == 1012


async def test_receive_that_fails_is_the_end_of_the_session() -> None:
    async with engine(echo) as transport:
        server = Server(CONNECT)
        await server.run(transport)
        assert [message["type"] for message in server.sent] == ["websocket.accept", "websocket.send"]
        assert transport.sessions == 0


@pytest.mark.parametrize("server", [Server(GONE), Server(CONNECT, takes=0), Server(CONNECT, GONE)])
async def test_client_that_is_gone_before_it_moves_stays_where_it_is(server: Server) -> None:
    async with engine(echo) as transport:
        client = EngineClient(transport, "/")
        await client.open()
        await server.run(transport, client.sid)
        assert "websocket.close" not in [message["type"] for message in server.sent]
        await client.post("4on")
        assert await client.poll() == "4on"


async def test_poll_of_which_the_answer_can_not_be_sent_ends_the_session(site: Site) -> None:
    client = site.client()
    await client.open()
    slow = Slow(site, client, [], None)
    slow.scope["method"] = "GET"
    await site.hub.publish("chat:lobby", "lost")

    async def send(message: Message) -> None:
        raise OSError("on purpose")

    await site.app(slow.scope, slow.receive, send)
    await until_ended(site)


async def test_polls_end_when_uvicorn_stops(site: Site) -> None:
    server = uvicorn.Server(uvicorn.Config(nothing))
    before = signal.signal(signal.SIGTERM, server.handle_exit)
    try:
        client = site.client()
        await client.open()
        async with client.parked() as poll:
            server.should_exit = True
            assert (await poll).text == "1"
    finally:
        signal.signal(signal.SIGTERM, before)
    await until_ended(site)


async def test_session_that_no_other_process_has_is_unknown() -> None:
    bus = Bus()
    one, other = Site(broker=BusBroker(bus)), Site(broker=BusBroker(bus))
    async with one.hub, other.hub:
        relay = other.hub.context.relay
        assert relay is not None
        path = f"/chat/lobby/?EIO=4&transport=polling&sid={relay.new_id()}"
        response = await request(one.app, "GET", path, lifespan=False)
        assert (response.status_code, response.json()["message"]) == (400, "Session ID unknown")


async def test_path_that_only_begins_like_an_endpoints_is_the_applications() -> None:
    site = Site()
    async with site.hub:
        response = await request(site.app, "GET", "/chat?EIO=4&transport=polling", lifespan=False)
    assert (response.status_code, response.text) == (404, "nothing here")
