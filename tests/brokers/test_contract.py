"""What every broker owes."""

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from asgi_ws.brokers import Broker, MemoryBroker, broker_for
from asgi_ws.exceptions import BrokerError
from asgi_ws.messages import Publication
from asgi_ws.payloads import Payload, encode

pytestmark = pytest.mark.anyio

BROKERS: dict[str, Callable[[], Broker]] = {"memory": MemoryBroker}
TIMEOUT = 5


class Deliveries(list[Publication]):
    """What a broker has delivered."""

    def __init__(self) -> None:
        super().__init__()
        self._more = asyncio.Event()
        self.lost = 0

    def deliver(self, publication: Publication) -> None:
        assert asyncio.get_running_loop()
        self.append(publication)
        self._more.set()

    def on_lost(self) -> None:
        self.lost += 1

    async def until(self, count: int) -> list[Any]:
        """Wait for so many publications; what was published by all so far."""
        async with asyncio.timeout(TIMEOUT):
            while len(self) < count:
                self._more.clear()
                await self._more.wait()
        return [publication.data for publication in self]


@pytest.fixture(params=BROKERS)
def make_broker(request: pytest.FixtureRequest) -> Callable[[], Broker]:
    return BROKERS[request.param]


@contextlib.asynccontextmanager
async def started(broker: Broker) -> AsyncIterator[Deliveries]:
    deliveries = Deliveries()
    await broker.start(deliveries.deliver, deliveries.on_lost)
    try:
        yield deliveries
    finally:
        await broker.stop()


async def test_a_publication_comes_back_as_it_was_published(make_broker: Callable[[], Broker]) -> None:
    broker = make_broker()
    async with started(broker) as deliveries:
        await broker.subscribe("räume:1 🎈")
        payloads = [Payload("text", "grüß"), Payload("json", '{"a":1}'), Payload("binary", b"\x00\xff")]
        for count, payload in enumerate(payloads, 1):
            position = await broker.publish("räume:1 🎈", payload, sender="ann")
            await deliveries.until(count)
            assert deliveries[-1] == Publication("räume:1 🎈", payload, position, "ann")


async def test_the_sender_travels_or_there_is_none(make_broker: Callable[[], Broker]) -> None:
    broker = make_broker()
    async with started(broker) as deliveries:
        await broker.subscribe("a")
        await broker.publish("a", encode("1"))
        await broker.publish("a", encode("2"), sender="ann")
        await deliveries.until(2)
        assert [publication.sender for publication in deliveries] == [None, "ann"]


async def test_publications_of_a_channel_arrive_in_their_order(make_broker: Callable[[], Broker]) -> None:
    broker = make_broker()
    async with started(broker) as deliveries:
        await broker.subscribe("a")
        await broker.subscribe("b")

        async def publish(name: str) -> None:
            for number in range(50):
                await broker.publish("ab"[number % 2], encode([name, number]))

        await asyncio.gather(publish("one"), publish("two"))
        await deliveries.until(100)
    for channel in "ab":
        positions = [publication.position for publication in deliveries if publication.channel == channel]
        assert [position and position.offset for position in positions] == list(range(1, 51))
        for name in ("one", "two"):
            own = [each.data[1] for each in deliveries if each.channel == channel and each.data[0] == name]
            assert own == sorted(own)


async def test_positions_increase_by_one_within_an_epoch(make_broker: Callable[[], Broker]) -> None:
    broker = make_broker()
    async with started(broker) as deliveries:
        await broker.subscribe("a")
        returned = [await broker.publish("a", encode(str(number))) for number in range(5)]
        await deliveries.until(5)
    assert [position and position.offset for position in returned] == [1, 2, 3, 4, 5]
    assert len({position and position.epoch for position in returned}) == 1
    assert [publication.position for publication in deliveries] == returned


async def test_only_subscribed_channels_are_delivered(make_broker: Callable[[], Broker]) -> None:
    broker = make_broker()
    async with started(broker) as deliveries:
        await broker.publish("a", encode("before"))
        await broker.subscribe("a")
        await broker.subscribe("last")
        await broker.publish("a", encode("1"))
        await broker.publish("b", encode("not subscribed"))
        await broker.publish("a:1", encode("another name"))
        await deliveries.until(1)
        await broker.unsubscribe("a")
        await broker.publish("a", encode("after"))
        await broker.publish("last", encode("2"))
        assert await deliveries.until(2) == ["1", "2"]


async def test_nothing_is_delivered_after_stop(make_broker: Callable[[], Broker]) -> None:
    broker = make_broker()
    async with started(broker) as deliveries:
        await broker.subscribe("a")
    with contextlib.suppress(BrokerError):
        await broker.publish("a", encode("late"))
    assert deliveries == []
    async with started(broker) as again:
        with contextlib.suppress(BrokerError):
            await broker.publish("a", encode("not subscribed any more"))
        await broker.subscribe("a")
        await broker.publish("a", encode("1"))
        assert await again.until(1) == ["1"]
    assert deliveries == []


async def test_the_epoch_changes_when_counting_starts_again(make_broker: Callable[[], Broker]) -> None:
    """Whoever held a position of before must not take a new one for a later one."""
    broker = make_broker()
    seen: dict[str, int] = {}

    async def publish() -> None:
        position = await broker.publish("a", encode("x"))
        if position is not None:
            assert position.offset == seen.get(position.epoch, 0) + 1, "an offset is used once in its epoch"
            seen[position.epoch] = position.offset

    for _ in range(2):
        async with started(broker):
            await publish()
            await publish()
            for _ in range(3):
                await broker.subscribe("a")
                await publish()
                await publish()
                await broker.unsubscribe("a")
            await publish()


async def test_two_brokers_never_count_in_the_same_epoch(make_broker: Callable[[], Broker]) -> None:
    epochs = []
    for _ in range(2):
        broker = make_broker()
        async with started(broker):
            position = await broker.publish("only of this test", encode("x"))
            epochs.append(position and position.epoch)
    assert epochs[0] != epochs[1]


async def test_channels_that_nobody_subscribes_to_any_more_are_forgotten(make_broker: Callable[[], Broker]) -> None:
    broker = make_broker()
    async with started(broker) as deliveries:
        before = sizes(broker)
        for number in range(1000):
            await broker.subscribe(f"room:{number}")
            await broker.publish(f"room:{number}", encode("x"))
            await broker.publish(f"other:{number}", encode("x"))
        await deliveries.until(1000)
        for number in range(1000):
            await broker.unsubscribe(f"room:{number}")
        assert sizes(broker) == before


def sizes(broker: Broker) -> dict[str, int]:
    """How much the broker holds, by attribute."""

    def collections() -> Iterator[tuple[str, int]]:
        for name, value in inspect.getmembers(broker):
            if not name.startswith("__") and isinstance(value, dict | list | set):
                yield name, len(value)

    return dict(collections())


def test_a_url_names_its_broker() -> None:
    assert type(broker_for("memory://")) is MemoryBroker


@pytest.mark.parametrize("url", ["", "memory", "memory:", "memory://host", "Memory://", "carrier-pigeon://coop", "://"])
def test_a_url_that_is_not_known_is_a_mistake(url: str) -> None:
    with pytest.raises(ValueError, match=r"no broker is known for .*; known are 'memory://'"):
        broker_for(url)
