"""The way to one Engine.IO client: what is written goes over the transport that the client has at the moment."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Literal, cast

from starlette.types import Message, Receive

from asgi_ws.exceptions import ConnectionClosed, InvalidMessage
from asgi_ws.frames import Frame
from asgi_ws.links import Link, Receiver, ReceivingLink
from asgi_ws.protocols import Protocol
from asgi_ws.transports.packets import (
    CLOSE,
    MESSAGE,
    PONG,
    Packet,
    PacketFrame,
    PacketProtocol,
    decode_packet,
    encode_body,
)
from asgi_ws.transports.session import Heartbeat, Session

__all__ = ["EngineLink"]

logger = logging.getLogger("asgi_ws")

_HIGH_WATER = 64 * 1024
_LOW_WATER = 16 * 1024
_NOOP_DELAY = 0.1
"""How many seconds a poll waits for something while the client wants to stop polling."""
_CLOSE_TIME = 10.0
"""How many seconds a client has to ask for the end of its session."""


def _nothing() -> None:
    """Nobody waits yet."""


class _Events:
    """What comes for an application that calls `receive` and has no receiver of its own."""

    _MOST = 32

    def __init__(self, link: "EngineLink") -> None:
        self._link = link
        self._messages: list[Message] = []
        self._moved: asyncio.Future[None] | None = None
        self._ended = False

    def message_received(self, payload: str | bytes) -> None:
        self._put({"type": "websocket.receive", "text" if isinstance(payload, str) else "bytes": payload})

    def connection_lost(self, closed: ConnectionClosed) -> None:
        if not self._ended:
            self._ended = True
            self._put({"type": "websocket.disconnect", "code": closed.code, "reason": closed.reason})

    def server_stopping(self) -> None:
        self._link.close(1012, "")

    def _put(self, message: Message) -> None:
        self._messages.append(message)
        if self._moved is not None and not self._moved.done():
            self._moved.set_result(None)
        if len(self._messages) >= self._MOST:
            self._link.pause_reading()

    async def receive(self) -> Message:
        while not self._messages:
            self._moved = asyncio.get_running_loop().create_future()
            await self._moved
        message = self._messages.pop(0)
        if self._link.paused and not self._messages:
            self._link.resume_reading()
        return message


class EngineLink:
    """The way to one Engine.IO client, whichever transport it has at the moment; and what its packets are handed to."""

    def __init__(
        self, sid: str, transport: Literal["polling", "websocket"], on_finish: Callable[["EngineLink"], None]
    ) -> None:
        self.on_ready: Callable[[], None] = _nothing
        self.sid = sid
        self.session = Session(transport)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the session is over."""
        self.probing = False
        """Whether a WebSocket is tried."""
        self.posting = False
        """Whether a request with packets is being read."""
        self.paused = False
        """Whether the receiver has enough for now."""
        self.cut: Callable[[], None] = _nothing
        """Ends the request whose answer the client doesn't take."""
        self.events = _Events(self)
        self._on_finish = on_finish
        self._receiver: Receiver = self.events
        self._max_size: int | None = None
        self._under: Link | None = None
        self._read: Callable[[], None] = _nothing
        self._behind = False
        self._listening = False
        self._close: tuple[int, str] | None = None
        self._closing: asyncio.Future[None] | None = None
        self._farewell: asyncio.Future[None] | None = None
        self._heartbeat: Heartbeat | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._poll: asyncio.Task[None] | None = None
        self._woken = False
        self._room: asyncio.Future[None] | None = None

    # What a connection asks its session

    @property
    def transport(self) -> str:
        """The way by which the client comes at the moment."""
        return self.session.transport

    def adapt(self, protocol: Protocol[Any]) -> PacketProtocol:
        """The protocol that the connection encodes with."""
        return PacketProtocol(protocol)

    def take_since(self, channel: str) -> None:
        """Engine.IO has no positions."""

    def end(self, channel: str) -> None:
        """Engine.IO has no positions."""

    # The link

    def write(self, frame: Frame) -> bool:
        if self.ended.done() or self._closing is not None:
            return True
        if self._under is not None:
            return self._under.write(frame)
        self.session.push(cast(PacketFrame, frame))
        self._wake_poll()
        self._behind = self._behind or self.session.waiting >= _HIGH_WATER
        return not self._behind

    def close(self, code: int, reason: str) -> "asyncio.Future[None]":
        if self._closing is None:
            self.events.connection_lost(ConnectionClosed(code, reason))
            if self._under is not None and not self.ended.done():
                self._closing = self._farewell = self._under.close(code, reason)
                self._closing.add_done_callback(self._closed)
            else:
                self._close = code, reason
                self._closing = asyncio.get_running_loop().create_future()
                self.session.closing = True
                self._wake_poll()
                if self.ended.done():
                    self._closing.set_result(None)
        return self._closing

    def abort(self) -> None:
        if not self.ended.done():
            # Nobody else tells, where nothing is under this link or that has ended with it.
            lost = ConnectionClosed(1006, clean=False)
            asyncio.get_running_loop().call_soon(self._receiver.connection_lost, lost)
        if self._under is not None:
            self._under.abort()
        self.cut()
        if not self.ended.done():
            self.session.closing = True
            self.finish()

    @property
    def written(self) -> int:
        return self.session.written + (self._under.written if self._under is not None else 0)

    @property
    def buffered(self) -> int:
        if self._under is not None:
            return self._under.buffered
        # The word that it is over counts, too.
        return self.session.waiting + (self.session.closing and not self.ended.done())

    def listen(self, receiver: Receiver, max_size: int | None) -> None:
        self._receiver = receiver
        self._max_size = max_size
        self._listening = True
        self._listen_under()

    def pause_reading(self) -> None:
        self.paused = True
        if hasattr(self._under, "pause_reading"):
            cast(ReceivingLink, self._under).pause_reading()

    def resume_reading(self) -> None:
        self.paused = False
        if hasattr(self._under, "resume_reading"):
            cast(ReceivingLink, self._under).resume_reading()
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def room(self) -> None:
        """Wait until the receiver takes more, or the session is over."""
        while self.paused and not self.ended.done():
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    # The WebSocket under it

    def start(self, interval: float, timeout: float) -> None:
        """The client has been let in: its heart begins to beat."""
        loop = asyncio.get_running_loop()
        self._heartbeat = Heartbeat(interval, timeout, loop.time())
        self._timer = loop.call_at(self._heartbeat.due, self._beat)

    async def receive(self) -> Message:
        """What comes, for an application that has no receiver of its own."""
        if not self._listening:
            self.listen(self.events, None)
        return await self.events.receive()

    async def send(self, message: Message) -> None:
        """ASGI's `send`, once the client has been let in."""
        if self.ended.done() or self._closing is not None:
            raise OSError("the client is gone")
        if message["type"] == "websocket.close":
            await asyncio.wait([self.close(message.get("code") or 1000, message.get("reason") or "")])
        elif message["type"] == "websocket.send":
            text = message.get("text")
            frame = PacketFrame(bytes(message["bytes"]) if text is None else MESSAGE + text)
            if not self.write(frame):
                ready = asyncio.Event()
                self.on_ready = ready.set
                await ready.wait()
        else:
            raise RuntimeError(f"unexpected ASGI message {message['type']!r}")

    def attach(self, under: Link, read: Callable[[], None]) -> None:
        """Begin over a WebSocket. `read` starts to hand over what comes there, where it doesn't by itself."""
        self._under, self._read = under, read
        under.on_ready = self._ready

    def move(self, under: Link, read: Callable[[], None]) -> None:
        """Go on over a WebSocket that was tried. `read` is as in `attach`."""
        frames = self.session.move()
        self._under, self._read, self._behind = under, read, False
        self._wake_poll()
        for frame in frames:
            self._behind = not under.write(frame)
        under.on_ready = self._ready
        if self._close is not None:
            self._farewell = under.close(*self._close)
            self._farewell.add_done_callback(self._closed)
        elif not self._behind:
            self.on_ready()
        self._listen_under()

    def _listen_under(self) -> None:
        if not self._listening:
            return
        if hasattr(self._under, "listen"):
            # A text has its packet's type in front of it.
            most = None if self._max_size is None else self._max_size + 1
            cast(ReceivingLink, self._under).listen(self, most)
        elif self._under is not None:
            self._read()

    def _ready(self) -> None:
        self._behind = False
        self.on_ready()

    def message_received(self, payload: str | bytes) -> None:
        """A message has come over the WebSocket. Called by the link under this one."""
        try:
            self.packet_received(decode_packet(payload))
        except InvalidMessage as error:
            self.violated(error)

    def connection_lost(self, closed: ConnectionClosed) -> None:
        """The WebSocket is gone. Called by the link under this one."""
        self._lose(closed)

    def server_stopping(self) -> None:
        """Send what waits, and end the session with 1012. Called by what hears of the server's end."""
        self._receiver.server_stopping()

    # Packets

    def packet_received(self, packet: Packet) -> None:
        """A packet has come, whichever way. Raises `InvalidMessage` for one that no client may send."""
        if self.ended.done():
            return
        now = asyncio.get_running_loop().time()
        heartbeat = cast(Heartbeat, self._heartbeat)
        if packet.type == MESSAGE:
            heartbeat.heard(now)
            self._receiver.message_received(packet.data)
        elif packet.type == PONG:
            heartbeat.answered(now)
        elif packet.type == CLOSE:
            self._close_under(1000, "")
            self._lose(ConnectionClosed(1005))
        else:
            raise InvalidMessage(f"a client may not send a packet of type {packet.type}", 1002)

    def violated(self, error: InvalidMessage) -> None:
        """The client has broken the protocol: the session is over."""
        logger.debug("an Engine.IO client broke the protocol: %s", error)
        self._close_under(error.close_code, error.reason)
        self.session.closing = True
        self._lose(ConnectionClosed(error.close_code, error.reason))

    def _beat(self) -> None:
        heartbeat, loop = cast(Heartbeat, self._heartbeat), asyncio.get_running_loop()
        if loop.time() >= heartbeat.due:
            try:
                self.write(heartbeat.beat(loop.time(), deaf=self.paused))
            except TimeoutError:
                logger.debug("no answer to a ping; ending the session")
                self.lose("ping timeout")
                return
        self._timer = loop.call_at(heartbeat.due, self._beat)

    # Polls

    @property
    def idle(self) -> bool:
        """Whether a poll has to wait for something to be answered with."""
        return not self.session.answerable and self.session.transport == "polling" and not self.ended.done()

    async def something(self, receive: Receive) -> None:
        """Wait for it. The session is over when the poll's client leaves meanwhile.

        Many polls wait at a time, so each has no more than its own task, which `_wake_poll` calls back as a timeout
        does.
        """
        self._poll = task = cast("asyncio.Task[None]", asyncio.current_task())
        self._woken = False
        timer = None
        if self.session.upgrading:
            timer = asyncio.get_running_loop().call_later(_NOOP_DELAY, self._wake_poll)
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        except asyncio.CancelledError:
            if not self._woken or task.uncancel():
                raise
            return
        except Exception:
            logger.debug("receiving failed", exc_info=True)
        finally:
            self._poll = None
            if timer is not None:
                timer.cancel()
        self.lose()

    def take(self) -> bytes:
        """What a poll is answered with."""
        return encode_body(self.session.take())

    def poll_answered(self) -> None:
        """The client has taken what `polled` gave."""
        self.session.end_poll()
        self.cut = _nothing
        if self._under is not None:
            return
        if self.session.closing:
            self.finish()
        elif self._behind and self.session.waiting <= _LOW_WATER:
            self._ready()

    def probe(self, packet: Packet) -> str | None:
        """What the WebSocket that is tried is answered with; `None` for the move."""
        answer = self.session.probe(packet)
        self._wake_poll()
        return answer

    def _wake_poll(self) -> None:
        if self._poll is not None and not self._woken:
            self._woken = True
            self._poll.cancel()

    # The end

    def _close_under(self, code: int, reason: str) -> None:
        if self._under is not None and not self.ended.done():
            self._farewell = self._under.close(code, reason)

    async def farewell(self) -> None:
        """Wait until the WebSocket under this link has taken its close frame."""
        if self._farewell is not None:
            await asyncio.wait([self._farewell], timeout=_CLOSE_TIME)

    async def leave(self, code: int) -> None:
        """The application has returned: wait until the client has heard that it is over."""
        if not self.ended.done() and self._heartbeat is not None:
            self.close(code, "")
            await asyncio.wait([self.ended], timeout=_CLOSE_TIME)
        await self.farewell()
        self.abort()

    def lose(self, reason: str = "") -> None:
        """The client is gone without a word."""
        if self.ended.done():
            return
        if self._under is not None:
            self._under.abort()
        self.session.closing = True
        self._lose(ConnectionClosed(1006, reason, clean=False))

    def _lose(self, closed: ConnectionClosed) -> None:
        if not self.ended.done():
            self._receiver.connection_lost(closed)
            self.finish()

    def _closed(self, _: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Nothing comes or goes any more."""
        if self.ended.done():
            return
        self.ended.set_result(None)
        self.events.connection_lost(ConnectionClosed(1006, clean=False))
        self.session.forget()
        self._on_finish(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._closing is not None and self._closing is not self._farewell and not self._closing.done():
            self._closing.set_result(None)
        self._wake_poll()
        self.resume_reading()
        self.on_ready()
