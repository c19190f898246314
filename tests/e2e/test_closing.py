"""How connections end, as both sides see it."""

import asyncio
import logging
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.exceptions import WebSocketException
from starlette.types import ASGIApp

from asgi_ws import Connection, ConnectionClosed, Hub, Limits, WebSocketMiddleware
from asgi_ws.brokers import MemoryBroker
from tests.e2e.clients import BINARY, CLOSE, TEXT, RawClient, close_frame, connect, end_of, masked, raw, until
from tests.servers import OURS, SERVERS, UVICORN, serve, serve_with

pytestmark = pytest.mark.anyio

each_server = pytest.mark.parametrize("server", SERVERS)
each_uvicorn = pytest.mark.parametrize("server", UVICORN)


def serving(handler: Callable[[Connection], Awaitable[None]], **options: Any) -> ASGIApp:
    hub = Hub(**options)
    hub.websocket("/")(handler)
    return WebSocketMiddleware(Starlette(), hub=hub)


class Ends:
    """A handler that keeps how each of its connections ended."""

    def __init__(self) -> None:
        self.seen: list[ConnectionClosed] = []

    async def __call__(self, conn: Connection) -> None:
        await conn.send("welcome")
        try:
            while True:
                await conn.receive()
        except ConnectionClosed as closed:
            self.seen.append(closed)
            raise

    async def next(self) -> tuple[int, str, bool]:
        await until(lambda: self.seen)
        closed = self.seen.pop()
        return closed.code, closed.reason, closed.clean


# The server ends it


@each_server
async def test_handler_that_returns_closes_with_1000_behind_what_it_sent(server: str) -> None:
    async def handler(conn: Connection) -> None:
        for number in range(100):
            await conn.send(str(number))

    async with serve_with(server, serving(handler)) as address, connect(address.ws) as client:
        assert [await client.recv() for _ in range(100)] == [str(number) for number in range(100)]
        assert await end_of(client) == (1000, "")


@each_server
async def test_handler_that_raises_closes_with_1011_and_only_the_log_says_why(
    server: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send("before")
        raise ValueError("the password is swordfish")

    async with serve_with(server, serving(handler)) as address, raw(address.port, "/") as client:
        assert await client.receive() == (TEXT, b"before")
        opcode, payload = await client.receive()
        assert (opcode, close_frame(payload)) == (CLOSE, (1011, ""))
        await client.send(CLOSE, payload)
        assert await client.drain() == []
    logged = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.name for record in logged] == ["asgi_ws"]
    assert logged[0].exc_info is not None
    assert "swordfish" in str(logged[0].exc_info[1])
    assert "in handler" in caplog.text
    assert caplog.text.count("Traceback") == 1


