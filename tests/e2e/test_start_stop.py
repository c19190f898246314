"""When the hub starts and stops, and that the server always can."""

import asyncio
import contextlib
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import websockets
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from asgi_ws import Connection, Hub, WebSocketMiddleware
from tests.e2e.clients import connect, end_of, get, raw, until
from tests.servers import ROOT, SERVERS, UVICORN, Process, run_process, run_uvicorn, serve, serve_with

pytestmark = pytest.mark.anyio


def chat(**options: Any) -> tuple[Hub, Starlette]:
    hub = Hub()

    @hub.websocket("/chat/{room}")
    async def room_of(conn: Connection, room: str) -> None:
        await conn.subscribe(room)
        async for text in conn:
            await conn.publish(room, text)

    async def publish(request: Request) -> PlainTextResponse:
        position = await hub.publish("lobby", "from a page")
        return PlainTextResponse(str(position is not None))

    routes = [Route("/publish", publish)]
    return hub, Starlette(routes=routes, middleware=[Middleware(WebSocketMiddleware, hub=hub)], **options)


async def talk(url: str) -> None:
    async with connect(f"{url}/chat/lobby") as client:
        await client.send("hello")
        assert await client.recv() == "hello"


# With and without lifespan


@pytest.mark.parametrize("server", SERVERS)
async def test_hub_runs_from_before_the_applications_startup_until_after_its_shutdown(server: str) -> None:
    running: list[bool] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        running.append(hub.running)
        await hub.publish("lobby", "startup")
        yield
        running.append(hub.running)
        await hub.publish("lobby", "shutdown")

    hub, app = chat(lifespan=lifespan)
    async with serve_with(server, app) as address:
        await talk(address.ws)
        assert hub.running
    assert running == [True, True]
    assert not hub.running


@pytest.mark.parametrize("first", ["websocket", "http"])
async def test_without_lifespan_the_hub_starts_with_the_first_request(first: str) -> None:
    hub, app = chat()
    async with serve(app, lifespan="off") as address:
        assert not hub.running
        if first == "http":
            assert (await get(f"{address.http}/publish")).text == "True"
        await talk(address.ws)
        assert hub.running
        await talk(address.ws)


@pytest.mark.parametrize("server", SERVERS)
async def test_mounted_application_starts_its_hub_with_the_first_request(server: str) -> None:
    hub, app = chat()
    outer = Starlette(routes=[Mount("/below", app=app)])
    async with serve_with(server, outer) as address:
        assert not hub.running
        await talk(f"{address.ws}/below")
        assert (await get(f"{address.http}/below/publish")).text == "True"


async def test_application_can_be_served_again() -> None:
    hub, app = chat()
    for lifespan in ("on", "on", "off"):
        async with serve(app, lifespan=lifespan) as address:
            await talk(address.ws)
    assert hub.running  # nobody told it to stop


# Starlette's TestClient


def test_testclient_runs_the_hub_with_the_lifespan() -> None:
    _, app = chat()
    with TestClient(app) as client:
        for _ in range(2):
            with client.websocket_connect("/chat/lobby") as ann, client.websocket_connect("/chat/lobby") as bob:
                bob.send_text("hello")
                assert bob.receive_text() == "hello"
                ann.send_text("hello to you")
                assert bob.receive_text() == "hello to you"
        assert client.get("/publish").text == "True"


def test_testclient_needs_no_lifespan() -> None:
    _, app = chat()
    client = TestClient(app)
    for _ in range(2):
        # Each of these runs in an event loop of its own.
        with client.websocket_connect("/chat/lobby") as ann:
            ann.send_text("hello")
            assert ann.receive_text() == "hello"
        assert client.get("/publish").text == "True"


# --reload and --workers


def reloaded(folder: Path) -> contextlib.AbstractAsyncContextManager[Process]:
    command = [sys.executable, "-m", "uvicorn", "--port", "{port}", "--reload", "--reload-dir", str(folder)]
    return run_process(*command, "copied:app", ready="startup of", cwd=folder, PYTHONPATH=str(ROOT))


