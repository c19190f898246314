"""The broker of processes that share a NATS server or cluster.

Publications that aren't kept go out by core NATS. Those that are kept go to one JetStream stream for all channels: the
publisher writes a channel's next offset into the message and asks for it to be stored only if the channel's latest
message is still the one that he counted from; if it isn't he counts again. So offsets have no gaps and no doubles,
whoever publishes, and nobody needs a stream per channel, of which a cluster carries a few thousand only. The server
republishes what it has stored, and only that, in the order in which it did, to the subject that core NATS uses: one
subscription per channel gets both kinds.

A channel's latest message is kept for a month, and be it as a marker without a payload: where there is none, the
channel's count starts at 1 in a new epoch. So the epoch changes when the stream is deleted, or kept in memory only and
the server restarted. Who is present is one message per channel and key, changed by the same compare and swap.

Times of expiry are compared with the clocks of the processes and of the server: they have to agree within a second.
"""

import asyncio
import contextlib
import hashlib
import heapq
import random
import re
import secrets
import time
import typing
import urllib.parse
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

import msgspec
from nats.aio.msg import Msg

from asgi_ws.brokers.base import Deliver, HistoryBroker, PresenceBroker
from asgi_ws.brokers.nats_link import TIMEOUT, Address, Conflict, Link, NoJetStream, Stored, token
from asgi_ws.exceptions import BrokerError
from asgi_ws.messages import History, Position, Publication, Retention
from asgi_ws.payloads import Payload

__all__ = ["NatsBroker"]

_VERSION = b"\x01"
_MONTH = 30 * 24 * 3600
_DAY = 24 * 3600
_MAX_HEADS = 10_000
_MAX_EXPIRING = 100_000
_TIDY_INTERVAL = 1.0
_ATTEMPTS = 3
_WINDOW = 512
_PATIENCE = 0.02
_PING_INTERVAL = 1.5
_PING_TIMEOUT = 3.0
_MAX_DELAY = 1.0
"""The longest pause between two attempts to connect, so that a server that is back is found soon."""


class _Record(msgspec.Struct, array_like=True, frozen=True):
    """A publication on the bus. Without `kind` it is a marker: it has the channel's position and no payload. Without
    `epoch` it isn't kept and has no position."""

    kind: Literal["text", "json", "binary"] | None
    data: bytes
    sender: str | None
    offset: int
    epoch: str
    size: int
    ttl: float

    def publication(self, channel: str) -> Publication:
        """The publication that it is of. Raises `UnicodeError` for text that isn't UTF-8."""
        assert self.kind is not None
        payload = Payload(self.kind, self.data if self.kind == "binary" else self.data.decode())
        position = Position(self.offset, self.epoch) if self.epoch else None
        return Publication(channel, payload, position, self.sender)


class _Member(msgspec.Struct, array_like=True, frozen=True):
    """A connection that is present, until when, and since when."""

    value: str
    until: float
    since: float


class _Key(msgspec.Struct, array_like=True):
    """The members of one key. When the last one has left, it lingers until a moment; when it has gone, it is empty."""

    key: str
    members: dict[str, _Member]
    lingers: float | None = None

    @property
    def empty(self) -> bool:
        return not self.members and self.lingers is None

    def present(self, now: float) -> int:
        return sum(member.until > now for member in self.members.values())

    def may_have_gone(self, now: float) -> bool:
        return not self.present(now) and (self.lingers is None or self.lingers <= now)

    def forget_expired(self, now: float) -> bool:
        """Whether there were any."""
        before = len(self.members)
        self.members = {connection: member for connection, member in self.members.items() if member.until > now}
        return len(self.members) < before


class _Word(msgspec.Struct, array_like=True, frozen=True):
    """What is remembered, and until when. Once it is taken there is nothing."""

    value: str | None
    until: float | None


class _Head(typing.NamedTuple):
    """A channel's latest message: its number in the stream, and its position in the channel."""

    sequence: int
    offset: int
    epoch: str


