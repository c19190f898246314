"""Clients that choose by themselves what they subscribe to, in the words of the Centrifuge protocol."""

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, cast

import msgspec
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from asgi_ws._types import Overflow
from asgi_ws.channels import Grant, Rule, check_name
from asgi_ws.connection import Connection
from asgi_ws.context import Context, Exchange
from asgi_ws.endpoints.function import Procedure
from asgi_ws.exceptions import (
    BrokerError,
    CommandError,
    ConnectionClosed,
    HubNotRunning,
    InvalidChannel,
    InvalidMessage,
    InvalidToken,
    SubscriptionDenied,
    TokenExpired,
)
from asgi_ws.frames import Frame
from asgi_ws.inbox import Inbox, Rate
from asgi_ws.messages import Position, Publication, Recovery
from asgi_ws.outbox import Outbox
from asgi_ws.payloads import json_decoder, to_json
from asgi_ws.presence import Member, events_of
from asgi_ws.protocols import (
    PING,
    REJECT_UNRECOVERED,
    CentrifugeProtocol,
    ClientInfo,
    Command,
    Connect,
    HistoryRequest,
    InChannel,
    Publish,
    Refresh,
    Request,
    Rpc,
    SendRequest,
    ServerSide,
    Since,
    SubRefresh,
    Subscribe,
    bad_request,
    error_reply,
    presence_result,
    publications_result,
    push_text,
    reply,
)
from asgi_ws.transports import StreamLink

__all__ = ["Authenticate", "PubSubConnection", "PubSubEndpoint", "ServerChannels"]

logger = logging.getLogger("asgi_ws")

Authenticate = Callable[..., Awaitable[Grant | None]]
ServerChannels = Callable[[Any], Awaitable[Iterable[str]]]

_read_any = json_decoder(Any)

_CONNECT_TIME = 10.0
"""How many seconds a client has to say who it is."""
_GRACE = 25.0
"""How many seconds a client may be late with a new token."""
_LEAVE_TIME = 1.0
"""How many seconds a client that leaves a channel waits for the broker."""
_AT_ONCE = 32
"""How many commands of one client are worked on at the same time; then nothing more is read."""
_MAX_PUBLICATIONS = 300
"""How many publications one answer about a history has at the most."""


class PubSubEndpoint:
    """An ASGI application, as which Starlette's routes run it."""

    def __init__(
        self,
        context: Context,
        procedures: Mapping[str, Procedure],
        *,
        authenticate: Authenticate | None = None,
        channels: ServerChannels | None = None,
        on_message: Procedure | None = None,
    ) -> None:
        self.context = context
        self.procedures = procedures
        self.authenticate = authenticate
        self.channels = channels
        self.on_message = on_message
        self.protocol = CentrifugeProtocol(lambda channel: context.pubsub.has_history(channel))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = scope.get("asgi_ws")
        if exchange is None or not self.context.runs_here:
            raise HubNotRunning
        self.context.admit(scope, exchange)
        conn = PubSubConnection(scope, exchange, self)
        if conn.comes_otherwise:
            raise HTTPException(400, "this endpoint is for clients of the Centrifuge protocol")
        if conn.wants_protobuf:
            raise HTTPException(400, "this server speaks the Centrifuge protocol in JSON, not in Protobuf")
        await conn.serve(conn.talk, {}, accept=True)


