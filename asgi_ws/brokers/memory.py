"""The broker of a single process."""

import asyncio
import heapq
import itertools
import math
import secrets
from collections import Counter, deque
from collections.abc import Callable, Mapping

from asgi_ws.brokers.base import Deliver, HistoryBroker, PresenceBroker
from asgi_ws.messages import History, Position, Publication, Retention
from asgi_ws.payloads import Payload
from asgi_ws.tables import Table

__all__ = ["MemoryBroker"]

_SWEEP_INTERVAL = 5.0
"""How often what has expired is looked for, in seconds."""
_SHARES = 4096
"""Into how many shares channels are divided, of which each has its epoch."""
_UNSETTLED = 10.0
"""How many seconds after its grace a key has gone even if whoever let it go didn't come back to settle it."""


class _Channel:
    """What is known of a channel: as long as somebody is subscribed, or publications are kept."""

    __slots__ = ("epoch", "expires", "kept", "offset", "subscribed")

    def __init__(self) -> None:
        self.offset = 0
        self.epoch = ""
        self.subscribed = False
        self.kept: deque[Publication] | None = None
        self.expires = 0.0


class _Presence:
    """The members of a channel and their keys; the keys that linger; and those that have gone and nobody was told."""

    __slots__ = ("_expiries", "gone", "keys", "lingering", "members")

    def __init__(self) -> None:
        self.members: dict[str, tuple[str, str, float]] = {}
        self.keys: Counter[str] = Counter()
        self.lingering: dict[str, float] = {}
        self.gone: dict[str, None] = {}
        self._expiries: list[tuple[float, str]] = []

    def add(self, connection: str, key: str, value: str, expires: float) -> None:
        before = self.members.get(connection)
        if before is not None and before[0] != key:
            self.remove(connection)
        if before is None or before[0] != key:
            self.keys[key] += 1
        self.members[connection] = (key, value, expires)
        heapq.heappush(self._expiries, (expires, connection))

    def remove(self, connection: str) -> str | None:
        """The member's key, if it was the last one of it."""
        member = self.members.pop(connection, None)
        if member is None:
            return None
        key = member[0]
        self.keys[key] -= 1
        if self.keys[key]:
            return None
        del self.keys[key]
        return key

    def expire(self, now: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            _, connection = heapq.heappop(self._expiries)
            member = self.members.get(connection)
            if member is not None and member[2] <= now:
                key = self.remove(connection)
                if key is not None:
                    self.gone[key] = None
        # As long as somebody can come back unnoticed, nobody is told.
        for key in [key for key, until in self.lingering.items() if until + _UNSETTLED <= now]:
            del self.lingering[key]
            self.gone[key] = None

    @property
    def is_empty(self) -> bool:
        return not (self.members or self.lingering or self.gone)


class MemoryBroker(HistoryBroker, PresenceBroker):
    """Delivers before `publish` returns, within this process.

    A channel is known while somebody is subscribed or publications are kept. When it was forgotten, its offsets begin
    again, and another epoch does.
    """

    spans_processes = False

    def __init__(self) -> None:
        self._deliver: Deliver | None = None
        self._channels: Table[str, _Channel] = Table()
        self._presence: Table[str, _Presence] = Table()
        self._words: dict[str, tuple[str, float]] = {}
        self._name = secrets.token_hex(4)
        # Channels share epochs, so that it stays that of one which is forgotten before anything was published to it:
        # none of its offsets was used. When another one is forgotten, the next epoch begins, for a few of them.
        self._generations: Counter[int] = Counter()
        self._unkept = itertools.count(1)
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self, deliver: Deliver, lost: Callable[[], None]) -> None:
        self._deliver = deliver

    async def stop(self) -> None:
        self._deliver = None
        self._name = secrets.token_hex(4)
        self._channels.clear()
        self._presence.clear()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    async def publish(
        self, channel: str, payload: Payload, *, sender: str | None = None, retention: Retention | None = None
    ) -> Position:
        entry = self._channels.get(channel)
        if entry is None:
            if retention is None:
                # Nobody listens and nothing is kept: a stream of one publication, which is over.
                return Position(1, self._unkept_epoch())
            entry = self._channels[channel] = _Channel()
        if not entry.epoch:
            entry.epoch = self._unkept_epoch() if retention is None else self._epoch(channel)
        entry.offset += 1
        position = Position(entry.offset, entry.epoch)
        publication = Publication(channel, payload, position, sender)
        if retention is not None:
            self._keep(entry, publication, retention)
        if entry.subscribed and self._deliver is not None:
            self._deliver(publication)
        return position

    async def subscribe(self, channel: str) -> None:
        entry = self._channels.get(channel)
        if entry is None:
            entry = self._channels[channel] = _Channel()
        entry.subscribed = True

    async def unsubscribe(self, channel: str) -> None:
        entry = self._channels[channel]
        entry.subscribed = False
        self._forget_if_idle(channel, entry)

    async def history(self, channel: str, *, since: Position | None, limit: int | None) -> History:
        entry = self._channels.get(channel)
        if entry is not None and self._expire(channel, entry):
            entry = None
        if entry is None:
            return History((), Position(0, self._epoch(channel)))
        if not entry.epoch:
            entry.epoch = self._epoch(channel)
        top = Position(entry.offset, entry.epoch)
        kept = tuple(entry.kept or ())
        if since is None:
            first = 0 if limit is None else max(len(kept) - limit, 0)
            return History(kept[first:], top)
        if since.epoch != top.epoch:
            return History((), top)
        first = max(since.offset - (top.offset - len(kept)), 0)
        return History(kept[first:][:limit], top)

    async def remember(self, name: str, value: str, *, ttl: float | None = None) -> None:
        self._words[name] = (value, math.inf if ttl is None else _now() + ttl)
        if ttl is not None:
            self._sweep_later()

    async def recall(self, name: str) -> str | None:
        value, expires = self._words.get(name, (None, math.inf))
        return value if expires > _now() else None

    async def take(self, name: str) -> str | None:
        value, expires = self._words.pop(name, (None, math.inf))
        return value if expires > _now() else None

    # Presence

    async def enter(self, channel: str, connection: str, key: str, value: str, *, expiry: float) -> bool:
        entry = self._presence_of(channel)
        is_new = key not in entry.keys and key not in entry.lingering and key not in entry.gone
        entry.lingering.pop(key, None)
        entry.gone.pop(key, None)
        entry.add(connection, key, value, _now() + expiry)
        return is_new

    async def leave(self, channel: str, connection: str, *, grace: float) -> None:
        entry = self._presence_of(channel)
        key = entry.remove(connection)
        if key is not None:
            entry.lingering[key] = _now() + grace
        self._forget_if_empty(channel)

    async def settle(self, channel: str, key: str) -> bool:
        entry = self._presence_of(channel)
        over = entry.lingering.get(key, math.inf) <= _now()
        if over:
            del entry.lingering[key]
        self._forget_if_empty(channel)
        return over

    async def refresh(self, channel: str, members: Mapping[str, tuple[str, str]], *, expiry: float) -> list[str]:
        entry = self._presence_of(channel)
        for connection, (key, value) in members.items():
            entry.gone.pop(key, None)
            entry.lingering.pop(key, None)
            entry.add(connection, key, value, _now() + expiry)
        gone, entry.gone = list(entry.gone), {}
        self._forget_if_empty(channel)
        return gone

    async def members(self, channel: str) -> dict[str, str]:
        members = {connection: value for connection, (_, value, _) in self._presence_of(channel).members.items()}
        self._forget_if_empty(channel)
        return members

    async def count(self, channel: str) -> tuple[int, int]:
        entry = self._presence_of(channel)
        counts = len(entry.members), len(entry.keys)
        self._forget_if_empty(channel)
        return counts

    def _presence_of(self, channel: str) -> _Presence:
        """Who is in a channel now."""
        entry = self._presence.setdefault(channel, _Presence())
        entry.expire(_now())
        return entry

    def _forget_if_empty(self, channel: str) -> None:
        if self._presence[channel].is_empty:
            del self._presence[channel]

    # What is forgotten, and when

    def _keep(self, entry: _Channel, publication: Publication, retention: Retention) -> None:
        if entry.kept is None or entry.kept.maxlen != retention.size:
            entry.kept = deque(entry.kept or (), retention.size)
        elif entry.expires <= _now():
            entry.kept.clear()
        entry.kept.append(publication)
        entry.expires = _now() + retention.ttl
        self._sweep_later()

    def _expire(self, channel: str, entry: _Channel) -> bool:
        """Whether the channel was forgotten by that."""
        if entry.kept is None or entry.expires > _now():
            return False
        entry.kept.clear()
        return self._forget_if_idle(channel, entry)

    def _forget_if_idle(self, channel: str, entry: _Channel) -> bool:
        if entry.subscribed or entry.kept:
            return False
        del self._channels[channel]
        if entry.offset and entry.epoch == self._epoch(channel):
            self._generations[_share(channel)] += 1
        return True

    def _sweep_later(self) -> None:
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_INTERVAL, self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        for channel, entry in list(self._channels.items()):
            self._expire(channel, entry)
        self._words = {name: words for name, words in self._words.items() if words[1] > _now()}
        words_expire = any(expires < math.inf for _, expires in self._words.values())
        if words_expire or any(entry.kept for entry in self._channels.values()):
            self._sweep_later()

    def _epoch(self, channel: str) -> str:
        """The present one of those that the channel shares it with."""
        return f"{self._name}-{self._generations.get(_share(channel), 0):x}"

    def _unkept_epoch(self) -> str:
        return f"{self._name}.{next(self._unkept):x}"


def _share(channel: str) -> int:
    return hash(channel) % _SHARES


def _now() -> float:
    return asyncio.get_running_loop().time()
