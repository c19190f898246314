"""Several hubs in one process, joined as a server would join processes, which does whatever a test tells it to."""

import asyncio
from collections.abc import Callable, Mapping

from asgi_ws.brokers import HistoryBroker, MemoryBroker, PresenceBroker
from asgi_ws.brokers.base import Deliver
from asgi_ws.exceptions import BrokerError
from asgi_ws.messages import History, Position, Publication, Retention
from asgi_ws.payloads import Payload

__all__ = ["Bus", "BusBroker"]


class Bus:
    """The server: it keeps what a `MemoryBroker` keeps, and tells all brokers of it."""

    def __init__(self) -> None:
        self.store = MemoryBroker()
        self.brokers: list[BusBroker] = []
        self.fails = False
        """Whether what it is asked for raises `BrokerError`."""

    async def publish(
        self, channel: str, payload: Payload, sender: str | None, retention: Retention | None
    ) -> Position | None:
        position = await self.store.publish(channel, payload, sender=sender, retention=retention)
        publication = Publication(channel, payload, position if retention else None, sender)
        for broker in self.brokers:
            broker.receive(publication)
        return publication.position

    async def forget_all(self) -> None:
        """As if it had been started anew with nothing."""
        await self.store.stop()


class BusBroker(HistoryBroker, PresenceBroker):
    """One process's end of the bus.

    `loses` drops what comes; `cut` and `mend` are a link that is lost and is back. With `slow` set, what was asked for
    is answered only when `answer` is called: what a read finds was read before.
    """

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.subscribed: set[str] = set()
        self.loses = False
        self.fails = False
        self.slow = False
        self.asked: list[tuple[str, str]] = []
        self.reads: list[tuple[Position | None, int | None]] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._cut = False
        self._deliver: Deliver | None = None
        self._lost: Callable[[], None] = lambda: None

    # Faults

    def cut(self) -> None:
        self._cut = True

    def mend(self) -> None:
        self._cut = False
        self._lost()

    def answer(self) -> None:
        """All that waits."""
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if not each.done():
                each.set_result(None)

    @property
    def is_asked(self) -> bool:
        return bool(self._waiting)

    async def _answered(self, what: str, channel: str) -> None:
        self.asked.append((what, channel))
        if self.slow:
            answer = asyncio.get_running_loop().create_future()
            self._waiting.append(answer)
            await answer
        if self.fails or self.bus.fails:
            raise BrokerError("no answer")

    # The contract

    async def start(self, deliver: Deliver, lost: Callable[[], None]) -> None:
        await self._answered("start", "")
        self._deliver, self._lost = deliver, lost
        self.bus.brokers.append(self)

    async def stop(self) -> None:
        self._deliver = None
        self.subscribed.clear()
        self.bus.brokers.remove(self)

    async def publish(
        self, channel: str, payload: Payload, *, sender: str | None = None, retention: Retention | None = None
    ) -> Position | None:
        await self._answered("publish", channel)
        return await self.bus.publish(channel, payload, sender, retention)

    def receive(self, publication: Publication) -> None:
        lost = self.loses or self._cut or publication.channel not in self.subscribed
        if not lost and self._deliver is not None:
            self._deliver(publication)

    async def subscribe(self, channel: str) -> None:
        assert channel not in self.subscribed
        await self._answered("subscribe", channel)
        self.subscribed.add(channel)

    async def unsubscribe(self, channel: str) -> None:
        self.subscribed.remove(channel)
        await self._answered("unsubscribe", channel)

    async def history(self, channel: str, *, since: Position | None, limit: int | None) -> History:
        self.reads.append((since, limit))
        history = await self.bus.store.history(channel, since=since, limit=limit)
        await self._answered("history", channel)
        return history

    async def remember(self, name: str, value: str, *, ttl: float | None = None) -> None:
        await self.bus.store.remember(name, value, ttl=ttl)

    async def recall(self, name: str) -> str | None:
        return await self.bus.store.recall(name)

    async def take(self, name: str) -> str | None:
        return await self.bus.store.take(name)

    async def enter(self, channel: str, connection: str, key: str, value: str, *, expiry: float) -> bool:
        await self._answered("enter", channel)
        return await self.bus.store.enter(channel, connection, key, value, expiry=expiry)

    async def leave(self, channel: str, connection: str, *, grace: float) -> None:
        await self._answered("leave", channel)
        await self.bus.store.leave(channel, connection, grace=grace)

    async def settle(self, channel: str, key: str) -> bool:
        await self._answered("settle", channel)
        return await self.bus.store.settle(channel, key)

    async def refresh(self, channel: str, members: Mapping[str, tuple[str, str]], *, expiry: float) -> list[str]:
        await self._answered("refresh", channel)
        return await self.bus.store.refresh(channel, members, expiry=expiry)

    async def members(self, channel: str) -> dict[str, str]:
        await self._answered("members", channel)
        return await self.bus.store.members(channel)

    async def count(self, channel: str) -> tuple[int, int]:
        return await self.bus.store.count(channel)
