"""All that asgi_ws knows about uvicorn's classes.

ASGI has no way to cut off a client that reads nothing, nor to send a frame that is ready; uvicorn's protocol objects
have a transport that can. They are found where a middleware's `send` is a method of a class known here, never by guess.
"""

import asyncio
import logging
import signal
from typing import Any

from starlette.types import Send

from asgi_ws.frames import Frame
from asgi_ws.links import AsgiLink, Link

__all__ = ["find_link", "worker_count"]

logger = logging.getLogger("asgi_ws")

_PROTOCOLS = {
    ("uvicorn.protocols.websockets.websockets_sansio_impl", "WebSocketsSansIOProtocol"),
    ("uvicorn.protocols.websockets.wsproto_impl", "WSProtocol"),
}


class UvicornLink(AsgiLink):
    """Writes ready frames to the transport of uvicorn's own WebSocket classes; accepting and closing stay theirs.

    An uncompressed frame is right on a connection that negotiated compression too (RFC 7692 section 6).
    """

    __slots__ = ("_transport", "_watcher", "_writable")

    def __init__(self, send: Send, protocol: Any) -> None:
        super().__init__(send)
        self._transport: asyncio.Transport = protocol.transport
        self._writable: asyncio.Event = protocol.writable
        self._watcher: asyncio.Task[None] | None = None

    def write(self, frame: Frame) -> bool:
        if self._ended or self._transport.is_closing():
            return True
        wire = frame.wire
        self.written += len(wire)
        self._transport.write(wire)
        if self._writable.is_set():
            return True
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch(), name="asgi_ws flow control")
        return False

    def abort(self) -> None:
        super().abort()
        self._transport.abort()

    @property
    def buffered(self) -> int:
        return self._transport.get_write_buffer_size()

    async def _watch(self) -> None:
        # Ends with the connection at the latest: uvicorn sets the event when the transport is lost, too.
        await self._writable.wait()
        self._watcher = None
        self.on_ready()


def find_link(send: Send) -> Link:
    """The best way to the client that this server offers."""
    protocol = getattr(send, "__self__", None)
    kind = type(protocol)
    if (kind.__module__, kind.__qualname__) not in _PROTOCOLS:
        return AsgiLink(send)
    transport, writable = getattr(protocol, "transport", None), getattr(protocol, "writable", None)
    if isinstance(writable, asyncio.Event) and hasattr(transport, "get_write_buffer_size"):
        return UvicornLink(send, protocol)
    logger.debug("this version of %s isn't known; writing through ASGI", kind.__qualname__)
    return AsgiLink(send)


def worker_count() -> int:
    """How many worker processes the uvicorn server that runs here belongs to; 1 where no such server runs."""
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if type(server).__module__ != "uvicorn.server":
        return 1
    workers = getattr(getattr(server, "config", None), "workers", None)
    return workers if isinstance(workers, int) else 1
