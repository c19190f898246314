"""The broker that joins processes over Redis."""

import asyncio
import functools
import itertools
import logging
import random
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from typing import Any, Literal

import msgspec
from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from asgi_ws.brokers.base import Deliver, HistoryBroker, PresenceBroker
from asgi_ws.brokers.redis_links import COMMAND_TIMEOUT, Lines, Link, SubscriberLink, words
from asgi_ws.brokers.redis_servers import ERRORS, Servers, parse_url
from asgi_ws.exceptions import BrokerError
from asgi_ws.messages import History, Position, Publication, Retention
from asgi_ws.payloads import Payload
from asgi_ws.tables import Table

__all__ = ["RedisBroker"]

_logger = logging.getLogger("asgi_ws.brokers")

_OLDEST = 7
_VERSION = 1
_MAX_SIZE = 64 * 1024 * 1024
"""Redis would take 512 MiB. What is larger than this isn't a message, and parsing it would hold up all the others."""
_DAY = 24 * 60 * 60 * 1000
_SUBSCRIBE_BATCH = 512
_SUBSCRIBE_WINDOW = 8 * _SUBSCRIBE_BATCH
_REFRESH_BATCH = 256
_KINDS: tuple[Literal["text", "json", "binary"], ...] = ("text", "json", "binary")
_MOVED = (MovedError, AskError, TryAgainError, ClusterDownError)


class _Wire(msgspec.Struct, array_like=True):
    """A publication on its way, behind a byte that says the version. Kept in a stream without the last two."""

    kind: int
    data: bytes
    sender: str | None
    offset: int = 0
    epoch: str = ""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Wire)
_member_decoder = msgspec.msgpack.Decoder(tuple[int, str, str])


class _Script:
    """A Lua script, by the hash that Redis calls it."""

    def __init__(self, name: str) -> None:
        self.text = resources.files("asgi_ws.brokers").joinpath(name).read_bytes()
        self.hash = b""


def _quote(text: str) -> str:
    """Without braces, which in a key's name say what its slot is made of."""
    return text.replace("%", "%25").replace("{", "%7B").replace("}", "%7D")


class _Names:
    """What a hub's keys and channels are called in Redis. All of one channel are in one slot of a cluster."""

    def __init__(self, prefix: str, database: int) -> None:
        self._prefix = _quote(prefix)
        self._database = database

    def channel(self, channel: str) -> bytes:
        # Redis' own channels know no databases.
        return f"{self._prefix}:{self._database}:{{{_quote(channel)}}}".encode()

    def stream(self, channel: str) -> tuple[bytes, bytes]:
        tag = _quote(channel)
        return f"{self._prefix}:meta:{{{tag}}}".encode(), f"{self._prefix}:stream:{{{tag}}}".encode()

    def presence(self, channel: str) -> tuple[bytes, ...]:
        kinds = ("members", "expiries", "keys", "gone")
        return tuple(f"{self._prefix}:{kind}:{{{_quote(channel)}}}".encode() for kind in kinds)

    def word(self, name: str) -> bytes:
        return f"{self._prefix}:word:{{{_quote(name)}}}".encode()


