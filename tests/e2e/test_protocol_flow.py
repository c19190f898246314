"""asgi_ws.uvicorn.WebSocketProtocol with clients that don't read, don't answer or don't end; how its server stops."""

import asyncio
import contextlib
import socket
import time
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

import asgi_ws.uvicorn
from asgi_ws import Connection, Hub, Limits, WebSocketMiddleware
from asgi_ws.uvicorn import WebSocketProtocol
from tests.e2e.clients import BINARY, CLOSE, PING, PONG, TEXT, RawClient, close_frame, memory, raw, settled, until
from tests.e2e.test_protocol import after_accept, answers, closing, echo, frame, ours, request, skip_head, write
from tests.servers import UvicornServer

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param}


def protocol_of(server: UvicornServer) -> WebSocketProtocol:
    (protocol,) = server.server.server_state.connections
    assert isinstance(protocol, WebSocketProtocol)
    return protocol


def no_connections(server: UvicornServer) -> bool:
    return not server.server.server_state.connections


async def deaf(receive: Receive, send: Send) -> None:
    await asyncio.Event().wait()


class Firehose:
    """An application that sends for as long as the client takes it."""

    def __init__(self) -> None:
        self.sent = 0
        self.error: Exception | None = None

    async def __call__(self, receive: Receive, send: Send) -> None:
        try:
            while True:
                await send({"type": "websocket.send", "bytes": bytes(16_384)})
                self.sent += 1
                await asyncio.sleep(0)
        except Exception as error:
            self.error = error


# Messages that nobody receives


