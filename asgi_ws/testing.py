"""A client for tests: in the test's own event loop, without a port or a thread, and with a limit on every wait.

Where it speaks HTTP, names are those of httpx.
"""

import asyncio
import contextlib
import json as jsonlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Scope

from asgi_ws.exceptions import AsgiWsError, ConnectionClosed
from asgi_ws.payloads import encode, to_json

__all__ = ["Client", "Refused", "Response", "connect", "request", "stream"]

RequestHeaders = Mapping[str, str] | Iterable[tuple[str, str]]

_BUFFER = 16
"""How many messages are on their way to the client, or from it, before the sender has to wait."""


class Response:
    """What a request was answered with."""

    def __init__(self, status_code: int, headers: Headers, body: AsyncIterator[bytes]) -> None:
        self.status_code = status_code
        self.headers = headers
        self._body = body
        self._content: bytes | None = None

    async def aiter_bytes(self) -> AsyncIterator[bytes]:
        """The body piece by piece, as the application sends it."""
        async for chunk in self._body:
            yield chunk

    async def aread(self) -> bytes:
        """The whole body; waits for its end."""
        if self._content is None:
            self._content = b"".join([chunk async for chunk in self._body])
        return self._content

    @property
    def content(self) -> bytes:
        """The body. Raises `RuntimeError` before `aread` has read it."""
        if self._content is None:
            raise RuntimeError("the body hasn't been read yet: `await response.aread()`")
        return self._content

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")

    def json(self) -> Any:
        return jsonlib.loads(self.content)


class Refused(AsgiWsError):
    """The handshake was refused with an HTTP response; a refusal without one is status 403, as servers answer it."""

    def __init__(self, response: Response) -> None:
        super().__init__(response)
        self.response = response

    @property
    def status_code(self) -> int:
        return self.response.status_code

    @property
    def headers(self) -> Headers:
        return self.response.headers

    @property
    def text(self) -> str:
        return self.response.text

    def json(self) -> Any:
        return self.response.json()

    def __str__(self) -> str:
        return f"refused with status {self.status_code}: {self.text}"


