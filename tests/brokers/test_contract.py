"""What every broker owes.

A kind of broker is tested for what it says that it can do: a line in `KINDS`, and what serves it.
"""

import asyncio
import contextlib
import dataclasses
import inspect
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from asgi_ws.brokers import Broker, HistoryBroker, MemoryBroker, PresenceBroker, broker_for
from asgi_ws.exceptions import BrokerError
from asgi_ws.messages import Position, Publication, Retention
from asgi_ws.payloads import Payload, encode
from tests.services import redis_cluster, redis_server
from tests.services_nats import nats_server

pytestmark = pytest.mark.anyio

TIMEOUT = 5
KEPT = Retention(100, 60)


@dataclasses.dataclass
class Kind:
    """A broker, what it can do, and the server that it needs: a context manager that gives its URL."""

    abilities: set[str]
    serve: Callable[[], contextlib.AbstractContextManager[str]]
    make: Callable[[str, str], Broker] = lambda url, prefix: broker_for(f"{url}?prefix={prefix}")


@contextlib.contextmanager
def serve_redis() -> Iterator[str]:
    with redis_server() as server:
        yield server.url


@contextlib.contextmanager
def serve_redis_cluster() -> Iterator[str]:
    with redis_cluster() as cluster:
        yield cluster.url


@contextlib.contextmanager
def serve_nats() -> Iterator[str]:
    with nats_server() as server:
        yield server.url


KINDS = {
    "memory": Kind(
        {"single", "history", "presence"},
        lambda: contextlib.nullcontext("memory://"),
        lambda url, prefix: MemoryBroker(),
    ),
    "redis": Kind({"processes", "history", "presence"}, serve_redis),
    "redis-cluster": Kind({"processes", "history", "presence"}, serve_redis_cluster),
    "nats": Kind({"processes", "history", "presence"}, serve_nats),
}


def needs(*abilities: str) -> pytest.MarkDecorator:
    """For the kinds that can do this: "single" process or many "processes", "history", "presence"."""
    kinds = [name for name, kind in KINDS.items() if kind.abilities.issuperset(abilities)]
    return pytest.mark.parametrize("kind", kinds, indirect=True, scope="module")


MakeBroker = Callable[..., Any]


@pytest.fixture(params=KINDS, scope="module")
def kind(request: pytest.FixtureRequest) -> Iterator[tuple[Kind, str]]:
    kind = KINDS[request.param]
    with kind.serve() as url:
        yield kind, url


@pytest.fixture
def make_broker(kind: tuple[Kind, str]) -> MakeBroker:
    """Makes brokers that share what only this test sees, or that which `prefix` names."""
    (made, url), own = kind, f"test{uuid.uuid4().hex}"

    def make(prefix: str = "") -> Broker:
        return made.make(url, own + prefix)

    return make


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


@contextlib.asynccontextmanager
async def started(broker: Broker) -> AsyncIterator[Deliveries]:
    deliveries = Deliveries()
    await broker.start(deliveries.deliver, deliveries.on_lost)
    try:
        yield deliveries
    finally:
        await broker.stop()


def kept(broker: Broker) -> dict[str, Any]:
    """What `publish` needs for a publication to have a position."""
    return {"retention": KEPT} if isinstance(broker, HistoryBroker) else {}


async def until(condition: Callable[[], Awaitable[Any]]) -> Any:
    """Ask until the answer is true."""
    async with asyncio.timeout(TIMEOUT):
        while not (answer := await condition()):
            await asyncio.sleep(0.01)
    return answer


async def test_a_publication_comes_back_as_it_was_published(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker) as deliveries:
        await broker.subscribe("räume:1 🎈")
        payloads = [Payload("text", "grüß"), Payload("json", '{"a":1}'), Payload("binary", b"\x00\xff")]
        for count, payload in enumerate(payloads, 1):
            position = await broker.publish("räume:1 🎈", payload, sender="ann", **kept(broker))
            await deliveries.until(count)
            assert deliveries[-1] == Publication("räume:1 🎈", payload, position, "ann")


