"""One client: what it sends, what it is sent, which channels it listens to, and how all that ends."""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Generic, cast

from starlette.datastructures import State
from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import HTTPConnection
from starlette.types import Scope
from typing_extensions import TypeVar

from asgi_ws._types import Handler, Overflow
from asgi_ws.channels import check_name
from asgi_ws.context import STOP_TIME, Context, Exchange
from asgi_ws.exceptions import (
    BrokerError,
    ConnectionClosed,
    InvalidChannel,
    InvalidMessage,
    InvalidPosition,
    SubscriptionDenied,
)
from asgi_ws.frames import frame_of, may_be_sent, size_of
from asgi_ws.inbox import Inbox, Rate
from asgi_ws.links import Link, ReceivingLink, closed_by
from asgi_ws.messages import Position, Publication, Recovery
from asgi_ws.origins import user_id
from asgi_ws.outbox import Outbox
from asgi_ws.payloads import to_json
from asgi_ws.presence import Member, events_of
from asgi_ws.protocols import Protocol
from asgi_ws.transports import HttpSession
from asgi_ws.uvicorn import find_link

__all__ = ["Connection", "OnConnect", "OnInvalid"]

logger = logging.getLogger("asgi_ws")

T = TypeVar("T")
In = TypeVar("In", default=Any)
Out = TypeVar("Out", default=Any)

OnConnect = Callable[["Connection[Any, Any]"], Awaitable[None]]
OnInvalid = Callable[["Connection[Any, Any]", InvalidMessage], Awaitable[None]]

_FINISH = 5.0
"""How many seconds a handler has to finish what it does when its client is gone."""
_REASON_SIZE = 123
"""RFC 6455 section 5.5: a control frame's payload has 125 bytes, two of which are the close code."""


