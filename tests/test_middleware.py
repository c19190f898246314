"""The hook in front of an application: what it answers, what it leaves alone, how it starts and stops the hub."""

import logging
import sys
import typing

import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, SimpleUser
from starlette.exceptions import HTTPException, WebSocketException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from asgi_ws import Connection, ConnectionClosed, Hub, Limits, WebSocketMiddleware
from asgi_ws.brokers import MemoryBroker
from asgi_ws.testing import Refused, connect, request

pytestmark = pytest.mark.anyio


@pytest.fixture
def hub() -> Hub:
    hub = Hub()

    @hub.websocket("/chat/{room}")
    async def chat(conn: Connection, room: str) -> None:
        await conn.subscribe(f"chat:{room}")
        async for text in conn:
            await conn.publish(f"chat:{room}", text)

    return hub


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that knows HTTP alone."""
    if scope["type"] != "http":
        raise AssertionError(scope["type"])
    await PlainTextResponse("not here", 404)(scope, receive, send)


def in_starlette(hub: Hub) -> ASGIApp:
    app = Starlette()
    app.add_middleware(WebSocketMiddleware, hub=hub)
    return app


def in_list(hub: Hub) -> ASGIApp:
    return Starlette(middleware=[Middleware(WebSocketMiddleware, hub=hub)])


def in_fastapi(hub: Hub) -> ASGIApp:
    app = FastAPI()
    app.add_middleware(WebSocketMiddleware, hub=hub)
    return app


def around_bare(hub: Hub) -> ASGIApp:
    return WebSocketMiddleware(bare, hub=hub)


def around_fastapi(hub: Hub) -> ASGIApp:
    return WebSocketMiddleware(FastAPI(), hub=hub)


@pytest.mark.parametrize("make", [in_starlette, in_list, in_fastapi, around_bare, around_fastapi])
async def test_the_chat_works_in_front_of_any_application(make: typing.Callable[[Hub], ASGIApp], hub: Hub) -> None:
    app = make(hub)
    async with connect(app, "/chat/lobby") as ann, connect(app, "/chat/lobby") as bob:
        await ann.send("hello")
        assert await bob.receive() == "hello"
        assert await ann.receive() == "hello"
    assert not hub.running


async def test_it_works_in_an_application_that_is_mounted_below_a_path(hub: Hub) -> None:
    app = Starlette(routes=[Mount("/sub", in_starlette(hub))])
    async with connect(app, "/sub/chat/lobby") as client:
        await client.send("hello")
        assert await client.receive() == "hello"
    assert (await request(app, "GET", "/sub/chat/lobby")).status_code == 426
    with pytest.raises(Refused):
        async with connect(app, "/chat/lobby"):
            pass


def test_a_hub_must_be_given() -> None:
    with pytest.raises(TypeError, match="hub="):
        WebSocketMiddleware(bare, hub="memory://")  # type: ignore[arg-type]


async def test_what_the_hub_has_no_endpoint_for_reaches_the_application(hub: Hub) -> None:
    async def own(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(str(websocket.url_for("own")))
        await websocket.close(4000)

    app = Starlette(routes=[WebSocketRoute("/own", own, name="own")])
    app.add_middleware(WebSocketMiddleware, hub=hub)
    async with connect(app, "/own") as client:
        assert await client.receive() == "ws://testserver/own"
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
    assert closed.value.code == 4000
    with pytest.raises(Refused) as refused:
        async with connect(app, "/nothing"):
            pass
    assert refused.value.status_code == 403


async def test_two_hubs_serve_one_application(hub: Hub) -> None:
    other = Hub()

    @other.websocket("/other")
    async def greet(conn: Connection) -> None:
        await conn.send("other")

    app = Starlette()
    app.add_middleware(WebSocketMiddleware, hub=hub)
    app.add_middleware(WebSocketMiddleware, hub=other)
    async with connect(app, "/other") as client, connect(app, "/chat/a") as ann:
        assert await client.receive() == "other"
        await ann.send("hello")
        assert await ann.receive() == "hello"


# HTTP


async def page(request: Request) -> Response:
    return PlainTextResponse(f"page {request.path_params.get('room', '')}")


async def missing(request: Request) -> Response:
    return PlainTextResponse("no such room", 404)


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "DELETE"])
async def test_plain_http_to_an_endpoint_is_told_to_upgrade(method: str, hub: Hub) -> None:
    for app in (in_starlette(hub), in_fastapi(hub), around_bare(hub)):
        response = await request(app, method, "/chat/lobby")
        assert response.status_code == 426
        assert response.headers["upgrade"] == "websocket"
        assert response.headers["connection"] == "Upgrade"
        assert "WebSocket endpoint" in response.text


async def test_http_routes_of_the_application_are_untouched(hub: Hub) -> None:
    app = Starlette(
        routes=[
            Route("/chat/{room}", page),
            Route("/chats", page),
            Route("/", page),
            Mount("/rooms", Starlette(routes=[Route("/{room}", missing)])),
        ]
    )
    app.add_middleware(WebSocketMiddleware, hub=hub)

    @hub.websocket("/rooms/{room}")
    async def rooms(conn: Connection, room: str) -> None: ...

    assert (await request(app, "GET", "/chat/lobby")).text == "page lobby"
    assert (await request(app, "GET", "/chats")).text == "page "
    assert (await request(app, "GET", "/")).text == "page "
    # The page exists, and what it says is missing is something else.
    assert (await request(app, "GET", "/rooms/a")).text == "no such room"
    assert (await request(app, "GET", "/nothing")).status_code == 404
    assert (await request(app, "GET", "/chat/lobby/no")).status_code == 404
    # There is a page, but not for this method.
    assert (await request(app, "POST", "/chat/lobby")).status_code == 426


async def test_an_endpoint_whose_path_begins_with_a_parameter_is_found_by_http(hub: Hub) -> None:
    @hub.websocket("/{anything}")
    async def anything(conn: Connection, anything: str) -> None: ...

    app = in_starlette(hub)
    assert (await request(app, "GET", "/something")).status_code == 426
    assert (await request(app, "GET", "/some/thing")).status_code == 404


async def test_http_2_has_no_connection_header(hub: Hub) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "http", "http_version": "2", "method": "GET", "path": "/chat/a", "headers": []}
    async with hub:
        await around_bare(hub)(scope, receive, send)
    names = {name for name, _ in sent[0]["headers"]}
    assert sent[0]["status"] == 426
    assert b"upgrade" in names
    assert b"connection" not in names


# Refusals


async def refuse_401(conn: Connection) -> None:
    raise HTTPException(401, "who are you?", headers={"WWW-Authenticate": "Bearer"})


async def test_a_hook_sees_every_connection_and_refuses_with_a_real_answer(hub: Hub) -> None:
    seen = []

    @hub.on_connect
    async def see(conn: Connection) -> None:
        seen.append(conn.path_params["room"])

    hub.on_connect(refuse_401)
    for app in (in_starlette(hub), in_fastapi(hub), around_bare(hub)):
        with pytest.raises(Refused) as refused:
            async with connect(app, "/chat/lobby"):
                pass
        assert refused.value.status_code == 401
        assert refused.value.headers["www-authenticate"] == "Bearer"
        assert "who are you?" in refused.value.text
        assert "401" in str(refused.value)
    assert seen == ["lobby"] * 3


async def test_a_handler_that_accepts_by_itself_may_refuse(hub: Hub) -> None:
    @hub.websocket("/own", accept=False)
    async def own(conn: Connection) -> None:
        await refuse_401(conn)

    with pytest.raises(Refused) as refused:
        async with connect(in_fastapi(hub), "/own"):
            pass
    assert refused.value.status_code == 401
    assert refused.value.json() == {"detail": "who are you?"}


async def test_a_websocket_exception_before_the_handshake_is_a_403_with_its_reason(hub: Hub) -> None:
    @hub.on_connect
    async def refuse(conn: Connection) -> None:
        raise WebSocketException(4003, "" if "quiet" in conn.query_params else "not you")

    for app in (in_starlette(hub), in_fastapi(hub)):
        with pytest.raises(Refused) as refused:
            async with connect(app, "/chat/lobby"):
                pass
        assert (refused.value.status_code, refused.value.text) == (403, "not you")
        with pytest.raises(Refused) as refused:
            async with connect(app, "/chat/lobby?quiet"):
                pass
        assert (refused.value.status_code, refused.value.text) == (403, "refused")


async def test_refusals_are_answered_where_fastapi_was_never_imported(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.on_connect(refuse_401)
    monkeypatch.delitem(sys.modules, "fastapi")
    with pytest.raises(Refused) as refused:
        async with connect(in_starlette(hub), "/chat/lobby"):
            pass
    assert (refused.value.status_code, refused.value.text) == (401, "who are you?")


class TooManyCooks(Exception):
    pass


async def test_the_applications_own_exception_handlers_answer(hub: Hub) -> None:
    @hub.on_connect
    async def cook(conn: Connection) -> None:
        raise TooManyCooks

    async def too_many(conn: HTTPConnection, error: Exception) -> Response:
        return JSONResponse({"cooks": "too many"}, 429)

    async def internal(conn: HTTPConnection, error: Exception) -> Response:
        raise AssertionError("belongs to the outermost middleware")

    app = Starlette(exception_handlers={TooManyCooks: too_many, Exception: internal, 500: internal})
    app.add_middleware(WebSocketMiddleware, hub=hub)
    with pytest.raises(Refused) as refused:
        async with connect(app, "/chat/lobby"):
            pass
    assert refused.value.status_code == 429
    assert refused.value.json() == {"cooks": "too many"}


async def test_an_error_before_the_handshake_is_the_servers_to_report(hub: Hub) -> None:
    @hub.on_connect
    async def fail(conn: Connection) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        async with connect(in_starlette(hub), "/chat/lobby"):
            pass


async def test_a_server_without_denial_responses_refuses_with_403(hub: Hub) -> None:
    hub.on_connect(refuse_401)
    app = in_starlette(hub)

    async def old_server(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            scope["extensions"] = None
        await app(scope, receive, send)

    with pytest.raises(Refused) as refused:
        async with connect(old_server, "/chat/lobby"):
            pass
    assert refused.value.status_code == 403


async def test_a_page_of_another_origin_is_refused_before_any_dependency(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    app = FastAPI()
    app.add_middleware(WebSocketMiddleware, hub=hub)

    async def asked() -> None:
        raise AssertionError

    @hub.websocket("/private")
    async def private(conn: Connection, asked: typing.Annotated[None, Depends(asked)]) -> None: ...

    with pytest.raises(Refused) as refused:
        async with connect(app, "/private", headers={"origin": "http://evil.example\x1b[31m"}):
            pass
    assert refused.value.status_code == 403
    assert "allowed_origins" in caplog.text
    assert "\x1b" not in caplog.text


async def test_pages_of_the_same_origin_and_other_programs_connect(hub: Hub) -> None:
    app = in_starlette(hub)
    for headers in ({}, {"origin": "http://testserver"}, {"origin": "http://TESTSERVER:80"}):
        async with connect(app, "/chat/lobby", headers=headers):
            pass


async def test_connections_in_all_and_of_an_address_are_limited() -> None:
    for limits in (Limits(connections=2), Limits(connections_per_address=2)):
        hub = Hub(limits=limits)

        @hub.websocket("/")
        async def listen(conn: Connection) -> None:
            await conn.receive()

        app = in_starlette(hub)
        async with connect(app, "/"):
            async with connect(app, "/"):
                with pytest.raises(Refused) as refused:
                    async with connect(app, "/"):
                        pass
                assert refused.value.status_code == 503
                assert int(refused.value.headers["retry-after"]) > 0
            async with connect(app, "/"):
                pass
        assert not hub.context.connections._addresses


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("192.0.2.1", 1), ("192.0.2.1", 2), True),
        (("192.0.2.1", 1), ("192.0.2.2", 1), False),
        (("2001:db8::1", 1), ("2001:db8::ffff", 1), True),
        (("2001:db8::1", 1), ("2001:db8:0:1::1", 1), False),
        (("::ffff:192.0.2.1", 1), ("192.0.2.1", 1), True),
        (("not:an:address", 1), ("not:an:address", 1), True),
        (None, None, True),
    ],
)
async def test_an_address_is_counted_by_its_network(one: typing.Any, other: typing.Any, same: bool) -> None:
    hub = Hub(limits=Limits(connections_per_address=1))

    @hub.websocket("/")
    async def listen(conn: Connection) -> None:
        await conn.receive()

    app = in_starlette(hub)

    async def from_one(scope: Scope, receive: Receive, send: Send) -> None:
        scope["client"] = one
        await app(scope, receive, send)

    async def from_other(scope: Scope, receive: Receive, send: Send) -> None:
        scope["client"] = other
        await app(scope, receive, send)

    async with hub, connect(from_one, "/", lifespan=False):
        if same:
            with pytest.raises(Refused):
                async with connect(from_other, "/", lifespan=False):
                    pass
        else:
            async with connect(from_other, "/", lifespan=False):
                pass


# What is around it


async def test_the_user_and_the_state_of_outer_middleware_are_there(hub: Hub) -> None:
    @hub.websocket("/me")
    async def me(conn: Connection) -> None:
        await conn.send(f"{conn.user.display_name} {conn.state.color} {conn.state.from_lifespan}")

    class Around:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                scope["state"]["from_lifespan"] = "yes"
            else:
                scope["user"], scope["auth"] = SimpleUser("ann"), AuthCredentials()
                scope["state"]["color"] = "green"
            await self.app(scope, receive, send)

    app = Around(in_starlette(hub))
    async with connect(app, "/me") as client:
        assert await client.receive() == "ann green yes"


# Start and stop


async def test_the_hub_runs_around_the_applications_lifespan(hub: Hub) -> None:
    seen = []

    async def lifespan(app: Starlette) -> typing.AsyncIterator[None]:
        seen.append(hub.running)
        await hub.publish("a", "started")
        yield
        seen.append(hub.running)
        await hub.publish("a", "stopping")

    from contextlib import asynccontextmanager

    app = Starlette(lifespan=asynccontextmanager(lifespan))
    app.add_middleware(WebSocketMiddleware, hub=hub)
    async with connect(app, "/chat/lobby"):
        assert hub.running
    assert seen == [True, True]
    assert not hub.running


class BrokenBroker(MemoryBroker):
    async def start(self, *arguments: typing.Any) -> None:
        raise OSError("no broker there")


async def test_a_broker_that_isnt_there_stops_the_startup() -> None:
    app = in_starlette(Hub(BrokenBroker()))
    with pytest.raises(RuntimeError, match="asgi_ws: no broker there"):
        async with connect(app, "/"):
            pass


async def test_an_application_that_fails_to_start_fails_as_without_the_hub(hub: Hub) -> None:
    async def lifespan(app: Starlette) -> typing.AsyncIterator[None]:
        raise ValueError("no database")
        yield

    from contextlib import asynccontextmanager

    app = Starlette(lifespan=asynccontextmanager(lifespan))
    app.add_middleware(WebSocketMiddleware, hub=hub)
    with pytest.raises(RuntimeError, match="no database"):
        async with connect(app, "/chat/lobby"):
            pass
    assert not hub.running


async def test_an_application_that_returns_from_its_lifespan_has_none(hub: Hub) -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] in ("lifespan", "websocket")

    async with connect(WebSocketMiddleware(silent, hub=hub), "/chat/lobby") as client:
        assert hub.running
        await client.send("hello")
        assert await client.receive() == "hello"
    assert not hub.running


async def test_an_application_without_a_lifespan_is_said_to_have_none(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "asgi_ws")
    async with connect(around_bare(hub), "/chat/lobby"):
        pass
    assert "no lifespan" in caplog.text


async def test_without_a_lifespan_the_hub_starts_with_the_first_request(hub: Hub) -> None:
    async def publish(request: Request) -> Response:
        return JSONResponse({"position": (await hub.publish("a", "x")) is not None})

    app = Starlette(routes=[Route("/publish", publish)])
    app.add_middleware(WebSocketMiddleware, hub=hub)
    assert (await request(app, "GET", "/publish", lifespan=False)).json() == {"position": True}
    async with connect(app, "/chat/lobby", lifespan=False) as client:
        await client.send("hello")
        assert await client.receive() == "hello"
    await hub.__aexit__()


def test_starlettes_test_client_works_with_and_without_with(hub: Hub) -> None:
    app = in_starlette(hub)
    with TestClient(app) as client:
        with client.websocket_connect("/chat/a") as ann, client.websocket_connect("/chat/a") as bob:
            ann.send_text("hello")
            assert bob.receive_text() == "hello"
            assert ann.receive_text() == "hello"
        assert client.get("/chat/a").status_code == 426
    client = TestClient(app)
    for _ in range(2):
        with client.websocket_connect("/chat/a") as ann:
            ann.send_text("hello")
            assert ann.receive_text() == "hello"
    with pytest.raises(WebSocketDenialResponse), client.websocket_connect("/chat/a", headers={"origin": "http://x.y"}):
        pass
