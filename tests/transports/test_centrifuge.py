"""Centrifuge's streams and the requests that belong to them, as raw HTTP."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import pytest
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from asgi_ws import Connection, ConnectionClosed, Hub, Limits, WebSocketMiddleware
from asgi_ws.origins import OriginPolicy
from asgi_ws.testing import Response, connect, request, stream
from asgi_ws.transports import CentrifugeTransport, Relay, StreamLink
from tests.endpoints.test_pubsub import no_page
from tests.transports.test_relay import bus, two  # noqa: F401  fixtures

pytestmark = pytest.mark.anyio

CONNECT = '{"id":1,"connect":{}}'
both = pytest.mark.parametrize("kind", ["http_stream", "sse"])


class Stream:
    """A response that doesn't end, message by message."""

    def __init__(self, app: Any, kind: str, response: Response) -> None:
        self.app = app
        self.response = response
        self.session = ""
        self._between, self._before = (b"\n\n", b"data: ") if kind == "sse" else (b"\n", b"")
        self._body = response.aiter_bytes()
        self._rest = b""

    async def hear(self) -> Any:
        while True:
            while self._between not in self._rest:
                self._rest += await anext(self._body)
            message, _, self._rest = self._rest.partition(self._between)
            if not message.startswith(b":"):
                assert message.startswith(self._before)
                return json.loads(message[len(self._before) :])

    async def ended(self) -> bool:
        return not [chunk async for chunk in self._body] and not self._rest

    async def say(self, *commands: dict[str, Any], status: int = 204, **options: Any) -> None:
        data = "\n".join(json.dumps(each) for each in commands)
        response = await request(
            self.app, "POST", "/live/emulation", json={"session": self.session, "data": data}, **options
        )
        assert response.status_code == status

    async def connected(self) -> dict[str, Any]:
        connect: dict[str, Any] = (await self.hear())["connect"]
        self.session = connect["session"]
        return connect


@contextlib.asynccontextmanager
async def open_stream(app: Any, kind: str, command: str = CONNECT, **options: Any) -> AsyncIterator[Stream]:
    if kind == "sse":
        opened = stream(app, "GET", f"/live/sse?cf_connect={quote(command)}", **options)
    else:
        opened = stream(app, "POST", "/live/http_stream", content=command, **options)
    async with opened as response:
        yield Stream(app, kind, response)


@pytest.fixture
def hub() -> Hub:
    hub = Hub(allowed_origins=["https://friend.example"])
    hub.serve_pubsub("/live")

    @hub.channel("news", publish=True)
    async def news(conn: Connection) -> bool:
        return True

    @hub.rpc("how")
    async def how(conn: Connection) -> list[str]:
        return [conn.transport, str(conn.url)]

    @hub.rpc("close")
    async def close(conn: Connection) -> None:
        await conn.close(4500, "as asked for")

    return hub


@pytest.fixture
def app(hub: Hub) -> WebSocketMiddleware:
    return WebSocketMiddleware(no_page, hub=hub)


@both
async def test_a_conversation(kind: str, app: WebSocketMiddleware, hub: Hub) -> None:
    async with connect(app, "/live") as other, open_stream(app, kind) as client:
        await other.send(CONNECT + "\n" + '{"id":2,"subscribe":{"channel":"news"}}')
        await other.receive()
        await other.receive()
        content_type = client.response.headers["content-type"]
        assert content_type.startswith("text/event-stream" if kind == "sse" else "application/json")
        assert client.response.headers["x-accel-buffering"] == "no"
        assert "no-transform" in client.response.headers["cache-control"]
        result = await client.connected()
        assert result["session"] != result["client"]
        assert len(result["session"]) >= 32
        await client.say({"id": 2, "rpc": {"method": "how"}}, {"id": 3, "subscribe": {"channel": "news"}})
        heard = {each["id"]: each for each in [await client.hear(), await client.hear()]}
        # The token, which may be in the query, is nobody's business.
        assert heard[2]["rpc"]["data"] == [kind, "ws://testserver/live"]
        await client.say({"id": 4, "publish": {"channel": "news", "data": "ü\n\u2028"}})
        push = await client.hear()
        assert push["push"]["pub"]["data"] == "ü\n\u2028"
        assert await other.receive_json() == push
        assert await client.hear() == {"id": 4, "publish": {}}
        await client.say({"id": 5, "rpc": {"method": "close"}})
        assert await client.hear() == {"push": {"disconnect": {"code": 4500, "reason": "as asked for"}}}
        assert await client.ended()
        await client.say({"id": 6, "rpc": {"method": "how"}}, status=404)


