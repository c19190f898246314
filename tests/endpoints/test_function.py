"""Handlers as endpoints: what is injected, and which mistakes stop the developer."""

import asyncio
import functools
import subprocess
import sys
import typing
import uuid

import pytest
from fastapi import APIRouter, Cookie, Depends, FastAPI, Header, HTTPException, Query
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute

from asgi_ws import Connection, ConnectionClosed, Hub, HubNotRunning, WebSocketMiddleware
from asgi_ws.testing import Refused, connect, request

pytestmark = pytest.mark.anyio


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def app(hub: Hub) -> FastAPI:
    app = FastAPI()
    app.add_middleware(WebSocketMiddleware, hub=hub)
    return app


async def receive_all(app: typing.Any, path: str, **options: typing.Any) -> typing.Any:
    async with connect(app, path, **options) as client:
        return await client.receive_json()


# Paths


async def test_path_parameters_are_converted_by_starlettes_convertors(hub: Hub) -> None:
    app = Starlette()
    app.add_middleware(WebSocketMiddleware, hub=hub)
    key = uuid.uuid4()

    @hub.websocket("/{text}/{number:int}/{ratio:float}/{key:uuid}/{rest:path}")
    async def handler(conn: Connection, text: str, number: int, ratio: float, key: uuid.UUID, rest) -> None:  # type: ignore[no-untyped-def]
        await conn.send([text, number, ratio, str(key), rest])

    assert await receive_all(app, f"/a/7/0.5/{key}/b/c") == ["a", 7, 0.5, str(key), "b/c"]
    with pytest.raises(Refused):
        await receive_all(app, f"/a/seven/0.5/{key}/b")


async def test_a_first_parameter_without_annotation_is_the_connection(hub: Hub, app: FastAPI) -> None:
    @hub.websocket("/")
    async def handler(conn) -> None:  # type: ignore[no-untyped-def]
        await conn.send([])

    assert await receive_all(app, "/") == []


async def test_annotations_may_be_names_of_where_the_handler_stands(hub: Hub, app: FastAPI) -> None:
    class Local(typing.TypedDict):
        x: int

    @hub.websocket("/")
    async def handler(conn: "Connection[Local]") -> None:
        async for message in conn:
            await conn.send(message)

    router = APIRouter()

    @router.websocket("/router")
    @hub.endpoint
    async def endpoint(conn: "Connection[Local]") -> None:
        async for message in conn:
            await conn.send(message)

    app.include_router(router)
    for path in ("/", "/router"):
        async with connect(app, path) as client:
            await client.send({"x": 1})
            assert await client.receive_json() == {"x": 1}
            await client.send({"x": "1"})
            with pytest.raises(ConnectionClosed):
                await client.receive()


async def test_a_method_a_partial_and_a_callable_object_can_be_handlers(hub: Hub, app: FastAPI) -> None:
    class Handlers:
        async def method(self, conn: Connection) -> None:
            await conn.send(["method"])

        async def __call__(self, conn: Connection) -> None:
            await conn.send(["object"])

    async def for_partial(conn: Connection, word: str) -> None:
        await conn.send([word])

    hub.websocket("/method")(Handlers().method)
    hub.websocket("/object")(Handlers())
    hub.websocket("/partial")(functools.partial(for_partial, word="partial"))
    for word in ("method", "object", "partial"):
        assert await receive_all(app, f"/{word}") == [word]


# FastAPI


async def current_user(token: typing.Annotated[str, Query()] = "") -> str:
    if not token:
        raise HTTPException(401, "no token", headers={"WWW-Authenticate": "Bearer"})
    return token


async def test_everything_that_fastapi_injects_arrives(hub: Hub, app: FastAPI) -> None:
    @hub.websocket("/games/{game_id}")
    async def handler(
        conn: Connection,
        game_id: int,
        user: typing.Annotated[str, Depends(current_user)],
        page: int = 1,
        x_one: typing.Annotated[str, Header()] = "",
        session: typing.Annotated[str, Cookie()] = "",
    ) -> None:
        await conn.send([game_id, user, page, x_one, session])

    headers = {"x-one": "1", "cookie": "session=abc"}
    assert await receive_all(app, "/games/7?token=ann&page=3", headers=headers) == [7, "ann", 3, "1", "abc"]


