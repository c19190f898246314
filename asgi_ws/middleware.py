"""The hook: what the hub has endpoints for is answered, everything else is passed on untouched."""

import contextlib
import logging
import sys
from collections.abc import Iterable
from typing import Any

from starlette.exceptions import WebSocketException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Match, Mount, Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_ws.context import Exchange
from asgi_ws.endpoints import PubSubEndpoint, current_app
from asgi_ws.hub import Hub
from asgi_ws.transports import (
    KINDS,
    CentrifugeTransport,
    EngineTransport,
    EventTransport,
    Kind,
    answer_preflight,
    is_preflight,
    wants_events,
)

__all__ = ["WebSocketMiddleware"]

logger = logging.getLogger("asgi_ws")

_PING_INTERVAL, _PING_TIMEOUT = 25.0, 20.0
"""An Engine.IO client can't do without pings, also where the limits say that none are to be sent."""


class WebSocketMiddleware:
    """Serves a hub's endpoints in front of any ASGI application, and starts and stops the hub with it.

    `app.add_middleware(WebSocketMiddleware, hub=hub)`, `Middleware(WebSocketMiddleware, hub=hub)` in a list, or
    `WebSocketMiddleware(app, hub=hub)`. Where the server or a test runs no lifespan, the hub starts with the first
    request. Put it as far out as can be: behind a middleware that wraps `send`, clients that read nothing can't be
    cut off.
    """

    def __init__(self, app: ASGIApp, hub: Hub) -> None:
        if not isinstance(hub, Hub):
            raise TypeError(f"hub={hub!r}: give the Hub that your endpoints are registered with")
        self.app = app
        self.hub = hub
        self._segments: set[str] = set()
        self._indexed = 0
        limits = hub.context.limits
        self.engine = EngineTransport(
            self._websocket,
            origins=hub.context.origins,
            # The largest message as base64, and its type.
            max_payload=None if limits.message_size is None else (limits.message_size + 2) // 3 * 4 + 1,
            ping_interval=limits.ping_interval or _PING_INTERVAL,
            ping_timeout=limits.ping_timeout or _PING_TIMEOUT,
            relay=lambda: hub.context.relay,
        )
        """What serves the endpoints to Engine.IO clients."""
        self.events = EventTransport(
            self._websocket, origins=hub.context.origins, ping_interval=limits.ping_interval or _PING_INTERVAL
        )
        """What serves them to clients that read server-sent events."""
        self.streams = CentrifugeTransport(
            self._websocket,
            origins=hub.context.origins,
            max_size=limits.message_size,
            relay=lambda: hub.context.relay,
        )
        """What serves those of `serve_pubsub` to clients that can't have a WebSocket."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        if not self.hub.running:
            await self.hub.__aenter__()
        engine_scope = self._for_engine(scope)
        if engine_scope is not None:
            await self.engine(engine_scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif self._may_serve(scope):
            await self._http(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    # WebSockets

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Also for endpoints that the application's own router calls, with something wrapped around `send`.
        exchange = scope.setdefault("asgi_ws", Exchange(receive, send))
        answer = _until_ended(exchange, scope)
        found = self._find(scope)
        try:
            if found is None:
                await self.app(scope, receive, answer)
            else:
                route, child_scope = found
                scope.update(child_scope, route=route)
                # Those of an application that this one is mounted in.
                scope.pop("starlette.exception_handlers", None)
                current_app.set(scope.get("app", self.app))
                # Before any dependency is asked.
                self.hub.context.admit(scope, exchange)
                await route.app(scope, receive, answer)
        except Exception as error:
            # What ended a connection that was served was answered and, where it was nobody's intention, logged; it
            # went on only for the dependencies to see.
            if not exchange.ended:
                if found is None:
                    raise
                await _answer(error, scope, receive, answer)
        finally:
            exchange.leave()

    def _find(self, scope: Scope) -> tuple[WebSocketRoute, Scope] | None:
        for route in self.hub.routes:
            match, child_scope = route.matches(scope)
            if match is Match.FULL:
                return route, dict(child_scope)
        return None

    # HTTP

    def _may_serve(self, scope: Scope) -> bool:
        """Whether some endpoint's path begins like the request's; the answer for most requests is a quick no."""
        if self._indexed != len(self.hub.routes):
            self._segments = {_first_segment(route.path) for route in self.hub.routes}
            self._indexed = len(self.hub.routes)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return _first_segment(path) in self._segments or "{" in self._segments or self.hub.has_endpoints_elsewhere

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application answers first: it may have a page at an endpoint's path."""
        stream = self._for_stream(scope)
        if stream is not None:
            kind, request = stream
            await self.streams(request, receive, send, kind)
            return
        handshake = {**scope, "type": "websocket"}
        if wants_events(scope) and self._is_endpoint(dict(handshake), scope.get("app", self.app)):
            await self.events(scope, receive, send)
            return
        replaced = False

        async def answer(message: Message) -> None:
            nonlocal replaced
            nothing_here = message["type"] == "http.response.start" and _has_no_page(scope, message["status"])
            if nothing_here and self._is_endpoint(handshake, scope.get("app", self.app)):
                replaced = True
                if is_preflight(scope):
                    await answer_preflight(scope, send, self.hub.context.origins, b"GET")
                else:
                    await _upgrade_required(scope)(scope, receive, send)
            elif not replaced:
                await send(message)

        await self.app(scope, receive, answer)

    def _is_endpoint(self, handshake: Scope, application: Any) -> bool:
        if self._find(handshake) is not None:
            return True
        return self.hub.has_endpoints_elsewhere and _has_websocket(getattr(application, "routes", ()), handshake)

    # Centrifuge's streams

    def _for_stream(self, scope: Scope) -> tuple[Kind, Scope] | None:
        """What a request below the path of an endpoint of `serve_pubsub` is, and the same request at its path."""
        path, _, last = scope["path"].rpartition("/")
        kind = next((kind for kind in KINDS if kind == last), None)
        if kind is None:
            return None
        raw_path = scope.get("raw_path", b"").removesuffix(b"/" + kind.encode())
        request = {**scope, "path": path or "/", "raw_path": raw_path or b"/"}
        found = self._find({**request, "type": "websocket"})
        return (kind, request) if found is not None and isinstance(found[0].app, PubSubEndpoint) else None

    # Engine.IO

    def _for_engine(self, scope: Scope) -> Scope | None:
        """The request of an Engine.IO client, at the path of the endpoint that it is for; its clients like to have a
        slash at the end."""
        query = scope.get("query_string", b"")
        # A poll that doesn't say its version is told so; a WebSocket without one is not of Engine.IO.
        if b"EIO=" not in query and (scope["type"] == "websocket" or b"transport=polling" not in query):
            return None
        if not self._may_serve(scope):
            return None
        for slash in ("", "/"):
            request = {**scope, "path": scope["path"].removesuffix(slash)}
            if self._is_endpoint({**request, "type": "websocket"}, scope.get("app", self.app)):
                return request
        return None

    # Start and stop

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the hub around the application's own lifespan, or, if it has none, in its place."""
        async with contextlib.AsyncExitStack() as stack:
            unheard = [await receive()]
            try:
                await stack.enter_async_context(self.hub)
                stack.push_async_callback(self.engine.aclose)
                stack.callback(self.events.stop)
                stack.callback(self.streams.stop)
            except Exception as error:
                await send({"type": "lifespan.startup.failed", "message": f"asgi_ws: {error}"})
                return
            spoke = False

            async def hear() -> Message:
                return unheard.pop() if unheard else await receive()

            async def speak(message: Message) -> None:
                nonlocal spoke
                spoke = True
                if message["type"] != "lifespan.startup.complete":
                    # Before the server hears of the end: it may not wait for anything else.
                    await stack.aclose()
                await send(message)

            try:
                await self.app(scope, hear, speak)
            except Exception as error:
                if spoke:
                    raise
                logger.info("the application has no lifespan (%r)", error)
            if not spoke:
                await send({"type": "lifespan.startup.complete"})
                await receive()
                await stack.aclose()
                await send({"type": "lifespan.shutdown.complete"})


