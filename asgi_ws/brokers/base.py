"""The contract between a process and the others: what a broker owes."""

import abc
from collections.abc import Callable, Mapping

from asgi_ws.messages import History, Position, Publication, Retention
from asgi_ws.payloads import Payload

__all__ = ["Broker", "Deliver", "HistoryBroker", "PresenceBroker"]

Deliver = Callable[[Publication], None]
"""Called with each publication; never waits and never raises."""


class Broker(abc.ABC):
    """Joins processes: what one publishes is delivered in all that subscribed. It knows no subscribers, only channels.

    What it owes: one order per channel, the same for all processes. Own publications come back by the same way as
    everybody's. `deliver` is called on the event loop, for subscribed channels only, and not after `stop`. After a lost
    link it subscribes again by itself and then calls `lost`. It never reports a success that it did not see.
    """

    @abc.abstractmethod
    async def start(self, deliver: Deliver, lost: Callable[[], None]) -> None:
        """Connect. Raises `BrokerError` when that isn't possible."""

    @abc.abstractmethod
    async def stop(self) -> None:
        """Disconnect. Nothing is delivered afterwards."""

    @abc.abstractmethod
    async def publish(self, channel: str, payload: Payload, *, sender: str | None = None) -> Position | None:
        """Publish to a channel; its position there, where the broker keeps count. Raises `BrokerError` when the
        publication may not have gone out. `sender` travels with it."""

    @property
    def spans_processes(self) -> bool:
        """Whether it joins more than this process."""
        return True

    @abc.abstractmethod
    async def subscribe(self, channel: str) -> None:
        """From the return of this call on, what is published to the channel is delivered. Never called for a channel
        that is subscribed already."""

    @abc.abstractmethod
    async def unsubscribe(self, channel: str) -> None:
        """The end of that. Never called for a channel that isn't subscribed."""


class HistoryBroker(Broker):
    """A broker that remembers. For channels with a retention it owes more: publishing, keeping and delivering are one
    step, so that the order of deliveries is that of the history; each publication has a position, whose offset is one
    more than that of the one before; and the epoch changes whenever offsets may have started again."""

    @abc.abstractmethod
    async def publish(
        self, channel: str, payload: Payload, *, sender: str | None = None, retention: Retention | None = None
    ) -> Position | None:
        """Publish, and keep it as long as `retention` says; without one it isn't kept."""

    @abc.abstractmethod
    async def history(self, channel: str, *, since: Position | None, limit: int | None) -> History:
        """What is kept of a channel, oldest first, and the position of its latest publication.

        Without `since` the latest `limit` ones; with it the first `limit` of those that come after, and none when it
        is of another epoch. `limit=0` asks for the position only. A channel that has none yet gets one, with offset 0,
        that stays valid when it is published to. Raises `BrokerError`.
        """

    @abc.abstractmethod
    async def remember(self, name: str, value: str, *, ttl: float | None = None) -> None:
        """Keep a few words for all processes, those from outside included, for `ttl` seconds or for ever. Raises
        `BrokerError`."""

    @abc.abstractmethod
    async def recall(self, name: str) -> str | None:
        """What `remember` was last given by that name, in whatever process. Raises `BrokerError`."""

    @abc.abstractmethod
    async def take(self, name: str) -> str | None:
        """The same, and forget it: of all who ask only one gets it. Raises `BrokerError`."""


class PresenceBroker(Broker):
    """A broker that knows who is in a channel, over all processes.

    A member is a connection; `key` is what others know it by, the same for all connections of one user. Members are
    forgotten `expiry` seconds after the last `enter` or `refresh`, so that those of a dead process vanish. Everything
    here raises `BrokerError`.
    """

    @abc.abstractmethod
    async def enter(self, channel: str, connection: str, key: str, value: str, *, expiry: float) -> bool:
        """A member comes, or has a new value. Whether its key is new: no member had it, it doesn't linger, and it
        hasn't gone without anybody being told."""

    @abc.abstractmethod
    async def leave(self, channel: str, connection: str, *, grace: float) -> None:
        """A member goes. If it was the last one of its key, the key lingers for `grace` seconds, unseen."""

    @abc.abstractmethod
    async def settle(self, channel: str, key: str) -> bool:
        """Whether the key has gone for good: it lingered, its grace is over, and no member has it. True once only,
        whoever asks."""

    @abc.abstractmethod
    async def refresh(self, channel: str, members: Mapping[str, tuple[str, str]], *, expiry: float) -> list[str]:
        """These connections, with their keys and values, are still here. The keys that have gone meanwhile because the
        last of their members expired, or because a grace ended that nobody has settled; each is told once."""

    @abc.abstractmethod
    async def members(self, channel: str) -> dict[str, str]:
        """The values by connection, in the order in which they came as far as the broker knows it."""

    @abc.abstractmethod
    async def count(self, channel: str) -> tuple[int, int]:
        """How many connections there are, and how many keys."""
