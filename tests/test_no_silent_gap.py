"""Whatever happens to a bus and its hubs, in whatever order: a subscriber gets everything, or is told."""

import asyncio
import os
import random
from collections.abc import Coroutine
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from asgi_ws.exceptions import BrokerError
from asgi_ws.messages import Position, Publication, Recovery, Retention
from asgi_ws.payloads import encode
from asgi_ws.pubsub import PubSub
from tests.bus import Bus, BusBroker
from tests.virtual import VirtualLoop

RETENTION = Retention(6, 10_000.0)
LIMIT = 4
CHANNELS = "ab"


class Session:
    """One visit of a client to a channel, which checks all that comes."""

    def __init__(self, world: "Recovering", channel: str, since: Position | None) -> None:
        self.world = world
        self.channel = channel
        self.since = since
        self.position: Position | None = None
        self.recovery: Recovery | None = None
        self.listening = False
        self.told = False

    def begin(self, recovery: Recovery) -> None:
        assert self.recovery is None, "it begins once"
        assert recovery.position is not None
        self.recovery, self.listening = recovery, True
        self.position = recovery.position
        if recovery.recovered:
            assert self.since is not None
            assert recovery.position.epoch == self.since.epoch
            missed = [publication.position for publication in recovery.publications]
            offsets = range(self.since.offset + 1, recovery.position.offset + 1)
            assert missed == [Position(offset, self.since.epoch) for offset in offsets], "all that was missed"
            assert len(missed) <= LIMIT
            self.position = self.since
        else:
            assert not recovery.publications

    def push(self, publication: Publication) -> None:
        assert self.listening, "it has left"
        if self.told:
            return
        found, now = publication.position, self.position
        assert found is not None
        assert now is not None
        assert (found.offset, found.epoch) == (now.offset + 1, now.epoch), f"{found} doesn't follow {now}"
        assert self.world.published[self.channel, found] == publication.data
        self.position = found

    def lost(self, channel: str) -> None:
        assert channel == self.channel
        self.told = True


