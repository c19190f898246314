"""Who is there, over two processes that share a bus."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from asgi_ws.exceptions import BrokerError
from asgi_ws.presence import Member, Presence, PresenceStats
from asgi_ws.pubsub import PubSub
from tests.bus import Bus, BusBroker

pytestmark = pytest.mark.anyio


class End:
    """One process."""

    def __init__(self, bus: Bus) -> None:
        self.broker = BusBroker(bus)
        self.pubsub = PubSub(self.broker)
        self.presence = Presence(self.broker, self.pubsub)

    async def stop(self) -> None:
        await self.presence.stop()
        await self.pubsub.stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds take hundredths."""
    monkeypatch.setattr("asgi_ws.presence.GRACE", 0.03)
    monkeypatch.setattr("asgi_ws.presence.LATER", 0.01)


@pytest.fixture
async def ends() -> AsyncIterator[tuple[End, End]]:
    bus = Bus()
    one, two = End(bus), End(bus)
    await one.pubsub.start()
    await two.pubsub.start()
    yield one, two
    await one.stop()
    await two.stop()


ANN, ANN_AGAIN, BOB = Member("1", "ann", {"mood": "good"}), Member("2", "ann"), Member("3", "bob")


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def until(condition: Any) -> None:
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0.002)


async def read(events: Any, count: int = 1) -> list[tuple[str, str | None]]:
    async with asyncio.timeout(2):
        found = [(await anext(events)).data for _ in range(count)]
    return [(event["type"], event["user"] or event["connection"]) for event in found]


async def test_everybody_is_listed_wherever_he_is(ends: tuple[End, End]) -> None:
    one, two = ends
    await one.presence.enter("a", ANN)
    await two.presence.enter("a", ANN_AGAIN)
    await two.presence.enter("a", Member("4"))
    assert await one.presence.members("a") == await two.presence.members("a") == [ANN, ANN_AGAIN, Member("4")]
    assert await one.presence.stats("a") == PresenceStats(connections=3, users=2)
    assert await one.presence.members("b") == []


async def test_the_first_connection_comes_and_the_last_one_leaves(ends: tuple[End, End]) -> None:
    one, two = ends
    async with two.presence.events("a", 1000) as events:
        await one.presence.enter("a", ANN)
        await two.presence.enter("a", ANN_AGAIN)
        one.presence.leave("a", "1")
        await one.presence.enter("a", Member("4"))
        assert await read(events, 2) == [("join", "ann"), ("join", "4")]
        two.presence.leave("a", "2")
        two.presence.leave("a", "2")
        assert await read(events) == [("leave", "ann")]
    assert not two.presence._watched


async def test_who_comes_back_soon_has_neither_left_nor_come(ends: tuple[End, End]) -> None:
    one, two = ends
    async with two.presence.events("a", 1000) as events:
        await one.presence.enter("a", ANN)
        one.presence.leave("a", "1")
        await settle()
        await two.presence.enter("a", ANN_AGAIN)
        await until(lambda: not one.presence._timers)
        await two.presence.enter("a", BOB)
        assert await read(events, 2) == [("join", "ann"), ("join", "bob")]


async def test_who_leaves_is_gone_even_if_nobody_waits_for_that(ends: tuple[End, End]) -> None:
    one, two = ends
    await one.presence.enter("a", ANN)
    one.presence.leave("a", "1")
    assert not one.presence._members
    await until(lambda: not one.presence._tasks)
    assert await two.presence.members("a") == []


async def test_who_leaves_while_he_is_entered_is_gone_and_others_hear_of_both(ends: tuple[End, End]) -> None:
    one, two = ends
    async with two.presence.events("a", 1000) as events:
        one.broker.slow = True
        entering = asyncio.create_task(one.presence.enter("a", ANN))
        await settle()
        leaving = one.presence.leave("a", "1")
        one.broker.slow = False
        # The word that he left may arrive first.
        one.broker._waiting.reverse()
        one.broker.answer()
        await entering
        assert leaving is not None
        await leaving
        assert await two.presence.members("a") == []
        assert await read(events, 2) == [("join", "ann"), ("leave", "ann")]


