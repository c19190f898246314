"""engine.io-client in Node, and what a server does with its polls when it stops."""

import asyncio
import contextlib
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from asgi_ws import Connection, Hub, Limits, WebSocketMiddleware
from tests.e2e.clients import connect, until
from tests.e2e.node import NodeClient, engine_client
from tests.servers import OURS, STOCK, Address, free_port, run_process, run_uvicorn, serve, serve_hypercorn
from tests.transports.test_engineio import nothing

pytestmark = pytest.mark.anyio

TRANSPORTS = (["polling"], ["websocket"], ["polling", "websocket"])
MEGABYTE = 1024 * 1024


class Chat:
    """A room, over whatever transport."""

    def __init__(self, **limits: Any) -> None:
        limits = {"message_size": 4 * MEGABYTE, "outbox_size": 8 * MEGABYTE, "ping_interval": 0.3, **limits}
        self.hub = Hub(limits=Limits(**limits))
        self.app = WebSocketMiddleware(nothing, hub=self.hub)
        self.connections: list[Connection] = []

        @self.hub.websocket("/chat/{room}")
        async def chat(conn: Connection, room: str) -> None:
            self.connections.append(conn)
            await conn.subscribe(f"chat:{room}")
            await conn.send(f"you came by {conn.transport}")
            async for message in conn:
                await conn.publish(f"chat:{room}", message)
            self.connections.remove(conn)


@pytest.fixture
def chat() -> Chat:
    return Chat()


@contextlib.asynccontextmanager
async def opened(server: Address, transports: list[str], **options: Any) -> AsyncIterator[NodeClient]:
    async with engine_client(server.http, "/chat/lobby/", transports=transports, **options) as client:
        assert await client.event("open") == {"transport": transports[0]}
        assert await client.receive() == f"you came by {transports[0]}"
        if len(transports) > 1:
            assert await client.event("upgrade") == {"transport": transports[1]}
        yield client


@pytest.mark.parametrize("ws", [STOCK[0], STOCK[1], OURS, "hypercorn"])
@pytest.mark.parametrize("transports", TRANSPORTS, ids=",".join)
async def test_text_and_binary_travel_both_ways(chat: Chat, ws: str, transports: list[str]) -> None:
    serving = serve_hypercorn(chat.app) if ws == "hypercorn" else serve(chat.app, ws=ws)
    async with serving as server, connect(f"{server.ws}/chat/lobby") as plain:
        assert await plain.recv() == "you came by websocket"
        async with opened(server, transports) as client:
            await until(lambda: chat.connections[-1].transport == transports[-1])
            for message in ("grüße 👋", bytes(range(256)), "", "x" * MEGABYTE, b"\xff" * MEGABYTE):
                await client.send(message)
                assert await plain.recv() == message
                assert await client.receive() == message
                await plain.send(message)
                assert await plain.recv() == message
                assert await client.receive() == message
            client.command(close=True)
            assert await client.event("close") == {"reason": "forced close"}
            await until(lambda: len(chat.connections) == 1)


@pytest.mark.parametrize("ws", [STOCK[0], OURS])
async def test_burst_is_in_order_while_the_client_moves(chat: Chat, ws: str) -> None:
    async with serve(chat.app, ws=ws) as server, engine_client(server.http, "/chat/lobby/") as client:
        assert await client.event("open") == {"transport": "polling"}
        client.command(burst=300)
        assert await client.receive() == "you came by polling"
        received: list[str] = []
        while len(received) < 300:
            assert client._process.stdout is not None
            event = json.loads(await asyncio.wait_for(client._process.stdout.readline(), 10))
            if event["event"] == "message":
                received.append(event["text"])
        assert received == [str(n) for n in range(300)]


@pytest.mark.parametrize("transports", [["polling"], ["websocket"]], ids=",".join)
async def test_client_stays_while_the_hearts_beat(chat: Chat, transports: list[str]) -> None:
    async with serve(chat.app) as server, opened(server, transports) as client:
        await asyncio.sleep(1)
        await client.send("still here")
        assert await client.receive() == "still here"


@pytest.mark.parametrize("transports", [["polling"], ["websocket"]], ids=",".join)
async def test_server_closes_the_session(chat: Chat, transports: list[str]) -> None:
    async with serve(chat.app) as server, opened(server, transports) as client:
        await chat.connections[0].close(4000, "enough")
        assert (await client.event("close"))["reason"] == "transport close"


