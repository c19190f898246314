"""A connection to a NATS server: what is sent and confirmed over it, and the requests to its JetStream.

nats-py's client speaks the protocol. What is here instead of what it has: a confirmation that is sent behind what it
confirms (its `flush` writes the PING before what still waits to be written), requests that fail with the link and not
five seconds later, and no buffering while there is no link.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import re
import ssl
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from asgi_ws.exceptions import BrokerError

__all__ = ["Address", "Conflict", "Link", "NoJetStream", "Stored", "token"]

TIMEOUT = 5.0
"""How long an answer of the server is waited for, in seconds."""

_CONNECT_TIMEOUT = 2
_MAX_UNSENT = 16 * 1024 * 1024
_MAX_UNREAD = 64 * 1024 * 1024
_MAX_TOKEN = 1500

_BATCHES = (2, 11)
"""From this version on a server answers a request with several messages of a stream."""

_SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_:/@+,")
_ESCAPED = [chr(byte) if byte in _SAFE else f"={byte:02X}" for byte in range(256)]

_NO_MESSAGE = 10037
_STREAM_NOT_FOUND = 10059
_OTHER_CONFIGURATION = 10058
_WRONG_LAST_SEQUENCE = (10071, 10164)
_JETSTREAM_OFF = (10039, 10076)


def token(name: str) -> str:
    """A name, whatever is in it, as one token of a subject: different for different names, without a character that
    means something to NATS. Of a name for which that would be too long, it is the hash."""
    escaped = "".join(_ESCAPED[byte] for byte in name.encode("utf-8", "surrogatepass"))
    if len(escaped) > _MAX_TOKEN:
        return "=" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return escaped or "=00="


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    """Where servers are, and how to be let in."""

    servers: tuple[str, ...]
    user: str | None = None
    password: str | None = None
    token: str | None = None
    tls: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """A message that a stream keeps, and when it came, in seconds since 1970 by the server's clock."""

    subject: str
    sequence: int
    time: float
    data: bytes


class Conflict(Exception):
    """Something else was stored meanwhile."""


class _NoStream(Exception):
    """No stream takes this subject."""


class NoJetStream(BrokerError):
    """The server has no JetStream."""


class _Refused(BrokerError):
    """JetStream answered with an error."""

    def __init__(self, action: str, code: int, description: str) -> None:
        super().__init__(f"NATS refused {action}: {description}")
        self.code = code