_T = typing.TypeVar("_T")

_encode = msgspec.msgpack.encode
_decode_record = msgspec.msgpack.Decoder(_Record).decode
_decode_word = msgspec.msgpack.Decoder(_Word).decode
_decode_key = msgspec.msgpack.Decoder(_Key).decode


class NatsBroker(HistoryBroker, PresenceBroker):
    """Joins processes by NATS: `nats://user:password@host:port,host:port`, or `tls://`.

    Hubs with the same `prefix` on the same servers are one. `replicas` is on how many servers of a cluster history and
    presence are kept; for them JetStream has to be enabled. Both can be given in the URL: `?prefix=chat&replicas=3`.
    """

    def __init__(self, url: str, *, prefix: str = "asgi_ws", replicas: int = 1) -> None:
        self._address, options = _parse(url)
        prefix = options.get("prefix", prefix)
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", prefix):
            raise ValueError(f"a prefix has 1 to 64 letters, digits, _ and -, not {prefix!r}")
        replicas = _replicas(options.get("replicas", replicas))
        self._prefix = prefix
        self._history_stream = _stream(prefix, "h", "history", replicas, _MONTH) | {
            "republish": {"src": f"{prefix}.h.>", "dest": f"{prefix}.c.>"}
        }
        self._presence_stream = _stream(prefix, "p", "presence", replicas, _DAY) | {"max_msgs_per_subject": 1}
        self._values_stream = _stream(prefix, "v", "values", replicas, 0) | {"max_msgs_per_subject": 1}
        self.ignored = 0
        """How many messages were not understood."""
        self._deliver: Deliver | None = None
        self._on_lost: Callable[[], None] = _nothing
        self._link: Link | None = None
        self._linked = asyncio.Event()
        self._window = asyncio.Semaphore(_WINDOW)
        self._streams: set[str] = set()
        self._channels: set[str] = set()
        self._orders: dict[str, _Order] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._keys: dict[tuple[str, str], str] = {}
        self._heads = _Heads()
        self._tidying = _Tidying()
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    # The link

    async def start(self, deliver: Deliver, lost: Callable[[], None]) -> None:
        self._deliver, self._on_lost = deliver, lost
        self._linked, self._window = asyncio.Event(), asyncio.Semaphore(_WINDOW)  # of this loop
        try:
            link = await self._connect(list(self._address.servers))
        except BaseException:
            self._deliver = None
            raise
        self._set_link(link)
        self._tasks = [asyncio.create_task(self._stay_linked(link)), asyncio.create_task(self._keep_tidy())]

    async def stop(self) -> None:
        self._deliver = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        link = self._link
        self._set_link(None)
        if link is not None:
            await link.close()
        self._channels.clear()
        for order in self._orders.values():
            order.stop()
        self._orders.clear()
        self._keys.clear()
        self._streams.clear()
        self._tidying = _Tidying()

    def _set_link(self, link: Link | None) -> None:
        self._link = link
        if link is None:
            self._linked.clear()
            # What is known of the streams may be wrong by the time the link is back.
            self._heads.clear()
        else:
            self._linked.set()

    async def _connect(self, servers: list[str]) -> Link:
        """Connect to any of the servers, and subscribe to what there is to subscribe to. Raises `BrokerError`."""
        failure: BrokerError | None = None
        for server in random.sample(servers, len(servers)):
            try:
                async with contextlib.AsyncExitStack() as stack:
                    link = await Link.open(self._address, server, self._streams, self._lose)
                    stack.push_async_callback(link.close)
                    for channel in tuple(self._channels):
                        await self._listen(link, channel)
                    await link.confirm()
                    stack.pop_all()
                    return link
            except BrokerError as error:
                failure = error
        assert failure is not None
        raise failure

    async def _stay_linked(self, link: Link) -> None:
        """Connect again whenever the link is lost, for ever."""
        servers = list(self._address.servers)
        while True:
            await self._watch(link)
            self._set_link(None)
            servers = list(dict.fromkeys([*self._address.servers, *link.servers]))
            await link.close()
            delay = 0.05
            while True:
                # Full jitter: the processes of a cluster don't come back at the same moment.
                await asyncio.sleep(random.uniform(0, delay))
                delay = min(delay * 2, _MAX_DELAY)
                with contextlib.suppress(BrokerError):
                    link = await self._connect(servers)
                    break
            self._set_link(link)
            self._lose()

    async def _watch(self, link: Link) -> None:
        """Returns when the link is lost, or the server has stopped answering."""
        while True:
            await asyncio.wait([link.lost], timeout=_PING_INTERVAL)
            try:
                async with asyncio.timeout(_PING_TIMEOUT):
                    await link.confirm()
            except (BrokerError, TimeoutError):
                return

    def _lose(self) -> None:
        if self._deliver is not None:
            self._on_lost()

    def _current_link(self) -> Link:
        if self._link is None:
            raise BrokerError("there is no link to a NATS server at the moment")
        return self._link

    # Publishing and delivering

    async def publish(
        self, channel: str, payload: Payload, *, sender: str | None = None, retention: Retention | None = None
    ) -> Position | None:
        if retention is not None:
            return await self._publish_kept(channel, payload, sender, retention)
        link = self._current_link()
        record = _Record(payload.kind, _data(payload), sender, 0, "", 0, 0)
        await link.send(f"{self._prefix}.c.{token(channel)}", _VERSION + _encode(record))
        await link.confirm()
        return None

    async def subscribe(self, channel: str) -> None:
        self._channels.add(channel)
        try:
            await self._subscribe(channel)
        except BaseException:
            await self.unsubscribe(channel)
            raise

    async def _subscribe(self, channel: str) -> None:
        """Subscribe over this link or the next one, which may have done so already."""
        for _ in range(_ATTEMPTS):
            try:
                async with asyncio.timeout(TIMEOUT):
                    await self._linked.wait()
            except TimeoutError:
                raise BrokerError(f"there was no link to a NATS server for {TIMEOUT:g} seconds") from None
            # Not thousands at once: the last of them would have waited too long before they were even sent.
            async with self._window:
                if self._link is not None and await self._subscribed(self._link, channel):
                    return
        raise BrokerError("the link to the NATS server was lost again and again")

    async def _subscribed(self, link: Link, channel: str) -> bool:
        """Whether the server has confirmed it; not if the link was lost."""
        try:
            if channel not in link.subscriptions:
                await self._listen(link, channel)
            await link.confirm()
        except BrokerError:
            if not link.lost.done():
                raise
            await asyncio.sleep(0.01)  # until this has been seen elsewhere, too
            return False
        return True

    async def unsubscribe(self, channel: str) -> None:
        self._channels.discard(channel)
        if (order := self._orders.pop(channel, None)) is not None:
            order.stop()
        if self._link is not None:
            await self._link.unsubscribe(channel)

    async def _listen(self, link: Link, channel: str) -> None:
        async def handle(msg: Msg) -> None:
            self._take(channel, msg)

        await link.subscribe(channel, f"{self._prefix}.c.{token(channel)}", handle)

    def _take(self, channel: str, msg: Msg) -> None:
        record = self._read(msg.data)
        if record is None:
            return
        if record.epoch and msg.headers:
            with contextlib.suppress(ValueError):
                sequence = int(msg.headers.get("Nats-Sequence", ""))
                self._heads.advance(channel, _Head(sequence, record.offset, record.epoch))
        if self._deliver is None or channel not in self._channels:
            return
        if record.kind is None:
            if record.offset == 0 and channel not in self._orders:
                self._orders[channel] = _Order(self._deliver, Position(0, record.epoch))
            return
        try:
            publication = record.publication(channel)
        except UnicodeError:
            self.ignored += 1
            return
        if publication.position is None:
            self._deliver(publication)
            return
        order = self._orders.get(channel)
        if order is None:
            order = self._orders[channel] = _Order(self._deliver)
        order.take(publication, publication.position)

    def _read(self, data: bytes) -> _Record | None:
        """What a message says; `None`, and one more that was ignored, when it can't be understood."""
        with contextlib.suppress(ValueError, msgspec.MsgspecError):
            if data[:1] == _VERSION:
                return _decode_record(memoryview(data)[1:])
        self.ignored += 1
        return None

    # History

    async def _publish_kept(self, channel: str, payload: Payload, sender: str | None, retention: Retention) -> Position:
        link = self._current_link()

        data = _data(payload)

        def next_record(head: _Head) -> _Record:
            return _Record(payload.kind, data, sender, head.offset + 1, head.epoch, retention.size, retention.ttl)

        head = await self._append(link, channel, next_record)
        self._tidying.published(channel, head, retention)
        return Position(head.offset, head.epoch)

    async def _append(self, link: Link, channel: str, next_record: Callable[[_Head], _Record | None]) -> _Head:
        """Store the record that follows the channel's latest one, if there is one to follow it; the head after it."""
        subject = f"{self._prefix}.h.{token(channel)}"
        # Publishers of one process take turns. Those of several may collide, and then all but one try again.
        turn = self._turns.setdefault(channel, asyncio.Lock())
        try:
            async with asyncio.timeout(TIMEOUT), turn:
                while True:
                    # Not known while the answer is awaited, as it may never be seen.
                    head = self._heads.pop(channel) or await self._find_head(link, subject)
                    record = next_record(head)
                    if record is not None:
                        try:
                            data = _VERSION + _encode(record)
                            sequence = await link.store(self._history_stream, subject, data, last=head.sequence)
                        except Conflict:
                            await asyncio.sleep(random.uniform(0, 0.005))
                            continue
                        head = _Head(sequence, record.offset, record.epoch)
                    self._heads.put(channel, head)
                    return head
        except TimeoutError:
            raise BrokerError(f"the publication could not be stored within {TIMEOUT:g} seconds") from None

    async def _find_head(self, link: Link, subject: str) -> _Head:
        last = await link.last(self._history_stream, subject)
        record = None if last is None else self._read(last.data)
        if last is None or record is None:
            return _Head(last.sequence if last else 0, 0, secrets.token_hex(8))
        return _Head(last.sequence, record.offset, record.epoch)

    async def history(self, channel: str, *, since: Position | None, limit: int | None) -> History:
        link = self._current_link()
        subject = f"{self._prefix}.h.{token(channel)}"
        last = await link.last(self._history_stream, subject)
        record = None if last is None else self._read(last.data)
        if last is None or record is None:
            # Whoever publishes next has to count on from the position that is given now.
            self._heads.pop(channel)
            head = await self._append(link, channel, lambda head: None if head.sequence else _marker(head))
            return History((), Position(head.offset, head.epoch))
        position = Position(record.offset, record.epoch)
        gone = record.kind is None or time.time() > last.time + record.ttl
        if gone or limit == 0 or (since and (since.epoch != position.epoch or since.offset >= position.offset)):
            return History((), position)
        kept = self._kept(await link.read(self._history_stream, subject), last.sequence, position)
        if since is not None:
            kept = [record for record in kept if record.offset > since.offset][:limit]
        elif limit is not None:
            kept = kept[-limit:]
        return History(tuple(record.publication(channel) for record in kept), position)

    def _kept(self, stored: list[Stored], last: int, position: Position) -> list[_Record]:
        """Those of a channel's messages that its retention keeps. The stream may have more, which nobody has tidied
        away yet."""
        kept: list[_Record] = []
        before = 0.0
        for message in stored:
            if message.sequence > last or (record := self._read(message.data)) is None:
                continue
            if kept and message.time > before + kept[-1].ttl:
                kept.clear()
            if record.kind is None or record.epoch != position.epoch:
                kept.clear()
            else:
                kept.append(record)
            before = message.time
        return kept[-kept[-1].size :] if kept else []

    async def _keep_tidy(self) -> None:
        """Delete what histories don't keep any more."""
        while True:
            await asyncio.sleep(_TIDY_INTERVAL)
            with contextlib.suppress(BrokerError):
                link = self._current_link()
                for channel, size in self._tidying.take_overfull():
                    await link.purge(self._history_stream, f"{self._prefix}.h.{token(channel)}", keep=size)
                for channel, head in self._tidying.take_expired():
                    await self._expire(link, channel, head)
                for name, sequence in self._tidying.take_forgotten():
                    await link.purge(self._values_stream, self._word_subject(name), seq=sequence + 1)

    async def _expire(self, link: Link, channel: str, head: _Head) -> None:
        subject = f"{self._prefix}.h.{token(channel)}"
        with contextlib.suppress(Conflict):  # it goes on, and somebody else will see to its end
            marker = _VERSION + _encode(_marker(head))
            sequence = await link.store(self._history_stream, subject, marker, last=head.sequence)
            await link.purge(self._history_stream, subject, seq=sequence)

    async def remember(self, name: str, value: str, *, ttl: float | None = None) -> None:
        link = self._current_link()
        word = _VERSION + _encode(_Word(value, None if ttl is None else time.time() + ttl))
        sequence = await link.store(self._values_stream, self._word_subject(name), word)
        if ttl is not None:
            self._tidying.remembered(name, sequence, ttl)

    async def recall(self, name: str) -> str | None:
        try:
            value, _ = await self._word(self._current_link(), name)
        except NoJetStream:
            # Nobody can have remembered anything.
            return None
        return value

    async def take(self, name: str) -> str | None:
        link = self._current_link()
        subject, nothing = self._word_subject(name), _VERSION + _encode(_Word(None, None))
        try:
            async with asyncio.timeout(TIMEOUT):
                while True:
                    value, sequence = await self._word(link, name)
                    if value is None:
                        return None
                    with contextlib.suppress(Conflict):  # of many that try one succeeds, and the others look again
                        sequence = await link.store(self._values_stream, subject, nothing, last=sequence)
                        break
        except TimeoutError:
            raise BrokerError(f"what was remembered could not be taken within {TIMEOUT:g} seconds") from None
        with contextlib.suppress(BrokerError):  # it stays, and means nothing
            await link.purge(self._values_stream, subject, seq=sequence + 1)
        return value

    async def _word(self, link: Link, name: str) -> tuple[str | None, int]:
        """What is remembered by a name, and the number of its message."""
        last = await link.last(self._values_stream, self._word_subject(name))
        if last is None:
            return None, 0
        with contextlib.suppress(ValueError, msgspec.MsgspecError):
            if last.data[:1] == _VERSION:
                word = _decode_word(memoryview(last.data)[1:])
                expired = word.until is not None and word.until <= time.time()
                return None if expired else word.value, last.sequence
        self.ignored += 1
        return None, last.sequence

    def _word_subject(self, name: str) -> str:
        return f"{self._prefix}.v.{token(name)}"

    # Presence

    async def enter(self, channel: str, connection: str, key: str, value: str, *, expiry: float) -> bool:
        before = self._keys.get((channel, connection), key)
        if before != key:
            await self.leave(channel, connection, grace=0)
        new, came = False, time.time()

        def change(entry: _Key, now: float, expired: bool) -> bool:
            nonlocal new
            # Of a key whose grace is over, or whose members have expired, nobody has been told yet.
            new = not entry.members and entry.lingers is None and not expired
            here = entry.members.get(connection)
            entry.members[connection] = _Member(value, now + expiry, here.since if here else came)
            entry.lingers = None
            return True

        await self._change(channel, key, change)
        self._keys[channel, connection] = key
        return new

    async def leave(self, channel: str, connection: str, *, grace: float) -> None:
        def change(entry: _Key, now: float, expired: bool) -> bool:
            if entry.members.pop(connection, None) is None:
                return False
            if not entry.members:
                entry.lingers = now + grace
            return True

        key = self._keys.pop((channel, connection), None)
        if key is None:  # another process entered it
            entries = await self._entries(channel)
            key = next((entry.key for _, entry in entries if connection in entry.members), None)
        if key is not None:
            await self._change(channel, key, change)

    async def settle(self, channel: str, key: str) -> bool:
        def change(entry: _Key, now: float, expired: bool) -> bool:
            if entry.members or entry.lingers is None or entry.lingers > now:
                return False
            entry.lingers = None
            return True

        return await self._change(channel, key, change)

    async def refresh(self, channel: str, members: Mapping[str, tuple[str, str]], *, expiry: float) -> list[str]:
        own: dict[str, dict[str, str]] = {}
        for connection, (key, value) in members.items():
            own.setdefault(key, {})[connection] = value
        entries = {entry.key: (sequence, entry) for sequence, entry in await self._entries(channel)}

        async def stay(key: str) -> None:
            def change(entry: _Key, now: float, expired: bool) -> bool:
                for connection, value in own[key].items():
                    here = entry.members.get(connection)
                    entry.members[connection] = _Member(value, now + expiry, here.since if here else now)
                entry.lingers = None
                return True

            await self._change(channel, key, change, entries.get(key))

        async def forget(key: str) -> bool:
            def change(entry: _Key, now: float, expired: bool) -> bool:
                gone = not entry.members and (expired if entry.lingers is None else entry.lingers <= now)
                if gone:
                    entry.lingers = None
                return gone

            try:
                return await self._change(channel, key, change, entries[key])
            except BrokerError:  # the next refresh tries again, and those that have gone by now are told
                return False

        await _for_each(stay, list(own))
        now = time.time()
        others = [key for key, (_, entry) in entries.items() if key not in own and entry.may_have_gone(now)]
        gone = await _for_each(forget, others)
        return [key for key, went in zip(others, gone, strict=True) if went]

    async def members(self, channel: str) -> dict[str, str]:
        now = time.time()
        present = [
            (member.since, connection, member.value)
            for _, entry in await self._entries(channel)
            for connection, member in entry.members.items()
            if member.until > now
        ]
        return {connection: value for _, connection, value in sorted(present)}

    async def count(self, channel: str) -> tuple[int, int]:
        now = time.time()
        present = [entry.present(now) for _, entry in await self._entries(channel)]
        return sum(present), sum(map(bool, present))

    async def _entries(self, channel: str) -> list[tuple[int, _Key]]:
        """All keys of a channel, with the numbers of their messages; those that linger or expired are among them."""
        stored = await self._current_link().read(self._presence_stream, f"{self._prefix}.p.{token(channel)}.*")
        entries: dict[str, tuple[int, _Key]] = {}
        for message in stored:
            if (entry := self._read_key(message.data)) is not None:
                entries[entry.key] = message.sequence, entry
        return [(sequence, entry) for sequence, entry in entries.values() if not entry.empty]

    def _read_key(self, data: bytes) -> _Key | None:
        with contextlib.suppress(ValueError, msgspec.MsgspecError):
            if data[:1] == _VERSION:
                return _decode_key(memoryview(data)[1:])
        self.ignored += 1
        return None

    async def _change(
        self,
        channel: str,
        key: str,
        change: Callable[[_Key, float, bool], bool],
        known: tuple[int, _Key] | None = None,
    ) -> bool:
        """Change the entry of a key, in which those that have expired are forgotten, unless `change` says that there
        is nothing to write; whether there was. When somebody else writes meanwhile, it is tried again."""
        link = self._current_link()
        hashed = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
        subject = f"{self._prefix}.p.{token(channel)}.{hashed}"
        try:
            async with asyncio.timeout(TIMEOUT):
                while True:
                    sequence, entry = known or await self._find_key(link, subject, key)
                    now = time.time()
                    expired = entry.forget_expired(now)
                    if not change(entry, now, expired):
                        return False
                    try:
                        data = _VERSION + _encode(entry)
                        sequence = await link.store(self._presence_stream, subject, data, last=sequence)
                    except Conflict:
                        known = None
                        await asyncio.sleep(random.uniform(0, 0.005))
                        continue
                    break
        except TimeoutError:
            raise BrokerError(f"presence could not be changed within {TIMEOUT:g} seconds") from None
        if entry.empty:
            with contextlib.suppress(BrokerError):  # it stays for a day, and means nothing
                await link.purge(self._presence_stream, subject, seq=sequence + 1)
        return True

    async def _find_key(self, link: Link, subject: str, key: str) -> tuple[int, _Key]:
        last = await link.last(self._presence_stream, subject)
        entry = None if last is None else self._read_key(last.data)
        return last.sequence if last else 0, entry or _Key(key, {})