async def test_a_dependency_refuses_with_a_real_answer(hub: Hub, app: FastAPI) -> None:
    @hub.websocket("/")
    async def handler(conn: Connection, user: typing.Annotated[str, Depends(current_user)]) -> None: ...

    with pytest.raises(Refused) as refused:
        await receive_all(app, "/")
    assert refused.value.status_code == 401
    assert refused.value.headers["www-authenticate"] == "Bearer"
    assert refused.value.json() == {"detail": "no token"}


async def test_a_parameter_that_isnt_valid_is_refused_with_the_reason(hub: Hub, app: FastAPI) -> None:
    @hub.websocket("/")
    async def handler(conn: Connection, page: int) -> None: ...

    with pytest.raises(Refused) as refused:
        await receive_all(app, "/?page=secret")
    assert refused.value.status_code == 403
    assert refused.value.json()["detail"][0]["loc"] == ["query", "page"]
    assert "secret" not in refused.value.text


async def test_an_exception_handler_of_ones_own_answers_to_invalid_parameters(hub: Hub, app: FastAPI) -> None:
    from fastapi.exceptions import WebSocketRequestValidationError
    from fastapi.responses import PlainTextResponse

    @app.exception_handler(WebSocketRequestValidationError)
    async def invalid(conn: typing.Any, error: WebSocketRequestValidationError) -> PlainTextResponse:
        return PlainTextResponse("own", 422)

    @hub.websocket("/")
    async def handler(conn: Connection, page: int) -> None: ...

    with pytest.raises(Refused) as refused:
        await receive_all(app, "/")
    assert (refused.value.status_code, refused.value.text) == (422, "own")


async def test_dependencies_can_be_overridden(hub: Hub, app: FastAPI) -> None:
    @hub.websocket("/")
    async def handler(conn: Connection, user: typing.Annotated[str, Depends(current_user)]) -> None:
        await conn.send([user])

    app.dependency_overrides[current_user] = lambda: "somebody else"
    assert await receive_all(app, "/") == ["somebody else"]
    app.dependency_overrides.clear()
    assert await receive_all(app, "/?token=ann") == ["ann"]


async def test_dependencies_can_be_overridden_with_the_middleware_around_the_application(hub: Hub) -> None:
    @hub.websocket("/")
    async def handler(conn: Connection, user: typing.Annotated[str, Depends(current_user)]) -> None:
        await conn.send([user])

    inner = FastAPI()
    inner.dependency_overrides[current_user] = lambda: "somebody else"
    assert await receive_all(WebSocketMiddleware(inner, hub=hub), "/") == ["somebody else"]


async def test_dependencies_that_yield_live_as_long_as_the_handler_and_see_its_error(hub: Hub, app: FastAPI) -> None:
    seen: list[str] = []

    async def database() -> typing.AsyncIterator[str]:
        seen.append("open")
        try:
            yield "database"
            seen.append("commit")
        except Exception as error:
            seen.append(f"rollback {error}")
            raise
        finally:
            seen.append("close")

    @hub.websocket("/{how}")
    async def handler(conn: Connection, how: str, db: typing.Annotated[str, Depends(database)]) -> None:
        await conn.send(seen.copy())
        if how == "bad":
            raise ValueError("bug")

    assert await receive_all(app, "/good") == ["open"]
    assert seen == ["open", "commit", "close"]
    seen.clear()
    async with connect(app, "/bad") as client:
        assert await client.receive_json() == ["open"]
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
    assert closed.value.code == 1011
    assert seen == ["open", "rollback bug", "close"]


async def test_an_exception_after_the_handshake_is_answered_by_nobody_else(hub: Hub, app: FastAPI) -> None:
    """Frameworks have handlers for these, which would answer with HTTP."""

    @hub.websocket("/own")
    async def own(conn: Connection) -> None:
        raise HTTPException(418, "tea")

    router = APIRouter()

    @router.websocket("/router")
    @hub.endpoint
    async def in_router(conn: Connection) -> None:
        raise HTTPException(418, "tea")

    app.include_router(router)
    for path in ("/own", "/router"):
        async with connect(app, path) as client:
            with pytest.raises(ConnectionClosed) as closed:
                await client.receive()
        assert (closed.value.code, closed.value.reason) == (1008, "tea")


# Existing routers