class _Subscriptions:
    """What this process subscribes to in Redis: asked for in batches, confirmed, and asked for again on each new
    link."""

    def __init__(
        self,
        servers: Servers,
        on_message: Callable[[str, bytes], None],
        lost: Callable[[], None],
        trouble: Callable[[], None],
        check: Callable[[Link, str], Any],
    ) -> None:
        self._servers = servers
        self._on_message = on_message
        self._lost = lost
        self._trouble = trouble
        self._check = check
        self._channels: Table[bytes, str] = Table()
        self._waiters: Table[bytes, asyncio.Future[None]] = Table()
        self._changes: dict[bytes, bool] = {}
        self._homes: dict[bytes, str] = {}
        self._strays: set[bytes] = set()
        self._links: dict[str, Link] = {}
        self._subscribe, self._unsubscribe = (
            (b"ssubscribe", b"sunsubscribe") if servers.sharded else (b"subscribe", b"unsubscribe")
        )
        self.lines = Lines(servers, self._make, self._prepare, trouble)

    async def add(self, name: bytes, channel: str) -> None:
        """Returns when Redis has confirmed. Raises one of `ERRORS`."""
        self._channels[name] = channel
        waiter = self._waiters[name] = asyncio.get_running_loop().create_future()
        self._change(name, True)
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT):
                await waiter
        except BaseException:
            self.remove(name)
            raise
        finally:
            del self._waiters[name]

    def remove(self, name: bytes) -> None:
        """Nothing is delivered from this call on."""
        if name in self._channels:
            del self._channels[name]
            self._change(name, False)

    async def stop(self) -> None:
        """Nothing is delivered from this call on."""
        self._channels.clear()
        for waiter in self._waiters.values():
            _tell(waiter, ConnectionError("the broker was stopped"))
        await self.lines.stop()

    async def resettle(self) -> None:
        """Ask again for what is to be had from another server now."""
        moved = {name for name, home in self._homes.items() if home != self._home(name)}
        names = (moved | self._strays) & self._channels.keys()
        self._strays.clear()
        again = any(name not in self._waiters for name in names)
        asked: list[asyncio.Future[Any]] = []
        for name in names:
            asked += self._ask(self._home(name), [name])
        await asyncio.gather(*asked, return_exceptions=True)
        if again:
            self._lost()

    def _home(self, name: bytes) -> str:
        return self._servers.node_of(name)

    def _make(self, connection: Any) -> Link:
        return SubscriberLink(connection, self._receive, self._drop)

    def _receive(self, name: bytes, data: bytes) -> None:
        channel = self._channels.get(name)
        if channel is not None:
            self._on_message(channel, data)

    def _drop(self, name: bytes) -> None:
        self._strays.add(name)
        self._trouble()

    async def _prepare(self, link: Link, node: str) -> None:
        await self._check(link, node)
        # From here on what is asked for goes to this link, too; what was before is in the list.
        self._links[node] = link
        names = [name for name in self._channels if self._home(name) == node]
        again = any(name not in self._waiters for name in names)
        for start in range(0, len(names), _SUBSCRIBE_WINDOW):
            window = names[start : start + _SUBSCRIBE_WINDOW]
            await asyncio.gather(*self._ask(node, [name for name in window if name in self._channels]))
        if again:
            self._lost()

    def _change(self, name: bytes, wanted: bool) -> None:
        if not self._changes:
            asyncio.get_running_loop().call_soon(self._flush)
        self._changes[name] = wanted

    def _flush(self) -> None:
        changes, self._changes = self._changes, {}
        wanted: defaultdict[str, list[bytes]] = defaultdict(list)
        unwanted: defaultdict[str, list[bytes]] = defaultdict(list)
        for name, is_wanted in changes.items():
            if is_wanted:
                wanted[self._home(name)].append(name)
            else:
                home = self._homes.pop(name) if name in self._homes else self._home(name)
                unwanted[home].append(name)
        for node, names in unwanted.items():
            link = self._links.get(node)
            if link is not None and link.alive:
                for batch in self._batches(names):
                    link.tell(self._unsubscribe, *batch, replies=len(batch))
        for node, names in wanted.items():
            self._ask(node, names)

    def _ask(self, node: str, names: Iterable[bytes]) -> list["asyncio.Future[Any]"]:
        """Subscribe, unless there is no link: then it is done when there is one."""
        link = self._links.get(node)
        if link is None or not link.alive:
            return []
        return [self._ask_for(link, node, batch) for batch in self._batches(names)]

    def _ask_for(self, link: Link, node: str, batch: list[bytes]) -> "asyncio.Future[Any]":
        if self._servers.sharded:
            self._homes.update(dict.fromkeys(batch, node))
        # Those of now: who asks for a name later waits for a later confirmation.
        waiters = [waiter for name in batch if (waiter := self._waiters.get(name)) is not None]
        asked = link.call(self._subscribe, *batch, replies=len(batch))
        asked.add_done_callback(functools.partial(self._answered, batch, waiters))
        return asked

    def _answered(
        self, batch: list[bytes], waiters: "list[asyncio.Future[None]]", asked: "asyncio.Future[Any]"
    ) -> None:
        if asked.cancelled():
            return
        error = asked.exception()
        if isinstance(error, _MOVED):
            self._strays.update(batch)
            self._trouble()
        elif error is None or isinstance(error, ResponseError):
            for waiter in waiters:
                _tell(waiter, error)
        # A link that was lost is made again, and they are asked for again.

    def _batches(self, names: Iterable[bytes]) -> Iterable[list[bytes]]:
        # In a cluster a command is for one slot, and hardly two of the channels are in the same.
        size = 1 if self._servers.sharded else _SUBSCRIBE_BATCH
        rest = iter(names)
        return iter(lambda: list(itertools.islice(rest, size)), [])