async def answers(server: Process) -> None:
    """Wait until a worker listens, which it doesn't tell."""
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(httpx2.ConnectError):
                await get(f"{server.http}/stalled")
                return
            await asyncio.sleep(0.02)


async def test_reload_restarts_with_clients_that_are_open_or_stuck(tmp_path: Path) -> None:
    copied = tmp_path / "copied.py"
    shutil.copy(ROOT / "tests/e2e/apps.py", copied)
    async with reloaded(tmp_path) as server, contextlib.AsyncExitStack() as stack:
        await answers(server)
        receiver = await stack.enter_async_context(connect(f"{server.ws}/receives"))
        sleeper = await stack.enter_async_context(connect(f"{server.ws}/sleeps"))
        await stack.enter_async_context(raw(server.port, "/firehose", rcvbuf=4096))
        await receiver.send("hello")
        assert await receiver.recv() == "hello"
        assert await sleeper.recv() == "welcome"
        async with asyncio.timeout(10):
            while (await get(f"{server.http}/stalled")).json() < 1:
                await asyncio.sleep(0.05)
        begin = time.monotonic()
        os.utime(copied)
        assert await end_of(receiver) == (1012, "")
        assert await end_of(sleeper) == (1012, "")
        await until(lambda: server.output.count("startup of") == 2, 10)
        assert time.monotonic() - begin < 5
        await answers(server)
        async with connect(f"{server.ws}/receives") as receiver:
            await receiver.send("again")
            assert await receiver.recv() == "again"


async def test_several_workers_on_the_memory_broker_are_warned_of() -> None:
    async with run_uvicorn("tests.e2e.apps:app", "--workers", "2") as server:
        await until(lambda: server.output.count("Application startup complete") == 2, 10)
    assert server.output.count("2 workers don't share the memory broker") == 2
    assert "Run one worker" in server.output


async def test_one_worker_is_not_warned_of() -> None:
    async with run_uvicorn("tests.e2e.apps:app") as server:
        assert "memory broker" not in server.output


# SIGTERM


@pytest.mark.parametrize("ws", UVICORN)
async def test_sigterm_ends_500_connections_of_all_kinds_within_three_seconds(ws: str) -> None:
    async with run_uvicorn("tests.e2e.apps:app", "--ws", ws) as server, contextlib.AsyncExitStack() as stack:
        clients: list[websockets.ClientConnection] = []
        for path in ("/receives", "/sleeps", "/busy"):
            for _ in range(150):
                clients.append(await stack.enter_async_context(connect(server.ws + path)))
        for _ in range(50):
            await stack.enter_async_context(raw(server.port, "/firehose", rcvbuf=4096))
        for client in clients[:150]:
            await client.send("hello")
            assert await client.recv() == "hello"
        for client in clients[150:300]:
            assert await client.recv() == "welcome"
        for client in clients[300:]:
            await client.send("work")
            assert await client.recv() == "working"
        async with asyncio.timeout(15):
            while (await get(f"{server.http}/stalled")).json() < 50:
                await asyncio.sleep(0.05)
        begin = time.monotonic()
        server.stop()
        ends = asyncio.gather(*(end_of(client) for client in clients))
        await server.wait()
        assert time.monotonic() - begin < 3
        assert set(await ends) == {(1012, "")}
    assert "shutdown" in server.output
    assert "Traceback" not in server.output
    assert "ERROR" not in server.output


async def test_server_without_a_graceful_timeout_stops_though_a_handler_waits() -> None:
    hub = Hub()
    ends: list[str] = []

    @hub.websocket("/")
    async def waits(conn: Connection) -> None:
        await conn.receive()
        await conn.send("working")
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("cancelled")

    app = WebSocketMiddleware(Starlette(), hub=hub)
    async with contextlib.AsyncExitStack() as stack:
        async with serve(app, timeout_graceful_shutdown=None) as address:
            client = await stack.enter_async_context(connect(address.ws))
            await client.send("work")
            assert await client.recv() == "working"
            begin = time.monotonic()
        assert time.monotonic() - begin < 3
        assert ends == ["cancelled"]
        assert await end_of(client) == (1012, "")