@both
async def test_what_is_wrong_with_the_first_command_is_said_on_the_stream(kind: str, app: WebSocketMiddleware) -> None:
    async with open_stream(app, kind, '{"id":1,"rpc":{}}') as client:
        assert client.response.status_code == 200
        assert (await client.hear())["push"]["disconnect"] == {"code": 3501, "reason": "bad request"}
        assert await client.ended()


@both
async def test_the_end_of_the_stream_is_the_end_of_the_connection(
    kind: str, app: WebSocketMiddleware, hub: Hub
) -> None:
    async with hub:
        async with open_stream(app, kind) as client:
            await client.connected()
            assert len(hub.context.clients) == 1
        assert not hub.context.clients
        await client.say({"id": 2, "rpc": {}}, status=404)


@both
async def test_a_refusal_is_an_answer(kind: str, app: WebSocketMiddleware, hub: Hub) -> None:
    @hub.on_connect
    async def nobody(conn: Connection) -> None:
        raise HTTPException(401, "who are you?", {"X-Reason": "none"})

    async with open_stream(app, kind) as client:
        assert client.response.status_code == 401
        assert client.response.headers["x-reason"] == "none"
        assert (await client.response.aread()) == b"who are you?"


@both
async def test_pages_of_other_origins(kind: str, app: WebSocketMiddleware) -> None:
    friend, foe = {"origin": "https://friend.example"}, {"origin": "https://foe.example"}
    async with open_stream(app, kind, headers=friend) as client:
        assert client.response.headers["access-control-allow-origin"] == "https://friend.example"
        await client.connected()
        await client.say({}, headers=foe, status=403)
        # Not without the origin that the session has.
        await client.say({"id": 2, "rpc": {"method": "how"}}, status=404)
        await client.say({"id": 2, "rpc": {"method": "how"}}, headers=friend)
        assert (await client.hear())["id"] == 2
    async with open_stream(app, kind, headers=foe) as client:
        assert client.response.status_code == 403
        assert "access-control-allow-origin" not in client.response.headers
        await client.response.aread()
    for path in (f"/live/{kind}", "/live/emulation"):
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        response = await request(app, "OPTIONS", path, headers={**friend, **asked})
        assert response.status_code == 204
        assert response.headers["access-control-allow-headers"] == "content-type"
        assert (await request(app, "OPTIONS", path, headers={**foe, **asked})).status_code == 403


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/live/http_stream", b"", 405),
        ("POST", "/live/sse", b"", 405),
        ("GET", "/live/emulation", b"", 405),
        ("GET", "/live/sse", b"", 400),
        ("GET", "/live/sse?cf_connect=", b"", 400),
        ("GET", "/live/sse?a=b", b"", 400),
        ("GET", "/live/sse?cf_connect=%ff", b"", 400),
        ("POST", "/live/http_stream", b"", 400),
        ("POST", "/live/http_stream", b"\xff", 400),
        ("POST", "/live/http_stream", b"x" * 3000, 413),
        ("POST", "/live/emulation", b"x" * 3000, 413),
        ("POST", "/live/emulation", b"not JSON", 400),
        ("POST", "/live/emulation", b'{"session":"x","data":{}}', 400),
        ("POST", "/live/emulation", b'{"session":"x","data":"{}"}', 404),
        ("POST", "/live/else", b"", 404),
        ("POST", "/elsewhere/emulation", b"", 404),
    ],
)
async def test_requests_that_nothing_comes_of(method: str, path: str, content: bytes, status: int) -> None:
    hub = Hub(limits=Limits(message_size=2000))
    hub.serve_pubsub("/live")
    response = await request(WebSocketMiddleware(no_page, hub=hub), method, path, content=content)
    assert response.status_code == status
    if status == 405:
        assert response.headers["allow"]


