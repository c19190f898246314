"""Socket.IO for a hub: namespaces and their handlers, and the packets of every connection."""

import asyncio
import itertools
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from asgi_ws.connection import Connection
from asgi_ws.context import STOP_TIME, Context, Exchange
from asgi_ws.exceptions import ConnectionClosed, InvalidMessage
from asgi_ws.frames import size_of
from asgi_ws.hub import Hub
from asgi_ws.messages import Retention
from asgi_ws.socketio.handlers import Handler
from asgi_ws.socketio.packets import ACK, CONNECT, CONNECT_ERROR, DISCONNECT, Decoder, Packet, check_event
from asgi_ws.socketio.rooms import PREFIX_OF_ROOMS, SocketIOProtocol, channel_of
from asgi_ws.socketio.sessions import Sessions
from asgi_ws.socketio.socket import Broadcast, Namespace, Socket
from asgi_ws.transports import EngineTransport

__all__ = ["SocketIO"]

logger = logging.getLogger("asgi_ws")

H = TypeVar("H", bound=Callable[..., Awaitable[Any]])

_ATTACHMENTS_TIME: Final = 10.0
"""How many seconds the attachments of a packet may take to come."""
_MAX_WAITING: Final = 256
"""How many events of one client may wait for its handlers; then nothing more is read."""
_GRACE: Final = 4.0
"""How many seconds a handler has to finish when its client is gone; less than the connection's own patience."""
_RETENTION: Final = 1000
"""How many events of a room are kept where the hub's limits say nothing of it."""
_FORBIDDEN = set(",#?")


