import asyncio
import gc
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from asgi_ws.brokers import Broker, MemoryBroker
from asgi_ws.exceptions import BrokerError, PublicationsLost, SubscriberTooSlow
from asgi_ws.messages import History, Position, Publication, Recovery, Retention
from asgi_ws.payloads import Payload, encode
from asgi_ws.pubsub import PubSub, Subscription
from tests.bus import Bus, BusBroker

pytestmark = pytest.mark.anyio


class Recorder:
    """A subscriber."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def push(self, publication: Publication) -> None:
        self.got.append(publication.data)


class SuspendingBroker(MemoryBroker):
    """A broker far away: what it is asked for takes until it is answered. It checks what it is owed itself."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.answers: defaultdict[str, asyncio.Queue[Exception | None]] = defaultdict(asyncio.Queue)
        self.lost: Any = None
        self._busy: set[str] = set()

    @property
    def subscribed(self) -> set[str]:
        return {name for name, channel in self._channels.items() if channel.subscribed}

    async def start(self, deliver: Any, lost: Any) -> None:
        await super().start(deliver, lost)
        self.lost = lost

    async def subscribe(self, channel: str) -> None:
        assert channel not in self.subscribed
        await self._ask("subscribe", channel)
        await super().subscribe(channel)

    async def unsubscribe(self, channel: str) -> None:
        assert channel in self.subscribed
        await self._ask("unsubscribe", channel)
        if channel in self.subscribed:  # not stopped meanwhile
            await super().unsubscribe(channel)

    async def _ask(self, what: str, channel: str) -> None:
        assert channel not in self._busy, "one request at a time for each channel"
        self._busy.add(channel)
        try:
            self.asked.put_nowait((what, channel))
            answer = await self.answers[channel].get()
        finally:
            self._busy.discard(channel)
        if answer is not None:
            raise answer

    def answer(self, channel: str, error: Exception | None = None) -> None:
        """To what is asked, or will be asked next, of a channel."""
        self.answers[channel].put_nowait(error)

    async def answer_next(self) -> tuple[str, str]:
        """Answer whatever is asked next."""
        async with asyncio.timeout(2):
            asked = await self.asked.get()
        self.answer(asked[1])
        return asked


