"""All that asgi_ws knows about uvicorn: a WebSocket class of its own for it, and the transports of the stock ones.

ASGI has no way to cut off a client that reads nothing, nor to send a frame that is ready. A transport can do both.
"""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import http
import logging
import random
import signal
import socket
import struct
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast
from urllib.parse import quote, unquote

from starlette.types import Message, Scope, Send

from asgi_ws.exceptions import ConnectionClosed
from asgi_ws.frames import BINARY, CLOSE, PING, PONG, TEXT, Frame, Parser, control_frame, may_be_sent
from asgi_ws.links import AsgiLink, Link, Receiver

__all__ = ["WebSocketProtocol", "cut_off", "find_link", "is_stopping", "worker_count"]

logger = logging.getLogger("asgi_ws")
server_logger = logging.getLogger("uvicorn.error")

_STOCK_PROTOCOLS = {
    ("uvicorn.protocols.websockets.websockets_sansio_impl", "WebSocketsSansIOProtocol"),
    ("uvicorn.protocols.websockets.wsproto_impl", "WSProtocol"),
}
_STOCK_HTTP = {"uvicorn.protocols.http.h11_impl", "uvicorn.protocols.http.httptools_impl"}
_EXTENSION = "asgi_ws.link"
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_FLUSH_FROM = 64 * 1024
"""How many bytes are gathered in one tick at the most before they are written."""
_TICKS = 2
"""For how many more ticks writing may wait while clients are heard."""
_MAX_FRAGMENTS = 131_072
"""How many frames a message may come in."""
_CLOSE_TIMEOUT = 10.0
"""How many seconds a client has to answer a close frame, and to take what was sent before it."""
_STOP_TIMEOUT = 2.0
"""The same when the server stops."""
_GOODBYES_PER_SECOND = 1000
"""How fast clients are told that the server stops, so that they don't all come back at once."""
_GOODBYES_TIME = 10.0
"""How many seconds that may take."""
_UNPARSED = 64 * 1024
"""How many bytes a client may send before its handshake is answered; then nothing more is read."""
_RESET = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
"""For SO_LINGER: closing the socket resets the connection, and drops what has not left yet."""
_WINDOW_BITS = {b"8", b"9", b"10", b"11", b"12", b"13", b"14", b"15"}
_CONNECTING, _OPEN, _REFUSED, _CLOSING, _CLOSED = range(5)
_QUEUED_MESSAGES = 64
"""How many messages wait for a plain ASGI application before nothing more is read."""
_LARGE_MESSAGE = 16 * 1024
"""From this size on, one is enough for that."""


class ClientDisconnected(OSError):
    """What `send` raises when the client is gone, as the ASGI specification has it."""


class _Tick:
    """The links of one event loop that have something to write at the end of the current tick."""

    def __init__(self) -> None:
        self.heard = False
        """Whether a client was heard since the first of them was added."""
        self._waits = 0
        self._links: list[TransportLink] = []

    def add(self, link: "TransportLink") -> None:
        if not self._links:
            self.heard = False
            self._waits = 0
            asyncio.get_running_loop().call_soon(self._flush)
        self._links.append(link)

    def _flush(self) -> None:
        if self.heard and self._waits < _TICKS:
            # More has come from clients meanwhile; what it leads to leaves together with this.
            self.heard = False
            self._waits += 1
            asyncio.get_running_loop().call_soon(self._flush)
            return
        links, self._links = self._links, []
        for link in links:
            link.flush()


_ticks: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Tick]" = weakref.WeakKeyDictionary()


def _nothing() -> None:
    """Nobody waits yet."""


