"""What is watched over all connections of a process."""

import asyncio

import pytest

from asgi_ws import ConnectionClosed, Limits
from asgi_ws.context import Connections

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
