"""Node's `ws` client, unchanged, against the examples."""

import asyncio
import contextlib

import pytest
from starlette.exceptions import HTTPException

from asgi_ws import Connection, Hub, WebSocketMiddleware
from examples import broadcast_to_all, chat, echo, game
from tests.e2e.node import NodeClient, node_client
from tests.servers import OURS, STOCK, serve

pytestmark = pytest.mark.anyio

each_class = pytest.mark.parametrize("ws", [STOCK[0], OURS])
CLOSE_CODES = [(1000, ""), (1001, "going"), (4001, "grüße"), (3000, "x" * 123)]


async def no_page(scope: object, receive: object, send: object) -> None:
    raise AssertionError("only the hub is asked")


@each_class
async def test_text_and_binary_come_back(ws: str) -> None:
    messages: list[str | bytes] = ["hello", "", "grüße 👋", b"\x00\xff", b"", "a" * 200_000, bytes(200_000)]
    async with serve(echo.app, ws=ws) as server, node_client(f"{server.ws}/echo") as client:
        await client.event("upgrade")
        await client.event("open")
        for message in messages:
            await client.send(message)
        assert [await client.receive() for _ in messages] == messages


async def join(client: NodeClient, name: str) -> None:
    """Subscribed when its own message has come back: what is sent is received behind that."""
    await client.event("upgrade")
    await client.event("open")
    await client.send(name)
    while await client.receive() != name:
        pass


@each_class
async def test_a_chat_between_two(ws: str) -> None:
    async with (
        serve(chat.app, ws=ws) as server,
        node_client(f"{server.ws}/chat/lobby") as ann,
        node_client(f"{server.ws}/chat/lobby") as bob,
        node_client(f"{server.ws}/chat/other") as eve,
    ):
        await join(ann, "ann")
        await join(bob, "bob")
        await join(eve, "eve")
        await ann.send("hello")
        assert [await ann.receive(), await ann.receive()] == ["bob", "hello"]
        assert await bob.receive() == "hello"
        await eve.send("is anybody here?")
        assert await eve.receive() == "is anybody here?"


async def test_broadcast_reaches_everybody_with_its_kind() -> None:
    async with serve(broadcast_to_all.app) as server, node_client(server.ws) as first, node_client(server.ws) as second:
        await join(first, "first")
        await join(second, "second")
        assert await first.receive() == "second"
        for message in ("hello", b"\x01\x02"):
            await second.send(message)
            assert [await first.receive(), await second.receive()] == [message, message]


@pytest.mark.parametrize(("code", "reason"), CLOSE_CODES)
async def test_the_server_sees_the_clients_code_and_reason(code: int, reason: str) -> None:
    hub = Hub()
    ended: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()

    @hub.websocket("/")
    async def until_closed(conn: Connection) -> None:
        try:
            await conn.receive()
        except Exception as error:
            ended.set_result((getattr(error, "code", 0), getattr(error, "reason", "")))
            raise

    async with serve(WebSocketMiddleware(no_page, hub=hub)) as server, node_client(server.ws) as client:
        await client.event("upgrade")
        await client.event("open")
        client.command(code=code, reason=reason)
        assert await client.event("close") == {"code": code, "reason": reason}
        assert await asyncio.wait_for(ended, 10) == (code, reason)


@pytest.mark.parametrize(("code", "reason"), CLOSE_CODES)
@each_class
async def test_the_client_sees_the_servers_code_and_reason(ws: str, code: int, reason: str) -> None:
    hub = Hub()

    @hub.websocket("/")
    async def closes(conn: Connection) -> None:
        await conn.send("last")
        await conn.close(code, reason)

    async with serve(WebSocketMiddleware(no_page, hub=hub), ws=ws) as server, node_client(server.ws) as client:
        await client.event("upgrade")
        await client.event("open")
        assert await client.receive() == "last"
        assert await client.event("close") == {"code": code, "reason": reason}


@each_class
async def test_the_client_is_told_that_the_server_stops(ws: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(serve(chat.app, ws=ws))
        async with node_client(f"{server.ws}/chat/lobby") as client:
            await join(client, "hello")
            await stack.aclose()
            assert (await client.event("close"))["code"] == 1012


@each_class
async def test_subprotocol_and_headers_go_both_ways(ws: str) -> None:
    hub = Hub()

    @hub.websocket("/", subprotocols=["v2", "v1"], accept=False)
    async def answers(conn: Connection) -> None:
        await conn.accept(headers={"X-Answer": conn.headers["x-question"].upper()})
        await conn.send(str(conn.subprotocol))

    async with (
        serve(WebSocketMiddleware(no_page, hub=hub), ws=ws) as server,
        node_client(server.ws, protocols=["v0", "v1", "v2"], headers={"X-Question": "why"}) as client,
    ):
        assert (await client.event("upgrade"))["headers"]["x-answer"] == "WHY"
        assert (await client.event("open"))["protocol"] == "v2"
        assert await client.receive() == "v2"


async def test_a_client_without_the_needed_subprotocol_is_refused() -> None:
    hub = Hub()

    @hub.websocket("/", subprotocols=["v1"])
    async def needs_one(conn: Connection) -> None:
        raise AssertionError("not reached")

    async with (
        serve(WebSocketMiddleware(no_page, hub=hub)) as server,
        node_client(server.ws, protocols=["v0"]) as client,
    ):
        answer = await client.event("unexpected-response")
        assert answer["status"] == 400
        assert "v1" in answer["body"]


@each_class
async def test_a_refusal_is_an_answer_with_its_headers_and_body(ws: str) -> None:
    hub = Hub()

    @hub.on_connect
    async def nobody(conn: Connection) -> None:
        raise HTTPException(401, "a token is needed", {"WWW-Authenticate": "Bearer"})

    @hub.websocket("/")
    async def not_reached(conn: Connection) -> None:
        raise AssertionError("not reached")

    async with serve(WebSocketMiddleware(no_page, hub=hub), ws=ws) as server, node_client(server.ws) as client:
        answer = await client.event("unexpected-response")
        assert (answer["status"], answer["body"]) == (401, "a token is needed")
        assert answer["headers"]["www-authenticate"] == "Bearer"


async def test_a_dependency_refuses_with_an_answer() -> None:
    async with serve(game.app) as server, node_client(f"{server.ws}/games/7?token=wrong") as client:
        answer = await client.event("unexpected-response")
        assert (answer["status"], answer["body"]) == (401, '{"detail":"a token is needed"}')


@each_class
async def test_pings_are_answered(ws: str) -> None:
    async with serve(echo.app, ws=ws) as server, node_client(f"{server.ws}/echo") as client:
        await client.event("upgrade")
        await client.event("open")
        client.command(ping="are you there?")
        assert await client.event("pong") == {"data": "are you there?"}


@pytest.mark.parametrize("deflate", [True, False, {"clientNoContextTakeover": True, "serverMaxWindowBits": 10}])
@each_class
async def test_compressed_or_not_every_message_arrives(ws: str, deflate: bool | dict[str, object]) -> None:
    messages: list[str | bytes] = ["short", "compressible " * 5000, bytes(100_000), "", "ü" * 3000]
    async with (
        serve(broadcast_to_all.app, ws=ws) as server,
        node_client(server.ws, perMessageDeflate=deflate) as client,
    ):
        headers = (await client.event("upgrade"))["headers"]
        assert ("permessage-deflate" in headers.get("sec-websocket-extensions", "")) is bool(deflate)
        assert (await client.event("open"))["extensions"].startswith("permessage-deflate" if deflate else "")
        for message in messages:
            await client.send(message)
        assert [await client.receive() for _ in messages] == messages
