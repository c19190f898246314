"""One client that stops reading harms nobody. Its TCP window is really zero: the kernel's buffers are capped at both
ends, or they would swallow megabytes."""

import asyncio
import contextlib
import gc
import logging
import statistics
import time
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_ws import Connection, ConnectionClosed, Hub, Limits, WebSocketMiddleware
from tests.e2e.clients import (
    CLOSE,
    TEXT,
    RawClient,
    close_frame,
    connect,
    get,
    memory,
    open_sockets,
    raw,
    settled,
    until,
)
from tests.servers import OURS, SERVERS, STOCK, UVICORN, UvicornServer, run_uvicorn, serve, serve_with

pytestmark = pytest.mark.anyio

POLICIES = ("close", "drop_oldest", "drop_newest", "latest")
MESSAGE = "x" * 4_000


class Feed:
    """A hub whose clients get what is published, and what became of the clients with a name."""

    def __init__(self, **options: Any) -> None:
        self.hub = Hub(**options)
        self.hub.websocket("/feed")(self.handler)
        self.app: ASGIApp = WebSocketMiddleware(Starlette(), hub=self.hub)
        self.connections: dict[str, weakref.ref[Connection]] = {}
        self.ends: dict[str, ConnectionClosed] = {}
        self.dropped: dict[str, int] = {}

    async def handler(self, conn: Connection) -> None:
        name = conn.query_params.get("name", "")
        self.connections[name] = weakref.ref(conn)
        for channel in ("a", "b"):
            await conn.subscribe(channel)
        await conn.send("welcome")
        try:
            while True:
                await conn.receive()
        except ConnectionClosed as closed:
            self.ends[name] = closed.again()  # the traceback would keep the connection
            self.dropped[name] = conn.dropped

    async def publish(self, number: int) -> None:
        """To the channels in turn."""
        await self.hub.publish("ab"[number % 2], f"{number}:{MESSAGE}")


@contextlib.asynccontextmanager
async def healthy_clients(address: UvicornServer, count: int) -> AsyncIterator[list[Any]]:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(f"{address.ws}/feed")) for _ in range(count)]
        for client in clients:
            assert await client.recv() == "welcome"
        yield clients


@contextlib.asynccontextmanager
async def stuck_client(port: int, name: str = "stuck") -> AsyncIterator[RawClient]:
    async with raw(port, f"/feed?name={name}", rcvbuf=4096) as client:
        assert await client.receive() == (TEXT, b"welcome")
        yield client


@pytest.mark.parametrize(
    ("server", "overflow"), [*((OURS, policy) for policy in POLICIES), *((server, "close") for server in STOCK)]
)
async def test_one_stuck_client_among_200_is_cut_off_and_the_others_notice_nothing(
    server: str, overflow: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "asgi_ws")
    timeout = 1.5
    feed = Feed(overflow=overflow, limits=Limits(outbox_size=65_536, write_timeout=timeout))
    async with (
        serve(feed.app, ws=server, sndbuf=16_384) as address,
        healthy_clients(address, 200) as clients,
    ):
        before = memory(), open_sockets(), len(asyncio.all_tasks())
        async with stuck_client(address.port):
            times = []
            for number in range(60):
                begin = time.monotonic()
                await feed.publish(number)
                expected = f"{number}:{MESSAGE}"
                for client in clients:
                    assert await client.recv() == expected
                times.append(time.monotonic() - begin)
            # The stuck one is cut off at `timeout`; nobody else has waited for that, nor for anything like it.
            assert max(times) < timeout
            assert statistics.median(times) < 0.1
            assert memory() - before[0] < 8_000_000

            await until(lambda: len(address.server.server_state.connections) == 200, timeout + 1)
            await until(lambda: "stuck" in feed.ends)
            assert open_sockets() == before[1] + 1  # the client's own
            await until(lambda: len(asyncio.all_tasks()) <= before[2])
            gc.collect()
            assert feed.connections["stuck"]() is None

        closed = feed.ends["stuck"]
        if overflow == "close":
            assert (closed.code, closed.reason, feed.dropped["stuck"]) == (1013, "slow consumer", 0)
        else:
            assert (closed.code, closed.clean) == (1006, False)
            assert feed.dropped["stuck"] > 0
            (record,) = (record for record in caplog.records if "did not keep up" in record.message)
            drops = record.args[1]
            assert isinstance(drops, dict)
            assert sum(drops.values()) == feed.dropped["stuck"]
            assert set(drops) <= {"a", "b"}
        # And the others are still served.
        await feed.publish(60)
        for client in clients:
            assert await client.recv() == f"60:{MESSAGE}"


