"""What is known of a socket that may come back: how far its client had got in each of its rooms. No I/O.

Every event that can be sent again says its position, and a client that comes back names the last one it has had. One
connection has one order: what was sent behind that event is what the client lacks, and what came to the rooms since.
"""

import asyncio
import hashlib
import secrets
import zlib
from collections import deque
from typing import Any, Final

import msgspec

from asgi_ws.messages import Position
from asgi_ws.payloads import json_decoder, to_json

__all__ = ["RECOVERABLE", "Mark", "Session", "Sessions", "name_of_session", "token_of"]

_MAX_LOG: Final = 1000
"""How many events may be on their way to a client: one that lacks more can't say where it was."""

RECOVERABLE: Final = frozenset({"transport close", "transport error", "ping timeout", "server shutting down"})
"""The reasons after which a client comes back by itself. Who was sent away, or has gone, isn't waited for."""

_MAX_IDS: Final = 64
_MAX_SAVED: Final = 300
"""How many of them another process is told of."""


def token_of(channel: str, position: Position) -> str:
    """A publication's position, for a client that can name one string for all of its rooms."""
    return f"{position}:{zlib.crc32(channel.encode()):x}"


def name_of_session(namespace: str, pid: str) -> str:
    """By what the session with this secret is kept for other processes."""
    return "socketio:" + hashlib.sha256(f"{namespace},{pid}".encode()).hexdigest()


class Mark:
    """A publication, as a session remembers it; shared by all that got it."""

    __slots__ = ("channel", "id", "position", "token")

    def __init__(self, channel: str, position: Position, id_: str | None) -> None:
        self.token = token_of(channel, position)
        self.channel = channel
        self.position = position
        self.id = id_


class Session:
    """A socket's id, rooms and data, and what was sent to it."""

    __slots__ = (
        "_ids",
        "_log",
        "_token",
        "data",
        "finishing",
        "pid",
        "positions",
        "rooms",
        "shared",
        "sid",
        "user",
        "whole",
    )

    def __init__(self, sid: str, user: str | None) -> None:
        self.pid = secrets.token_urlsafe(24)
        """What the client shows when it comes back; a secret."""
        self.sid = sid
        self.user = user
        self.rooms: set[str] = {sid}
        self.data: dict[str, Any] = {}
        self.positions: dict[str, Position] = {}
        """Where each channel was before all that is in the log."""
        self.whole = True
        """Whether all of its channels have positions, and nothing was lost of them."""
        self.finishing: asyncio.Task[None] | None = None
        """What is still to be done for the socket that had this session."""
        self.shared = False
        """Whether other processes can have it."""
        self._log: deque[Mark] = deque()
        # The event before the log, and the ids of events before it that went to several rooms.
        self._token: str | None = None
        self._ids: tuple[str, ...] = ()

    def joined(self, channel: str, position: Position | None) -> None:
        """From this position on, the socket gets what is published to the channel."""
        if position is None:
            self.whole = False
        else:
            self.positions[channel] = position

    def left(self, channel: str) -> None:
        """It gets nothing of that any more."""
        self.positions.pop(channel, None)

    def sent(self, mark: Mark) -> None:
        """A publication was sent, or was none for this socket."""
        self._log.append(mark)
        if len(self._log) > _MAX_LOG:
            oldest = self._log.popleft()
            self._token = oldest.token
            _advance(self.positions, oldest)

    def resume(self, token: str | None) -> "Session | None":
        """The session where its client was when it had got the event of this token, or none at all; what was sent
        behind that is missing. `None` when that isn't known."""
        if not self.whole:
            return None
        again = Session(self.sid, self.user)
        again.pid, again.data, again.rooms = self.pid, self.data, set(self.rooms)
        again.positions, again._token, again._ids = self.positions.copy(), token, self._ids
        if token == self._token:
            return again
        ids = []
        for mark in self._log:
            _advance(again.positions, mark)
            if mark.id is not None:
                ids.append(mark.id)
            if mark.token == token:
                again._ids = (*self._ids, *ids)[-_MAX_IDS:]
                return again
        return None

    def save(self) -> str:
        """All of it but its secret, for another process. Raises `TypeError` where the application's data isn't JSON."""
        log, positions, token = list(self._log), self.positions.copy(), self._token
        for mark in log[:-_MAX_SAVED]:
            token = mark.token
            _advance(positions, mark)
        saved = _Saved(
            self.sid,
            self.user,
            sorted(self.rooms),
            self.data,
            {channel: str(position) for channel, position in positions.items()},
            [(mark.channel, str(mark.position), mark.id) for mark in log[-_MAX_SAVED:]],
            token,
            self._ids,
        )
        return to_json(saved)

    @classmethod
    def load(cls, pid: str, text: str | bytes) -> "Session":
        """What `save` has made. Raises `InvalidMessage` or `InvalidPosition`."""
        saved = _read_saved(text)
        session = cls(saved.sid, saved.user)
        session.pid, session.data, session.rooms = pid, saved.data, set(saved.rooms)
        session.positions = {channel: Position.parse(text) for channel, text in saved.positions.items()}
        session._log.extend(Mark(channel, Position.parse(text), id_) for channel, text, id_ in saved.log)
        session._token, session._ids = saved.token, saved.ids
        return session

    @property
    def ids(self) -> tuple[str, ...]:
        """The events that went to several rooms and have been sent, as far as one may still come another way."""
        return self._ids


class _Saved(msgspec.Struct, array_like=True):
    sid: str
    user: str | None
    rooms: list[str]
    data: dict[str, Any]
    positions: dict[str, str]
    log: list[tuple[str, str, str | None]]
    token: str | None
    ids: tuple[str, ...]


_read_saved = json_decoder(_Saved)


def _advance(positions: dict[str, Position], mark: Mark) -> None:
    known = positions.get(mark.channel)
    if known is not None and known.epoch == mark.position.epoch and known.offset < mark.position.offset:
        positions[mark.channel] = mark.position


class Sessions:
    """The sessions of those who have gone and may come back, for `time` seconds, and `most` of them."""

    def __init__(self, time: float, most: int | None) -> None:
        self.time = time
        """How many seconds a client is waited for."""
        self._most = most
        self._sessions: dict[str, tuple[Session, asyncio.TimerHandle]] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def keep(self, session: Session) -> None:
        """Wait for a client; the one who has been waited for longest is given up where there are too many."""
        if self._most is not None and len(self._sessions) >= self._most:
            self._sessions.pop(next(iter(self._sessions)))[1].cancel()
        timer = asyncio.get_running_loop().call_later(self.time, self._sessions.pop, session.pid, None)
        self._sessions[session.pid] = (session, timer)

    def take(self, pid: str, user: str | None) -> Session | None:
        """The session of a client that has come back, for the same user. It comes once."""
        session, timer = self._sessions.get(pid, (None, None))
        if session is None or timer is None or session.user != user:
            return None
        del self._sessions[pid]
        timer.cancel()
        return session
