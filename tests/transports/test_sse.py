"""Server-sent events: what a browser makes of them, and the stream of an application without a network."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from asgi_ws import Connection, ConnectionClosed, Hub, InvalidPosition, Limits, Position, WebSocketMiddleware
from asgi_ws.frames import Frame
from asgi_ws.messages import Publication, Recovery
from asgi_ws.origins import OriginPolicy
from asgi_ws.payloads import encode
from asgi_ws.protocols import JsonProtocol, PlainProtocol, PositionsProtocol, Protocol
from asgi_ws.testing import Response, connect, request, stream
from asgi_ws.transports import EventTransport
from asgi_ws.transports.sse import EventProtocol, close_event, event, format_since, parse_since
from tests.transports.test_engineio import nothing

pytestmark = pytest.mark.anyio

Event = tuple[str, str, str]
"""Type, data, and the last event id behind it."""


class Parser:
    """WHATWG HTML section 9.2.6, line by line."""

    def __init__(self, last_event_id: str = "") -> None:
        self.last_event_id = last_event_id
        self.retry: int | None = None
        self.comments = 0
        self._unread = ""
        self._type = ""
        self._data = ""

    def feed(self, chunk: bytes) -> list[Event]:
        events: list[Event] = []
        self._unread += chunk.decode()
        text = self._unread.replace("\r\n", "\n").replace("\r", "\n")
        *lines, self._unread = text.split("\n")
        for line in lines:
            if not line:
                if self._data:
                    events.append((self._type or "message", self._data.removesuffix("\n"), self.last_event_id))
                self._type = self._data = ""
                continue
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if not name:
                self.comments += 1
            elif name == "event":
                self._type = value
            elif name == "data":
                self._data += value + "\n"
            elif name == "id":
                assert "\0" not in value
                self.last_event_id = value
            elif name == "retry":
                self.retry = int(value)
            else:
                raise AssertionError(line)
        return events


# Events


@pytest.mark.parametrize(
    ("payload", "written"),
    [
        ("hello", b"data: hello\n\n"),
        ("", b"data: \n\n"),
        ("a\nb", b"data: a\ndata: b\n\n"),
        ("a\r\nb\rc\n", b"data: a\ndata: b\ndata: c\ndata: \n\n"),
        ("\n", b"data: \ndata: \n\n"),
        (" space", b"data:  space\n\n"),
        ("event: x\n\nid: y", b"data: event: x\ndata: \ndata: id: y\n\n"),
        (b"\x00\xff", b"event: binary\ndata: AP8=\n\n"),
        (b"", b"event: binary\ndata: \n\n"),
    ],
)
def test_payload_is_an_event(payload: str | bytes, written: bytes) -> None:
    assert event(payload) == written


@given(st.lists(st.one_of(st.text(st.characters(codec="utf-8")), st.binary())))
def test_browser_reads_what_was_written(payloads: list[str | bytes]) -> None:
    read = Parser().feed(b"".join(event(payload) for payload in payloads))
    assert [
        base64.b64decode(data) if type_ == "binary" else data
        for type_, data, _ in read
        if type_ in ("binary", "message")
    ] == [
        payload if isinstance(payload, bytes) else payload.replace("\r\n", "\n").replace("\r", "\n")
        for payload in payloads
    ]
    assert len(read) == len(payloads)


positions = st.builds(
    Position,
    st.integers(0, 2**53 - 1),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=64).filter(str.isprintable),
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), positions, max_size=5))
def test_id_says_positions_and_nothing_else(seen: dict[str, Position]) -> None:
    text = format_since(seen)
    assert text.isascii()
    assert text.isprintable()
    if seen:
        assert parse_since(text) == seen


def test_id_is_readable() -> None:
    assert format_since({"chat:lobby": Position(17, "abc"), "a&b": Position(3, "e=f")}) == (
        "chat:lobby=17:abc&a%26b=3:e%3Df"
    )


@pytest.mark.parametrize("text", ["17", "chat", "chat=", "chat=17", "chat=-1:e", "=&=", "a=1:e&b", "&" * 10_000])
def test_what_no_id_said_is_no_position(text: str) -> None:
    with pytest.raises(InvalidPosition):
        parse_since(text)


@given(st.text(st.characters(codec="latin-1")))
def test_no_last_event_id_raises_anything_else(text: str) -> None:
    with contextlib.suppress(InvalidPosition):
        parse_since(text)


@pytest.mark.parametrize("code", [1001, 1011, 1012, 1013])
def test_end_that_may_be_tried_again_says_when(code: int) -> None:
    parser = Parser("chat=17:abc")
    assert parser.feed(close_event(code, "x\ny")) == [
        ("close", json.dumps({"code": code, "reason": "x\ny"}), "chat=17:abc")
    ]
    assert parser.retry is not None
    assert 1000 <= parser.retry <= 5000


@pytest.mark.parametrize("code", [1000, 1008, 4000])
def test_end_for_good_is_in_the_id(code: int) -> None:
    assert Parser("chat=17:abc").feed(close_event(code, ""))[0][2] == "closed"


def test_publication_without_position_has_no_id() -> None:
    assert Publication("chat", encode("a")).frame(EventProtocol(PlainProtocol())).payload == b"data: a\n\n"


def test_publication_is_an_event_once_for_all() -> None:
    publication = Publication("chat", encode([1]), Position(1, "e"))
    protocol = EventProtocol(JsonProtocol())
    frame: Any = publication.frame(protocol)
    assert frame is publication.frame(EventProtocol(JsonProtocol()))
    assert frame.alone is frame.alone
    assert frame.alone.payload == b"id: chat=1:e\ndata: [1]\n\n"
    assert protocol.encode("x") == b'data: "x"\n\n'
    assert protocol.decode("[1]") == [1]


class Attaching(Protocol[Any]):
    format = "attaching"

    def decode(self, payload: str | bytes) -> Any:
        raise NotImplementedError

    def encode(self, message: Any) -> Frame:
        return Frame("text", [b"\x01"])

    def encode_publication(self, publication: Publication) -> str:
        raise NotImplementedError


def test_what_belongs_together_is_one_event_behind_the_other() -> None:
    assert EventProtocol(Attaching()).encode(None) == b"data: text\n\nevent: binary\ndata: AQ==\n\n"


# Streams


class Events:
    """An `EventSource` for an application without a network."""

    def __init__(self, response: Response, parser: Parser) -> None:
        self.response = response
        self.parser = parser
        self._chunks = response.aiter_bytes()
        self._events: list[Event] = []

    async def read(self) -> None:
        self._events += self.parser.feed(await anext(self._chunks))

    async def next(self) -> Event:
        while not self._events:
            await self.read()
        return self._events.pop(0)

    async def data(self) -> str:
        type_, data, _ = await self.next()
        assert type_ == "message"
        return data

    async def end(self) -> tuple[int, str]:
        type_, data, _ = await self.next()
        assert type_ == "close"
        with pytest.raises(StopAsyncIteration):
            await self.read()
        closed = json.loads(data)
        return closed["code"], closed["reason"]


@contextlib.asynccontextmanager
async def events(app: ASGIApp, path: str, last_event_id: str = "", **headers: str) -> AsyncIterator[Events]:
    headers = {"accept": "text/event-stream", **headers}
    if last_event_id:
        headers["last-event-id"] = last_event_id
    async with stream(app, "GET", path, headers=headers, lifespan=False) as response:
        assert response.status_code == 200, await response.aread()
        yield Events(response, Parser(last_event_id))


class Site:
    def __init__(self, **options: Any) -> None:
        self.hub = Hub(**options)
        self.app = WebSocketMiddleware(nothing, hub=self.hub)
        self.connections: list[Connection] = []
        self.ended: list[ConnectionClosed] = []

        @self.hub.channel("news:{topic}", history=100)
        async def anybody(conn: Connection, topic: str) -> bool:
            return True

        @self.hub.websocket("/news/{topic}")
        async def news(conn: Connection, topic: str) -> None:
            self.connections.append(conn)
            for name in topic.split("+"):
                recovery = await conn.subscribe(f"news:{name}")
                if conn.query_params.get("say"):
                    await conn.send(f"recovered: {recovery.recovered}")
            try:
                await conn.receive()
            except ConnectionClosed as closed:
                self.ended.append(closed)

        @self.hub.websocket("/ends/{how}")
        async def ends(conn: Connection, how: str) -> None:
            await conn.send("bye")
            if how == "badly":
                raise ValueError("on purpose")
            if how != "well":
                await conn.close(int(how), "as asked")

    async def publish(self, topic: str, data: Any) -> None:
        await self.hub.publish(f"news:{topic}", data)


@contextlib.asynccontextmanager
async def running(site: Site) -> AsyncIterator[Site]:
    async with site.hub:
        yield site
    assert site.hub.context.connections._count == 0
    assert not [task for task in asyncio.all_tasks() if task.get_name() in ("asgi_ws request", "asgi_ws writer")]


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with running(Site()) as site:
        yield site


async def until(condition: Any) -> None:
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0.001)


async def test_output_of_an_endpoint_is_a_stream_of_events(site: Site) -> None:
    async with events(site.app, "/news/tech") as source:
        headers = source.response.headers
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["cache-control"] == "no-store, no-transform"
        assert headers["x-accel-buffering"] == "no"
        assert headers["x-content-type-options"] == "nosniff"
        await until(lambda: site.connections and site.connections[0].channels)
        await site.publish("tech", "hello\nworld")
        await site.publish("tech", {"a": 1})
        await site.publish("tech", b"\x00\xff")
        assert await source.data() == "hello\nworld"
        assert await source.data() == '{"a":1}'
        assert (await source.next())[:2] == ("binary", "AP8=")
        assert site.connections[0].transport == "sse"
        assert source.parser.last_event_id.startswith("news:tech=3:")
    await until(lambda: site.ended)
    assert [closed.code for closed in site.ended] == [1006]


async def test_client_that_comes_back_gets_what_it_missed(site: Site) -> None:
    async with events(site.app, "/news/tech?say=1") as source:
        assert await source.data() == "recovered: False"
        await site.publish("tech", "1")
        assert await source.data() == "1"
    last = source.parser.last_event_id
    await site.publish("tech", "2")
    await site.publish("tech", "3")
    async with events(site.app, "/news/tech?say=1", last) as source:
        assert [await source.data() for _ in range(3)] == ["2", "3", "recovered: True"]
        await site.publish("tech", "4")
        assert await source.data() == "4"


async def test_client_that_has_seen_nothing_yet_misses_nothing_either(site: Site) -> None:
    await site.publish("tech", "before")
    async with events(site.app, "/news/tech?say=1") as source:
        assert await source.data() == "recovered: False"
    assert source.parser.last_event_id.startswith("news:tech=1:")
    await site.publish("tech", "meanwhile")
    async with events(site.app, "/news/tech", source.parser.last_event_id) as source:
        assert await source.data() == "meanwhile"


async def test_each_channel_goes_on_from_its_own_position(site: Site) -> None:
    async with events(site.app, "/news/a+b?say=1") as source:
        for _ in range(2):
            await source.data()
        for n in range(3):
            await site.publish("a", f"a{n}")
            assert await source.data() == f"a{n}"
    last = source.parser.last_event_id
    assert {channel: position.offset for channel, position in parse_since(last).items()} == {"news:a": 3, "news:b": 0}
    await site.publish("b", "b0")
    await site.publish("a", "a3")
    async with events(site.app, "/news/a+b", last) as source:
        assert sorted([await source.data(), await source.data()]) == ["a3", "b0"]


async def test_channel_that_was_left_is_not_in_the_id(site: Site) -> None:
    async with events(site.app, "/news/a+b?say=1") as source:
        for _ in range(2):
            await source.data()
        await site.connections[0].unsubscribe("news:a")
        await site.publish("b", "b0")
        assert await source.data() == "b0"
        assert list(parse_since(source.parser.last_event_id)) == ["news:b"]


@pytest.mark.parametrize(
    ("recovery", "said"),
    [
        (Recovery(False, None), None),
        (Recovery(True, Position(3, "e")), None),
        (Recovery(False, Position(3, "e")), b"id: news=3:e\n\n"),
    ],
)
def test_begin_of_a_subscription_is_said_by_its_id_alone(recovery: Recovery, said: bytes | None) -> None:
    words: Any = EventProtocol(JsonProtocol()).encode_recovery("news", recovery)
    assert (words and words.alone.payload) == said


def test_begin_of_a_subscription_may_be_an_event() -> None:
    protocol = EventProtocol(PositionsProtocol())
    words: Any = protocol.encode_recovery("news", Recovery(False, Position(3, "e")))
    assert words.alone.payload.startswith(b'id: news=3:e\ndata: {"channel":"news","recovered":false')
    words = protocol.encode_recovery("news", Recovery(True, Position(3, "e")))
    assert words.startswith(b'data: {"channel":"news","recovered":true')


async def test_history_that_is_gone_is_said(site: Site) -> None:
    async with events(site.app, "/news/tech?say=1", "news:tech=17:another") as source:
        assert await source.data() == "recovered: False"


async def test_last_event_id_of_somebody_else_is_refused(site: Site) -> None:
    headers = {"accept": "text/event-stream", "last-event-id": "4711"}
    response = await request(site.app, "GET", "/news/tech", headers=headers, lifespan=False)
    assert (response.status_code, response.text) == (400, "Last-Event-ID: not a position: '4711'\n")


async def test_comments_keep_the_stream_alive() -> None:
    async with running(Site(limits=Limits(ping_interval=0.02))) as site, events(site.app, "/news/tech") as source:
        while source.parser.comments < 4:
            await source.read()


async def test_handler_that_returns_ends_the_stream_for_good(site: Site) -> None:
    async with events(site.app, "/ends/well") as source:
        assert await source.data() == "bye"
        assert await source.end() == (1000, "")
        last = source.parser.last_event_id
    headers = {"accept": "text/event-stream", "last-event-id": last}
    response = await request(site.app, "GET", "/ends/well", headers=headers, lifespan=False)
    assert (response.status_code, response.text) == (204, "")


async def test_handler_that_raises_is_tried_again(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    async with events(site.app, "/ends/badly") as source:
        assert await source.data() == "bye"
        assert await source.end() == (1011, "")
        assert source.parser.last_event_id == ""
    assert "the handler of '/ends/badly' failed" in caplog.text


async def test_code_of_the_handlers_own_is_said(site: Site) -> None:
    async with events(site.app, "/ends/4001") as source:
        assert await source.data() == "bye"
        assert await source.end() == (4001, "as asked")


async def test_client_that_does_not_read_is_closed_like_any_slow_one() -> None:
    async with running(Site(limits=Limits(outbox_size=50_000))) as site:
        async with events(site.app, "/news/tech") as slow, connect(site.app, "/news/tech", lifespan=False) as other:
            await until(lambda: all(conn.channels for conn in site.connections) and len(site.connections) == 2)
            for n in range(30):
                await site.publish("tech", str(n).ljust(10_000))
                await other.receive()
            offsets = []
            while (received := await slow.next())[0] == "message":
                offsets.append(int(received[1]))
            assert json.loads(received[1]) == {"code": 1013, "reason": "slow consumer"}
            assert offsets == list(range(len(offsets)))
        async with events(site.app, "/news/tech", received[2]) as back:
            missed = [int(await back.data()) for _ in range(30 - len(offsets))]
            assert missed == list(range(len(offsets), 30))


async def test_server_that_stops_ends_the_streams() -> None:
    async with running(Site()) as site, events(site.app, "/news/tech?say=1") as source:
        await source.data()
        site.app.events.stop()
        assert await source.end() == (1012, "")


async def test_connections_are_counted() -> None:
    async with running(Site(limits=Limits(connections=1))) as site, events(site.app, "/news/tech"):
        headers = {"accept": "text/event-stream"}
        response = await request(site.app, "GET", "/news/tech", headers=headers, lifespan=False)
        assert response.status_code == 503
        assert response.headers["cache-control"] == "no-store"


async def test_origin_decides_as_for_websockets() -> None:
    async with running(Site(allowed_origins=["https://a.example"])) as site:
        async with events(site.app, "/news/tech", origin="https://a.example") as source:
            assert source.response.headers["access-control-allow-origin"] == "https://a.example"
            assert source.response.headers["access-control-allow-credentials"] == "true"
            assert source.response.headers["vary"] == "Origin"
        for name, value in (("origin", "https://evil.example"), ("sec-fetch-site", "cross-site")):
            headers = {"accept": "text/event-stream", name: value}
            response = await request(site.app, "GET", "/news/tech", headers=headers, lifespan=False)
            assert response.status_code == 403
            assert "access-control-allow-origin" not in response.headers
        headers = {"origin": "https://a.example", "access-control-request-method": "GET"}
        response = await request(site.app, "OPTIONS", "/news/tech", headers=headers, lifespan=False)
        assert response.status_code == 204
        assert response.headers["access-control-allow-methods"] == "GET"


async def test_application_refuses_with_its_own_answer(site: Site) -> None:
    @site.hub.on_connect
    async def hook(conn: Connection) -> None:
        raise HTTPException(401, "who?", headers={"WWW-Authenticate": "Bearer"})

    headers = {"accept": "text/event-stream"}
    response = await request(site.app, "GET", "/news/tech", headers=headers, lifespan=False)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("accept", ["*/*", "text/html"])
async def test_other_requests_are_told_to_upgrade(site: Site, accept: str) -> None:
    response = await request(site.app, "GET", "/news/tech", headers={"accept": accept}, lifespan=False)
    assert response.status_code == 426


# Applications without connections


def served(app: Any) -> EventTransport:
    return EventTransport(app, origins=OriginPolicy())


async def test_any_websocket_application_is_served() -> None:
    seen: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        websocket = WebSocket(scope, receive, send)
        await websocket.accept()
        await websocket.send_text("hello")
        await websocket.send_bytes(b"\x01")
        seen.append((await websocket.receive())["code"])
        await send({"type": "websocket.send", "text": "too late"})

    with pytest.raises(OSError, match="gone"):
        async with events(served(app), "/") as source:
            assert await source.data() == "hello"
            assert (await source.next())[:2] == ("binary", "AQ==")
    assert seen == [1006]


async def test_application_that_returns_has_closed() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})

    async with events(served(app), "/") as source:
        assert await source.end() == (1000, "")


async def test_application_that_closes_says_its_code() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", "code": 4000, "reason": "enough"})

    async with events(served(app), "/") as source:
        assert await source.end() == (4000, "enough")


@pytest.mark.parametrize(("message", "status"), [({"type": "websocket.close"}, 403), (None, 500)])
async def test_application_that_does_not_accept_has_refused(message: Message | None, status: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if message is not None:
            await send(message)

    response = await request(served(app), "GET", "/", lifespan=False)
    assert response.status_code == status


async def test_application_is_told_that_the_server_stops() -> None:
    seen: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        websocket = WebSocket(scope, receive, send)
        await websocket.accept()
        seen.append((await websocket.receive())["code"])

    transport = served(app)
    async with events(transport, "/") as source:
        await source.read()
        transport.stop()
        assert await source.end() == (1012, "")
    assert seen == [1012]
