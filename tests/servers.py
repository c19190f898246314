"""Real servers for tests: uvicorn in the test's own event loop, or any server as a process of its own."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import hypercorn.asyncio
import hypercorn.config
import uvicorn
from starlette.types import ASGIApp

ROOT = Path(__file__).parent.parent

STOCK = ("websockets-sansio", "wsproto")
OURS = "asgi_ws.uvicorn:WebSocketProtocol"
UVICORN = (*STOCK, OURS)
"""WebSocket classes for uvicorn, by the names that `--ws` has for them."""
SERVERS = (*UVICORN, "hypercorn")
"""What `serve_with` knows."""


class Address:
    def __init__(self, port: int) -> None:
        self.port = port
        self.ws = f"ws://127.0.0.1:{port}"
        self.http = f"http://127.0.0.1:{port}"


class _Uvicorn(uvicorn.Server):
    """Leaves the handlers of signals to the test, and stops when told to, not at the next tenth of a second."""

    capture_signals = contextlib.nullcontext  # type: ignore[assignment]

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stopping = asyncio.Event()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.stopping.wait()

    def stop(self) -> None:
        self.should_exit = True
        self.stopping.set()


class UvicornServer(Address):
    def __init__(self, server: uvicorn.Server, port: int) -> None:
        super().__init__(port)
        self.server = server


def listen(port: int = 0, *, sndbuf: int | None = None, rcvbuf: int | None = None) -> socket.socket:
    """A socket on 127.0.0.1, on a free port unless one is given. The kernel's buffers for one connection grow to
    megabytes unless they are capped here: accepted sockets inherit it."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for option, size in ((socket.SO_SNDBUF, sndbuf), (socket.SO_RCVBUF, rcvbuf)):
        if size is not None:
            listening.setsockopt(socket.SOL_SOCKET, option, size)
    listening.bind(("127.0.0.1", port))
    return listening


@contextlib.asynccontextmanager
async def serve(
    app: ASGIApp, *, port: int = 0, sndbuf: int | None = None, rcvbuf: int | None = None, **options: Any
) -> AsyncIterator[UvicornServer]:
    """uvicorn in this event loop, on 127.0.0.1, on a free port unless one is given; stopped on leaving. `sndbuf` and
    `rcvbuf` cap the kernel's buffers."""
    listening = listen(port, sndbuf=sndbuf, rcvbuf=rcvbuf)
    options = {"log_config": None, "timeout_graceful_shutdown": 5, **options}
    server = _Uvicorn(uvicorn.Config(app, **options))
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        while not server.started:
            if task.done():
                task.result()
                raise AssertionError("uvicorn did not start")
            await asyncio.sleep(0.005)
        yield UvicornServer(server, listening.getsockname()[1])
    finally:
        server.stop()
        await asyncio.wait_for(task, 15)
        listening.close()


@contextlib.asynccontextmanager
async def serve_hypercorn(
    app: ASGIApp, *, sndbuf: int | None = None, rcvbuf: int | None = None, **options: Any
) -> AsyncIterator[Address]:
    """Hypercorn in this event loop, on a free port of 127.0.0.1; stopped on leaving."""
    listening = listen(sndbuf=sndbuf, rcvbuf=rcvbuf)
    listening.listen(100)
    port = listening.getsockname()[1]
    config = hypercorn.config.Config()
    config.bind = [f"fd://{listening.detach()}"]
    config.accesslog = config.errorlog = None
    config.graceful_timeout = 5
    for name, value in options.items():
        setattr(config, name, value)
    stop = asyncio.Event()
    task = asyncio.create_task(hypercorn.asyncio.serve(app, config, shutdown_trigger=stop.wait))
    try:
        yield Address(port)
    finally:
        stop.set()
        await asyncio.wait_for(task, 15)


def serve_with(
    server: str, app: ASGIApp, *, sndbuf: int | None = None, rcvbuf: int | None = None
) -> contextlib.AbstractAsyncContextManager[Address]:
    """One of `SERVERS` in this event loop."""
    if server == "hypercorn":
        return serve_hypercorn(app, sndbuf=sndbuf, rcvbuf=rcvbuf)
    return serve(app, sndbuf=sndbuf, rcvbuf=rcvbuf, ws=server)


class Process(Address):
    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        super().__init__(port)
        self.process = process
        self.output = ""

    async def read(self) -> None:
        assert self.process.stdout is not None
        while chunk := await self.process.stdout.read(65536):
            self.output += chunk.decode(errors="replace")

    async def until(self, text: str, timeout: float = 15) -> None:
        """Wait until the process has written `text`."""
        async with asyncio.timeout(timeout):
            while text not in self.output:
                if self.process.returncode is not None:
                    raise AssertionError(f"the process ended with {self.process.returncode}:\n{self.output}")
                await asyncio.sleep(0.01)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    async def wait(self, timeout: float = 15) -> int:
        async with asyncio.timeout(timeout):
            return await self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def run_process(*command: str, ready: str, cwd: Path = ROOT, **environment: str) -> AsyncIterator[Process]:
    """A server as a process; "{port}" in the command becomes a free port. `ready` is what it writes when it serves."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(part.replace("{port}", str(port)) for part in command),
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )
    running = Process(process, port)
    reader = asyncio.create_task(running.read())
    try:
        await running.until(ready)
        yield running
    finally:
        running.stop()
        try:
            await running.wait(10)
        except TimeoutError:
            process.kill()
            await process.wait()
        await reader


def run_uvicorn(app: str, *options: str, **environment: str) -> contextlib.AbstractAsyncContextManager[Process]:
    """`uvicorn APP OPTIONS` on a free port."""
    command = [sys.executable, "-m", "uvicorn", "--host", "127.0.0.1", "--port", "{port}", *options, app]
    return run_process(*command, ready="Uvicorn running on", **environment)