class Connection(HTTPConnection[State], Generic[In, Out]):
    """One client, from before its handshake is finished until it is gone.

    `In` is what it sends: `str`, `bytes`, or a type that its JSON messages are validated as; `Out` is what it is sent.
    Where nothing is annotated, text arrives as `str` and binary messages as `bytes`. The request's `headers`,
    `cookies`, `query_params`, `path_params`, `user` and `state` are here as on every Starlette connection.
    """

    def __init__(
        self,
        scope: Scope,
        exchange: Exchange,
        *,
        context: Context,
        protocol: Protocol[In],
        subprotocols: Iterable[str | None] = (),
        on_invalid: OnInvalid | None = None,
    ) -> None:
        super().__init__(scope)
        self.id = secrets.token_urlsafe(12)
        """Tells this connection from all others, in every process."""
        self.subprotocol: str | None = None
        """The subprotocol that both sides have agreed on."""
        self._session: HttpSession | None = scope.get("asgi_ws.session")
        self._exchange = exchange
        self._context = context
        self._protocol = protocol
        self._subprotocols = tuple(subprotocols)
        self._on_invalid = on_invalid
        self._link: Link | None = None
        self._outbox: Outbox | None = None
        self._inbox: Inbox | None = None
        self._reader: asyncio.Task[None] | None = None
        self._rate: Rate | None = None
        self._closing: asyncio.Future[None] | None = None
        self._closed: ConnectionClosed | None = None
        self._lost = False
        self._channels: set[str] = set()
        self._watched: frozenset[str] = frozenset()
        self._left = False
        self._handler: asyncio.Task[Any] | None = None
        self._handler_listens = False
        self._handler_cancelled = False
        self._handler_timer: asyncio.TimerHandle | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._expired = False

    @property
    def transport(self) -> str:
        """The way by which the client comes at the moment: `"websocket"`, for an Engine.IO client that or `"polling"`,
        or `"sse"`."""
        return "websocket" if self._session is None else self._session.transport

    @property
    def channels(self) -> frozenset[str]:
        """The channels that this connection is subscribed to."""
        return frozenset(self._channels)

    @property
    def user(self) -> Any:
        """Who the client is: what an authentication middleware says, or what the application has set."""
        return super().user

    @user.setter
    def user(self, user: Any) -> None:
        self.scope["user"] = user

    @property
    def user_id(self) -> str | None:
        """By what the user is known to `hub.disconnect` and to presence: a string, a number, a UUID, or the `identity`,
        `id` or `display_name` of an object; `None` for nobody."""
        return user_id(self.scope)

    @property
    def dropped(self) -> int:
        """How many publications were dropped because the client did not keep up."""
        return self._outbox.dropped if self._outbox is not None else 0

    # What the rooms above need of it; not for applications

    @property
    def closed(self) -> ConnectionClosed | None:
        """How it was closed, where it was."""
        return self._closed

    @property
    def protocol(self) -> Protocol[Any]:
        """What the client is spoken to with, whatever it came by."""
        return self._protocol

    @property
    def outbox(self) -> Outbox:
        """What waits for the client. Raises `ConnectionClosed`, or `RuntimeError` before the handshake."""
        return self._opened(self._outbox)

    @property
    def _overflow(self) -> Overflow:
        return self._context.overflow

    # The handshake

    async def accept(
        self,
        subprotocol: str | None = None,
        headers: Mapping[str, str] | Iterable[tuple[str | bytes, str | bytes]] | None = None,
    ) -> None:
        """Finish the handshake; only for handlers registered with `accept=False`.

        `headers` are added to the response. Without `subprotocol` the first of the endpoint's that the client offers
        is chosen. Raises `HTTPException` when the endpoint has some and the client offers none of them,
        `ConnectionClosed` when the client is gone, `ValueError` for a header with a line break, and `RuntimeError`
        when the handshake is finished already.
        """
        if self._outbox is not None:
            raise RuntimeError("the connection has been accepted already")
        if self._expired:
            raise HTTPException(401, "expired")
        raw_headers = _raw_headers(headers or {})
        if subprotocol is None:
            subprotocol = self._choose_subprotocol()
        message = await self._exchange.receive()
        if message["type"] != "websocket.connect":
            self._closed = closed_by(message)
            raise self._closed.again()
        try:
            await self._exchange.send({"type": "websocket.accept", "subprotocol": subprotocol, "headers": raw_headers})
        except OSError as error:
            self._closed = ConnectionClosed(1006, clean=False)
            raise self._closed.again() from error
        self.subprotocol = subprotocol
        if self._session is not None:
            self._protocol = self._session.adapt(self._protocol)
        limits = self._context.limits
        self._link = find_link(self._exchange.send, self.scope.get("extensions"))
        self._outbox = Outbox(self._link, limits.outbox_size, self._overflow, self._too_slow)
        self._inbox = Inbox(limits)
        self._context.connections.watch(self._link, self)
        self._context.clients[self.id] = self
        if limits.messages_per_second is not None:
            self._rate = Rate(limits.messages_per_second, limits.burst)
        if hasattr(self._link, "listen"):
            cast(ReceivingLink, self._link).listen(self, limits.message_size)
        else:
            self._reader = asyncio.create_task(self._read(self._inbox), name="asgi_ws reader")

    def _choose_subprotocol(self) -> str | None:
        offered = self.scope.get("subprotocols") or ()
        for subprotocol in self._subprotocols:
            if subprotocol is None or subprotocol in offered:
                return subprotocol
        if self._subprotocols:
            raise HTTPException(400, f"a subprotocol is needed, one of: {', '.join(map(str, self._subprotocols))}")
        return None

    # Messages in

    async def receive(self) -> In:
        """The next message; waits for it.

        What the client sent before it left is still received; then `ConnectionClosed` is raised. What can't be read
        raises `InvalidMessage`, which closes the connection with 1007 unless the handler catches it; where the
        endpoint has an `on_invalid`, that is called instead and the next message is waited for.
        """
        return await self._next(False)

    def __aiter__(self) -> "Connection[In, Out]":
        """Iterate over the client's messages until the connection is closed, whoever closes it and however."""
        return self

    def __anext__(self) -> Awaitable[In]:
        return self._next(True)

    async def _next(self, iterating: bool) -> In:
        inbox = self._opened(self._inbox)
        self._handler_listens = True
        while True:
            while not inbox.messages:
                if self._closed is not None:
                    raise StopAsyncIteration if iterating else self._closed.again()
                await inbox.new_receiver()
            try:
                return self._protocol.decode(inbox.take())
            except InvalidMessage as error:
                if self._on_invalid is None:
                    raise
                await self._on_invalid(self, error)

    # Messages out

    async def send(self, data: Out) -> None:
        """Send to this client; waits while it is behind with what it was sent before.

        Raises `ConnectionClosed`, and `TypeError` for data that can't be encoded.
        """
        outbox = self._opened(self._outbox)
        await outbox.put(frame_of(self._protocol.encode(data)))

    def push(self, publication: Publication) -> None:
        """Take a publication for this client. Called by the hub; never waits, never raises."""
        if publication.sender is None or publication.sender != self.id:
            cast(Outbox, self._outbox).push(publication.frame(self._protocol), publication.channel)

    def recover(self, publication: Publication) -> None:
        """Take a publication that this client has missed. Called by the hub; never waits, never raises."""
        if publication.sender is None or publication.sender != self.id:
            cast(Outbox, self._outbox).recover(publication.frame(self._protocol))

    # Channels

    async def subscribe(
        self, channel: str, *, since: Position | str | None = None, info: Any = None, join_leave: bool = False
    ) -> Recovery:
        """From the return of this call on, the client gets what is published to the channel. A second time is none.

        In a channel with a history, `since` is the position (or the text of one) up to which the client has everything:
        what it has missed is sent first, if all of it can be had; what is returned says so, and where `Out` is
        `Publication` the client is told before. If later on publications are lost that the history hasn't got, the
        connection is closed with 1013, and comes back for that.

        In a channel with presence, `info` is what others see of the client besides its id and its user. With
        `join_leave` it is told who comes and who goes, by the JSON of a `PresenceEvent`.

        Raises `SubscriptionDenied` when the channel's rule says no or the connection has too many channels,
        `ConnectionClosed`, `BrokerError`, `InvalidChannel` for a name that no channel can have, `InvalidPosition`, and
        `ValueError` when `info` or `join_leave` is asked for in a channel without presence.
        """
        self._opened(self._outbox)
        check_name(channel)
        since = Position.of(since)
        if self._session is not None:
            # What the client has got since is newer than what its URL says.
            since = self._session.take_since(channel) or since
        if channel in self._channels:
            return Recovery(False, None)
        rule, parameters = self._context.rules.find(channel)
        if rule is not None and not await rule.ask(self, parameters):
            raise SubscriptionDenied(channel)
        if since is not None:
            # What was missed comes all at once, so what was missed of another channel is to have left before.
            await self._opened(self._outbox).flush()
        if self._closed is not None or self._left:
            raise (self._closed or ConnectionClosed(1000)).again()
        if channel in self._channels:
            return Recovery(False, None)
        present = rule is not None and rule.presence
        if not present and (join_leave or info is not None):
            raise ValueError(f"{channel!r} has no presence; declare it with hub.channel(..., presence=True)")
        limit = self._context.limits.channels
        if limit is not None and len(self._channels) >= limit:
            raise SubscriptionDenied(channel, f"a connection can have {limit} channels")
        self._channels.add(channel)
        pubsub = self._context.pubsub
        try:
            if join_leave:
                self._watched |= {channel}
                self._context.presence.watch(channel)
                await pubsub.subscribe(events_of(channel), self)

            def begin(recovery: Recovery) -> None:
                words = self._protocol.encode_recovery(channel, recovery)
                if words is not None:
                    cast(Outbox, self._outbox).push(frame_of(words), None)

            recovery = await pubsub.subscribe(channel, self, since=since, begin=begin)
            if present:
                await self._context.presence.enter(channel, Member(self.id, self.user_id, info))
        except BaseException:
            self._channels.discard(channel)
            await self._leave([channel])
            raise
        if channel not in self._channels:
            # Meanwhile the connection was left, or the channel, and nobody could know of this subscription yet.
            await self._leave([channel])
        return recovery

    async def unsubscribe(self, channel: str) -> None:
        """The client gets nothing of the channel any more, from this call on."""
        if channel in self._channels:
            self._channels.discard(channel)
            if self._session is not None:
                self._session.end(channel)
            await self._leave([channel])

    async def _leave(self, channels: Iterable[str]) -> None:
        watched = self._watched.intersection(channels)
        self._watched -= watched
        await self._context.leave(channels, watched, self)

    def lost(self, channel: str) -> None:
        """Publications to a channel with a history are lost to this client. Called by the hub."""
        logger.info("%r is told that publications to %r were lost", self.scope["path"], channel)
        self.cut(1013, "insufficient state")

    def expire(self, at: float | None) -> None:
        """End the connection at a time, in seconds since 1970 as a token's `exp`, with close code 4401; `None`: don't.
        What was said before doesn't hold any more, so that a client which has shown something newer stays."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if at is not None:
            self._expiry = asyncio.get_running_loop().call_later(max(at - time.time(), 0), self._expire)

    def _expire(self) -> None:
        self._expired = True
        if self._outbox is not None:
            self.cut(4401, "expired")

    def cut(self, code: int, reason: str) -> None:
        """Close at once, whatever waits. Called by the hub; never waits, never raises."""
        if self._closed is None:
            self._refuse(code, _cut(reason))

    async def publish(self, channel: str, data: Any, *, exclude_self: bool = False) -> Position | None:
        """Publish to a channel, as `hub.publish` does; with `exclude_self` this connection doesn't get it."""
        return await self._context.publish(channel, data, sender=self.id if exclude_self else None)

    # The end

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Send what still waits, then a close frame; waits until both have left, `Limits.write_timeout` at the most.

        `reason` is cut to 123 bytes. Closing what is closed does nothing. Raises `ValueError` for a code that may not
        be sent (RFC 6455 section 7.4).
        """
        if not may_be_sent(code):
            raise ValueError(f"a close frame can't have the code {code}; use 1000, or 4000 to 4999 for your own")
        self._opened(self._outbox)
        await self._close(code, reason)

    async def serve(self, handler: Handler, values: Mapping[str, Any], *, accept: bool) -> None:
        """Ask the hub's hooks, accept, run the handler, leave every channel, and close with the code that the
        handler's end asks for. Called by the endpoint.

        What the handler raises is raised again behind that, so that dependencies see it; where the handshake isn't
        finished, it is for the framework to answer.
        """
        self._handler = asyncio.current_task()
        try:
            try:
                error = await self._outcome(handler, values, accept)
            finally:
                await self._leave_channels()
            if self._outbox is not None:
                await self._close(*self._answer(error))
            elif self._closed is not None:
                # Gone before the handshake was finished: there is nobody to answer, and nobody's error.
                self._exchange.ended = True
            elif error is None:
                error = HTTPException(403, "the connection was not accepted")
        finally:
            self._let_go()
        if error is not None:
            raise error

    async def _outcome(self, handler: Handler, values: Mapping[str, Any], accept: bool) -> Exception | None:
        """What the handler raised, if anything."""
        error: Exception | None = None
        try:
            for hook in self._context.on_connect:
                await hook(self)
            if accept:
                await self.accept()
            await handler(**values)
        except asyncio.CancelledError:
            if self._closed is None or not self._handler_cancelled or _uncancel():
                raise
            return self._closed.again()
        except Exception as raised:
            error = raised
        finally:
            self._handler = None
            if self._handler_timer is not None:
                self._handler_timer.cancel()
        if self._handler_cancelled and _uncancel():
            # Not by us alone: the server has cancelled its task, and the handler has made something else of it.
            raise asyncio.CancelledError from error
        return error

    def _answer(self, error: BaseException | None) -> tuple[int, str]:
        """What the client is told of the handler's end. What it isn't told is logged."""
        if isinstance(error, BaseExceptionGroup):
            if self._closed is not None:
                rest = error.split(ConnectionClosed)[1]
                if rest is None:
                    return 1000, ""
                error = rest
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
        match error:
            case None:
                return 1000, ""
            case ConnectionClosed() if self._closed is not None:
                return 1000, ""
            case InvalidMessage() if may_be_sent(error.close_code):
                return error.close_code, error.reason
            case SubscriptionDenied():
                return 1008, str(error)
            case WebSocketException() if may_be_sent(error.code):
                return error.code, error.reason
            case BrokerError():
                logger.error("the handler of %r could not go on: %s", self.scope["path"], error)
                return 1013, "try again later"
            case InvalidChannel() | InvalidPosition():
                # As often as not the name was made of what the client said.
                return 1008, str(error)
            case HTTPException() if error.status_code < 500:
                # FastAPI's may be anything that JSON can say.
                return 1008, error.detail if isinstance(error.detail, str) else to_json(error.detail)
        logger.error("the handler of %r failed", self.scope["path"], exc_info=error)
        return 1011, ""

    async def _leave_channels(self) -> None:
        self._left = True
        channels, self._channels = self._channels, set()
        await self._leave(channels)

    async def _close(self, code: int, reason: str) -> None:
        link, outbox = cast(Link, self._link), cast(Outbox, self._outbox)
        self._end(ConnectionClosed(code, _cut(reason)), discard=False)
        closed = cast(ConnectionClosed, self._closed)
        try:
            async with asyncio.timeout(self._context.limits.write_timeout):
                await outbox.flush()
                # Nobody else may have done it meanwhile, and there may be nobody any more to be told.
                if self._closing is None and not self._lost:
                    self._closing = link.close(*self._farewell(closed.code, closed.reason))
                if self._closing is not None:
                    await asyncio.wait([self._closing])
        except TimeoutError:
            link.abort()

    def _let_go(self) -> None:
        """Whatever happened: end what was started for this connection."""
        self.expire(None)
        if self._link is None or self._outbox is None:
            return
        self._exchange.ended = True
        self._context.clients.pop(self.id, None)
        if self._reader is not None:
            self._reader.cancel()
        if self._end(ConnectionClosed(1006, clean=False), discard=True):
            # The server cancels its tasks: nobody will wait for a close frame.
            self._link.abort()
        self._context.connections.leave(self._link)
        if self._outbox.drops:
            logger.warning("%r did not keep up; dropped: %s", self.scope["path"], dict(self._outbox.drops))

    def _end(self, closed: ConnectionClosed, *, discard: bool) -> bool:
        """Let nothing more in or out; `discard` what waits. False when that has happened before."""
        if self._closed is not None:
            return False
        self._closed = closed
        outbox = cast(Outbox, self._outbox)
        # Who waits to send hears of it there.
        self._handler_listens |= outbox.awaited
        outbox.end(closed, discard=discard)
        cast(Inbox, self._inbox).end(discard=False)
        # A handler that closes its own connection knows what it does; any other may be waiting for something else.
        if self._handler is not None and (discard or self._handler is not asyncio.current_task()):
            self._end_handler(self._handler)
        return True

    def _end_handler(self, handler: "asyncio.Task[Any]") -> None:
        """Let the handler finish what it has received; one that doesn't, or receives nothing at all, is cancelled."""
        if self._handler_listens or handler is asyncio.current_task():
            stopping = self._closed is not None and self._closed.code == 1012
            delay = STOP_TIME if stopping else _FINISH
            self._handler_timer = asyncio.get_running_loop().call_later(delay, self._cancel_handler, handler)
        else:
            self._cancel_handler(handler)

    def _cancel_handler(self, handler: "asyncio.Task[Any]") -> None:
        self._handler_cancelled = True
        handler.cancel()

    def _refuse(self, code: int, reason: str) -> None:
        """Close at once, whatever waits: the client has gone too far."""
        self._end(ConnectionClosed(code, reason), discard=True)
        cast(Inbox, self._inbox).end(discard=True)
        self._closing = cast(Link, self._link).close(*self._farewell(code, reason))

    def _farewell(self, code: int, reason: str) -> tuple[int, str]:
        code, reason = self._protocol.farewell(code, reason)
        return code, _cut(reason)

    def _too_slow(self) -> None:
        logger.info("%r is too slow: more than %d bytes wait", self.scope["path"], self._context.limits.outbox_size)
        self._refuse(1013, "slow consumer")

    # What comes in, from a link that hands it over or from a task that waits for it

    async def _read(self, inbox: Inbox) -> None:
        """Always be in `receive`, whatever the handler does: so pings are answered and the end is seen."""
        try:
            while self._closed is None:
                message = await self._exchange.receive()
                if message["type"] != "websocket.receive":
                    self.connection_lost(closed_by(message))
                    return
                text = message.get("text")
                self.message_received(bytes(message["bytes"]) if text is None else text)
                if inbox.full:
                    await inbox.room()
        except Exception:
            logger.debug("receiving from %r failed", self.scope["path"], exc_info=True)
            self.connection_lost(ConnectionClosed(1006, clean=False))

    def message_received(self, payload: str | bytes) -> None:
        """A message of the client's. Called by the link; never waits, never raises."""
        if self._closed is not None:
            return
        inbox, largest = cast(Inbox, self._inbox), self._context.limits.message_size
        size = size_of(payload)
        if largest is not None and size > largest:
            self._refuse(1009, f"a message can have {largest} bytes, not {size}")
        elif self._rate is not None and not self._rate.allows():
            logger.warning("%r sends more than %s messages a second", self.scope["path"], self._rate.per_second)
            self._refuse(1008, "too many messages")
        else:
            inbox.put(payload, size)
            if self._reader is None and inbox.full:
                link = cast(ReceivingLink, self._link)
                link.pause_reading()
                inbox.on_room = link.resume_reading

    def connection_lost(self, closed: ConnectionClosed) -> None:
        """The client is gone. Called by the link; never waits, never raises."""
        self._lost = True
        self._end(closed, discard=True)
        if closed.code == 1012:
            # The server stops, has said so to the client, and waits until the transport is empty.
            self._context.connections.drain(cast(Link, self._link))

    def server_stopping(self) -> None:
        """Send what waits, and close with 1012. Called by the link; never waits, never raises."""
        if self._end(ConnectionClosed(1012), discard=False):
            self._context.connections.drain(cast(Link, self._link))

    def _opened(self, part: T | None) -> T:
        """A part of an open connection. Raises `ConnectionClosed`, or `RuntimeError` before the handshake."""
        if part is None:
            if self._closed is not None:
                raise self._closed.again()
            raise RuntimeError("the connection isn't accepted yet; call `await conn.accept()` first")
        return part


def _cut(reason: str) -> str:
    """As much of a reason as a close frame holds, without half a character at its end."""
    return reason.encode(errors="replace")[:_REASON_SIZE].decode(errors="ignore")


def _raw_headers(headers: Mapping[str, str] | Iterable[tuple[str | bytes, str | bytes]]) -> list[tuple[bytes, bytes]]:
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    return [(_raw(name).lower(), _raw(value)) for name, value in pairs]


def _raw(value: str | bytes) -> bytes:
    raw = value.encode("latin-1") if isinstance(value, str) else value
    if not {0, 10, 13}.isdisjoint(raw):
        raise ValueError(f"a header can't have line breaks: {value!r}")
    return raw


def _uncancel() -> bool:
    """Take back the cancellation that ended the handler; whether somebody else has cancelled the task, too."""
    return cast("asyncio.Task[Any]", asyncio.current_task()).uncancel() > 0
