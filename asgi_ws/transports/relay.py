"""Requests of a session that reach another process are carried to the one that has it, through the broker.

What travels are ASGI's own messages, both ways, so that whatever is asked of a session is asked of its owner as if the
request had come there. Few are on their way at a time, and a process that isn't heard of any more is given up.
"""

import asyncio
import contextlib
import logging
import secrets
import typing
from collections import OrderedDict, deque
from collections.abc import Coroutine
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_ws.exceptions import BrokerError
from asgi_ws.messages import INTERNAL, Publication
from asgi_ws.origins import user_id
from asgi_ws.payloads import Payload
from asgi_ws.tasks import Tasks

__all__ = ["Bus", "OwnerGone", "Relay"]

logger = logging.getLogger("asgi_ws")

_CHANNEL = f"{INTERNAL}relay:"
"""What the channel of a process begins with."""
_BEAT = 1.0
"""How often, in seconds, processes that have something to do with each other say that they live."""
_SILENCE = 4.0
"""After how many seconds without a word a process counts as dead."""
_ANSWER = 3.0
"""How many seconds a process has to take a request over."""
_WINDOW = 16
"""How many messages may be on their way in one direction of an exchange."""
_REMEMBERED = 1000
"""Of how many dead processes it is remembered that they are."""

_BEGIN, _TAKEN, _UNKNOWN, _MESSAGE, _HEARD, _END, _CANCEL, _ALIVE = range(8)


class OwnerGone(Exception):
    """The process that has the session is dead, can't be reached, or hasn't got it any more."""


class Bus(typing.Protocol):
    """What joins the processes."""

    async def publish(self, channel: str, payload: Payload) -> Any: ...

    async def subscribe(self, channel: str, subscriber: Any) -> Any: ...


class _Words(msgspec.Struct, array_like=True):
    """One thing that a process says to another."""

    source: str
    exchange: str
    kind: int
    data: dict[str, Any] | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Words)


class _Exchange:
    """One request, at either end: what has come from the other end, and how much may still be sent there."""

    def __init__(self, relay: "Relay", peer: str, name: str, disconnect: Message) -> None:
        self.peer = peer
        self.name = name
        self.task: asyncio.Task[None] | None = None
        self.taken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._relay = relay
        self._disconnect = disconnect
        self._messages: deque[Message] = deque()
        self._ended = False
        self._room = _WINDOW
        self._changed = asyncio.Event()

    def hear(self, words: _Words) -> None:
        """The other end has said something. Never waits, never raises."""
        if words.kind in (_TAKEN, _UNKNOWN):
            self.take(words.kind == _TAKEN)
        elif words.kind == _MESSAGE and words.data is not None and len(self._messages) < _WINDOW:
            self._messages.append(words.data)
        elif words.kind == _HEARD:
            self._room = min(self._room + 1, _WINDOW)
        elif words.kind in (_END, _CANCEL):
            self.end()
        self._changed.set()

    def take(self, known: bool) -> None:
        if not self.taken.done():  # nor cancelled, when it was waited for too long
            self.taken.set_result(known)

    def end(self) -> None:
        """Nothing comes any more, and nothing is taken."""
        self.take(False)
        self._ended = True
        self._changed.set()

    async def next(self) -> Message | None:
        """What the other end says next; `None` at its end."""
        while not self._messages:
            if self._ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        message = self._messages.popleft()
        await self._relay.tell(self, _HEARD)
        return message

    async def say(self, message: Message) -> None:
        """Send to the other end; waits while much is on its way. Raises `OSError` when nobody is there."""
        while not self._room and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        if self._ended:
            raise OSError("the client is gone")
        self._room -= 1
        try:
            await self._relay.tell(self, _MESSAGE, dict(message))
        except BrokerError as error:
            self.end()
            raise OSError("the client can't be reached") from error

    async def receive(self) -> Message:
        """ASGI's `receive`, where the session is."""
        try:
            message = await self.next()
        except BrokerError:
            self.end()
            message = None
        return self._disconnect if message is None else message


