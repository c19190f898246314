"""socket.io-client in Node and python-socketio's client, unchanged, against a real server."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from asgi_ws import Connection, Hub, WebSocketMiddleware
from asgi_ws.socketio import ConnectionRefused, Socket, SocketIO
from tests.e2e.clients import connect
from tests.e2e.socketio import NodeSocket, NodeSockets, node_sockets
from tests.servers import OURS, STOCK, UvicornServer, serve
from tests.services import redis_server

pytestmark = pytest.mark.anyio

WEBSOCKET, POLLING, UPGRADE = {"transports": ["websocket"]}, {"transports": ["polling"]}, {}
each_transport = pytest.mark.parametrize("options", [WEBSOCKET, POLLING, UPGRADE], ids=["websocket", "polling", "both"])


class Application:
    """A mounted Socket.IO server, as examples have it; what its handlers were told is in `log`."""

    def __init__(self, broker: str = "memory://", **options: Any) -> None:
        self.hub = Hub(broker)
        self.sio = sio = SocketIO(self.hub, **options)
        self.app = Starlette()
        self.app.mount("/socket.io", sio)
        self.app.add_middleware(WebSocketMiddleware, hub=self.hub)
        self.log: asyncio.Queue[Any] = asyncio.Queue()
        self.sockets: dict[str, Socket] = {}

        @sio.on("connect")
        async def connected(socket: Socket, auth: dict[str, Any]) -> None:
            if auth.get("token") == "wrong":
                raise ConnectionRefused("who are you?", {"code": 17})
            self.sockets[socket.id] = socket
            await socket.join("lobby")
            await socket.emit("welcome", auth)

        @sio.on("disconnect")
        async def left(socket: Socket, reason: str) -> None:
            self.log.put_nowait(("disconnect", reason))

        @sio.on("echo")
        async def echo(socket: Socket, *args: Any) -> tuple[Any, ...]:
            return args

        @sio.on("say")
        async def say(socket: Socket, text: str, data: bytes | None = None) -> None:
            await sio.to("lobby").emit("said", text, data)

        @sio.on("whisper")
        async def whisper(socket: Socket, room: str, text: str) -> None:
            await socket.to(room).emit("said", text)

        @sio.on("count")
        async def count(socket: Socket, number: int) -> None:
            self.log.put_nowait(number)

        @sio.on("admin", namespace="/admin")
        async def admin(socket: Socket) -> str:
            return f"in {socket.namespace}"

        @self.hub.websocket("/plain")
        async def plain(conn: Connection[Any]) -> None:
            await conn.subscribe(sio.room("lobby"))
            async for text in conn:
                await conn.publish(sio.room("lobby"), text)


@contextlib.asynccontextmanager
async def served(ws: str = OURS, **options: Any) -> AsyncIterator[tuple[Application, UvicornServer, NodeSockets]]:
    application = Application(**options)
    async with serve(application.app, ws=ws) as server, node_sockets() as sockets:
        yield application, server, sockets


async def join(sockets: NodeSockets, server: UvicornServer, **options: Any) -> NodeSocket:
    """A socket that has its greeting; an upgrade is waited for."""
    socket = sockets.open(server.http, **options)
    await socket.said("connect")
    assert (await socket.event())[0] == "welcome"
    if "transports" not in options:
        await asyncio.wait_for(socket.upgraded.wait(), 10)
    return socket


@each_transport
@pytest.mark.parametrize("ws", [STOCK[0], OURS])
async def test_events_acknowledgements_and_binary_values_go_both_ways(ws: str, options: dict[str, Any]) -> None:
    async with served(ws) as (application, server, sockets):
        ann = sockets.open(server.http, auth={"token": "ä"}, **options)
        begun = await ann.said("connect")
        assert await ann.event() == ["welcome", {"token": "ä"}]
        if options == UPGRADE:
            await asyncio.wait_for(ann.upgraded.wait(), 10)
        bob = await join(sockets, server, **options)
        values: list[Any] = ["grüße 👋", 1, None, b"\x00\xff", {"deep": [b"", {"x": b"1"}]}]
        assert await ann.call("echo", *values) == values
        socket = application.sockets[begun["id"]]
        assert socket.transport == ("polling" if options == POLLING else "websocket")
        assert await asyncio.gather(socket.call("ask", 1, b"\x01"), ann.event()) == [[1, b"\x01"], ["ask", 1, b"\x01"]]
        bob.emit("say", "hello", b"\x02\x03")
        assert await ann.event() == await bob.event() == ["said", "hello", b"\x02\x03"]
        bob.emit("whisper", "lobby", "psst")
        assert await ann.event() == ["said", "psst"]
        assert await bob.call("echo", "x" * 200_000) == ["x" * 200_000]
        answers = await application.sio.to("lobby").call("ask", "who?")
        assert sorted(answers.values()) == ["who?", "who?"]


@each_transport
async def test_a_thousand_events_arrive_in_their_order(options: dict[str, Any]) -> None:
    async with served() as (application, server, sockets):
        ann = sockets.open(server.http, **options)
        await ann.said("connect")
        for number in range(1000):
            ann.emit("count", number)
            await application.sio.emit("number", number)
        assert [await asyncio.wait_for(application.log.get(), 10) for _ in range(1000)] == list(range(1000))
        numbers: list[int] = []
        while len(numbers) < 1000:
            event = await asyncio.wait_for(ann.events.get(), 10)
            if event["event"] == "event" and event["args"][0] == "number":
                numbers.append(event["args"][1])
        assert numbers == list(range(1000))


async def test_namespaces_share_a_connection_and_end_one_by_one() -> None:
    async with served() as (application, server, sockets):
        ann = sockets.open(server.http, manager="one", **WEBSOCKET)
        await ann.said("connect")
        await ann.event()
        admin = sockets.open(server.http, manager="one", namespace="/admin", **WEBSOCKET)
        await admin.said("connect")
        assert await admin.call("admin") == ["in /admin"]
        nowhere = sockets.open(server.http, manager="one", namespace="/nowhere", **WEBSOCKET)
        assert (await nowhere.said("connect_error"))["message"] == "Invalid namespace"
        ann.do("disconnect")
        assert (await ann.said("disconnect"))["reason"] == "io client disconnect"
        assert await application.log.get() == ("disconnect", "client namespace disconnect")
        assert await admin.call("admin") == ["in /admin"]
        ann.do("connect")
        await ann.said("connect")


async def test_a_refusal_has_words_and_data() -> None:
    async with served() as (_, server, sockets):
        eve = sockets.open(server.http, auth={"token": "wrong"}, **WEBSOCKET)
        error = await eve.said("connect_error")
        assert (error["message"], error["data"]) == ("who are you?", {"code": 17})


async def test_the_server_can_end_a_socket_or_the_connection() -> None:
    async with served() as (application, server, sockets):
        for close, reason in ((False, "io server disconnect"), (True, "transport close")):
            ann = sockets.open(server.http, reconnection=False, **WEBSOCKET)
            socket = application.sockets[(await ann.said("connect"))["id"]]
            await ann.event()
            await socket.disconnect(close=close)
            assert (await ann.said("disconnect"))["reason"] == reason
            assert await application.log.get() == ("disconnect", "server namespace disconnect")


@each_transport
async def test_a_client_that_lost_its_connection_comes_back(options: dict[str, Any]) -> None:
    async with served() as (application, server, sockets):
        ann = await join(sockets, server, **options)
        ann.do("cut")
        assert (await ann.said("disconnect"))["reason"] == "forced close"
        assert await application.log.get() == ("disconnect", "transport close")
        ann.do("connect")
        await ann.said("connect")


async def test_clients_come_back_to_a_server_that_was_restarted() -> None:
    application = Application()
    async with node_sockets() as sockets:
        async with serve(application.app, ws=OURS) as server:
            ann = await join(sockets, server, **WEBSOCKET)
            port = server.port
        assert (await ann.said("disconnect"))["reason"] == "transport close"
        assert await application.log.get() == ("disconnect", "server shutting down")
        async with serve(application.app, ws=OURS, port=port):
            while (await asyncio.wait_for(ann.events.get(), 10))["event"] == "connect_error":
                # It has tried meanwhile, and nobody was there.
                pass
            assert (await ann.event())[0] == "welcome"


async def test_plain_endpoints_and_sockets_meet_in_a_room() -> None:
    async with served() as (application, server, sockets):
        ann = await join(sockets, server, **WEBSOCKET)
        async with connect(f"{server.ws}/plain") as plain:
            # Subscribed when its own message has come back.
            await plain.send("hello")
            assert await plain.recv() == "hello"
            assert await ann.event() == ["message", "hello"]
            ann.emit("say", "x", b"\x01")
            assert await plain.recv() == '["said","x","AQ=="]'
            assert await ann.event() == ["said", "x", b"\x01"]
            await application.hub.publish(application.sio.room("lobby"), {"a": 1})
            assert await ann.event() == ["message", {"a": 1}]
            await application.hub.publish(application.sio.room("lobby"), b"\x02")
            assert await ann.event() == ["message", b"\x02"]


@each_transport
async def test_a_client_is_recovered_with_what_it_has_missed(options: dict[str, Any]) -> None:
    async with served(recovery=60) as (application, server, sockets):
        ann = sockets.open(server.http, **options)
        begun = await ann.said("connect")
        assert (await ann.event())[:1] == ["welcome"]
        await application.sio.to("lobby").emit("news", 0)
        assert (await ann.event())[:2] == ["news", 0]
        for visit in range(3):
            ann.do("cut")
            assert (await ann.said("disconnect"))["reason"] == "forced close"
            assert await application.log.get() == ("disconnect", "transport close")
            for number in range(10):
                await application.sio.to("lobby").emit("news", visit, number, b"x")
            ann.do("connect")
            again = await ann.said("connect")
            assert (again["recovered"], again["id"]) == (True, begun["id"])
            for number in range(10):
                assert (await ann.event())[:4] == ["news", visit, number, b"x"]
            # The example's handler greets again.
            assert (await ann.event())[:1] == ["welcome"]


async def test_events_go_on_while_a_client_loses_its_connection_again_and_again() -> None:
    async with served(recovery=60) as (application, server, sockets):
        ann = sockets.open(server.http, reconnectionDelayMax=100, **WEBSOCKET)
        await ann.said("connect")
        numbers: list[int] = []
        total = 600

        async def publish() -> None:
            for number in range(total):
                await application.sio.to("lobby").emit("number", number)
                await asyncio.sleep(0.002)
                if number % 100 == 50:
                    # Without a word, as a lost network does.
                    for socket in list(application.sio._namespaces["/"].sockets.values()):
                        socket.connection._link.abort()  # type: ignore[union-attr]

        publishing = asyncio.create_task(publish())
        while len(numbers) < total:
            event = await asyncio.wait_for(ann.events.get(), 10)
            if event["event"] == "connect":
                assert event["recovered"]
            elif event["event"] == "event" and event["args"][0] == "number":
                numbers.append(event["args"][1])
        await publishing
        assert numbers == list(range(total))


@each_transport
async def test_requests_may_come_to_whatever_process(options: dict[str, Any]) -> None:
    with redis_server() as redis:
        one, two = Application(redis.url), Application(redis.url)
        turns = itertools.cycle([one.app, two.app])

        async def front(scope: Scope, receive: Receive, send: Send) -> None:
            await next(turns)(scope, receive, send)

        async with one.hub, two.hub, serve(front, ws=OURS, lifespan="off") as server, node_sockets() as sockets:
            ann, bob = [await join(sockets, server, **options) for _ in range(2)]
            for number in range(20):
                assert await ann.call("echo", number, b"x") == [number, b"x"]
                bob.emit("say", f"hello {number}")
                for who in (ann, bob):
                    assert (await who.event())[:2] == ["said", f"hello {number}"]
