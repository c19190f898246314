"""What the connections of one hub share, and what is counted over all of them."""

import asyncio
import dataclasses
import ipaddress
import logging
import random
import typing
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from asgi_ws._types import Overflow
from asgi_ws.brokers import Broker, HistoryBroker, PresenceBroker
from asgi_ws.channels import Rules, check_name
from asgi_ws.exceptions import BrokerError, ConnectionClosed, HubNotRunning, InvalidMessage
from asgi_ws.limits import Limits
from asgi_ws.links import Link, Receiver
from asgi_ws.messages import INTERNAL, Position, Publication, Retention
from asgi_ws.origins import OriginPolicy
from asgi_ws.payloads import Payload, encode, json_decoder, to_json
from asgi_ws.presence import Presence, events_of
from asgi_ws.pubsub import PubSub, Subscriber
from asgi_ws.transports import Relay

__all__ = ["STOP_TIME", "Client", "Connections", "Context", "Exchange", "Order"]

logger = logging.getLogger("asgi_ws")

STOP_TIME = 1.0
"""How many seconds a client has to take what it was sent, and a handler to finish, when the server stops."""


class _Watched:
    """What is known of a link from one look to the next."""

    __slots__ = ("leaving", "looks", "receiver", "taken")

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.taken = 0
        self.looks = 0
        self.leaving = False


class Connections:
    """All connections of this process: counted, and aborted when they take nothing of what waits for them.

    No call of ASGI ends a client that doesn't read, and a server's own `close` waits until it does; so all links are
    looked at a few times within the write timeout, also those whose connection has been left.
    """

    _LOOKS = 8

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._count = 0
        self._addresses: Counter[str] = Counter()
        self._links: dict[Link, _Watched] = {}
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, client: Any) -> str:
        """Count a connection of the client's address; what is returned is for `exit`.

        Raises `HTTPException` with status 503 when there are too many.
        """
        address = _network(client)
        most, most_of_address = self._limits.connections, self._limits.connections_per_address
        if most is not None and self._count >= most:
            raise _busy("too many connections")
        if most_of_address is not None and self._addresses[address] >= most_of_address:
            raise _busy("too many connections from this address")
        self._count += 1
        self._addresses[address] += 1
        return address

    def exit(self, address: str) -> None:
        """The end of what `enter` has counted."""
        self._count -= 1
        self._addresses[address] -= 1
        if not self._addresses[address]:
            del self._addresses[address]

    def watch(self, link: Link, receiver: Receiver) -> None:
        """Look after a link until `leave`, and then until it is empty. `receiver` is told when it is aborted."""
        self._links[link] = _Watched(receiver)
        if self._timer is None:
            self._look_later()

    def leave(self, link: Link) -> None:
        """The connection has been left; its link is kept only while the client has not taken everything."""
        if link.buffered:
            self._links[link].leaving = True
        else:
            del self._links[link]

    def drain(self, link: Link) -> None:
        """The server stops and waits for this client: for as long as it takes what it was sent, and until the drain
        time is over."""
        self._drain(link, -1, self._limits.drain_timeout)

    def _drain(self, link: Link, taken_before: int, left: float) -> None:
        buffered = link.buffered
        taken = link.written - buffered
        if taken_before >= 0 and buffered and (taken == taken_before or left <= 0):
            link.abort()
        elif taken_before < 0 or buffered:
            loop = asyncio.get_running_loop()
            loop.call_later(STOP_TIME, self._drain, link, taken, left - STOP_TIME)

    def stop(self) -> None:
        """Abort what is left, and look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for link in self._links:
            link.abort()
        self._links.clear()

    def _look_later(self) -> None:
        # Timers of a busy loop are late: with all looks together, still within the timeout.
        delay = self._limits.write_timeout / self._LOOKS * 0.99
        self._timer = asyncio.get_running_loop().call_later(delay, self._look)

    def _look(self) -> None:
        self._timer = None
        for link, watched in list(self._links.items()):
            buffered = link.buffered
            taken = link.written - buffered
            if not buffered or taken > watched.taken:
                watched.looks = 0
            else:
                watched.looks += 1
            watched.taken = taken
            if watched.looks >= self._LOOKS - 1:
                logger.info("aborting a connection that took nothing for %s s", self._limits.write_timeout)
                link.abort()
                # Not every server tells.
                watched.receiver.connection_lost(ConnectionClosed(1006, clean=False))
                watched.looks = 0
            if watched.leaving and not link.buffered:
                del self._links[link]
        if self._links:
            self._look_later()


class Client(typing.Protocol):
    """A connection, as far as others can end it."""

    @property
    def id(self) -> str: ...

    @property
    def user_id(self) -> str | None: ...

    def cut(self, code: int, reason: str) -> None:
        """Close it at once. Never waits, never raises."""
        ...


class SubscribedClient(Subscriber, typing.Protocol):
    """What a connection has subscribed to channels: itself, or something with its id."""

    @property
    def id(self) -> str: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """What every process is told to do: end the connections of a user, or one of them."""

    user: str | None
    connection: str | None
    code: int
    reason: str


_CONTROL = f"{INTERNAL}control"
"""The channel of orders."""
_RULES = "rules"
_BORROW_INTERVAL = 5.0
"""How often, in seconds, one who publishes from outside asks for the application's rules."""
_BEGINS = INTERNAL
"""Stands before the beginning of names, among patterns, which can't begin so either."""
_read_order = json_decoder(Order)
_read_rules = json_decoder(list[tuple[str, int, float]])


