"""The contract between a process and the others: what a broker owes."""

import abc
from collections.abc import Callable

from asgi_ws.messages import Position, Publication
from asgi_ws.payloads import Payload

__all__ = ["Broker", "Deliver"]

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

    @abc.abstractmethod
    async def subscribe(self, channel: str) -> None:
        """From the return of this call on, what is published to the channel is delivered. Never called for a channel
        that is subscribed already."""

    @abc.abstractmethod
    async def unsubscribe(self, channel: str) -> None:
        """The end of that. Never called for a channel that isn't subscribed."""