class TransportLink:
    """Writes ready frames to a transport; those of one tick of the event loop leave together."""

    __slots__ = ("_ended", "_flushed", "_more", "_pending", "_tick", "_transport", "on_ready", "written")

    def __init__(self, transport: asyncio.Transport | None = None) -> None:
        self.on_ready: Callable[[], None] = _nothing
        self.written = 0
        self._transport = cast(asyncio.Transport, transport)
        self._tick = _ticks.setdefault(asyncio.get_running_loop(), _Tick())
        # The first frame of a tick, which mostly is the only one, and those that came behind it.
        self._pending: bytes | None = None
        self._more: list[bytes] | None = None
        self._flushed = 0
        self._ended = False

    def abort(self) -> None:
        self._ended = True
        self._pending = self._more = None
        self._cut_off()

    @property
    def buffered(self) -> int:
        return self._transport.get_write_buffer_size() + (self.written - self._flushed if self._pending else 0)

    def flush(self) -> None:
        """Write what this tick has gathered."""
        pending = self._pending
        if pending is not None:
            self._pending = None
            self._flushed = self.written
            if self._more is not None:
                pending += b"".join(self._more)
                self._more = None
            if not self._transport.is_closing():
                self._transport.write(pending)

    def _cut_off(self) -> None:
        """Abort the transport. Of a client that has not taken everything the kernel is to forget all as well: closing
        alone would leave it megabytes, which it keeps for minutes while the other side says that it lives."""
        if self._transport.get_write_buffer_size():
            sock = self._transport.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()

    def _gather(self, wire: bytes) -> None:
        self.written += len(wire)
        if self._pending is None:
            self._pending = wire
            self._tick.add(self)
        elif self._more is None:
            self._more = [wire]
        else:
            self._more.append(wire)
        if self.written - self._flushed > _FLUSH_FROM:
            self.flush()


class UvicornLink(TransportLink):
    """The transport of one of uvicorn's own WebSocket classes; accepting, receiving and closing stay theirs.

    A frame that isn't compressed is right on a connection that negotiated compression, too (RFC 7692 section 6).
    """

    __slots__ = ("_send", "_watcher", "_writable")

    def __init__(self, send: Send, protocol: Any) -> None:
        super().__init__(protocol.transport)
        self._send = send
        self._writable: asyncio.Event = protocol.writable
        self._watcher: asyncio.Task[None] | None = None

    def write(self, frame: Frame) -> bool:
        if self._ended:
            return True
        self._gather(frame.wire)
        if self._writable.is_set():
            return True
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch(), name="asgi_ws flow control")
        return False

    def close(self, code: int, reason: str) -> asyncio.Task[None]:
        self.flush()
        self._ended = True
        return asyncio.create_task(self._close(code, reason), name="asgi_ws close")

    async def _close(self, code: int, reason: str) -> None:
        try:
            await self._send({"type": "websocket.close", "code": code, "reason": reason})
        except (OSError, RuntimeError):
            # The client was faster, or the server.
            logger.debug("closing failed", exc_info=True)

    async def _watch(self) -> None:
        # Ends with the connection at the latest: uvicorn sets the event when the transport is lost, too.
        await self._writable.wait()
        self._watcher = None
        self.on_ready()


