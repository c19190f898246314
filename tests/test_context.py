"""What is watched over all connections of a process."""

import asyncio
import typing

import pytest

from asgi_ws import BrokerError, ConnectionClosed, Hub, Limits
from asgi_ws import context as context_module
from asgi_ws.brokers import Broker
from asgi_ws.context import Connections
from asgi_ws.messages import Publication
from asgi_ws.payloads import encode
from tests.bus import Bus, BusBroker

pytestmark = pytest.mark.anyio


class RecordingLink:
    def __init__(self, buffered: int) -> None:
        self.buffered = buffered
        self.written = 2_000_000
        self.aborted = asyncio.Event()

    def abort(self) -> None:
        self.buffered = 0
        self.aborted.set()


class RecordingReceiver:
    def __init__(self) -> None:
        self.lost: list[ConnectionClosed] = []

    def connection_lost(self, closed: ConnectionClosed) -> None:
        self.lost.append(closed)


async def test_a_link_that_takes_nothing_is_aborted_and_its_receiver_is_told() -> None:
    connections = Connections(Limits(write_timeout=0.05))
    link, idle, receiver = RecordingLink(10), RecordingLink(0), RecordingReceiver()
    connections.watch(link, receiver)  # type: ignore[arg-type]
    connections.watch(idle, receiver)  # type: ignore[arg-type]
    await asyncio.wait_for(link.aborted.wait(), 1)
    assert [(closed.code, closed.clean) for closed in receiver.lost] == [(1006, False)]
    assert not idle.aborted.is_set()
    connections.stop()


async def test_draining_goes_on_while_a_client_takes_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.context.STOP_TIME", 0.01)
    connections = Connections(Limits(drain_timeout=0.2))
    empty, stuck, slow = RecordingLink(0), RecordingLink(10), RecordingLink(1_000_000)
    for link in (empty, stuck, slow):
        connections.drain(link)  # type: ignore[arg-type]
    taking = asyncio.create_task(take_slowly(slow))
    await asyncio.wait_for(stuck.aborted.wait(), 1)
    assert not slow.aborted.is_set()
    # Until the drain time is over.
    await asyncio.wait_for(slow.aborted.wait(), 1)
    await taking
    assert not empty.aborted.is_set()


async def take_slowly(link: RecordingLink) -> None:
    while not link.aborted.is_set():
        link.buffered -= 1
        await asyncio.sleep(0.001)


# What hubs tell each other


async def test_whoever_publishes_from_outside_keeps_what_the_application_keeps() -> None:
    bus = Bus()
    application, outside = Hub(BusBroker(bus)), Hub(BusBroker(bus))
    application.channel("kept:{name}", history=2, ttl=60)
    application.channel("other")
    async with application, outside:
        for number in range(3):
            await outside.publish("kept:1", number)
            await outside.publish("other", number)
        assert [each.data for each in (await application.history("kept:1")).publications] == [1, 2]
        assert [each.data for each in (await outside.history("kept:1")).publications] == [1, 2]
        assert outside.context.retention("other") is None


async def test_who_is_outside_before_the_application_begins_learns_what_it_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(context_module, "_BORROW_INTERVAL", 0.02)
    bus = Bus()
    async with Hub(BusBroker(bus)) as outside:
        assert await outside.publish("kept", "lost") is None
        application = Hub(BusBroker(bus))
        application.channel("kept", history=2)
        async with application:
            await asyncio.sleep(0.03)
            assert await outside.publish("kept", "there") is not None
            assert [each.data for each in await application.history("kept")] == ["there"]


@pytest.mark.parametrize("words", ["garbage", '[["a", 1]]', '[["a{", 1, 5]]', '[["a", -1, 5]]'])
async def test_rules_that_can_not_be_read_are_told_at_the_start(words: str) -> None:
    bus = Bus()
    await bus.store.remember("rules", words)
    with pytest.raises(BrokerError, match="the application's rules can't be read"):
        async with Hub(BusBroker(bus)):
            raise AssertionError("not started")
    assert bus.brokers == []


async def test_orders_and_events_are_not_kept_whatever_a_pattern_matches() -> None:
    hub = Hub()
    hub.channel("{name}", history=10)
    hub.channel("{kind}:{name}", history=10)
    assert hub.context.retention("a") is not None
    assert hub.context.retention("\x1fcontrol") is None
    assert hub.context.retention("\x1fpresence:a") is None


async def test_an_order_that_can_not_be_read_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    bus = Bus()
    async with Hub(BusBroker(bus)):
        with caplog.at_level("WARNING", "asgi_ws"):
            await bus.publish("\x1fcontrol", encode("garbage"), None, None)
            await bus.publish("\x1fcontrol", encode(b"\xff"), None, None)
    assert caplog.text.count("an order that can't be read was dropped") == 2


async def test_a_broker_without_presence_has_its_subscribers_leave_all_the_same() -> None:
    class Plain(Broker):
        def __init__(self) -> None:
            self.subscribed = set[str]()

        async def start(self, deliver: typing.Any, lost: typing.Any) -> None: ...

        async def stop(self) -> None: ...

        async def publish(self, channel: str, payload: typing.Any, *, sender: str | None = None) -> None: ...

        async def subscribe(self, channel: str) -> None:
            self.subscribed.add(channel)

        async def unsubscribe(self, channel: str) -> None:
            self.subscribed.remove(channel)

    class Nobody:
        id, user_id = "1", None

        def cut(self, code: int, reason: str) -> None: ...

        def push(self, publication: Publication) -> None: ...

    broker, client = Plain(), Nobody()
    async with Hub(broker) as hub:
        await hub.context.pubsub.subscribe("a", client)
        own = broker.subscribed - {"a"}
        assert broker.subscribed == {*own, "a"}
        await hub.context.leave(["a"], [], client)
        assert broker.subscribed == own