async def test_protobuf_is_refused(app: WebSocketMiddleware) -> None:
    headers = {"content-type": "application/octet-stream"}
    assert (await request(app, "POST", "/live/http_stream", headers=headers, content=b"x")).status_code == 415


async def test_other_streams_are_refused(app: WebSocketMiddleware) -> None:
    response = await request(app, "GET", "/live", headers={"accept": "text/event-stream"})
    assert response.status_code == 400
    assert "Centrifuge" in response.text


async def test_an_endpoint_at_the_root_and_in_parameters_has_its_streams() -> None:
    hub = Hub()
    hub.serve_pubsub("/")
    hub.serve_pubsub("/{tenant}/live")

    @hub.rpc("tenant")
    async def tenant(conn: Connection) -> str:
        return str(conn.path_params.get("tenant", ""))

    app = WebSocketMiddleware(no_page, hub=hub)
    for path, said in (("/", ""), ("/acme/live/", "acme")):
        async with stream(app, "POST", f"{path}http_stream", content=CONNECT) as response:
            client = Stream(app, "http_stream", response)
            await client.connected()
            data = '{"id":2,"rpc":{"method":"tenant"}}'
            said_so = await request(app, "POST", f"{path}emulation", json={"session": client.session, "data": data})
            assert said_so.status_code == 204
            assert (await client.hear())["rpc"]["data"] == said


async def test_the_user_of_a_session_is_the_user_of_its_requests(hub: Hub) -> None:
    who = "ann"
    inner = WebSocketMiddleware(no_page, hub=hub)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await inner({**scope, "user": who}, receive, send)

    async with open_stream(app, "http_stream") as client:
        await client.connected()
        who = "eve"
        await client.say({"id": 2, "rpc": {"method": "how"}}, status=404)
        who = "ann"
        await client.say({"id": 2, "rpc": {"method": "how"}})


async def test_requests_wait_until_the_connection_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.endpoints.pubsub._AT_ONCE", 1)
    monkeypatch.setattr("asgi_ws.transports.centrifuge._MOST_WAITING", 1)
    hub = Hub(limits=Limits(inbox_messages=1))
    hub.serve_pubsub("/live")
    go_on = asyncio.Event()

    @hub.rpc("waits")
    async def waits(conn: Connection) -> None:
        await go_on.wait()

    app = WebSocketMiddleware(no_page, hub=hub)
    call = {"id": 2, "rpc": {"method": "waits"}}
    async with open_stream(app, "http_stream") as client:
        await client.connected()
        # One is worked on, one waits for that, one is in the inbox.
        for _ in range(3):
            await client.say(call)
        waiting = asyncio.create_task(client.say(call))
        await asyncio.sleep(0.02)
        await client.say(call, status=503)
        assert not waiting.done()
        go_on.set()
        await waiting
        for _ in range(4):
            await client.hear()
        go_on.clear()
        for _ in range(3):
            await client.say(call)
        monkeypatch.setattr("asgi_ws.transports.centrifuge._ROOM_TIME", 0.02)
        await client.say(call, status=503)
        go_on.set()


async def test_streams_end_with_the_server(hub: Hub, app: WebSocketMiddleware) -> None:
    async with open_stream(app, "sse") as client:
        await client.connected()
        app.streams.stop()
        assert (await client.hear())["push"]["disconnect"] == {"code": 3001, "reason": "shutdown"}
        assert await client.ended()


# Applications that are no endpoints


