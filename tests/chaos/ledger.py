"""The checker: what was published, what was confirmed, and what every subscriber has got or was told."""

import asyncio
import dataclasses
import itertools
import time
from collections import defaultdict

from asgi_ws import Position, Recovery

__all__ = ["Follower", "Ledger"]

Key = tuple[str, str, int]
"""A channel, an epoch and an offset."""


@dataclasses.dataclass
class Follower:
    """A subscriber to one channel, who comes back with his last position whenever he was cut off."""

    name: str
    channel: str
    ledger: "Ledger"
    got: list[tuple[Position, str]] = dataclasses.field(default_factory=list)
    told: int = 0
    """How often he was told that he can't have all of it."""
    returns: int = 0
    first_seen: dict[str, float] = dataclasses.field(default_factory=dict)
    changed: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    began: bool = False

    def begin(self, recovery: Recovery, since: Position | None) -> None:
        """A subscription has begun, which was to begin behind `since`."""
        self.began = True
        if since is not None and not recovery.recovered:
            self.tell()

    def deliver(self, position: Position, data: str) -> None:
        self.got.append((position, data))
        self.first_seen.setdefault(data, time.monotonic())
        self.changed.set()

    def tell(self) -> None:
        self.told += 1
        # What comes from here on is the beginning of something new.
        self.ledger.breaks[self.name].append(len(self.got))

    async def until(self, data: str) -> None:
        """Wait until he has got this."""
        while data not in self.first_seen:
            self.changed.clear()
            await self.changed.wait()


class Ledger:
    """Follows every publication and every subscriber, and says at the end what was broken."""

    def __init__(self) -> None:
        self.attempted: defaultdict[str, set[str]] = defaultdict(set)
        self.confirmed: dict[Key, str] = {}
        self.confirmed_at: dict[str, float] = {}
        self.refused = 0
        self.followers: list[Follower] = []
        self.breaks: defaultdict[str, list[int]] = defaultdict(list)

    def follower(self, name: str, channel: str) -> Follower:
        follower = Follower(name, channel, self)
        self.followers.append(follower)
        return follower

    def attempt(self, channel: str, data: str) -> None:
        self.attempted[channel].add(data)

    def confirm(self, channel: str, data: str, position: Position | None) -> None:
        assert position is not None
        self.confirmed[channel, position.epoch, position.offset] = data
        self.confirmed_at[data] = time.monotonic()

    # The invariants

    def problems(self) -> list[str]:
        """Everything that was promised and not kept."""
        found: list[str] = []
        said: dict[Key, str] = dict(self.confirmed)
        for follower in self.followers:
            found += self._of_one(follower, said)
        return found

    def _of_one(self, follower: Follower, said: dict[Key, str]) -> list[str]:
        found = []
        name, channel = follower.name, follower.channel
        breaks = [0, *self.breaks[name], len(follower.got)]
        for begin, end in itertools.pairwise(breaks):
            for number in range(begin, end):
                position, data = follower.got[number]
                if data not in self.attempted[channel]:
                    found.append(f"{name}: {data!r} at {position} was never published")
                if said.setdefault((channel, position.epoch, position.offset), data) != data:
                    found.append(f"{name}: {data!r} at {position}, where others have another one")
                if number == begin:
                    continue
                before = follower.got[number - 1][0]
                if position.epoch != before.epoch:
                    found.append(f"{name}: from {before} to {position} without a word")
                elif position.offset <= before.offset:
                    found.append(f"{name}: {position} behind {before}: twice, or out of order")
                elif position.offset != before.offset + 1:
                    found.append(f"{name}: a silent gap from {before} to {position}")
        return found

    def missing(self) -> list[str]:
        """What was confirmed and hasn't reached a follower who was never told that he can't have all."""
        found = []
        for follower in self.followers:
            if follower.told:
                continue
            wanted = {data for (channel, _, _), data in self.confirmed.items() if channel == follower.channel}
            lacking = wanted - follower.first_seen.keys()
            if lacking:
                found.append(f"{follower.name}: {len(lacking)} of {len(wanted)} confirmed ones are missing")
        return found

    @property
    def delivered(self) -> int:
        return sum(len(follower.got) for follower in self.followers)

    @property
    def told(self) -> int:
        return sum(follower.told for follower in self.followers)

    def latencies_after(self, moment: float) -> list[float]:
        """For each follower, how long after a moment he got the first thing that was confirmed behind it."""
        later = {data for data, at in self.confirmed_at.items() if at >= moment}
        return [
            min((at for data, at in follower.first_seen.items() if data in later), default=float("inf")) - moment
            for follower in self.followers
        ]
