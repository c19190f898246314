"""What waits for one client, how much of it, and what happens when it is too much."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from typing import cast

from asgi_ws._types import Overflow
from asgi_ws.exceptions import ConnectionClosed
from asgi_ws.frames import Frame
from asgi_ws.links import Link

__all__ = ["Outbox"]


class _Waiting:
    """A frame that waits for its client. One that a handler sent has a future; without a channel it is never
    dropped."""

    __slots__ = ("channel", "frame", "sent", "size")

    def __init__(
        self, frame: Frame, size: int, channel: str | None = None, sent: asyncio.Future[bool] | None = None
    ) -> None:
        self.frame = frame
        self.size = size
        """How much it counts."""
        self.channel = channel
        self.sent = sent


class Outbox:
    """A bounded queue in front of a link, with three doors.

    `put` waits until the link has taken the frame: it is for the handler, which may well wait for its own client.
    `push` never waits: it is for publications, where waiting would let one slow client hold up all the others. `post`
    doesn't wait either, and lets in what has to arrive. All of it leaves in one order. While the client keeps up
    nothing is queued at all.
    """

    __slots__ = (
        "_behind",
        "_ended",
        "_frames",
        "_link",
        "_on_overflow",
        "_overflow",
        "_size",
        "_waiting_size",
        "drops",
    )

    def __init__(self, link: Link, size: int, overflow: Overflow, on_overflow: Callable[[], None]) -> None:
        self._link = link
        self._size = size
        self._overflow = overflow
        self._on_overflow = on_overflow
        self._frames: deque[_Waiting] = deque()
        self._waiting_size = 0
        self._behind = False
        self._ended: ConnectionClosed | None = None
        self.drops: Counter[str] | None = None
        link.on_ready = self._flush

    @property
    def dropped(self) -> int:
        """How many publications the policy has dropped."""
        return self.drops.total() if self.drops else 0

    @property
    def awaited(self) -> bool:
        """Whether a handler waits in `put`."""
        return any(waiting.sent is not None for waiting in self._frames)

    @property
    def behind(self) -> bool:
        """Whether the client has not taken what it was sent before."""
        return self._behind

    def push(self, frame: Frame, channel: str | None) -> None:
        """Take a publication for this client; without a channel it is one that no policy drops. Never waits, never
        raises."""
        if not self._behind:
            self._behind = not self._link.write(frame)
        elif self._ended is None:
            self._queue(frame, channel)

    def recover(self, frame: Frame) -> None:
        """Take a publication that the client has missed. It is never dropped and doesn't count: how many there are has
        a limit of its own, and what comes behind them is to have room. Never waits, never raises."""
        if not self._behind:
            self._behind = not self._link.write(frame)
        elif self._ended is None:
            self._append(_Waiting(frame, 0))

    def post(self, frame: Frame) -> None:
        """Take a message that may not be dropped and can't be waited for. Where more waits than may, the client is as
        slow as one that takes no publications. Never waits, never raises."""
        if not self._behind:
            self._behind = not self._link.write(frame)
        elif self._ended is None:
            if self._frames and self._waiting_size + frame.size > self._size:
                self._on_overflow()
            else:
                self._append(_Waiting(frame, frame.size))

    async def put(self, frame: Frame) -> None:
        """Take a message of the handler's; wait while the client is behind. Raises `ConnectionClosed`."""
        if self._ended is not None:
            raise self._ended.again()
        if not self._behind:
            self._behind = not self._link.write(frame)
            return
        sent = asyncio.get_running_loop().create_future()
        waiting = _Waiting(frame, frame.size, None, sent)
        self._append(waiting)
        try:
            if not await sent:
                raise cast(ConnectionClosed, self._ended).again()
        except asyncio.CancelledError:
            if waiting in self._frames:
                self._remove(waiting)
            raise

    def end(self, closed: ConnectionClosed, *, discard: bool) -> None:
        """Let nothing more in. What waits is still sent, unless it is to be discarded."""
        if self._ended is None:
            self._ended = closed
        if discard:
            while self._frames:
                self._leave(self._frames.popleft(), sent=False)
        # For `push`, which looks here first: no publication may follow one that was kept out.
        self._behind = True

    async def flush(self) -> None:
        """Wait until the link has taken everything, or it was discarded."""
        while self._frames:  # once more where a handler took its own message back meanwhile
            last = self._frames[-1]
            if last.sent is None:
                last.sent = asyncio.get_running_loop().create_future()
            # Whoever else waits for it isn't cancelled with us.
            await asyncio.wait([last.sent])

    def _queue(self, frame: Frame, channel: str | None) -> None:
        waiting = _Waiting(frame, frame.size, channel)
        if self._overflow == "latest" and channel is not None:
            for older in self._frames:
                if older.channel == channel:
                    self._drop(older)
                    break
        while self._waiting_size + frame.size > self._size:
            if self._overflow == "close" or channel is None:
                self._on_overflow()
                return
            oldest = next((older for older in self._frames if older.channel is not None), None)
            if self._overflow == "drop_newest" or oldest is None:
                self._count(channel)
                return
            self._drop(oldest)
        self._append(waiting)

    def _flush(self) -> None:
        behind = False
        while self._frames and not behind:
            waiting = self._frames.popleft()
            behind = not self._link.write(waiting.frame)
            self._leave(waiting, sent=True)
        self._behind = behind or self._ended is not None

    def _append(self, waiting: _Waiting) -> None:
        self._frames.append(waiting)
        self._waiting_size += waiting.size

    def _leave(self, waiting: _Waiting, *, sent: bool) -> None:
        self._waiting_size -= waiting.size
        if waiting.sent is not None and not waiting.sent.done():
            waiting.sent.set_result(sent)

    def _remove(self, waiting: _Waiting) -> None:
        self._frames.remove(waiting)
        self._waiting_size -= waiting.size

    def _drop(self, waiting: _Waiting) -> None:
        self._remove(waiting)
        assert waiting.channel is not None
        self._count(waiting.channel)

    def _count(self, channel: str) -> None:
        if self.drops is None:
            self.drops = Counter()
        self.drops[channel] += 1
