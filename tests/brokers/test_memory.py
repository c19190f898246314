import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_ws.brokers import MemoryBroker
from asgi_ws.messages import Position, Publication, Retention
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


# Histories

KEPT = Retention(3, 10.0)


class Clock:
    """The broker's clock, to be put forward."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("asgi_ws.brokers.memory._now", clock)
    return clock


@pytest.fixture
async def broker() -> AsyncIterator[MemoryBroker]:
    broker = MemoryBroker()
    await broker.start(lambda publication: None, nothing)
    yield broker
    await broker.stop()


async def keep(broker: MemoryBroker, channel: str, *data: int) -> Position:
    for each in data:
        position = await broker.publish(channel, encode(each), retention=KEPT)
    return position


async def read(broker: MemoryBroker, since: Position | None = None, limit: int | None = None) -> list[int]:
    history = await broker.history("a", since=since, limit=limit)
    return [publication.data for publication in history.publications]


async def top(broker: MemoryBroker, channel: str = "a") -> Position:
    return (await broker.history(channel, since=None, limit=0)).position


async def test_the_latest_are_kept_as_many_as_are_asked_for(broker: MemoryBroker) -> None:
    position = await keep(broker, "a", 1, 2, 3, 4, 5)
    assert await read(broker) == [3, 4, 5]
    assert await read(broker, limit=2) == [4, 5]
    assert await read(broker, limit=0) == []
    assert await read(broker, limit=9) == [3, 4, 5]
    assert await top(broker) == position
    await broker.publish("a", encode(6), retention=Retention(2, 10))
    assert await read(broker) == [5, 6], "another size"


async def test_behind_a_position_come_the_first_ones(broker: MemoryBroker) -> None:
    epoch = (await keep(broker, "a", 1, 2, 3, 4, 5)).epoch
    assert await read(broker, Position(3, epoch)) == [4, 5]
    assert await read(broker, Position(3, epoch), 1) == [4]
    assert await read(broker, Position(0, epoch)) == [3, 4, 5]
    assert await read(broker, Position(5, epoch)) == []
    assert await read(broker, Position(9, epoch)) == []
    assert await read(broker, Position(3, "other")) == []


async def test_what_was_kept_is_forgotten_some_time_after_the_last(broker: MemoryBroker, clock: Clock) -> None:
    await keep(broker, "a", 1)
    clock.now += 9
    before = await keep(broker, "a", 2)
    clock.now += 9
    assert await read(broker) == [1, 2]
    clock.now += 1
    assert await read(broker) == []
    after = await top(broker)
    assert after.offset == 0
    assert after.epoch != before.epoch, "its offsets begin again"
    assert await keep(broker, "a", 3) == Position(1, after.epoch)


async def test_what_has_expired_does_not_come_back_with_the_next(broker: MemoryBroker, clock: Clock) -> None:
    position = await keep(broker, "a", 1)
    clock.now += 11
    assert await keep(broker, "a", 2) == Position(2, position.epoch)
    assert await read(broker) == [2]


async def test_a_subscribed_channel_keeps_its_place_when_its_history_expires(
    broker: MemoryBroker, clock: Clock
) -> None:
    await broker.subscribe("a")
    position = await keep(broker, "a", 1)
    clock.now += 11
    assert await read(broker) == []
    assert await top(broker) == position
    await broker.unsubscribe("a")
    assert (await top(broker)).epoch != position.epoch


async def test_a_channel_with_a_history_outlives_its_subscribers(broker: MemoryBroker) -> None:
    await broker.subscribe("a")
    position = await keep(broker, "a", 1)
    await broker.unsubscribe("a")
    assert await top(broker) == position
    await broker.subscribe("a")
    assert await top(broker) == position


async def test_the_place_before_the_first_stays_valid_until_something_is_published(
    broker: MemoryBroker, clock: Clock
) -> None:
    before = await top(broker)
    assert before.offset == 0
    await broker.subscribe("a")
    assert await top(broker) == before
    await broker.unsubscribe("a")
    assert await top(broker) == before
    # Whatever others do.
    other = next(f"b{number}" for number in range(100) if hash(f"b{number}") % 4096 != hash("a") % 4096)
    await keep(broker, other, 1)
    clock.now += 11
    assert (await top(broker, other)).offset == 0
    assert await top(broker) == before
    assert await keep(broker, "a", 1) == Position(1, before.epoch)


async def test_every_stop_begins_other_epochs(broker: MemoryBroker) -> None:
    position = await keep(broker, "a", 1)
    await broker.stop()
    await broker.start(lambda publication: None, nothing)
    assert (await keep(broker, "a", 1)).epoch != position.epoch


async def test_a_channel_that_is_kept_from_now_on_keeps_its_epoch(broker: MemoryBroker) -> None:
    await broker.subscribe("a")
    first = await broker.publish("a", encode(1))
    assert await top(broker) == first
    assert await keep(broker, "a", 2) == Position(2, first.epoch)
    assert await read(broker, first) == [2]
    await broker.unsubscribe("a")


async def test_idle_channels_are_freed_without_being_asked_for(
    broker: MemoryBroker, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asgi_ws.brokers.memory._SWEEP_INTERVAL", 0.005)
    await keep(broker, "a", 1)
    clock.now += 5
    await keep(broker, "b", 1)
    clock.now += 6
    async with asyncio.timeout(2):
        while "a" in broker._channels:
            await asyncio.sleep(0.005)
    assert list(broker._channels) == ["b"]
    clock.now += 6
    async with asyncio.timeout(2):
        while broker._channels or broker._sweeper is not None:
            await asyncio.sleep(0.005)


@given(steps=st.lists(st.tuples(st.sampled_from(["publish", "sub", "unsub", "expire", "look"]), st.integers(0, 2))))
async def test_no_position_is_ever_given_to_two_publications(steps: list[tuple[str, int]]) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asgi_ws.brokers.memory._now", clock)
        patch.setattr("asgi_ws.brokers.memory._SHARES", 2)
        broker, seen, subscribed = MemoryBroker(), set[tuple[str, Position]](), set[str]()
        looked: dict[str, Position] = {}
        for what, number in steps:
            channel = f"{number}"
            if what == "publish":
                position = await broker.publish(channel, encode(1), retention=KEPT)
                assert (channel, position) not in seen
                seen.add((channel, position))
                before = looked.get(channel)
                if before is not None and before.epoch == position.epoch:
                    assert position.offset == before.offset + 1, "nothing was missed since"
                looked[channel] = position
            elif what == "sub" and channel not in subscribed:
                subscribed.add(channel)
                await broker.subscribe(channel)
            elif what == "unsub" and channel in subscribed:
                subscribed.discard(channel)
                await broker.unsubscribe(channel)
            elif what == "expire":
                clock.now += 11
            elif what == "look":
                looked[channel] = await top(broker, channel)
        await broker.stop()


async def test_words_are_remembered(broker: MemoryBroker) -> None:
    assert await broker.recall("rules") is None
    await broker.remember("rules", "[]")
    assert await broker.recall("rules") == "[]"


async def test_words_are_kept_for_a_time_and_taken_once(broker: MemoryBroker, clock: Clock) -> None:
    await broker.remember("one", "1", ttl=5)
    await broker.remember("two", "2", ttl=5)
    assert await broker.take("one") == "1"
    assert await broker.take("one") is None
    clock.now += 5
    assert await broker.recall("two") is None
    assert await broker.take("two") is None


# Presence


async def enter(broker: MemoryBroker, connection: str, key: str) -> bool:
    return await broker.enter("a", connection, key, f"{key}!", expiry=60)


async def test_members_come_and_go(broker: MemoryBroker) -> None:
    assert await enter(broker, "1", "u:ann")
    assert not await enter(broker, "2", "u:ann"), "another connection of the same user"
    assert await enter(broker, "3", "u:bob")
    assert await broker.members("a") == {"1": "u:ann!", "2": "u:ann!", "3": "u:bob!"}
    assert await broker.count("a") == (3, 2)
    await broker.leave("a", "1", grace=5)
    assert await broker.count("a") == (2, 2)
    await broker.leave("a", "2", grace=5)
    assert await broker.count("a") == (1, 1)
    assert await broker.members("b") == {}
    assert await broker.count("b") == (0, 0)


async def test_a_key_has_gone_when_its_grace_is_over_and_that_is_told_once(broker: MemoryBroker, clock: Clock) -> None:
    await enter(broker, "1", "u:ann")
    await broker.leave("a", "1", grace=5)
    assert not await broker.settle("a", "u:ann")
    clock.now += 5
    assert await broker.settle("a", "u:ann")
    assert not await broker.settle("a", "u:ann")
    assert not broker._presence


async def test_who_comes_back_within_the_grace_has_neither_left_nor_come(broker: MemoryBroker, clock: Clock) -> None:
    await enter(broker, "1", "u:ann")
    await broker.leave("a", "1", grace=5)
    clock.now += 4
    assert not await enter(broker, "2", "u:ann")
    clock.now += 10
    assert not await broker.settle("a", "u:ann")
    assert await broker.count("a") == (1, 1)


async def test_who_gives_no_sign_expires_and_that_is_told_once(broker: MemoryBroker, clock: Clock) -> None:
    await enter(broker, "1", "u:ann")
    await enter(broker, "2", "u:bob")
    clock.now += 40
    assert await broker.refresh("a", {"2": ("u:bob", "still")}, expiry=60) == []
    clock.now += 30
    assert await broker.members("a") == {"2": "still"}
    assert await broker.refresh("a", {"2": ("u:bob", "still")}, expiry=60) == ["u:ann"]
    assert await broker.refresh("a", {"2": ("u:bob", "still")}, expiry=60) == []
    clock.now += 70
    assert await broker.count("a") == (0, 0)
    assert not await enter(broker, "3", "u:bob"), "nobody was told that he had gone"
    assert await broker.refresh("a", {}, expiry=60) == []


async def test_one_of_several_connections_expires_unseen(broker: MemoryBroker, clock: Clock) -> None:
    await enter(broker, "1", "u:ann")
    clock.now += 30
    await enter(broker, "2", "u:ann")
    clock.now += 40
    assert await broker.refresh("a", {}, expiry=60) == []
    assert await broker.count("a") == (1, 1)


async def test_a_grace_that_nobody_settles_ends_too(broker: MemoryBroker, clock: Clock) -> None:
    await enter(broker, "1", "u:ann")
    await broker.leave("a", "1", grace=5)
    clock.now += 14
    assert await broker.refresh("a", {}, expiry=60) == []
    clock.now += 1
    assert await broker.refresh("a", {}, expiry=60) == ["u:ann"]
    assert not broker._presence


async def test_a_refresh_brings_back_what_was_forgotten(broker: MemoryBroker) -> None:
    await enter(broker, "1", "u:ann")
    await broker.leave("a", "1", grace=5)
    assert await broker.refresh("a", {"1": ("u:ann", "here")}, expiry=60) == []
    assert await broker.members("a") == {"1": "here"}


async def test_a_connection_may_get_another_key(broker: MemoryBroker) -> None:
    await enter(broker, "1", "c:1")
    assert await enter(broker, "1", "u:ann")
    assert await broker.count("a") == (1, 1)


async def test_who_was_never_there_leaves_nothing_behind(broker: MemoryBroker) -> None:
    await broker.leave("a", "1", grace=5)
    assert not broker._presence