async def test_the_sender_travels_or_there_is_none(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker) as deliveries:
        await broker.subscribe("a")
        await broker.publish("a", encode("1"))
        await broker.publish("a", encode("2"), sender="ann")
        await deliveries.until(2)
        assert [publication.sender for publication in deliveries] == [None, "ann"]


async def test_publications_of_a_channel_arrive_in_their_order(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker) as deliveries:
        await broker.subscribe("a")
        await broker.subscribe("b")

        async def publish(name: str) -> None:
            for number in range(50):
                await broker.publish("ab"[number % 2], encode([name, number]), **kept(broker))

        await asyncio.gather(publish("one"), publish("two"))
        await deliveries.until(100)
    for channel in "ab":
        positions = [publication.position for publication in deliveries if publication.channel == channel]
        assert [position and position.offset for position in positions] == list(range(1, 51))
        for name in ("one", "two"):
            own = [each.data[1] for each in deliveries if each.channel == channel and each.data[0] == name]
            assert own == sorted(own)


async def test_positions_increase_by_one_within_an_epoch(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker) as deliveries:
        await broker.subscribe("a")
        returned = [await broker.publish("a", encode(str(number)), **kept(broker)) for number in range(5)]
        await deliveries.until(5)
    assert [position and position.offset for position in returned] == [1, 2, 3, 4, 5]
    assert len({position and position.epoch for position in returned}) == 1
    assert [publication.position for publication in deliveries] == returned


async def test_only_subscribed_channels_are_delivered(make_broker: MakeBroker) -> None:
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


async def test_nothing_is_delivered_after_stop(make_broker: MakeBroker) -> None:
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


async def test_the_epoch_changes_when_counting_starts_again(make_broker: MakeBroker) -> None:
    """Whoever held a position of before must not take a new one for a later one."""
    broker = make_broker()
    seen: dict[str, int] = {}

    async def publish() -> None:
        position = await broker.publish("a", encode("x"), **kept(broker))
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


@needs("single")
async def test_two_brokers_never_count_in_the_same_epoch(make_broker: MakeBroker) -> None:
    epochs = []
    for _ in range(2):
        broker = make_broker()
        async with started(broker):
            position = await broker.publish("only of this test", encode("x"))
            epochs.append(position and position.epoch)
    assert epochs[0] != epochs[1]


async def test_channels_that_nobody_subscribes_to_any_more_are_forgotten(make_broker: MakeBroker) -> None:
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
        await until(lambda: asyncio.sleep(0, sizes(broker) == before))


def sizes(holder: object, seen: set[int] | None = None) -> dict[str, int]:
    """How much a broker holds, by attribute, its parts included."""
    seen = set() if seen is None else seen
    seen.add(id(holder))
    found = {}
    for name, value in inspect.getmembers(holder):
        if name.startswith("__"):
            continue
        if isinstance(value, dict | list | set):
            found[name] = len(value)
        elif type(value).__module__.startswith("asgi_ws.") and id(value) not in seen:
            found |= {f"{name}.{inner}": size for inner, size in sizes(value, seen).items()}
    return found


async def test_ten_thousand_channels_are_subscribed_and_left(make_broker: MakeBroker) -> None:
    broker, channels = make_broker(), [f"room:{number}" for number in range(10_000)]
    async with started(broker) as deliveries:
        started_at = time.monotonic()
        await asyncio.gather(*map(broker.subscribe, channels))
        await asyncio.gather(*(broker.publish(channel, encode(channel)) for channel in channels))
        assert sorted(await deliveries.until(10_000)) == sorted(channels)
        await asyncio.gather(*map(broker.unsubscribe, channels))
        assert time.monotonic() - started_at < 20
        await asyncio.gather(*(broker.publish(channel, encode("unheard")) for channel in channels[::100]))
        await broker.subscribe("last")
        await broker.publish("last", encode("last"))
        assert (await deliveries.until(10_001))[-1] == "last"