class Refuses:
    """Refuses without a word, or says nothing at all, or reads until the end."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.heard: list[Any] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.heard.append(await receive())
        if self.way == "refuses":
            await send({"type": "websocket.close"})
        if self.way in ("accepts", "stays"):
            await send({"type": "websocket.accept"})
        if self.way in ("stays", "waits"):
            self.heard.append(await receive())
            with pytest.raises(OSError, match="gone"):
                await send({"type": "websocket.accept"})


@pytest.mark.parametrize(("way", "status"), [("refuses", 403), ("says nothing", 500), ("accepts", 200)])
async def test_what_an_application_leaves_open_is_ended(way: str, status: int) -> None:
    transport = CentrifugeTransport(Refuses(way), origins=OriginPolicy(), max_size=None)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await transport(scope, receive, send, "http_stream")

    response = await request(app, "POST", "/", content=CONNECT, lifespan=False)
    assert response.status_code == status
    assert not response.content


@pytest.mark.parametrize("way", ["stays", "waits"])
async def test_an_application_hears_that_the_client_is_gone(way: str) -> None:
    inner = Refuses(way)
    transport = CentrifugeTransport(inner, origins=OriginPolicy(), max_size=None)
    ended = asyncio.Event()
    incoming: list[Message] = [{"type": "http.request", "body": CONNECT.encode()}]
    sent: list[Message] = []

    async def receive() -> Message:
        if incoming:
            return incoming.pop()
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "http_version": "1.1"}
    asyncio.get_running_loop().call_later(0.02, ended.set)
    if way == "stays":
        asyncio.get_running_loop().call_later(0.01, transport.stop)
    await transport(scope, receive, send, "http_stream")
    assert inner.heard == [{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1006}]
    assert len(sent) == (way == "stays")


async def test_a_client_that_leaves_while_it_asks_gets_no_answer() -> None:
    transport = CentrifugeTransport(Refuses("accepts"), origins=OriginPolicy(), max_size=None)
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "http_version": "1.1"}
    await transport(scope, receive, send, "emulation")
    assert not sent


async def test_a_client_that_does_not_read_is_cut_off(hub: Hub, app: WebSocketMiddleware) -> None:
    async with hub, open_stream(app, "http_stream") as client:
        await client.connected()
        (conn,) = hub.context.clients.values()
        conn._link.abort()  # type: ignore[attr-defined]
        # Where the server can't end the transport, nothing is written any more.
        await client.say({"id": 2, "rpc": {"method": "how"}})


async def test_a_link_that_nobody_listens_to_takes_everything() -> None:
    async def send(message: Message) -> None:
        raise AssertionError("nothing is written")

    link = StreamLink(send, lambda: None, "sse", "secret", CONNECT)
    link.resume_reading()
    assert await link.deliver("{}")


# Several processes


class Listens:
    """Hears what the client of the stream says."""

    def __init__(self) -> None:
        self.link: StreamLink | None = None
        self.heard: list[str | bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        self.link = scope["asgi_ws.session"]
        self.link.listen(self, None)
        await receive()

    def message_received(self, payload: str | bytes) -> None:
        self.heard.append(payload)

    def connection_lost(self, closed: ConnectionClosed) -> None:
        """The stream is over."""

    def server_stopping(self) -> None:
        raise AssertionError("nothing stops")


async def test_requests_of_a_stream_may_reach_another_process(two: tuple[Relay, Relay]) -> None:  # noqa: F811
    here, there = two
    inner = Listens()
    owner = CentrifugeTransport(inner, origins=OriginPolicy(), max_size=None, relay=lambda: here)
    other = CentrifugeTransport(inner, origins=OriginPolicy(), max_size=None, relay=lambda: there)

    async def opens(scope: Scope, receive: Receive, send: Send) -> None:
        await owner(scope, receive, send, "http_stream")

    async def takes(scope: Scope, receive: Receive, send: Send) -> None:
        await other(scope, receive, send, "emulation")

    async with stream(opens, "POST", "/", content=CONNECT, lifespan=False):
        assert inner.link is not None
        said = {"session": inner.link.secret, "data": "{}"}
        response = await request(takes, "POST", "/", json=said, lifespan=False)
        assert (response.status_code, response.content) == (204, b"")
        assert inner.heard == [CONNECT, "{}"]
    for session in (inner.link.secret, "unknown", there.new_id()):
        response = await request(takes, "POST", "/", json={"session": session, "data": "{}"}, lifespan=False)
        assert response.status_code == 404