@pytest.mark.parametrize(("size", "most"), [(10, 200_000), (60_000, 2_000_000)])
async def test_client_waits_while_a_plain_application_does_not_receive(size: int, most: int) -> None:
    begin = asyncio.Event()
    count = 10_000_000 // (size + 100)
    received: list[int] = []

    async def then(receive: Receive, send: Send) -> None:
        await begin.wait()
        while (message := await receive())["type"] == "websocket.receive":
            received.append(len(message["bytes"]))

    async with ours(after_accept(then), rcvbuf=16_384) as server, raw(server.port, "/", sndbuf=16_384) as client:
        before = memory()
        writer = asyncio.create_task(write(client, frame(BINARY, bytes(size)) * count))
        protocol = protocol_of(server)
        await until(lambda: not protocol._reading)
        queued = await settled(lambda: len(protocol._events), 0.1)
        assert 1 <= queued <= max(64 * 1024 * 4 // size, 64)
        assert queued * size < most
        assert memory() - before < 30_000_000  # most of it what the client sends
        begin.set()
        await writer
        await write(client, closing(1000))
        await until(lambda: len(received) == count)
        assert await client.drain() == [(CLOSE, b"\x03\xe8")]


async def test_client_whose_messages_nobody_receives_is_kept_as_long_as_it_answers() -> None:
    begin = asyncio.Event()

    async def then(receive: Receive, send: Send) -> None:
        await begin.wait()
        while True:
            await send({**await receive(), "type": "websocket.send"})

    options = {"ws_ping_interval": 0.1, "ws_ping_timeout": 0.1}
    async with ours(after_accept(then), **options) as server, raw(server.port, "/") as client:
        await write(client, frame(TEXT, "x") * 100)
        pinged = time.monotonic()
        pings = 0
        while time.monotonic() - pinged < 0.8:
            opcode, payload = await client.receive()
            assert opcode == PING
            pings += 1
            await write(client, frame(PONG, payload))
        assert pings >= 3
        begin.set()
        texts = 0
        while texts < 100:
            opcode, payload = await client.receive()
            texts += opcode == TEXT
            if opcode == PING:
                await write(client, frame(PONG, payload))


# Keepalive


async def test_client_that_does_not_answer_pings_is_cut_off() -> None:
    async with ours(ws_ping_interval=0.2, ws_ping_timeout=0.1) as server, raw(server.port, "/") as client:
        begin = time.monotonic()
        assert {opcode for opcode, _ in await client.drain()} == {PING}
        assert 0.25 < time.monotonic() - begin < 1.5
        await until(lambda: no_connections(server))


async def test_pong_with_another_payload_is_no_answer() -> None:
    async with ours(ws_ping_interval=0.1, ws_ping_timeout=0.2) as server, raw(server.port, "/") as client:
        opcode, payload = await client.receive()
        assert (opcode, len(payload)) == (PING, 4)
        await write(client, frame(PONG, b"nope"))
        assert await client.drain() == []


async def test_client_that_answers_pings_stays() -> None:
    async with ours(ws_ping_interval=0.1, ws_ping_timeout=0.1) as server, raw(server.port, "/") as client:
        begin = time.monotonic()
        payloads = set()
        for _ in range(12):
            opcode, payload = await client.receive()
            assert opcode == PING
            payloads.add(payload)
            await write(client, frame(PONG, payload))
        assert len(payloads) == 12
        assert 1.1 < time.monotonic() - begin < 2
        await write(client, frame(TEXT, "still here"))
        assert await client.receive() == (TEXT, b"still here")


async def test_client_that_sends_a_large_message_slowly_stays() -> None:
    """Its pongs can't come before the end of the frame that it is sending."""
    wire = frame(BINARY, bytes(100))
    async with ours(ws_ping_interval=0.05, ws_ping_timeout=0.1) as server, raw(server.port, "/") as client:
        for start in range(0, len(wire), 4):
            await write(client, wire[start : start + 4])
            await asyncio.sleep(0.02)
        while (got := await client.receive())[0] == PING:
            pass
        assert got == (BINARY, bytes(100))


async def test_without_a_timeout_pings_go_on_and_nobody_is_cut_off() -> None:
    async with ours(ws_ping_interval=0.03, ws_ping_timeout=None) as server, raw(server.port, "/") as client:
        assert {(await client.receive())[0] for _ in range(6)} == {PING}
        await write(client, closing(1000))
        while (got := await client.receive())[0] == PING:
            pass
        assert got == (CLOSE, b"\x03\xe8")


async def test_without_an_interval_nobody_is_pinged() -> None:
    async with ours(ws_ping_interval=None) as server, raw(server.port, "/"):
        assert protocol_of(server)._keepalive is None


async def test_closing_ends_the_pings() -> None:
    async def then(receive: Receive, send: Send) -> None:
        await send({"type": "websocket.close"})

    options = {"ws_ping_interval": 0.05, "ws_ping_timeout": 0.05}
    async with ours(after_accept(then), **options) as server, raw(server.port, "/") as client:
        assert await client.receive() == (CLOSE, b"\x03\xe8")
        await asyncio.sleep(0.2)
        assert not no_connections(server)
        await write(client, closing(1000))
        assert await client.drain() == []


# Clients that don't read


async def test_pings_of_a_client_that_does_not_read_take_no_memory_and_the_last_one_is_answered() -> None:
    async with (
        ours(sndbuf=16_384) as server,
        raw(server.port, "/", rcvbuf=16_384) as client,
    ):
        protocol = protocol_of(server)
        before = memory()
        flood = frame(PING, b"x" * 125) * 2_000
        for _ in range(5):
            await write(client, flood)
        await write(client, frame(PING, b"the last one"))
        await until(lambda: protocol._pong == b"the last one")
        assert protocol.buffered < 300_000
        assert memory() - before < 10_000_000
        while (got := await client.receive())[1] != b"the last one":
            assert got == (PONG, b"x" * 125)
        assert got[0] == PONG


async def test_pong_that_waits_does_not_follow_a_close_frame() -> None:
    go = asyncio.Event()
    hose = Firehose()

    async def then(receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(hose(receive, send))
        await go.wait()
        sending.cancel()
        await asyncio.wait([sending])

    async with ours(after_accept(then), sndbuf=16_384) as server, raw(server.port, "/", rcvbuf=4_096) as client:
        protocol = protocol_of(server)
        await until(lambda: protocol._writable is not None and not protocol._writable.is_set())
        await write(client, frame(PING, b"?"))
        await until(lambda: protocol._pong == b"?")
        go.set()
        got = await answers(client)
        assert {opcode for opcode, _ in got[:-1]} == {BINARY}
        assert got[-1] == (CLOSE, b"\x03\xe8")


async def test_plain_application_waits_for_its_client_and_hears_of_its_end() -> None:
    hose = Firehose()
    async with ours(after_accept(hose), sndbuf=16_384) as server, raw(server.port, "/", rcvbuf=4_096) as client:
        sent = await settled(lambda: hose.sent, 0.1)
        assert 0 < sent < 100
        for _ in range(sent):
            assert await client.receive() == (BINARY, bytes(16_384))
        await until(lambda: hose.sent > sent)
        await settled(lambda: hose.sent, 0.1)
        client.reset()
        await until(lambda: isinstance(hose.error, OSError))
        await until(lambda: no_connections(server))


async def test_client_that_leaves_while_it_does_not_read_is_cut_off_after_the_close_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asgi_ws.uvicorn, "_CLOSE_TIMEOUT", 0.2)
    hose = Firehose()
    async with ours(after_accept(hose), sndbuf=16_384) as server, raw(server.port, "/", rcvbuf=4_096) as client:
        await settled(lambda: hose.sent, 0.1)
        await write(client, closing(1000))
        await until(lambda: isinstance(hose.error, OSError), 1)
        await until(lambda: no_connections(server), 1)
        assert server.server.server_state.tasks == set()


async def test_client_that_only_ends_its_own_half_and_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi_ws.uvicorn, "_CLOSE_TIMEOUT", 0.3)
    hose = Firehose()
    options = {"ws_ping_interval": 0.2, "ws_ping_timeout": 10, "sndbuf": 16_384}
    async with ours(after_accept(hose), **options) as server, raw(server.port, "/", rcvbuf=4_096) as client:
        await settled(lambda: hose.sent, 0.1)
        client.sock.shutdown(socket.SHUT_WR)
        await until(lambda: isinstance(hose.error, OSError), 1)
        await until(lambda: no_connections(server), 1)