def _tell(waiter: "asyncio.Future[None]", error: BaseException | None) -> None:
    """Let whoever waits for a subscription go on, if he still waits."""
    if waiter.done():
        return
    if error is None:
        waiter.set_result(None)
    else:
        waiter.set_exception(error)
        waiter.exception()  # he may be about to be cancelled


class RedisBroker(HistoryBroker, PresenceBroker):
    """Joins processes over Redis 7 or later, or Valkey.

    The URL is one of

    - `redis://[user:password@]host[:port][/database]`
    - `redis+sentinel://[user:password@]host[:port][,host[:port]…]/master[/database]`, with the addresses of the
      Sentinels, the name by which they know the master, and the credentials for it; those for the Sentinels are
      `?sentinel_username=` and `?sentinel_password=`
    - `redis+cluster://[user:password@]host[:port][,host[:port]…]`, with one or more servers of the cluster

    or the same with `rediss` for TLS, where `ssl_ca_certs`, `ssl_ca_path`, `ssl_certfile`, `ssl_keyfile`,
    `ssl_password`, `ssl_cert_reqs` and `ssl_check_hostname` are for redis-py. Everywhere `?client_name=` is what
    `CLIENT LIST` shows, and `?prefix=` is what the names of all keys and channels begin with: hubs with different
    prefixes, or databases, on one server don't see each other. Raises `ValueError` for any other URL.

    The epoch of a channel changes when its keys have gone (evicted, or lost in a restart), and when its server was
    restarted or it has come to another one, as these may have forgotten what was confirmed. Only a server that writes
    all to disk before it answers (`appendonly yes`, `appendfsync always`), without Sentinel or cluster, keeps its
    epochs when it restarts. While a slot of a cluster moves, what is asked of its channels waits, up to five seconds.
    """

    def __init__(self, url: str, *, prefix: str = "asgi_ws") -> None:
        self._servers, in_url = parse_url(url)
        prefix = prefix if in_url is None else in_url
        if not prefix or not prefix.isprintable():
            raise ValueError(f"the prefix has one printable character or more, not {prefix!r}")
        self._names = _Names(prefix, self._servers.database)
        self._publish_command = b"SPUBLISH" if self._servers.sharded else b"PUBLISH"
        self._commands: Lines | None = None
        self._subscriptions: _Subscriptions | None = None
        self._follower: asyncio.Task[None] | None = None
        self._trouble = asyncio.Event()
        self._epochs = f"{secrets.token_hex(5)}-"
        self._epoch_numbers = itertools.count(1)
        self.ignored = 0
        """How many messages on the bus were not of this version, not readable, or too large."""
        self._told_ignored = float("-inf")

    async def start(self, deliver: Deliver, lost: Callable[[], None]) -> None:
        self._commands = Lines(self._servers, Link, self._prepare, self._trouble.set)
        receive = functools.partial(self._receive, deliver)
        self._subscriptions = _Subscriptions(self._servers, receive, lost, self._trouble.set, _check)
        try:
            await self._servers.refresh()
            await self._commands.start()
            await self._subscriptions.lines.start()
        except BaseException as error:
            await self.stop()
            if isinstance(error, ERRORS):
                raise _unreachable(error) from error
            raise
        if self._servers.sharded:
            self._follower = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        commands, subscriptions, follower = self._commands, self._subscriptions, self._follower
        self._commands = self._subscriptions = self._follower = None
        if follower is not None:
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)
        if subscriptions is not None:
            await subscriptions.stop()
        if commands is not None:
            await commands.stop()

    # Publishing

    async def publish(
        self, channel: str, payload: Payload, *, sender: str | None = None, retention: Retention | None = None
    ) -> Position | None:
        data = payload.data if isinstance(payload.data, bytes) else payload.data.encode()
        message = _encoder.encode(_Wire(_KINDS.index(payload.kind), data, sender))
        if len(message) > _MAX_SIZE:
            raise BrokerError(f"a publication of {len(message)} bytes is too large: the limit is {_MAX_SIZE}")
        if retention is None:
            name = self._names.channel(channel)
            await self._execute(name, self._publish_command, name, bytes([_VERSION]) + message)
            return None
        ttl = max(1, _ms(retention.ttl))
        to = (self._publish_command, self._names.channel(channel))
        offset, epoch, *_ = await self._run_stream(
            channel, b"publish", ttl + _DAY, *to, retention.size, ttl, message[1:-2]
        )
        return Position(offset, epoch.decode())

    async def history(self, channel: str, *, since: Position | None, limit: int | None) -> History:
        offset, epoch, kept = await self._run_stream(
            channel,
            b"history",
            _DAY,
            since.epoch if since else b"",
            since.offset + 1 if since else b"",
            b"" if limit is None else limit,
        )
        epoch = epoch.decode()
        publications = []
        for id, fields in kept if since else reversed(kept):
            wire = _decoder.decode(b"\x93" + fields[1])
            position = Position(int(id.partition(b"-")[0]), epoch)
            publications.append(Publication(channel, _payload(wire), position, wire.sender))
        return History(tuple(publications), Position(offset, epoch))

    async def remember(self, name: str, value: str, *, ttl: float | None = None) -> None:
        key = self._names.word(name)
        expiry = () if ttl is None else (b"PX", max(_ms(ttl), 1))
        await self._execute(key, b"SET", key, value, *expiry)

    async def recall(self, name: str) -> str | None:
        return await self._word(b"GET", name)

    async def take(self, name: str) -> str | None:
        return await self._word(b"GETDEL", name)

    async def _word(self, command: bytes, name: str) -> str | None:
        key = self._names.word(name)
        value = await self._execute(key, command, key)
        return None if value is None else value.decode()

    # Subscribing

    async def subscribe(self, channel: str) -> None:
        subscriptions = self._subscriptions
        if subscriptions is None:
            raise BrokerError("the broker isn't started")
        try:
            await subscriptions.add(self._names.channel(channel), channel)
        except ERRORS as error:
            raise BrokerError(f"Redis didn't confirm a subscription: {words(error)}") from error

    async def unsubscribe(self, channel: str) -> None:
        if self._subscriptions is not None:
            self._subscriptions.remove(self._names.channel(channel))

    def _receive(self, deliver: Deliver, channel: str, data: bytes) -> None:
        try:
            publication = _read(channel, data)
        except (ValueError, msgspec.MsgspecError):
            self._ignore(channel, data)
        else:
            deliver(publication)

    def _ignore(self, channel: str, data: bytes) -> None:
        self.ignored += 1
        if time.monotonic() - self._told_ignored > 60:
            self._told_ignored = time.monotonic()
            _logger.warning(
                "a message of %d bytes on channel %r is nothing that asgi_ws has published; it begins with %r "
                "(%d ignored so far)",
                len(data),
                channel,
                data[:32],
                self.ignored,
            )

    # Presence

    async def enter(self, channel: str, connection: str, key: str, value: str, *, expiry: float) -> bool:
        return bool(await self._run_presence(channel, b"enter", connection, key, value, _ms(expiry)))

    async def leave(self, channel: str, connection: str, *, grace: float) -> None:
        await self._run_presence(channel, b"leave", connection, _ms(grace))

    async def settle(self, channel: str, key: str) -> bool:
        return bool(await self._run_presence(channel, b"settle", key))

    async def refresh(self, channel: str, members: Mapping[str, tuple[str, str]], *, expiry: float) -> list[str]:
        rest = [(connection, *member) for connection, member in members.items()]
        gone: list[bytes] = []
        while True:
            batch, rest = rest[:_REFRESH_BATCH], rest[_REFRESH_BATCH:]
            arguments = itertools.chain.from_iterable(batch)
            gone += await self._run_presence(channel, b"refresh", 0 if rest else 1, _ms(expiry), *arguments)
            if not rest:
                return [key.decode() for key in gone]

    async def members(self, channel: str) -> dict[str, str]:
        flat = iter(await self._run_presence(channel, b"members"))
        members = [(_member_decoder.decode(packed), name.decode()) for name, packed in zip(flat, flat, strict=True)]
        members.sort()
        return {connection: value for (_, _, value), connection in members}

    async def count(self, channel: str) -> tuple[int, int]:
        connections, keys = await self._run_presence(channel, b"count")
        return connections, keys

    # Commands

    async def _run_stream(self, channel: str, operation: bytes, keep: int, *arguments: Any) -> Any:
        keys = self._names.stream(channel)
        epoch = f"{self._epochs}{next(self._epoch_numbers):x}"

        def command(link: Link) -> tuple[Any, ...]:
            return (*keys, operation, link.run, int(link.durable), epoch, keep, *arguments)

        return await self._run(_STREAM, 2, keys[0], command)

    async def _run_presence(self, channel: str, operation: bytes, *arguments: Any) -> Any:
        command = (*self._names.presence(channel), operation, *arguments)
        return await self._run(_PRESENCE, 4, command[0], lambda link: command)

    async def _run(self, script: "_Script", keys: int, key: bytes, command: Callable[[Link], tuple[Any, ...]]) -> Any:
        try:
            return await self._ask(key, lambda link: (b"EVALSHA", script.hash, keys, *command(link)))
        except NoScriptError:  # somebody has flushed the scripts
            return await self._ask(key, lambda link: (b"EVAL", script.text, keys, *command(link)))

    async def _execute(self, key: bytes, *command: Any) -> Any:
        return await self._ask(key, lambda link: command)

    async def _ask(self, key: bytes, command: Callable[[Link], tuple[Any, ...]]) -> Any:
        """The answer of the server that has the key. A command is sent once: only one that was refused because it is
        another server's is sent to that."""
        lines = self._commands
        if lines is None:
            raise BrokerError("the broker isn't started")
        try:
            node = self._servers.node_of(key)
            link = lines.get(node) or await lines.wait(node)
            try:
                return await link.call(*command(link))
            except _MOVED as error:
                async with asyncio.timeout(COMMAND_TIMEOUT):
                    return await self._ask_again(lines, key, command, error)
            except ReadOnlyError as error:
                link.end(error)  # it has become a replica
                raise
        except NoScriptError:
            raise
        except ERRORS as error:
            raise BrokerError(f"Redis didn't confirm: {words(error)}") from error

    async def _ask_again(
        self, lines: Lines, key: bytes, command: Callable[[Link], tuple[Any, ...]], error: ResponseError
    ) -> Any:
        while True:
            if isinstance(error, AskError):
                link = await lines.wait(f"{error.host}:{error.port}")
                link.tell(b"ASKING")
            else:
                self._trouble.set()
                await asyncio.sleep(random.uniform(0.05, 0.2))
                link = await lines.wait(self._servers.node_of(key))
            try:
                return await link.call(*command(link))
            except _MOVED as again:
                error = again

    async def _prepare(self, link: Link, node: str) -> None:
        await _check(link, node)
        link.durable = not self._servers.can_fail_over and await _writes_through(link)
        for script in (_STREAM, _PRESENCE):
            script.hash = await link.call(b"SCRIPT", b"LOAD", script.text)

    async def _follow(self) -> None:
        """Know where the servers of a cluster are, whenever one was lost or a channel has moved."""
        subscriptions, commands = self._subscriptions, self._commands
        assert subscriptions is not None
        assert commands is not None
        while True:
            await self._trouble.wait()
            await asyncio.sleep(random.uniform(0.05, 0.2))
            self._trouble.clear()
            try:
                await self._servers.refresh()
            except ERRORS:
                self._trouble.set()
                continue
            commands.follow()
            subscriptions.lines.follow()
            await subscriptions.resettle()


