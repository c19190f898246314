"""Publishing from synchronous code."""

import asyncio

import pytest

import asgi_ws
from asgi_ws.messages import Position
from tests.bus import Bus, BusBroker


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> Bus:
    """What `bus://` is."""
    bus = Bus()
    monkeypatch.setattr("asgi_ws.hub.broker_for", lambda url: BusBroker(bus))
    return bus


def test_what_is_published_has_arrived_on_return_and_is_kept_as_the_application_keeps_it(bus: Bus) -> None:
    assert asgi_ws.publish("bus://", "jobs:17", {"done": True}) is None
    asyncio.run(bus.store.remember("rules", '[["jobs:{id}", 10, 60.0]]'))
    first = asgi_ws.publish("bus://", "jobs:17", {"done": True})
    assert first is not None
    assert asgi_ws.publish("bus://", "jobs:17", "more") == Position(2, first.epoch)
    assert bus.brokers == [], "it has disconnected"


def test_nobody_can_be_reached_in_the_memory_of_this_process() -> None:
    with pytest.raises(ValueError, match="is the memory of one process"):
        asgi_ws.publish("memory://", "a", 1)


def test_what_goes_wrong_is_raised(bus: Bus) -> None:
    bus.fails = True
    with pytest.raises(asgi_ws.BrokerError):
        asgi_ws.publish("bus://", "a", 1)
    bus.fails = False
    with pytest.raises(asgi_ws.InvalidChannel):
        asgi_ws.publish("bus://", "", 1)
    with pytest.raises(TypeError):
        asgi_ws.publish("bus://", "a", object())


def test_what_is_no_url_of_a_broker_is_told() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        asgi_ws.publish("nonsense://", "a", 1)


@pytest.mark.anyio
async def test_on_an_event_loop_there_is_a_better_way() -> None:
    with pytest.raises(RuntimeError, match=r"use `await hub\.publish"):
        asgi_ws.publish("bus://", "a", 1)