class Context:
    """What the connections of one hub share."""

    def __init__(self, limits: Limits, overflow: Overflow, origins: OriginPolicy) -> None:
        self.limits = limits
        self.overflow: Overflow = overflow
        self.origins = origins
        self.rules = Rules()
        self.spans_processes = False
        """Whether the broker joins more than this process."""
        self.prefixes: dict[str, Retention] = {}
        """How much is kept, without a rule, of the channels whose names begin so."""
        self.on_connect: list[Callable[[Any], Awaitable[None]]] = []
        self.connections = Connections(limits)
        self.clients: dict[str, Client] = {}
        """The open connections by their ids."""
        self._borrowed = Rules()
        self._borrowed_at = 0.0
        self._lender: HistoryBroker | None = None
        self._borrowed_prefixes: dict[str, Retention] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pubsub: PubSub | None = None
        self._presence: Presence | None = None
        self.relay: Relay | None = None
        """What carries requests to the process that has their session, where there are several processes."""

    @property
    def runs_here(self) -> bool:
        """Whether it was started on the current event loop."""
        return self._pubsub is not None and self._loop is asyncio.get_running_loop()

    @property
    def left_behind(self) -> bool:
        """Whether the loop that it was started on is closed."""
        return self._loop is not None and self._loop.is_closed()

    @property
    def pubsub(self) -> PubSub:
        """Raises `HubNotRunning`, and `RuntimeError` when called from another event loop than the hub's."""
        if self._pubsub is None:
            raise HubNotRunning
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                "the hub runs on another event loop: from a thread use `anyio.from_thread.run(hub.publish, ...)`, "
                "in tests use one `with TestClient(app) as client` or asgi_ws.testing.connect"
            )
        return self._pubsub

    @property
    def presence(self) -> Presence:
        """Raises what `pubsub` does, and `ValueError` when the broker knows of no presence."""
        if self.pubsub and self._presence is not None:
            return self._presence
        raise ValueError("this hub's broker can't tell who is in a channel")

    async def start(self, broker: Broker) -> None:
        """Begin to serve on the running loop. Raises `BrokerError`."""
        pubsub = PubSub(broker, self.retention, self.limits.recovery)
        await pubsub.start()
        try:
            if broker.spans_processes:
                await pubsub.subscribe(_CONTROL, self)
                self.relay = Relay(pubsub)
                await self.relay.start()
            if isinstance(broker, HistoryBroker):
                await self._share_rules(broker)
        except BaseException:
            self.relay = None
            await pubsub.stop()
            raise
        self._presence = Presence(broker, pubsub) if isinstance(broker, PresenceBroker) else None
        self._loop = asyncio.get_running_loop()
        self._pubsub = pubsub
        self.spans_processes = broker.spans_processes

    async def _share_rules(self, broker: HistoryBroker) -> None:
        """Whoever publishes from outside, without rules of his own, is to keep what the application keeps."""
        own = [(rule.pattern, rule.retention.size, rule.retention.ttl) for rule in self.rules if rule.retention]
        own += [(_BEGINS + prefix, retention.size, retention.ttl) for prefix, retention in self.prefixes.items()]
        self._lender = None
        if own:
            await broker.remember(_RULES, to_json(own))
        elif broker.spans_processes and not any(self.rules):
            self._lender = broker
            await self._borrow(broker)

    async def _borrow(self, broker: HistoryBroker) -> None:
        # First, so that of many who publish one asks.
        self._borrowed_at = asyncio.get_running_loop().time()
        words = await broker.recall(_RULES)
        rules, prefixes = Rules(), {}
        try:
            for pattern, size, ttl in _read_rules(words or "[]"):
                if pattern.startswith(_BEGINS):
                    prefixes[pattern.removeprefix(_BEGINS)] = Retention(size, ttl)
                else:
                    rules.add(pattern, size, ttl)
        except (InvalidMessage, ValueError) as error:
            raise BrokerError(f"the application's rules can't be read: {error}") from error
        self._borrowed, self._borrowed_prefixes = rules, prefixes

    def forget(self) -> None:
        """Drop what can't be stopped any more."""
        self._loop = self._pubsub = self._presence = self.relay = None
        self.connections = Connections(self.limits)
        self.clients.clear()

    async def stop(self) -> None:
        """The end of that."""
        pubsub, self._pubsub = self.pubsub, None
        presence, self._presence = self._presence, None
        self.connections.stop()
        if self.relay is not None:
            await self.relay.stop()
            self.relay = None
        if presence is not None:
            await presence.stop()
        await pubsub.stop()

    def retention(self, channel: str) -> Retention | None:
        """How much of a channel is kept."""
        if channel.startswith(INTERNAL):
            # Orders and events are of the moment, whatever a pattern matches.
            return None
        rule, _ = self.rules.find(channel)
        if rule is None:
            rule, _ = self._borrowed.find(channel)
        if rule is not None and rule.retention is not None:
            return rule.retention
        for prefix, retention in (self.prefixes or self._borrowed_prefixes).items():
            if channel.startswith(prefix):
                return retention
        return None

    async def publish(self, channel: str, data: Any, *, sender: str | None = None) -> Position | None:
        """What `Hub.publish` and `Connection.publish` do."""
        check_name(channel)
        pubsub, payload = self.pubsub, encode(data)
        if self._lender is not None and asyncio.get_running_loop().time() - self._borrowed_at > _BORROW_INTERVAL:
            # The application may have been started after this process, or anew.
            await self._borrow(self._lender)
        return await pubsub.publish(channel, payload, sender=sender)

    async def leave(self, channels: Iterable[str], watched: Iterable[str], client: "SubscribedClient") -> None:
        """Unsubscribe a client from channels, and from the events of those that it `watched`. A hub that was stopped
        has no subscriptions left."""
        pubsub, presence = self._pubsub, self._presence
        if pubsub is None:
            return
        channels, watched = list(channels), list(watched)
        leaving = list[asyncio.Task[None]]()
        if presence is not None:
            for channel in watched:
                presence.unwatch(channel)
            # At once: whoever leaves may be cancelled, and nobody may be said to be here who isn't.
            leaving = [task for channel in channels if (task := presence.leave(channel, client.id))]
        await pubsub.unsubscribe([*channels, *map(events_of, watched)], client)
        if leaving:
            await asyncio.wait(leaving)

    async def order(self, order: Order) -> None:
        """Have it done in every process. Raises `BrokerError`."""
        if self.pubsub.has_subscribers(_CONTROL):
            await self.pubsub.publish(_CONTROL, Payload("json", to_json(order)))
        else:
            self._obey(order)

    def push(self, publication: Publication) -> None:
        """Take an order. Called by the hub."""
        try:
            self._obey(_read_order(publication.payload.data))
        except InvalidMessage as error:
            logger.warning("an order that can't be read was dropped: %s", error)

    def _obey(self, order: Order) -> None:
        for client in list(self.clients.values()):
            if client.id == order.connection or (order.user is not None and client.user_id == order.user):
                client.cut(order.code, order.reason)

    def admit(self, scope: Scope, exchange: "Exchange") -> None:
        """Let a request in, as far as its origin and the limits are concerned, and count it until `exchange.leave`.

        Raises `HTTPException`. A request is asked once, however often this is called.
        """
        if exchange.admitted is not None:
            return
        if not self.origins.allows(scope):
            origin = b", ".join(value for name, value in scope["headers"] if name == b"origin")
            logger.warning(
                "refused a page of %.200r at %.200r; name its origin in Hub(allowed_origins=[...])",
                origin.decode("latin-1"),
                scope["path"],
            )
            raise HTTPException(403, "this origin isn't allowed")
        exchange.admitted = (self.connections, self.connections.enter(scope.get("client")))


@dataclasses.dataclass(slots=True)
class Exchange:
    """A handshake and what follows, as the server offers it: its own `receive` and `send`, whatever is wrapped around
    them further in. `WebSocketMiddleware` puts it into the scope."""

    receive: Receive
    send: Send
    admitted: tuple[Connections, str] | None = None
    ended: bool = False
    """The connection was served to its end: nothing is to be answered any more."""

    def leave(self) -> None:
        """The request has ended."""
        if self.admitted is not None:
            connections, address = self.admitted
            self.admitted = None
            connections.exit(address)


def _busy(detail: str) -> HTTPException:
    # Not all at the same moment again.
    return HTTPException(503, detail, headers={"Retry-After": str(random.randint(2, 10))})


def _network(client: Any) -> str:
    """The address that a client is counted by: its own, or its network where it has 2^64 of them."""
    host = str(client[0]) if client else ""
    if ":" not in host:
        return host
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        return host
    mapped = address.ipv4_mapped
    return str(mapped) if mapped else str(ipaddress.IPv6Network((address, 64), strict=False))