@pytest.mark.parametrize("server", UVICORN)
async def test_memory_for_stuck_clients_is_bounded_however_much_is_published(server: str) -> None:
    feed = Feed(overflow="drop_oldest", limits=Limits(outbox_size=65_536, write_timeout=60))
    async with contextlib.AsyncExitStack() as stack:
        address = await stack.enter_async_context(serve(feed.app, ws=server, sndbuf=16_384))
        for number in range(50):
            await stack.enter_async_context(stuck_client(address.port, str(number)))
        before = memory()
        for number in range(1_000):
            await feed.hub.publish("a", f"{number}:" + "x" * 60_000)
            await asyncio.sleep(0)
        # 60 MB to each: an outbox, and two high-water marks of the transport.
        assert memory() - before < 50 * 200_000


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("overflow", POLICIES)
async def test_client_that_reads_again_gets_what_the_policy_has_kept(server: str, overflow: str) -> None:
    feed = Feed(overflow=overflow, limits=Limits(outbox_size=65_536))
    async with serve_with(server, feed.app, sndbuf=16_384) as address, stuck_client(address.port) as client:
        for number in range(100):
            await feed.publish(number)
            await asyncio.sleep(0)
        got = []
        if overflow == "close":
            while (frame := await client.receive())[0] == TEXT:
                got.append(int(frame[1].partition(b":")[0]))
            assert close_frame(frame[1]) == (1013, "slow consumer")
            await client.send(CLOSE, frame[1])
            assert got == list(range(len(got)))
            assert len(got) < 99
            return
        conn = feed.connections["stuck"]()
        assert conn is not None
        while len(got) < 100 - conn.dropped:
            got.append(int((await client.receive())[1].partition(b":")[0]))
        assert conn.dropped > 0
        match overflow:
            case "drop_newest":
                assert got == list(range(len(got)))
            case "drop_oldest":
                gap = next(number for number in range(100) if number not in got)
                assert got == [*range(gap), *range(100 - (len(got) - gap), 100)]
                assert got[-1] == 99
            case "latest":
                assert got == [*range(len(got) - 2), 98, 99]
        # From here on it keeps up, and misses nothing.
        for number in range(100, 110):
            await feed.publish(number)
            assert (await client.receive())[1].startswith(b"%d:" % number)


@pytest.mark.parametrize("server", SERVERS)
async def test_handler_waits_for_its_own_slow_client_and_nothing_is_lost(server: str) -> None:
    hub = Hub(limits=Limits(outbox_size=65_536))
    sent: list[int] = []

    @hub.websocket("/")
    async def sends(conn: Connection) -> None:
        for number in range(200):
            await conn.send(f"{number}:{MESSAGE}")
            sent.append(number)

    app = WebSocketMiddleware(Starlette(), hub=hub)
    async with serve_with(server, app, sndbuf=16_384) as address, raw(address.port, "/", rcvbuf=4096) as client:
        assert 0 < await settled(lambda: len(sent)) < 100
        for number in range(200):
            assert (await client.receive())[1].startswith(b"%d:" % number)
        opcode, payload = await client.receive()
        assert (opcode, close_frame(payload)) == (CLOSE, (1000, ""))
        await client.send(CLOSE, payload)


def wrapping(app: ASGIApp) -> ASGIApp:
    """A middleware further out that hides the server's own `send`."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def own_send(message: Message) -> None:
            await send(message)

        await app(scope, receive, own_send)

    return wrapped


@pytest.mark.parametrize(
    ("server", "kind"), [(STOCK[0], "subscriber"), (STOCK[0], "sender"), (SERVERS[-1], "subscriber")]
)
async def test_where_a_client_cannot_be_cut_off_its_connection_is_left_all_the_same(server: str, kind: str) -> None:
    hub = Hub(overflow="drop_oldest", limits=Limits(outbox_size=65_536, write_timeout=0.5))
    ends: list[ConnectionClosed] = []

    @hub.websocket("/subscriber")
    async def subscriber(conn: Connection) -> None:
        await conn.subscribe("news")
        await conn.send("welcome")
        try:
            while True:
                await conn.receive()
        except ConnectionClosed as closed:
            ends.append(closed)

    @hub.websocket("/sender")
    async def sender(conn: Connection) -> None:
        await conn.send("welcome")
        try:
            while True:
                await conn.send("x" * 4_000)
        except ConnectionClosed as closed:
            ends.append(closed)

    app = wrapping(WebSocketMiddleware(Starlette(), hub=hub))
    async with serve_with(server, app, sndbuf=16_384) as address, raw(address.port, f"/{kind}", rcvbuf=4096) as client:
        assert await client.receive() == (TEXT, b"welcome")
        for _ in range(100):
            await hub.publish("news", "x" * 4_000)
        await until(lambda: ends, 1.5)
        assert (ends[0].code, ends[0].clean) == (1006, False)
        # Should it read again, then it finds an end, not silence.
        async with asyncio.timeout(2):
            await client.drain()


@pytest.mark.parametrize("ws", UVICORN)
async def test_server_stops_on_sigterm_with_clients_that_are_stuck(ws: str) -> None:
    async with run_uvicorn("tests.e2e.apps:app", "--ws", ws) as server, contextlib.AsyncExitStack() as stack:
        for _ in range(20):
            await stack.enter_async_context(raw(server.port, "/firehose", rcvbuf=4096))
        async with asyncio.timeout(10):
            while (await get(f"{server.http}/stalled")).json() < 20:
                await asyncio.sleep(0.05)
        begin = time.monotonic()
        server.stop()
        await server.wait()
        assert time.monotonic() - begin < 3
    assert "shutdown" in server.output
    assert "Traceback" not in server.output


@pytest.mark.parametrize(("ws", "loop"), [(OURS, "asyncio"), (OURS, "auto"), (STOCK[0], "auto"), (STOCK[1], "asyncio")])
async def test_kernel_keeps_nothing_for_a_client_that_was_cut_off(ws: str, loop: str) -> None:
    async with (
        run_uvicorn("tests.e2e.apps:app", "--ws", ws, "--loop", loop) as server,
        raw(server.port, "/firehose", rcvbuf=4096) as client,
    ):
        async with asyncio.timeout(10):
            while not (await get(f"{server.http}/stalled")).json():
                await asyncio.sleep(0.05)
        server.stop()
        await server.wait()
        # After a mere close there would be megabytes to read, which the kernel would have kept for minutes.
        read = 0
        with pytest.raises(ConnectionResetError):
            while data := await asyncio.get_running_loop().sock_recv(client.sock, 65_536):
                read += len(data)
        assert read < 65_536