async def test_a_router_keeps_its_decorators_and_prefix(hub: Hub, app: FastAPI) -> None:
    async def router_wide() -> None:
        seen.append("dependency")

    seen: list[str] = []
    router = APIRouter(prefix="/api", dependencies=[Depends(router_wide)])

    @router.websocket("/games/{game_id}")
    @hub.endpoint
    async def play(
        conn: Connection[list[int], list[int]], game_id: int, user: typing.Annotated[str, Depends(current_user)]
    ) -> None:
        async for numbers in conn:
            await conn.send([game_id, *numbers])

    app.include_router(router, prefix="/v1")
    assert (await request(app, "GET", "/v1/api/games/7")).status_code == 426
    assert (await request(app, "GET", "/v1/api/games")).status_code == 404
    async with connect(app, "/v1/api/games/7?token=ann") as client:
        await client.send([1, 2])
        assert await client.receive_json() == [7, 1, 2]
    assert seen == ["dependency"]
    with pytest.raises(Refused) as refused:
        await receive_all(app, "/v1/api/games/7")
    assert refused.value.status_code == 401
    with pytest.raises(Refused) as refused:
        await receive_all(app, "/v1/api/games/7?token=ann", headers={"origin": "http://evil.example"})
    assert refused.value.status_code == 403


async def test_options_can_be_given_to_an_endpoint(hub: Hub, app: FastAPI) -> None:
    router = APIRouter()

    @router.websocket("/")
    @hub.endpoint(subprotocols=["v1"], accept=False)
    async def handler(conn: Connection) -> None:
        await conn.accept()
        await conn.send([conn.subprotocol])

    app.include_router(router)
    assert await receive_all(app, "/", subprotocols=["v1"]) == ["v1"]


async def test_a_starlette_route_takes_an_endpoint(hub: Hub) -> None:
    async def chat(conn: Connection, room: str, greeting: str = "hello") -> None:
        await conn.send([room, greeting])

    routes = [Mount("/sub", routes=[WebSocketRoute("/chat/{room}", hub.endpoint(chat))])]
    app = Starlette(routes=routes)
    app.add_middleware(WebSocketMiddleware, hub=hub)
    assert await receive_all(app, "/sub/chat/lobby") == ["lobby", "hello"]
    assert (await request(app, "GET", "/sub/chat/lobby")).status_code == 426
    assert (await request(app, "GET", "/sub/chat")).status_code == 404
    assert (await request(app, "GET", "/nothing")).status_code == 404
    assert not hub.context.connections._addresses


async def test_a_starlette_route_injects_nothing(hub: Hub) -> None:
    async def with_default(conn: Connection, user: str = Depends(current_user)) -> None: ...

    async def without(conn: Connection, user: str) -> None: ...

    app = Starlette(
        routes=[WebSocketRoute("/with", hub.endpoint(with_default)), WebSocketRoute("/without", hub.endpoint(without))]
    )
    app.add_middleware(WebSocketMiddleware, hub=hub)
    for path in ("/with", "/without"):
        with pytest.raises(TypeError, match="'user' isn't in the path"):
            await receive_all(app, path)


async def test_an_endpoint_without_its_middleware_says_so(hub: Hub) -> None:
    async def handler(conn: Connection) -> None: ...

    app = Starlette(routes=[WebSocketRoute("/", hub.endpoint(handler))])
    with pytest.raises(HubNotRunning, match="WebSocketMiddleware"):
        await receive_all(app, "/")
    app = Starlette(routes=[WebSocketRoute("/", hub.endpoint(handler))])
    app.add_middleware(WebSocketMiddleware, hub=Hub())
    with pytest.raises(HubNotRunning):
        await receive_all(app, "/")


def test_a_handler_stays_the_function_that_it_was(hub: Hub) -> None:
    async def handler(conn: Connection) -> None:
        """Its words."""

    assert hub.websocket("/")(handler) is handler
    endpoint = hub.endpoint(handler)
    assert (endpoint.__name__, endpoint.__doc__) == ("handler", "Its words.")


# Mistakes


def not_async(conn: Connection) -> None: ...


async def a_generator(conn: Connection) -> typing.AsyncIterator[None]:
    yield


async def no_connection() -> None: ...


async def only_text(text: str) -> None: ...


async def two_connections(one: Connection, other: Connection) -> None: ...


async def unknown_name(conn: "Connection[Nowhere]") -> None: ...  # type: ignore[name-defined]  # noqa: F821


class Opaque:
    pass