class SocketIO:
    """Serves Socket.IO clients: `app.mount("/socket.io", SocketIO(hub))`, or, as an application of its own, at
    whatever path it is asked for.

    Rooms are channels of the hub: what is sent to them reaches their sockets in all processes. A client is pinged
    every `ping_interval` seconds, and gone when it doesn't answer for `ping_timeout`; a message of its may have
    `max_payload` bytes, with its attachments; and it has `connect_timeout` seconds to connect to a namespace. The
    hub's limits and its rule about origins hold as well.

    A client that comes back within `recovery` seconds, to whatever process, has its id, rooms and data again and gets
    what it has missed, or is told that it can't. That takes a broker that keeps histories.

    Raises `ValueError` for a number that can't be.
    """

    def __init__(
        self,
        hub: Hub,
        *,
        ping_interval: float = 25,
        ping_timeout: float = 20,
        max_payload: int = 1_000_000,
        connect_timeout: float = 45,
        recovery: float | None = None,
    ) -> None:
        if not isinstance(hub, Hub):
            raise TypeError(f"hub={hub!r}: give the Hub whose channels the rooms are")
        for name, value in (
            ("ping_interval", ping_interval),
            ("ping_timeout", ping_timeout),
            ("max_payload", max_payload),
            ("connect_timeout", connect_timeout),
            ("recovery", 1 if recovery is None else recovery),
        ):
            if not value > 0:
                raise ValueError(f"SocketIO({name}={value!r}): must be more than 0")
        most = hub.context.limits.message_size
        if most is not None and max_payload > most:
            raise ValueError(
                f"SocketIO(max_payload={max_payload}): the hub takes {most} bytes; give it Limits(message_size=...)"
            )
        self.hub = hub
        self.connect_timeout = connect_timeout
        self.max_payload = max_payload
        self._context = hub.context
        self._ids = itertools.count()
        limits = self._context.limits
        self._sessions: Sessions | None = None
        if recovery is not None:
            self._sessions = Sessions(recovery, limits.connections)
            self._context.prefixes[PREFIX_OF_ROOMS] = Retention(limits.recovery or _RETENTION, recovery)
        self._namespaces: dict[str, Namespace] = {}
        self._namespace("/").served = True
        self._protocol = SocketIOProtocol(positions=recovery is not None)
        self._engine = EngineTransport(
            self._serve,
            origins=self._context.origins,
            max_payload=max_payload,
            ping_interval=ping_interval,
            ping_timeout=ping_timeout,
            relay=lambda: self._context.relay,
        )

    # What the application says

    def on(self, event: str, *, namespace: str = "/") -> Callable[[H], H]:
        """Have an async function called with each event of that name: with the socket, and the event's arguments,
        which are validated where they are annotated. What it returns is the acknowledgement, a tuple several arguments
        of it.

        `"connect"` is a client that wants to be admitted, and what it says to that; raise `ConnectionRefused` to
        refuse. `"disconnect"` is its end, with the reason. `"*"` is every event without a handler, with its name in
        front of its arguments.

        Raises `TypeError` or `ValueError` at once for a function or a name that can't work.
        """
        local_names = sys._getframe(1).f_locals

        def decorate(function: H) -> H:
            handler, space = Handler(function, local_names), self._served(namespace)
            if event == "connect":
                space.on_connect = _only_one(event, space.on_connect, handler)
            elif event == "disconnect":
                space.on_disconnect = _only_one(event, space.on_disconnect, handler)
            else:
                check_event(event)
                space.handlers[event] = _only_one(event, space.handlers.get(event), handler)
            return function

        return decorate

    def use(self, function: H | None = None, *, namespace: str = "/") -> Any:
        """Have an async function called with every socket before its `connect` handler; several in their order. It
        refuses by raising `ConnectionRefused`. `@sio.use`, or `@sio.use(namespace="/admin")`."""
        local_names = sys._getframe(1).f_locals

        def decorate(function: H) -> H:
            self._served(namespace).middlewares.append(Handler(function, local_names))
            return function

        return decorate if function is None else decorate(function)

    async def emit(self, event: str, *args: Any, namespace: str = "/") -> None:
        """Publish an event to all sockets of a namespace, in whatever process they are; slow clients are not waited
        for.

        Raises `HubNotRunning`, `BrokerError` when it may not have gone out, and `TypeError` for data that can't be
        sent.
        """
        await self._broadcast(namespace).emit(event, *args)

    async def call(self, event: str, *args: Any, timeout: float = 10, namespace: str = "/") -> dict[str, Any]:
        """Send an event to the sockets of this process and wait for their acknowledgements: those that came in time,
        by the sockets' ids."""
        return await self._broadcast(namespace).call(event, *args, timeout=timeout)

    def to(self, room: str, *, namespace: str = "/") -> Broadcast:
        """To the sockets in a room: `await sio.to("lobby").emit("news", 1)`. A socket's id is a room."""
        return self._broadcast(namespace).to(room)

    def except_(self, room: str, *, namespace: str = "/") -> Broadcast:
        """To all sockets but those in a room."""
        return self._broadcast(namespace).except_(room)

    @property
    def volatile(self) -> Broadcast:
        """To all sockets whose clients keep up."""
        return self._broadcast("/").volatile

    def room(self, room: str, *, namespace: str = "/") -> str:
        """The name of a room's channel, for `hub.publish` and for endpoints. What is published there reaches clients
        as an event called "message"; what is emitted to the room is the JSON list of the event's name and arguments
        there, with base64 in the place of binary values."""
        return channel_of(_checked(namespace), room)

    def _broadcast(self, namespace: str) -> Broadcast:
        space = self._namespaces.get(namespace)
        return Broadcast(space or Namespace(_checked(namespace), self._context, self._ids))

    def _namespace(self, name: str) -> Namespace:
        space = self._namespaces.get(name)
        if space is None:
            space = self._namespaces[name] = Namespace(_checked(name), self._context, self._ids, self._sessions)
        return space

    def _served(self, name: str) -> Namespace:
        space = self._namespace(name)
        space.served = True
        return space

    # What the server says

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if not self.hub.running:
            await self.hub.__aenter__()
        await self._engine(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.hub.__aenter__()
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": f"asgi_ws: {error}"})
            return
        try:
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self._engine.aclose()
        finally:
            await self.hub.__aexit__()
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One session, whatever carries it."""
        exchange = Exchange(receive, send)
        try:
            self._context.admit(scope, exchange)
            connection = Connection[Any, Any](scope, exchange, context=self._context, protocol=self._protocol)
            client = _Client(self._namespaces, connection, self._context, self.max_payload, self.connect_timeout)
            await connection.serve(client.serve, {}, accept=True)
        except Exception as error:
            # What ended a connection that was served was answered and, where it was nobody's intention, logged.
            if not exchange.ended:
                if not isinstance(error, HTTPException):
                    raise
                await receive()
                await PlainTextResponse(str(error.detail), error.status_code, error.headers)(scope, receive, send)
        finally:
            exchange.leave()


class _Client:
    """One connection and its sockets, of which each namespace has one at the most."""

    __slots__ = (
        "_attachments_until",
        "_connect_timeout",
        "_connection",
        "_context",
        "_ended_by_us",
        "_ending",
        "_max_payload",
        "_namespaces",
        "_patience",
        "_room",
        "_sockets",
        "_sockets_until",
        "_waiting",
        "_waiting_size",
    )

    def __init__(
        self,
        namespaces: dict[str, Namespace],
        connection: Connection[Any, Any],
        context: Context,
        max_payload: int,
        connect_timeout: float,
    ) -> None:
        self._namespaces = namespaces
        self._connection = connection
        self._context = context
        self._max_payload = max_payload
        self._connect_timeout = connect_timeout
        self._sockets: dict[str, Socket] = {}
        # Those that have ended, until their last handler has.
        self._ending: dict[str, asyncio.Task[None]] = {}
        # Those whose client may not know yet that they were ended.
        self._ended_by_us: frozenset[str] = frozenset()
        self._waiting = 0
        self._waiting_size = 0
        self._room: asyncio.Future[None] | None = None
        self._patience: asyncio.Timeout | None = None
        self._sockets_until: float | None = None
        self._attachments_until: float | None = None

    async def serve(self) -> None:
        """Read packets until the connection is closed; the handler of the connection."""
        reason = "transport close"
        try:
            await self._read()
            reason = _reason(self._connection.closed)
        except InvalidMessage as error:
            logger.info("a client of %r broke the protocol: %s", self._connection.scope["path"], error)
            reason = "parse error"
            self._end_sockets(reason)
            await self._connection.close(error.close_code, error.reason)
        finally:
            await self._finish(reason)

    async def _read(self) -> None:
        decoder = Decoder(self._max_payload)
        size = 0
        try:
            async with asyncio.timeout(None) as self._patience:
                self._wait_for_sockets()
                async for payload in self._connection:
                    packet = decoder.feed(payload)
                    size += size_of(payload)
                    if packet is not None:
                        if self._attachments_until is not None:
                            self._attachments_until = None
                            self._set_patience()
                        await self._take(packet, size)
                        size = 0
                    elif self._attachments_until is None:
                        self._check_connected(decoder.incomplete)
                        self._attachments_until = _now() + _ATTACHMENTS_TIME
                        self._set_patience()
        except TimeoutError:
            what = "no namespace was connected to" if decoder.incomplete is None else "the attachments took too long"
            raise InvalidMessage(what, 1008) from None
        finally:
            self._patience = None

    def _wait_for_sockets(self) -> None:
        self._sockets_until = _now() + self._connect_timeout
        self._set_patience()

    def _set_patience(self) -> None:
        if self._patience is not None:
            limits = [limit for limit in (self._sockets_until, self._attachments_until) if limit is not None]
            self._patience.reschedule(min(limits, default=None))

    def _check_connected(self, packet: Packet | None) -> None:
        """Nothing is collected for a namespace that the client isn't in."""
        if packet is not None and packet.namespace not in self._sockets and packet.namespace not in self._ended_by_us:
            raise InvalidMessage("not connected to this namespace", 1008)

    async def _take(self, packet: Packet, size: int) -> None:
        name = packet.namespace
        if packet.type == CONNECT:
            await self._connect(packet)
            return
        socket = self._sockets.get(name)
        if socket is None or not socket.connected:
            if socket is None and name in self._ended_by_us:
                # Sent before the client heard of it.
                return
            raise InvalidMessage("not connected to this namespace", 1008)
        if packet.type == DISCONNECT:
            socket.end("client namespace disconnect")
        elif packet.type == ACK:
            assert packet.id is not None
            socket.acknowledged(packet.id, packet.data)
        elif packet.type == CONNECT_ERROR:
            raise InvalidMessage("a client refuses nobody", 1008)
        else:
            self._waiting += 1
            self._waiting_size += size
            socket.event(packet, size)
            while self._waiting > _MAX_WAITING or (self._waiting > 1 and self._waiting_size > self._max_payload):
                self._room = asyncio.get_running_loop().create_future()
                await self._room

    async def _connect(self, packet: Packet) -> None:
        name = packet.namespace
        namespace = self._namespaces.get(name)
        if namespace is None or not namespace.served:
            # The words are the protocol's.
            await self._connection.send(Packet(CONNECT_ERROR, {"message": "Invalid namespace"}, name))
            return
        if name in self._sockets:
            raise InvalidMessage("connected to this namespace already", 1008)
        ending = self._ending.get(name)
        if ending is not None:
            await asyncio.wait([ending])
        self._ended_by_us -= {name}
        self._sockets_until = None
        self._set_patience()
        socket = self._sockets[name] = Socket(namespace, self, self._connection, packet.data)
        socket.begin()

    # As the sockets' owner

    def taken(self, size: int) -> None:
        self._waiting -= 1
        self._waiting_size -= size
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def ended(self, socket: Socket) -> asyncio.Task[None]:
        name = socket.namespace
        del self._sockets[name]
        if socket.reason != "client namespace disconnect":
            self._ended_by_us |= {name}
        task = self._ending[name] = asyncio.create_task(socket.finish(), name="asgi_ws socket end")
        task.add_done_callback(lambda _: self._ending.pop(name))
        if not self._sockets:
            self._wait_for_sockets()
        return task

    @property
    def grace(self) -> float:
        closed = self._connection.closed
        return STOP_TIME / 2 if closed is not None and closed.code == 1012 else _GRACE

    def _end_sockets(self, reason: str) -> None:
        for socket in list(self._sockets.values()):
            socket.end(reason)

    async def _finish(self, reason: str) -> None:
        self._end_sockets(reason)
        tasks = list(self._ending.values())
        try:
            if tasks:
                await asyncio.wait(tasks)
        except asyncio.CancelledError:
            # The connection's own patience is over.
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            raise


def _reason(closed: ConnectionClosed | None) -> str:
    """Why a connection has ended, in the words of Socket.IO."""
    match closed:
        case None | ConnectionClosed(code=1000, reason="server namespace disconnect"):
            return "server namespace disconnect"
        case ConnectionClosed(code=1012):
            return "server shutting down"
        case ConnectionClosed(reason="ping timeout"):
            return "ping timeout"
        case ConnectionClosed(code=1002 | 1003 | 1007 | 1008):
            return "parse error"
        case ConnectionClosed(code=1009 | 1011 | 1013):
            return "transport error"
    return "transport close"


def _only_one(event: str, known: Handler | None, handler: Handler) -> Handler:
    if known is not None:
        raise ValueError(f"{event!r} has a handler already")
    return handler


def _checked(namespace: str) -> str:
    """Raise `ValueError` unless it can be a namespace's name."""
    if not namespace.startswith("/") or not _FORBIDDEN.isdisjoint(namespace) or len(namespace) > 100:
        raise ValueError(f"namespace={namespace!r}: must begin with '/', and have no ',', '#' or '?'")
    channel_of(namespace, "x")
    return namespace


def _now() -> float:
    return asyncio.get_running_loop().time()
