"""Server-sent events: an endpoint's output as a stream that the browser's own `EventSource` reads (WHATWG HTML,
section 9.2).

Text is an event's data; the standard has one kind of line end, so CR and CRLF arrive as LF. A binary message is an
event of the type `binary`, its data base64. Where publications have positions, `id:` says those of all channels of the
connection, as in `chat:lobby=17:abc&news=3:def`; a client that comes back with `Last-Event-ID` goes on from there. The
end is an event of the type `close`, its data `{"code": ..., "reason": ...}`: where coming back makes no sense, its id
makes the next request be answered with 204, which stops an `EventSource` for good.
"""

import asyncio
import base64
import contextlib
import json
import logging
import random
import re
from collections.abc import Callable, Mapping
from typing import Any, cast
from urllib.parse import parse_qsl, quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_ws.exceptions import ConnectionClosed, InvalidPosition
from asgi_ws.frames import Frame
from asgi_ws.links import AsgiLink, Receiver
from asgi_ws.messages import Position, Publication, Recovery
from asgi_ws.origins import OriginPolicy
from asgi_ws.protocols import Protocol
from asgi_ws.transports.base import (
    Headers,
    Stoppable,
    Stopper,
    answer_with,
    header,
    may_read,
    response_headers,
    send_body,
    websocket_scope,
    while_connected,
)
from asgi_ws.uvicorn import cut_off

__all__ = [
    "EventFrame",
    "EventLink",
    "EventProtocol",
    "EventTransport",
    "close_event",
    "event",
    "format_since",
    "parse_since",
]

logger = logging.getLogger("asgi_ws")

_LINE_END = re.compile("\r\n|\r|\n")
_CLOSED = "closed"
"""The id behind which nothing comes."""
_COME_BACK = {1001, 1006, 1011, 1012, 1013, 1014}
"""Close codes behind which a client may well try again."""
_MAX_POSITIONS = 256
_HEARTBEAT = Frame(b":\n\n")


def wants_events(scope: Scope) -> bool:
    """Whether a request is that of an `EventSource`."""
    accepted = (value for name, value in scope["headers"] if name == b"accept")
    return scope["method"] == "GET" and any(b"text/event-stream" in value.lower() for value in accepted)


# Events. No I/O.


def event(payload: str | bytes) -> bytes:
    """A payload as an event, without its id."""
    if isinstance(payload, bytes):
        return b"event: binary\ndata: " + base64.b64encode(payload) + b"\n\n"
    lines = "\ndata: ".join(_LINE_END.split(payload))
    return f"data: {lines}\n\n".encode()


def close_event(code: int, reason: str) -> bytes:
    """The last event."""
    data = json.dumps({"code": code, "reason": reason})
    if code in _COME_BACK:
        # Not all at the same moment.
        return f"retry: {random.randint(1000, 5000)}\nevent: close\ndata: {data}\n\n".encode()
    return f"id: {_CLOSED}\nevent: close\ndata: {data}\n\n".encode()


def parse_since(last_event_id: str) -> dict[str, Position]:
    """The positions, by channel, that a client has seen. Raises `InvalidPosition` for what no `id:` of ours said."""
    try:
        fields = parse_qsl(last_event_id, keep_blank_values=True, strict_parsing=True, max_num_fields=_MAX_POSITIONS)
    except ValueError:
        raise InvalidPosition(last_event_id) from None
    return {channel: Position.parse(position) for channel, position in fields}


def format_since(seen: Mapping[str, Position]) -> str:
    """The other way round."""
    return "&".join(
        f"{quote(channel, safe=':')}={quote(str(position), safe=':')}" for channel, position in seen.items()
    )


class EventFrame(Frame):
    """A publication as an event, shared by all who listen; its id depends on what else one of them listens to."""

    __slots__ = ("_alone", "channel", "position")

    def __init__(self, payload: bytes, channel: str, position: Position) -> None:
        super().__init__(payload)
        self.channel = channel
        self.position = position
        self._alone: Frame | None = None

    @property
    def alone(self) -> Frame:
        """The event for those who listen to this channel alone."""
        if self._alone is None:
            self._alone = self.behind({self.channel: self.position})
        return self._alone

    def behind(self, seen: Mapping[str, Position]) -> Frame:
        """The event, with an id that says what the client has seen when it has it."""
        return Frame(f"id: {format_since(seen)}\n".encode() + cast(bytes, self.payload))


