"""How frames leave for one client."""

import asyncio
import logging
import typing
from collections import deque
from collections.abc import Callable

from starlette.types import Message, Send

from asgi_ws.exceptions import ConnectionClosed
from asgi_ws.frames import Frame, size_of

__all__ = ["AsgiLink", "Link", "Receiver", "ReceivingLink", "closed_by"]

logger = logging.getLogger("asgi_ws")

_HIGH_WATER = 64 * 1024
_LOW_WATER = 16 * 1024


def _nothing() -> None:
    """Nobody waits yet."""


class Link(typing.Protocol):
    """The way to one client, open from the accepted handshake on. Nothing here waits, and nothing raises.

    Frames arrive in the order of `write`. After `close` or `abort`, and after the client is gone, what is written
    goes nowhere.
    """

    on_ready: Callable[[], None]
    """Called after a `write` that said `False`, as soon as the client has taken most of what waited."""

    @property
    def written(self) -> int:
        """How many bytes `write` was given."""
        ...

    def write(self, frame: Frame) -> bool:
        """Send a frame. `True`: more may come; `False`: the client is behind, wait for `on_ready`."""
        ...

    def close(self, code: int, reason: str) -> "asyncio.Future[None]":
        """Send a close frame behind what has been written. The future is done when the server has taken it."""
        ...

    def abort(self) -> None:
        """End it now, whatever is buffered."""
        ...

    @property
    def buffered(self) -> int:
        """How many bytes the client has not taken yet, as far as the process knows."""
        ...


class Receiver(typing.Protocol):
    """Whatever a client's messages are handed to. Nothing here waits, and nothing raises."""

    def message_received(self, payload: str | bytes) -> None:
        """A message has come."""
        ...

    def connection_lost(self, closed: ConnectionClosed) -> None:
        """The client is gone, or the server has ended the connection; nothing comes any more."""
        ...

    def server_stopping(self) -> None:
        """The server stops: the client is to be sent what waits, and then a close frame with code 1012."""
        ...


class ReceivingLink(Link, typing.Protocol):
    """A link that hands messages in by itself, so that no task has to wait for them."""

    def listen(self, receiver: Receiver, max_size: int | None) -> None:
        """Hand what comes to `receiver` from now on; a message larger than `max_size` closes with 1009."""
        ...

    def pause_reading(self) -> None:
        """Take nothing more from the client; TCP pushes back."""
        ...

    def resume_reading(self) -> None:
        """The end of that."""
        ...


class AsgiLink:
    """A link over a plain ASGI `send`. A writer task exists only while there is something to write."""

    __slots__ = ("_behind", "_buffered", "_ended", "_send", "_waiting", "_writer", "on_ready", "written")

    def __init__(self, send: Send) -> None:
        self.on_ready: Callable[[], None] = _nothing
        self._send = send
        # Most links have nothing to queue most of the time, and there are many.
        self._waiting: deque[tuple[Message, int]] | None = None
        self.written = 0
        self._buffered = 0
        self._behind = False
        self._ended = False
        self._writer: asyncio.Task[None] | None = None

    def write(self, frame: Frame) -> bool:
        if self._ended:
            return True
        self.written += frame.size
        if frame.attachments:
            for payload in frame.payloads:
                self._push(_message(payload), size_of(payload))
        else:
            self._push(_message(frame.payload), frame.size)
        # Until `on_ready`: what was behind at the upper mark stays so down to the lower one.
        self._behind = self._behind or self._buffered >= _HIGH_WATER
        return not self._behind

    def close(self, code: int, reason: str) -> asyncio.Task[None]:
        writer = self._push({"type": "websocket.close", "code": code, "reason": reason}, 0)
        self._ended = True
        return writer

    def abort(self) -> None:
        self._ended = True
        self._forget()
        if self._writer is not None:
            self._writer.cancel()

    @property
    def buffered(self) -> int:
        return self._buffered

    def _push(self, message: Message, size: int) -> asyncio.Task[None]:
        if self._waiting is None:
            self._waiting = deque()
        self._waiting.append((message, size))
        self._buffered += size
        if self._writer is None:
            self._writer = asyncio.create_task(self._write(self._waiting), name="asgi_ws writer")
        return self._writer

    async def _write(self, waiting: deque[tuple[Message, int]]) -> None:
        try:
            while waiting:
                message, size = waiting.popleft()
                await self._send(message)
                self._buffered -= size
                if self._behind and self._buffered <= _LOW_WATER:
                    self._behind = False
                    self.on_ready()
        except Exception:
            # The client is gone: OSError by the ASGI specification, and all kinds of others on servers that are older
            # or that have ended the connection by themselves.
            logger.debug("sending failed", exc_info=True)
            self._ended = True
            self._forget()
            self.on_ready()
        finally:
            self._writer = None

    def _forget(self) -> None:
        if self._waiting is not None:
            self._waiting.clear()
        self._buffered = 0


def _message(payload: str | bytes) -> Message:
    return {"type": "websocket.send", "text" if isinstance(payload, str) else "bytes": payload}


def closed_by(message: Message) -> ConnectionClosed:
    """How a connection ended, by the server's word. Without a close frame, uvicorn says 1005 and gives no reason."""
    code, reason = int(message.get("code") or 1005), message.get("reason")
    if code == 1006 or (code == 1005 and reason is None):
        return ConnectionClosed(1006, "", clean=False)
    return ConnectionClosed(code, reason or "")