async def opaque(conn: Connection[Opaque]) -> None: ...


async def stars(conn: Connection, *args: str) -> None: ...


async def positional(conn: Connection, /) -> None: ...


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (not_async, "async def"),
        (a_generator, "async def"),
        (17, "async def"),
        (no_connection, "conn: Connection"),
        (only_text, "conn: Connection"),
        (two_connections, "conn: Connection"),
        (unknown_name, "Nowhere"),
        (opaque, "Opaque can't be read from JSON"),
        (stars, "'args' can't be given"),
        (positional, "'conn' can't be given"),
    ],
)
def test_a_handler_that_cant_work_is_refused_when_it_is_decorated(handler: typing.Any, words: str, hub: Hub) -> None:
    with pytest.raises(TypeError, match=words):
        hub.websocket("/")(handler)
    with pytest.raises(TypeError, match=words):
        hub.endpoint(handler)


def test_a_path_that_cant_match_is_refused(hub: Hub) -> None:
    async def handler(conn: Connection) -> None: ...

    with pytest.raises(ValueError, match="begin with '/'"):
        hub.websocket("chat")(handler)
    with pytest.raises(ValueError, match="Duplicated param"):
        hub.websocket("/{a}/{a}")(handler)
    hub.websocket("/")(handler)
    with pytest.raises(ValueError, match="already"):
        hub.websocket("/")(handler)


def test_options_that_cant_work_are_refused(hub: Hub) -> None:
    async def handler(conn: Connection) -> None: ...

    with pytest.raises(TypeError, match="list of names"):
        hub.websocket("/", subprotocols="v1")(handler)
    with pytest.raises(TypeError, match="on_invalid"):
        hub.websocket("/", on_invalid=print)(handler)  # type: ignore[arg-type]


WITHOUT_FASTAPI = """
import asyncio, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fastapi", "pydantic"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "fastapi" else found(name, package)

import dataclasses
from starlette.applications import Starlette
from asgi_ws import Connection, Hub, WebSocketMiddleware
from asgi_ws.testing import connect

hub = Hub()
app = Starlette()
app.add_middleware(WebSocketMiddleware, hub=hub)

@dataclasses.dataclass
class Move:
    x: int

@hub.websocket("/games/{game_id:int}")
async def play(conn: Connection[Move], game_id: int) -> None:
    async for move in conn:
        await conn.send([game_id, move.x])

async def query(conn: Connection, page: int = 1) -> None: ...
async def converted(conn: Connection, game_id: int) -> None: ...

for path, handler in (("/a", query), ("/a/{game_id}", converted)):
    try:
        hub.websocket(path)(handler)
    except TypeError as error:
        print(error)

async def main():
    async with connect(app, "/games/7") as client:
        await client.send({"x": 3})
        print(await client.receive())

asyncio.run(main())
print("fastapi" in sys.modules, "pydantic" in sys.modules)
"""


def test_what_needs_fastapi_says_so_where_it_isnt_installed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    async def query(conn: Connection, page: int = 1) -> None: ...

    async def converted(conn: Connection, game_id: int) -> None: ...

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TypeError, match=r"'page' isn't in the path '/a'.*pip install fastapi"):
        hub.websocket("/a")(query)
    with pytest.raises(TypeError, match=r"'game_id' arrives from the path '/a/{game_id}' as text"):
        hub.websocket("/a/{game_id}")(converted)


def test_without_fastapi_paths_work_and_injection_is_refused_with_a_sentence() -> None:
    output = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_FASTAPI], capture_output=True, text=True, timeout=30, check=True
    ).stdout.splitlines()
    assert "'page' isn't in the path '/a'" in output[0]
    assert "pip install fastapi" in output[0]
    assert "'game_id' arrives from the path '/a/{game_id}' as text" in output[1]
    assert output[2:] == ["[7,3]", "False False"]


async def test_fastapi_is_imported_only_where_something_is_injected() -> None:
    code = (
        "import sys\nfrom asgi_ws import *\nhub = Hub()\n"
        "@hub.websocket('/{room}')\nasync def f(conn: Connection, room: str) -> None: ...\n"
        "print('fastapi' in sys.modules)\n"
        "@hub.websocket('/q/{room}')\nasync def g(conn: Connection, room: str, page: int = 1) -> None: ...\n"
        "print('fastapi' in sys.modules)\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert output.split() == [b"False", b"True"]
