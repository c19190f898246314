"""One client in one namespace: what it sends, what it is sent, its rooms, and how that ends."""

import asyncio
import itertools
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, Protocol, cast

from asgi_ws import protocols
from asgi_ws.connection import Connection
from asgi_ws.context import Context
from asgi_ws.exceptions import AsgiWsError, BrokerError, ConnectionClosed, InvalidMessage, SubscriptionDenied
from asgi_ws.frames import Frame
from asgi_ws.messages import Position, Publication
from asgi_ws.outbox import Outbox
from asgi_ws.socketio.handlers import Handler
from asgi_ws.socketio.packets import ACK, CONNECT, CONNECT_ERROR, DISCONNECT, EVENT, Packet, check_event
from asgi_ws.socketio.rooms import InvalidEvent, Route, channel_of, channel_of_all, pack, read_route
from asgi_ws.socketio.sessions import RECOVERABLE, Mark, Session, Sessions, name_of_session

__all__ = ["Broadcast", "ConnectionRefused", "Namespace", "Owner", "Socket", "Volatile"]

logger = logging.getLogger("asgi_ws")

CALL_TIMEOUT: Final = 10.0
"""How many seconds the client has to acknowledge what it was called with."""
_MAX_PENDING = 256
"""How many acknowledgements of one socket are waited for."""
_CALLBACK_TIME = 30.0
"""How many seconds an acknowledgement that nobody waits for may take to come."""
_LEAVE_TIME = 30.0
"""How many seconds a `disconnect` handler may take."""
_SEEN = 64
"""How many of the events that went to several rooms at once a socket remembers."""

Callback = Callable[..., Any]


class ConnectionRefused(AsgiWsError):
    """Raised in a `connect` handler or a middleware: the client gets `connect_error`, with `data` for its program."""

    def __init__(self, message: str = "refused", data: Any = None) -> None:
        super().__init__(message, data)
        self.message = message
        self.data = data


class Owner(Protocol):
    """The connection that a socket belongs to, as the socket knows it."""

    def taken(self, size: int) -> None:
        """An event that waited is handled now."""
        ...

    def ended(self, socket: "Socket") -> "asyncio.Task[None]":
        """A socket has ended; its `finish` is to be waited for."""
        ...

    @property
    def grace(self) -> float:
        """How many seconds a handler has to finish when its socket has ended."""
        ...


class Namespace:
    """What the sockets of one namespace have in common."""

    def __init__(
        self, name: str, context: Context, ids: "itertools.count[int]", sessions: Sessions | None = None
    ) -> None:
        self.name = name
        self.sessions = sessions
        """Of those who may come back, where clients are recovered."""
        self.live: dict[str, Socket] = {}
        """The sockets whose clients may come back without our knowing that they have gone, by their secrets."""
        self.context = context
        self.ids = ids
        self.served = False
        """Whether clients may connect to it."""
        self.handlers: dict[str, Handler] = {}
        self.middlewares: list[Handler] = []
        self.on_connect: Handler | None = None
        self.on_disconnect: Handler | None = None
        self.sockets: dict[str, Socket] = {}
        self._publication: Publication | None = None
        self._delivery: _Delivery | None = None

    def delivery(self, publication: Publication, protocol: protocols.Protocol[Any]) -> "_Delivery | None":
        """What sockets get of a publication: made for the first of them, and kept until the next publication."""
        if publication is not self._publication:
            self._publication = publication
            try:
                self._delivery = _Delivery(publication, publication.frame(protocol), self.sessions is not None)
            except InvalidEvent:
                logger.warning("something else than an event was published as one", exc_info=True)
                self._delivery = None
        return self._delivery

    async def unsubscribe(self, channels: Iterable[str], socket: "Socket") -> None:
        """A hub that was stopped has no subscriptions left."""
        if self.context.runs_here:
            await self.context.pubsub.unsubscribe(channels, socket)


