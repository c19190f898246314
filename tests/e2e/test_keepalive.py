"""The reader is always on: whatever the handler does, pings are answered, the end is seen, and memory is bounded."""

import asyncio
import contextlib
import time

import pytest
from starlette.applications import Starlette

from asgi_ws import Connection, ConnectionClosed, Hub, Limits, WebSocketMiddleware
from tests.e2e.clients import BINARY, RawClient, connect, masked, memory, raw, until
from tests.servers import SERVERS, UVICORN, serve, serve_with

pytestmark = pytest.mark.anyio

each_server = pytest.mark.parametrize("server", SERVERS)


async def test_handler_that_never_receives_keeps_its_client_beyond_the_keepalive_timeout() -> None:
    hub = Hub()

    @hub.websocket("/ticks")
    async def ticks(conn: Connection) -> None:
        while True:
            await conn.send("tick")
            await asyncio.sleep(0.1)

    @hub.websocket("/sleeps")
    async def sleeps(conn: Connection) -> None:
        await asyncio.sleep(3600)

    app = WebSocketMiddleware(Starlette(), hub=hub)
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for server in UVICORN:
            address = await stack.enter_async_context(serve(app, ws=server, ws_ping_interval=1, ws_ping_timeout=1))
            for path in ("/ticks", "/sleeps"):
                client = await stack.enter_async_context(connect(address.ws + path))
                # uvicorn stops reading after a message until the application has taken it, and pongs wait behind it.
                await client.send("one")
                await client.send("two")
                clients.append(client)
        begin = time.monotonic()
        ticks_seen = 0
        async with asyncio.timeout(10):
            while time.monotonic() - begin < 4.5:
                for client in clients[::2]:
                    assert await client.recv() == "tick"
                ticks_seen += 1
        assert ticks_seen > 20
        for client in clients:
            await (await client.ping())


@each_server
async def test_handler_that_never_receives_is_cancelled_when_its_client_leaves(server: str) -> None:
    hub = Hub()
    ends: list[float] = []

    @hub.websocket("/")
    async def sleeps(conn: Connection) -> None:
        await conn.send("welcome")
        try:
            await asyncio.sleep(3600)
        finally:
            ends.append(time.monotonic())

    async with serve_with(server, WebSocketMiddleware(Starlette(), hub=hub)) as address:
        async with connect(address.ws) as client:
            assert await client.recv() == "welcome"
            await client.send("unread")
        async with raw(address.port, "/") as lost:
            await lost.receive()
            lost.reset()
        left = time.monotonic()
        await until(lambda: len(ends) == 2)
        assert max(ends) - left < 0.5


@each_server
async def test_next_call_raises_when_the_client_has_left(server: str) -> None:
    hub = Hub()
    left = asyncio.Event()
    raised: list[type[BaseException]] = []

    @hub.websocket("/")
    async def works(conn: Connection) -> None:
        await conn.receive()
        await left.wait()
        for call in (conn.send, conn.subscribe):
            try:
                for _ in range(100):
                    await call("x")
                    await asyncio.sleep(0.01)
            except ConnectionClosed as closed:
                raised.append(type(closed))

    async with serve_with(server, WebSocketMiddleware(Starlette(), hub=hub)) as address:
        async with connect(address.ws) as client:
            await client.send("go")
        left.set()
        await until(lambda: len(raised) == 2)


# What a client sends and nobody receives


async def flood(client: RawClient, message: bytes, most: int) -> int:
    """Send until the server has taken nothing for a while; how many bytes it took."""
    data = memoryview(message * (65_536 // len(message) + 1))
    sent, moved = 0, time.monotonic()
    while sent < most and time.monotonic() - moved < 0.3:
        try:
            sent += client.sock.send(data[sent % len(data) :])
            moved = time.monotonic()
            await asyncio.sleep(0)
        except BlockingIOError:
            await asyncio.sleep(0.01)
    return sent


@each_server
@pytest.mark.parametrize("size", [10, 60_000])
async def test_flood_that_nobody_receives_is_stopped_by_tcp_and_takes_no_memory(server: str, size: int) -> None:
    hub = Hub(limits=Limits(inbox_messages=32, message_size=65_536, messages_per_second=None))
    begin = asyncio.Event()
    received: list[int] = []

    @hub.websocket("/")
    async def deaf(conn: Connection) -> None:
        await begin.wait()
        async for message in conn:
            received.append(len(message))

    app = WebSocketMiddleware(Starlette(), hub=hub)
    message = masked(BINARY, b"x" * size)
    async with (
        serve_with(server, app, rcvbuf=16_384) as address,
        raw(address.port, "/", sndbuf=16_384) as client,
    ):
        before = memory()
        sent = await flood(client, message, 20_000_000)
        assert sent < 1_500_000
        assert memory() - before < 8_000_000
        # Nothing was lost: what was taken arrives as soon as somebody receives it.
        begin.set()
        await until(lambda: len(received) >= sent // len(message))
        assert set(received) == {size}