async def test_a_subscription_that_nobody_waits_for_can_be_asked_for_again(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker) as deliveries:
        for steps in range(8):
            subscribing = asyncio.create_task(broker.subscribe("a"))
            for _ in range(steps):
                await asyncio.sleep(0)
            subscribing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await subscribing
                await broker.unsubscribe("a")
            await broker.subscribe("a")
            await broker.publish("a", encode(str(steps)))
            await deliveries.until(steps + 1)
            await broker.unsubscribe("a")
        assert [publication.data for publication in deliveries] == [str(steps) for steps in range(8)]


# Many processes


@needs("processes")
async def test_what_one_publishes_all_get_in_the_same_order(make_broker: MakeBroker) -> None:
    one, two = make_broker(), make_broker()
    async with started(one) as first, started(two) as second:
        await one.subscribe("a")
        await two.subscribe("a")

        async def publish(broker: Broker, name: str) -> list[Position | None]:
            return [await broker.publish("a", encode(f"{name}{number}"), **kept(broker)) for number in range(100)]

        positions = await asyncio.gather(*(publish(broker, name) for broker in (one, two) for name in ("x", "y")))
        await first.until(400)
        await second.until(400)
        assert first == second
        if kept(one):
            assert [publication.position for publication in first] == sorted(
                (position for each in positions for position in each if position), key=lambda position: position.offset
            )
            history = await two.history("a", since=None, limit=None)
            assert list(history.publications) == first[-KEPT.size :]


@needs("processes")
async def test_prefixes_keep_hubs_apart(make_broker: MakeBroker) -> None:
    ours, theirs = make_broker("a"), make_broker("ab")
    async with started(ours) as our_deliveries, started(theirs) as their_deliveries:
        for channel in ("x", "b:x"):
            await ours.subscribe(channel)
            await theirs.subscribe(channel)
        await theirs.publish("x", encode("theirs"), **kept(theirs))
        await ours.publish("x", encode("ours"), **kept(ours))
        assert await their_deliveries.until(1) == ["theirs"]
        assert await our_deliveries.until(1) == ["ours"]
        if isinstance(ours, HistoryBroker) and isinstance(theirs, HistoryBroker):
            history = await ours.history("x", since=None, limit=None)
            assert [publication.data for publication in history.publications] == ["ours"]
            await theirs.remember("x", "theirs")
            assert await ours.recall("x") is None
        if isinstance(ours, PresenceBroker) and isinstance(theirs, PresenceBroker):
            await theirs.enter("x", "1", "bob", "", expiry=60)
            assert await ours.count("x") == (0, 0)


@needs("processes")
@pytest.mark.parametrize("channel", ["{a}", "{", "}{", "{}x", "a}b", "%7Ba}", "a:{b}:c", "*", "a.>", " ", "ä" * 255])
async def test_any_name_is_a_channel_of_its_own(make_broker: MakeBroker, channel: str) -> None:
    broker = make_broker()
    async with started(broker) as deliveries:
        await broker.subscribe("other")
        await broker.subscribe(channel)
        await broker.publish(channel, encode("1"), **kept(broker))
        await broker.publish("other", encode("2"), **kept(broker))
        assert sorted(await deliveries.until(2)) == ["1", "2"]
        assert sorted(publication.channel for publication in deliveries) == sorted([channel, "other"])
        if isinstance(broker, HistoryBroker):
            history = await broker.history(channel, since=None, limit=None)
            assert [publication.data for publication in history.publications] == ["1"]


# History


@needs("history")
async def test_history_is_what_was_published(make_broker: MakeBroker) -> None:
    broker, payloads = (
        make_broker(),
        [Payload("text", "grüß"), Payload("json", '{"a":1}'), Payload("binary", b"\0\xff")],
    )
    async with started(broker):
        for number, payload in enumerate(payloads):
            await broker.publish("a", payload, sender="ann" if number else None, retention=KEPT)
        history = await broker.history("a", since=None, limit=None)
        epoch = history.position.epoch
        assert history.position == Position(3, epoch)
        assert history.publications == (
            Publication("a", payloads[0], Position(1, epoch)),
            Publication("a", payloads[1], Position(2, epoch), "ann"),
            Publication("a", payloads[2], Position(3, epoch), "ann"),
        )


