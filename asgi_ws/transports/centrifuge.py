"""The Centrifuge protocol where WebSocket can't pass: the server talks in a response that doesn't end, as lines
(`http_stream`) or as server-sent events (`sse`), and the client in requests of its own (`emulation`).

The first command comes with the request for the stream; what follows names the session, a secret that the answer to
it has told. To the application it is one ordinary `websocket`.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import parse_qsl

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_ws.exceptions import ConnectionClosed
from asgi_ws.links import AsgiLink, Receiver
from asgi_ws.messages import Position
from asgi_ws.origins import OriginPolicy, user_id
from asgi_ws.protocols import Protocol, disconnect_push
from asgi_ws.transports.base import (
    BodyTooLarge,
    ClientGone,
    Headers,
    Stopper,
    answer_preflight,
    answer_with,
    header,
    is_preflight,
    may_read,
    read_body,
    response_headers,
    send_body,
    websocket_scope,
    while_connected,
)
from asgi_ws.transports.relay import OwnerGone, Relay
from asgi_ws.uvicorn import cut_off

__all__ = ["KINDS", "CentrifugeTransport", "StreamLink"]

Kind = Literal["http_stream", "sse", "emulation"]
KINDS: tuple[Kind, ...] = ("http_stream", "sse", "emulation")
"""The ends of the paths that are served besides that of the WebSocket."""

_TEXT = b"text/plain; charset=utf-8"
_ROOM_TIME = 10.0
"""How many seconds a request waits until the connection takes more."""
_MOST_WAITING = 32
"""How many requests of one client may wait for that."""
_METHODS = {"http_stream": b"POST, OPTIONS", "sse": b"GET, OPTIONS", "emulation": b"POST, OPTIONS"}


class _Emulated(msgspec.Struct):
    """What a request of a client's says: one frame, for the session."""

    session: str
    data: str


_read_emulated = msgspec.json.Decoder(_Emulated).decode


class StreamLink(AsgiLink):
    """The way to one client, and what it sends by other requests; what its connection's session is, too."""

    __slots__ = ("_cut", "_first", "_room", "_waiting_requests", "receiver", "secret", "transport")

    def __init__(self, send: Send, cut: Callable[[], None], transport: str, secret: str, first: str) -> None:
        super().__init__(send)
        self.transport = transport
        """The way by which the client comes."""
        self.secret = secret
        """Whoever knows it speaks for the client."""
        self.receiver: Receiver | None = None
        self._cut = cut
        self._first = first
        self._room: asyncio.Event | None = None
        self._waiting_requests = 0

    # What a connection asks its session

    def adapt(self, protocol: Protocol[Any]) -> Protocol[Any]:
        """The protocol that the connection encodes with: the same as everywhere."""
        return protocol

    def take_since(self, channel: str) -> None:
        """Positions come with commands."""

    def begin(self, channel: str, position: Position) -> None:
        """Positions go with replies."""

    def end(self, channel: str) -> None:
        """The client is told in other words."""

    # What comes in

    def listen(self, receiver: Receiver, max_size: int | None) -> None:
        self.receiver = receiver
        receiver.message_received(self._first)

    def pause_reading(self) -> None:
        self._room = asyncio.Event()

    def resume_reading(self) -> None:
        if self._room is not None:
            self._room.set()
            self._room = None

    async def deliver(self, frame: str) -> bool:
        """Hand in a frame of the client's. False when the connection takes no more for too long."""
        if self._room is not None:
            if self._waiting_requests >= _MOST_WAITING:
                return False
            self._waiting_requests += 1
            try:
                async with asyncio.timeout(_ROOM_TIME):
                    while self._room is not None:
                        await self._room.wait()
            except TimeoutError:
                return False
            finally:
                self._waiting_requests -= 1
        if self.receiver is not None:
            self.receiver.message_received(frame)
        return True

    def abort(self) -> None:
        super().abort()
        self._cut()