def _read(channel: str, data: bytes) -> Publication:
    """A message as a publication. Raises `ValueError` or msgspec's error when it isn't one."""
    if len(data) > _MAX_SIZE or data[:1] != bytes([_VERSION]):
        raise ValueError
    wire = _decoder.decode(memoryview(data)[1:])
    if not (0 < wire.offset < 2**53 and len(wire.epoch) <= 64 if wire.epoch else wire.offset == 0):
        raise ValueError
    position = Position(wire.offset, wire.epoch) if wire.epoch else None
    return Publication(channel, _payload(wire), position, wire.sender)


def _payload(wire: _Wire) -> Payload:
    """Raises `ValueError` for what no payload is."""
    if not 0 <= wire.kind < len(_KINDS):
        raise ValueError
    kind = _KINDS[wire.kind]
    return Payload(kind, wire.data if kind == "binary" else wire.data.decode())


async def _check(link: Link, node: str) -> None:
    """Raise one of `ERRORS` unless the server can be used, now."""
    lines = (await link.call(b"INFO")).decode(errors="replace").splitlines()
    info = dict(line.split(":", 1) for line in lines if ":" in line)
    check_version(info.get("redis_version", "unknown"))
    if info.get("loading") == "1":
        raise BusyLoadingError("it is loading its data")
    if info.get("role") != "master":
        raise ReadOnlyError("it is a replica; give the address of its master, or of the Sentinels")
    link.run = info.get("run_id", "")
    link.durable = info.get("aof_enabled") == "1"


def check_version(version: str) -> None:
    """Raise redis-py's error for a Redis that is too old."""
    major = version.partition(".")[0]
    if not (major.isdecimal() and int(major) >= _OLDEST):
        raise RedisError(f"its version is {version}, and asgi_ws needs {_OLDEST} or later")


async def _writes_through(link: Link) -> bool:
    """Whether what it confirms is on the disk."""
    try:
        setting = await link.call(b"CONFIG", b"GET", b"appendfsync")
    except ResponseError:  # this user may not know
        return False
    return link.durable and setting[1] == b"always"


def _unreachable(error: Exception) -> BrokerError:
    if isinstance(error, AuthenticationError) or isinstance(error.__cause__, AuthenticationError):
        return BrokerError(f"Redis refuses the credentials: {words(error)}")
    return BrokerError(f"Redis can't be used: {words(error)}")


def _ms(seconds: float) -> int:
    return max(0, int(seconds * 1000))


_STREAM = _Script("redis_stream.lua")
_PRESENCE = _Script("redis_presence.lua")