class _Error(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _StoredMessage(msgspec.Struct):
    subject: str
    seq: int
    time: datetime.datetime
    data: bytes = b""


class _Answer(msgspec.Struct):
    """What is read of JetStream's answers."""

    error: _Error | None = None
    seq: int = 0
    name: str = ""
    message: _StoredMessage | None = None


_decode_answer = msgspec.json.Decoder(_Answer).decode


class _Client(Client):
    """nats-py takes `tls://` for a wish; this one can say whether it came true."""

    encrypted = False

    @property
    def ssl_context(self) -> ssl.SSLContext:
        self.encrypted = True
        return super().ssl_context


class Link:
    """One connection, from its handshake until it is lost; `lost` is then done. All that waits for the server fails
    with `BrokerError` when it is, or after `TIMEOUT` seconds."""

    def __init__(self, streams: set[str], on_overflow: Callable[[], None]) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.subscriptions: dict[str, Subscription] = {}
        self._streams = streams
        self._on_overflow = on_overflow
        self._client = _Client()
        self._error: Exception | None = None
        self._inbox = ""
        self._names = itertools.count()
        self._waiting: dict[str, Callable[[Msg | None], None]] = {}
        self._confirming: asyncio.Future[BrokerError | None] | None = None
        self._next_confirming: asyncio.Future[BrokerError | None] | None = None
        self._making: dict[str, asyncio.Task[None]] = {}

    @classmethod
    async def open(cls, address: Address, server: str, streams: set[str], on_overflow: Callable[[], None]) -> "Link":
        """Connect to a server. `streams` are those that are known to be there, which outlives a link. `on_overflow` is
        called when messages were dropped because too many were waiting. Raises `BrokerError`."""
        link = cls(streams, on_overflow)
        try:
            await link._connect(address, server)
        except BaseException:
            await link.close()
            raise
        return link

    async def _connect(self, address: Address, server: str) -> None:
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT * 2):
                await self._client.connect(
                    servers=[server],
                    user=address.user,
                    password=address.password,
                    token=address.token,
                    name="asgi_ws",
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=_CONNECT_TIMEOUT,
                    pending_size=0,  # nothing is kept back while there is no link
                    flusher_queue_size=0,  # sending never waits, and so can't be cancelled half-way
                    error_cb=self._on_error,
                    closed_cb=self._on_closed,
                )
        except (OSError, TimeoutError, nats.errors.Error) as error:
            cause = self._error if isinstance(error, nats.errors.NoServersError) and self._error else error
            raise BrokerError(_why(server, cause)) from cause
        if address.tls and not self._client.encrypted:
            raise BrokerError(f"the NATS server at {server} doesn't speak TLS; use nats:// if that is meant")
        self._inbox = self._client.new_inbox()
        await self._client.subscribe(f"{self._inbox}.*", cb=self._on_answer, pending_bytes_limit=_MAX_UNREAD)
        await self.confirm()

    async def close(self) -> None:
        """Disconnect."""
        self._on_lost()
        for task in self._making.values():
            task.cancel()
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(1):
                await self._client.close()

    @property
    def servers(self) -> list[str]:
        """The servers of the cluster that this one has told of."""
        return [uri.geturl() for uri in self._client.discovered_servers]

    # What happens to it

    async def _on_closed(self) -> None:
        self._on_lost()

    def _on_lost(self) -> None:
        if self.lost.done():
            return
        self.lost.set_result(None)
        for answer in tuple(self._waiting.values()):
            answer(None)
        self._fail_confirmations(_lost())

    async def _on_error(self, error: Exception) -> None:
        self._error = error
        if isinstance(error, nats.errors.SlowConsumerError):
            self._on_overflow()
        elif "permissions violation" in str(error).lower():
            # It comes before the confirmation of what was not permitted.
            self._fail_confirmations(BrokerError(f"NATS doesn't permit it: {error}"))

    def _fail_confirmations(self, error: BrokerError) -> None:
        for confirming in (self._confirming, self._next_confirming):
            if confirming is not None and not confirming.done():
                confirming.set_result(error)

    async def _on_answer(self, msg: Msg) -> None:
        name = msg.subject[len(self._inbox) + 1 :]
        if name == "confirm":
            await self._confirmed()
        elif (answer := self._waiting.get(name)) is not None:
            answer(msg)

    # Sending

    async def send(
        self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a message. Doesn't wait, nor know whether it arrives: see `confirm`. Raises `BrokerError`."""
        if self.lost.done():
            raise _lost()
        if len(data) > self._client.max_payload:
            raise BrokerError(
                f"{len(data)} bytes are more than the NATS server takes: its max_payload is {self._client.max_payload}"
            )
        if self._client.pending_data_size > _MAX_UNSENT:
            raise BrokerError("the NATS server takes nothing at the moment, and too much waits to be sent")
        try:
            await self._client.publish(subject, data, reply, dict(headers) if headers else None)
        except nats.errors.Error as error:
            raise BrokerError(f"NATS: {error}") from error

    async def subscribe(self, name: str, subject: str, handler: Callable[[Msg], Awaitable[None]]) -> None:
        """Have what is published to a subject handed to `handler`, from a later `confirm` on."""
        if self.lost.done():
            raise _lost()
        try:
            self.subscriptions[name] = await self._client.subscribe(
                subject, cb=handler, pending_bytes_limit=_MAX_UNREAD
            )
        except nats.errors.Error as error:
            raise BrokerError(f"NATS: {error}") from error

    async def unsubscribe(self, name: str) -> None:
        """The end of that, at once."""
        subscription = self.subscriptions.pop(name, None)
        if subscription is not None and not self.lost.done():
            with contextlib.suppress(nats.errors.Error):
                await subscription.unsubscribe()

    async def confirm(self) -> None:
        """Wait until the server has taken all that was sent so far. Those who wait at the same time share the round
        trip: a message to ourselves, which the server sends back when it has read what was before it."""
        if self.lost.done():
            raise _lost()
        confirming = self._next_confirming
        if confirming is None:
            confirming = self._next_confirming = asyncio.get_running_loop().create_future()
            if self._confirming is None:
                await self._ask_to_confirm()
        error = await _limited(asyncio.shield(confirming))
        if error is not None:
            raise BrokerError(*error.args)

    async def _ask_to_confirm(self) -> None:
        self._confirming, self._next_confirming = self._next_confirming, None
        await self.send(f"{self._inbox}.confirm", b"")

    async def _confirmed(self) -> None:
        confirming, self._confirming = self._confirming, None
        if confirming is not None and not confirming.done():
            confirming.set_result(None)
        if self._next_confirming is not None:
            with contextlib.suppress(BrokerError):  # lost, and so they have been told
                await self._ask_to_confirm()

    @contextlib.contextmanager
    def _answers(self, answer: Callable[[Msg | None], None]) -> Iterator[str]:
        """A subject on which answers are taken; `None` tells that the link was lost."""
        name = str(next(self._names))
        self._waiting[name] = answer
        try:
            yield f"{self._inbox}.{name}"
        finally:
            del self._waiting[name]

    async def _request(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None = None, *, repeat: float | None = None
    ) -> _Answer:
        """The answer to a request, which is repeated every so many seconds until there is one."""
        answered: asyncio.Future[Msg | None] = asyncio.get_running_loop().create_future()

        def answer(msg: Msg | None) -> None:
            with contextlib.suppress(asyncio.InvalidStateError):  # it was answered already
                answered.set_result(msg)

        with self._answers(answer) as reply:
            try:
                async with asyncio.timeout(TIMEOUT):
                    while not answered.done():
                        await self.send(subject, data, reply=reply, headers=headers)
                        await asyncio.wait([answered], timeout=repeat)
            except TimeoutError:
                raise _too_late() from None
        msg = answered.result()
        if msg is None:
            raise _lost()
        if not msg.data and msg.headers and msg.headers.get("Status") == "503":
            raise _NoStream
        try:
            return _decode_answer(msg.data)
        except msgspec.MsgspecError as error:
            raise BrokerError(f"NATS gave an answer that can't be read: {error}") from error

    # JetStream

    async def _ask(self, action: str, body: Mapping[str, Any]) -> _Answer:
        try:
            # While a cluster has no leader nobody answers. It does no harm to ask for the same twice.
            answer = await self._request(f"$JS.API.{action}", msgspec.json.encode(body), repeat=1)
        except _NoStream:
            raise _no_jetstream() from None
        error = answer.error
        if error is None:
            return answer
        if error.err_code in _JETSTREAM_OFF:
            raise _no_jetstream()
        raise _Refused(action.partition(".")[0], error.err_code, error.description)

    async def have_stream(self, config: Mapping[str, Any]) -> None:
        """See to it that there is a stream with this configuration. It is asked for once, and when it turns out to be
        gone: a cluster that has just lost a server answers that late, when all its streams work again."""
        name = config["name"]
        if name not in self._streams:
            task = self._making.get(name)
            if task is None or task.done():
                # A task of its own, as many wait for it, and any of them may be cancelled.
                task = self._making[name] = asyncio.create_task(self._make_stream(name, config))
                # Those who wait for it tell of its error; that nobody does any more is none.
                task.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.shield(task)

    async def _make_stream(self, name: str, config: Mapping[str, Any]) -> None:
        try:
            await self._ask(f"STREAM.CREATE.{name}", config)
        except _Refused as refused:
            if refused.code != _OTHER_CONFIGURATION:
                raise
            await self._ask(f"STREAM.UPDATE.{name}", config)
        self._streams.add(name)

    async def store(self, config: Mapping[str, Any], subject: str, data: bytes, *, last: int | None = None) -> int:
        """Store a message, and its sequence number in the stream. With `last`, only if that is the number of the
        latest one with this subject, 0 for none; else `Conflict` is raised."""
        headers = None if last is None else {"Nats-Expected-Last-Subject-Sequence": str(last)}
        while True:
            await self.have_stream(config)
            try:
                answer = await self._request(subject, data, headers)
                break
            except _NoStream:
                # It was deleted meanwhile.
                self._streams.discard(config["name"])
                if last is not None:
                    raise Conflict from None
        if answer.error is None:
            return answer.seq
        if answer.error.err_code in _WRONG_LAST_SEQUENCE:
            raise Conflict
        raise _Refused("to store it", answer.error.err_code, answer.error.description)

    async def last(self, config: Mapping[str, Any], subject: str) -> Stored | None:
        """The latest message with this subject, which may have wildcards."""
        await self.have_stream(config)
        name = config["name"]
        try:
            message = (await self._ask(f"STREAM.MSG.GET.{name}", {"last_by_subj": subject})).message
        except _Refused as refused:
            if refused.code == _STREAM_NOT_FOUND:
                self._streams.discard(name)
            elif refused.code != _NO_MESSAGE:
                raise
            return None
        return None if message is None else Stored(message.subject, message.seq, message.time.timestamp(), message.data)

    async def read(self, config: Mapping[str, Any], subject: str) -> list[Stored]:
        """All messages with this subject, which may have wildcards, oldest first. Those that come meanwhile may be
        among them."""
        version = self._client.connected_server_version
        batches = (version.major, version.minor) >= _BATCHES
        # The latest is asked for where it is written, the others of anybody, who may be behind.
        last = await self.last(config, subject)
        for by in (*[self._read_batches] * 3 * batches, self._read_by_consumer):
            if last is None:
                return []
            read = await by(config, subject, last.sequence)
            if not read or read[-1].sequence < last.sequence:
                last = await self.last(config, subject)
            if read and last is not None and read[-1].sequence >= last.sequence:
                return read
        raise BrokerError("the NATS server didn't give all that it has stored")

    async def _read_batches(self, config: Mapping[str, Any], subject: str, until: int) -> list[Stored]:
        """Read by asking for batches."""
        read: list[Stored] = []
        start, status = 1, "204"
        while status == "204" and start <= until:
            ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

            def answer(msg: Msg | None, ended: asyncio.Future[str] = ended) -> None:
                headers = (msg and msg.headers) or {"Status": "lost"}
                if msg is not None and "Nats-Sequence" in headers:
                    read.append(_got(msg.data, headers))
                # A server that knows no batches answers with a single message, and no count of those that wait.
                status = headers.get("Status", "" if "Nats-Num-Pending" in headers else "unknown")
                if status and not ended.done():
                    ended.set_result(status)

            with self._answers(answer) as reply:
                body = {"seq": start, "next_by_subj": subject, "batch": 1000}
                await self.send(f"$JS.API.DIRECT.GET.{config['name']}", msgspec.json.encode(body), reply=reply)
                status = await _limited(ended)
            if status == "lost":
                raise _lost()
            start = read[-1].sequence + 1 if read else until + 1
        return read

    async def _read_by_consumer(self, config: Mapping[str, Any], subject: str, until: int) -> list[Stored]:
        """Read as a consumer that is made for it."""
        read: list[Stored] = []
        more = asyncio.Event()

        async def take(msg: Msg) -> None:
            read.append(_delivered(msg))
            more.set()

        name = config["name"]
        # A subscription of its own, as what a consumer delivers has its first subject and not the one it is sent to.
        inbox = self._client.new_inbox()
        consumer = {
            "deliver_subject": inbox,
            "deliver_policy": "all",
            "ack_policy": "none",
            "filter_subject": subject,
            "replay_policy": "instant",
            "mem_storage": True,
            "num_replicas": 1,
        }
        await self.subscribe(inbox, inbox, take)
        try:
            created = await self._ask(f"CONSUMER.CREATE.{name}", {"stream_name": name, "config": consumer})
            # What is waited for may be deleted meanwhile.
            with contextlib.suppress(TimeoutError):
                while not read or read[-1].sequence < until:
                    more.clear()
                    async with asyncio.timeout(1):
                        await more.wait()
        finally:
            # Without the subscription the server forgets the consumer in seconds, if it doesn't hear of it now.
            await self.unsubscribe(inbox)
        with contextlib.suppress(BrokerError):
            await self.send(f"$JS.API.CONSUMER.DELETE.{name}.{created.name}", b"", reply=f"{self._inbox}.none")
        return read

    async def purge(self, config: Mapping[str, Any], subject: str, **which: int) -> None:
        """Delete messages with this subject: those before `seq`, or all but the latest `keep`."""
        await self.have_stream(config)
        await self._ask(f"STREAM.PURGE.{config['name']}", {"filter": subject, **which})


async def _limited(future: "asyncio.Future[Any]") -> Any:
    try:
        async with asyncio.timeout(TIMEOUT):
            return await future
    except TimeoutError:
        raise _too_late() from None


def _got(data: bytes, headers: Mapping[str, str]) -> Stored:
    """A message of a stream, as it is given to who asks for it."""
    time = datetime.datetime.fromisoformat(headers["Nats-Time-Stamp"]).timestamp()
    return Stored(headers["Nats-Subject"], int(headers["Nats-Sequence"]), time, data)


def _delivered(msg: Msg) -> Stored:
    """A message of a stream, as a consumer is given it. Its reply subject says where it is from: `$JS.ACK.`, in later
    versions a domain and an account, then stream, consumer, count, sequence, consumer's sequence, time, how many wait,
    and in later versions a random token."""
    parts = msg.reply.split(".")
    at = 2 if len(parts) == 9 else 4
    return Stored(msg.subject, int(parts[at + 3]), int(parts[at + 5]) / 1e9, msg.data)


def _lost() -> BrokerError:
    return BrokerError("the link to the NATS server is lost")


def _too_late() -> BrokerError:
    return BrokerError(f"the NATS server gave no answer within {TIMEOUT:g} seconds")


def _no_jetstream() -> NoJetStream:
    return NoJetStream(
        "history and presence need JetStream, which isn't enabled on this NATS server: start it with -js, or with a "
        "jetstream block in its configuration"
    )


def _why(server: str, error: Exception) -> str:
    text = re.sub(r"^nats: ", "", str(error)).strip("'") or type(error).__name__
    if "authorization" in text.lower():
        return f"the NATS server at {server} doesn't accept these credentials: {text}"
    return f"no NATS server answers at {server}: {text}"