async def spawn(coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
    """A task that has come as far as it can without others."""
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    return task


@pytest.fixture
async def pubsub() -> PubSub:
    pubsub = PubSub(MemoryBroker())
    await pubsub.start()
    return pubsub


@pytest.fixture
async def far() -> tuple[PubSub, SuspendingBroker]:
    broker = SuspendingBroker()
    pubsub = PubSub(broker)
    await pubsub.start()
    return pubsub, broker


async def publish(pubsub: PubSub, channel: str, *data: Any) -> None:
    for each in data:
        await pubsub.publish(channel, encode(each))


# Subscribers


async def test_subscribers_get_what_is_published_to_their_channels(pubsub: PubSub) -> None:
    one, two, both = Recorder(), Recorder(), Recorder()
    await pubsub.subscribe("one", one)
    await pubsub.subscribe("two", two)
    await pubsub.subscribe("one", both)
    await pubsub.subscribe("two", both)
    await publish(pubsub, "one", 1, "x")
    await publish(pubsub, "two", 2)
    await publish(pubsub, "three", 3)
    assert (one.got, two.got, both.got) == ([1, "x"], [2], [1, "x", 2])


async def test_all_subscribers_get_the_same_publication(pubsub: PubSub) -> None:
    publications: list[Publication] = []

    class Keeper:
        def push(self, publication: Publication) -> None:
            publications.append(publication)

    await pubsub.subscribe("a", Keeper())
    await pubsub.subscribe("a", Keeper())
    position = await pubsub.publish("a", encode("x"), sender="ann")
    assert publications == [Publication("a", Payload("text", "x"), position, "ann")] * 2
    assert publications[0] is publications[1]
    assert isinstance(position, Position)


async def test_subscribing_twice_delivers_once(pubsub: PubSub) -> None:
    subscriber = Recorder()
    await pubsub.subscribe("a", subscriber)
    await pubsub.subscribe("a", subscriber)
    await publish(pubsub, "a", 1)
    await pubsub.unsubscribe(["a"], subscriber)
    await publish(pubsub, "a", 2)
    assert subscriber.got == [1]


async def test_unsubscribing_from_several_channels_at_once(pubsub: PubSub) -> None:
    one, two = Recorder(), Recorder()
    for channel in "abc":
        await pubsub.subscribe(channel, one)
    await pubsub.subscribe("b", two)
    await pubsub.unsubscribe(["a", "b", "never heard of"], one)
    for channel in "abc":
        await publish(pubsub, channel, channel)
    assert (one.got, two.got) == (["c"], ["b"])


async def test_unsubscribing_from_what_one_has_not_subscribed_to_is_nothing(pubsub: PubSub) -> None:
    subscriber = Recorder()
    await pubsub.subscribe("a", subscriber)
    await pubsub.unsubscribe(["a"], Recorder())
    await pubsub.unsubscribe(["b"], subscriber)
    await publish(pubsub, "a", 1)
    assert subscriber.got == [1]


async def test_subscribers_may_come_and_go_while_something_is_delivered(pubsub: PubSub) -> None:
    late = Recorder()

    class Mutating(Recorder):
        def push(self, publication: Publication) -> None:
            super().push(publication)
            for step in (pubsub.subscribe("a", late), pubsub.unsubscribe(["a"], self)):
                with pytest.raises(StopIteration):  # nothing waits here: the channel has its subscribers
                    step.send(None)

    mutating, other = [Mutating(), Mutating()], Recorder()
    for subscriber in (*mutating, other):
        await pubsub.subscribe("a", subscriber)
    await publish(pubsub, "a", 1, 2)
    assert [each.got for each in mutating] == [[1], [1]]
    assert other.got == [1, 2]
    assert late.got == [2]


async def test_publishing_while_something_is_delivered_follows_it(pubsub: PubSub) -> None:
    order: list[Any] = []

    class Echo:
        def push(self, publication: Publication) -> None:
            order.append(publication.data)
            if publication.data < 3:
                with pytest.raises(StopIteration):
                    pubsub.publish("a", encode(publication.data + 1)).send(None)

    await pubsub.subscribe("a", Echo())
    await publish(pubsub, "a", 1)
    assert order == [1, 2, 3]


async def test_last_unsubscribe_releases_the_channel(far: tuple[PubSub, SuspendingBroker]) -> None:
    pubsub, broker = far
    one, two = Recorder(), Recorder()
    broker.answer("a")
    await pubsub.subscribe("a", one)
    await pubsub.subscribe("a", two)
    await pubsub.unsubscribe(["a"], one)
    assert broker.subscribed == {"a"}
    broker.answer("a")
    await pubsub.unsubscribe(["a"], two)
    assert broker.subscribed == set()
    assert [broker.asked.get_nowait() for _ in range(2)] == [("subscribe", "a"), ("unsubscribe", "a")]
    assert broker.asked.empty()
    assert not pubsub._channels, "nothing is kept of a channel that nobody subscribes to"


# Races with a broker that takes its time


async def test_two_first_subscribers_both_receive(far: tuple[PubSub, SuspendingBroker]) -> None:
    pubsub, broker = far
    one, two = Recorder(), Recorder()
    tasks = [await spawn(pubsub.subscribe("a", one)), await spawn(pubsub.subscribe("a", two))]
    assert not tasks[1].done(), "the second waits for the broker, too"
    assert await broker.answer_next() == ("subscribe", "a")
    await asyncio.gather(*tasks)
    assert broker.asked.empty()
    await publish(pubsub, "a", 1)
    assert one.got == two.got == [1]
    await pubsub.unsubscribe(["a"], one)
    broker.answer("a")
    await pubsub.unsubscribe(["a"], two)


async def test_a_channel_does_not_wait_for_another(far: tuple[PubSub, SuspendingBroker]) -> None:
    pubsub, broker = far
    one, two = await spawn(pubsub.subscribe("a", Recorder())), await spawn(pubsub.subscribe("b", Recorder()))
    assert [broker.asked.get_nowait() for _ in range(2)] == [("subscribe", "a"), ("subscribe", "b")]
    broker.answer("b")
    await two
    assert not one.done()
    broker.answer("a")
    await one


async def test_the_last_unsubscribe_does_not_overtake_the_next_subscribe(far: tuple[PubSub, SuspendingBroker]) -> None:
    pubsub, broker = far
    old, new = Recorder(), Recorder()
    broker.answer("a")
    await pubsub.subscribe("a", old)
    await broker.asked.get()
    leaving = await spawn(pubsub.unsubscribe(["a"], old))
    assert await broker.asked.get() == ("unsubscribe", "a")
    coming = await spawn(pubsub.subscribe("a", new))
    broker.answer("a")
    await leaving
    assert not coming.done()
    assert await broker.answer_next() == ("subscribe", "a")
    await coming
    await publish(pubsub, "a", 1)
    assert (old.got, new.got) == ([], [1])


async def test_the_last_one_to_leave_sees_who_has_waited(far: tuple[PubSub, SuspendingBroker]) -> None:
    pubsub, broker = far
    one, two = Recorder(), Recorder()

    async def visit() -> None:
        await pubsub.subscribe("a", one)
        await pubsub.unsubscribe(["a"], one)

    tasks = [await spawn(visit()), await spawn(pubsub.subscribe("a", two))]
    await broker.answer_next()
    await asyncio.gather(*tasks)
    assert broker.asked.empty()
    await publish(pubsub, "a", 1)
    assert (one.got, two.got) == ([], [1])


async def test_nothing_is_pushed_from_the_call_of_unsubscribe_on(far: tuple[PubSub, SuspendingBroker]) -> None:
    pubsub, broker = far
    subscriber = Recorder()
    broker.answer("a")
    await pubsub.subscribe("a", subscriber)
    leaving = await spawn(pubsub.unsubscribe(["a"], subscriber))
    await publish(pubsub, "a", 1)
    broker.answer("a")
    await leaving
    assert subscriber.got == []


async def test_a_cancelled_subscribe_leaves_nothing(far: tuple[PubSub, SuspendingBroker]) -> None:
    pubsub, broker = far
    subscriber = Recorder()
    subscribing = await spawn(pubsub.subscribe("a", subscriber))
    subscribing.cancel()
    await asyncio.wait([subscribing])
    assert subscribing.cancelled()
    assert not pubsub._channels
    broker.answer("a")
    await pubsub.subscribe("a", subscriber)
    await publish(pubsub, "a", 1)
    assert subscriber.got == [1]


async def test_a_cancelled_subscribe_leaves_the_next_one_to_ask(far: tuple[PubSub, SuspendingBroker]) -> None:
    pubsub, broker = far
    one, two = Recorder(), Recorder()
    first, second = await spawn(pubsub.subscribe("a", one)), await spawn(pubsub.subscribe("a", two))
    assert await broker.asked.get() == ("subscribe", "a")
    first.cancel()
    assert await broker.answer_next() == ("subscribe", "a")
    await second
    await publish(pubsub, "a", 1)
    assert (one.got, two.got) == ([], [1])


async def test_one_that_is_cancelled_while_it_waits_for_the_first_leaves_nothing(
    far: tuple[PubSub, SuspendingBroker],
) -> None:
    pubsub, broker = far
    one, two = Recorder(), Recorder()
    first, second = await spawn(pubsub.subscribe("a", one)), await spawn(pubsub.subscribe("a", two))
    second.cancel()
    await broker.answer_next()
    await asyncio.wait([first, second])
    await publish(pubsub, "a", 1)
    assert (one.got, two.got) == ([1], [])
    broker.answer("a")
    await pubsub.unsubscribe(["a"], one)
    assert not pubsub._channels


async def test_a_broker_that_fails_is_told_to_who_comes_but_not_to_who_leaves_and_the_next_one_asks_again(
    far: tuple[PubSub, SuspendingBroker], caplog: pytest.LogCaptureFixture
) -> None:
    pubsub, broker = far
    subscriber = Recorder()
    broker.answer("a", BrokerError("no answer"))
    with pytest.raises(BrokerError):
        await pubsub.subscribe("a", subscriber)
    assert not pubsub._channels
    broker.answer("a")
    await pubsub.subscribe("a", subscriber)
    broker.answer("a", BrokerError("no answer"))
    with caplog.at_level("WARNING", "asgi_ws"):
        await pubsub.unsubscribe(["a"], subscriber)
    assert "nobody listens to 'a' any more" in caplog.text
    assert not pubsub._channels
    await publish(pubsub, "a", 1)
    assert subscriber.got == []


async def test_all_who_wait_for_the_first_are_told_that_the_broker_has_failed(
    far: tuple[PubSub, SuspendingBroker],
) -> None:
    pubsub, broker = far
    coming = [await spawn(pubsub.subscribe("a", Recorder())) for _ in range(3)]
    broker.answer("a", BrokerError("no answer"))
    found = await asyncio.gather(*coming, return_exceptions=True)
    assert [str(error) for error in found] == ["no answer"] * 3
    assert len(set(map(id, found))) == 3
    assert broker.asked.qsize() == 1, "it is asked once for all of them"
    assert not pubsub._channels


async def test_one_read_serves_all_who_come_back_in_one_moment() -> None:
    class ReadingBroker(SuspendingBroker):
        reads = 0

        async def history(self, channel: str, *, since: Position | None, limit: int | None) -> History:
            self.reads += 1
            await asyncio.sleep(0)
            return await super().history(channel, since=since, limit=limit)

    broker = ReadingBroker()
    pubsub = PubSub(broker, lambda channel: Retention(10, 60))
    await pubsub.start()
    first = await pubsub.publish("a", encode(0))
    await publish(pubsub, "a", 1, 2)
    subscribers = [Recorder() for _ in range(50)]
    coming = [await spawn(pubsub.subscribe("a", each, since=first)) for each in subscribers]
    await broker.answer_next()
    assert all(recovery.recovered for recovery in await asyncio.gather(*coming))
    assert all(each.got == [1, 2] for each in subscribers)
    assert broker.reads == 1
    await pubsub.stop()


async def test_channels_are_left_all_at_once_and_whoever_leaves_may_be_cancelled(
    far: tuple[PubSub, SuspendingBroker],
) -> None:
    pubsub, broker = far
    subscriber, other = Recorder(), Recorder()
    for channel in "ab":
        broker.answer(channel)
        await pubsub.subscribe(channel, subscriber)
        await broker.asked.get()
    leaving = await spawn(pubsub.unsubscribe(["a", "b"], subscriber))
    assert {await broker.asked.get() for _ in "ab"} == {("unsubscribe", "a"), ("unsubscribe", "b")}
    leaving.cancel()
    coming = await spawn(pubsub.subscribe("b", other))
    broker.answer("b")
    assert await broker.asked.get() == ("subscribe", "b")
    broker.answer("b")
    await coming
    broker.answer("a")
    await publish(pubsub, "b", 1)
    assert other.got == [1]
    while broker.subscribed != {"b"}:
        await asyncio.sleep(0)


async def test_the_hub_may_stop_while_a_client_leaves(far: tuple[PubSub, SuspendingBroker]) -> None:
    pubsub, broker = far
    subscriber = Recorder()
    for channel in "ab":
        broker.answer(channel)
        await pubsub.subscribe(channel, subscriber)
        await broker.asked.get()
    leaving = await spawn(pubsub.unsubscribe(["a", "b"], subscriber))
    await pubsub.stop()
    broker.answer("a")
    await leaving
    await pubsub.unsubscribe(["a", "b"], subscriber)


async def test_after_stop_nothing_is_pushed(pubsub: PubSub) -> None:
    subscriber = Recorder()
    await pubsub.subscribe("a", subscriber)
    await pubsub.stop()
    pubsub.deliver(Publication("a", encode("late")))
    assert subscriber.got == []


async def test_a_link_that_was_lost_and_is_back_is_no_news_without_history(
    far: tuple[PubSub, SuspendingBroker],
) -> None:
    pubsub, broker = far
    subscriber = Recorder()
    broker.answer("a")
    await pubsub.subscribe("a", subscriber)
    broker.lost()
    await publish(pubsub, "a", 1)
    assert subscriber.got == [1]


# A subscription on the server's side


async def test_a_subscription_is_read_in_order(pubsub: PubSub) -> None:
    async with Subscription(pubsub, "a", 100) as publications:
        await publish(pubsub, "a", 1, "two", b"three")
        await publish(pubsub, "b", "not this")
        got = [await anext(publications) for _ in range(3)]
    assert [publication.data for publication in got] == [1, "two", b"three"]
    assert [publication.position and publication.position.offset for publication in got] == [1, 2, 3]


async def test_a_subscription_waits_for_what_comes(pubsub: PubSub) -> None:
    async with Subscription(pubsub, "a", 100) as publications:
        reading = await spawn(anext(publications))
        assert not reading.done()
        await publish(pubsub, "a", 1, 2)
        assert (await reading).data == 1
        assert (await anext(publications)).data == 2


async def test_a_subscription_that_was_left_gets_nothing(pubsub: PubSub) -> None:
    async with Subscription(pubsub, "a", 100) as publications:
        pass
    await publish(pubsub, "a", 1)
    reading = await spawn(anext(publications))
    assert not reading.done()
    reading.cancel()
    assert not pubsub._channels
    assert not pubsub.subscriptions


async def test_a_cancelled_reader_loses_nothing(pubsub: PubSub) -> None:
    async with Subscription(pubsub, "a", 100) as publications:
        reading = await spawn(anext(publications))
        reading.cancel()
        await asyncio.wait([reading])
        await publish(pubsub, "a", 1)
        assert (await anext(publications)).data == 1
        reading = await spawn(anext(publications))
        await publish(pubsub, "a", 2)
        reading.cancel()
        await asyncio.wait([reading])
        assert (await anext(publications)).data == 2


async def test_a_subscription_has_one_reader_at_a_time(pubsub: PubSub) -> None:
    async with Subscription(pubsub, "a", 100) as publications:
        reading = await spawn(anext(publications))
        with pytest.raises(RuntimeError, match="another task reads this subscription already"):
            await anext(publications)
        await publish(pubsub, "a", 1)
        assert (await reading).data == 1


async def test_a_subscription_holds_so_many_bytes_and_then_says_that_it_was_too_slow(pubsub: PubSub) -> None:
    async with Subscription(pubsub, "a", 10) as publications:
        await publish(pubsub, "a", "12345", "67890", "lost", "x")
        assert [(await anext(publications)).data for _ in range(2)] == ["12345", "67890"]
        for _ in range(2):
            with pytest.raises(SubscriberTooSlow, match="'a'"):
                await anext(publications)
        await publish(pubsub, "a", "there was a gap")
        with pytest.raises(SubscriberTooSlow):
            await anext(publications)


async def test_what_is_read_makes_room(pubsub: PubSub) -> None:
    async with Subscription(pubsub, "a", 10) as publications:
        for number in range(10):
            await publish(pubsub, "a", f"{number}", "12345678")
            assert (await anext(publications)).data == f"{number}"
            assert (await anext(publications)).data == "12345678"


async def test_one_publication_has_room_whatever_its_size(pubsub: PubSub) -> None:
    async with Subscription(pubsub, "a", 1) as publications:
        await publish(pubsub, "a", "larger than that")
        assert (await anext(publications)).data == "larger than that"


async def test_a_subscription_that_is_too_slow_harms_nobody(pubsub: PubSub) -> None:
    other = Recorder()
    async with Subscription(pubsub, "a", 1):
        await pubsub.subscribe("a", other)
        await publish(pubsub, "a", 1, 2, 3)
    assert other.got == [1, 2, 3]


async def test_a_subscription_ends_on_stop_behind_what_it_still_has(pubsub: PubSub) -> None:
    async with Subscription(pubsub, "a", 100) as publications:
        await publish(pubsub, "a", 1, 2)
        await pubsub.stop()
        assert [publication.data async for publication in publications] == [1, 2]
        assert [publication.data async for publication in publications] == []


async def test_stop_wakes_whoever_waits(pubsub: PubSub) -> None:
    async def read(publications: Subscription) -> list[Any]:
        return [publication.data async for publication in publications]

    async with Subscription(pubsub, "a", 100) as one, Subscription(pubsub, "b", 100) as two:
        readers = [await spawn(read(one)), await spawn(read(two))]
        await publish(pubsub, "a", 1)
        await pubsub.stop()
        assert await asyncio.gather(*readers) == [[1], []]


async def test_a_subscription_that_the_broker_refuses_is_forgotten(far: tuple[PubSub, SuspendingBroker]) -> None:
    pubsub, broker = far
    broker.answer("a", BrokerError("no answer"))
    with pytest.raises(BrokerError):
        async with Subscription(pubsub, "a", 100):
            raise AssertionError("not entered")
    assert not pubsub.subscriptions


async def test_a_subscription_that_begins_while_the_hub_stops_ends(far: tuple[PubSub, SuspendingBroker]) -> None:
    pubsub, broker = far

    async def read() -> list[Any]:
        async with Subscription(pubsub, "a", 100) as publications:
            return [publication.data async for publication in publications]

    reading = await spawn(read())
    await pubsub.stop()
    broker.answer("a")
    async with asyncio.timeout(2):
        assert await reading == []


# Channels with a history


class Visitor:
    """A subscriber that notes how it began, and may be told that something is lost to it."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        self.began: list[Recovery] = []
        self.lost_channels: list[str] = []

    def begin(self, recovery: Recovery) -> None:
        assert not self.got, "before anything is pushed"
        self.began.append(recovery)

    def push(self, publication: Publication) -> None:
        self.got.append(publication.data)

    def lost(self, channel: str) -> None:
        self.lost_channels.append(channel)


KEPT = Retention(5, 60)


def keep(channel: str) -> Retention | None:
    return None if channel == "unkept" else KEPT


class Far:
    """A hub's pub/sub at one end of a bus whose server is far away."""

    def __init__(self, limit: int | None = 300) -> None:
        self.bus = Bus()
        self.broker = BusBroker(self.bus)
        self.pubsub = PubSub(self.broker, keep, limit)

    async def publish(self, channel: str, *data: Any) -> list[Position]:
        """At another end of the bus."""
        found = [await self.bus.publish(channel, encode(each), None, KEPT) for each in data]
        return [position for position in found if position is not None]

    async def lose(self, channel: str, *data: Any) -> list[Position]:
        self.broker.loses = True
        found = await self.publish(channel, *data)
        self.broker.loses = False
        return found

    def forget(self, channel: str, count: int) -> None:
        kept = self.bus.store._channels[channel].kept
        assert kept is not None
        for _ in range(count):
            kept.popleft()

    async def asked(self) -> None:
        async with asyncio.timeout(2):
            while not self.broker.is_asked:
                await asyncio.sleep(0)

    async def answer(self) -> None:
        """The next thing that is asked, and nothing after it."""
        await self.asked()
        self.broker.answer()
        await settle()

    @property
    def reads(self) -> int:
        return len(self.broker.reads)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
async def kept() -> AsyncIterator[Far]:
    far = Far()
    await far.pubsub.start()
    yield far
    await far.pubsub.stop()


async def join(far: Far, since: Position | None = None, channel: str = "a") -> Visitor:
    visitor = Visitor()
    recovery = await far.pubsub.subscribe(channel, visitor, since=since, begin=visitor.begin)
    assert visitor.began == [recovery]
    return visitor


async def test_who_comes_for_the_first_time_begins_at_the_latest_position(kept: Far) -> None:
    visitor = await join(kept)
    assert visitor.began[0].position == Position(0, visitor.began[0].position.epoch)  # type: ignore[union-attr]
    await kept.publish("a", 1)
    positions = [position for position in [await kept.pubsub.publish("a", encode(2))] if position]
    late = await join(kept)
    assert late.began == [Recovery(False, positions[0])]
    await kept.publish("a", 3)
    assert (visitor.got, late.got) == ([1, 2, 3], [3])
    assert kept.reads == 1, "where somebody is already the position is known"


async def test_who_comes_back_gets_what_was_missed_and_then_what_comes(kept: Far) -> None:
    positions = await kept.publish("a", 1, 2, 3)
    visitor = await join(kept, positions[0])
    await kept.publish("a", 4)
    assert visitor.got == [2, 3, 4]
    [recovery] = visitor.began
    assert (recovery.recovered, recovery.position) == (True, positions[2])
    assert [publication.data for publication in recovery.publications] == [2, 3]


async def test_who_has_missed_nothing_is_recovered_with_nothing(kept: Far) -> None:
    first = await join(kept)
    assert first.began[0].position is not None
    again = await join(kept, first.began[0].position)
    assert again.began == [Recovery(True, first.began[0].position)]
    [position] = await kept.publish("a", 1)
    assert (await join(kept, position)).began == [Recovery(True, position)]


@pytest.mark.parametrize(
    ("since", "recovered"), [(0, False), (1, False), (2, False), (3, True), (4, True), (7, True), (8, False)]
)
async def test_it_is_all_or_nothing(since: int, recovered: bool) -> None:
    far = Far(limit=4)
    await far.pubsub.start()
    positions = await far.publish("a", 1, 2, 3, 4, 5, 6, 7)
    visitor = await join(far, Position(since, positions[0].epoch))
    assert visitor.began[0].recovered is recovered
    assert visitor.began[0].position == positions[-1]
    assert visitor.got == (list(range(since + 1, 8)) if recovered else [])
    await far.pubsub.stop()


async def test_another_epoch_is_not_recovered(kept: Far) -> None:
    positions = await kept.publish("a", 1, 2)
    await kept.bus.forget_all()
    now = await kept.publish("a", 1)
    assert (await join(kept, positions[0])).began == [Recovery(False, now[0])]


async def test_what_was_missed_is_given_by_its_own_door_where_there_is_one(kept: Far) -> None:
    class TwoDoors(Recorder):
        def recover(self, publication: Publication) -> None:
            self.got.append(("missed", publication.data))

    positions = await kept.publish("a", 1, 2)
    subscriber = TwoDoors()
    await kept.pubsub.subscribe("a", subscriber, since=positions[0])
    await kept.publish("a", 3)
    assert subscriber.got == [("missed", 2), 3]


async def test_what_a_subscription_has_missed_may_be_more_than_it_may_leave_unread(kept: Far) -> None:
    positions = await kept.publish("a", *("x" * 100 for _ in range(5)))
    async with Subscription(kept.pubsub, "a", 150, positions[0]) as publications:
        await kept.publish("a", "last")
        assert [(await anext(publications)).data for _ in range(5)] == ["x" * 100] * 4 + ["last"]
        await kept.publish("a", "x" * 100, "x" * 100)
        assert len((await anext(publications)).data) == 100
        with pytest.raises(SubscriberTooSlow):
            await anext(publications)


async def test_a_position_says_nothing_in_a_channel_without_history(kept: Far) -> None:
    visitor = await join(kept, Position(3, "e"), "unkept")
    assert visitor.began == [Recovery(False, None)]
    await kept.pubsub.publish("unkept", encode(1))
    assert visitor.got == [1]


async def test_what_comes_while_a_history_is_read_comes_once_and_in_order(kept: Far) -> None:
    positions = await kept.publish("a", 1, 2)
    kept.broker.slow = True
    joining = await spawn(join(kept, positions[0]))
    await kept.answer()  # the subscription
    await kept.asked()
    await kept.publish("a", 3, 4)
    assert not joining.done()
    await kept.answer()
    visitor = await joining
    await kept.publish("a", 5)
    assert visitor.got == [2, 3, 4, 5]
    assert [each.data for each in visitor.began[0].publications] == [2, 3, 4]


async def test_a_position_that_nobody_had_when_it_was_asked_for_is_from_the_future(kept: Far) -> None:
    positions = await kept.publish("a", 1, 2)
    kept.broker.slow = True
    joining = await spawn(join(kept, Position(3, positions[0].epoch)))
    await kept.answer()
    await kept.asked()
    positions += await kept.publish("a", 3, 4)
    await kept.answer()
    visitor = await joining
    assert (visitor.began, visitor.got) == ([Recovery(False, positions[-1])], [])


async def test_what_was_read_before_it_was_delivered_is_not_pushed_twice(kept: Far) -> None:
    visitor = await join(kept)
    await kept.publish("a", 1)
    [second] = await kept.lose("a", 2)
    late = await join(kept, Position(1, second.epoch))
    assert (visitor.got, late.got) == ([1, 2], [2])
    assert kept.pubsub._channels["a"].stream is not None
    kept.pubsub.deliver(Publication("a", encode(2), second))
    await kept.publish("a", 3)
    assert (visitor.got, late.got) == ([1, 2, 3], [2, 3])


async def test_a_thousand_who_come_back_at_once_are_one_read(kept: Far) -> None:
    positions = await kept.publish("a", 1, 2, 3)
    await join(kept)
    kept.broker.reads.clear()
    visitors = await asyncio.gather(*(join(kept, positions[0]) for _ in range(1000)))
    assert all(visitor.got == [2, 3] for visitor in visitors)
    assert kept.reads == 1


async def test_who_comes_while_a_history_is_read_has_it_read_again(kept: Far) -> None:
    await join(kept)
    kept.broker.slow = True
    positions = await kept.publish("a", 1)
    first = await spawn(join(kept, positions[0]))
    await kept.asked()
    await kept.publish("a", 2)
    second = await spawn(join(kept, positions[0]))
    await kept.answer()
    assert (await first).got == [2]
    assert not second.done()
    await kept.answer()
    assert (await second).got == [2]


async def test_one_read_is_for_those_who_missed_more_and_those_who_missed_less() -> None:
    far = Far(limit=2)
    await far.pubsub.start()
    positions = await far.publish("a", 1, 2, 3, 4, 5)
    much, little = await asyncio.gather(join(far, positions[0]), join(far, positions[3]))
    assert (much.got, little.got) == ([], [5])
    assert [limit for _, limit in far.broker.reads] == [2, 2]
    old = Position(1, "old")
    other, same = await asyncio.gather(join(far, old), join(far, positions[4]))
    assert [other.began[0].recovered, same.began[0].recovered] == [False, True]
    await far.pubsub.stop()


async def test_the_history_outlives_the_last_subscriber(kept: Far) -> None:
    visitor = await join(kept)
    await kept.pubsub.unsubscribe(["a"], visitor)
    assert not kept.pubsub._channels
    positions = await kept.publish("a", 1, 2)
    assert (await join(kept, positions[0])).got == [2]


# Gaps


async def test_one_that_is_missing_is_read_from_the_history(kept: Far) -> None:
    visitor = await join(kept)
    await kept.publish("a", 1)
    await kept.lose("a", 2, 3)
    await kept.publish("a", 4)
    assert visitor.got == [1], "held until the others are here"
    await settle()
    await kept.publish("a", 5)
    assert visitor.got == [1, 2, 3, 4, 5]
    assert visitor.lost_channels == []


async def test_what_the_history_has_not_got_is_told_and_nothing_of_the_rest_is_pushed(
    kept: Far, caplog: pytest.LogCaptureFixture
) -> None:
    visitor, deaf = await join(kept), Recorder()
    await kept.pubsub.subscribe("a", deaf)
    await kept.publish("a", 1)
    await kept.lose("a", 2, 3)
    kept.forget("a", 2)
    with caplog.at_level("WARNING", "asgi_ws"):
        await kept.publish("a", 4)
        await settle()
    assert (visitor.got, visitor.lost_channels) == ([1], ["a"])
    assert "publications to 'a' were lost" in caplog.text
    await kept.publish("a", 5)
    assert deaf.got == [1, 5]


async def test_who_comes_during_a_gap_waits_until_it_is_closed(kept: Far) -> None:
    visitor = await join(kept)
    kept.broker.slow = True
    await kept.lose("a", 1)
    await kept.publish("a", 2)
    joining = await spawn(join(kept))
    await kept.answer()
    if not joining.done():
        await kept.answer()
    await kept.publish("a", 3)
    assert (visitor.got, (await joining).got) == ([1, 2, 3], [3])


async def test_a_gap_that_comes_while_others_are_read_for_is_closed_and_they_wait_for_that(kept: Far) -> None:
    far = Far(limit=2)
    await far.pubsub.start()
    visitor = await join(far)
    positions = await far.publish("a", 1)
    far.broker.slow = True
    far.broker.cut()
    positions += await far.publish("a", 2, 3, 4)
    joining = await spawn(join(far, positions[-1]))
    await far.asked()
    far.broker._cut = False
    positions += await far.publish("a", 5)
    far.forget("a", 1)
    await far.answer()
    assert not joining.done()
    await far.answer()
    late = await joining
    await far.publish("a", 6)
    assert (visitor.got, late.got) == ([1, 2, 3, 4, 5, 6], [5, 6])
    await far.pubsub.stop()


async def test_a_link_that_is_back_has_everything_compared(kept: Far) -> None:
    visitor, other = await join(kept), await join(kept, channel="b")
    kept.broker.cut()
    await kept.publish("a", 1, 2)
    assert visitor.got == []
    kept.broker.mend()
    await settle()
    assert (visitor.got, other.got) == ([1, 2], [])
    kept.broker.cut()
    await kept.bus.forget_all()
    await kept.publish("a", 1)
    kept.broker.mend()
    await settle()
    assert visitor.lost_channels == ["a"]
    assert other.lost_channels == ["b"], "even where nothing was published: its positions are others now"


async def test_a_link_that_breaks_during_a_read_has_it_read_again(kept: Far) -> None:
    visitor = await join(kept)
    kept.broker.slow = True
    joining = await spawn(join(kept, Position(0, "e")))
    await kept.asked()
    kept.broker.cut()
    await kept.publish("a", 1)
    kept.broker.mend()
    await kept.answer()
    await joining
    await kept.answer()
    assert visitor.got == [1]


async def test_a_link_that_breaks_during_the_first_read_has_it_read_again(kept: Far) -> None:
    kept.broker.slow = True
    joining = await spawn(join(kept))
    await kept.answer()
    await kept.asked()
    kept.broker.cut()
    await kept.publish("a", 1)
    kept.broker.mend()
    await kept.answer()
    visitor = await joining
    await kept.answer()
    assert visitor.got == [1]


async def test_histories_are_read_of_so_many_channels_at_a_time(kept: Far) -> None:
    for number in range(150):
        await join(kept, channel=f"{number}")
    kept.broker.slow = True
    kept.broker.cut()
    kept.broker.mend()
    await settle()
    assert len(kept.broker._waiting) == 100
    await kept.answer()
    assert len(kept.broker._waiting) == 50
    await kept.answer()


async def test_a_read_that_fails_is_told_to_who_comes_and_tried_again_for_who_is_here(
    kept: Far, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asgi_ws.pubsub._RETRY", 0.01)
    visitor = await join(kept)
    await kept.lose("a", 1)
    kept.broker.fails = True
    await kept.publish("a", 2)
    with pytest.raises(BrokerError, match="no answer"), caplog.at_level("WARNING", "asgi_ws"):
        await join(kept, Position(0, "e"))
    while kept.reads < 4:
        await asyncio.sleep(0.005)
    assert visitor.got == []
    assert caplog.text.count("can't be read") == 1
    kept.broker.fails = False
    while not visitor.got:
        await asyncio.sleep(0.005)
    assert visitor.got == [1, 2]


async def test_a_first_read_that_fails_leaves_nothing(kept: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.pubsub._RETRY", 0.01)
    kept.broker.slow = True
    joining = [await spawn(join(kept)), await spawn(join(kept))]
    await kept.answer()
    await kept.asked()
    kept.broker.fails = True
    kept.broker.slow = False
    kept.broker.answer()
    results = await asyncio.gather(*joining, return_exceptions=True)
    assert [type(result) for result in results] == [BrokerError] * 2
    assert results[0] is not results[1]
    while kept.pubsub._channels:
        await asyncio.sleep(0.005)
    assert not kept.broker.subscribed


async def test_who_was_cancelled_is_not_told_of_a_read_that_failed(kept: Far) -> None:
    await join(kept)
    kept.broker.slow = kept.broker.fails = True
    joining = [asyncio.create_task(join(kept, Position(0, "e"))) for _ in range(2)]
    await kept.asked()
    joining[0].cancel()
    kept.broker.answer()
    results = await asyncio.gather(*joining, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError, BrokerError]


async def test_a_broker_with_a_bug_leaves_nobody_waiting(kept: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*args: Any, **options: Any) -> History:
        raise ZeroDivisionError

    monkeypatch.setattr(kept.broker, "history", broken)
    messages: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: messages.append(context["exception"]))
    with pytest.raises(BrokerError) as error:
        await join(kept)
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    await settle()
    gc.collect()
    assert [type(message) for message in messages] == [ZeroDivisionError], "and it is told"


async def test_a_gap_that_no_read_closes_is_not_read_without_a_pause(kept: Far) -> None:
    visitor = await join(kept)
    [lost] = await kept.lose("a", 1)
    history = kept.broker.history

    async def behind(channel: str, *, since: Position | None, limit: int | None) -> History:
        found = await history(channel, since=since, limit=limit)
        kept.pubsub.deliver(Publication("a", encode("x"), Position(found.position.offset + 2, lost.epoch)))
        return found

    kept.broker.history = behind  # type: ignore[method-assign]
    await kept.publish("a", 2)
    await settle()
    await settle()
    assert kept.reads <= 3
    assert visitor.got == [1, 2]


# The comparison of positions


async def test_a_loss_at_the_end_is_found_by_comparing(kept: Far) -> None:
    visitor, quiet = await join(kept), await join(kept, channel="b")
    other = Recorder()
    await kept.pubsub.subscribe("unkept", other)
    await kept.publish("b", 1)
    await kept.lose("a", 1, 2)
    kept.pubsub._check()
    await settle()
    assert (visitor.got, quiet.got) == ([1, 2], [1])
    kept.pubsub._check()
    await settle()
    assert (visitor.got, quiet.got) == ([1, 2], [1])


async def test_positions_are_compared_every_forty_seconds_or_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.pubsub._CHECK_INTERVAL", 0.01)
    far = Far()
    await far.pubsub.start()
    visitor = await join(far)
    await far.lose("a", 1)
    async with asyncio.timeout(2):
        while not visitor.got:
            await asyncio.sleep(0.005)
        await far.lose("a", 2)
        while visitor.got != [1, 2]:
            await asyncio.sleep(0.005)
    await far.pubsub.stop()


async def test_a_comparison_that_fails_is_nothing_and_comes_again(kept: Far) -> None:
    visitor = await join(kept)
    await kept.lose("a", 1)
    kept.broker.fails = True
    kept.pubsub._check()
    await settle()
    kept.broker.fails = False
    assert visitor.got == []
    kept.pubsub._check()
    await settle()
    assert visitor.got == [1]


async def test_a_hub_may_stop_while_positions_are_compared() -> None:
    far = Far()
    await far.pubsub.start()
    await join(far)
    far.broker.slow = True
    far.pubsub._check()
    await far.asked()
    await far.pubsub.stop()
    await settle()
    assert not far.pubsub._tasks


# Who leaves while a history is read


async def test_who_leaves_while_he_waits_is_never_let_in_and_the_others_are(kept: Far) -> None:
    positions = await kept.publish("a", 1, 2)
    kept.broker.slow = True
    gone = Visitor()
    joining = [
        await spawn(kept.pubsub.subscribe("a", gone, since=positions[0], begin=gone.begin)),
        await spawn(join(kept, positions[0])),
    ]
    await kept.answer()
    await kept.asked()
    await kept.pubsub.unsubscribe(["a"], gone)
    assert await joining[0] == Recovery(False, None)
    await kept.answer()
    visitor = await joining[1]
    await kept.publish("a", 3)
    assert (gone.got, gone.began, visitor.got) == ([], [], [2, 3])


async def test_who_is_cancelled_while_he_waits_takes_nobody_with_him(kept: Far) -> None:
    kept.broker.slow = True
    joining = [await spawn(join(kept)), await spawn(join(kept))]
    await kept.answer()
    await kept.asked()
    joining[0].cancel()
    await settle()
    assert kept.broker.subscribed == {"a"}
    await kept.answer()
    visitor = await joining[1]
    await kept.publish("a", 1)
    assert visitor.got == [1]
    assert len(kept.pubsub._channels["a"].subscribers) == 1


async def test_who_is_cancelled_when_he_was_let_in_gets_nothing(kept: Far) -> None:
    kept.broker.slow = True
    visitor = Visitor()
    joining = await spawn(kept.pubsub.subscribe("a", visitor, begin=visitor.begin))
    await kept.answer()
    await kept.asked()
    kept.broker.slow = False
    kept.broker.answer()
    while not visitor.began:
        await asyncio.sleep(0)
    joining.cancel()
    await asyncio.wait([joining])
    await settle()
    assert joining.cancelled()
    assert not kept.pubsub._channels
    assert not kept.broker.subscribed


async def test_a_channel_that_everybody_leaves_during_a_read_is_released_behind_it(kept: Far) -> None:
    visitor = await join(kept)
    kept.broker.slow = True
    joining = await spawn(join(kept, Position(0, "e")))
    await kept.asked()
    joining.cancel()
    await kept.pubsub.unsubscribe(["a"], visitor)
    assert kept.broker.subscribed == {"a"}
    kept.broker.slow = False
    await kept.answer()
    assert not kept.pubsub._channels
    assert not kept.broker.subscribed


async def test_who_comes_back_during_a_read_that_he_had_left_gets_everything_once(kept: Far) -> None:
    visitor = await join(kept)
    await kept.lose("a", 1)
    kept.broker.slow = True
    [second] = await kept.publish("a", 2)
    await kept.asked()
    await kept.pubsub.unsubscribe(["a"], visitor)
    again = await spawn(join(kept, Position(0, second.epoch)))
    await kept.answer()
    await kept.answer()
    assert (await again).got == [1, 2]
    assert visitor.got == []


async def test_one_that_is_subscribed_already_does_not_get_twice_what_it_missed(kept: Far) -> None:
    positions = await kept.publish("a", 1, 2)
    visitor = Visitor()
    await kept.pubsub.subscribe("a", visitor, since=positions[0])
    assert not (await kept.pubsub.subscribe("a", visitor, since=positions[0])).recovered
    assert visitor.got == [2]


async def test_a_hub_that_stops_lets_nobody_wait() -> None:
    far = Far()
    await far.pubsub.start()
    far.broker.slow = True
    joining = [await spawn(join(far)), await spawn(join(far, channel="b"))]
    await far.answer()
    await far.asked()
    await far.pubsub.stop()
    results = await asyncio.gather(*joining, return_exceptions=True)
    assert [type(result) for result in results] == [BrokerError] * 2
    await settle()
    assert not far.pubsub._tasks


async def test_who_comes_while_the_hub_stops_is_told() -> None:
    far = Far()
    await far.pubsub.start()
    far.broker.slow = True
    joining = await spawn(join(far))
    await far.asked()
    await far.pubsub.stop()
    far.broker.answer()
    with pytest.raises(BrokerError, match="stopped"):
        await joining


async def test_who_waits_for_another_read_when_the_hub_stops_is_told() -> None:
    far = Far()
    await far.pubsub.start()
    await join(far)
    far.broker.slow = True
    first = await spawn(join(far, Position(0, "e")))
    await far.asked()
    second = await spawn(join(far, Position(0, "e")))
    await far.pubsub.stop()
    results = await asyncio.gather(first, second, return_exceptions=True)
    assert [type(result) for result in results] == [BrokerError] * 2


# Reading histories


async def test_a_history_is_all_that_follows_a_position_or_nothing(kept: Far) -> None:
    positions = await kept.publish("a", *range(1, 8))

    async def read(offset: int, limit: int | None = None, epoch: str = positions[0].epoch) -> tuple[list[Any], bool]:
        history = await kept.pubsub.history("a", since=Position(offset, epoch), limit=limit)
        assert history.position == positions[-1]
        return [publication.data for publication in history.publications], history.complete

    assert await read(2) == ([3, 4, 5, 6, 7], True)
    assert await read(4, 2) == ([5, 6], True)
    assert await read(4, 0) == ([], True)
    assert await read(7) == ([], True)
    assert await read(7, 0) == ([], True)
    assert await read(1) == ([], False)
    assert await read(1, 0) == ([], False)
    assert await read(8) == ([], False)
    assert await read(8, 0) == ([], False)
    assert await read(4, epoch="other") == ([], False)
    latest = await kept.pubsub.history("a", limit=2)
    assert ([publication.data for publication in latest.publications], latest.complete) == ([6, 7], True)


async def test_a_channel_without_history_has_none_to_read(kept: Far) -> None:
    with pytest.raises(ValueError, match="'unkept' has no history"):
        await kept.pubsub.history("unkept")


async def test_a_broker_without_histories_is_published_to_without_retention() -> None:
    class Forgetful(Broker):
        async def start(self, deliver: Any, lost: Any) -> None:
            self.deliver = deliver

        async def stop(self) -> None: ...

        async def publish(self, channel: str, payload: Payload, *, sender: str | None = None) -> None:
            self.deliver(Publication(channel, payload))

        async def subscribe(self, channel: str) -> None: ...

        async def unsubscribe(self, channel: str) -> None: ...

    pubsub, recorder = PubSub(Forgetful(), keep), Recorder()
    await pubsub.start()
    assert await pubsub.subscribe("a", recorder, since=Position(0, "e")) == Recovery(False, None)
    await pubsub.publish("a", encode(1))
    assert recorder.got == [1]
    assert pubsub.has_subscribers("a")
    assert not pubsub.has_subscribers("b")
    with pytest.raises(ValueError, match="no history"):
        await pubsub.history("a")
    with pytest.raises(ValueError, match="Forgetful keeps nothing"):
        await pubsub.keep("ticket", "ann", 60)
    await pubsub.stop()


# A subscription on the server's side of a channel with a history


async def test_a_subscription_begins_with_what_was_missed(kept: Far) -> None:
    positions = await kept.publish("a", 1, 2, 3)
    async with Subscription(kept.pubsub, "a", 100, positions[0]) as publications:
        assert publications.recovery.recovered
        await kept.publish("a", 4)
        assert [(await anext(publications)).data for _ in range(3)] == [2, 3, 4]
    async with Subscription(kept.pubsub, "a", 100) as publications:
        assert not publications.recovery.recovered


async def test_a_subscription_says_that_publications_were_lost_behind_what_it_has(kept: Far) -> None:
    async with Subscription(kept.pubsub, "a", 100) as publications:
        await kept.publish("a", 1)
        await kept.lose("a", 2)
        kept.forget("a", 2)
        await kept.publish("a", 3)
        await settle()
        publications.lost("a")
        await kept.publish("a", 4)
        assert (await anext(publications)).data == 1
        for _ in range(2):
            with pytest.raises(PublicationsLost, match="'a'"):
                await anext(publications)


async def test_a_subscription_that_waits_hears_of_a_loss(kept: Far) -> None:
    async with Subscription(kept.pubsub, "a", 100) as publications:
        reading = await spawn(anext(publications))
        await kept.bus.forget_all()
        kept.broker.mend()
        with pytest.raises(PublicationsLost):
            await reading


async def test_words_are_kept_and_taken_once_in_whatever_process(kept: Far) -> None:
    other = PubSub(BusBroker(kept.bus))
    await kept.pubsub.keep("ticket", "ann", 60)
    assert await other.take("ticket") == "ann"
    assert await kept.pubsub.take("ticket") is None
