"""Engine.IO v4: polling, WebSockets, and the move from one to the other, as one ordinary `websocket` scope.

What another room needs to build on it:

- `EngineTransport(app, *, origins, max_payload, ping_interval, ping_timeout)` is an ASGI application that serves
  `?EIO=4&transport=polling|websocket` at whatever path it is called with, HTTP and WebSocket. `app` is called once for
  each session, with a `websocket` scope; it admits (`context.admit`, which counts it), accepts, and serves. Session ids
  are bound to the path, the page's origin and the user. `aclose` ends all sessions: call it before the hub stops.
- In that scope, `scope["asgi_ws.session"]` is an `EngineLink`, and so is the link of the extension `asgi_ws.link`: a
  `Connection` finds both by itself. `EngineLink.transport` is `"polling"` or `"websocket"`, as it is at the moment;
  `EngineLink.adapt(protocol)` is what the connection encodes with in the place of its own protocol: the same, as
  Engine.IO messages.
- So a protocol's payloads are *contents* of Engine.IO messages: what comes in is without the `4`, and what goes out
  gets it. A message of several packets, as Socket.IO's with attachments, is what `Protocol.encode` and
  `encode_publication` return as a `Frame(text, [binary, ...])`: nothing comes between them, by whatever transport.
- The scope's `query_string` is without `EIO`, `transport` and `sid`.
"""

import asyncio
import functools
import json
import logging
import secrets
from collections.abc import Callable
from typing import Literal
from urllib.parse import parse_qsl

from starlette.types import ASGIApp, Receive, Scope, Send

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.origins import OriginPolicy, user_id
from asgi_ws.tasks import Tasks
from asgi_ws.transports.base import (
    BodyTooLarge,
    ClientGone,
    Stopper,
    answer_preflight,
    answer_with,
    header,
    is_preflight,
    may_read,
    read_body,
    response_headers,
    websocket_scope,
    while_connected,
)
from asgi_ws.transports.engine_handshake import Handshake, Reader, Socket
from asgi_ws.transports.engine_link import EngineLink
from asgi_ws.transports.packets import (
    decode_body,
    decode_packet,
    open_packet,
)
from asgi_ws.transports.relay import OwnerGone, Relay
from asgi_ws.uvicorn import cut_off, find_link

__all__ = ["EngineLink", "EngineTransport"]

logger = logging.getLogger("asgi_ws")

_UPGRADE_TIME = 10.0
"""How many seconds a client may take from opening a WebSocket to moving there."""
_STOP_TIME = 1.0
"""How many seconds sessions have to end when the server stops."""
_QUERY_FIELDS = 100
_OWN_FIELDS = (b"EIO", b"transport", b"sid")

_UNKNOWN_TRANSPORT, _UNKNOWN_SESSION, _BAD_METHOD, _BAD_REQUEST, _FORBIDDEN, _UNKNOWN_VERSION = range(6)
_ERRORS = (
    "Transport unknown",
    "Session ID unknown",
    "Bad handshake method",
    "Bad request",
    "Forbidden",
    "Unsupported protocol version",
)