class _Order:
    """Delivers a channel's publications by their offsets.

    A single server stores what two clients publish one by one, but may send it on the other way round when it is busy.
    What comes too early waits a moment for what is missing. If that is lost then the others don't wait for ever, and
    the hub sees the gap; and if it comes later still, it is too late.
    """

    __slots__ = ("_deliver", "_early", "_last", "_timer")

    def __init__(self, deliver: Deliver, last: Position | None = None) -> None:
        self._deliver = deliver
        self._last = last
        self._early: dict[int, Publication] = {}
        self._timer: asyncio.TimerHandle | None = None

    def take(self, publication: Publication, position: Position) -> None:
        if self._last is not None and self._last.epoch != position.epoch:
            self._release()
            self._hand_on(publication, position)
        elif position.offset == (1 if self._last is None else self._last.offset + 1):
            self._hand_on(publication, position)
        elif self._last is None or position.offset > self._last.offset:
            self._early[position.offset] = publication
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(_PATIENCE, self._release)

    def _hand_on(self, publication: Publication, position: Position) -> None:
        self._last = position
        self._deliver(publication)
        offset = position.offset + 1
        while self._early and (following := self._early.pop(offset, None)) is not None:
            self._last = following.position
            self._deliver(following)
            offset += 1

    def _release(self) -> None:
        self.stop()
        early, self._early = self._early, {}
        for _, publication in sorted(early.items()):
            self._last = publication.position
            self._deliver(publication)

    def stop(self) -> None:
        """Deliver nothing by itself any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Heads:
    """The heads of the channels that were published to last."""

    def __init__(self) -> None:
        self._heads: OrderedDict[str, _Head] = OrderedDict()

    def pop(self, channel: str) -> _Head | None:
        return self._heads.pop(channel, None)

    def put(self, channel: str, head: _Head) -> None:
        self._heads[channel] = head
        if len(self._heads) > _MAX_HEADS:
            self._heads.popitem(last=False)

    def advance(self, channel: str, head: _Head) -> None:
        """Somebody has published to the channel."""
        known = self._heads.get(channel)
        if known is not None and known.sequence < head.sequence:
            self._heads[channel] = head

    def clear(self) -> None:
        self._heads.clear()


class _Tidying:
    """What this process has to see the end of: channels that may have more messages than they keep, those whose
    messages expire when nobody publishes any more, and words that are remembered for a time."""

    def __init__(self) -> None:
        self._overfull: dict[str, int] = {}
        self._expiring: dict[str, tuple[float, _Head]] = {}
        self._by_time: list[tuple[float, str]] = []
        self._words: list[tuple[float, str, int]] = []

    def published(self, channel: str, head: _Head, retention: Retention) -> None:
        # Not every time, as each time costs a request. The steps are the channel's, whoever publishes.
        if head.offset % max(retention.size, 16) == 0:
            self._overfull[channel] = retention.size
        due = time.monotonic() + retention.ttl
        if channel not in self._expiring:
            if len(self._expiring) >= _MAX_EXPIRING:
                return  # the stream's own limit, a month, has to do
            heapq.heappush(self._by_time, (due, channel))
        self._expiring[channel] = due, head

    def remembered(self, name: str, sequence: int, ttl: float) -> None:
        if len(self._words) < _MAX_EXPIRING:
            heapq.heappush(self._words, (time.monotonic() + ttl, name, sequence))

    def take_forgotten(self) -> list[tuple[str, int]]:
        now = time.monotonic()
        forgotten = []
        while self._words and self._words[0][0] <= now:
            _, name, sequence = heapq.heappop(self._words)
            forgotten.append((name, sequence))
        return forgotten

    def take_overfull(self) -> list[tuple[str, int]]:
        overfull, self._overfull = self._overfull, {}
        return list(overfull.items())

    def take_expired(self) -> list[tuple[str, _Head]]:
        now = time.monotonic()
        expired = []
        while self._by_time and self._by_time[0][0] <= now:
            channel = heapq.heappop(self._by_time)[1]
            due, head = self._expiring[channel]
            if due > now:
                heapq.heappush(self._by_time, (due, channel))
            else:
                del self._expiring[channel]
                expired.append((channel, head))
        return expired


async def _for_each(call: Callable[[str], Awaitable[_T]], keys: list[str]) -> list[_T]:
    """Call for all, some at a time; raises the first error when all have been called."""
    results: list[_T | BaseException] = []
    for start in range(0, len(keys), 64):
        results += await asyncio.gather(*map(call, keys[start : start + 64]), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return typing.cast(list[_T], results)


def _data(payload: Payload) -> bytes:
    return payload.data if isinstance(payload.data, bytes) else payload.data.encode()


def _marker(head: _Head) -> _Record:
    return _Record(None, b"", None, head.offset, head.epoch, 0, 0)


def _nothing() -> None:
    """Before `start` there is nobody to tell."""


def _stream(prefix: str, letter: str, name: str, replicas: int, max_age: int) -> dict[str, Any]:
    return {
        "name": f"{prefix}_{name}",
        "subjects": [f"{prefix}.{letter}.>"],
        "retention": "limits",
        "discard": "old",
        "storage": "file",
        "num_replicas": replicas,
        "max_age": max_age * 1_000_000_000,
        "allow_direct": True,
    }


def _parse(url: str) -> tuple[Address, dict[str, str]]:
    """The address that a URL says, and its options. Raises `ValueError`; the words don't have the password."""
    scheme, found, rest = url.partition("://")
    if not found or scheme not in ("nats", "tls"):
        raise ValueError("the URL of a NATS server begins with nats:// or tls://")
    rest, _, query = rest.partition("?")
    credentials, _, hosts = rest.removesuffix("/").rpartition("@")
    servers = tuple(f"{scheme}://{_host(host)}" for host in hosts.split(","))
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    if unknown := options.keys() - {"prefix", "replicas"}:
        raise ValueError(f"the URL of a NATS server has no option {min(unknown)!r}; there are prefix and replicas")
    user, has_password, password = (urllib.parse.unquote(part) for part in credentials.partition(":"))
    tls = scheme == "tls"
    if has_password:
        return Address(servers, user=user, password=password, tls=tls), options
    return Address(servers, token=user or None, tls=tls), options


def _host(host: str) -> str:
    try:
        parts = urllib.parse.urlsplit(f"//{host}")
        name, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{host!r} isn't the address of a NATS server: {error}") from None
    if not name or parts.netloc != host or re.search(r"[\s\x00-\x1f@]", host):
        raise ValueError(f"{host!r} isn't the address of a NATS server")
    return host if port is not None else f"{host.removesuffix(':')}:4222"


def _replicas(value: int | str) -> int:
    if str(value) not in ("1", "2", "3", "4", "5"):
        raise ValueError(f"JetStream keeps 1 to 5 replicas, not {value!r}")
    return int(value)
