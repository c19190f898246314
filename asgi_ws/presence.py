"""Who is in a channel, over all processes."""

import asyncio
import dataclasses
import logging
import random
from collections import Counter
from collections.abc import Coroutine, Iterable
from typing import Any, Literal

from asgi_ws.brokers import PresenceBroker
from asgi_ws.exceptions import BrokerError
from asgi_ws.messages import INTERNAL
from asgi_ws.payloads import Payload, json_decoder, to_json
from asgi_ws.pubsub import PubSub, Subscription
from asgi_ws.tasks import Tasks

__all__ = ["Member", "Presence", "PresenceEvent", "PresenceStats", "events_of"]

logger = logging.getLogger("asgi_ws")

EXPIRY = 60.0
"""How many seconds after its last sign of life a connection counts as gone; a process gives one for all of its own."""
REFRESH_INTERVAL = 25.0
GRACE = 5.0
"""How many seconds a user may be away, between two connections, without having left."""

LATER = 0.25
"""How much later it is asked whether that has ended, so that the broker's clock has got there, too."""
_REFRESHES_AT_ONCE = 32

_EVENTS = f"{INTERNAL}presence:"
"""What the channel of a channel's events begins with."""


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A connection in a channel: its id, its user's if it has one, and what it said of itself when it subscribed."""

    connection: str
    user: str | None = None
    info: Any = None

    @property
    def key(self) -> str:
        """What others know it by: all connections of a user are one to them."""
        return f"c:{self.connection}" if self.user is None else f"u:{self.user}"


@dataclasses.dataclass(frozen=True, slots=True)
class PresenceStats:
    """How many connections are in a channel, and of how many users; each without a user counts as one."""

    connections: int
    users: int


@dataclasses.dataclass(frozen=True, slots=True)
class PresenceEvent:
    """Somebody has come to a channel, or has left it: with the first or the last of his connections."""

    type: Literal["join", "leave"]
    channel: str
    user: str | None
    connection: str | None
    """The connection that came or went; `None` for a user whose last connections vanished with their process."""
    info: Any = None


_read_member = json_decoder(Member)


def events_of(channel: str) -> str:
    """The channel of a channel's events."""
    return _EVENTS + channel


