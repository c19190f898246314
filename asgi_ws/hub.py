"""The one object that an application holds."""

import asyncio
import logging
import random
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Literal, Self, TypeVar, overload

from starlette.routing import WebSocketRoute

from asgi_ws._types import Handler, Overflow
from asgi_ws.brokers import Broker, HistoryBroker, MemoryBroker, PresenceBroker, broker_for
from asgi_ws.channels import MAX_HISTORY, check_name
from asgi_ws.connection import Connection, OnConnect, OnInvalid
from asgi_ws.context import Context, Order
from asgi_ws.endpoints import (
    Authenticate,
    Endpoint,
    Procedure,
    PubSubEndpoint,
    ServerChannels,
    check_async,
    check_takes,
    make_route,
    takes,
)
from asgi_ws.exceptions import BrokerError
from asgi_ws.frames import may_be_sent
from asgi_ws.limits import Limits
from asgi_ws.messages import History, Position
from asgi_ws.origins import OriginPolicy
from asgi_ws.presence import Member, PresenceStats
from asgi_ws.pubsub import Subscription
from asgi_ws.uvicorn import worker_count

__all__ = ["Hub"]

logger = logging.getLogger("asgi_ws")

H = TypeVar("H", bound=Callable[..., Awaitable[Any]])

_RETRY = 0.1
_MAX_RETRY = 5.0