class _Subscription:
    """One channel of one client: what comes before its reply waits for that."""

    __slots__ = (
        "_held",
        "_held_size",
        "_told",
        "begun",
        "channel",
        "conn",
        "info",
        "present",
        "push",
        "result",
        "revoked",
        "server_side",
        "timer",
        "watched",
    )

    def __init__(
        self,
        conn: "PubSubConnection",
        channel: str,
        rule: Rule | None,
        *,
        info: Any = None,
        join_leave: bool = False,
        server_side: bool,
    ) -> None:
        self.conn = conn
        self.channel = channel
        self.info = info
        self.present = rule is not None and rule.presence
        self.watched = join_leave and self.present
        self.server_side = server_side
        self.push: Callable[[Publication], None] = self._hold
        """Take a publication. Called by the hub; never waits, never raises."""
        self.begun = False
        self.revoked: tuple[int, str] | None = None
        self.result = ""
        self.timer: asyncio.TimerHandle | None = None
        self._told = True
        self._held: list[Publication] = []
        self._held_size = 0

    @property
    def id(self) -> str:
        """The connection's."""
        return self.conn.id

    def lost(self, channel: str) -> None:
        """Publications are lost to it. Called by the hub."""
        self.conn.subscription_lost(self)

    def begin(self, *, told: bool, hold: bool = False) -> None:
        """The hub passes on what was missed next, which the client has been `told` already or not, and then what is
        new; with `hold` that waits for `release`."""
        self.begun = True
        self._told = told or self.revoked is not None
        if not hold and self.revoked is None:
            self.push = self.conn.push

    def recover(self, publication: Publication) -> None:
        """Take a publication that was missed. Called by the hub."""
        if not self._told:
            self.conn.recover(publication)

    def release(self) -> None:
        """The reply is out."""
        self.push = self.conn.push
        held, self._held = self._held, []
        for publication in held:
            self.push(publication)

    def stop(self) -> None:
        """Nothing more is passed on."""
        self.push = _nothing
        if self.timer is not None:
            self.timer.cancel()

    def _hold(self, publication: Publication) -> None:
        self._held.append(publication)
        self._held_size += publication.payload.size
        if self._held_size > self.conn.held_size:
            self.conn.cut(1013, "slow")


def _nothing(publication: Publication) -> None:
    """Whoever has left gets nothing."""


