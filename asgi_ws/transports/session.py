"""One Engine.IO session, whatever carries its packets: what waits for its client, where the client is, and whether it
is still there. No I/O and no clock."""

from typing import Final, Literal

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.transports.packets import CLOSE, NOOP, PING, PONG, PROBE, UPGRADE, Packet, PacketFrame

__all__ = ["Heartbeat", "Session"]

_PING: Final = PacketFrame(PING)
_CLOSE: Final = PacketFrame(CLOSE)
_NOOP: Final = PacketFrame(NOOP)


class Session:
    """Where a session is, and what waits until its client polls.

    A session that begins with polling may move to a WebSocket once: the client asks there with a probe, stops polling
    when that is answered, and says so; only then is anything written there. So what is sent arrives once and in its
    order, whichever way it goes.
    """

    __slots__ = ("_frames", "_leaving", "_queued", "closing", "polled", "transport", "upgrading", "written")

    def __init__(self, transport: Literal["polling", "websocket"]) -> None:
        self.transport: Literal["polling", "websocket"] = transport
        self.upgrading = False
        """A probe has been answered: the client is about to stop polling, and every poll is answered at once."""
        self.polled = False
        """A poll waits, or is being answered."""
        self.closing = False
        """The last that the next poll says is that the session has ended."""
        self.written = 0
        self._frames: list[PacketFrame] = []
        self._queued = 0
        self._leaving = 0

    @property
    def waiting(self) -> int:
        """How many bytes the client has not been sent yet."""
        return self._queued + self._leaving

    # Polling

    def push(self, frame: PacketFrame) -> None:
        """Have a frame wait for the next poll."""
        self._frames.append(frame)
        self.written += frame.size
        self._queued += frame.size

    def begin_poll(self) -> None:
        """A poll has come. Raises `InvalidMessage` where there is another one."""
        if self.polled:
            raise InvalidMessage("a second poll while the first one waits", 1002)
        self.polled = True

    @property
    def answerable(self) -> bool:
        """Whether a poll has something to be answered with."""
        return bool(self._frames) or self.closing

    def take(self) -> list[PacketFrame]:
        """All that waits, for the poll's answer; where nothing does, a packet that says nothing."""
        frames = list(self._frames)
        self._frames.clear()
        self._queued, self._leaving = 0, self._queued
        if self.closing:
            frames.append(_CLOSE)
        return frames or [_NOOP]

    def sending(self, left: int) -> None:
        """So many bytes of the poll's answer are still to be sent."""
        self._leaving = left

    def end_poll(self) -> None:
        """The poll has been answered."""
        self.polled = False
        self._leaving = 0

    def forget(self) -> None:
        """Drop all that waits: there is nobody any more to take it."""
        self._frames.clear()
        self._queued = 0

    # To a WebSocket

    def probe(self, packet: Packet) -> str | None:
        """What a packet on the WebSocket that the client tries is answered with; `None` where it has been the last
        word, and the WebSocket is the session's transport from here on.

        Raises `InvalidMessage` for a packet that nothing else than this socket suffers from.
        """
        if packet == (PING, PROBE) and not self.upgrading:
            self.upgrading = True
            return PONG + PROBE
        if packet == (UPGRADE, ""):
            self.transport = "websocket"
            self.upgrading = False
            return None
        raise InvalidMessage("a WebSocket is tried with a probe", 1002)

    def give_up_upgrade(self) -> None:
        """The WebSocket that was tried is gone; polling goes on."""
        self.upgrading = False

    def move(self) -> list[PacketFrame]:
        """What has waited for a poll and goes over the WebSocket now, in its order."""
        frames = list(self._frames)
        self.written -= self._queued
        self.forget()
        return frames


class Heartbeat:
    """Says when to ping, and when a client that doesn't answer is gone. Every `now` is of the same clock."""

    __slots__ = ("_extended", "_interval", "_pinged", "_timeout", "due")

    def __init__(self, interval: float, timeout: float, now: float) -> None:
        self._interval = interval
        self._timeout = timeout
        self._pinged = False
        self._extended = False
        self.due = now + interval
        """When to call `beat`."""

    def beat(self, now: float, *, deaf: bool) -> PacketFrame:
        """The ping that is due. Raises `TimeoutError` when the last one was not answered in time, unless we were
        `deaf`: what isn't read can't be heard."""
        if self._pinged and not deaf:
            raise TimeoutError
        self._pinged = True
        self._extended = False
        self.due = now + self._timeout
        return _PING

    def answered(self, now: float) -> None:
        """The client has answered the ping; an answer that nobody asked for is none."""
        if self._pinged:
            self._pinged = False
            self.due = now + self._interval

    def heard(self, now: float) -> None:
        """Something else has come, behind which the answer may be waiting: it gets once more the same time."""
        if self._pinged and not self._extended:
            self._extended = True
            self.due = now + self._timeout
