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
from asgi_ws.payloads import Payload, json_decoder, to_json
from asgi_ws.pubsub import PubSub, Subscription

__all__ = ["Member", "Presence", "PresenceEvent", "PresenceStats", "events_of"]

logger = logging.getLogger("asgi_ws")

EXPIRY = 60.0
"""How many seconds after its last sign of life a connection counts as gone; a process gives one for all of its own."""
REFRESH_INTERVAL = 25.0
GRACE = 5.0
"""How many seconds a user may be away, between two connections, without having left."""

_EVENTS = "\x1fpresence:"
"""What the channel of a channel's events begins with. No application can make such a name."""


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
        self._tasks: set[asyncio.Task[Any]] = set()
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
            await self.leave(channel, member.connection)
            raise
        await self._forget_those_who_left(channel, [member.connection])

    async def leave(self, channel: str, connection: str) -> None:
        """A connection has gone; others hear of it if nobody of the same user is there some seconds later."""
        members = self._members.get(channel, {})
        member = members.pop(connection, None)
        if not members:
            self._members.pop(channel, None)
        if member is None:
            return
        try:
            await self._broker.leave(channel, connection, grace=GRACE)
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
        if not self._watched[channel]:
            del self._watched[channel]

    async def stop(self) -> None:
        """Forget everything; those who are still here expire."""
        self._stopped = True
        for timer in (self._timer, *self._timers):
            if timer is not None:
                timer.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # Who has gone

    def _settle_later(self, channel: str, member: Member) -> None:
        if self._stopped:
            return

        def settle() -> None:
            self._timers.discard(timer)
            self._start(self._settle(channel, member))

        # A little later, so that the broker's clock has got there, too.
        timer = asyncio.get_running_loop().call_later(GRACE + 0.25, settle)
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
        for channel in {**self._members, **self._watched}:
            members = {each.connection: (each.key, to_json(each)) for each in self._members.get(channel, {}).values()}
            try:
                gone = await self._broker.refresh(channel, members, expiry=EXPIRY)
                await self._forget_those_who_left(channel, members)
                for key in gone:
                    kind, _, name = key.partition(":")
                    user, connection = (name, None) if kind == "u" else (None, name)
                    await self._tell(PresenceEvent("leave", channel, user, connection))
            except BrokerError as error:
                logger.warning("who is in %r could not be refreshed: %s", channel, error)
        if self._members or self._watched:
            self._refresh_later()

    async def _forget_those_who_left(self, channel: str, connections: Iterable[str]) -> None:
        """Whoever left while the broker was told that he is there may have been entered again by that."""
        here = self._members.get(channel, {})
        for connection in connections:
            if connection not in here:
                await self._broker.leave(channel, connection, grace=GRACE)

    async def _tell(self, event: PresenceEvent) -> None:
        await self._pubsub.publish(events_of(event.channel), Payload("json", to_json(event)))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="asgi_ws presence")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


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