class EventProtocol(Protocol[Any]):
    """What another protocol makes of messages and publications, as events."""

    def __init__(self, contents: Protocol[Any]) -> None:
        self._contents = contents
        self.format = "sse+" + contents.format

    def decode(self, payload: str | bytes) -> Any:
        """Nothing comes this way."""
        return self._contents.decode(payload)

    def encode(self, message: Any) -> bytes:
        return _events(self._contents.encode(message))

    def encode_publication(self, publication: Publication) -> bytes | Frame:
        payload = _events(self._contents.encode_publication(publication))
        channel, position = publication.channel, publication.position
        return payload if position is None else EventFrame(payload, channel, position)

    def encode_recovery(self, channel: str, recovery: Recovery) -> bytes | Frame | None:
        words = self._contents.encode_recovery(channel, recovery)
        payload = b"" if words is None else _events(words)
        if recovery.recovered or recovery.position is None:
            # The client knows where it is, and what it has missed says more.
            return payload or None
        # From here on it misses nothing. An id alone is no event, but the client keeps it.
        return EventFrame(payload or b"\n", channel, recovery.position)


def _events(encoded: str | bytes | Frame) -> bytes:
    if isinstance(encoded, Frame):
        return b"".join(map(event, encoded.payloads))
    return event(encoded)


# The stream


class EventLink(AsgiLink):
    """The way to one client that reads events; and what the connection's session is."""

    __slots__ = ("_cut", "_seen", "_since", "receiver")

    transport = "sse"
    """The way by which the client comes."""

    def __init__(self, send: Send, cut: Callable[[], None], since: Mapping[str, Position]) -> None:
        super().__init__(send)
        self.receiver: Receiver | None = None
        self._cut = cut
        # What the client has asked to go on from, and what it has seen of each channel.
        self._since = dict(since)
        self._seen = dict(since)

    def adapt(self, protocol: Protocol[Any]) -> EventProtocol:
        """The protocol that the connection encodes with."""
        return EventProtocol(protocol)

    def take_since(self, channel: str) -> Position | None:
        return self._since.pop(channel, None)

    def end(self, channel: str) -> None:
        self._seen.pop(channel, None)

    def write(self, frame: Frame) -> bool:
        if isinstance(frame, EventFrame):
            seen = self._seen
            seen[frame.channel] = frame.position
            frame = frame.alone if len(seen) == 1 else frame.behind(seen)
        return super().write(frame)

    def listen(self, receiver: Receiver, max_size: int | None) -> None:
        self.receiver = receiver

    def pause_reading(self) -> None:
        """Nothing comes this way."""

    def resume_reading(self) -> None:
        """Nothing comes this way."""

    def abort(self) -> None:
        super().abort()
        self._cut()


class EventTransport:
    """Serves `app`, which takes websockets, to clients that read server-sent events.

    The websocket receives nothing until its client is gone. `origins` says which pages may connect; a comment keeps
    the stream alive every `ping_interval` seconds.
    """

    def __init__(self, app: ASGIApp, *, origins: OriginPolicy, ping_interval: float = 25) -> None:
        self.app = app
        self.origins = origins
        self.ping_interval = ping_interval
        self._stopper = Stopper()

    def opened(self, stream: Stoppable) -> None:
        """A stream has begun. Called by it."""
        self._stopper.add(stream)

    def closed(self, stream: Stoppable) -> None:
        """The end of that."""
        self._stopper.discard(stream)

    def stop(self) -> None:
        """End all streams, as when the server stops."""
        self._stopper.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = response_headers(scope, self.origins, b"text/plain; charset=utf-8")
        last_event_id = header(scope, b"last-event-id")
        if not may_read(scope, self.origins):
            await answer_with(send, 403, text, b"this origin isn't allowed\n")
            return
        if last_event_id == _CLOSED:
            await send({"type": "http.response.start", "status": 204, "headers": text[1:]})
            await send({"type": "http.response.body"})
            return
        try:
            since = parse_since(last_event_id) if last_event_id else {}
        except InvalidPosition as error:
            await answer_with(send, 400, text, f"Last-Event-ID: {error}\n".encode())
            return
        stream = _Stream(self, scope, send, since)
        async with while_connected(receive, stream.gone):
            try:
                await self.app(websocket_scope(scope, stream.link, stream.link), stream.receive, stream.send)
            finally:
                stream.leave()
            # A client that has left meanwhile needs no answer.
            with contextlib.suppress(OSError):
                await stream.finish()


