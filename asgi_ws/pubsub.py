"""Who subscribes to what in this process, and the one loop over subscribers."""

import asyncio
import typing
from collections import deque
from collections.abc import Iterable

from asgi_ws.brokers import Broker
from asgi_ws.exceptions import SubscriberTooSlow
from asgi_ws.messages import Position, Publication
from asgi_ws.payloads import Payload

__all__ = ["PubSub", "Subscriber", "Subscription"]


class Subscriber(typing.Protocol):
    """Whatever can be pushed to."""

    def push(self, publication: Publication) -> None:
        """Take a publication. Never waits, never raises."""
        ...


class _Channel:
    """The subscribers of one channel, and whether the broker knows that there are some."""

    __slots__ = ("lock", "subscribed", "subscribers", "users")

    def __init__(self) -> None:
        self.subscribers: dict[Subscriber, None] = {}
        self.subscribed = False
        self.users = 0
        self.lock = asyncio.Lock()


class PubSub:
    """Channels and their subscribers. What is published to a channel reaches all of them in the same order."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._channels: dict[str, _Channel] = {}
        self.subscriptions: set[Subscription] = set()

    async def start(self) -> None:
        """Start the broker. Raises `BrokerError`."""
        await self._broker.start(self.deliver, self._lost)

    async def stop(self) -> None:
        """Stop the broker; nothing is delivered any more, and subscriptions end."""
        await self._broker.stop()
        self._channels.clear()
        for subscription in self.subscriptions:
            subscription.end()

    async def publish(self, channel: str, payload: Payload, *, sender: str | None = None) -> Position | None:
        """Hand a publication to the broker. Raises `BrokerError`."""
        return await self._broker.publish(channel, payload, sender=sender)

    async def subscribe(self, channel: str, subscriber: Subscriber) -> None:
        """From the return of this call on, the subscriber gets what is published to the channel."""
        entry = self._channels.get(channel)
        if entry is None:
            entry = self._channels[channel] = _Channel()
        if not entry.subscribed:
            entry.users += 1
            try:
                # The broker is asked under the channel's lock: the first subscriber's request must not be overtaken
                # by the second's, nor by the last unsubscribe of those who were here before.
                async with entry.lock:
                    await self._take(channel, entry)
            finally:
                entry.users -= 1
                self._forget_if_idle(channel, entry)
        entry.subscribers[subscriber] = None

    async def unsubscribe(self, channels: Iterable[str], subscriber: Subscriber) -> None:
        """Nothing of these channels is pushed to the subscriber any more, from this call on, not from its return."""
        for channel in [channel for channel in channels if self._remove(channel, subscriber)]:
            entry = self._channels.get(channel)
            if entry is None:
                # While the broker was busy with another channel, this one was released for somebody else, or all were.
                continue
            entry.users += 1
            try:
                async with entry.lock:
                    await self._release(channel, entry)
            finally:
                entry.users -= 1
                self._forget_if_idle(channel, entry)

    def _remove(self, channel: str, subscriber: Subscriber) -> bool:
        """Whether this was the channel's last subscriber."""
        entry = self._channels.get(channel)
        if entry is None or subscriber not in entry.subscribers:
            return False
        del entry.subscribers[subscriber]
        return not entry.subscribers

    def deliver(self, publication: Publication) -> None:
        """Push a publication to the channel's subscribers. Called by the broker."""
        entry = self._channels.get(publication.channel)
        if entry is not None:
            for subscriber in tuple(entry.subscribers):
                subscriber.push(publication)

    async def _take(self, channel: str, entry: _Channel) -> None:
        if not entry.subscribed:
            await self._broker.subscribe(channel)
            entry.subscribed = True

    async def _release(self, channel: str, entry: _Channel) -> None:
        if entry.subscribed and not entry.subscribers:
            entry.subscribed = False
            await self._broker.unsubscribe(channel)

    def _forget_if_idle(self, channel: str, entry: _Channel) -> None:
        if not entry.users and not entry.subscribed and self._channels.get(channel) is entry:
            del self._channels[channel]

    def _lost(self) -> None:
        """The broker's link was lost and is back. Without history there is no position to compare."""


class Subscription:
    """Publications of one channel for the server's own code: `async with` subscribes, `async for` reads.

    What is not read yet waits, `size` bytes of it at the most; when that isn't enough, the iterator raises
    `SubscriberTooSlow` behind what it still has. It ends when the hub stops.
    """

    def __init__(self, pubsub: PubSub, channel: str, size: int) -> None:
        self.channel = channel
        self._pubsub = pubsub
        self._size = size
        self._waiting: deque[Publication] = deque()
        self._waiting_size = 0
        self._too_slow = False
        self._ended = False
        self._reader: asyncio.Future[None] | None = None

    def push(self, publication: Publication) -> None:
        """Take a publication. Called by the hub."""
        size = publication.payload.size
        if self._waiting and self._waiting_size + size > self._size:
            self._too_slow = True
        if not self._too_slow:
            self._waiting.append(publication)
            self._waiting_size += size
            self._wake()

    def end(self) -> None:
        """Let the iterator end behind what it still has. Called by the hub."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def __aiter__(self) -> "Subscription":
        return self

    async def __anext__(self) -> Publication:
        while not self._waiting:
            if self._too_slow:
                raise SubscriberTooSlow(self.channel)
            if self._ended:
                raise StopAsyncIteration
            if self._reader is not None and not self._reader.done():
                raise RuntimeError("another task reads this subscription already; give each task one of its own")
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        publication = self._waiting.popleft()
        self._waiting_size -= publication.payload.size
        return publication

    async def __aenter__(self) -> "Subscription":
        # First, so that a hub that stops meanwhile ends it, too.
        self._pubsub.subscriptions.add(self)
        try:
            await self._pubsub.subscribe(self.channel, self)
        except BaseException:
            self._pubsub.subscriptions.discard(self)
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self._pubsub.subscriptions.discard(self)
        await self._pubsub.unsubscribe([self.channel], self)