class Client:
    """The client's end of a connection. What it doesn't receive waits, and soon the application with it."""

    def __init__(self, running: "_Running") -> None:
        self.path = running.path
        self.subprotocol: str | None = None
        """What the server chose."""
        self.headers = Headers()
        """Those of the response to the handshake."""
        self._running = running
        self._closed: ConnectionClosed | None = None

    async def send(self, data: Any) -> None:
        """Send text (`str`), a binary message (`bytes`), or anything else as JSON.

        Raises `ConnectionClosed`, and `TimeoutError` while the application reads nothing.
        """
        if self._closed is not None:
            raise self._closed.again()
        payload = encode(data)
        key = "bytes" if payload.kind == "binary" else "text"
        if not await self._running.send({"type": "websocket.receive", key: payload.data}):
            # The application has ended; what it said last is still to be received.
            while True:
                await self.receive()

    async def receive(self) -> str | bytes:
        """The next message. Raises `ConnectionClosed` when the server closes, and `TimeoutError` when nothing comes."""
        if self._closed is not None:
            raise self._closed.again()
        message = await self._running.next(f"a message from {self.path}")
        if message is None:
            # The application has returned without a word.
            self._closed = ConnectionClosed(1006, clean=False)
        elif message["type"] == "websocket.close":
            self._closed = ConnectionClosed(message.get("code", 1000), message.get("reason") or "")
        else:
            data: str | bytes = message["bytes"] if message.get("text") is None else message["text"]
            return data
        raise self._closed.again()

    async def receive_json(self) -> Any:
        """The next message, read as JSON."""
        return jsonlib.loads(await self.receive())

    def __aiter__(self) -> "Client":
        """Iterate over messages until the server closes."""
        return self

    async def __anext__(self) -> str | bytes:
        try:
            return await self.receive()
        except ConnectionClosed:
            raise StopAsyncIteration from None

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Leave, with a close frame."""
        await self._leave({"type": "websocket.disconnect", "code": code, "reason": reason})

    async def vanish(self) -> None:
        """Leave without a close frame, as a lost network does."""
        await self._leave({"type": "websocket.disconnect", "code": 1006})

    async def _leave(self, message: Message) -> None:
        if self._closed is None:
            self._closed = ConnectionClosed(message["code"], message.get("reason", ""), message["code"] != 1006)
        self._running.from_app.close()
        await self._running.send(message)
        self._running.to_app.close()


@contextlib.asynccontextmanager
async def connect(
    app: ASGIApp,
    path: str,
    *,
    headers: RequestHeaders | None = None,
    subprotocols: Iterable[str] = (),
    timeout: float = 2,
    lifespan: bool = True,
) -> AsyncIterator[Client]:
    """A WebSocket connection to an application: `async with connect(app, "/chat/lobby") as client`.

    The application's lifespan is run around the first of several connections and requests, unless `lifespan` is
    `False`. No wait takes longer than `timeout` seconds. On leaving, the client closes with 1000 and the application
    is waited for; what it raises is raised here.

    Raises `Refused` when the handshake is, and `TimeoutError` that says what was waited for.
    """
    subprotocols = list(subprotocols)
    own = [("connection", "upgrade"), ("upgrade", "websocket"), ("sec-websocket-version", "13")]
    if subprotocols:
        own.append(("sec-websocket-protocol", ", ".join(subprotocols)))
    async with _application(app, lifespan) as state:
        scope = _scope("websocket", path, [*own, *_pairs(headers)], state)
        scope.update(subprotocols=subprotocols, extensions={"websocket.http.response": {}})
        async with _run(app, scope, path, timeout, [{"type": "websocket.connect"}]) as running:
            client = Client(running)
            message = await running.next(f"{path} to answer the handshake")
            if message is None or message["type"] != "websocket.accept":
                raise Refused(await _refusal(message, running))
            client.subprotocol = message.get("subprotocol")
            client.headers = Headers(raw=list(message.get("headers", [])))
            try:
                yield client
            finally:
                await client.close()


@contextlib.asynccontextmanager
async def stream(
    app: ASGIApp,
    method: str,
    path: str,
    *,
    headers: RequestHeaders | None = None,
    content: bytes | str = b"",
    json: Any = None,
    timeout: float = 2,
    lifespan: bool = True,
) -> AsyncIterator[Response]:
    """An HTTP request whose response is read while the application sends it; leaving the block disconnects.

    Raises `TimeoutError` when nothing comes for `timeout` seconds, and what the application raises.
    """
    body = content.encode() if isinstance(content, str) else content
    own = [("accept", "*/*")]
    if json is not None:
        body = to_json(json).encode()
        own.append(("content-type", "application/json"))
    own.append(("content-length", str(len(body))))
    async with _application(app, lifespan) as state:
        scope = _scope("http", path, [*own, *_pairs(headers)], state)
        scope["method"] = method.upper()
        request = {"type": "http.request", "body": body, "more_body": False}
        async with _run(app, scope, path, timeout, [request]) as running:
            start = await running.next(f"an answer from {path}")
            if start is None:
                raise AssertionError(f"{path} ended without an answer")
            body_chunks = _body(running)
            try:
                yield Response(start["status"], Headers(raw=list(start.get("headers", []))), body_chunks)
            finally:
                await body_chunks.aclose()
                running.from_app.close()
                running.to_app.close()


async def request(
    app: ASGIApp,
    method: str,
    path: str,
    *,
    headers: RequestHeaders | None = None,
    content: bytes | str = b"",
    json: Any = None,
    timeout: float = 2,
    lifespan: bool = True,
) -> Response:
    """An HTTP request with its whole response."""
    async with stream(
        app, method, path, headers=headers, content=content, json=json, timeout=timeout, lifespan=lifespan
    ) as response:
        await response.aread()
        return response


def _scope(kind: str, path: str, headers: list[tuple[str, str]], state: dict[str, Any]) -> Scope:
    url = urlsplit(path)
    names = {name.lower() for name, _ in headers}
    host = [] if "host" in names else [("host", "testserver")]
    return {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "ws" if kind == "websocket" else "http",
        "path": unquote(url.path),
        "raw_path": url.path.encode(),
        "query_string": url.query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in host + headers],
        "client": ("testclient", 50000),
        "server": ("testserver", 80),
        "state": state.copy(),
    }


def _pairs(headers: RequestHeaders | None) -> list[tuple[str, str]]:
    return list(headers.items() if isinstance(headers, Mapping) else headers or ())


class _Running:
    """An application that serves one request, and the two streams to talk with it."""

    def __init__(
        self,
        task: "asyncio.Task[None]",
        to_app: MemoryObjectSendStream[Message],
        from_app: MemoryObjectReceiveStream[Message],
        path: str,
        timeout: float,
    ) -> None:
        self.task = task
        self.to_app = to_app
        self.from_app = from_app
        self.path = path
        self.timeout = timeout

    async def next(self, what: str) -> Message | None:
        """The application's next message; `None` when it has returned. What it raised is raised here."""
        with self._limit(what):
            try:
                return await self.from_app.receive()
            except anyio.EndOfStream:
                await asyncio.wait([self.task])
        self.task.result()
        return None

    async def send(self, message: Message) -> bool:
        """Whether the application is still there to take it."""
        with self._limit(f"{self.path} to read what was sent"):
            try:
                await self.to_app.send(message)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                return False
        return True

    @contextlib.contextmanager
    def _limit(self, what: str) -> Iterator[None]:
        try:
            with anyio.fail_after(self.timeout):
                yield
        except TimeoutError:
            raise TimeoutError(f"waited {self.timeout} s for {what}") from None


