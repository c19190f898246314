"""The broker of a single process."""

import itertools
import secrets
from collections.abc import Callable

from asgi_ws.brokers.base import Broker, Deliver
from asgi_ws.messages import Position, Publication
from asgi_ws.payloads import Payload

__all__ = ["MemoryBroker"]


class MemoryBroker(Broker):
    """Delivers before `publish` returns, within this process.

    A channel's offsets are counted while somebody is subscribed; whenever a count begins, so does an epoch.
    """

    def __init__(self) -> None:
        self._deliver: Deliver | None = None
        self._positions: dict[str, Position] = {}
        self._start = secrets.token_hex(4)
        self._starts = itertools.count(1)

    async def start(self, deliver: Deliver, lost: Callable[[], None]) -> None:
        self._deliver = deliver

    async def stop(self) -> None:
        self._deliver = None
        self._positions.clear()

    async def publish(self, channel: str, payload: Payload, *, sender: str | None = None) -> Position:
        last = self._positions.get(channel)
        if last is None:
            # Nobody listens and nothing is kept: a stream of one publication, which is over.
            return Position(1, self._new_epoch())
        position = self._positions[channel] = Position(last.offset + 1, last.epoch)
        if self._deliver is not None:
            self._deliver(Publication(channel, payload, position, sender))
        return position

    async def subscribe(self, channel: str) -> None:
        self._positions[channel] = Position(0, self._new_epoch())

    async def unsubscribe(self, channel: str) -> None:
        del self._positions[channel]

    def _new_epoch(self) -> str:
        return f"{self._start}-{next(self._starts):x}"
