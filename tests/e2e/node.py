"""Node for the end-to-end tests: the `ws` client, and Chromium by way of Playwright.

`npm ci` in this folder installs what they need. Both scripts speak JSON, a line at a time.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import subprocess
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.programs import missing, program

HERE = Path(__file__).parent


def node(package: str) -> str:
    """The path of Node, where it and an npm package are there; otherwise a skip, or a failure."""
    path = program("node")
    if not (HERE / "node_modules" / package / "package.json").exists():
        missing("node", f"{package} is not installed: run `npm ci` in tests/e2e")
    return path


# The clients


class NodeClient:
    """A connection of the `ws` package, or of engine.io-client."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def event(self, kind: str) -> dict[str, Any]:
        """The next event, which has to be of this kind."""
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), 15)
        event: dict[str, Any] = json.loads(line) if line else {"event": "the process has ended"}
        assert event.pop("event") == kind, event
        return event

    def command(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")

    async def send(self, message: str | bytes) -> None:
        self.command(**({"text": message} if isinstance(message, str) else {"binary": message.hex()}))

    async def receive(self) -> str | bytes:
        event = await self.event("message")
        return bytes.fromhex(event["binary"]) if "binary" in event else str(event["text"])


@contextlib.asynccontextmanager
async def node_client(
    url: str, *, protocols: Iterable[str] = (), headers: Mapping[str, str] | None = None, **options: Any
) -> AsyncIterator[NodeClient]:
    """`new WebSocket(url, protocols, options)` of the `ws` package, in a process that ends with the block."""
    arguments = {"url": url, "protocols": list(protocols), "options": {"headers": dict(headers or {}), **options}}
    async with _node_process("ws", "client.mjs", arguments) as client:
        yield client


@contextlib.asynccontextmanager
async def engine_client(url: str, path: str, *, again: bool = False, **options: Any) -> AsyncIterator[NodeClient]:
    """`new Socket(url, {path, ...options})` of engine.io-client. With `again` it is opened anew when it was closed."""
    arguments = {"url": url, "options": {"path": path, **options}, "again": again}
    async with _node_process("engine.io-client", "engine.mjs", arguments) as client:
        yield client


@contextlib.asynccontextmanager
async def everyone(host: str) -> AsyncIterator[NodeClient]:
    """The clients of examples/everyone_together.html, all in one process."""
    for package in ("centrifuge", "engine.io-client", "socket.io-client"):
        node(package)
    async with _node_process("ws", "everyone.mjs", {"host": host}) as clients:
        yield clients


@contextlib.asynccontextmanager
async def _node_process(package: str, script: str, arguments: Any) -> AsyncIterator[NodeClient]:
    process = await asyncio.create_subprocess_exec(
        *(node(package), str(HERE / script), json.dumps(arguments)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        limit=16 * 1024 * 1024,
    )
    try:
        yield NodeClient(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await asyncio.wait_for(process.wait(), 10)


# The browser


class Browser:
    """Chromium, headless; each page has a fresh profile of its own. One of them serves all tests."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._answers: dict[int, concurrent.futures.Future[Any]] = {}
        self._ended = False
        self._reader = threading.Thread(target=self._read, name="browser")
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            future = self._answers.pop(answer["id"])
            if "error" in answer:
                future.set_exception(AssertionError(answer["error"]))
            else:
                future.set_result(answer.get("result"))
        self._ended = True
        for future in self._answers.values():
            future.set_exception(AssertionError("the browser has ended"))

    async def call(self, method: str, *args: Any, page: int | None = None) -> Any:
        """Call a method of Playwright's, and wait for its result."""
        assert not self._ended, "the browser has ended"
        assert self._process.stdin is not None
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        request_id = id(future)
        self._answers[request_id] = future
        request = {"id": request_id, "method": method, "args": args} | ({} if page is None else {"page": page})
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return await asyncio.wait_for(asyncio.wrap_future(future), 20)

    @contextlib.asynccontextmanager
    async def page(self, url: str, **options: Any) -> AsyncIterator["Page"]:
        """A page in a fresh profile. Scripts that fail in it fail the test."""
        page = Page(self, await self.call("newPage", options))
        try:
            await page.goto(url)
            yield page
            assert await page.problems() == []
        finally:
            await page.close()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(15)
        assert self._process.stdout is not None
        self._process.stdout.close()


class Page:
    """A page of the browser, with the methods of Playwright's `Page` that `browser.mjs` passes on."""

    def __init__(self, browser: Browser, number: int) -> None:
        self._browser = browser
        self._number = number

    def __getattr__(self, method: str) -> Any:
        async def call(*args: Any) -> Any:
            return await self._browser.call(method, *args, page=self._number)

        return call

    async def until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true, which is looked at with every frame."""
        await self.waitForFunction(expression)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    command = [node("playwright-core"), str(HERE / "browser.mjs"), program("chromium")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with contextlib.closing(Browser(process)) as browser:
        yield browser