async def test_who_can_not_be_entered_is_not_here(ends: tuple[End, End], caplog: pytest.LogCaptureFixture) -> None:
    one, _ = ends
    one.broker.fails = True
    with pytest.raises(BrokerError), caplog.at_level("WARNING", "asgi_ws"):
        await one.presence.enter("a", ANN)
    await until(lambda: not one.presence._tasks)
    assert "who left 'a'" in caplog.text
    assert not one.presence._members
    with pytest.raises(TypeError):
        await one.presence.enter("a", Member("1", info=object()))
    assert not one.presence._members
    await until(lambda: "whether 'u:ann' has left 'a' is not known" in caplog.text)


async def test_members_are_refreshed_and_those_of_a_dead_process_expire(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asgi_ws.presence.EXPIRY", 0.1)
    monkeypatch.setattr("asgi_ws.presence.REFRESH_INTERVAL", 0.02)
    one, two = ends
    await two.presence.enter("a", BOB)
    async with two.presence.events("a", 1000) as events:
        await one.presence.enter("a", ANN)
        await one.presence.enter("a", Member("4"))
        await one.presence.stop()
        assert await read(events, 4) == [("join", "ann"), ("join", "4"), ("leave", "ann"), ("leave", "4")]
        assert await two.presence.members("a") == [BOB]
    two.presence.leave("a", "3")
    await until(lambda: two.presence._timer is None)


async def test_a_refresh_that_fails_is_told_once_and_tried_again(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("asgi_ws.presence.REFRESH_INTERVAL", 0.02)
    one, two = ends
    for channel in "abc":
        await one.presence.enter(channel, ANN)
    await one.broker.bus.forget_all()
    one.broker.fails = True
    with caplog.at_level("WARNING", "asgi_ws"):
        await until(lambda: caplog.records)
    assert len(caplog.records) == 1
    one.broker.fails = False
    await until(lambda: len(one.broker.bus.store._presence) == 3)
    assert await two.presence.members("b") == [ANN]


async def test_who_leaves_while_he_is_refreshed_does_not_come_back(ends: tuple[End, End]) -> None:
    one, two = ends
    async with two.presence.events("a", 1000) as events:
        await one.presence.enter("a", ANN)
        await two.presence.enter("a", BOB)
        one.broker.slow = True
        one.presence._refresh()
        await settle()
        one.presence.leave("a", "1")
        await settle()
        one.broker.slow = False
        one.broker._waiting.reverse()
        one.broker.answer()
        assert await read(events, 3) == [("join", "ann"), ("join", "bob"), ("leave", "ann")]
        assert await two.presence.members("a") == [BOB]


async def test_after_stop_nothing_is_asked_and_nothing_waits(ends: tuple[End, End]) -> None:
    one, two = ends
    await one.presence.enter("a", ANN)
    await one.presence.enter("a", BOB)
    one.presence.leave("a", "1")
    one.broker.slow = True
    await settle()
    await one.presence.stop()
    assert not one.presence._tasks
    assert one.presence.leave("a", "3") is None
    one.presence.unwatch("a")
    assert not one.presence._watched
    one.presence.watch("a")
    assert one.presence._timer is None or one.presence._timer.cancelled()
    assert [member.user for member in await two.presence.members("a")][-1] == "bob"


async def test_a_channel_is_watched_until_nobody_does(ends: tuple[End, End]) -> None:
    one, two = ends
    async with one.presence.events("a", 1000) as events:
        async with one.presence.events("a", 1000):
            assert one.presence._watched == {"a": 2}
        assert one.presence._watched == {"a": 1}
        await two.presence.enter("a", BOB)
        assert await read(events) == [("join", "bob")]
    assert not one.presence._watched


async def test_who_was_being_entered_when_the_hub_stopped_leaves_no_timer(ends: tuple[End, End]) -> None:
    one, _ = ends
    one.broker.slow = True
    entering = asyncio.create_task(one.presence.enter("a", ANN))
    await settle()
    one.presence.leave("a", "1")
    await settle()
    await one.presence.stop()
    one.broker.slow = False
    one.broker.answer()
    await entering
    assert not one.presence._timers