class Recovering(RuleBasedStateMachine):
    """Two hubs on a bus, which loses, breaks, stalls, forgets and begins again."""

    def __init__(self) -> None:
        super().__init__()
        random.seed(0)
        self.loop = VirtualLoop()
        asyncio.set_event_loop(self.loop)
        self.published: dict[tuple[str, Position], int] = {}
        self.count = 0
        self.sessions: list[tuple[PubSub, Session, asyncio.Task[None]]] = []
        self.left: list[tuple[str, Position]] = []
        self.unseen = False
        """Whether something was lost that only a comparison of positions shows."""

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        self.loop.run_until_complete(work)
        for _, _, task in self.sessions:
            if task.done() and not task.cancelled():
                task.result()

    @initialize()
    def begin(self) -> None:
        async def begin() -> None:
            self.bus = Bus()
            self.brokers = [BusBroker(self.bus), BusBroker(self.bus)]
            self.hubs = [PubSub(broker, lambda channel: RETENTION, LIMIT) for broker in self.brokers]
            for hub in self.hubs:
                await hub.start()

        self.run(begin())

    # What an application does

    @rule(channel=st.sampled_from(CHANNELS), times=st.integers(1, 8))
    def publish(self, channel: str, times: int) -> None:
        async def publish() -> None:
            for _ in range(times):
                self.count += 1
                # It may be delivered before it is acknowledged.
                entry = self.bus.store._channels.get(channel)
                self.coming(channel, entry.offset if entry else 0, entry.epoch if entry else "")
                position = await self.bus.publish(channel, encode(self.count), None, RETENTION)
                assert position is not None
                assert self.published[channel, position] == self.count

        self.run(publish())

    def coming(self, channel: str, offset: int, epoch: str) -> None:
        epoch = epoch or self.bus.store._epoch(channel)
        assert (channel, Position(offset + 1, epoch)) not in self.published, "offsets begin again in another epoch"
        self.published[channel, Position(offset + 1, epoch)] = self.count

    @rule(hub=st.integers(0, 1), channel=st.sampled_from(CHANNELS))
    def subscribe(self, hub: int, channel: str) -> None:
        self.come(hub, channel, None)

    @precondition(lambda self: self.left)
    @rule(data=st.data(), hub=st.integers(0, 1))
    def come_back(self, data: st.DataObject, hub: int) -> None:
        channel, position = data.draw(st.sampled_from(self.left))
        self.come(hub, channel, position)

    @rule(hub=st.integers(0, 1), channel=st.sampled_from(CHANNELS), offset=st.integers(0, 40))
    def come_from_nowhere(self, hub: int, channel: str, offset: int) -> None:
        epochs = {position.epoch for where, position in self.published if where == channel}
        self.come(hub, channel, Position(offset, max(epochs, default="never")))

    def come(self, hub: int, channel: str, since: Position | None) -> None:
        session, pubsub = Session(self, channel, since), self.hubs[hub]

        async def visit() -> None:
            try:
                recovery = await pubsub.subscribe(channel, session, since=since, begin=session.begin)
                assert recovery is session.recovery
            except BrokerError:
                session.listening = False
            except asyncio.CancelledError:
                session.listening = False
                raise

        async def come() -> None:
            self.sessions.append((pubsub, session, asyncio.create_task(visit())))
            await asyncio.sleep(0)

        self.run(come())

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        visit = data.draw(st.sampled_from(self.sessions))
        pubsub, session, task = visit
        self.sessions.remove(visit)

        async def leave() -> None:
            if task.done():
                session.listening = False
                leaving = asyncio.create_task(pubsub.unsubscribe([session.channel], session))
                await asyncio.sleep(0)
                leaving.cancel()
            else:
                task.cancel()
                await asyncio.wait([task])

        self.run(leave())
        if session.position is not None:
            self.left.append((session.channel, session.position))

    @rule(ticks=st.integers(1, 10))
    def go_on(self, ticks: int) -> None:
        async def go_on() -> None:
            for _ in range(ticks):
                await asyncio.sleep(0)

        self.run(go_on())

    @rule(seconds=st.sampled_from([0.1, 3.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    # What goes wrong

    @rule(hub=st.integers(0, 1), channel=st.sampled_from(CHANNELS))
    def lose_one(self, hub: int, channel: str) -> None:
        self.brokers[hub].loses = self.unseen = True
        self.publish(channel, 1)
        self.brokers[hub].loses = False

    @rule(hub=st.integers(0, 1))
    def cut(self, hub: int) -> None:
        self.brokers[hub].cut()

    @rule(hub=st.integers(0, 1))
    def mend(self, hub: int) -> None:
        async def mend() -> None:
            self.brokers[hub].mend()

        self.run(mend())

    @rule(hub=st.integers(0, 1), slow=st.booleans())
    def stall(self, hub: int, slow: bool) -> None:
        self.brokers[hub].slow = slow

    @rule(hub=st.integers(0, 1))
    def answer(self, hub: int) -> None:
        self.brokers[hub].answer()

    @rule(hub=st.integers(0, 1), fails=st.booleans())
    def fail(self, hub: int, fails: bool) -> None:
        self.brokers[hub].fails = fails

    @rule(channel=st.sampled_from(CHANNELS), some=st.booleans())
    def forget_publications(self, channel: str, some: bool) -> None:
        entry = self.bus.store._channels.get(channel)
        if entry is not None and entry.kept:
            for _ in range(1 if some else len(entry.kept)):
                entry.kept.popleft()

    @rule()
    def begin_again(self) -> None:
        self.unseen = True
        self.run(self.bus.forget_all())

    # What holds in the end

    def teardown(self) -> None:
        try:
            if hasattr(self, "bus"):
                self.run(self.end())
        finally:
            self.loop.close()
            asyncio.set_event_loop(None)

    async def end(self) -> None:
        for broker in self.brokers:
            broker.slow = broker.fails = False
            broker.answer()
            if broker._cut:
                broker.mend()
        if not self.unseen:
            await asyncio.sleep(10)
            await self.everybody_has_everything()
        # Until positions were compared, and once more, for what that has found.
        await asyncio.sleep(120)
        await self.everybody_has_everything()
        await self.everybody_who_can_is_recovered()
        for hub, session, _ in self.sessions:
            session.listening = False
            await hub.unsubscribe([session.channel], session)
        await asyncio.sleep(10)
        for hub, broker in zip(self.hubs, self.brokers, strict=True):
            assert (hub._channels, broker.subscribed) == ({}, set()), "nothing is left of those who left"
            await hub.stop()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def everybody_has_everything(self) -> None:
        for hub, session, task in self.sessions:
            assert task.done(), "nobody waits for ever"
            if session.listening and not session.told:
                top = (await self.bus.store.history(session.channel, since=None, limit=0)).position
                assert session.position == top, "a silent gap"
                assert hub.has_subscribers(session.channel)

    async def everybody_who_can_is_recovered(self) -> None:
        for channel, since in self.left:
            history = await self.bus.store.history(channel, since=since, limit=None)
            top = history.position
            can = since.epoch == top.epoch and top.offset - since.offset == len(history.publications) <= LIMIT
            for hub in self.hubs:
                session = Session(self, channel, since)
                await hub.subscribe(channel, session, since=since, begin=session.begin)
                assert session.recovery is not None
                assert session.recovery.recovered is can
                assert session.position == top
                await hub.unsubscribe([channel], session)
                session.listening = False


EXAMPLES = int(os.environ.get("ASGI_WS_EXAMPLES", "60"))

TestNoSilentGap = Recovering.TestCase
TestNoSilentGap.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    derandomize=EXAMPLES == 60,
    suppress_health_check=list(HealthCheck),
)