async def test_client_that_was_killed_is_gone(chat: Chat) -> None:
    async with serve(chat.app) as server, opened(server, ["polling"]) as client:
        session: Any = chat.connections[0]._session
        await until(lambda: session.session.polled)
        client._process.kill()
        await until(lambda: not chat.connections)


@pytest.mark.parametrize("transports", [["polling"], ["polling", "websocket"]], ids=",".join)
async def test_client_comes_back_when_its_server_was_killed(transports: list[str]) -> None:
    port = str(free_port())
    command = [sys.executable, "-m", "uvicorn", "--port", port, "tests.e2e.apps:app"]
    url = f"http://127.0.0.1:{port}"
    async with engine_client(url, "/receives/", again=True, transports=transports) as client:

        async def greeted() -> None:
            assert await client.event("open") == {"transport": "polling"}
            if len(transports) > 1:
                assert await client.event("upgrade") == {"transport": "websocket"}
            await client.send("hello")
            assert await client.receive() == "hello"

        async with run_process(*command, ready="Uvicorn running on") as server:
            await greeted()
            server.process.kill()
            await server.wait()
        async with run_process(*command, ready="Uvicorn running on"):
            await greeted()


# The end of the server


class Request:
    """A request on a bare socket, of which the answer takes a while."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def rest(self) -> bytes:
        """All that comes until the end."""
        try:
            return await asyncio.wait_for(self.reader.read(), 10)
        finally:
            self.writer.close()
            await self.writer.wait_closed()


async def send_request(port: int, target: str, *headers: str) -> Request:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"GET {target} HTTP/1.1", f"Host: 127.0.0.1:{port}", *headers, "", ""]
    writer.write("\r\n".join(lines).encode())
    await writer.drain()
    return Request(reader, writer)


async def begin(port: int, path: str) -> str:
    """The target of a new session's polls."""
    target = f"{path}?EIO=4&transport=polling"
    opening = await (await send_request(port, target, "Connection: close")).rest()
    return target + "&sid=" + str(json.loads(opening.partition(b"\r\n\r\n0")[2])["sid"])


@pytest.mark.parametrize("ws", ["auto", OURS])
async def test_server_with_polls_and_streams_stops_at_once(ws: str) -> None:
    async with run_uvicorn("tests.e2e.apps:app", "--ws", ws) as server:
        polls, streams = [], []
        for _ in range(100):
            polls.append(await send_request(server.port, await begin(server.port, "/receives/")))
            streams.append(await send_request(server.port, "/sleeps", "Accept: text/event-stream"))
        for request in streams:
            await asyncio.wait_for(request.reader.readuntil(b"data: welcome\n\n"), 5)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        for request in polls:
            assert (await request.rest()).endswith(b"\r\n\r\n1")
        for request in streams:
            assert b'data: {"code": 1012, "reason": ""}' in await request.rest()
        await server.wait(10)
        assert time.monotonic() - start < 3
        assert "Application shutdown complete" in server.output
        assert "Traceback" not in server.output


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("kind", ["poll", "stream"])
async def test_answer_that_is_not_read_is_cut_off(http: str, kind: str) -> None:
    """A client that asks for more than it takes."""
    chat = Chat(write_timeout=0.4, ping_interval=None)
    async with serve(chat.app, sndbuf=16_384, http=http) as server:
        target, accept = "/chat/lobby", "text/event-stream"
        if kind == "poll":
            target, accept = await begin(server.port, "/chat/lobby/"), "*/*"
            await chat.hub.publish("chat:lobby", b"x" * 3 * MEGABYTE)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", server.port))
            lines = [f"GET {target} HTTP/1.1", f"Host: 127.0.0.1:{server.port}", f"Accept: {accept}", "", ""]
            await loop.sock_sendall(client, "\r\n".join(lines).encode())
            await until(lambda: chat.connections)
            if kind == "stream":
                await until(lambda: chat.connections[0].channels)
                await chat.hub.publish("chat:lobby", b"x" * 3 * MEGABYTE)
            await until(lambda: not chat.connections)
            await until(lambda: not server.server.server_state.connections)
