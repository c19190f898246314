"""What the transports over HTTP have in common: answers, CORS, bodies with a bound, and the end of the server."""

import asyncio
import contextlib
import logging
import typing
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.types import Receive, Scope, Send

from asgi_ws.links import Link
from asgi_ws.messages import Position
from asgi_ws.origins import OriginPolicy
from asgi_ws.protocols import Protocol
from asgi_ws.uvicorn import is_stopping

__all__ = [
    "BodyTooLarge",
    "ClientGone",
    "HttpSession",
    "Stoppable",
    "Stopper",
    "answer_preflight",
    "answer_with",
    "header",
    "is_preflight",
    "may_read",
    "read_body",
    "response_headers",
    "send_body",
    "websocket_scope",
    "while_connected",
]

logger = logging.getLogger("asgi_ws")

Headers = list[tuple[bytes, bytes]]

_BODY_TIME = 10.0
"""How many seconds a request's body may take."""
_CHUNK = 64 * 1024
"""How many bytes of a response are handed to the server at once."""
_LOOK = 0.25
"""How often, in seconds, a server is asked whether it stops: it tells WebSockets, and nobody else."""
_TOKEN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'*+-.^_`|~, ")


class BodyTooLarge(Exception):
    """A request's body has more bytes than it may."""


class ClientGone(Exception):
    """The client has left before its request was answered."""


# Requests


def header(scope: Scope, name: bytes) -> str:
    """A header's value, or nothing."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def may_read(scope: Scope, origins: OriginPolicy) -> bool:
    """Whether the page that a request comes from may connect. Other than a handshake, a request from a page of
    another origin may come without `Origin`, as that of an image does."""
    if not origins.allows(scope):
        return False
    foreign = header(scope, b"sec-fetch-site") in ("cross-site", "same-site")
    return not foreign or origins.any or bool(header(scope, b"origin"))


async def read_body(receive: Receive, most: int | None) -> bytes:
    """A request's body. Raises `BodyTooLarge` as soon as it is, `ClientGone`, and `TimeoutError` for one that takes
    too long."""
    body = bytearray()
    async with asyncio.timeout(_BODY_TIME):
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientGone
            body += message.get("body", b"")
            if most is not None and len(body) > most:
                raise BodyTooLarge
            if not message.get("more_body", False):
                return bytes(body)


@contextlib.asynccontextmanager
async def while_connected(receive: Receive, gone: Callable[[], None]) -> AsyncIterator[None]:
    """Call `gone` when the client of a request leaves in the block."""

    async def watch() -> None:
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        except Exception:
            logger.debug("receiving failed", exc_info=True)
        gone()

    watcher = asyncio.create_task(watch(), name="asgi_ws request")
    try:
        yield
    finally:
        watcher.cancel()
        await asyncio.wait([watcher])


def websocket_scope(scope: Scope, session: "HttpSession", link: Link, *, denial: bool = True) -> Scope:
    """The scope of the websocket that a request imitates. `denial` says whether it can be refused with a response."""
    extensions: dict[str, Any] = {"asgi_ws.link": {"link": link}}
    if denial:
        extensions["websocket.http.response"] = {}
    inner = {
        "subprotocols": [],
        **scope,
        "type": "websocket",
        "scheme": {"http": "ws", "https": "wss"}.get(scope.get("scheme", "ws"), scope.get("scheme", "ws")),
        "extensions": extensions,
        "asgi_ws.session": session,
    }
    # The connection makes its own.
    inner.pop("asgi_ws", None)
    inner.pop("method", None)
    return inner


# Answers


def _nobody(_: int) -> None:
    """Nobody wants to know."""


def response_headers(scope: Scope, origins: OriginPolicy, content_type: bytes) -> Headers:
    """The headers of every answer: nothing is stored, nothing is guessed, and a page of another origin may read it
    where it may connect."""
    headers: Headers = [
        (b"content-type", content_type),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
        (b"vary", b"Origin"),
    ]
    return headers + _cors(scope, origins)


def _cors(scope: Scope, origins: OriginPolicy) -> Headers:
    origin = header(scope, b"origin")
    if not origin or not origins.allows(scope):
        return []
    return [(b"access-control-allow-origin", origin.encode("latin-1")), (b"access-control-allow-credentials", b"true")]


async def answer_with(
    send: Send, status: int, headers: Headers, body: bytes, sending: Callable[[int], None] = _nobody
) -> None:
    """Send a whole response; `sending` is told how much of it is left whenever the server takes more."""
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send_body(send, body, False, sending)


async def send_body(send: Send, body: bytes, more_body: bool, sending: Callable[[int], None] = _nobody) -> None:
    """Send a part of a response in pieces, so that the server says when the client doesn't take them."""
    for start in range(0, max(len(body), 1), _CHUNK):
        end = start + _CHUNK
        sending(len(body) - start)
        piece = body[start:end]
        await send({"type": "http.response.body", "body": piece, "more_body": more_body or end < len(body)})


def is_preflight(scope: Scope) -> bool:
    """Whether a browser asks if a page of another origin may send a request."""
    return (
        scope["type"] == "http"
        and scope["method"] == "OPTIONS"
        and bool(header(scope, b"origin") and header(scope, b"access-control-request-method"))
    )


async def answer_preflight(scope: Scope, send: Send, origins: OriginPolicy, methods: bytes) -> None:
    """Say yes to the origins that may connect, whatever headers they send."""
    headers = response_headers(scope, origins, b"text/plain; charset=utf-8")
    if not origins.allows(scope):
        await answer_with(send, 403, headers, b"this origin isn't allowed\n")
        return
    headers += [(b"access-control-allow-methods", methods), (b"access-control-max-age", b"600")]
    wanted = header(scope, b"access-control-request-headers").encode("latin-1")
    if wanted and _TOKEN.issuperset(wanted):
        headers.append((b"access-control-allow-headers", wanted))
    await send({"type": "http.response.start", "status": 204, "headers": headers[1:]})
    await send({"type": "http.response.body"})


# What a connection asks


class HttpSession(typing.Protocol):
    """A conversation over HTTP that imitates a websocket, as the connection knows it from its scope."""

    @property
    def transport(self) -> str:
        """The way by which the client comes at the moment."""
        ...

    def adapt(self, protocol: Protocol[Any]) -> Protocol[Any]:
        """What the connection encodes with in the place of its own protocol."""
        ...

    def take_since(self, channel: str) -> Position | None:
        """The position up to which the client has said that it has everything, once."""
        ...

    def end(self, channel: str) -> None:
        """The client isn't subscribed any more."""
        ...


# The end of the server


class Stoppable(typing.Protocol):
    """What is to be told that the server stops."""

    def server_stopping(self) -> None:
        """Send what waits, and end."""
        ...


class Stopper:
    """Tells what is open when the server stops.

    uvicorn waits for requests that aren't answered, and tells nobody: so while there are some, it is asked.
    """

    def __init__(self) -> None:
        self._open: set[Stoppable] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, stoppable: Stoppable) -> None:
        """From now on, until `discard`."""
        self._open.add(stoppable)
        if self._timer is None:
            self._look_later()

    def discard(self, stoppable: Stoppable) -> None:
        """The end of that."""
        self._open.discard(stoppable)

    def stop(self) -> None:
        """Tell them all."""
        for stoppable in list(self._open):
            stoppable.server_stopping()

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_LOOK, self._look)

    def _look(self) -> None:
        self._timer = None
        if is_stopping():
            self.stop()
        elif self._open:
            self._look_later()