@needs("history")
async def test_what_is_published_without_a_retention_is_not_kept(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker) as deliveries:
        await broker.subscribe("a")
        await broker.publish("a", encode("1"))
        assert await deliveries.until(1) == ["1"]
        assert (await broker.history("a", since=None, limit=None)).publications == ()


def offsets(history: Any) -> list[int]:
    return [publication.position.offset for publication in history.publications]


@needs("history")
async def test_history_keeps_the_latest_of_its_size(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        for number in range(250):
            await broker.publish("a", encode(str(number)), retention=Retention(100, 60))
        history = await broker.history("a", since=None, limit=None)
        assert offsets(history) == list(range(151, 251))
        assert history.position.offset == 250


@needs("history")
async def test_since_and_limit_choose_from_history(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        for number in range(10):
            await broker.publish("a", encode(str(number)), retention=Retention(5, 60))
        top = (await broker.history("a", since=None, limit=0)).position
        assert top.offset == 10

        async def read(since: int | None, limit: int | None, epoch: str = top.epoch) -> list[int]:
            position = None if since is None else Position(since, epoch)
            history = await broker.history("a", since=position, limit=limit)
            assert history.position == top
            return offsets(history)

        assert await read(None, None) == [6, 7, 8, 9, 10]
        assert await read(None, 2) == [9, 10]
        assert await read(None, 100) == [6, 7, 8, 9, 10]
        assert await read(None, 0) == []
        assert await read(7, None) == [8, 9, 10]
        assert await read(7, 2) == [8, 9]
        assert await read(7, 0) == []
        assert await read(0, 2) == [6, 7]
        assert await read(10, None) == []
        assert await read(11, None) == []
        assert await read(2**53 - 1, None) == []
        assert await read(7, None, "another epoch") == []


@needs("history")
async def test_a_channel_has_a_position_before_its_first_publication(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        before = await broker.history("a", since=None, limit=None)
        assert before.publications == ()
        assert before.position.offset == 0
        assert (await broker.history("a", since=None, limit=0)).position == before.position
        position = await broker.publish("a", encode("1"), retention=KEPT)
        assert position == Position(1, before.position.epoch)
        assert offsets(await broker.history("a", since=before.position, limit=None)) == [1]


@needs("history")
async def test_history_ends_some_time_after_the_last_publication(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        await broker.subscribe("a")
        for number in range(3):
            last = await broker.publish("a", encode(str(number)), retention=Retention(100, 0.2))
        assert offsets(await broker.history("a", since=None, limit=None)) == [1, 2, 3]

        async def is_empty() -> bool:
            history = await broker.history("a", since=None, limit=None)
            assert history.position == last, "the position outlives what was kept"
            return not history.publications

        await until(is_empty)
        assert await broker.publish("a", encode("3"), retention=KEPT) == Position(4, last.epoch)
        assert offsets(await broker.history("a", since=Position(3, last.epoch), limit=None)) == [4]


@needs("history")
async def test_history_outlives_its_subscribers(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        await broker.subscribe("a")
        first = await broker.publish("a", encode("1"), retention=KEPT)
        await broker.unsubscribe("a")
        second = await broker.publish("a", encode("2"), retention=KEPT)
        await broker.subscribe("a")
        assert second == Position(2, first.epoch)
        assert offsets(await broker.history("a", since=None, limit=None)) == [1, 2]


@needs("history")
async def test_words_are_remembered(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        assert await broker.recall("rules {1}") is None
        await broker.remember("rules {1}", "ä")
        await broker.remember("rules {1}", "ö")
        assert await broker.recall("rules {1}") == "ö"
        assert await broker.recall("rules") is None


@needs("history")
async def test_words_are_taken_by_one_of_those_who_ask_and_expire(make_broker: MakeBroker) -> None:
    one, other = make_broker(), make_broker()
    async with started(one), started(other):
        await one.remember("ticket", "ann", ttl=60)
        there = one if isinstance(one, MemoryBroker) else other
        takers = [broker.take("ticket") for broker in (one, there) for _ in range(20)]
        taken = await asyncio.gather(*takers)
        assert sorted(map(str, taken)) == ["None"] * 39 + ["ann"]
        assert await one.recall("ticket") is None
        await one.remember("ticket", "bob", ttl=0.2)
        assert await one.recall("ticket") == "bob"
        async with asyncio.timeout(TIMEOUT):
            while await one.recall("ticket") is not None:
                await asyncio.sleep(0.02)
        assert await one.take("ticket") is None


# Presence


@needs("presence")
async def test_a_key_is_new_once_however_many_members_have_it(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        assert await broker.enter("a", "1", "ann", "phone", expiry=60)
        assert not await broker.enter("a", "2", "ann", "laptop", expiry=60)
        assert await broker.enter("a", "3", "bob", "", expiry=60)
        assert await broker.enter("b", "4", "ann", "elsewhere", expiry=60)
        assert await broker.members("a") == {"1": "phone", "2": "laptop", "3": ""}
        assert await broker.count("a") == (3, 2)
        assert await broker.count("b") == (1, 1)
        assert await broker.count("c") == (0, 0)
        assert await broker.members("c") == {}


@needs("presence")
async def test_members_are_in_the_order_in_which_they_came(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        for connection in ("z", "ö", "a", "m"):
            await broker.enter("a", connection, connection, "", expiry=60)
        await broker.enter("a", "ö", "ö", "new", expiry=60)
        assert list((await broker.members("a")).items()) == [("z", ""), ("ö", "new"), ("a", ""), ("m", "")]


@needs("presence")
async def test_a_member_that_says_something_new_is_no_other(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        await broker.enter("a", "1", "ann", "here", expiry=60)
        assert not await broker.enter("a", "1", "ann", "busy", expiry=60)
        assert await broker.members("a") == {"1": "busy"}
        assert await broker.count("a") == (1, 1)


@needs("presence")
async def test_a_key_lingers_unseen_until_its_grace_is_over(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        await broker.enter("a", "1", "ann", "", expiry=60)
        await broker.leave("a", "1", grace=60)
        assert await broker.members("a") == {}
        assert await broker.count("a") == (0, 0)
        assert not await broker.settle("a", "ann")
        assert await broker.refresh("a", {}, expiry=60) == []
        assert not await broker.enter("a", "2", "ann", "", expiry=60), "it came back in time"
        assert await broker.count("a") == (1, 1)
        assert not await broker.settle("a", "ann")


@needs("presence")
async def test_a_key_goes_once_when_its_grace_is_over(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        await broker.enter("a", "1", "ann", "", expiry=60)
        await broker.enter("a", "2", "ann", "", expiry=60)
        await broker.leave("a", "1", grace=0)
        assert not await broker.settle("a", "ann"), "there is another member"
        await broker.leave("a", "2", grace=0.05)
        await until(lambda: broker.settle("a", "ann"))
        assert not await broker.settle("a", "ann")
        assert await broker.refresh("a", {}, expiry=60) == []
        assert await broker.enter("a", "3", "ann", "", expiry=60), "it is new again"


@needs("presence")
async def test_a_key_that_comes_back_before_anybody_was_told_is_not_new(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        await broker.enter("a", "1", "ann", "", expiry=60)
        await broker.leave("a", "1", grace=0)
        assert not await broker.enter("a", "2", "ann", "", expiry=60)
        assert not await broker.settle("a", "ann")
        assert await broker.refresh("a", {}, expiry=60) == []


@needs("processes", "presence")
async def test_a_grace_that_nobody_settles_ends_in_a_refresh(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        await broker.enter("a", "1", "ann", "", expiry=60)
        await broker.leave("a", "1", grace=0.05)
        assert await until(lambda: broker.refresh("a", {"2": ("bob", "")}, expiry=60)) == ["ann"]
        assert not await broker.settle("a", "ann")
        assert await broker.members("a") == {"2": ""}


@needs("presence")
async def test_whoever_was_not_there_cannot_leave(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        await broker.leave("a", "1", grace=0)
        await broker.enter("a", "1", "ann", "", expiry=60)
        await broker.enter("a", "2", "ann", "", expiry=60)
        await broker.leave("a", "1", grace=0)
        await broker.leave("a", "1", grace=0)
        assert await broker.count("a") == (1, 1)
        assert await broker.refresh("a", {}, expiry=60) == []


@needs("presence")
async def test_members_that_nobody_refreshes_expire(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        await broker.enter("a", "1", "ann", "", expiry=0.1)
        await broker.enter("a", "2", "ann", "", expiry=60)
        await broker.enter("a", "3", "bob", "", expiry=0.1)
        assert await broker.count("a") == (3, 2)

        async def only_one() -> bool:
            return await broker.members("a") == {"2": ""}

        await until(only_one)
        assert await broker.count("a") == (1, 1)
        assert await broker.refresh("a", {"2": ("ann", "")}, expiry=60) == ["bob"]
        assert await broker.refresh("a", {"2": ("ann", "")}, expiry=60) == []
        assert not await broker.settle("a", "bob")
        assert await broker.enter("a", "4", "bob", "", expiry=60)


@needs("presence")
async def test_members_that_are_refreshed_stay(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        await broker.enter("a", "1", "ann", "", expiry=0.3)
        for _ in range(6):
            await asyncio.sleep(0.1)
            assert await broker.refresh("a", {"1": ("ann", "")}, expiry=0.3) == []
        assert await broker.members("a") == {"1": ""}


@needs("presence")
async def test_a_refresh_brings_back_whom_the_server_forgot(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        members = {str(number): (f"user {number % 10}", f"value {number}") for number in range(1000)}
        assert await broker.refresh("a", members, expiry=60) == []
        assert await broker.count("a") == (1000, 10)
        assert await broker.members("a") == {connection: value for connection, (_, value) in members.items()}
        assert await broker.refresh("a", {"7": ("user 7", "new")}, expiry=60) == []
        assert (await broker.members("a"))["7"] == "new"


@needs("presence")
async def test_a_member_with_another_key_leaves_the_one_it_had(make_broker: MakeBroker) -> None:
    broker = make_broker()
    async with started(broker):
        await broker.enter("a", "1", "guest", "", expiry=60)
        assert await broker.enter("a", "1", "ann", "", expiry=60)
        assert await broker.count("a") == (1, 1)


@needs("processes", "presence")
async def test_presence_spans_processes(make_broker: MakeBroker) -> None:
    one, two = make_broker(), make_broker()
    async with started(one), started(two):
        assert await one.enter("a", "1", "ann", "x", expiry=60)
        assert not await two.enter("a", "2", "ann", "y", expiry=60)
        assert await one.members("a") == await two.members("a") == {"1": "x", "2": "y"}
        await one.leave("a", "1", grace=0)
        await one.leave("a", "2", grace=0)
        await asyncio.sleep(0.005)
        assert sorted(await asyncio.gather(one.settle("a", "ann"), two.settle("a", "ann"))) == [False, True]


# URLs


def test_a_url_names_its_broker() -> None:
    assert type(broker_for("memory://")) is MemoryBroker


@pytest.mark.parametrize("url", ["", "memory", "memory:", "memory://host", "Memory://", "carrier-pigeon://coop", "://"])
def test_a_url_that_is_not_known_is_a_mistake(url: str) -> None:
    with pytest.raises(ValueError, match=r"no broker is known for .*; known are 'memory://'"):
        broker_for(url)
