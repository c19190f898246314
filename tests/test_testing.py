"""The test client, against applications that misbehave in every way."""

import asyncio
import typing

import anyio
import pytest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from asgi_ws import ConnectionClosed
from asgi_ws.testing import Refused, connect, request, stream

pytestmark = pytest.mark.anyio


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        websocket = WebSocket(scope, receive, send)
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text)


async def test_messages_go_both_ways_and_can_be_iterated() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        websocket = WebSocket(scope, receive, send)
        await websocket.accept("v1", headers=[(b"x-one", b"1")])
        await websocket.send_json({"got": await websocket.receive_text()})
        await websocket.send_bytes(await websocket.receive_bytes())
        await websocket.close(4000, "done")

    async with connect(app, "/?a=b", subprotocols=["v1"], headers=[("x", "y")], lifespan=False) as client:
        assert (client.subprotocol, client.headers["x-one"]) == ("v1", "1")
        await client.send({"a": 1})
        assert await client.receive_json() == {"got": '{"a":1}'}
        await client.send(b"\x00")
        assert [message async for message in client] == [b"\x00"]
        with pytest.raises(ConnectionClosed) as closed:
            await client.send("after the end")
        assert (closed.value.code, closed.value.reason) == (4000, "done")


async def test_every_wait_is_limited_and_says_what_was_waited_for() -> None:
    async def deaf(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and scope["path"] != "/mute":
            await send({"type": "websocket.accept"})
        await anyio.sleep_forever()

    with pytest.raises(TimeoutError, match=r"waited 0.01 s for /mute to answer the handshake"):
        async with connect(deaf, "/mute", timeout=0.01, lifespan=False):
            pass
    with pytest.raises(TimeoutError, match=r"waited 0.01 s for a message from /deaf"):
        async with connect(deaf, "/deaf", timeout=0.01, lifespan=False) as client:
            await client.receive()
    with pytest.raises(TimeoutError, match=r"waited 0.01 s for /deaf to read what was sent"):
        async with connect(deaf, "/deaf", timeout=0.01, lifespan=False) as client:
            for _ in range(100):
                await client.send("x")
    with pytest.raises(TimeoutError, match=r"/deaf did not end within 0.01 s after its client left"):
        async with connect(deaf, "/deaf", timeout=0.01, lifespan=False):
            pass
    with pytest.raises(TimeoutError, match=r"for an answer from /http"):
        await request(deaf, "GET", "/http", timeout=0.01, lifespan=False)


async def test_what_the_application_raises_is_raised_in_the_test() -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/later":
            await send({"type": "websocket.accept"})
            await receive()
            assert (await receive())["type"] == "websocket.disconnect"
        raise ValueError("a bug")

    for path in ("/", "/later"):
        with pytest.raises(ValueError, match="a bug"):
            async with connect(fails, path, lifespan=False):
                pass
    with pytest.raises(ValueError, match="a bug"):
        await request(fails, "GET", "/", lifespan=False)
    with pytest.raises(ZeroDivisionError):
        async with connect(fails, "/later", lifespan=False):
            raise ZeroDivisionError


async def test_an_application_that_says_nothing_has_refused_or_dropped_the_client() -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/dropped":
            await receive()
            await send({"type": "websocket.accept"})
        if scope["path"] == "/cut":
            await send({"type": "http.response.start", "status": 200})

    with pytest.raises(Refused) as refused:
        async with connect(silent, "/", lifespan=False):
            pass
    assert refused.value.status_code == 500
    async with connect(silent, "/dropped", lifespan=False) as client:
        with pytest.raises(ConnectionClosed) as closed:
            await client.send("x")
            await client.receive()
        assert (closed.value.code, closed.value.clean) == (1006, False)
    with pytest.raises(AssertionError, match="without an answer"):
        await request(silent, "GET", "/", lifespan=False)
    with pytest.raises(AssertionError, match="in the middle"):
        await request(silent, "GET", "/cut", lifespan=False)


async def test_an_application_that_sends_more_than_is_read_waits_and_hears_of_the_end() -> None:
    sent: list[int] = []
    told: list[str] = []

    async def chatty(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        try:
            for number in range(1000):
                await send({"type": "websocket.send", "text": str(number)})
                sent.append(number)
        except OSError as error:
            told.append(str(error))

    async with connect(chatty, "/", lifespan=False) as client:
        assert await client.receive() == "0"
    assert len(sent) < 20
    assert told == ["the client is gone"]


async def test_a_client_that_vanishes_leaves_no_close_frame() -> None:
    seen: list[typing.Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        seen.extend([await receive(), await receive()])

    async with connect(app, "/", lifespan=False) as client:
        await client.vanish()
        with pytest.raises(ConnectionClosed):
            await client.receive()
    assert seen[0] == {"type": "websocket.disconnect", "code": 1006}
    assert seen[1]["type"] == "websocket.disconnect"


# HTTP


async def app_http(scope: Scope, receive: Receive, send: Send) -> None:
    message = await receive()

    async def pieces() -> typing.AsyncIterator[bytes]:
        yield b"method=" + scope["method"].encode() + b" "
        yield message["body"]

    headers = {"x-type": dict(scope["headers"]).get(b"content-type", b"").decode()}
    await StreamingResponse(pieces(), 201, headers)(scope, receive, send)


async def test_a_request_has_its_whole_response() -> None:
    response = await request(app_http, "post", "/", json={"a": 1}, headers={"X-One": "1"}, lifespan=False)
    assert (response.status_code, response.text) == (201, 'method=POST {"a":1}')
    assert response.headers["x-type"] == "application/json"
    assert await response.aread() == response.content
    response = await request(app_http, "PUT", "/", content="[1]", lifespan=False)
    assert response.text == "method=PUT [1]"
    response = await request(app_http, "PUT", "/", content=b"", headers={"host": "own"}, lifespan=False)
    with pytest.raises(ValueError, match="Expecting value"):
        response.json()


async def test_a_response_is_read_while_it_is_sent() -> None:
    go = asyncio.Event()
    gone: list[str] = []

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        await go.wait()
        await send({"type": "http.response.body", "body": b"second", "more_body": True})
        gone.append((await receive())["type"])

    async with stream(endless, "GET", "/", lifespan=False) as response:
        with pytest.raises(RuntimeError, match="aread"):
            _ = response.content
        chunks = response.aiter_bytes()
        assert await anext(chunks) == b"first"
        go.set()
        assert await anext(chunks) == b"second"
    assert gone == ["http.disconnect"]


# Lifespan


async def test_the_lifespan_runs_once_around_several_connections() -> None:
    events: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            events.append(scope["state"]["from"])
            return await echo(scope, receive, send)
        events.append((await receive())["type"])
        scope["state"]["from"] = "lifespan"
        await send({"type": "lifespan.startup.complete"})
        events.append((await receive())["type"])
        await send({"type": "lifespan.shutdown.complete"})

    async def use() -> None:
        async with connect(app, "/") as client:
            await client.send("x")
            assert await client.receive() == "x"

    async with connect(app, "/"):
        await asyncio.gather(use(), use())
    assert events == ["lifespan.startup", "lifespan", "lifespan", "lifespan", "lifespan.shutdown"]


@pytest.mark.parametrize("when", ["startup", "shutdown"])
async def test_a_failure_of_the_lifespan_is_told(when: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            return await echo(scope, receive, send)
        await receive()
        if when == "shutdown":
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": f"lifespan.{when}.failed", "message": "no database"})
        raise ValueError("no database")

    with pytest.raises(RuntimeError, match="no database"):
        async with connect(app, "/"):
            pass


async def test_an_application_that_breaks_off_its_lifespan_is_told() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            return await echo(scope, receive, send)
        await receive()
        await send({"type": "lifespan.startup.complete"})
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        async with connect(app, "/"):
            pass


async def test_an_application_without_a_lifespan_is_served() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await echo(scope, receive, send)

    async with connect(app, "/") as client:
        await client.send("x")
        assert await client.receive() == "x"