class Hub:
    """WebSocket endpoints, and channels that reach every client.

    `broker` is the URL of what joins processes (`memory://` is this process alone) or a `Broker` of your own.
    `allowed_origins` says which web pages may connect: `None` those of the same origin, a list those it names, `"*"`
    any. `overflow` says what happens when more waits for a client than `limits.outbox_size`: `"close"` ends it with
    code 1013, `"drop_oldest"` and `"drop_newest"` drop publications, `"latest"` keeps only the newest of each channel.
    With `wait` the hub waits at its start until the broker can be reached, instead of raising `BrokerError`.

    Raises `ValueError` for a URL, an origin or a policy that isn't known.
    """

    def __init__(
        self,
        broker: str | Broker = "memory://",
        *,
        allowed_origins: Iterable[str] | Literal["*"] | None = None,
        limits: Limits = Limits(),  # noqa: B008  frozen
        overflow: Overflow = "close",
        wait: bool = False,
    ) -> None:
        if overflow not in ("close", "drop_oldest", "drop_newest", "latest"):
            raise ValueError(f"overflow={overflow!r}: must be 'close', 'drop_oldest', 'drop_newest' or 'latest'")
        self._broker = broker if isinstance(broker, Broker) else broker_for(broker)
        self._context = Context(limits, overflow, OriginPolicy(allowed_origins))
        self._wait = wait
        self._procedures: dict[str, Procedure] = {}
        self._users = 0
        self._lock = asyncio.Lock()
        self.routes: list[WebSocketRoute] = []
        """The endpoints, in the order in which they are tried."""
        self.has_endpoints_elsewhere = False
        """Whether `endpoint` has made some for routers of the application's own."""

    # Endpoints

    def websocket(
        self,
        path: str,
        *,
        subprotocols: Iterable[str | None] = (),
        accept: bool = True,
        on_invalid: OnInvalid | None = None,
    ) -> Callable[[H], H]:
        """Serve a path: the decorated function is called with a `Connection` for each client, and with what the path
        and, where FastAPI is installed, dependencies give it.

        The first of `subprotocols` that a client offers is agreed on; one that offers none is refused, unless `None`
        is among them. With `accept=False` the handler finishes the handshake itself, with `conn.accept`. `on_invalid`
        is an async function that gets the connection and the `InvalidMessage` instead of closing with 1007.

        Raises `TypeError` or `ValueError` at once for a function or a path that can't work.
        """

        def decorate(handler: H) -> H:
            self._check_path(path)
            endpoint = Endpoint(
                handler,
                self._context,
                subprotocols=subprotocols,
                accept=accept,
                on_invalid=on_invalid,
                namespace=sys._getframe(1).f_locals,
            )
            self.routes.append(make_route(path, endpoint))
            return handler

        return decorate

    @overload
    def endpoint(self, handler: Handler) -> Endpoint: ...

    @overload
    def endpoint(
        self,
        *,
        subprotocols: Iterable[str | None] = (),
        accept: bool = True,
        on_invalid: OnInvalid | None = None,
    ) -> Callable[[Handler], Endpoint]: ...

    def endpoint(
        self,
        handler: Handler | None = None,
        *,
        subprotocols: Iterable[str | None] = (),
        accept: bool = True,
        on_invalid: OnInvalid | None = None,
    ) -> Endpoint | Callable[[Handler], Endpoint]:
        """A handler as an endpoint for a router of your own: below `@router.websocket(path)` in FastAPI, in
        `WebSocketRoute(path, hub.endpoint(handler))` in Starlette. The options are those of `websocket`."""
        namespace = sys._getframe(1).f_locals
        self.has_endpoints_elsewhere = True

        def decorate(handler: Handler) -> Endpoint:
            return Endpoint(
                handler,
                self._context,
                subprotocols=subprotocols,
                accept=accept,
                on_invalid=on_invalid,
                namespace=namespace,
            )

        return decorate if handler is None else decorate(handler)

    def on_connect(self, hook: OnConnect) -> OnConnect:
        """Have an async function called with every connection before it is accepted. It refuses by raising
        `HTTPException`."""
        check_async(hook, "an on_connect hook")
        self._context.on_connect.append(hook)
        return hook

    # Clients that choose by themselves

    def serve_pubsub(
        self,
        path: str,
        *,
        authenticate: Authenticate | None = None,
        channels: ServerChannels | None = None,
        on_message: Callable[..., Awaitable[None]] | None = None,
    ) -> None:
        """Serve a path to clients that subscribe for themselves: those of the Centrifuge protocol, in JSON.

        They may subscribe where a function decorated with `channel` says yes, and nowhere else; publish where its
        `publish` says so; and call what `rpc` decorates.

        `authenticate` is an async function that gets the connection and the client's `token`, or `""`, and answers with
        a `Grant`. For a token that can't be right it answers with `None` or raises `InvalidToken`, and for one that was
        it raises `TokenExpired`, as `asgi_ws.auth.JWT.verify` does. Without it everybody may connect whom middleware
        and `on_connect` have let in. `channels` is an async function that answers with the channels that the connection
        is subscribed to from the start, whatever their rules say. `on_message` gets the connection and what a client
        sends without asking for an answer.

        Raises `TypeError` or `ValueError` at once for a function or a path that can't work.
        """
        self._check_path(path)
        if authenticate is not None:
            check_async(authenticate, "authenticate")
            check_takes(authenticate, ["token"])
        if channels is not None:
            check_async(channels, "channels")
            check_takes(channels, [])
        namespace = sys._getframe(1).f_locals
        heard = None if on_message is None else Procedure(on_message, "on_message", namespace)
        endpoint = PubSubEndpoint(
            self._context, self._procedures, authenticate=authenticate, channels=channels, on_message=heard
        )
        self.routes.append(make_route(path, endpoint))

    def rpc(self, name: str) -> Callable[[H], H]:
        """Let clients of `serve_pubsub` call an async function: it gets the connection, and their data as the second
        parameter's annotation says, if it has one. What it returns they get; a `CommandError` that it raises, too.

        Raises `TypeError` for a function that can't be called so, and `ValueError` for a name that is taken.
        """

        def decorate(function: H) -> H:
            if name in self._procedures:
                raise ValueError(f"there is an rpc {name!r} already")
            self._procedures[name] = Procedure(function, "an rpc", sys._getframe(1).f_locals)
            return function

        return decorate

    def _check_path(self, path: str) -> None:
        if any(route.path == path for route in self.routes):
            raise ValueError(f"{path!r} has an endpoint already")

    # Channels

    def channel(
        self,
        pattern: str,
        *,
        history: int = 0,
        ttl: float | None = None,
        presence: bool = False,
        publish: bool | Callable[..., Awaitable[bool]] = False,
    ) -> Callable[[H], H]:
        """Say what holds for the channels that match `pattern`, in which `{name}` is anything up to the next colon.

        The latest `history` publications are kept, until `ttl` seconds after the last one (a day, where that isn't
        said), so that clients which come back get what they have missed. With `presence` it is known who is there.

        As a decorator it decides who may subscribe: the async function gets the connection and the pattern's names, and
        answers with a `bool`. Called without decorating anything, everybody may whom the application's code subscribes.

        To clients of `serve_pubsub` the function may answer with a `Grant`, too, and what such a client says is in its
        parameters `token` and `data`, if it has them. With `publish` they may publish while they are subscribed; or a
        function like the decorated one decides that, subscribed or not.

        Of several patterns that match, the first one holds. Raises `ValueError` for a pattern that can't match or what
        the broker can't do, `TypeError` for a function that doesn't take the pattern's names.
        """
        if history and not isinstance(self._broker, HistoryBroker):
            raise ValueError(f"{pattern!r}: {type(self._broker).__name__} keeps no history")
        if presence and not isinstance(self._broker, PresenceBroker):
            raise ValueError(f"{pattern!r}: {type(self._broker).__name__} can't tell who is in a channel")
        rule = self._context.rules.add(pattern, history, ttl, presence)
        if not isinstance(publish, bool):
            check_async(publish, "publish")
            check_takes(publish, rule.parameters)
        rule.publish = publish

        def decorate(allows: H) -> H:
            check_async(allows, "a channel's rule")
            asks_for = [name for name in ("token", "data") if takes(allows, name) and name not in rule.parameters]
            check_takes(allows, [*rule.parameters, *asks_for])
            rule.allows, rule.asks_for = allows, frozenset(asks_for)
            return allows

        return decorate

    async def publish(
        self, channel: str, data: Any, *, exclude: Connection[Any, Any] | str | None = None
    ) -> Position | None:
        """Publish to all who are subscribed to the channel, except the connection `exclude` (or the one of that id).

        `str` arrives as text, `bytes` as a binary message, anything else as JSON. All subscribers get what is
        published to a channel in the same order. Returns the publication's position when the broker has it; the
        memory broker has delivered it by then. Slow clients are not waited for.

        Raises `HubNotRunning`, `BrokerError` when the publication may not have gone out, `InvalidChannel` for a name
        that no channel can have and `TypeError` for data that can't be encoded.
        """
        sender = exclude.id if isinstance(exclude, Connection) else exclude
        return await self._context.publish(channel, data, sender=sender)

    def subscribe(self, channel: str, *, since: Position | str | None = None) -> Subscription:
        """What is published to a channel, for the server's own code:

            async with hub.subscribe("jobs:17") as publications:
                async for publication in publications:
                    ...

        In a channel with a history, what was missed since the position `since` comes first; `publications.recovery`
        says whether all of it could be had. Should publications be lost later on, the iterator raises
        `PublicationsLost`.

        Up to `limits.outbox_size` bytes wait to be read; then the iterator raises `SubscriberTooSlow`. It ends when
        the hub stops. Raises `HubNotRunning`, `InvalidChannel` for a name that no channel can have, `InvalidPosition`,
        and on entering `BrokerError`.
        """
        check_name(channel)
        return self._subscription(channel, since)

    async def history(self, channel: str, *, since: Position | str | None = None, limit: int | None = None) -> History:
        """What is kept of a channel, oldest first: the latest `limit` publications, or those that follow the position
        `since`, the first `limit` of them. `limit=0` asks for the channel's position only.

        Where what follows `since` isn't kept any more, or the position is of another epoch or from the future, there
        are no publications, and `complete` is false.

        Raises `HubNotRunning`, `BrokerError`, `InvalidChannel`, `InvalidPosition`, and `ValueError` for a channel
        without a history and for a limit below 0 or beyond what any history holds.
        """
        check_name(channel)
        if limit is not None and not 0 <= limit <= MAX_HISTORY:
            raise ValueError(f"limit={limit!r}: must be a number of publications, 0 to {MAX_HISTORY}")
        return await self._context.pubsub.history(channel, since=Position.of(since), limit=limit)

    async def presence(self, channel: str) -> list[Member]:
        """Who is in a channel, in all processes. Raises `HubNotRunning`, `BrokerError`, `InvalidChannel`, and
        `ValueError` for a channel without presence."""
        self._check_presence(channel)
        return await self._context.presence.members(channel)

    async def presence_stats(self, channel: str) -> PresenceStats:
        """How many connections and users are in a channel; quicker than to list them. Raises what `presence` does."""
        self._check_presence(channel)
        return await self._context.presence.stats(channel)

    def presence_events(self, channel: str) -> Subscription:
        """Who comes to a channel and who leaves it, for the server's own code, as `subscribe` gives what is published:
        the `data` of each is that of a `PresenceEvent`. Raises what `presence` does."""
        self._check_presence(channel)
        return self._context.presence.events(channel, self._context.limits.outbox_size)

    async def disconnect(
        self,
        *,
        user: str | int | uuid.UUID | None = None,
        connection: Connection[Any, Any] | str | None = None,
        code: int = 1008,
        reason: str = "disconnected",
    ) -> None:
        """End all connections of a user, or one connection (or the one of that id), in whatever process they are.

        The user is the connection's `user_id`. `code` and `reason` are the close frame's. Returns when every process
        has been told. Raises `HubNotRunning`, `BrokerError`, `TypeError` unless one of the two is given, and
        `ValueError` for a code that may not be sent.
        """
        if (user is None) == (connection is None):
            raise TypeError("disconnect takes either a user or a connection")
        if not may_be_sent(code):
            raise ValueError(f"a close frame can't have the code {code}; use 1008, or 4000 to 4999 for your own")
        id_ = connection.id if isinstance(connection, Connection) else connection
        await self._context.order(Order(None if user is None else str(user), id_, code, reason))

    def _subscription(self, channel: str, since: Position | str | None) -> Subscription:
        return Subscription(self._context.pubsub, channel, self._context.limits.outbox_size, Position.of(since))

    def _check_presence(self, channel: str) -> None:
        check_name(channel)
        rules = self._context.rules
        # A hub without rules looks from outside at what the application's has.
        rule, _ = rules.find(channel)
        if any(rules) and not (rule is not None and rule.presence):
            raise ValueError(f"{channel!r} has no presence; declare it with hub.channel(..., presence=True)")

    # Start and stop

    @property
    def context(self) -> Context:
        """What the rooms above need of a hub; not for applications."""
        return self._context

    @property
    def running(self) -> bool:
        """Whether the hub runs on the current event loop."""
        return self._context.runs_here

    async def __aenter__(self) -> Self:
        """Start the hub; one that runs already is kept running. `WebSocketMiddleware` does this.

        Raises `BrokerError` when the broker can't be reached, and `RuntimeError` while the hub runs on another loop.
        """
        if self._context.left_behind:
            # Its event loop was closed with the hub in it, as tests do; nothing there can be stopped any more.
            self._lock, self._users = asyncio.Lock(), 0
            self._context.forget()
        # Under a lock: those who come while the broker connects wait for it, too.
        async with self._lock:
            if not self._users:
                self._warn_of_workers()
                await self._start()
            elif not self.running:
                raise RuntimeError("the hub runs on another event loop; one hub serves one loop at a time")
            self._users += 1
        return self

    async def __aexit__(self, *error: object) -> None:
        """Stop the hub when nobody else keeps it running: subscriptions end, and connections that are left are cut."""
        self._users -= 1
        if not self._users:
            await self._context.stop()

    async def _start(self) -> None:
        retry = _RETRY
        while True:
            try:
                return await self._context.start(self._broker)
            except BrokerError as error:
                if not self._wait:
                    raise
                logger.warning("waiting for the broker: %s", error)
            await asyncio.sleep(random.uniform(retry / 2, retry))
            retry = min(retry * 2, _MAX_RETRY)

    def _warn_of_workers(self) -> None:
        workers = worker_count()
        if workers > 1 and isinstance(self._broker, MemoryBroker):
            logger.warning(
                "%d workers don't share the memory broker: what one publishes, the clients of the others don't get. "
                'Run one worker, or join them, for example with Hub("redis://localhost")',
                workers,
            )