class _Delivery:
    """A publication as the sockets of this process get it."""

    __slots__ = ("frame", "id", "mark", "volatile", "without")

    def __init__(self, publication: Publication, frame: Frame, marked: bool) -> None:
        route = read_route(publication)
        position = publication.position
        self.frame = frame
        self.mark = Mark(publication.channel, position, route.id) if marked and position is not None else None
        self.without = frozenset(route.without)
        self.id = route.id
        self.volatile = route.volatile


class Broadcast:
    """Sends events to the sockets in some rooms, or to all of a namespace, in whatever process they are."""

    __slots__ = ("_namespace", "_rooms", "_volatile", "_without")

    def __init__(
        self, namespace: Namespace, rooms: tuple[str, ...] = (), without: tuple[str, ...] = (), volatile: bool = False
    ) -> None:
        self._namespace = namespace
        self._rooms = rooms
        self._without = without
        self._volatile = volatile

    def to(self, room: str) -> "Broadcast":
        """Also to this room; who is in several of them gets an event once. A socket's id is a room."""
        channel_of(self._namespace.name, room)
        return Broadcast(self._namespace, (*self._rooms, room), self._without, self._volatile)

    def except_(self, room: str) -> "Broadcast":
        """Not to those in this room."""
        channel_of(self._namespace.name, room)
        return Broadcast(self._namespace, self._rooms, (*self._without, room), self._volatile)

    @property
    def volatile(self) -> "Broadcast":
        """Not to clients that are behind with what they were sent before."""
        return Broadcast(self._namespace, self._rooms, self._without, True)

    async def emit(self, event: str, *args: Any) -> None:
        """Publish an event; slow clients are not waited for.

        Raises `HubNotRunning`, `BrokerError` when it may not have gone out (to all of several rooms), and `TypeError`
        for data that can't be sent.
        """
        check_event(event)
        payload, paths = pack(event, args)
        namespace, rooms = self._namespace, tuple(dict.fromkeys(self._rooms))
        # What of several rooms comes first isn't known, nor where a socket will be then: so it remembers what it took.
        id_ = secrets.token_urlsafe(9) if len(rooms) > 1 else None
        sender = Route(self._without, id_, self._volatile, paths).mark()
        channels = [channel_of(namespace.name, room) for room in rooms] or [channel_of_all(namespace.name)]
        for channel in channels:
            await namespace.context.pubsub.publish(channel, payload, sender=sender)

    async def call(self, event: str, *args: Any, timeout: float = CALL_TIMEOUT) -> dict[str, Any]:
        """Send an event to the sockets of this process and wait for their acknowledgements: those that came in time,
        by the sockets' ids."""
        check_event(event)
        namespace = self._namespace
        id_ = next(namespace.ids)
        rooms, without = set(self._rooms), set(self._without)
        sockets = [
            socket
            for socket in namespace.sockets.values()
            if (not rooms or not rooms.isdisjoint(socket.rooms)) and without.isdisjoint(socket.rooms)
        ]
        if not sockets:
            return {}
        frame = sockets[0].frame(Packet(EVENT, [event, *args], namespace.name, id_))
        answers = {socket.id: socket.ask(id_, frame, channel_of_all(namespace.name)) for socket in sockets}
        try:
            await asyncio.wait(answers.values(), timeout=timeout)
        finally:
            for answer in answers.values():
                answer.cancel()
        return {
            socket_id: answer.result()
            for socket_id, answer in answers.items()
            if not answer.cancelled() and answer.exception() is None
        }


class Volatile:
    """Sends to one socket only while its client keeps up."""

    __slots__ = ("_socket",)

    def __init__(self, socket: "Socket") -> None:
        self._socket = socket

    async def emit(self, event: str, *args: Any) -> None:
        """Send an event, unless the client is behind with what it was sent before."""
        if not self._socket.behind:
            await self._socket.emit(event, *args)