@pytest.mark.parametrize("breaks", [False, True])
async def test_client_that_never_answers_a_close_frame_is_cut_off(
    breaks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asgi_ws.uvicorn, "_CLOSE_TIMEOUT", 0.2)

    async def closes(receive: Receive, send: Send) -> None:
        await send({"type": "websocket.close"})

    app: ASGIApp = echo if breaks else after_accept(closes)
    async with ours(app) as server, raw(server.port, "/") as client:
        if breaks:
            await write(client, b"\x81\x00")
        assert (await client.receive())[0] == CLOSE
        # Whatever else it sends.
        await write(client, frame(TEXT, "not the answer") + frame(PING))
        assert not no_connections(server)
        assert await until(lambda: no_connections(server), 1) > 0.05
        with contextlib.suppress(ConnectionError):
            assert await client.drain() == []


# Messages for a hub's endpoint


@pytest.mark.parametrize("count", [10, 500])
async def test_messages_that_come_before_the_endpoint_listens_are_received(count: int) -> None:
    hub = Hub(limits=Limits(messages_per_second=None))
    accept = asyncio.Event()
    received: list[str] = []

    @hub.on_connect
    async def takes_its_time(conn: Connection) -> None:
        await accept.wait()

    @hub.websocket("/")
    async def receives(conn: Connection[str]) -> None:
        async for text in conn:
            received.append(text)

    async with ours(WebSocketMiddleware(Starlette(), hub=hub)) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.setblocking(False)
            client = RawClient(sock)
            await write(client, request())
            await until(lambda: server.server.server_state.tasks)
            await write(client, b"".join(frame(TEXT, str(number)) for number in range(count)) + closing(4000))
            await until(lambda: protocol_of(server)._unparsed)
            accept.set()
            await until(lambda: len(received) == count)
            await skip_head(client)
            assert await client.drain() == [(CLOSE, (4000).to_bytes(2))]
    assert received == [str(number) for number in range(count)]


# The server stops


