"""What one client has sent and its handler has not received yet: how much there may be, and how fast it may come."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

from asgi_ws.frames import size_of
from asgi_ws.limits import Limits

__all__ = ["Inbox", "Rate"]

_SIZE = 1024 * 1024
"""How many bytes an inbox holds where messages have no largest size."""


class Inbox:
    """What the client has sent and the handler has not received yet, bounded in messages and in bytes."""

    __slots__ = ("_largest", "_most", "_receiver", "_size", "messages", "on_room")

    def __init__(self, limits: Limits) -> None:
        self.messages: deque[str | bytes] = deque()
        self._size = 0
        self._most = limits.inbox_messages
        self._largest = limits.message_size or _SIZE
        self._receiver: asyncio.Future[None] | None = None
        self.on_room: Callable[[], None] | None = None
        """Called once, when an inbox that was full has room again."""

    def put(self, payload: str | bytes, size: int) -> None:
        self.messages.append(payload)
        self._size += size
        if self._receiver is not None and not self._receiver.done():
            self._receiver.set_result(None)

    def take(self) -> str | bytes:
        payload = self.messages.popleft()
        self._size = self._size - size_of(payload) if self.messages else 0
        if self.on_room is not None and not self.full:
            self._tell_room()
        return payload

    @property
    def full(self) -> bool:
        return len(self.messages) >= self._most or self._size >= self._largest

    def new_receiver(self) -> asyncio.Future[None]:
        """What is done when there is a message, or the end."""
        if self._receiver is not None and not self._receiver.done():
            raise RuntimeError("another task is receiving from this connection already")
        self._receiver = asyncio.get_running_loop().create_future()
        return self._receiver

    def room(self) -> asyncio.Future[None]:
        """What is done when there is room again, or nothing is to come any more."""
        room: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def tell() -> None:
            if not room.done():
                room.set_result(None)

        self.on_room = tell
        return room

    def _tell_room(self) -> None:
        if self.on_room is not None:
            on_room, self.on_room = self.on_room, None
            on_room()

    def end(self, *, discard: bool) -> None:
        """Nothing more will come."""
        if discard:
            self.messages.clear()
            self._size = 0
        if self._receiver is not None and not self._receiver.done():
            self._receiver.set_result(None)
        self._tell_room()


class Rate:
    """A token bucket, kept as the time at which it will be full again."""

    __slots__ = ("_burst_time", "_full_at", "_interval", "per_second")

    def __init__(self, per_second: float, burst: int) -> None:
        self.per_second = per_second
        self._interval = 1 / per_second
        self._burst_time = burst / per_second
        self._full_at = 0.0

    def allows(self) -> bool:
        now = time.monotonic()
        self._full_at = max(self._full_at, now) + self._interval
        return self._full_at - now <= self._burst_time
