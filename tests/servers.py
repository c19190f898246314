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

import uvicorn
from starlette.types import ASGIApp

ROOT = Path(__file__).parent.parent


class Address:
    def __init__(self, port: int) -> None:
        self.port = port
        self.ws = f"ws://127.0.0.1:{port}"
        self.http = f"http://127.0.0.1:{port}"


class UvicornServer(Address):
    def __init__(self, server: uvicorn.Server, port: int) -> None:
        super().__init__(port)
        self.server = server


@contextlib.asynccontextmanager
async def serve(app: ASGIApp, *, sndbuf: int | None = None, **options: Any) -> AsyncIterator[UvicornServer]:
    """uvicorn in this event loop, on a free port of 127.0.0.1; stopped on leaving. `sndbuf` caps the kernel's buffers."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sndbuf is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)
    listening.bind(("127.0.0.1", 0))
    options = {"log_config": None, "timeout_graceful_shutdown": 5, **options}
    server = uvicorn.Server(uvicorn.Config(app, **options))
    # The test's own handlers of signals stay.
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        while not server.started:
            if task.done():
                task.result()
                raise AssertionError("uvicorn did not start")
            await asyncio.sleep(0.005)
        yield UvicornServer(server, listening.getsockname()[1])
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, 15)
        listening.close()


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
