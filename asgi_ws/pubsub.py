"""Who subscribes to what in this process, and the one loop over subscribers."""

import asyncio
import logging
import random
import typing
from collections import deque
from collections.abc import Callable, Iterable

from asgi_ws.brokers import Broker, HistoryBroker
from asgi_ws.exceptions import AsgiWsError, BrokerError, PublicationsLost, SubscriberTooSlow
from asgi_ws.messages import History, Position, Publication, Recovery, Retention
from asgi_ws.payloads import Payload
from asgi_ws.recovery import Step, Stream, follows, merge, read_again_from, read_from
from asgi_ws.tables import Table
from asgi_ws.tasks import Tasks

__all__ = ["PubSub", "Subscriber", "Subscription"]

logger = logging.getLogger("asgi_ws")

_CHECK_INTERVAL = 40.0
"""After how many seconds positions are compared with the broker's, so that a loss at the end of a stream is seen."""
_CHECKS_AT_ONCE = 32
_READS_AT_ONCE = 100
"""Of how many channels histories are read at the same time; when a link is back, all of them have to be."""
_STOPPED = "the hub was stopped"
_RETRY = 0.1
_MAX_RETRY = 2.0


class Subscriber(typing.Protocol):
    """Whatever can be pushed to. One that also has `recover(publication)` is given by that what it has missed. One that
    has `lost(channel)` is told, instead of being left with a gap, that publications of a channel with a history are
    lost to it; it then leaves the channel."""

    def push(self, publication: Publication) -> None:
        """Take a publication. Never waits, never raises."""
        ...


class _Joiner:
    """A subscriber that waits for a read of its channel's history."""

    __slots__ = ("begin", "joined", "since", "subscriber")

    def __init__(
        self, subscriber: Subscriber, since: Position | None, begin: Callable[[Recovery], None] | None
    ) -> None:
        self.subscriber = subscriber
        self.since = since
        self.begin = begin
        self.joined: asyncio.Future[Recovery] = asyncio.get_running_loop().create_future()

    def end(self, how: Recovery | BrokerError) -> None:
        """Let it go on, unless it was cancelled."""
        if self.joined.done():
            return
        if isinstance(how, Recovery):
            self.joined.set_result(how)
        else:
            # One of its own: an exception that is raised twice collects the tracebacks of both.
            error = BrokerError(str(how))
            error.__cause__ = how.__cause__ or how
            self.joined.set_exception(error)


class _Channel:
    """The subscribers of one channel, how far they have got in it, and whether the broker knows that there are some."""

    __slots__ = ("joiners", "lock", "reader", "stream", "subscribed", "subscribers", "users", "waiters")

    def __init__(self) -> None:
        self.subscribers: dict[Subscriber, None] = {}
        self.joiners: dict[_Joiner, None] = {}
        self.stream: Stream | None = None
        self.reader: asyncio.Task[None] | None = None
        self.subscribed = False
        self.users = 0
        self.waiters: list[asyncio.Future[BrokerError | None]] | None = None
        """Those who wait for what the broker answers, while it is asked."""
        self.lock = asyncio.Lock()