class _Refusal(Exception):
    """A request is answered with one of Engine.IO's errors."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.status = 403 if code == _FORBIDDEN else 400
        self.body = json.dumps({"code": code, "message": _ERRORS[code]}, separators=(",", ":")).encode()


class _Elsewhere(Exception):
    """Another process may have the session."""

    def __init__(self, relay: Relay, sid: str) -> None:
        super().__init__(sid)
        self.relay = relay
        self.sid = sid


class _Owner:
    """Where a session was begun, and by whom."""

    __slots__ = ("_origin", "_path", "_user")

    def __init__(self, scope: Scope) -> None:
        self._path = scope["path"].rstrip("/")
        self._origin = header(scope, b"origin")
        self._user = user_id(scope)

    def sends(self, scope: Scope) -> bool:
        """Whether another request comes from there, too."""
        origin = header(scope, b"origin")
        # A browser doesn't say it with a GET to the same origin: the first request that says it says it for all.
        self._origin = self._origin or origin
        return scope["path"].rstrip("/") == self._path and origin in ("", self._origin) and user_id(scope) == self._user


class EngineTransport:
    """Serves `app`, which takes websockets, to Engine.IO v4 clients at whatever path this is called with.

    `origins` says which pages may connect. `max_payload` bounds a request's body in bytes. A client that doesn't
    answer a ping for `ping_timeout` seconds is gone; pings are `ping_interval` seconds apart. `relay` is asked for what
    carries requests to the process that has their session, where there are several.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        origins: OriginPolicy,
        max_payload: int | None = 1_000_000,
        ping_interval: float = 25,
        ping_timeout: float = 20,
        relay: Callable[[], Relay | None] = lambda: None,
    ) -> None:
        self.app = app
        self.origins = origins
        self.max_payload = max_payload
        self.ping_interval = ping_interval
        self.ping_timeout = ping_timeout
        self._relay = relay
        self._sessions: dict[str, tuple[EngineLink, _Owner]] = {}
        self._tasks = Tasks()
        self._stopper = Stopper()

    @property
    def sessions(self) -> int:
        """How many are open."""
        return len(self._sessions)

    async def aclose(self) -> None:
        """End all sessions, as when the server stops."""
        links = [link for link, _ in self._sessions.values()]
        for link in links:
            link.server_stopping()
            if link.transport == "polling" and not link.session.polled:
                # No other poll will come.
                link.abort()
        if self._tasks or links:
            await asyncio.wait([*self._tasks, *(link.ended for link in links)], timeout=_STOP_TIME)
        for link in links:
            link.abort()
        await self._tasks.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_preflight(scope):
            await answer_preflight(scope, send, self.origins, b"GET, POST")
            return
        try:
            fields = _fields(scope)
            if scope["type"] == "websocket":
                await self._websocket(fields, scope, receive, send)
            else:
                await self._http(fields, scope, receive, send)
        except _Elsewhere as elsewhere:
            try:
                await elsewhere.relay.carry(elsewhere.sid, scope, receive, send)
            except OwnerGone:
                await self._refuse(_Refusal(_UNKNOWN_SESSION), scope, receive, send)
        except _Refusal as refusal:
            await self._refuse(refusal, scope, receive, send)
        except ClientGone:
            # There is nobody to answer.
            pass

    async def _refuse(self, refusal: _Refusal, scope: Scope, receive: Receive, send: Send) -> None:
        headers = response_headers(scope, self.origins, b"application/json")
        if scope["type"] == "http":
            await answer_with(send, refusal.status, headers, refusal.body)
            return
        await receive()
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": 1008})
            return
        headers.append((b"content-length", str(len(refusal.body)).encode()))
        await send({"type": "websocket.http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": refusal.body})

    def _find(self, fields: dict[str, str], scope: Scope) -> EngineLink | None:
        """The session that a request names, where it names one. Raises `_Refusal` for whatever is wrong with it."""
        transport = fields.get("transport")
        if transport not in ("polling", "websocket"):
            raise _Refusal(_UNKNOWN_TRANSPORT)
        if fields.get("EIO") != "4":
            raise _Refusal(_UNKNOWN_VERSION)
        if "j" in fields:
            # JSONP: no page of our time needs it, and it lets any page read.
            raise _Refusal(_BAD_REQUEST)
        if not may_read(scope, self.origins):
            raise _Refusal(_FORBIDDEN)
        sid = fields.get("sid")
        if sid is None:
            return None
        found = self._sessions.get(sid)
        if found is None:
            relay = self._relay()
            if relay is not None and relay.is_elsewhere(sid, scope):
                raise _Elsewhere(relay, sid)
            raise _Refusal(_UNKNOWN_SESSION)
        link, owner = found
        if not owner.sends(scope):
            raise _Refusal(_FORBIDDEN)
        return link

    # HTTP

    async def _http(self, fields: dict[str, str], scope: Scope, receive: Receive, send: Send) -> None:
        link = self._find(fields, scope)
        if link is None and scope["method"] != "GET":
            raise _Refusal(_BAD_METHOD)
        if fields["transport"] != "polling":
            raise _Refusal(_BAD_REQUEST)
        if link is None:
            await self._open(scope, receive, send)
        elif link.transport != "polling":
            raise _Refusal(_BAD_REQUEST)
        elif scope["method"] == "GET":
            await self._poll(link, scope, receive, send)
        elif scope["method"] == "POST":
            await self._post(link, scope, receive, send)
        else:
            raise _Refusal(_BAD_METHOD)

    async def _open(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Begin a session, and answer with what the application says to it."""
        link = self._new_link("polling")
        handshake = Handshake(link, functools.partial(self._begin, _Owner(scope)))
        self._tasks.start(self._serve(handshake, scope), "asgi_ws session")
        async with while_connected(receive, handshake.client_gone):
            await asyncio.wait([handshake.answered])
        status, headers, body = handshake.answered.result()
        content_type = next((value for name, value in headers if name.lower() == b"content-type"), b"text/plain")
        own = response_headers(scope, self.origins, content_type)
        names = {name for name, _ in own} | {b"content-length"}
        headers = [(name, value) for name, value in headers if name.lower() not in names]
        await answer_with(send, status, own + headers, body)

    async def _serve(self, handshake: Handshake, scope: Scope) -> None:
        link = handshake.link
        code = 1011
        try:
            await self.app(websocket_scope(_without_own_fields(scope), link, link), handshake.receive, handshake.send)
            code = 1000
        except Exception:
            logger.exception("a session at %r failed", scope["path"])
        finally:
            handshake.finished()
            await link.leave(code)

    async def _poll(self, link: EngineLink, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            link.session.begin_poll()
        except InvalidMessage as error:
            link.violated(error)
            raise _Refusal(_BAD_REQUEST) from None
        answered = False
        try:
            if link.idle:
                await link.something(receive)
            body = link.take()
            link.cut = functools.partial(cut_off, send)
            headers = response_headers(scope, self.origins, b"text/plain; charset=UTF-8")
            await answer_with(send, 200, headers, body, link.session.sending)
            answered = True
        except OSError:
            raise ClientGone from None
        finally:
            if not answered:
                # What it would have said is lost.
                link.lose()
            link.poll_answered()

    async def _post(self, link: EngineLink, scope: Scope, receive: Receive, send: Send) -> None:
        if link.posting or header(scope, b"content-type").startswith("application/octet-stream"):
            link.violated(InvalidMessage("one request with packets at a time, and as text", 1002))
            raise _Refusal(_BAD_REQUEST)
        link.posting = True
        headers = response_headers(scope, self.origins, b"text/plain; charset=UTF-8")
        try:
            body = await read_body(receive, self.max_payload)
            for packet in decode_body(body):
                if link.paused:
                    async with while_connected(receive, link.lose):
                        await link.room()
                link.packet_received(packet)
        except ClientGone:
            link.lose()
        except BodyTooLarge:
            await answer_with(send, 413, headers, b"")
        except TimeoutError:
            link.violated(InvalidMessage("the body took too long", 1008))
            await answer_with(send, 408, headers, b"")
        except InvalidMessage as error:
            link.violated(error)
            raise _Refusal(_BAD_REQUEST) from None
        else:
            await answer_with(send, 200, headers, b"ok")
        finally:
            link.posting = False

    # WebSockets

    async def _websocket(self, fields: dict[str, str], scope: Scope, receive: Receive, send: Send) -> None:
        link = self._find(fields, scope)
        if fields["transport"] != "websocket":
            raise _Refusal(_BAD_REQUEST)
        if link is None:
            await self._serve_socket(scope, receive, send)
        elif link.transport != "polling" or link.probing:
            raise _Refusal(_BAD_REQUEST)
        else:
            await self._upgrade(link, scope, receive, send)

    async def _serve_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        link = self._new_link("websocket")
        reader = Reader(link, receive)
        socket = Socket(link, functools.partial(self._begin, _Owner(scope)), scope, reader, send)
        denial = "websocket.http.response" in (scope.get("extensions") or {})
        inner = websocket_scope(_without_own_fields(scope), link, link, denial=denial)
        code = 1011
        try:
            await self.app(inner, socket.receive, socket.send)
            code = 1000
        finally:
            await link.leave(code)
            await reader.leave()

    async def _upgrade(self, link: EngineLink, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the client try a WebSocket, and go on there."""
        # No await stands between this and the check of it.
        link.probing = True
        try:
            async with asyncio.timeout(_UPGRADE_TIME):
                await _probe(link, receive, send)
        except (InvalidMessage, TimeoutError):
            await send({"type": "websocket.close", "code": 1002})
            return
        except OSError:
            raise ClientGone from None
        finally:
            link.probing = False
            link.session.give_up_upgrade()
        reader = Reader(link, receive)
        try:
            # Nor here: what comes next finds the session moved.
            link.move(find_link(send, scope.get("extensions")), reader.start)
            self._stopper.discard(link)
            await asyncio.wait([link.ended])
            await link.farewell()
        finally:
            link.lose()
            await reader.leave()

    # Sessions

    def _new_link(self, transport: Literal["polling", "websocket"]) -> EngineLink:
        relay = self._relay()
        sid = secrets.token_urlsafe(24) if relay is None else relay.new_id()
        return EngineLink(sid, transport, self._forget)

    def _forget(self, link: EngineLink) -> None:
        self._sessions.pop(link.sid, None)
        relay = self._relay()
        if relay is not None:
            relay.disown(link.sid)
        self._stopper.discard(link)

    def _begin(self, owner: _Owner, link: EngineLink) -> str:
        """The client has been let in: from here on it can name its session. What it is told first."""
        self._sessions[link.sid] = link, owner
        relay = self._relay()
        if relay is not None:
            relay.own(link.sid, self)
        if link.transport == "polling":
            # A WebSocket's server says so itself.
            self._stopper.add(link)
        link.start(self.ping_interval, self.ping_timeout)
        values = {
            "sid": link.sid,
            "upgrades": ["websocket"] if link.transport == "polling" else [],
            "pingInterval": round(self.ping_interval * 1000),
            "pingTimeout": round(self.ping_timeout * 1000),
        }
        return open_packet(values if self.max_payload is None else {**values, "maxPayload": self.max_payload})


def _fields(scope: Scope) -> dict[str, str]:
    query = scope["query_string"].decode("latin-1")
    fields = query.split("&")
    if len(fields) <= _QUERY_FIELDS and "%" not in query and "+" not in query:
        # What clients send; the same as below, in a fraction of the time.
        return {name: value for name, _, value in (field.partition("=") for field in fields) if name}
    try:
        return dict(parse_qsl(query, keep_blank_values=True, max_num_fields=_QUERY_FIELDS))
    except ValueError:
        raise _Refusal(_BAD_REQUEST) from None


def _without_own_fields(scope: Scope) -> Scope:
    """The request as the application is to see it; the session's secret is none of its business."""
    fields = [field for field in scope["query_string"].split(b"&") if field.partition(b"=")[0] not in _OWN_FIELDS]
    return {**scope, "query_string": b"&".join(fields)}


async def _probe(link: EngineLink, receive: Receive, send: Send) -> None:
    """Return when the client moves to a WebSocket that it tries. Raises `InvalidMessage` for a wrong word, and
    `ClientGone`."""
    if (await receive())["type"] != "websocket.connect":
        raise ClientGone
    await send({"type": "websocket.accept"})
    while True:
        message = await receive()
        if message["type"] != "websocket.receive":
            raise ClientGone
        if link.ended.done():
            raise InvalidMessage("the session is over", 1002)
        text = message.get("text")
        answer = link.probe(decode_packet(message["bytes"] if text is None else text))
        if answer is None:
            return
        await send({"type": "websocket.send", "text": answer})