class _Stream:
    """A response that is a stream of events, and the `receive` and `send` of the websocket that it imitates."""

    def __init__(self, transport: EventTransport, scope: Scope, send: Send, since: Mapping[str, Position]) -> None:
        self.link = EventLink(self._write, lambda: cut_off(send), since)
        self._transport = transport
        self._scope = scope
        self._send = send
        self._state = "connecting"
        self._connected = False
        self._ended = asyncio.Event()
        self._closed = ConnectionClosed(1006, clean=False)
        self._timer: asyncio.TimerHandle | None = None

    # What the application is given

    async def receive(self) -> Message:
        if not self._connected:
            self._connected = True
            return {"type": "websocket.connect"}
        await self._ended.wait()
        return {"type": "websocket.disconnect", "code": self._closed.code, "reason": self._closed.reason}

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if self._ended.is_set():
            raise OSError("the client is gone")
        if kind == "websocket.accept":
            await self._accept(message)
        elif kind == "websocket.send":
            text = message.get("text")
            await self._write({"type": kind, "bytes": event(message["bytes"] if text is None else text)})
        elif kind == "websocket.close" and self._state == "connecting":
            await self._deny({"status": 403, "headers": []})
            await self._send({"type": "http.response.body"})
        elif kind == "websocket.close":
            await self._write(message)
        elif kind == "websocket.http.response.start":
            await self._deny(message)
        else:
            await self._send({**message, "type": "http.response.body"})

    async def _accept(self, message: Message) -> None:
        transport = self._transport
        headers = response_headers(self._scope, transport.origins, b"text/event-stream; charset=utf-8")
        # Neither kept back nor compressed by a proxy on the way.
        headers[1] = (b"cache-control", b"no-store, no-transform")
        headers.append((b"x-accel-buffering", b"no"))
        self._state = "open"
        await self._start(200, headers, message.get("headers", ()))
        await self._send({"type": "http.response.body", "body": b":\n\n", "more_body": True})
        transport.opened(self)
        self._heartbeat_later()

    async def _deny(self, message: Message) -> None:
        headers = dict(message.get("headers", ()))
        content_type = headers.get(b"content-type", b"text/plain; charset=utf-8")
        self._state = "closed"
        own = response_headers(self._scope, self._transport.origins, content_type)
        await self._start(message["status"], own, message.get("headers", ()))

    async def _start(self, status: int, own: Headers, more: Any) -> None:
        names = {name for name, _ in own}
        headers = [*own, *((name, value) for name, value in more if name.lower() not in names)]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _write(self, message: Message) -> None:
        """What the link writes is events already."""
        if message["type"] == "websocket.close":
            self._state = "closed"
            body = close_event(message.get("code") or 1000, message.get("reason") or "")
            await self._send({"type": "http.response.body", "body": body})
        else:
            await send_body(self._send, message["bytes"], True)

    # What happens meanwhile

    def _heartbeat_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._transport.ping_interval, self._heartbeat)

    def _heartbeat(self) -> None:
        self.link.write(_HEARTBEAT)
        self._heartbeat_later()

    def gone(self) -> None:
        """The client has left."""
        self._end(ConnectionClosed(1006, clean=False))

    def server_stopping(self) -> None:
        """Send what waits, and end the stream with 1012."""
        if self.link.receiver is not None:
            self.link.receiver.server_stopping()
        else:
            self._end(ConnectionClosed(1012))

    def _end(self, closed: ConnectionClosed) -> None:
        self._closed = closed
        self._ended.set()
        if self.link.receiver is not None:
            self.link.receiver.connection_lost(closed)

    def leave(self) -> None:
        """The application has ended, however."""
        self._transport.closed(self)
        if self._timer is not None:
            self._timer.cancel()

    async def finish(self) -> None:
        """Answer what the application has left without an answer."""
        if self._state == "closed" or (self._ended.is_set() and not self._closed.clean):
            return
        if self._state == "open":
            code = self._closed.code if self._ended.is_set() else 1000
            await self._write({"type": "websocket.close", "code": code})
        else:
            await self._deny({"status": 500})
            await self._send({"type": "http.response.body", "body": b"Internal Server Error"})