class Relay:
    """Carries requests between the processes that a bus joins, each of which has one.

    A session's id says where it is: `new_id` makes one, `own` says who serves it here. Ids are secrets of 192 bits.
    """

    def __init__(self, bus: Bus) -> None:
        self.node = secrets.token_hex(6)
        self._bus = bus
        self._apps: dict[str, ASGIApp] = {}
        self._exchanges: dict[str, _Exchange] = {}
        self._heard: dict[str, float] = {}
        self._dead: OrderedDict[str, None] = OrderedDict()
        self._tasks = Tasks()
        self._timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Listen to the others. Raises `BrokerError`."""
        await self._bus.subscribe(_CHANNEL + self.node, self)

    async def stop(self) -> None:
        """Give up what is under way."""
        if self._timer is not None:
            self._timer.cancel()
        for exchange in list(self._exchanges.values()):
            exchange.end()
        await self._tasks.cancel()

    def new_id(self) -> str:
        """An id for a session of this process."""
        return f"{secrets.token_urlsafe(24)}.{self.node}"

    def own(self, sid: str, app: ASGIApp) -> None:
        """Requests of this session are for `app`, until `disown`."""
        self._apps[sid] = app

    def disown(self, sid: str) -> None:
        """The end of that."""
        self._apps.pop(sid, None)

    def is_elsewhere(self, sid: str, scope: Scope) -> bool:
        """Whether another process may have the session."""
        node = sid.rpartition(".")[2]
        return "." in sid and node not in ("", self.node) and node not in self._dead and "asgi_ws.relayed" not in scope

    # The end where the client is

    async def carry(self, sid: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the request served by the process that has the session. Raises `OwnerGone`."""
        peer = sid.rpartition(".")[2]
        exchange = _Exchange(self, peer, secrets.token_hex(8), {})
        self._add(exchange)
        pump: asyncio.Task[None] | None = None
        try:
            await self.tell(exchange, _BEGIN, {"sid": sid, "scope": _flat(scope)})
            try:
                async with asyncio.timeout(_ANSWER):
                    known = await exchange.taken
            except TimeoutError:
                self._bury(peer)
                known = False
            if not known:
                raise OwnerGone
            pump = asyncio.create_task(_pump(exchange, receive), name="asgi_ws relay")
            answered = False
            while (message := await exchange.next()) is not None:
                answered = True
                await send(message)
            if not answered:
                raise OwnerGone
        except BrokerError as error:
            raise OwnerGone from error
        finally:
            self._remove(exchange)
            if pump is not None:
                pump.cancel()
                await asyncio.wait([pump])
            with contextlib.suppress(BrokerError):
                await self.tell(exchange, _CANCEL)

    # The end where the session is

    def push(self, publication: Publication) -> None:
        """Take what another process says. Called by the bus; never waits, never raises."""
        data = publication.payload.data
        try:
            words = _decoder.decode(data if isinstance(data, bytes) else data.encode())
        except ValueError:
            logger.warning("words of another process that can't be read were dropped")
            return
        self._heard[words.source] = asyncio.get_running_loop().time()
        self._dead.pop(words.source, None)
        exchange = self._exchanges.get(words.exchange)
        if words.kind == _BEGIN:
            self._begin(words)
        elif exchange is not None and exchange.peer == words.source:
            exchange.hear(words)

    def _begin(self, words: _Words) -> None:
        data = words.data or {}
        exchange = _Exchange(self, words.source, words.exchange, {})
        app = self._apps.get(data.get("sid", ""))
        try:
            scope = None if app is None else _unflat(data["scope"])
        except (KeyError, TypeError, ValueError):
            scope = None
        if app is None or scope is None or words.exchange in self._exchanges:
            self._start(self._refuse(exchange))
            return
        kind = scope["type"]
        exchange = _Exchange(
            self,
            words.source,
            words.exchange,
            {"type": "http.disconnect"} if kind == "http" else {"type": "websocket.disconnect", "code": 1006},
        )
        self._add(exchange)
        exchange.task = self._start(self._serve(exchange, app, scope))

    async def _refuse(self, exchange: _Exchange) -> None:
        with contextlib.suppress(BrokerError):
            await self.tell(exchange, _UNKNOWN)

    async def _serve(self, exchange: _Exchange, app: ASGIApp, scope: Scope) -> None:
        try:
            await self.tell(exchange, _TAKEN)
            await app(scope, exchange.receive, exchange.say)
        except (BrokerError, OSError) as error:
            logger.info("a client in another process can't be answered: %s", error)
        except Exception:
            logger.exception("a request from another process failed")
        finally:
            self._remove(exchange)
            with contextlib.suppress(BrokerError):
                await self.tell(exchange, _END)

    # Both

    async def tell(self, exchange: _Exchange, kind: int, data: dict[str, Any] | None = None) -> None:
        """Say something to the other end. Raises `BrokerError`."""
        await self._say(exchange.peer, _Words(self.node, exchange.name, kind, data))

    async def _say(self, peer: str, words: _Words) -> None:
        await self._bus.publish(_CHANNEL + peer, Payload("binary", _encoder.encode(words)))

    def _add(self, exchange: _Exchange) -> None:
        self._exchanges[exchange.name] = exchange
        self._heard[exchange.peer] = asyncio.get_running_loop().time()
        if self._timer is None:
            self._beat_later()

    def _remove(self, exchange: _Exchange) -> None:
        self._exchanges.pop(exchange.name, None)

    def _beat_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_BEAT, self._beat)

    def _beat(self) -> None:
        """Say to those who wait for us that we live, and give up those that don't."""
        self._timer = None
        now = asyncio.get_running_loop().time()
        peers = {exchange.peer for exchange in self._exchanges.values()}
        for peer in peers:
            if now - self._heard[peer] > _SILENCE:
                self._bury(peer)
            else:
                self._start(self._say_alive(peer))
        self._heard = {peer: moment for peer, moment in self._heard.items() if peer in peers}
        if self._exchanges:
            self._beat_later()

    async def _say_alive(self, peer: str) -> None:
        with contextlib.suppress(BrokerError):
            await self._say(peer, _Words(self.node, "", _ALIVE))

    def _bury(self, peer: str) -> None:
        """What a dead process has, nobody has."""
        self._dead[peer] = None
        while len(self._dead) > _REMEMBERED:
            self._dead.popitem(last=False)
        for exchange in list(self._exchanges.values()):
            if exchange.peer == peer:
                exchange.end()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._tasks.start(work, "asgi_ws relay")