class PubSubConnection(Connection[Any, Any]):
    """A client that speaks the Centrifuge protocol.

    For the application's functions it is a `Connection` that nothing is received from: its `subscribe` and
    `unsubscribe` are the protocol's server-side ones, and `send` sends a message. Whatever the hub's `overflow` says,
    one that is too slow is closed: it comes back, and recovers.
    """

    def __init__(self, scope: Scope, exchange: Exchange, endpoint: PubSubEndpoint) -> None:
        super().__init__(
            scope,
            exchange,
            context=endpoint.context,
            protocol=endpoint.protocol,
            subprotocols=("centrifuge-json", None),
        )
        self.token = ""
        """What the client came with."""
        self.data: Any = None
        """What the client said when it connected."""
        self._endpoint = endpoint
        self._words = endpoint.protocol
        self._info: Any = None
        self._publisher = ""
        self._subscriptions: dict[str, _Subscription] = {}
        self._positions: dict[str, ServerSide] = {}
        self._phase = "new"
        self._tasks: dict[asyncio.Task[None], str] = {}
        self._last: dict[str, asyncio.Task[None]] = {}
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._commands: Rate | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._pings = endpoint.context.limits.ping_interval
        self._pinged = False
        if self.query_params.get("cf_ws_frame_ping_pong") == "true":
            self._pings = None

    @property
    def comes_otherwise(self) -> bool:
        """Whether the client comes by a transport of another protocol's."""
        return self._session is not None and not isinstance(self._session, StreamLink)

    @property
    def wants_protobuf(self) -> bool:
        """Whether the client speaks the other encoding of the protocol."""
        offered = self.scope.get("subprotocols") or ()
        query = self.query_params
        return (
            ("centrifuge-protobuf" in offered and "centrifuge-json" not in offered)
            or query.get("cf_protocol") == "protobuf"
            or query.get("format") == "protobuf"
        )

    @property
    def channels(self) -> frozenset[str]:
        return frozenset(self._subscriptions)

    @property
    def _overflow(self) -> Overflow:
        # A publication that was dropped would be a hole that the client can't see; one that comes back recovers.
        return "close"

    @property
    def held_size(self) -> int:
        """How many bytes of a channel's publications wait for the connect reply."""
        return self._context.limits.outbox_size

    # The conversation

    async def talk(self) -> None:
        """Take the client's commands until it is gone. The handler of this connection."""
        limits = self._context.limits
        # Commands are counted, not frames, which may have many.
        self._rate = None
        if limits.messages_per_second is not None:
            self._commands = Rate(limits.messages_per_second, limits.burst)
        self._after("deadline", _CONNECT_TIME, self.cut, 3502, "stale")
        try:
            async for commands in self:
                for command in commands:
                    if self._commands is not None and not self._commands.allows():
                        self.cut(3013, "too many requests")
                        return
                    await self._take(command)
        finally:
            for timer in self._timers.values():
                timer.cancel()
            await self._leave_channels()
            await self._finish()

    async def _finish(self) -> None:
        """What is being worked on may finish, for as long as a handler may."""
        try:
            while self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            while self._tasks or self._leaving:
                await asyncio.wait([*self._tasks, *self._leaving.values()])

    async def _take(self, command: Command) -> None:
        name, request = command.request()
        if isinstance(request, Connect) and self._phase == "new":
            self._phase = "connecting"
            await self._respond(command.id, self._connect(command.id, request))
        elif self._phase != "connected" or isinstance(request, Connect):
            raise bad_request()
        elif request is None:
            if not self._pinged:
                raise bad_request()
            self._pinged = False
        else:
            await self._start(command.id, name, request)

    async def _start(self, number: int, name: str, request: Request) -> None:
        """Work on a command, behind those that are to be done in their order, as all of one channel are."""
        key = getattr(request, "channel", name if name in ("send", "refresh") else "")
        before = self._last.get(key)

        async def work() -> None:
            if before is not None:
                await asyncio.wait([before])
            await self._respond(0 if name == "send" else number, self._do(number, name, request))

        # While there is no room nothing is read, and the client's pongs aren't, either.
        await self._room.acquire()
        task = asyncio.create_task(work(), name=f"asgi_ws {name}")
        self._tasks[task] = key
        if key:
            self._last[key] = task
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        key = self._tasks.pop(task)
        if self._last.get(key) is task:
            del self._last[key]
        self._room.release()
        if not task.cancelled():
            error = task.exception()
            if isinstance(error, InvalidMessage):
                self.cut(error.close_code, error.reason)

    async def _respond(self, number: int, work: Coroutine[Any, Any, str | None]) -> None:
        """Send what comes of a command, or why nothing comes of it."""
        with contextlib.suppress(ConnectionClosed):
            try:
                answer = await work
            except InvalidMessage as error:
                if error.close_code >= 3000:
                    raise
                answer = error_reply(number, CommandError(107, f"bad request: {error.reason}"))
            except ConnectionClosed:
                raise
            except Exception as error:
                failure = _failure(error)
                if failure is None:
                    logger.error("a command at %r failed", self.scope["path"], exc_info=error)
                    failure = CommandError(100, temporary=True)
                answer = error_reply(number, failure)
            if answer is not None and number:
                await cast(Outbox, self._outbox).put(Frame(answer))

    async def _do(self, number: int, name: str, request: Request) -> str | None:
        """What is to be answered, unless it has been already."""
        match request:
            case Subscribe():
                return await self._subscribe_client(number, request)
            case InChannel() if name == "unsubscribe":
                await self._unsubscribe_client(request.channel)
                result = "{}"
            case Publish():
                await self._publish_for(request)
                result = "{}"
            case InChannel() if name == "presence":
                result = await self._presence(request.channel)
            case InChannel():
                result = await self._presence_stats(request.channel)
            case HistoryRequest():
                result = await self._history(request)
            case Rpc():
                result = await self._call(request)
            case Refresh():
                result = await self._refresh(request)
            case SubRefresh():
                result = await self._refresh_subscription(request)
            case SendRequest():
                await self._hear(request)
                return None
            case _:
                raise CommandError(107)
        return reply(number, name, result)

    def _say(self, text: str) -> None:
        cast(Outbox, self._outbox).post(Frame(text))

    def _after(self, name: str, delay: float, function: Callable[..., None], *args: Any) -> None:
        """Call a function later, in the place of what was to be called by that name."""
        if name in self._timers:
            self._timers[name].cancel()
        self._timers[name] = asyncio.get_running_loop().call_later(delay, function, *args)

    # Connecting

    async def _connect(self, number: int, request: Connect) -> str | None:
        self.token = request.token
        self.data = _read_any(request.data)
        self._positions = request.subs
        try:
            grant = await self._authenticate(request.token)
            ttl = _ttl(grant.expires_at)
            if grant.user is not None:
                self.user = grant.user
            self._info = grant.info
            self._publisher = to_json(ClientInfo(self.user_id or "", self.id, grant.info))
            if self._endpoint.channels is not None:
                for channel in await self._endpoint.channels(self):
                    await self._subscribe_server(channel)
            result = self._connect_result(grant, ttl if request.token else 0)
        except BaseException:
            self._phase = "failed"
            await self._leave_channels()
            raise
        if self._closed is not None:
            return None
        # No await from here on: nothing may come before the reply, and nothing be held longer.
        self._say(reply(number, "connect", to_json(result)))
        self._phase = "connected"
        for subscription in list(self._subscriptions.values()):
            subscription.release()
        self._timers.pop("deadline").cancel()
        if ttl:
            self._after("expiry", ttl + (_GRACE if request.token else 0), self.cut, 3005, "connection expired")
        if self._pings is not None:
            # Those who came back at the same moment aren't to be pinged at the same moment.
            self._after("ping", self._pings * random.uniform(0.5, 1), self._ping)
        return None

    def _connect_result(self, grant: Grant, ttl: int) -> dict[str, Any]:
        result: dict[str, Any] = {"client": self.id, "version": "asgi_ws"}
        if self._pings is not None:
            result.update(ping=math.ceil(self._pings), pong=True)
        if grant.data is not None:
            result["data"] = grant.data
        if ttl:
            result.update(expires=True, ttl=ttl)
        if isinstance(self._session, StreamLink):
            result["session"] = self._session.secret
        if self._subscriptions:
            result["subs"] = {each.channel: msgspec.Raw(each.result.encode()) for each in self._subscriptions.values()}
        return result

    async def _authenticate(self, token: str) -> Grant:
        """What the application says of a token. Without its function, everybody may connect who came so far."""
        if self._endpoint.authenticate is None:
            return Grant()
        try:
            grant = await self._endpoint.authenticate(self, token=token)
        except TokenExpired:
            raise
        except InvalidToken:
            grant = None
        if grant is None:
            if token:
                raise InvalidMessage("invalid token", 3500)
            raise CommandError(101)
        return grant

    async def _refresh(self, request: Refresh) -> str:
        if "expiry" not in self._timers or not self.token:
            raise bad_request()
        try:
            grant = await self._authenticate(request.token)
            ttl = _ttl(grant.expires_at)
        except TokenExpired:
            raise InvalidMessage("connection expired", 3005) from None
        except CommandError as error:
            if error.temporary:
                raise
            raise InvalidMessage("invalid token", 3500) from None
        if grant.user is not None:
            before = self.user_id
            previous, self.user = self.scope.get("user"), grant.user
            if self.user_id != before:
                self.user = previous
                raise InvalidMessage("invalid token", 3500)
        self._timers.pop("expiry").cancel()
        result: dict[str, Any] = {"client": self.id, "version": "asgi_ws"}
        if ttl:
            self._after("expiry", ttl + _GRACE, self.cut, 3005, "connection expired")
            result.update(expires=True, ttl=ttl)
        return to_json(result)

    def _ping(self) -> None:
        interval, timeout = cast(float, self._pings), self._context.limits.ping_timeout
        self._say(PING)
        self._pinged = True
        self._after("ping", interval, self._ping)
        if timeout is not None:
            self._after("pong", min(timeout, interval * 0.9), self._check_pong)

    def _check_pong(self) -> None:
        # What wasn't read yet may be the pong.
        if self._pinged and not self._room.locked() and not cast(Inbox, self._inbox).messages:
            self.cut(3012, "no pong")

    # Subscribing

    async def _subscribe_client(self, number: int, request: Subscribe) -> str | None:
        if request.type:
            raise CommandError(108, "only ordinary subscriptions are offered")
        if request.tf:
            raise CommandError(107, "tags filters are not offered")
        channel = request.channel
        check_name(channel)
        rule, parameters = self._rule(channel)
        if rule.allows is None:
            raise CommandError(103)
        self._check_room(channel)
        data = _read_any(request.data)
        granted = await rule.ask(self, parameters, token=request.token, data=data)
        if not granted:
            raise CommandError(103)
        grant = granted if isinstance(granted, Grant) else Grant()
        ttl = _ttl(grant.expires_at)
        since = await self._since(channel, request) if request.recover else None
        info = self._info if grant.info is None else grant.info
        # Once more: the application may have subscribed it meanwhile.
        self._check_room(channel)
        subscription = _Subscription(self, channel, rule, info=info, join_leave=request.join_leave, server_side=False)
        rejected = False

        def begin(recovery: Recovery) -> None:
            nonlocal rejected
            subscription.begin(told=True)
            if since is not None and not recovery.recovered and request.flag & REJECT_UNRECOVERED:
                rejected = self._forget(subscription)
                return
            told = 0 if not request.token else ttl
            result = self._words.subscribe_result(
                recovery, since, recovering=request.recover, data=grant.data, ttl=told
            )
            self._say(reply(number, "subscribe", result))
            self._tell_revoked(subscription)

        await self._enter(subscription, since, begin)
        if rejected:
            raise CommandError(112)
        if ttl and self._has(subscription):
            self._expire_later(subscription, ttl + (_GRACE if request.token else 0))
        return None

    async def subscribe(
        self, channel: str, *, since: Position | str | None = None, info: Any = None, join_leave: bool = False
    ) -> Recovery:
        """Subscribe the client to a channel that it didn't ask for. A second time is none.

        Before the client is connected, in `authenticate`, it is told with the answer to that; a client that comes back
        then gets what it has missed. Raises what `Connection.subscribe` does.
        """
        self._opened(self._outbox)
        check_name(channel)
        if channel not in self._subscriptions:
            rule, parameters = self._context.rules.find(channel)
            if rule is not None and not await rule.ask(self, parameters):
                raise SubscriptionDenied(channel)
        return await self._subscribe_server(channel, since=Position.of(since), info=info, join_leave=join_leave)

    async def _subscribe_server(
        self, channel: str, *, since: Position | None = None, info: Any = None, join_leave: bool = False
    ) -> Recovery:
        check_name(channel)
        rule, _ = self._context.rules.find(channel)
        present = rule is not None and rule.presence
        if not present and (join_leave or info is not None):
            raise ValueError(f"{channel!r} has no presence; declare it with hub.channel(..., presence=True)")
        connecting = self._phase == "connecting"
        position = self._positions.get(channel)
        recovering = since is not None
        if since is None and connecting and position is not None and position.recover:
            since, recovering = await self._since(channel, position), True
        if self._closed is not None or self._left:
            raise (self._closed or ConnectionClosed(1000)).again()
        if channel in self._subscriptions:
            return Recovery(False, None)
        limit = self._context.limits.channels
        if limit is not None and len(self._subscriptions) >= limit:
            raise SubscriptionDenied(channel, f"a connection can have {limit} channels")
        info = self._info if info is None else info
        subscription = _Subscription(self, channel, rule, info=info, join_leave=join_leave, server_side=True)

        def begin(recovery: Recovery) -> None:
            # Whoever connects is told with everything else, and anybody else is given what he missed behind the push.
            waits = self._phase == "connecting"
            if not waits:
                recovery = Recovery(recovery.recovered, recovery.position)
            subscription.begin(told=waits, hold=waits)
            subscription.result = self._words.subscribe_result(recovery, since, recovering=recovering)
            if not waits:
                self._say(push_text("subscribe", subscription.result, channel))
                self._tell_revoked(subscription)

        return await self._enter(subscription, since, begin)

    async def _enter(
        self,
        subscription: _Subscription,
        since: Position | None,
        begin: Callable[[Recovery], None],
    ) -> Recovery:
        """Subscribe, and tell those who are there. Raises `BrokerError` while the client can be told so."""
        channel, context = subscription.channel, self._context
        self._subscriptions[channel] = subscription
        try:
            if subscription.present and subscription.info is not None:
                # A mistake of the application's is to be known before the client is told anything.
                to_json(subscription.info)
            if channel in self._leaving:
                await asyncio.wait([self._leaving[channel]])
            recovery = await context.pubsub.subscribe(channel, subscription, since=since, begin=begin)
            if subscription.watched and self._has(subscription):
                context.presence.watch(channel)
                await context.pubsub.subscribe(events_of(channel), subscription)
            if subscription.present and self._has(subscription):
                await context.presence.enter(channel, Member(self.id, self.user_id, subscription.info))
        except BaseException as error:
            if isinstance(error, BrokerError) and subscription.begun and self._phase == "connected":
                logger.warning("who is in %r can't be known: %s", channel, error)
                self.subscription_lost(subscription)
                return Recovery(False, None)
            self._forget(subscription)
            await self._leave_one(subscription)
            raise
        if not self._has(subscription):
            # Meanwhile it was ended, and not all of it could be known then.
            self._leave_later(subscription)
        return recovery

    async def _since(self, channel: str, wanted: Since) -> Position | None:
        """From where to recover, where there is something to recover from."""
        pubsub = self._context.pubsub
        if not pubsub.has_history(channel):
            return None
        if wanted.epoch:
            return Position(wanted.offset, wanted.epoch)
        return Position(wanted.offset, (await pubsub.read_history(channel, limit=0)).position.epoch)

    def _rule(self, channel: str) -> tuple[Rule, dict[str, Any]]:
        """Clients may ask only for what there is a rule for."""
        rule, parameters = self._context.rules.find(channel)
        if rule is None:
            raise CommandError(102)
        return rule, parameters

    def _check_room(self, channel: str) -> None:
        if channel in self._subscriptions:
            raise CommandError(105)
        limit = self._context.limits.channels
        if limit is not None and len(self._subscriptions) >= limit:
            raise CommandError(106)

    async def _refresh_subscription(self, request: SubRefresh) -> str:
        if request.type:
            raise CommandError(108)
        subscription = self._subscriptions.get(request.channel)
        if subscription is None or subscription.server_side:
            raise CommandError(103)
        rule, parameters = self._rule(request.channel)
        granted = await rule.ask(self, parameters, token=request.token)
        if not granted:
            raise InvalidMessage("invalid token", 3500)
        ttl = _ttl(granted.expires_at) if isinstance(granted, Grant) else 0
        if not self._has(subscription):
            raise CommandError(103)
        if subscription.timer is not None:
            subscription.timer.cancel()
        if not ttl:
            return "{}"
        self._expire_later(subscription, ttl + _GRACE)
        return to_json({"expires": True, "ttl": ttl})

    def _expire_later(self, subscription: _Subscription, delay: float) -> None:
        loop = asyncio.get_running_loop()
        subscription.timer = loop.call_later(delay, self._revoke, subscription, 2501, "subscription expired")

    # Leaving channels

    async def unsubscribe(self, channel: str, *, code: int = 2000, reason: str = "server unsubscribe") -> None:
        """The client gets nothing of the channel any more, and is told; whoever has subscribed it.

        With a code from 2500 to 2999 the client subscribes again by itself; 2001 to 2499 are your own. Raises
        `ValueError` for other codes, and without a reason.
        """
        if not 2000 <= code <= 2999 or not reason:
            raise ValueError(f"code={code!r}, reason={reason!r}: take a code from 2000 to 2999, and say why")
        subscription = self._subscriptions.get(channel)
        if subscription is not None:
            self._revoke(subscription, code, reason)
        if channel in self._leaving:
            await asyncio.wait([self._leaving[channel]])

    async def _unsubscribe_client(self, channel: str) -> None:
        subscription = self._subscriptions.get(channel)
        if subscription is not None:
            self._forget(subscription)
            # Others are to see it as soon as the client does; but without an answer the client would be lost.
            await asyncio.wait([self._leave_later(subscription)], timeout=_LEAVE_TIME)

    def subscription_lost(self, subscription: _Subscription) -> None:
        """Publications are lost to it. Called by the hub."""
        logger.info("%r is told that publications to %r were lost", self.scope["path"], subscription.channel)
        if subscription.server_side:
            self.cut(3010, "insufficient state")
        else:
            self._revoke(subscription, 2500, "insufficient state")

    def _revoke(self, subscription: _Subscription, code: int, reason: str) -> None:
        """End a subscription, and tell the client; where it isn't told yet of the beginning, behind that."""
        if self._forget(subscription, code, reason) and subscription.begun:
            if self._phase == "connected":
                subscription.revoked = (code, reason)
                self._tell_revoked(subscription)
            self._leave_later(subscription)

    def _forget(self, subscription: _Subscription, code: int = 2000, reason: str = "server unsubscribe") -> bool:
        """Let nothing more of a subscription through. False when that has happened before."""
        if not self._has(subscription):
            return False
        del self._subscriptions[subscription.channel]
        subscription.stop()
        if not subscription.begun:
            subscription.revoked = (code, reason)
        return True

    def _has(self, subscription: _Subscription) -> bool:
        return self._subscriptions.get(subscription.channel) is subscription

    def _tell_revoked(self, subscription: _Subscription) -> None:
        if subscription.revoked is not None:
            code, reason = subscription.revoked
            self._say(push_text("unsubscribe", to_json({"code": code, "reason": reason}), subscription.channel))

    def _leave_later(self, subscription: _Subscription) -> "asyncio.Task[None]":
        """In a task of its own, which whoever subscribes again waits for."""
        channel = subscription.channel
        before = self._leaving.get(channel)

        async def leave() -> None:
            if before is not None:
                await asyncio.wait([before])
            await self._leave_one(subscription)

        def done(task: "asyncio.Task[None]") -> None:
            if self._leaving.get(channel) is task:
                del self._leaving[channel]

        task = self._leaving[channel] = asyncio.create_task(leave(), name="asgi_ws unsubscribe")
        task.add_done_callback(done)
        return task

    async def _leave_one(self, subscription: _Subscription) -> None:
        watched, subscription.watched = [subscription.channel] * subscription.watched, False
        await self._context.leave([subscription.channel], watched, subscription)

    async def _leave_channels(self) -> None:
        self._left = True
        for subscription in list(self._subscriptions.values()):
            self._forget(subscription)
            self._leave_later(subscription)
        if self._leaving:
            await asyncio.wait(list(self._leaving.values()))

    # Everything else

    async def _publish_for(self, request: Publish) -> None:
        if request.type or request.key or request.removed:
            raise CommandError(108, "only ordinary publications are offered")
        channel = request.channel
        check_name(channel)
        rule, parameters = self._rule(channel)
        if not request.data:
            raise CommandError(107, "there is nothing to publish")
        if callable(rule.publish):
            allowed = await rule.publish(self, **parameters)
        else:
            allowed = rule.publish and channel in self._subscriptions
        if not allowed:
            raise CommandError(103)
        await self._context.publish(channel, _read_any(request.data), sender=self._publisher)

    async def _presence(self, channel: str) -> str:
        self._check_presence(channel)
        members = await self._context.presence.members(channel)
        return presence_result(
            {each.connection: ClientInfo(each.user or "", each.connection, each.info) for each in members}
        )

    async def _presence_stats(self, channel: str) -> str:
        self._check_presence(channel)
        stats = await self._context.presence.stats(channel)
        return to_json({"num_clients": stats.connections, "num_users": stats.users})

    def _check_presence(self, channel: str) -> None:
        if not self._rule_of_subscribed(channel).presence:
            raise CommandError(108)

    def _rule_of_subscribed(self, channel: str) -> Rule:
        rule, _ = self._rule(channel)
        if channel not in self._subscriptions:
            raise CommandError(103)
        return rule

    async def _history(self, request: HistoryRequest) -> str:
        channel, since, pubsub = request.channel, request.since, self._context.pubsub
        self._rule_of_subscribed(channel)
        if not pubsub.has_history(channel):
            raise CommandError(108)
        if request.reverse and since is not None and not since.offset:
            raise CommandError(107, "nothing comes before the first one")
        limit = _MAX_PUBLICATIONS if request.limit < 0 else min(request.limit, _MAX_PUBLICATIONS)
        history = await pubsub.read_history(channel, limit=0)
        epoch = history.position.epoch
        if since is not None and since.epoch not in ("", epoch):
            raise CommandError(112)
        if limit:
            if since is None and request.reverse:
                start = None
            elif since is None:
                start = Position(0, epoch)
            elif request.reverse:
                start = Position(max(min(since.offset, history.position.offset + 1) - 1 - limit, 0), epoch)
            else:
                start = Position(since.offset, epoch)
            history = await pubsub.read_history(channel, since=start, limit=limit)
        found = history.publications
        if request.reverse:
            before = math.inf if since is None else since.offset
            found = tuple(
                each for each in reversed(found) if each.position is not None and each.position.offset < before
            )
        return publications_result([self._words.publication(each) for each in found], history.position)

    async def _call(self, request: Rpc) -> str:
        if not self._endpoint.procedures:
            raise CommandError(108)
        procedure = self._endpoint.procedures.get(request.method)
        if procedure is None:
            raise CommandError(104)
        return '{"data":' + to_json(await procedure(self, bytes(request.data))) + "}"

    async def _hear(self, request: SendRequest) -> None:
        if self._endpoint.on_message is None:
            raise InvalidMessage("not available", 3508)
        await self._endpoint.on_message(self, bytes(request.data))


def _ttl(expires_at: float | None) -> int:
    """How many seconds are left; 0 for ever. Raises `TokenExpired`."""
    if expires_at is None:
        return 0
    left = expires_at - time.time()
    if left <= 0:
        raise TokenExpired
    return math.ceil(left)


_STATUSES = {401: 101, 403: 103, 404: 102, 429: 111}
"""Which error says what an HTTP status does."""


def _failure(error: Exception) -> CommandError | None:
    """What the client is told of an error; `None` for one that is nobody's intention."""
    match error:
        case CommandError():
            return error
        case TokenExpired():
            return CommandError(109)
        case SubscriptionDenied() | InvalidToken():
            return CommandError(103)
        case InvalidChannel():
            return CommandError(107, f"bad request: {error}")
        case BrokerError() | HubNotRunning():
            return CommandError(100, temporary=True)
        case HTTPException() if error.status_code < 500:
            return CommandError(_STATUSES.get(error.status_code, 107), temporary=error.status_code == 429)
    return None