class WebSocketProtocol(TransportLink, asyncio.Protocol):
    """uvicorn's WebSocket protocol for applications with asgi_ws: `uvicorn --ws asgi_ws.uvicorn:WebSocketProtocol`.

    Frames of publications go straight to the transport, compressed once for all clients; messages are handed in
    without a task that waits for them; clients that read nothing are cut off, also when they don't answer a ping and
    when the server stops. Any other ASGI application works behind it as behind uvicorn's own classes.
    """

    __slots__ = (
        "_app_state",
        "_closing",
        "_config",
        "_deflate",
        "_events",
        "_keepalive",
        "_key",
        "_loop",
        "_parser",
        "_pending_then",
        "_pinged",
        "_pong",
        "_reading",
        "_receiver",
        "_refusal",
        "_scope",
        "_server",
        "_state",
        "_stopping",
        "_told_end",
        "_unparsed",
        "_waiter",
        "_writable",
    )

    def __init__(
        self, config: Any, server_state: Any, app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        super().__init__()
        self._config = config
        self._server = server_state
        self._app_state = app_state
        self._loop = _loop or asyncio.get_running_loop()
        self._state = _CONNECTING
        self._stopping = False
        self._scope: Scope | None = None
        self._key = b""
        self._deflate: _Deflate | None = None
        self._refusal: Message | None = None
        # What has come before the handshake is finished, and what parses it from then on.
        self._unparsed = b""
        self._parser: Parser | None = None
        # Either a receiver that messages are handed to, or events for an application that calls `receive`.
        self._receiver: Receiver | None = None
        self._events: list[Message] = []
        self._waiter: asyncio.Future[None] | None = None
        self._told_end = False
        self._reading = True
        self._writable: asyncio.Event | None = None
        # The payload of the ping that waits for its pong, and of the client's ping that waits for room to be answered.
        self._pinged: bytes | None = None
        self._pong: bytes | None = None
        self._pending_then = 0
        self._keepalive: asyncio.TimerHandle | None = None
        self._closing: asyncio.TimerHandle | None = None

    # What uvicorn and the transport call

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._tick.heard = True
        if self._scope is None:
            # uvicorn has read the request, and hands over its whole head at once.
            head, _, self._unparsed = data.partition(b"\r\n\r\n")
            self._handshake(head)
        elif self._parser is None:
            # The client doesn't wait for the answer to its handshake; it may until the buffer is full.
            self._unparsed += data
            if len(self._unparsed) > _UNPARSED:
                self.pause_reading()
        else:
            self._parse(self._parser, data)

    def eof_received(self) -> None:
        """The transport closes by itself, but not before the client has taken everything."""
        self._end_transport()

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.discard(self)
        self._stop_timers()
        self._state = _CLOSED
        self._ended = True
        self._pending = None
        self._tell_end(ConnectionClosed(1006, clean=False))
        self._wake()
        if self._writable is not None:
            # Whoever waits to write is told that nobody is there.
            self._writable.set()
        self.on_ready()

    def pause_writing(self) -> None:
        if self._writable is None:
            self._writable = asyncio.Event()
        self._writable.clear()

    def resume_writing(self) -> None:
        pong, self._pong = self._pong, None
        if pong is not None and self._state is _OPEN:
            self._gather(control_frame(PONG, pong))
        cast(asyncio.Event, self._writable).set()
        self.on_ready()

    def shutdown(self) -> None:
        """The server stops: say so to the client, not to all at the same moment, and wait until it has taken all that
        was sent before."""
        self._stopping = True
        if self._state is _CONNECTING:
            self._respond(503, [(b"retry-after", b"1")], b"The server is stopping")
            # To the application, the client is gone.
            self._state = _CLOSED
        elif self._state is _OPEN and self._receiver is not None:
            spread = min(len(self._server.connections) / _GOODBYES_PER_SECOND, _GOODBYES_TIME)
            self._loop.call_later(random.uniform(0, spread), self._receiver.server_stopping)
        elif self._state is _OPEN:
            self._say_goodbye(1012, "")
            self._tell_end(ConnectionClosed(1012))
        else:
            self._end_transport()

    # The handshake

    def _handshake(self, head: bytes) -> None:
        request_line, *lines = head.split(b"\r\n")
        method, target, _ = request_line.split(b" ", 2)
        headers = []
        for line in lines:
            name, _, value = line.partition(b":")
            headers.append((name.strip().lower(), value.strip()))
        self._scope = self._new_scope(target, headers)
        keys = [value for name, value in headers if name == b"sec-websocket-key"]
        versions = [value for name, value in headers if name == b"sec-websocket-version"]
        if method != b"GET" or len(keys) != 1 or not _is_key(keys[0]):
            self._respond(400, [], b"This isn't a WebSocket handshake")
        elif versions != [b"13"]:
            self._respond(426, [(b"sec-websocket-version", b"13")], b"The WebSocket protocol has version 13")
        else:
            self._key = keys[0]
            if self._config.ws_per_message_deflate:
                self._deflate = _negotiate(headers)
            self._events.append({"type": "websocket.connect"})
            task = self._loop.create_task(self._run())
            self._server.tasks.add(task)
            task.add_done_callback(self._server.tasks.discard)

    def _new_scope(self, target: bytes, headers: list[tuple[bytes, bytes]]) -> Scope:
        raw_path, _, query = target.partition(b"?")
        root_path = self._config.root_path
        sockname = self._transport.get_extra_info("sockname")
        offered = [value for name, value in headers if name == b"sec-websocket-protocol"]
        return {
            "type": "websocket",
            "asgi": {"version": self._config.asgi_version, "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "wss" if self._transport.get_extra_info("sslcontext") else "ws",
            "server": _address(sockname) or ((sockname, None) if isinstance(sockname, str) else None),
            "client": _address(self._transport.get_extra_info("peername")),
            "root_path": root_path,
            "path": root_path + unquote(raw_path.decode("latin-1")),
            "raw_path": root_path.encode() + raw_path,
            "query_string": query,
            "headers": headers,
            "subprotocols": [
                name.strip() for value in offered for name in value.decode("latin-1").split(",") if name.strip()
            ],
            "state": self._app_state.copy(),
            "extensions": {"websocket.http.response": {}, _EXTENSION: {"link": self}},
        }

    def _accept(self, message: Message) -> None:
        accept = base64.b64encode(hashlib.sha1(self._key + _GUID, usedforsecurity=False).digest())
        lines = [
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: ",
            accept,
            b"\r\n",
        ]
        headers = [*self._server.default_headers, *message.get("headers", ())]
        if message.get("subprotocol"):
            headers.append((b"Sec-WebSocket-Protocol", message["subprotocol"].encode("latin-1")))
        if self._deflate is not None:
            headers.append((b"Sec-WebSocket-Extensions", self._deflate.response))
        lines += _header_lines(headers)
        self._log("[accepted]")
        self._transport.write(b"".join(lines))
        self._state = _OPEN
        self._parser = Parser(self._config.ws_max_size, _MAX_FRAGMENTS, deflate=self._deflate is not None)
        if self._config.ws_ping_interval:
            self._keepalive = self._loop.call_later(self._config.ws_ping_interval, self._ping)
        self.resume_reading()
        unparsed, self._unparsed = self._unparsed, b""
        if unparsed:
            self._parse(self._parser, unparsed)

    def _respond(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes, more: bool = False) -> None:
        """Refuse the handshake with an HTTP response."""
        self._log(str(status))
        phrase = http.HTTPStatus(status).phrase if status in set(http.HTTPStatus) else ""
        headers = [*self._server.default_headers, *headers, (b"connection", b"close")]
        names = {name.lower() for name, _ in headers}
        if not more and b"content-length" not in names:
            headers.append((b"content-length", b"%d" % len(body)))
        if body and b"content-type" not in names:
            headers.append((b"content-type", b"text/plain; charset=utf-8"))
        lines = [b"HTTP/1.1 %d %s\r\n" % (status, phrase.encode()), *_header_lines(headers), body]
        self._transport.write(b"".join(lines))
        self._state = _REFUSED
        if not more:
            self._end_transport()

    # The application

    async def _run(self) -> None:
        try:
            await self._config.loaded_app(self._scope, self._asgi_receive, self.send)
        except Exception as error:
            # Somebody else's client may be gone, while this one is not.
            if not isinstance(error, ClientDisconnected) or self._state in (_CONNECTING, _OPEN):
                server_logger.exception("Exception in ASGI application\n")
                self._finish(1011)
        else:
            if self._state is _CONNECTING:
                server_logger.error("ASGI callable returned without completing handshake.")
            self._finish(1000)
        finally:
            # Only a cancelled application comes here with something open.
            if self._state in (_CONNECTING, _OPEN):
                self.abort()

    def _finish(self, code: int) -> None:
        """The application has returned."""
        if self._state is _CONNECTING:
            self._respond(500, [], b"Internal Server Error")
        elif self._state is _OPEN:
            self._say_goodbye(code, "")
        elif self._state is _REFUSED:
            self._end_transport()

    async def _asgi_receive(self) -> Message:
        while not self._events:
            if self._state is _CLOSED:
                return {"type": "websocket.disconnect", "code": 1006}
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        message = self._events.pop(0)
        if not self._events and self._state is _OPEN:
            self.resume_reading()
        return message

    async def send(self, message: Message) -> None:
        """ASGI's `send`."""
        kind = message["type"]
        if self._writable is not None and self._state in (_OPEN, _REFUSED):
            await self._writable.wait()
        refused = self._state is _REFUSED and self._refusal is None
        if self._state is _CLOSED or (self._transport.is_closing() and not refused):
            raise ClientDisconnected
        if self._state is _OPEN and kind == "websocket.send":
            data = message.get("bytes")
            self.write(Frame(message["text"] if data is None else bytes(data)))
        elif self._state is _OPEN and kind == "websocket.close":
            code, reason = message.get("code") or 1000, message.get("reason") or ""
            if not may_be_sent(code) or len(reason.encode()) > 123:
                raise ValueError(f"a close frame can't have the code {code} with the reason {reason!r}")
            self._say_goodbye(code, reason)
            self._tell_end(ConnectionClosed(code, reason))
        elif self._state is _CONNECTING and self._refusal is None and kind == "websocket.accept":
            self._accept(message)
        elif self._state is _CONNECTING and self._refusal is None and kind == "websocket.close":
            self._respond(403, [], b"")
        elif self._state is _CONNECTING and self._refusal is None and kind == "websocket.http.response.start":
            self._refusal = message
        elif kind == "websocket.http.response.body" and self._refusal is not None:
            self._refuse(message)
        else:
            raise RuntimeError(f"unexpected ASGI message {kind!r}")

    def _refuse(self, message: Message) -> None:
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._state is _CONNECTING:
            start = cast(Message, self._refusal)
            self._respond(start["status"], start.get("headers", ()), body, more)
        else:
            self._transport.write(body)
            if not more:
                self._end_transport()
        if not more:
            self._refusal = None

    # The link

    def write(self, frame: Frame) -> bool:
        if self._ended:
            return True
        deflate = self._deflate
        self._gather(frame.compressed if deflate is not None and deflate.sends else frame.wire)
        return self._writable is None or self._writable.is_set()

    def close(self, code: int, reason: str) -> "asyncio.Future[None]":
        self._say_goodbye(code, reason)
        closed: asyncio.Future[None] = self._loop.create_future()
        closed.set_result(None)
        return closed

    def abort(self) -> None:
        self._stop_timers()
        super().abort()

    def listen(self, receiver: Receiver, max_size: int | None) -> None:
        self._receiver = receiver
        parser = cast(Parser, self._parser)
        if max_size is not None and (parser.max_size is None or max_size < parser.max_size):
            parser.max_size = max_size
        # From here on the receiver says when it has enough.
        self.resume_reading()
        events, self._events = self._events, []
        for event in events:
            self._hand_over(event)

    def pause_reading(self) -> None:
        if self._reading and not self._transport.is_closing():
            self._reading = False
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if not self._reading and not self._transport.is_closing():
            self._reading = True
            # An answer may have waited in front of the door.
            self._pinged = None
            self._transport.resume_reading()

    # What comes in

    def _parse(self, parser: Parser, data: bytes) -> None:
        for opcode, received in parser.feed(data):
            if opcode <= BINARY:
                if self._state is not _OPEN:
                    continue
                if self._receiver is not None:
                    self._receiver.message_received(cast("str | bytes", received))
                else:
                    self._queue({"type": "websocket.receive", "text" if opcode == TEXT else "bytes": received})
                    if len(self._events) >= _QUEUED_MESSAGES or len(received) >= _LARGE_MESSAGE:
                        self.pause_reading()
            elif opcode == PING:
                self._answer_ping(cast(bytes, received))
            elif opcode == PONG:
                if received == self._pinged:
                    self._pinged = None
            else:
                self._client_closes(*cast("tuple[int, str]", received))
                return
        if parser.violation is not None and self._state is _OPEN:
            violation = parser.violation
            self._say_goodbye(violation.code, violation.reason)
            self._tell_end(ConnectionClosed(violation.code, violation.reason))
            # To the application, the client is gone.
            self._state = _CLOSED
            if self._transport.can_write_eof() and not self._transport.is_closing():
                # What is still on its way is taken and dropped: closing before it has come would be a reset, and
                # could cost the client the close frame.
                self._transport.write_eof()
            else:
                self._end_transport()

    def _answer_ping(self, payload: bytes) -> None:
        if self._state is not _OPEN:
            return
        if self._writable is None or self._writable.is_set():
            # Gathered like all else: many small pings don't become as many calls of the kernel.
            self._gather(control_frame(PONG, payload))
        else:
            # RFC 6455 section 5.5.3: the latest one is answer enough. A client that doesn't read can't make us keep
            # more.
            self._pong = payload

    def _client_closes(self, code: int, reason: str) -> None:
        if self._transport.is_closing():
            # Once more; the time that it has to take what it was sent goes on.
            return
        self._stop_timers()
        if self._state is _OPEN:
            self.flush()
            self._transport.write(control_frame(CLOSE, b"" if code == 1005 else code.to_bytes(2)))
        self._state = _CLOSING
        self._ended = True
        self._tell_end(ConnectionClosed(code, reason))
        self._end_transport()

    def _queue(self, message: Message) -> None:
        self._events.append(message)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _hand_over(self, event: Message) -> None:
        receiver = cast(Receiver, self._receiver)
        if event["type"] == "websocket.receive":
            receiver.message_received(event["text"] if "text" in event else event["bytes"])
        else:
            receiver.connection_lost(ConnectionClosed(event["code"], event["reason"], event["code"] != 1006))

    def _tell_end(self, closed: ConnectionClosed) -> None:
        """Tell whoever receives that nothing comes any more, once."""
        if self._told_end:
            return
        self._told_end = True
        if self._receiver is not None:
            self._receiver.connection_lost(closed)
        else:
            self._queue({"type": "websocket.disconnect", "code": closed.code, "reason": closed.reason})

    # The end, and signs of life

    def _say_goodbye(self, code: int, reason: str) -> None:
        """Send a close frame behind all that was written; whoever doesn't answer it in time is cut off."""
        if self._state is not _OPEN or self._ended:
            return
        self.flush()
        self._ended = True
        self._state = _CLOSING
        if self._keepalive is not None:
            self._keepalive.cancel()
        if not self._transport.is_closing():
            self._transport.write(control_frame(CLOSE, code.to_bytes(2) + reason.encode()))
        self.resume_reading()
        if self._stopping:
            self._end_transport()
        else:
            self._closing = self._loop.call_later(_CLOSE_TIMEOUT, self.abort)

    def _end_transport(self) -> None:
        """Close the transport when the client has taken everything; and when it doesn't, after a while."""
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        self._transport.close()
        if self._transport.get_write_buffer_size():
            timeout = _STOP_TIMEOUT if self._stopping else _CLOSE_TIMEOUT
            self._closing = self._loop.call_later(timeout, self._cut_off)

    def _ping(self) -> None:
        self._keepalive = None
        if self._state is not _OPEN or self._transport.is_closing():
            return
        timeout = self._config.ws_ping_timeout
        self._pinged = random.randbytes(4)
        self._pending_then = cast(Parser, self._parser).pending
        self.flush()
        self._transport.write(control_frame(PING, self._pinged))
        if timeout:
            self._keepalive = self._loop.call_later(timeout, self._check_pong)
        else:
            self._keepalive = self._loop.call_later(self._config.ws_ping_interval, self._ping)

    def _check_pong(self) -> None:
        # While we don't read ourselves, an answer can't be seen; and it waits behind a frame that is still coming.
        silent = cast(Parser, self._parser).pending == self._pending_then
        if self._pinged is not None and self._reading and silent:
            server_logger.debug("no answer to a ping; aborting")
            self.abort()
            return
        # So that pings are as far from each other as the interval says, where it is the longer one.
        rest = self._config.ws_ping_interval - self._config.ws_ping_timeout
        self._keepalive = self._loop.call_later(max(rest, 0), self._ping)

    def _stop_timers(self) -> None:
        for timer in (self._keepalive, self._closing):
            if timer is not None:
                timer.cancel()
        self._keepalive = self._closing = None

    def _log(self, outcome: str) -> None:
        """The line that uvicorn's own classes write, but for the query, which may hold what nobody should read."""
        scope = cast(Scope, self._scope)
        client = ":".join(map(str, scope["client"] or ()))
        server_logger.info('%s - "WebSocket %s" %s', client, quote(scope["path"]), outcome)


class _Deflate(NamedTuple):
    """What was agreed on about compression (RFC 7692 section 7.1)."""

    response: bytes
    sends: bool
    """Whether the client's window is as large as that of the frames that all clients share."""


def _negotiate(headers: Iterable[tuple[bytes, bytes]]) -> _Deflate | None:
    """The first of the client's offers that can be taken. Neither side keeps its window from one message to the next,
    whatever the client hoped for: so one compressed frame serves all, and inflating keeps nothing."""
    for name, value in headers:
        if name != b"sec-websocket-extensions":
            continue
        for offer in value.split(b","):
            extension, *parameters = (part.strip().lower() for part in offer.split(b";"))
            if extension == b"permessage-deflate":
                taken = _take_offer(parameters)
                if taken is not None:
                    return taken
    return None


def _take_offer(parameters: Iterable[bytes]) -> _Deflate | None:
    response = b"permessage-deflate; server_no_context_takeover; client_no_context_takeover"
    sends = True
    seen = set()
    for parameter in parameters:
        name, found, value = (part.strip() for part in parameter.partition(b"="))
        value = value.strip(b'"')
        if name in seen:
            return None
        seen.add(name)
        if name in (b"server_no_context_takeover", b"client_no_context_takeover") and not found:
            continue
        if name == b"client_max_window_bits" and (not found or value in _WINDOW_BITS):
            continue
        if name == b"server_max_window_bits" and value in _WINDOW_BITS:
            # Frames for all have the largest window; to a client that can't take it, nothing is sent compressed.
            response += b"; server_max_window_bits=" + value
            sends = value == b"15"
            continue
        return None
    return _Deflate(response, sends)


def _is_key(key: bytes) -> bool:
    """RFC 6455 section 4.1: 16 bytes as base64."""
    try:
        return len(base64.b64decode(key, validate=True)) == 16
    except binascii.Error:
        return False


def _header_lines(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    lines = []
    for name, value in headers:
        if b"\r" in name + value or b"\n" in name + value:
            raise ValueError(f"a header can't have line breaks: {name + value!r}")
        lines += [name, b": ", value, b"\r\n"]
    lines.append(b"\r\n")
    return lines


def _address(info: Any) -> tuple[str, int] | None:
    return (str(info[0]), int(info[1])) if isinstance(info, tuple) else None


def find_link(send: Send, extensions: Mapping[str, Any] | None = None) -> Link:
    """The best way to the client that this server offers."""
    offered = (extensions or {}).get(_EXTENSION)
    if offered is not None:
        return cast(Link, offered["link"])
    protocol = getattr(send, "__self__", None)
    kind = type(protocol)
    if (kind.__module__, kind.__qualname__) not in _STOCK_PROTOCOLS:
        return AsgiLink(send)
    transport, writable = getattr(protocol, "transport", None), getattr(protocol, "writable", None)
    if isinstance(writable, asyncio.Event) and hasattr(transport, "get_write_buffer_size"):
        return UvicornLink(send, protocol)
    logger.debug("this version of %s isn't known; writing through ASGI", kind.__qualname__)
    return AsgiLink(send)


def cut_off(send: Send) -> None:
    """End the transport of a request of which the client doesn't take the answer, where the server lets us."""
    cycle = getattr(send, "__self__", None)
    if type(cycle).__module__ in _STOCK_HTTP:
        abort: Callable[[], None] = getattr(getattr(cycle, "transport", None), "abort", _nothing)
        abort()


def worker_count() -> int:
    """How many worker processes the uvicorn server that runs here belongs to; 1 where no such server runs."""
    workers = getattr(getattr(_running_server(), "config", None), "workers", None)
    return workers if isinstance(workers, int) else 1


def is_stopping() -> bool:
    """Whether the uvicorn server that runs here has been told to stop."""
    return bool(getattr(_running_server(), "should_exit", False))


def _running_server() -> Any:
    """The server that a signal would stop; `None` where no such server runs."""
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return server if type(server).__module__ == "uvicorn.server" else None