@each_server
async def test_handlers_own_code_and_reason_arrive(server: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.close(4001, "héhé")
        with pytest.raises(ConnectionClosed, match="4001"):
            await conn.send("too late")

    async with serve_with(server, serving(handler)) as address, connect(address.ws) as client:
        assert await end_of(client) == (4001, "héhé")


@each_server
async def test_exception_of_the_framework_keeps_its_code_and_reason(
    server: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(conn: Connection) -> None:
        await conn.receive()
        raise WebSocketException(4403, "not for you")

    async with serve_with(server, serving(handler)) as address, connect(address.ws) as client:
        await client.send("hello")
        assert await end_of(client) == (4403, "not for you")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    ("server", "message", "code"),
    [
        ("websockets-sansio", masked(TEXT, b"x" * 2_000), 1009),
        ("wsproto", masked(TEXT, b"x" * 2_000), 1009),
        # Where uvicorn runs wsproto, it ends the connection without a close frame for the likes of these.
        ("websockets-sansio", masked(TEXT, b"\xff\xfe"), 1007),
        ("websockets-sansio", masked(3, b"reserved"), 1002),
        (OURS, masked(TEXT, b"x" * 2_000), 1009),
        (OURS, masked(TEXT, b"\xff\xfe"), 1007),
        (OURS, masked(3, b"reserved"), 1002),
    ],
)
async def test_nothing_follows_the_servers_own_close_frame(server: str, message: bytes, code: int) -> None:
    """uvicorn closes with codes of its own while publications are on their way."""
    hub = Hub()
    ends: list[ConnectionClosed] = []

    @hub.websocket("/")
    async def listens(conn: Connection) -> None:
        await conn.subscribe("news")
        try:
            while True:
                await conn.receive()
        except ConnectionClosed as closed:
            ends.append(closed)

    async def publish() -> None:
        while True:
            await hub.publish("news", "tick")
            await asyncio.sleep(0)

    app = WebSocketMiddleware(Starlette(), hub=hub)
    async with serve(app, ws=server, ws_max_size=1_000) as address, asyncio.TaskGroup() as tasks:
        publisher = tasks.create_task(publish())
        async with raw(address.port, "/") as client:
            assert await client.receive() == (TEXT, b"tick")
            await asyncio.get_running_loop().sock_sendall(client.sock, message)
            while (frame := await client.receive()) == (TEXT, b"tick"):
                pass
            assert (frame[0], close_frame(frame[1])[0]) == (CLOSE, code)
            await client.send(CLOSE, frame[1])
            assert await client.drain() == []
        await until(lambda: ends)
        publisher.cancel()


@each_server
async def test_what_was_sent_before_closing_reaches_a_client_that_reads_slowly(server: str) -> None:
    async def handler(conn: Connection) -> None:
        for number in range(64):
            await conn.send(bytes([number]) * 16_384)

    app = serving(handler)
    async with serve_with(server, app, sndbuf=16_384) as address, raw(address.port, "/", rcvbuf=4096) as client:
        for number in range(64):
            assert await client.receive() == (BINARY, bytes([number]) * 16_384)
        opcode, payload = await client.receive()
        assert (opcode, close_frame(payload)) == (CLOSE, (1000, ""))
        await client.send(CLOSE, payload)


@each_uvicorn
async def test_closing_waits_for_a_client_that_reads_nothing_no_longer_than_the_write_timeout(server: str) -> None:
    done = asyncio.Event()

    async def handler(conn: Connection) -> None:
        await conn.subscribe("news")
        for _ in range(20):
            await conn.publish("news", "x" * 16_384)
        await conn.close(4000, "enough")
        done.set()

    app = serving(handler, limits=Limits(write_timeout=0.5))
    async with serve(app, ws=server, sndbuf=16_384) as address, raw(address.port, "/", rcvbuf=4096):
        async with asyncio.timeout(2):
            await done.wait()
        await until(lambda: not address.server.server_state.connections, 2)


# The client ends it


@each_uvicorn
async def test_handler_learns_the_clients_code_and_reason(server: str) -> None:
    ends = Ends()
    async with serve_with(server, serving(ends)) as address:
        async with connect(address.ws) as client:
            await client.recv()
            await client.close(4123, "ich gehe")
        assert await ends.next() == (4123, "ich gehe", True)
        async with connect(address.ws) as client:
            await client.recv()
        assert await ends.next() == (1000, "", True)


@each_uvicorn
async def test_empty_close_frame_is_a_clean_end(server: str) -> None:
    ends = Ends()
    async with serve_with(server, serving(ends)) as address, raw(address.port, "/") as client:
        assert await client.receive() == (TEXT, b"welcome")
        await client.send(CLOSE, b"")
        assert await ends.next() == (1005, "", True)
        assert await client.drain() in ([(CLOSE, b"")], [(CLOSE, struct.pack("!H", 1000))])


@each_server
@pytest.mark.parametrize("end", [RawClient.leave, RawClient.reset], ids=["FIN", "RST"])
async def test_connection_that_is_lost_is_not_a_clean_end(server: str, end: Callable[[RawClient], None]) -> None:
    ends = Ends()
    async with serve_with(server, serving(ends)) as address, raw(address.port, "/") as client:
        assert await client.receive() == (TEXT, b"welcome")
        end(client)
        assert await ends.next() == (1006, "", False)


@each_server
async def test_what_a_client_sent_before_it_left_is_still_received(server: str) -> None:
    received: list[str | bytes] = []
    begin = asyncio.Event()
    ended = asyncio.Event()

    async def handler(conn: Connection) -> None:
        received.append(await conn.receive())
        await begin.wait()
        async for message in conn:
            received.append(message)
        ended.set()

    async with serve_with(server, serving(handler)) as address:
        async with connect(address.ws) as client:
            for number in range(10):
                await client.send(str(number))
        begin.set()
        await asyncio.wait_for(ended.wait(), 5)
    assert received == [str(number) for number in range(10)]


# What is left behind


class Subscriptions(MemoryBroker):
    """Knows which channels are subscribed to."""

    def __init__(self) -> None:
        super().__init__()
        self.channels: set[str] = set()

    async def subscribe(self, channel: str) -> None:
        self.channels.add(channel)
        await super().subscribe(channel)

    async def unsubscribe(self, channel: str) -> None:
        self.channels.discard(channel)
        await super().unsubscribe(channel)


async def returns(conn: Connection) -> None:
    await conn.receive()


async def raises(conn: Connection) -> None:
    await conn.receive()
    raise ZeroDivisionError


async def closes(conn: Connection) -> None:
    await conn.receive()
    await conn.close(4000)


async def receives(conn: Connection) -> None:
    async for message in conn:
        await conn.send(message)


async def sleeps(conn: Connection) -> None:
    await asyncio.sleep(3600)


async def streams(conn: Connection) -> None:
    while True:
        await conn.send("tick")
        await asyncio.sleep(0.01)


@each_server
async def test_nothing_is_left_of_connections_that_ended(server: str) -> None:
    broker = Subscriptions()
    hub = Hub(broker)
    handlers = {handler.__name__: handler for handler in (returns, raises, closes, receives, sleeps, streams)}

    @hub.websocket("/{name}")
    async def subscribed(conn: Connection, name: str) -> None:
        await conn.subscribe("shared")
        await conn.subscribe(f"own:{conn.id}")
        await conn.send("welcome")
        await handlers[name](conn)

    async with serve_with(server, WebSocketMiddleware(Starlette(), hub=hub)) as address:
        await (await connect(f"{address.ws}/receives")).close()
        await until(lambda: not broker.channels)
        before = asyncio.all_tasks()
        for name in handlers:
            for leaves_cleanly in (True, False):
                async with raw(address.port, f"/{name}") as client:
                    assert await client.receive() == (TEXT, b"welcome")
                    assert len(broker.channels) == 2
                    await client.send(TEXT, b"hello")
                    if leaves_cleanly:
                        await client.send(CLOSE, struct.pack("!H", 1000))
                        await client.drain()
                await until(lambda: not broker.channels)
                await until(lambda: asyncio.all_tasks() <= before)