class CentrifugeTransport:
    """Serves `app`, which takes websockets, to clients that can't have one. `origins` says which pages may connect;
    `max_size` is how many bytes a request may have; `relay` is asked for what carries requests to other processes."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        origins: OriginPolicy,
        max_size: int | None,
        relay: Callable[[], Relay | None] = lambda: None,
    ) -> None:
        self.app = app
        self.origins = origins
        self.max_size = max_size
        self._relay = relay
        self._sessions: dict[str, _Stream] = {}
        self._stopper = Stopper()

    def opened(self, stream: "_Stream") -> None:
        """A stream has begun. Called by it."""
        secret, relay = stream.link.secret, self._relay()
        self._sessions[secret] = stream
        if relay is not None:
            relay.own(secret, self._emulation)
        self._stopper.add(stream)

    def closed(self, stream: "_Stream") -> None:
        """The end of that."""
        secret, relay = stream.link.secret, self._relay()
        self._sessions.pop(secret, None)
        if relay is not None:
            relay.disown(secret)
        self._stopper.discard(stream)

    def new_secret(self) -> str:
        """What names a session, and nobody else's; where there are several processes it says which has it."""
        relay = self._relay()
        return secrets.token_urlsafe(24) if relay is None else relay.new_id()

    async def _emulation(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request that reached another process."""
        await self(scope, receive, send, "emulation")

    def stop(self) -> None:
        """End all streams, as when the server stops."""
        self._stopper.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send, kind: Kind) -> None:
        """Answer a request; its path is that of the endpoint, whatever `kind` it had at its end."""
        headers = response_headers(scope, self.origins, _TEXT)
        if is_preflight(scope):
            await answer_preflight(scope, send, self.origins, _METHODS[kind])
        elif scope["method"] != ("GET" if kind == "sse" else "POST"):
            await answer_with(send, 405, [*headers, (b"allow", _METHODS[kind])], b"another method is needed\n")
        elif not may_read(scope, self.origins):
            await answer_with(send, 403, headers, b"this origin isn't allowed\n")
        elif header(scope, b"content-type").startswith("application/octet-stream"):
            await answer_with(send, 415, headers, b"this server speaks JSON, not Protobuf\n")
        else:
            try:
                body = _connect_command(scope) if kind == "sse" else (await read_body(receive, self.max_size)).decode()
                if kind == "emulation":
                    await self._take(scope, _with_body(body, receive), send, headers, _read_emulated(body))
                elif body.strip():
                    await self._stream(scope, receive, send, kind, body)
                else:
                    await answer_with(send, 400, headers, b"there is no command\n")
            except BodyTooLarge:
                await answer_with(send, 413, headers, f"a request can have {self.max_size} bytes\n".encode())
            except (UnicodeError, msgspec.MsgspecError, TimeoutError):
                await answer_with(send, 400, headers, b"the request can't be read\n")
            except ClientGone:
                # Nobody is there to be answered.
                pass

    async def _take(self, scope: Scope, receive: Receive, send: Send, headers: Headers, said: _Emulated) -> None:
        stream, relay = self._sessions.get(said.session), self._relay()
        if stream is None and relay is not None and relay.is_elsewhere(said.session, scope):
            try:
                await relay.carry(said.session, scope, receive, send)
            except OwnerGone:
                await answer_with(send, 404, headers, b"there is no such session\n")
        elif stream is None or not stream.belongs_to(scope):
            await answer_with(send, 404, headers, b"there is no such session\n")
        elif not await stream.link.deliver(said.data):
            await answer_with(send, 503, headers, b"too much waits\n")
        else:
            await send({"type": "http.response.start", "status": 204, "headers": headers[1:]})
            await send({"type": "http.response.body"})

    async def _stream(self, scope: Scope, receive: Receive, send: Send, kind: Kind, command: str) -> None:
        stream = _Stream(self, scope, send, kind, command)
        inner = websocket_scope(scope, stream.link, stream.link)
        # The command has the client's token, and belongs to nobody else.
        inner["query_string"] = b""
        async with while_connected(receive, stream.gone):
            try:
                await self.app(inner, stream.receive, stream.send)
            finally:
                self.closed(stream)
            # A client that has left meanwhile needs no answer.
            with contextlib.suppress(OSError):
                await stream.finish()


def _with_body(body: str, receive: Receive) -> Receive:
    """A request's `receive` before its body was read."""
    unheard = [{"type": "http.request", "body": body.encode(), "more_body": False}]

    async def again() -> Message:
        return unheard.pop() if unheard else await receive()

    return again


def _connect_command(scope: Scope) -> str:
    try:
        fields = parse_qsl(scope.get("query_string", b"").decode("ascii"), max_num_fields=20, errors="strict")
    except ValueError:
        return ""
    return next((value for name, value in fields if name == "cf_connect"), "")


class _Stream:
    """A response that doesn't end, and the `receive` and `send` of the websocket that it imitates."""

    def __init__(self, transport: CentrifugeTransport, scope: Scope, send: Send, kind: Kind, command: str) -> None:
        self.link = StreamLink(self._write, lambda: cut_off(send), kind, transport.new_secret(), command)
        self._transport = transport
        self._scope = scope
        self._send = send
        self._events = kind == "sse"
        self._state = "connecting"
        self._connected = False
        self._ended = asyncio.Event()

    def belongs_to(self, scope: Scope) -> bool:
        """Whether a request comes from the same page and the same user as the stream's. A request for a stream may
        have no origin where the others have one."""
        origin = header(self._scope, b"origin")
        return (not origin or header(scope, b"origin") == origin) and user_id(scope) == user_id(self._scope)

    # What the application is given

    async def receive(self) -> Message:
        if not self._connected:
            self._connected = True
            return {"type": "websocket.connect"}
        await self._ended.wait()
        return {"type": "websocket.disconnect", "code": 1006}

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if self._ended.is_set():
            raise OSError("the client is gone")
        if kind == "websocket.accept":
            await self._accept(message)
        elif kind == "websocket.close":
            await self._deny(403, ())
            await self._send({"type": "http.response.body"})
        elif kind == "websocket.http.response.start":
            await self._deny(message["status"], message.get("headers", ()))
        else:
            await self._send({**message, "type": "http.response.body"})

    async def _accept(self, message: Message) -> None:
        content_type = b"text/event-stream; charset=utf-8" if self._events else b"application/json"
        headers = response_headers(self._scope, self._transport.origins, content_type)
        # Neither kept back nor compressed by a proxy on the way.
        headers[1] = (b"cache-control", b"no-store, no-transform")
        headers.append((b"x-accel-buffering", b"no"))
        self._state = "open"
        await self._start(200, headers, message.get("headers", ()))
        if self._events:
            await self._send({"type": "http.response.body", "body": b":\n\n", "more_body": True})
        self._transport.opened(self)

    async def _deny(self, status: int, more: Any) -> None:
        self._state = "closed"
        content_type = dict(more).get(b"content-type", _TEXT)
        await self._start(status, response_headers(self._scope, self._transport.origins, content_type), more)

    async def _start(self, status: int, own: Headers, more: Any) -> None:
        names = {name for name, _ in own}
        headers = [*own, *((name, value) for name, value in more if name.lower() not in names)]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _write(self, message: Message) -> None:
        """What the link writes: a message of the protocol, or the end."""
        ends = message["type"] == "websocket.close"
        text = disconnect_push(message["code"], message["reason"]) if ends else message["text"]
        if ends:
            self._state = "closed"
            self._transport.closed(self)
        await send_body(self._send, (f"data: {text}\n\n" if self._events else text + "\n").encode(), not ends)

    # What happens meanwhile

    def gone(self) -> None:
        """The client has left."""
        self._ended.set()
        if self.link.receiver is not None:
            self.link.receiver.connection_lost(ConnectionClosed(1006, clean=False))

    def server_stopping(self) -> None:
        """Send what waits, and end the stream."""
        if self.link.receiver is not None:
            self.link.receiver.server_stopping()

    async def finish(self) -> None:
        """End what the application has left without an end."""
        if self._state == "closed" or self._ended.is_set():
            return
        if self._state == "connecting":
            await self._deny(500, ())
        await self._send({"type": "http.response.body"})
