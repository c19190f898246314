"""From the request to the accepted connection, or to the answer that it is refused with."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Annotated, Any

import pytest
import websockets
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from asgi_ws import Connection, Hub, WebSocketMiddleware
from tests.e2e.clients import accept_for, connect, get, raw
from tests.servers import SERVERS, UVICORN, Address, serve_with

pytestmark = pytest.mark.anyio

each_server = pytest.mark.parametrize("server", SERVERS)


# The chat, in front of everything


async def chat(conn: Connection, room: str) -> None:
    await conn.subscribe(f"chat:{room}")
    async for text in conn:
        await conn.publish(f"chat:{room}", text)


def chat_hub() -> Hub:
    hub = Hub()
    hub.websocket("/chat/{room}")(chat)
    return hub


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


def in_fastapi() -> ASGIApp:
    app = FastAPI()
    app.add_middleware(WebSocketMiddleware, hub=chat_hub())
    app.add_route("/hello", hello)
    return app


def in_starlette_added() -> ASGIApp:
    app = Starlette(routes=[Route("/hello", hello)])
    app.add_middleware(WebSocketMiddleware, hub=chat_hub())
    return app


def in_starlette_listed() -> ASGIApp:
    return Starlette(routes=[Route("/hello", hello)], middleware=[Middleware(WebSocketMiddleware, hub=chat_hub())])


def in_front_of_a_callable() -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        found = scope["path"].removeprefix(scope["root_path"]) == "/hello"
        response = PlainTextResponse("hello") if found else PlainTextResponse("nothing", 404)
        await response(scope, receive, send)

    return WebSocketMiddleware(app, hub=chat_hub())


def in_fastapi_router() -> ASGIApp:
    hub = Hub()
    router = APIRouter(prefix="/chat")
    router.websocket("/{room}")(hub.endpoint(chat))
    app = FastAPI()
    app.include_router(router)
    app.add_route("/hello", hello)
    app.add_middleware(WebSocketMiddleware, hub=hub)
    return app


def in_starlette_route() -> ASGIApp:
    hub = Hub()
    return Starlette(
        routes=[Route("/hello", hello), WebSocketRoute("/chat/{room}", hub.endpoint(chat))],
        middleware=[Middleware(WebSocketMiddleware, hub=hub)],
    )


def mounted() -> ASGIApp:
    return Starlette(routes=[Mount("/below", app=in_fastapi())])


def mounted_callable() -> ASGIApp:
    return Starlette(routes=[Mount("/below", app=in_front_of_a_callable())])


FRONTS: dict[Callable[[], ASGIApp], str] = {
    in_fastapi: "",
    in_starlette_added: "",
    in_starlette_listed: "",
    in_front_of_a_callable: "",
    in_fastapi_router: "",
    in_starlette_route: "",
    mounted: "/below",
    mounted_callable: "/below",
}


@pytest.mark.parametrize(
    ("server", "front"),
    [
        *((SERVERS[0], front) for front in FRONTS),
        *((server, front) for server in SERVERS[1:] for front in (in_fastapi, in_front_of_a_callable, mounted)),
    ],
)
async def test_the_chat_runs_in_front_of_every_application(server: str, front: Callable[[], ASGIApp]) -> None:
    below = FRONTS[front]
    async with serve_with(server, front()) as address:
        async with (
            connect(f"{address.ws}{below}/chat/lobby") as ann,
            connect(f"{address.ws}{below}/chat/lobby") as bob,
            connect(f"{address.ws}{below}/chat/kitchen") as eve,
        ):
            await eve.send("only here")
            assert await eve.recv() == "only here"
            # Bob has subscribed when his own message has come back.
            await bob.send("hello")
            assert await bob.recv() == "hello"
            await ann.send("grüße 👋")
            assert await bob.recv() == "grüße 👋"
            assert (await ann.recv(), await ann.recv()) == ("hello", "grüße 👋")
        answer = await get(f"{address.http}{below}/hello")
        assert (answer.status_code, answer.text) == (200, "hello")
        assert (await get(f"{address.http}{below}/nothing")).status_code == 404


@each_server
async def test_response_is_101_with_the_key_that_the_rfc_asks_for(server: str) -> None:
    async with serve_with(server, in_fastapi()) as address:
        async with raw(address.port, "/chat/lobby", key="dGhlIHNhbXBsZSBub25jZQ==") as client:
            assert client.status == 101
            assert client.header("Sec-WebSocket-Accept") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
            assert (client.header("Upgrade") or "").lower() == "websocket"
            assert (client.header("Connection") or "").lower() == "upgrade"
            assert client.header("Sec-WebSocket-Protocol") is None
        async with raw(address.port, "/chat/lobby", key="MTIzNDU2Nzg5MDEyMzQ1Ng==") as client:
            assert client.header("Sec-WebSocket-Accept") == accept_for("MTIzNDU2Nzg5MDEyMzQ1Ng==")


@each_server
async def test_client_that_has_agreed_on_compression_understands_everything(server: str) -> None:
    async with (
        serve_with(server, in_fastapi()) as address,
        connect(f"{address.ws}/chat/lobby", compression="deflate") as ann,
        connect(f"{address.ws}/chat/lobby") as bob,
    ):
        assert ann.response is not None
        assert "permessage-deflate" in ann.response.headers["Sec-WebSocket-Extensions"]
        await bob.send("ready")
        assert await bob.recv() == "ready"
        for text in ("", "hello", "long " * 20_000, "grüße 👋" * 100):
            await ann.send(text)
            assert await bob.recv() == text
            while await ann.recv() != text:
                pass


# What an endpoint sees of the request, and what it adds to the response


@each_server
async def test_path_query_headers_and_cookies_arrive(server: str) -> None:
    hub = Hub()

    @hub.websocket("/orders/{number:int}/{name:path}")
    async def orders(conn: Connection[str, dict[str, Any]], number: int, name: str) -> None:
        await conn.send(
            {
                "path": [number, name],
                "query": conn.query_params.multi_items(),
                "header": conn.headers["x-token"],
                "cookies": conn.cookies,
                "client": conn.client.host if conn.client else None,
            }
        )

    async with serve_with(server, WebSocketMiddleware(Starlette(), hub=hub)) as address:
        url = f"{address.ws}/orders/17/a%20b/c%C3%BC?tag=x&tag=y%26z&empty="
        headers = {"X-Token": "t0ken", "Cookie": "session=abc; theme=dark"}
        async with connect(url, additional_headers=headers) as client:
            assert await client.recv() == (
                '{"path":[17,"a b/cü"],"query":[["tag","x"],["tag","y&z"],["empty",""]],"header":"t0ken",'
                '"cookies":{"session":"abc","theme":"dark"},"client":"127.0.0.1"}'
            )


@each_server
async def test_user_and_state_come_from_outer_middleware(server: str) -> None:
    class ByToken(AuthenticationBackend):
        async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
            conn.state.tenant = "acme"
            name = conn.headers.get("authorization", "").removeprefix("Bearer ")
            return (AuthCredentials(["authenticated"]), SimpleUser(name)) if name else None

    hub = Hub()

    @hub.on_connect
    async def only_users(conn: Connection) -> None:
        if not conn.user.is_authenticated:
            raise HTTPException(403)

    @hub.websocket("/me")
    async def me(conn: Connection) -> None:
        await conn.send(f"{conn.user.username} of {conn.state.tenant}")

    middleware = [Middleware(AuthenticationMiddleware, backend=ByToken()), Middleware(WebSocketMiddleware, hub=hub)]
    ann = {"Authorization": "Bearer ann"}
    async with serve_with(server, Starlette(middleware=middleware)) as address:
        async with connect(f"{address.ws}/me", additional_headers=ann) as client:
            assert await client.recv() == "ann of acme"
        assert (await refusal(f"{address.ws}/me")).status_code == 403


@each_server
async def test_first_of_ours_that_the_client_offers_is_agreed_on(server: str) -> None:
    async with serve_with(server, versioned("v2", "v1")) as address:
        for offered, agreed in ((["v1", "v2"], "v2"), (["v1"], "v1"), (["other", "v1"], "v1")):
            async with connect(f"{address.ws}/versions", subprotocols=offered) as client:
                assert client.subprotocol == agreed
                assert await client.recv() == agreed


@each_server
async def test_client_without_a_subprotocol_that_is_needed_is_refused(server: str) -> None:
    async with serve_with(server, versioned("v2", "v1")) as address:
        for offered in (None, ["v3"]):
            with pytest.raises(websockets.InvalidStatus) as refused:
                await connect(f"{address.ws}/versions", subprotocols=offered)
            assert refused.value.response.status_code == 400
            assert b"v2, v1" in refused.value.response.body


@each_server
async def test_client_without_a_subprotocol_that_may_be_missing_is_accepted(server: str) -> None:
    async with serve_with(server, versioned("v2", None)) as address, connect(f"{address.ws}/versions") as client:
        assert client.subprotocol is None
        assert await client.recv() == "None"


def versioned(*subprotocols: str | None) -> ASGIApp:
    hub = Hub()

    @hub.websocket("/versions", subprotocols=subprotocols)
    async def versions(conn: Connection) -> None:
        await conn.send(str(conn.subprotocol))

    return WebSocketMiddleware(Starlette(), hub=hub)


@each_server
async def test_headers_given_to_accept_are_in_the_response(server: str) -> None:
    hub = Hub()

    @hub.websocket("/session", accept=False)
    async def session(conn: Connection) -> None:
        await conn.accept(headers=[("Set-Cookie", "a=1; HttpOnly"), ("set-cookie", "b=2"), (b"X-Instance", b"blue")])
        await conn.send("welcome")

    app = WebSocketMiddleware(Starlette(), hub=hub)
    async with serve_with(server, app) as address, connect(f"{address.ws}/session") as client:
        assert client.response is not None
        assert client.response.headers.get_all("Set-Cookie") == ["a=1; HttpOnly", "b=2"]
        assert client.response.headers["X-Instance"] == "blue"
        assert await client.recv() == "welcome"


# Refusals


def current_user(authorization: Annotated[str | None, Header()] = None) -> str:
    if authorization is None:
        raise HTTPException(401, "log in first", headers={"WWW-Authenticate": "Bearer"})
    return authorization


def refusing() -> FastAPI:
    hub = Hub()

    @hub.on_connect
    async def not_there(conn: Connection) -> None:
        if conn.url.path == "/refused/by/hook":
            raise HTTPException(401, "log in first", headers={"WWW-Authenticate": "Bearer"})

    @hub.websocket("/refused/by/dependency")
    async def by_dependency(conn: Connection, user: Annotated[str, Depends(current_user)]) -> None:
        await conn.send(user)

    @hub.websocket("/refused/by/hook")
    async def by_hook(conn: Connection) -> None:
        raise AssertionError

    @hub.websocket("/refused/by/handler", accept=False)
    async def by_handler(conn: Connection) -> None:
        raise HTTPException(401, "log in first", headers={"WWW-Authenticate": "Bearer"})

    @hub.websocket("/refused/{number}")
    async def by_validation(conn: Connection, number: int, limit: int = 10) -> None:
        await conn.send(str([number, limit]))

    app = FastAPI()
    app.add_middleware(WebSocketMiddleware, hub=hub)
    return app


def without_denial(app: ASGIApp) -> ASGIApp:
    """The application as a server sees it that does not offer the denial extension."""

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        scope.get("extensions", {}).pop("websocket.http.response", None)
        await app(scope, receive, send)

    return served


async def refusal(url: str, **options: Any) -> Any:
    with pytest.raises(websockets.InvalidStatus) as refused:
        await connect(url, **options)
    return refused.value.response


@each_server
async def test_refusal_is_an_http_answer_with_its_headers_and_body(server: str) -> None:
    async with serve_with(server, refusing()) as address:
        for by in ("dependency", "hook", "handler"):
            response = await refusal(f"{address.ws}/refused/by/{by}")
            assert response.status_code == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert response.body == b'{"detail":"log in first"}'


@each_server
async def test_refusal_is_403_where_the_server_has_no_other(server: str) -> None:
    async with serve_with(server, without_denial(refusing())) as address:
        for by in ("dependency", "hook", "handler"):
            assert (await refusal(f"{address.ws}/refused/by/{by}")).status_code == 403


@each_server
async def test_dependency_that_is_content_lets_in(server: str) -> None:
    async with serve_with(server, refusing()) as address:
        headers = {"Authorization": "ann"}
        async with connect(f"{address.ws}/refused/by/dependency", additional_headers=headers) as client:
            assert await client.recv() == "ann"


@each_server
async def test_parameter_that_is_not_valid_is_refused_with_the_reason(server: str) -> None:
    async with serve_with(server, refusing()) as address:
        async with connect(f"{address.ws}/refused/3?limit=4") as client:
            assert await client.recv() == "[3, 4]"
        response = await refusal(f"{address.ws}/refused/3?limit=many")
        assert response.status_code == 403
        assert b"limit" in response.body
        assert b"integer" in response.body


@pytest.mark.parametrize("server", [*UVICORN, "hypercorn"])
async def test_client_that_leaves_during_the_handshake_is_nobodys_error(
    server: str, caplog: pytest.LogCaptureFixture
) -> None:
    hub = Hub()
    asked, answered = asyncio.Event(), asyncio.Event()

    @hub.on_connect
    async def takes_its_time(conn: Connection) -> None:
        asked.set()
        await answered.wait()

    @hub.websocket("/")
    async def receives(conn: Connection) -> None:
        async for _ in conn:
            pass

    async with serve_with(server, WebSocketMiddleware(Starlette(), hub=hub)) as address:
        client = asyncio.create_task(connect(address.ws).__aenter__())
        await asyncio.wait_for(asked.wait(), 5)
        client.cancel()
        await asyncio.wait([client])
        await asyncio.sleep(0.05)  # the server has seen it by now; it tells nobody before the handshake is finished
        answered.set()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# Origins


@contextlib.asynccontextmanager
async def echo_for(server: str, **options: Any) -> Any:
    hub = Hub(**options)

    @hub.websocket("/echo")
    async def echo(conn: Connection) -> None:
        async for message in conn:
            await conn.send(message)

    async with serve_with(server, WebSocketMiddleware(Starlette(), hub=hub)) as address:
        yield address


async def connects(address: Address, origin: str | None) -> bool:
    try:
        async with connect(f"{address.ws}/echo", origin=origin) as client:
            await client.send("hello")
            return await client.recv() == "hello"
    except websockets.InvalidStatus as refused:
        response = refused.response
    assert response.status_code == 403
    assert b"origin" in response.body
    return False


@each_server
async def test_pages_of_the_same_origin_and_what_is_no_page_may_connect(server: str) -> None:
    async with echo_for(server) as address:
        assert await connects(address, None)
        assert await connects(address, address.http)
        assert not await connects(address, "http://127.0.0.1")
        assert not await connects(address, f"https://127.0.0.1:{address.port}")
        assert not await connects(address, f"http://localhost:{address.port}")
        assert not await connects(address, "http://evil.example")
        assert not await connects(address, f"{address.http}.evil.example")
        assert not await connects(address, "null")


@each_server
async def test_pages_of_allowed_origins_may_connect(server: str) -> None:
    async with echo_for(server, allowed_origins=["https://example.com"]) as address:
        assert await connects(address, "https://example.com")
        assert await connects(address, "https://example.com:443")
        assert await connects(address, None)
        assert not await connects(address, "https://example.com.evil.example")
        assert not await connects(address, "http://example.com")


@each_server
async def test_pages_of_any_origin_may_connect_where_the_hub_says_so(server: str) -> None:
    async with echo_for(server, allowed_origins="*") as address:
        assert await connects(address, "http://evil.example")
        assert not await connects(address, "null")


# Plain HTTP, and paths without an endpoint


@each_server
@pytest.mark.parametrize("front", [in_fastapi, in_fastapi_router, in_starlette_route, in_front_of_a_callable, mounted])
async def test_plain_http_to_an_endpoint_is_told_to_upgrade(server: str, front: Callable[[], ASGIApp]) -> None:
    async with serve_with(server, front()) as address:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
            answer = await get(f"{address.http}{FRONTS[front]}/chat/lobby", method)
            assert answer.status_code == 426
            assert answer.headers["upgrade"] == "websocket"
            assert "WebSocket" in answer.text
        assert (await get(f"{address.http}{FRONTS[front]}/chat/lobby", "HEAD")).status_code == 426


@each_server
async def test_page_at_the_path_of_an_endpoint_is_the_applications(server: str) -> None:
    async def page(request: Request) -> PlainTextResponse:
        return PlainTextResponse(f"the page of {request.path_params['room']}")

    async def gone(request: Request) -> Response:
        raise HTTPException(404, "no such room")

    routes = [Route("/chat/nowhere", gone), Route("/chat/{room}", page)]
    app = Starlette(routes=routes, middleware=[Middleware(WebSocketMiddleware, hub=chat_hub())])
    async with serve_with(server, app) as address:
        answer = await get(f"{address.http}/chat/lobby")
        assert (answer.status_code, answer.text) == (200, "the page of lobby")
        async with connect(f"{address.ws}/chat/lobby") as client:
            await client.send("hello")
            assert await client.recv() == "hello"
        assert (await get(f"{address.http}/chat/lobby", "POST")).status_code == 426
        answer = await get(f"{address.http}/chat/nowhere")
        assert (answer.status_code, answer.text) == (404, "no such room")


@each_server
async def test_path_without_an_endpoint_is_the_applications(server: str) -> None:
    async def own(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(f"own {websocket.path_params['name']}")
        await websocket.close(4000, "own")

    app = Starlette(
        routes=[WebSocketRoute("/own/{name}", own)],
        middleware=[Middleware(WebSocketMiddleware, hub=chat_hub())],
    )
    async with serve_with(server, app) as address:
        async with connect(f"{address.ws}/own/socket") as client:
            assert await client.recv() == "own socket"
            await client.wait_closed()
            assert (client.close_code, client.close_reason) == (4000, "own")
        assert (await refusal(f"{address.ws}/nothing/here")).status_code == 403
        assert (await refusal(f"{address.ws}/chat/lobby/deeper")).status_code == 403