# Answers


def _until_ended(exchange: Exchange, scope: Scope) -> Send:
    """A `send` for what frameworks answer to exceptions: an HTTP response where the server takes one for a handshake,
    a bare refusal where it doesn't, and nothing once the connection has been served."""
    denial = "websocket.http.response" in (scope.get("extensions") or {})

    async def send(message: Message) -> None:
        if exchange.ended:
            return
        if denial or not message["type"].startswith("websocket.http.response."):
            await exchange.send(message)
        elif message["type"] == "websocket.http.response.start":
            await exchange.send({"type": "websocket.close", "code": 1008})

    return send


async def _answer(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer to an exception before the handshake as the application does. Raises it where there is no answer."""

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    await ExceptionMiddleware(fail, _exception_handlers(current_app.get()))(scope, receive, send)


def _exception_handlers(application: Any) -> dict[Any, Any]:
    """The application's exception handlers, and ours where the framework's own would give the client no reason."""
    handlers: dict[Any, Any] = {WebSocketException: _refused_with_reason}
    if "fastapi" in sys.modules:
        from fastapi.exceptions import WebSocketRequestValidationError

        handlers[WebSocketRequestValidationError] = _refused_as_invalid
    for key, handler in (getattr(application, "exception_handlers", None) or {}).items():
        # 500 and Exception belong to the outermost middleware, and the framework's defaults aren't somebody's choice.
        of_framework = getattr(handler, "__module__", "").partition(".")[0] in ("fastapi", "starlette")
        if key not in (500, Exception) and not (of_framework and key in handlers):
            handlers[key] = handler
    return handlers


async def _refused_with_reason(conn: HTTPConnection, error: WebSocketException) -> Response:
    return PlainTextResponse(error.reason or "refused", 403)


async def _refused_as_invalid(conn: HTTPConnection, error: Any) -> Response:
    detail = [{key: part[key] for key in ("type", "loc", "msg") if key in part} for part in error.errors()]
    return JSONResponse({"detail": detail}, 403)


def _upgrade_required(scope: Scope) -> Response:
    """RFC 9110 section 15.5.22."""
    headers = {"Upgrade": "websocket", "Cache-Control": "no-store"}
    if scope.get("http_version", "1.1").startswith("1"):
        headers["Connection"] = "Upgrade"
    return PlainTextResponse("This is a WebSocket endpoint: connect to it with a WebSocket client.\n", 426, headers)


def _has_no_page(scope: Scope, status: int) -> bool:
    """Whether the application answered because it has nothing at this path for this method, not from a page of its
    own that is missing something."""
    return status == 405 or (status == 404 and not isinstance(scope.get("route"), Route))


def _has_websocket(routes: Iterable[BaseRoute], handshake: Scope) -> bool:
    """Whether a handshake would find a route of the application's own."""
    for route in routes:
        match, child_scope = route.matches(dict(handshake))
        if match is Match.FULL and (
            not isinstance(route, Mount) or _has_websocket(route.routes, {**handshake, **child_scope})
        ):
            return True
    return False


def _first_segment(path: str) -> str:
    segment = path.removeprefix("/").partition("/")[0]
    return "{" if "{" in segment else segment