class PubSub:
    """Channels and their subscribers. What is published to a channel reaches all of them in the same order.

    `retention` says of which channels the broker keeps a history. Their subscribers get every publication once and in
    order; where one is missing it is read from the history, and where that hasn't got it they are told. At most
    `limit` missed publications are passed on to one that comes back.
    """

    def __init__(
        self,
        broker: Broker,
        retention: Callable[[str], Retention | None] = lambda channel: None,
        limit: int | None = 300,
    ) -> None:
        self._broker = broker
        self._retention = retention
        self._limit = limit
        self._stopped = False
        self._reads = asyncio.Semaphore(_READS_AT_ONCE)
        self._channels: Table[str, _Channel] = Table()
        self._tasks = Tasks()
        self._check_timer: asyncio.TimerHandle | None = None
        self.subscriptions: set[Subscription] = set()

    async def start(self) -> None:
        """Start the broker. Raises `BrokerError`."""
        await self._broker.start(self.deliver, self._lost)
        if self._broker.spans_processes:
            self._check_later()

    async def stop(self) -> None:
        """Stop the broker; nothing is delivered any more, and subscriptions end."""
        self._stopped = True
        if self._check_timer is not None:
            self._check_timer.cancel()
        await self._tasks.cancel()
        await self._broker.stop()
        for entry in self._channels.values():
            _end(entry, list(entry.joiners), BrokerError(_STOPPED))
        self._channels.clear()
        for subscription in self.subscriptions:
            subscription.end()

    async def publish(self, channel: str, payload: Payload, *, sender: str | None = None) -> Position | None:
        """Hand a publication to the broker. Raises `BrokerError`."""
        retention = self._retention(channel)
        if retention is not None and isinstance(self._broker, HistoryBroker):
            return await self._broker.publish(channel, payload, sender=sender, retention=retention)
        return await self._broker.publish(channel, payload, sender=sender)

    async def history(self, channel: str, *, since: Position | None = None, limit: int | None = None) -> History:
        """What the broker has kept of a channel, and nothing where that isn't all since the position. Raises
        `BrokerError`, and `ValueError` when the channel keeps none."""
        if since is None:
            return await self.read_history(channel, limit=limit)
        # One at least, which shows whether nothing is missing before it.
        history = await self.read_history(channel, since=since, limit=None if limit is None else max(limit, 1))
        found = history.publications
        if not (follows(since, found[0]) if found else since == history.position):
            return History((), history.position, complete=False)
        return History(found[:limit], history.position)

    async def keep(self, name: str, value: str, ttl: float) -> None:
        """Keep a few words for one who will `take` them, in whatever process. Raises `BrokerError`, and `ValueError`
        for a broker that can't."""
        await self._keeper().remember(name, value, ttl=ttl)

    async def take(self, name: str) -> str | None:
        """What was kept by that name, once. Raises what `keep` does."""
        return await self._keeper().take(name)

    def _keeper(self) -> HistoryBroker:
        if not isinstance(self._broker, HistoryBroker):
            raise ValueError(f"{type(self._broker).__name__} keeps nothing")
        return self._broker

    async def read_history(self, channel: str, *, since: Position | None = None, limit: int | None = None) -> History:
        """What the broker has kept of a channel, whatever is missing in between. Raises what `history` does."""
        if not self.has_history(channel):
            raise ValueError(f"{channel!r} has no history; declare one with hub.channel({channel!r}, history=...)")
        return await typing.cast(HistoryBroker, self._broker).history(channel, since=since, limit=limit)

    def has_history(self, channel: str) -> bool:
        """Whether the channel has a history."""
        return self._retention(channel) is not None and isinstance(self._broker, HistoryBroker)

    def has_subscribers(self, channel: str) -> bool:
        """Whether somebody in this process listens."""
        entry = self._channels.get(channel)
        return entry is not None and bool(entry.subscribers)

    async def subscribe(
        self,
        channel: str,
        subscriber: Subscriber,
        *,
        since: Position | None = None,
        begin: Callable[[Recovery], None] | None = None,
    ) -> Recovery:
        """From the return of this call on, the subscriber gets what is published to the channel; before that, what it
        has missed since the position `since`, if all of it can be had.

        `begin` is called before anything is pushed; it never waits and never raises. Raises `BrokerError`.
        """
        entry = self._channels.get(channel)
        if entry is None:
            entry = self._channels[channel] = _Channel()
        if not entry.subscribed:
            entry.users += 1
            try:
                await self._take(channel, entry)
            finally:
                entry.users -= 1
                self._forget_if_idle(channel, entry)
        stream = entry.stream
        if stream is not None and (since is not None or stream.position is None or stream.gap):
            return await self._join(channel, entry, _Joiner(subscriber, since, begin))
        recovery = Recovery(False, stream.position if stream is not None else None)
        self._admit(entry, subscriber, recovery, begin)
        return recovery

    async def unsubscribe(self, channels: Iterable[str], subscriber: Subscriber) -> None:
        """Nothing of these channels is pushed to the subscriber any more, from this call on, not from its return."""
        last = [channel for channel in channels if self._remove(channel, subscriber)]
        if last:
            # In tasks of their own: whoever leaves may be cancelled, and half of the channels would stay.
            await asyncio.wait([self._release_later(channel) for channel in last])

    def deliver(self, publication: Publication) -> None:
        """Push a publication to the channel's subscribers. Called by the broker."""
        entry = self._channels.get(publication.channel)
        if entry is not None:
            if entry.stream is None or entry.stream.passes(publication):
                _push(entry, publication)
            elif entry.stream.gap:
                self._read(publication.channel, entry)

    # Who comes and goes

    async def _join(self, channel: str, entry: _Channel, joiner: _Joiner) -> Recovery:
        if self._stopped:
            raise BrokerError(_STOPPED)
        entry.joiners[joiner] = None
        self._read(channel, entry)
        try:
            return await joiner.joined
        except BaseException:
            entry.joiners.pop(joiner, None)
            entry.subscribers.pop(joiner.subscriber, None)
            self._release_if_left(channel, entry)
            raise

    def _admit(
        self, entry: _Channel, subscriber: Subscriber, recovery: Recovery, begin: Callable[[Recovery], None] | None
    ) -> None:
        if begin is not None:
            begin(recovery)
        take = getattr(subscriber, "recover", subscriber.push)
        for publication in recovery.publications:
            take(publication)
        entry.subscribers[subscriber] = None

    def _remove(self, channel: str, subscriber: Subscriber) -> bool:
        """Whether this was the channel's last subscriber."""
        entry = self._channels.get(channel)
        if entry is None:
            return False
        if subscriber in entry.subscribers:
            del entry.subscribers[subscriber]
            return not entry.subscribers
        for joiner in [joiner for joiner in entry.joiners if joiner.subscriber is subscriber]:
            del entry.joiners[joiner]
            joiner.end(Recovery(False, None))
        return False

    def _release_if_left(self, channel: str, entry: _Channel) -> None:
        if not entry.subscribers and not self._stopped and self._channels.get(channel) is entry:
            self._release_later(channel)

    def _release_later(self, channel: str) -> asyncio.Task[None]:
        return self._tasks.start(self._release(channel), "asgi_ws unsubscribe")

    async def _release(self, channel: str) -> None:
        entry = self._channels.get(channel)
        if entry is None:
            # It was released for somebody else meanwhile.
            return
        entry.users += 1
        try:
            async with entry.lock:
                # Those for whom a read goes on are about to be subscribers; behind it comes another look.
                if entry.subscribed and not entry.subscribers and not entry.joiners and entry.reader is None:
                    entry.subscribed = False
                    await self._broker.unsubscribe(channel)
        except BrokerError as error:
            logger.warning("the broker could not be told that nobody listens to %r any more: %s", channel, error)
        finally:
            entry.users -= 1
            self._forget_if_idle(channel, entry)

    async def _take(self, channel: str, entry: _Channel) -> None:
        """Have the broker asked, by the first who comes. The others wait for the same answer, and go on in the same
        moment: so one read of the history serves them all."""
        while not entry.subscribed:
            if entry.waiters is not None:
                waiter = asyncio.get_running_loop().create_future()
                entry.waiters.append(waiter)
                error = await waiter
                if error is not None:
                    raise BrokerError(str(error)) from error
                continue
            entry.waiters, error = [], None
            try:
                await self._ask(channel, entry)
            except BrokerError as failure:
                error = failure
                raise
            finally:
                waiters, entry.waiters = entry.waiters, None
                for waiter in waiters:
                    if not waiter.done():
                        waiter.set_result(error)

    async def _ask(self, channel: str, entry: _Channel) -> None:
        # Under the channel's lock: the request must not be overtaken by the last unsubscribe of those who were here
        # before.
        async with entry.lock:
            if self.has_history(channel):
                # Before the broker is asked: what it delivers at once is to be collected.
                entry.stream = Stream()
            await self._broker.subscribe(channel)
            entry.subscribed = True

    def _forget_if_idle(self, channel: str, entry: _Channel) -> None:
        if not entry.users and not entry.subscribed and self._channels.get(channel) is entry:
            del self._channels[channel]

    # What is missing

    def _read(self, channel: str, entry: _Channel) -> None:
        """Have the history read, for all who wait for it at once. One that is being read already may lack what the
        later ones need, so they wait for the next."""
        if entry.reader is None:
            entry.reader = self._tasks.start(self._catch_up(channel, entry), "asgi_ws history")

    async def _catch_up(self, channel: str, entry: _Channel) -> None:
        stream = typing.cast(Stream, entry.stream)
        in_vain = 0
        try:
            while entry.joiners or (stream.gap and entry.subscribers):
                failed = False
                try:
                    async with self._reads:
                        await self._catch_up_once(channel, entry, stream)
                except BrokerError as error:
                    failed = True
                    if not in_vain:
                        logger.warning("the history of %r can't be read: %s", channel, error)
                in_vain = in_vain + 1 if failed or stream.gap else 0
                # A gap that has come during one read is closed by the next, so that is made at once.
                if failed or in_vain > 1:
                    retry = min(_RETRY * 2 ** min(in_vain - 1, 10), _MAX_RETRY)
                    await asyncio.sleep(random.uniform(retry / 2, retry))
        except BaseException as error:
            failure = BrokerError("the history was not read")
            failure.__cause__ = error
            _end(entry, list(entry.joiners), failure)
            raise
        finally:
            entry.reader = None
            self._release_if_left(channel, entry)

    async def _catch_up_once(self, channel: str, entry: _Channel, stream: Stream) -> None:
        joiners = list(entry.joiners)
        stream.begin()
        try:
            history = await self._read_for(channel, stream, joiners)
        except BrokerError as error:
            stream.fail()
            _end(entry, joiners, error)
            raise
        # No await from here on: nothing may come between what was missed and what is live.
        step = stream.end(history)
        if step.missed is None:
            _tell_lost(channel, entry)
        else:
            for publication in step.missed:
                _push(entry, publication)
        if step.reached or not stream.gap:
            self._let_in(entry, typing.cast(Position, stream.position), joiners, history.position, step)

    def _let_in(self, entry: _Channel, now: Position, joiners: Iterable[_Joiner], top: Position, step: Step) -> None:
        """All who have waited for the read, at the place where the subscribers are now. What is on its way to everybody
        isn't passed on twice."""
        for joiner in joiners:
            entry.joiners.pop(joiner, None)
            if joiner.joined.done():
                # It was cancelled, or has left.
                continue
            since, recovery = joiner.since, Recovery(False, now)
            # What comes after the read's end was not yet published when it was asked for.
            if since is not None and since.offset <= top.offset and joiner.subscriber not in entry.subscribers:
                missed = merge(since, now, step.known, limit=self._limit)
                if missed is not None:
                    recovery = Recovery(True, now, missed)
            self._admit(entry, joiner.subscriber, recovery, joiner.begin)
            joiner.end(recovery)

    async def _read_for(self, channel: str, stream: Stream, joiners: Iterable[_Joiner]) -> History:
        """One read, or two, for all of them, and for those who are subscribed."""
        broker = typing.cast(HistoryBroker, self._broker)
        wanted = [joiner.since for joiner in joiners if joiner.since is not None]
        now = stream.position
        if now is not None:
            wanted.append(now)
        if not wanted:
            return await broker.history(channel, since=None, limit=0)
        limit = None if stream.gap else self._limit
        since = read_from(wanted, (now or wanted[0]).epoch)
        history = await broker.history(channel, since=since, limit=limit)
        again = read_again_from(wanted, history, since, limit)
        return history if again is None else await broker.history(channel, since=again, limit=limit)

    def _lost(self) -> None:
        """The broker's link was lost and is back: nothing passes until positions have been compared."""
        for channel, entry in self._channels.items():
            if entry.stream is not None:
                entry.stream.doubt()
                self._read(channel, entry)

    def _check_later(self) -> None:
        delay = random.uniform(0.75, 1.25) * _CHECK_INTERVAL
        self._check_timer = asyncio.get_running_loop().call_later(delay, self._check)

    def _check(self) -> None:
        self._tasks.start(self._check_positions(), "asgi_ws position check")

    async def _check_positions(self) -> None:
        waiting = iter(list(self._channels.items()))
        await asyncio.gather(*(self._check_some(waiting) for _ in range(_CHECKS_AT_ONCE)))
        self._check_later()

    async def _check_some(self, waiting: Iterable[tuple[str, _Channel]]) -> None:
        broker = typing.cast(HistoryBroker, self._broker)
        for channel, entry in waiting:
            stream = entry.stream
            before = stream.position if stream is not None else None
            if stream is None or before is None or not entry.subscribers:
                continue
            try:
                history = await broker.history(channel, since=None, limit=0)
            except BrokerError:
                # When the link is back, all positions are compared.
                return
            if stream.differs(before, history.position):
                stream.doubt()
                self._read(channel, entry)


