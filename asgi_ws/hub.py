"""The one object that an application holds."""

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Literal, Self, TypeVar, overload

from starlette.routing import WebSocketRoute

from asgi_ws._types import Handler, Overflow
from asgi_ws.brokers import Broker, MemoryBroker, broker_for
from asgi_ws.channels import check_name
from asgi_ws.connection import Connection, OnConnect, OnInvalid
from asgi_ws.context import Context
from asgi_ws.endpoints import Endpoint, check_async, check_takes, make_route
from asgi_ws.limits import Limits
from asgi_ws.messages import Position
from asgi_ws.origins import OriginPolicy
from asgi_ws.pubsub import PubSub, Subscription
from asgi_ws.uvicorn import worker_count

__all__ = ["Hub"]

logger = logging.getLogger("asgi_ws")

H = TypeVar("H", bound=Callable[..., Awaitable[Any]])


class Hub:
    """WebSocket endpoints, and channels that reach every client.

    `broker` is the URL of what joins processes (`memory://` is this process alone) or a `Broker` of your own.
    `allowed_origins` says which web pages may connect: `None` those of the same origin, a list those it names, `"*"`
    any. `overflow` says what happens when more waits for a client than `limits.outbox_size`: `"close"` ends it with
    code 1013, `"drop_oldest"` and `"drop_newest"` drop publications, `"latest"` keeps only the newest of each channel.

    Raises `ValueError` for a URL, an origin or a policy that isn't known.
    """

    def __init__(
        self,
        broker: str | Broker = "memory://",
        *,
        allowed_origins: Iterable[str] | Literal["*"] | None = None,
        limits: Limits = Limits(),  # noqa: B008  frozen
        overflow: Overflow = "close",
    ) -> None:
        if overflow not in ("close", "drop_oldest", "drop_newest", "latest"):
            raise ValueError(f"overflow={overflow!r}: must be 'close', 'drop_oldest', 'drop_newest' or 'latest'")
        self._broker = broker if isinstance(broker, Broker) else broker_for(broker)
        self._context = Context(limits, overflow, OriginPolicy(allowed_origins))
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
            if any(route.path == path for route in self.routes):
                raise ValueError(f"{path!r} has an endpoint already")
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

    # Channels

    def channel(self, pattern: str) -> Callable[[H], H]:
        """Decide who may subscribe to the channels that match `pattern`, in which `{name}` is anything up to the next
        colon: the decorated async function gets the connection and those names, and answers with a `bool`.

        Of several patterns that match, the first one holds; a channel without one is open to the application's code.
        Raises `ValueError` for a pattern that can't match, `TypeError` for a function that doesn't take its names.
        """
        rule = self._context.rules.add(pattern)

        def decorate(allows: H) -> H:
            check_async(allows, "a channel's rule")
            check_takes(allows, rule.parameters)
            rule.allows = allows
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

    def subscribe(self, channel: str) -> Subscription:
        """What is published to a channel, for the server's own code:

            async with hub.subscribe("jobs:17") as publications:
                async for publication in publications:
                    ...

        Up to `limits.outbox_size` bytes wait to be read; then the iterator raises `SubscriberTooSlow`. It ends when
        the hub stops. Raises `HubNotRunning`, and `InvalidChannel` for a name that no channel can have.
        """
        check_name(channel)
        return Subscription(self._context.pubsub, channel, self._context.limits.outbox_size)

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
                await self._context.start(PubSub(self._broker))
            elif not self.running:
                raise RuntimeError("the hub runs on another event loop; one hub serves one loop at a time")
            self._users += 1
        return self

    async def __aexit__(self, *error: object) -> None:
        """Stop the hub when nobody else keeps it running: subscriptions end, and connections that are left are cut."""
        self._users -= 1
        if not self._users:
            await self._context.stop()

    def _warn_of_workers(self) -> None:
        workers = worker_count()
        if workers > 1 and isinstance(self._broker, MemoryBroker):
            logger.warning(
                "%d workers don't share the memory broker: what one publishes, the clients of the others don't get. "
                "Run one worker, or give the hub a Broker that joins processes",
                workers,
            )
