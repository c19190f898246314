import asyncio
from collections import defaultdict
from collections.abc import Coroutine
from typing import Any

import pytest

from asgi_ws.brokers import MemoryBroker
from asgi_ws.exceptions import BrokerError, SubscriberTooSlow
from asgi_ws.messages import History, Position, Publication, Retention
from asgi_ws.payloads import Payload, encode
from asgi_ws.pubsub import PubSub, Subscription

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
