import pytest

from asgi_ws.brokers import MemoryBroker
from asgi_ws.messages import Position, Publication
from asgi_ws.payloads import encode

pytestmark = pytest.mark.anyio


def nothing() -> None:
    raise AssertionError("a single process has no link to lose")


async def test_delivers_before_publish_returns() -> None:
    broker, delivered = MemoryBroker(), list[Publication]()
    await broker.start(delivered.append, nothing)
    await broker.subscribe("a")
    position = await broker.publish("a", encode("x"), sender="ann")
    assert delivered == [Publication("a", encode("x"), position, "ann")]


async def test_publishes_from_within_deliver_keep_their_offsets() -> None:
    broker, offsets = MemoryBroker(), list[int]()

    def deliver(publication: Publication) -> None:
        assert publication.position is not None
        offsets.append(publication.position.offset)
        if publication.position.offset < 4:
            with pytest.raises(StopIteration):  # it never suspends
                broker.publish("a", encode("next")).send(None)

    await broker.start(deliver, nothing)
    await broker.subscribe("a")
    await broker.publish("a", encode("first"))
    assert offsets == [1, 2, 3, 4]


async def test_what_nobody_listens_to_is_a_stream_of_its_own() -> None:
    broker = MemoryBroker()
    positions = [await broker.publish("a", encode("x")) for _ in range(3)]
    assert [position.offset for position in positions] == [1, 1, 1]
    assert len({position.epoch for position in positions}) == 3


async def test_a_subscribed_channel_counts_even_when_nothing_is_delivered() -> None:
    broker = MemoryBroker()
    await broker.subscribe("a")
    first = await broker.publish("a", encode("x"))
    assert await broker.publish("a", encode("x")) == Position(2, first.epoch)