class Presence:
    """The members that this process has brought to channels, and questions about all of them.

    A member whose process dies is forgotten by the others after a minute. A user who comes back within five seconds
    has neither left nor come.
    """

    def __init__(self, broker: PresenceBroker, pubsub: PubSub) -> None:
        self._broker = broker
        self._pubsub = pubsub
        self._members: dict[str, dict[str, Member]] = {}
        self._watched: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self._timers: set[asyncio.TimerHandle] = set()
        self._tasks = Tasks()
        self._stopped = False

    async def enter(self, channel: str, member: Member) -> None:
        """A connection has come. Raises `BrokerError`, and `TypeError` for an `info` that JSON can't say."""
        value = to_json(member)
        self._members.setdefault(channel, {})[member.connection] = member
        self._refresh_later()
        try:
            is_new = await self._broker.enter(channel, member.connection, member.key, value, expiry=EXPIRY)
            if is_new:
                await self._tell(PresenceEvent("join", channel, member.user, member.connection, member.info))
        except BaseException:
            self.leave(channel, member.connection)
            raise
        await self._forget_those_who_left(channel, [member])

    def leave(self, channel: str, connection: str) -> asyncio.Task[None] | None:
        """A connection has gone, from this call on; others hear of it if nobody of the same user is there some seconds
        later. The task tells the broker; there is none for one that wasn't here."""
        members = self._members.get(channel, {})
        member = members.pop(connection, None)
        if not members:
            self._members.pop(channel, None)
        if member is None or self._stopped:
            return None
        return self._start(self._tell_broker(channel, member))

    async def _tell_broker(self, channel: str, member: Member) -> None:
        try:
            await self._broker.leave(channel, member.connection, grace=GRACE)
        except BrokerError as error:
            logger.warning("the broker could not be told who left %r; they expire: %s", channel, error)
        self._settle_later(channel, member)

    async def members(self, channel: str) -> list[Member]:
        """Everybody who is in a channel. Raises `BrokerError`."""
        values = await self._broker.members(channel)
        return [_read_member(value) for value in values.values()]

    async def stats(self, channel: str) -> PresenceStats:
        """How many they are. Raises `BrokerError`."""
        return PresenceStats(*await self._broker.count(channel))

    def events(self, channel: str, size: int) -> Subscription:
        """The events of a channel, for the server's own code."""
        return _Events(self, self._pubsub, channel, size)

    def watch(self, channel: str) -> None:
        """Somebody in this process wants to know who comes and goes, until `unwatch`."""
        self._watched[channel] += 1
        self._refresh_later()

    def unwatch(self, channel: str) -> None:
        """The end of that."""
        self._watched[channel] -= 1
        if self._watched[channel] <= 0:  # less, when the hub was started anew meanwhile
            del self._watched[channel]

    async def stop(self) -> None:
        """Forget everything; those who are still here expire."""
        self._stopped = True
        for timer in (self._timer, *self._timers):
            if timer is not None:
                timer.cancel()
        await self._tasks.cancel()

    # Who has gone

    def _settle_later(self, channel: str, member: Member) -> None:
        if self._stopped:
            return

        def settle() -> None:
            self._timers.discard(timer)
            self._start(self._settle(channel, member))

        timer = asyncio.get_running_loop().call_later(GRACE + LATER, settle)
        self._timers.add(timer)

    async def _settle(self, channel: str, member: Member) -> None:
        try:
            if await self._broker.settle(channel, member.key):
                await self._tell(PresenceEvent("leave", channel, member.user, member.connection, member.info))
        except BrokerError as error:
            logger.warning("whether %r has left %r is not known: %s", member.key, channel, error)

    def _refresh_later(self) -> None:
        if self._timer is None and not self._stopped:
            delay = random.uniform(0.75, 1.0) * REFRESH_INTERVAL
            self._timer = asyncio.get_running_loop().call_later(delay, self._refresh)

    def _refresh(self) -> None:
        self._timer = None
        self._start(self._refresh_all())

    async def _refresh_all(self) -> None:
        waiting = iter({**self._members, **self._watched})
        # Many at a time: all have to be done before the first expire.
        outcomes = await asyncio.gather(*(self._refresh_some(waiting) for _ in range(_REFRESHES_AT_ONCE)))
        errors = [error for error in outcomes if error is not None]
        if errors:
            logger.warning("who is in some channels could not be refreshed: %s", errors[0])
        if self._members or self._watched:
            self._refresh_later()

    async def _refresh_some(self, waiting: Iterable[str]) -> BrokerError | None:
        failure = None
        for channel in waiting:
            here = list(self._members.get(channel, {}).values())
            members = {each.connection: (each.key, to_json(each)) for each in here}
            try:
                gone = await self._broker.refresh(channel, members, expiry=EXPIRY)
                await self._forget_those_who_left(channel, here)
                for key in gone:
                    kind, _, name = key.partition(":")
                    user, connection = (name, None) if kind == "u" else (None, name)
                    await self._tell(PresenceEvent("leave", channel, user, connection))
            except BrokerError as error:
                failure = error
        return failure

    async def _forget_those_who_left(self, channel: str, members: Iterable[Member]) -> None:
        """Whoever left while the broker was told that he is there may have been entered again by that."""
        here = self._members.get(channel, {})
        for member in members:
            if member.connection not in here:
                await self._tell_broker(channel, member)

    async def _tell(self, event: PresenceEvent) -> None:
        await self._pubsub.publish(events_of(event.channel), Payload("json", to_json(event)))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._tasks.start(work, "asgi_ws presence")


class _Events(Subscription):
    """A subscription to a channel's events, which are looked after as long as it lasts."""

    def __init__(self, presence: Presence, pubsub: PubSub, channel: str, size: int) -> None:
        super().__init__(pubsub, events_of(channel), size)
        self._presence = presence
        self._watched = channel

    async def __aenter__(self) -> "_Events":
        await super().__aenter__()
        self._presence.watch(self._watched)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._presence.unwatch(self._watched)
        await super().__aexit__(*error)