async def _pump(exchange: _Exchange, receive: Receive) -> None:
    """Hand on what the client sends, until it is gone."""
    with contextlib.suppress(OSError):
        while True:
            message = await receive()
            await exchange.say(message)
            if message["type"].endswith(".disconnect"):
                return


_COPIED = ("type", "http_version", "method", "scheme", "path", "raw_path", "root_path", "query_string", "headers")


def _flat(scope: Scope) -> dict[str, Any]:
    """What travels of a scope."""
    flat = {name: scope[name] for name in _COPIED if name in scope}
    flat["client"] = scope.get("client")
    flat["server"] = scope.get("server")
    flat["subprotocols"] = list(scope.get("subprotocols") or ())
    flat["denial"] = "websocket.http.response" in (scope.get("extensions") or {})
    flat["user"] = user_id(scope)
    return flat


def _unflat(flat: dict[str, Any]) -> Scope:
    """A scope of what has travelled. Raises `KeyError`, `TypeError` or `ValueError` when it isn't one."""
    scope: dict[str, Any] = {name: flat[name] for name in _COPIED if name in flat}
    if scope["type"] not in ("http", "websocket") or not isinstance(scope["path"], str):
        raise ValueError(scope["type"])
    scope["headers"] = [(bytes(name), bytes(value)) for name, value in flat["headers"]]
    scope["query_string"] = bytes(flat["query_string"])
    scope["asgi"] = {"version": "3.0", "spec_version": "2.4"}
    for name in ("client", "server"):
        scope[name] = tuple(flat[name]) if flat.get(name) else None
    if scope["type"] == "websocket":
        scope["subprotocols"] = flat["subprotocols"]
        scope["extensions"] = {"websocket.http.response": {}} if flat["denial"] else {}
    if flat.get("user") is not None:
        scope["user"] = flat["user"]
    scope["state"] = {}
    scope["asgi_ws.relayed"] = True
    return scope