class Socket:
    """One client in one namespace, from before it is admitted until its `disconnect` handler has returned.

    Its handlers run one after another, in the order of its events.
    """

    __slots__ = (
        "__weakref__",
        "_claimed",
        "_connected",
        "_held",
        "_held_size",
        "_kept",
        "_left",
        "_namespace",
        "_outbox",
        "_own_channel",
        "_owner",
        "_pending",
        "_pid",
        "_protocol",
        "_queue",
        "_resuming",
        "_rooms",
        "_seen",
        "_session",
        "_worker",
        "auth",
        "connection",
        "data",
        "id",
        "reason",
        "recovered",
    )

    def __init__(self, namespace: Namespace, owner: Owner, connection: Connection[Any, Any], auth: Any) -> None:
        self.id = ""
        """Tells this socket from all others, in every process and namespace. It is no secret."""
        self.recovered = False
        """Whether its client has come back to its rooms and data, and gets what it has missed; its `connect` handler
        is asked all the same."""
        self.connection = connection
        """Below all sockets of one client: its `headers`, `cookies`, `query_params` and `user`."""
        self.auth: dict[str, Any] = dict(auth or {})
        """What the client connected with."""
        self.data: dict[str, Any] = {}
        """For the application."""
        self.reason: str | None = None
        """Why it ended, where it has."""
        self._namespace = namespace
        self._owner = owner
        self._outbox: Outbox = connection.outbox
        self._protocol = connection.protocol
        self._own_channel = ""
        self._rooms: set[str] = set()
        self._session: Session | None = None
        self._resuming = False
        self._claimed: Session | None = None
        self._kept: Session | None = None
        self._pid: str | None = None
        self._connected = False
        self._left = False
        # What it is sent before the client knows of it.
        self._held: list[tuple[Frame, str]] | None = []
        self._held_size = 0
        self._pending: dict[int, _Pending] | None = None
        self._seen: deque[str] | None = None
        self._queue: deque[Callable[[], Awaitable[None]]] | None = None
        self._worker: asyncio.Task[None] | None = None
        self._is_new()

    def _is_new(self) -> None:
        self.recovered = False
        self.data = {}
        self.id = secrets.token_urlsafe(15)
        self._own_channel = channel_of(self.namespace, self.id)
        self._rooms = {self.id}
        self._seen = None
        if self._namespace.sessions is not None:
            self._session = Session(self.id, self.connection.user_id)

    @property
    def namespace(self) -> str:
        """The namespace's name."""
        return self._namespace.name

    @property
    def rooms(self) -> frozenset[str]:
        """The rooms that it is in, its own id among them; in a `disconnect` handler those that it was in."""
        return frozenset(self._rooms)

    @property
    def transport(self) -> str:
        """The way by which the client comes: "polling" or "websocket"."""
        return self.connection.transport

    @property
    def connected(self) -> bool:
        """Whether the client has been admitted and has not left."""
        return self._connected and not self._left

    @property
    def behind(self) -> bool:
        """Whether the client is behind with what it was sent."""
        return self._outbox.behind

    # To the client

    async def emit(self, event: str, *args: Any, callback: Callback | None = None) -> None:
        """Send an event to this client; waits while it is behind with what it was sent before.

        `callback`, which may be an async function, is called with what the client acknowledges it with, within 30 s
        or not at all. Raises `ConnectionClosed`, and `TypeError` for data that can't be sent.
        """
        check_event(event)
        self._check_open()
        id_ = None
        if callback is not None:
            id_ = next(self._namespace.ids)
            loop = asyncio.get_running_loop()
            self._expect(id_, _Pending(callback, None, loop.call_later(_CALLBACK_TIME, self._forget, id_)))
        elif self._session is not None:
            # By its own room, whose history has it when the client comes back.
            if self.behind:
                await self._outbox.flush()
            await Broadcast(self._namespace, (self.id,)).emit(event, *args)
            return
        await self._send(self.frame(Packet(EVENT, [event, *args], self.namespace, id_)))

    async def call(self, event: str, *args: Any, timeout: float = CALL_TIMEOUT) -> Any:
        """Send an event and wait for its acknowledgement: `None`, a value, or a list of several.

        Raises `TimeoutError`, `ConnectionClosed`, and `TypeError` for data that can't be sent.
        """
        check_event(event)
        self._check_open()
        if not self._connected:
            raise RuntimeError("the client can't acknowledge anything before it is connected")
        id_ = next(self._namespace.ids)
        frame = self.frame(Packet(EVENT, [event, *args], self.namespace, id_))
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._expect(id_, _Pending(None, answer, None))
        try:
            async with asyncio.timeout(timeout):
                await self._send(frame)
                return await answer
        finally:
            self._forget(id_)
            if not answer.cancel() and not answer.cancelled():
                # Where sending failed, nobody has looked at it.
                answer.exception()

    def ask(self, id_: int, frame: Frame, channel: str) -> "asyncio.Future[Any]":
        """Send an event that others are sent as well; the future is done with its acknowledgement, and forgotten
        when it is cancelled."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._expect(id_, _Pending(None, answer, None))
        answer.add_done_callback(lambda _: self._forget(id_))
        self._outbox.push(frame, channel)
        return answer

    @property
    def volatile(self) -> Volatile:
        """`socket.volatile.emit(...)` sends nothing while the client is behind."""
        return Volatile(self)

    def to(self, room: str) -> Broadcast:
        """To the others in a room."""
        return self.broadcast.to(room)

    @property
    def broadcast(self) -> Broadcast:
        """To all others in the namespace."""
        return Broadcast(self._namespace, (), (self.id,))

    async def disconnect(self, close: bool = False) -> None:
        """Tell the client that it has been disconnected from the namespace; with `close`, from all, and close its
        connection. Its `disconnect` handler runs when the handler that runs now has returned."""
        if close:
            await self.connection.close(1000, "server namespace disconnect")
        elif not self._left:
            frame = self.frame(Packet(DISCONNECT, None, self.namespace))
            # First, so that nothing follows it.
            self.end("server namespace disconnect")
            await self._outbox.put(frame)

    def push(self, publication: Publication) -> None:
        """Take a publication of one of the rooms. Called by the hub; never waits, never raises."""
        delivery = self._namespace.delivery(publication, self._protocol)
        if delivery is None or self._left:
            return
        if delivery.mark is not None and self._session is not None:
            self._session.sent(delivery.mark)
        if delivery.without and not delivery.without.isdisjoint(self._rooms):
            return
        if delivery.id is not None:
            if self._seen is None:
                self._seen = deque(maxlen=_SEEN)
            if delivery.id in self._seen:
                return
            self._seen.append(delivery.id)
        if delivery.volatile and (self._outbox.behind or self._resuming):
            return
        if self._held is not None:
            self._hold(delivery.frame, publication.channel)
        else:
            self._outbox.push(delivery.frame, publication.channel)

    def lost(self, channel: str) -> None:
        """Publications to a room with a history are lost to this client. Called by the hub."""
        if self._session is not None:
            # It comes back, and is told that it isn't recovered.
            self._session.whole = False
            self.connection.lost(channel)

    def frame(self, packet: Packet) -> Frame:
        """What leaves for the client. Raises `TypeError` for data that can't be sent."""
        return cast(Frame, self._protocol.encode(packet))

    async def _send(self, frame: Frame) -> None:
        if self._held is not None:
            self._hold(frame, self._own_channel)
        else:
            await self._outbox.put(frame)

    def _hold(self, frame: Frame, channel: str) -> None:
        assert self._held is not None
        self._held.append((frame, channel))
        self._held_size += frame.size
        if self._held_size > self._namespace.context.limits.outbox_size:
            # Nobody is told that he gets everything from here on, and so he can be told that he doesn't.
            self._held.clear()

    def _check_open(self) -> None:
        if self._left:
            raise (self.connection.closed or ConnectionClosed(1000, self.reason or "")).again()

    # Acknowledgements of the client's

    def _expect(self, id_: int, pending: "_Pending") -> None:
        if self._pending is None:
            self._pending = {}
        elif len(self._pending) >= _MAX_PENDING:
            # The client doesn't answer: the oldest one is given up.
            self._forget(next(iter(self._pending)), TimeoutError("too many acknowledgements are missing"))
        self._pending[id_] = pending

    def _forget(self, id_: int, error: Exception | None = None) -> None:
        pending = self._pending.pop(id_, None) if self._pending else None
        if pending is not None:
            pending.end(error)

    def acknowledged(self, id_: int, args: list[Any]) -> None:
        """The client has acknowledged an event. What it was not asked for is ignored."""
        pending = self._pending.pop(id_, None) if self._pending else None
        if pending is None:
            return
        if pending.answer is None:
            self._enqueue(lambda: self._run_callback(pending.callback, args))
        elif not pending.answer.done():
            pending.answer.set_result(args if len(args) > 1 else args[0] if args else None)
        pending.end(None)

    async def _run_callback(self, callback: Any, args: list[Any]) -> None:
        try:
            result = callback(*args)
            if asyncio.iscoroutine(result):
                await result
        except Exception:
            logger.exception("the callback %r failed", callback)

    # Rooms

    async def join(self, room: str) -> None:
        """From the return of this call on, the socket gets what is sent to the room. A second time is none.

        Raises `SubscriptionDenied` when the rule of the room's channel says no or the socket is in too many rooms,
        `ConnectionClosed`, and `InvalidChannel` for a name that no room can have.
        """
        self._check_open()
        channel = channel_of(self.namespace, room)
        if room in self._rooms:
            return
        context = self._namespace.context
        rule, parameters = context.rules.find(channel)
        if rule is not None and rule.allows is not None and not await rule.allows(self.connection, **parameters):
            raise SubscriptionDenied(channel)
        self._check_open()
        limit = context.limits.channels
        if limit is not None and len(self._rooms) > limit:
            raise SubscriptionDenied(channel, f"a socket can be in {limit} rooms")
        self._rooms.add(room)
        try:
            await self._subscribe(channel)
        except BaseException:
            self._rooms.discard(room)
            raise
        if self._left or room not in self._rooms:
            # Meanwhile it was left, or the room, and nobody could know of this subscription yet.
            await self._namespace.unsubscribe([channel], self)

    async def leave(self, room: str) -> None:
        """The socket gets nothing of the room any more, from this call on."""
        if room in self._rooms and room != self.id and not self._left:
            self._rooms.discard(room)
            channel = channel_of(self.namespace, room)
            if self._session is not None:
                self._session.left(channel)
            await self._namespace.unsubscribe([channel], self)

    async def _subscribe(self, channel: str, since: Position | None = None) -> bool:
        """Whether nothing is missing since then."""
        session = self._session
        begin = None if session is None else lambda recovery: session.joined(channel, since or recovery.position)
        recovery = await self._namespace.context.pubsub.subscribe(channel, self, since=since, begin=begin)
        return recovery.recovered

    # Its life, as its owner directs it

    def begin(self) -> None:
        """Ask the middlewares and the `connect` handler, and tell the client what they say."""
        pid, token = self.auth.get("pid"), self.auth.get("offset")
        session = None
        if self._namespace.sessions is not None:
            self.auth.pop("pid", None)
            self.auth.pop("offset", None)
            if isinstance(pid, str) and (token is None or isinstance(token, str)):
                session = self._claim(pid)
                self._pid = pid
        self._enqueue(lambda: self._begin(session, token))

    def _claim(self, pid: str) -> Session | None:
        """The session that belongs to a client's secret, and to this client."""
        namespace = self._namespace
        live, user = namespace.live.get(pid), self.connection.user_id
        if live is not None and live.connection.user_id == user:
            # Its connection is lost, and nobody has seen it yet.
            live.end("transport close")
            live.connection.cut(1008, "the client has come back on another connection")
        return cast(Sessions, namespace.sessions).take(pid, user)

    async def _fetch(self, pid: str, session: Session | None) -> Session | None:
        """The session as it was kept last, by whatever process; nobody else gets it."""
        context = self._namespace.context
        if session is not None and session.finishing is not None:
            await asyncio.wait([session.finishing])
        if not context.spans_processes or (session is not None and not session.shared):
            return session
        try:
            words = await context.pubsub.take(name_of_session(self.namespace, pid))
            session = None if words is None else Session.load(pid, words)
        except (BrokerError, InvalidMessage, ValueError):
            logger.warning("a client of %r can't be recovered", self.namespace, exc_info=True)
            return None
        return session if session is not None and session.user == self.connection.user_id else None

    async def _share(self, session: Session, sessions: Sessions) -> None:
        """Keep the session where other processes find it."""
        try:
            name = name_of_session(self.namespace, session.pid)
            await self._namespace.context.pubsub.keep(name, session.save(), sessions.time)
            session.shared = True
        except (BrokerError, TypeError, ValueError):
            logger.warning("a client of %r can be recovered by this process only", self.namespace, exc_info=True)

    async def _resume(self, session: Session, token: str | None) -> None:
        """Go on where the client was; where that can't be, it is a new one."""
        again = session.resume(token)
        if again is None:
            return
        self._claimed = session
        self.id, self._rooms, self.data, self._session = again.sid, again.rooms, again.data, again
        self._own_channel = channel_of(self.namespace, self.id)
        self._seen = deque(again.ids, maxlen=_SEEN)
        channels = list(again.positions.items())
        self._resuming = True
        try:
            for channel, since in channels:
                if not await self._subscribe(channel, since):
                    break
            else:
                self.recovered = self._held_size <= self._namespace.context.limits.outbox_size
        finally:
            self._resuming = False
            if not self.recovered:
                self._claimed = None
                await self._namespace.unsubscribe([channel for channel, _ in channels], self)
                self._held, self._held_size = [], 0
                self._is_new()

    async def _begin(self, session: Session | None, token: str | None) -> None:
        namespace = self._namespace
        try:
            if self._pid is not None:
                session = await self._fetch(self._pid, session)
            if session is not None:
                await self._resume(session, token)
            for middleware in namespace.middlewares:
                await middleware.function(self)
            if not self.recovered:
                await self._subscribe(channel_of_all(namespace.name))
                await self._subscribe(self._own_channel)
            if namespace.on_connect is not None:
                handler = namespace.on_connect
                await handler.function(self, *handler.convert([self.auth][: handler.most]))
        except Exception as error:
            await self._refuse(error)
            return
        self._connected = True
        if self._left:
            return
        if self._held_size > namespace.context.limits.outbox_size:
            await self._refuse(ConnectionRefused("more was sent while connecting than can wait"))
            return
        namespace.sockets[self.id] = self
        welcome = {"sid": self.id}
        if self._session is not None:
            welcome["pid"] = self._session.pid
            namespace.live[self._session.pid] = self
        try:
            await self._outbox.put(self.frame(Packet(CONNECT, welcome, namespace.name)))
        except ConnectionClosed:
            return
        # Nothing may come between: no `await`.
        held, self._held = self._held or (), None
        for frame, channel in held:
            self._outbox.push(frame, channel)

    async def _refuse(self, error: Exception) -> None:
        answer: dict[str, Any] = {"message": "the server failed"}
        match error:
            case ConnectionRefused():
                answer = {"message": error.message}
                if error.data is not None:
                    answer["data"] = error.data
            case InvalidMessage():
                answer = {"message": error.reason}
            case SubscriptionDenied():
                answer = {"message": str(error)}
            case _:
                logger.error("connecting to the namespace %r failed", self.namespace, exc_info=error)
        if self._left:
            return
        try:
            frame = self.frame(Packet(CONNECT_ERROR, answer, self.namespace))
        except TypeError:
            logger.exception("the data of ConnectionRefused can't be sent")
            frame = self.frame(Packet(CONNECT_ERROR, {"message": answer["message"]}, self.namespace))
        self.end("refused")
        try:
            await self._outbox.put(frame)
        except ConnectionClosed:
            logger.debug("a client left before it was refused")

    def event(self, packet: Packet, size: int) -> None:
        """An event of the client's, which waits for those before it."""

        async def handle() -> None:
            self._owner.taken(size)
            await self._handle(packet)

        self._enqueue(handle)

    async def _handle(self, packet: Packet) -> None:
        event, *args = packet.data
        handlers = self._namespace.handlers
        # A client may call an event "*", too, and doesn't choose what the handler for all takes for the name.
        handler = handlers.get(event) if event != "*" else None
        if handler is None:
            handler = handlers.get("*")
            args = packet.data
        if handler is None:
            logger.debug("nobody handles the event %.100r", event)
            return
        try:
            result = await handler.function(self, *handler.convert(args))
            if packet.id is not None and not self._left:
                values = list(result) if isinstance(result, tuple) else [] if result is None else [result]
                await self._outbox.put(self.frame(Packet(ACK, values, self.namespace, packet.id)))
        except InvalidMessage as error:
            # There is no answer for it in the protocol: what isn't acknowledged has failed.
            logger.warning("the event %.100r of a client is invalid: %.500s", event, error)
        except Exception as error:
            if not (isinstance(error, ConnectionClosed) and self._left):
                logger.exception("the handler of the event %.100r failed", event)

    def _enqueue(self, work: Callable[[], Awaitable[None]]) -> None:
        # Most sockets have nothing to do most of the time, and there are many.
        if self._queue is None:
            self._queue = deque()
            self._worker = asyncio.create_task(self._work(self._queue), name="asgi_ws socket")
        self._queue.append(work)

    async def _work(self, queue: deque[Callable[[], Awaitable[None]]]) -> None:
        try:
            while queue:
                await queue.popleft()()
        finally:
            self._queue = self._worker = None

    def end(self, reason: str) -> None:
        """Let nothing more in or out; what has come is still handled. Called once."""
        self._left = True
        self.reason = reason
        self._held = None
        self._namespace.sockets.pop(self.id, None)
        pending, self._pending = self._pending, None
        for waiting in (pending or {}).values():
            waiting.end((self.connection.closed or ConnectionClosed(1000, reason)).again())
        finishing = self._owner.ended(self)
        session, sessions = self._session, self._namespace.sessions
        if session is not None and sessions is not None:
            self._namespace.live.pop(session.pid, None)
            if self._connected:
                session.rooms, session.data, session.finishing = self._rooms, self.data, finishing
            else:
                # It has been told nothing yet: what it came back to is still where it was.
                session = self._claimed
            if session is not None and reason in RECOVERABLE:
                sessions.keep(session)
                self._kept = session

    async def finish(self) -> None:
        """Leave the rooms, wait until what had come is handled, and call the `disconnect` handler. Run by the owner
        when the socket has ended."""
        name, context = self.namespace, self._namespace.context
        if self._kept is not None and context.spans_processes and context.runs_here:
            await self._share(self._kept, cast(Sessions, self._namespace.sessions))
        channels = [channel_of_all(name), *(channel_of(name, room) for room in self._rooms)]
        await self._namespace.unsubscribe(channels, self)
        worker = self._worker
        if worker is not None:
            try:
                _, unfinished = await asyncio.wait([worker], timeout=self._owner.grace)
            finally:
                worker.cancel()
            if unfinished:
                logger.warning("a handler of %r did not finish after its client had left", self.namespace)
                await asyncio.wait([worker])
        handler = self._namespace.on_disconnect
        if self._connected and handler is not None:
            try:
                async with asyncio.timeout(_LEAVE_TIME):
                    await handler.function(self, *[self.reason][: handler.most])
            except Exception:
                logger.exception("the disconnect handler of %r failed", self.namespace)


class _Pending:
    """An acknowledgement that is expected."""

    __slots__ = ("_timer", "answer", "callback")

    def __init__(
        self, callback: Callback | None, answer: "asyncio.Future[Any] | None", timer: asyncio.TimerHandle | None
    ) -> None:
        self.callback = callback
        self.answer = answer
        self._timer = timer

    def end(self, error: Exception | None) -> None:
        """It isn't waited for any more; who waits is told why."""
        if self._timer is not None:
            self._timer.cancel()
        if error is not None and self.answer is not None and not self.answer.done():
            self.answer.set_exception(error)