def chatting(**limits: Any) -> tuple[Hub, ASGIApp]:
    hub = Hub(limits=Limits(**limits))

    @hub.websocket("/")
    async def listens(conn: Connection) -> None:
        await conn.subscribe("news")
        await conn.send("welcome")
        async for _ in conn:
            pass

    return hub, WebSocketMiddleware(Starlette(), hub=hub)


async def test_what_waits_arrives_before_the_goodbye() -> None:
    hub, app = chatting(outbox_size=10_000_000)
    async with ours(app, sndbuf=16_384) as server, raw(server.port, "/", rcvbuf=4_096) as client:
        assert await client.receive() == (TEXT, b"welcome")
        for number in range(300):
            await hub.publish("news", f"{number}:".ljust(4_000, "x"))
        server.server.stop()
        for number in range(300):
            assert (await client.receive())[1].startswith(b"%d:" % number)
        opcode, payload = await client.receive()
        assert (opcode, close_frame(payload)) == (CLOSE, (1012, ""))
        assert await client.drain() == []


async def test_clients_are_told_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi_ws.uvicorn, "_GOODBYES_PER_SECOND", 20)
    _, app = chatting()
    times: list[float] = []

    async def told(client: RawClient) -> None:
        assert [close_frame(data)[0] for opcode, data in await client.drain() if opcode == CLOSE] == [1012]
        times.append(time.monotonic())

    async with ours(app) as server, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(raw(server.port, "/")) for _ in range(10)]
        for client in clients:
            assert await client.receive() == (TEXT, b"welcome")
        server.server.stop()
        await asyncio.gather(*map(told, clients))
    assert 0.05 < max(times) - min(times) < 0.6


@pytest.mark.parametrize("kind", ["plain", "hub", "closing", "denied"])
async def test_clients_that_do_not_read_do_not_hold_up_the_end(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi_ws.uvicorn, "_STOP_TIMEOUT", 0.3)
    hub, hub_app = chatting(outbox_size=1_000_000)
    hose = Firehose()

    async def closes(receive: Receive, send: Send) -> None:
        for _ in range(100):
            await asyncio.wait(
                [asyncio.create_task(send({"type": "websocket.send", "bytes": bytes(16_384)}))], timeout=0.01
            )
        await send({"type": "websocket.close"})

    async def denies(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.http.response.start", "status": 403})
        try:
            while True:
                await send({"type": "websocket.http.response.body", "body": bytes(16_384), "more_body": True})
                hose.sent += 1
        except OSError as error:
            hose.error = error

    apps: dict[str, ASGIApp] = {
        "plain": after_accept(hose),
        "hub": hub_app,
        "closing": after_accept(deaf),
        "denied": denies,
    }
    async with contextlib.AsyncExitStack() as stack:
        client_stack = await stack.enter_async_context(contextlib.AsyncExitStack())
        async with ours(
            apps[kind], sndbuf=16_384, timeout_graceful_shutdown=None if kind != "closing" else 1
        ) as server:
            await client_stack.enter_async_context(raw(server.port, "/", rcvbuf=4_096))
            if kind == "hub":
                await until(lambda: hub.running)
                for _ in range(100):
                    await hub.publish("news", "x" * 4_000)
            elif kind != "closing":
                await settled(lambda: hose.sent, 0.1)
            else:
                protocol = protocol_of(server)
                for _ in range(100):
                    protocol.write(asgi_ws.uvicorn.Frame(bytes(16_384)))
                protocol.close(4000, "")
            begin = time.monotonic()
        assert time.monotonic() - begin < 3
        assert no_connections(server)


async def test_nothing_is_left_of_a_server_that_stopped() -> None:
    before = asyncio.all_tasks()
    async with ours() as server, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(raw(server.port, "/")) for _ in range(20)]
        server.server.stop()
        for client in clients:
            assert await client.receive() == (CLOSE, (1012).to_bytes(2))
            assert await client.drain() == []
        await until(lambda: asyncio.all_tasks() - before == {next(iter(asyncio.all_tasks() - before))})
    assert asyncio.all_tasks() == before