@contextlib.asynccontextmanager
async def _run(
    app: ASGIApp, scope: Scope, path: str, timeout: float, unheard: list[Message]
) -> AsyncIterator[_Running]:
    """Run the application in a task of its own, and wait for its end."""
    to_app, app_receives = anyio.create_memory_object_stream[Message](_BUFFER)
    app_sends, from_app = anyio.create_memory_object_stream[Message](_BUFFER)
    gone = "websocket.disconnect" if scope["type"] == "websocket" else "http.disconnect"

    async def receive() -> Message:
        if unheard:
            return unheard.pop()
        try:
            return await app_receives.receive()
        except anyio.EndOfStream:
            return {"type": gone, "code": 1006}

    async def send(message: Message) -> None:
        try:
            await app_sends.send(message)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise OSError("the client is gone") from error

    async def run() -> None:
        with app_receives, app_sends:
            await app(scope, receive, send)

    task = asyncio.create_task(run(), name=f"application {path}")
    left_well = False
    try:
        with to_app, from_app:
            yield _Running(task, to_app, from_app, path, timeout)
        left_well = True
    finally:
        await asyncio.wait([task], timeout=timeout)
        hung = not task.done()
        task.cancel()
        await asyncio.wait([task])
        error = None if task.cancelled() else task.exception()
        # An error of the test's own is what its author wants to see; without one, the application's.
        if left_well and error is not None:
            raise error
        if left_well and hung:
            raise TimeoutError(f"{path} did not end within {timeout} s after its client left")


async def _body(running: _Running) -> AsyncGenerator[bytes, None]:
    more = True
    while more:
        message = await running.next(f"more of the response of {running.path}")
        if message is None:
            raise AssertionError(f"{running.path} ended in the middle of its response")
        more = message.get("more_body", False)
        if message.get("body"):
            yield message["body"]


async def _refusal(message: Message | None, running: _Running) -> Response:
    if message is None:
        response = Response(500, Headers(), _nothing())
    elif message["type"] == "websocket.http.response.start":
        response = Response(message["status"], Headers(raw=list(message.get("headers", []))), _body(running))
    else:
        response = Response(403, Headers(), _nothing())
    await response.aread()
    return response


async def _nothing() -> AsyncIterator[bytes]:
    yield b""


# Lifespan


class _Lifespan:
    """The lifespan of one application, kept while somebody is connected to it."""

    def __init__(self) -> None:
        self.users = 0
        self.started = False
        self.state: dict[str, Any] = {}
        self.lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._answered = asyncio.Event()
        self._failure: str | None = None

    async def start(self, app: ASGIApp) -> None:
        self._task = asyncio.create_task(self._run(app), name="lifespan")
        answered = asyncio.create_task(self._answered.wait())
        await asyncio.wait([answered, self._task], return_when=asyncio.FIRST_COMPLETED)
        answered.cancel()
        if self._failure is not None:
            raise RuntimeError(f"the application did not start: {self._failure}")
        self.started = True

    async def stop(self) -> None:
        self._stop.set()
        await cast("asyncio.Task[None]", self._task)
        if self._failure is not None and self.started:
            raise RuntimeError(f"the application did not stop well: {self._failure}")

    async def _run(self, app: ASGIApp) -> None:
        unheard = [{"type": "lifespan.startup"}]
        spoke = False

        async def receive() -> Message:
            if unheard:
                return unheard.pop()
            await self._stop.wait()
            return {"type": "lifespan.shutdown"}

        async def send(message: Message) -> None:
            nonlocal spoke
            spoke = True
            if message["type"].endswith(".failed"):
                self._failure = message.get("message", "no reason given")
            self._answered.set()

        try:
            await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": self.state}, receive, send)
        except Exception:
            # An application without a lifespan raises at once, and servers go on without it. What one raises behind
            # a failure that it has told is the same failure.
            if spoke and self._failure is None:
                raise


_lifespans: dict[tuple[int, asyncio.AbstractEventLoop], _Lifespan] = {}


@contextlib.asynccontextmanager
async def _application(app: ASGIApp, lifespan: bool) -> AsyncIterator[dict[str, Any]]:
    if not lifespan:
        yield {}
        return
    key = (id(app), asyncio.get_running_loop())
    life = _lifespans.setdefault(key, _Lifespan())
    life.users += 1
    try:
        # Under a lock: whoever comes second waits until the first has started it.
        async with life.lock:
            if not life.started:
                await life.start(app)
        yield life.state
    finally:
        life.users -= 1
        if not life.users:
            del _lifespans[key]
            await life.stop()