def _push(entry: _Channel, publication: Publication) -> None:
    for subscriber in tuple(entry.subscribers):
        subscriber.push(publication)


def _tell_lost(channel: str, entry: _Channel) -> None:
    logger.warning("publications to %r were lost; its subscribers are told", channel)
    for subscriber in tuple(entry.subscribers):
        lost = getattr(subscriber, "lost", None)
        if lost is not None:
            lost(channel)


def _end(entry: _Channel, joiners: Iterable[_Joiner], error: BrokerError) -> None:
    for joiner in joiners:
        entry.joiners.pop(joiner, None)
        joiner.end(error)


class Subscription:
    """Publications of one channel for the server's own code: `async with` subscribes, `async for` reads.

    What is not read yet waits, `size` bytes of it at the most; when that isn't enough, the iterator raises
    `SubscriberTooSlow` behind what it still has. It raises `PublicationsLost` where publications are missing that the
    channel's history hasn't got any more. It ends when the hub stops.
    """

    def __init__(self, pubsub: PubSub, channel: str, size: int, since: Position | None = None) -> None:
        self.channel = channel
        self.recovery = Recovery(False, None)
        """How it began; known inside of `async with`."""
        self._since = since
        self._pubsub = pubsub
        self._size = size
        self._waiting: deque[tuple[Publication, int]] = deque()
        self._waiting_size = 0
        self._error: AsgiWsError | None = None
        self._ended = False
        self._reader: asyncio.Future[None] | None = None

    def push(self, publication: Publication) -> None:
        """Take a publication. Called by the hub."""
        size = publication.payload.size
        if self._waiting and self._waiting_size + size > self._size and self._error is None:
            self._error = SubscriberTooSlow(self.channel)
        if self._error is None:
            self._append(publication, size)

    def recover(self, publication: Publication) -> None:
        """Take one that was missed; how many there are has a limit of its own. Called by the hub."""
        self._append(publication, 0)

    def _append(self, publication: Publication, size: int) -> None:
        self._waiting.append((publication, size))
        self._waiting_size += size
        self._wake()

    def lost(self, channel: str) -> None:
        """Publications are lost to it. Called by the hub."""
        if self._error is None:
            self._error = PublicationsLost(channel)
            self._wake()

    def end(self) -> None:
        """Let the iterator end behind what it still has. Called by the hub."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def __aiter__(self) -> "Subscription":
        return self

    async def __anext__(self) -> Publication:
        while not self._waiting:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            if self._reader is not None and not self._reader.done():
                raise RuntimeError("another task reads this subscription already; give each task one of its own")
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        publication, size = self._waiting.popleft()
        self._waiting_size -= size
        return publication

    async def __aenter__(self) -> "Subscription":
        # First, so that a hub that stops meanwhile ends it, too.
        self._pubsub.subscriptions.add(self)
        try:
            self.recovery = await self._pubsub.subscribe(self.channel, self, since=self._since)
        except BaseException:
            self._pubsub.subscriptions.discard(self)
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self._pubsub.subscriptions.discard(self)
        await self._pubsub.unsubscribe([self.channel], self)
