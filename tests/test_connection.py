"""What a handler sees of its client, through real applications and the test client."""

import asyncio
import dataclasses
import gc
import logging
import typing

import anyio
import fastapi
import msgspec
import pydantic
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException, WebSocketException

from asgi_ws import (
    Connection,
    ConnectionClosed,
    Hub,
    InvalidChannel,
    InvalidMessage,
    Limits,
    Publication,
    SubscriptionDenied,
    WebSocketMiddleware,
)
from asgi_ws.presence import Member
from asgi_ws.testing import Refused, connect
from tests.bus import Bus, BusBroker

pytestmark = pytest.mark.anyio


async def nothing(scope: typing.Any, receive: typing.Any, send: typing.Any) -> None:
    raise AssertionError(f"nothing is expected behind the middleware: {scope}")


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def app(hub: Hub) -> WebSocketMiddleware:
    return WebSocketMiddleware(nothing, hub=hub)


# Messages


async def test_text_and_binary_arrive_as_str_and_bytes(hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.websocket("/")
    async def echo(conn: Connection) -> None:
        async for message in conn:
            await conn.send(message)

    async with connect(app, "/") as client:
        await client.send("text")
        assert await client.receive() == "text"
        await client.send(b"\x00\xff")
        assert await client.receive() == b"\x00\xff"
        await client.send("")
        assert await client.receive() == ""


class Point(pydantic.BaseModel):
    x: int
    y: int


class Struct(msgspec.Struct):
    x: int
    y: int


@dataclasses.dataclass
class Data:
    x: int
    y: int


class Typed(typing.TypedDict):
    x: int
    y: int


@pytest.mark.parametrize("type_", [Point, Struct, Data, Typed, dict, dict[str, int]])
async def test_messages_are_validated_as_the_annotation_says(
    type_: typing.Any, hub: Hub, app: WebSocketMiddleware
) -> None:
    async def echo(conn: Connection) -> None:
        async for message in conn:
            assert isinstance(message, typing.get_origin(type_) or (dict if type_ is Typed else type_))
            await conn.send(message)

    echo.__annotations__["conn"] = Connection[type_]
    hub.websocket("/")(echo)
    async with connect(app, "/") as client:
        await client.send('{"x": 1, "y": 2}')
        assert await client.receive_json() == {"x": 1, "y": 2}
        await client.send(b'{"x": 3, "y": 4}')
        assert await client.receive_json() == {"x": 3, "y": 4}


async def test_what_cant_be_read_closes_with_1007_and_the_field(hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.websocket("/")
    async def read(conn: Connection[Struct]) -> None:
        async for _ in conn:
            pass

    async with connect(app, "/") as client:
        await client.send({"x": 1, "y": "two"})
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
    assert closed.value.code == 1007
    assert closed.value.reason == "$.y: Expected `int`, got `str`"


async def test_on_invalid_may_answer_and_the_loop_goes_on(hub: Hub, app: WebSocketMiddleware) -> None:
    async def explain(conn: Connection, error: InvalidMessage) -> None:
        await conn.send({"error": error.reason})

    @hub.websocket("/", on_invalid=explain)
    async def read(conn: Connection[Struct]) -> None:
        async for message in conn:
            await conn.send(message)

    async with connect(app, "/") as client:
        await client.send("{")
        assert "error" in await client.receive_json()
        await client.send({"x": 1, "y": 2})
        assert await client.receive_json() == {"x": 1, "y": 2}


async def test_a_handler_may_catch_an_invalid_message(hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.websocket("/")
    async def read(conn: Connection[int, str]) -> None:
        with pytest.raises(InvalidMessage):
            await conn.receive()
        await conn.send("caught")

    async with connect(app, "/") as client:
        await client.send("one")
        assert await client.receive() == "caught"


async def test_a_reason_is_cut_to_what_a_close_frame_holds(hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.websocket("/")
    async def close(conn: Connection) -> None:
        await conn.close(4001, "é" * 100)

    async with connect(app, "/") as client:
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
    assert closed.value.reason == "é" * 61
    assert len(closed.value.reason.encode()) <= 123


async def test_two_tasks_cant_receive_at_once(hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.websocket("/")
    async def twice(conn: Connection) -> None:
        first = asyncio.create_task(conn.receive())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task"):
            await conn.receive()
        await conn.send(await first)

    async with connect(app, "/") as client:
        await client.send("one")
        assert await client.receive() == "one"


async def test_receiving_can_be_given_up_and_begun_again(hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.websocket("/")
    async def patient(conn: Connection) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await conn.receive()
        await conn.send("ready")
        await conn.send(await conn.receive())

    async with connect(app, "/") as client:
        assert await client.receive() == "ready"
        await client.send("one")
        assert await client.receive() == "one"


async def test_the_inbox_is_bounded_in_messages_and_then_the_server_is_not_read() -> None:
    hub = Hub(limits=Limits(inbox_messages=3))
    go = asyncio.Event()

    @hub.websocket("/")
    async def later(conn: Connection) -> None:
        await go.wait()
        async for message in conn:
            await conn.send(message)

    async with connect(WebSocketMiddleware(nothing, hub=hub), "/", timeout=0.2) as client:
        # 3 in the inbox and 16 on their way; nothing takes the next.
        with pytest.raises(TimeoutError):
            for number in range(30):
                await client.send(str(number))
        go.set()
        for expected in range(19):
            assert await client.receive() == str(expected)


async def test_the_inbox_is_bounded_in_bytes() -> None:
    hub = Hub(limits=Limits(message_size=1000))
    go = asyncio.Event()

    @hub.websocket("/")
    async def later(conn: Connection) -> None:
        await go.wait()
        async for message in conn:
            await conn.send(len(message))

    async with connect(WebSocketMiddleware(nothing, hub=hub), "/", timeout=0.2) as client:
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 30:
                await client.send("é" * 300)
                sent += 1
        assert sent == 2 + 16
        go.set()
        for _ in range(sent):
            assert await client.receive_json() == 300


# Limits


@pytest.mark.parametrize(("message", "closed"), [("x" * 100, False), ("x" * 101, True), (b"x" * 101, True)])
async def test_a_message_over_the_limit_is_closed_with_1009(message: str | bytes, closed: bool) -> None:
    hub = Hub(limits=Limits(message_size=100))

    @hub.websocket("/")
    async def echo(conn: Connection) -> None:
        async for received in conn:
            await conn.send(received)

    async with connect(WebSocketMiddleware(nothing, hub=hub), "/") as client:
        await client.send(message)
        if closed:
            with pytest.raises(ConnectionClosed) as error:
                await client.receive()
            assert error.value.code == 1009
        else:
            assert await client.receive() == message


async def test_the_size_of_text_is_counted_in_bytes() -> None:
    hub = Hub(limits=Limits(message_size=100))

    @hub.websocket("/")
    async def read(conn: Connection) -> None:
        async for _ in conn:
            pass

    async with connect(WebSocketMiddleware(nothing, hub=hub), "/") as client:
        await client.send("é" * 51)
        with pytest.raises(ConnectionClosed) as error:
            await client.receive()
    assert error.value.code == 1009


async def test_without_a_limit_a_message_of_any_size_arrives() -> None:
    hub = Hub(limits=Limits(message_size=None, messages_per_second=None))

    @hub.websocket("/")
    async def read(conn: Connection) -> None:
        async for message in conn:
            await conn.send(len(message))

    async with connect(WebSocketMiddleware(nothing, hub=hub), "/") as client:
        await client.send("x" * 3_000_000)
        assert await client.receive_json() == 3_000_000


async def test_a_client_that_sends_too_fast_is_closed_with_1008(caplog: pytest.LogCaptureFixture) -> None:
    hub = Hub(limits=Limits(messages_per_second=1, burst=3))

    @hub.websocket("/")
    async def echo(conn: Connection) -> None:
        async for message in conn:
            await conn.send(message)

    async with connect(WebSocketMiddleware(nothing, hub=hub), "/") as client:
        for number in range(3):
            await client.send(str(number))
            assert await client.receive() == str(number)
        await client.send("one too many")
        with pytest.raises(ConnectionClosed) as error:
            await client.receive()
    assert (error.value.code, error.value.reason) == (1008, "too many messages")
    assert "more than 1 messages a second" in caplog.text


async def test_a_connection_can_have_so_many_channels() -> None:
    hub = Hub(limits=Limits(channels=2))

    @hub.websocket("/")
    async def greedy(conn: Connection) -> None:
        await conn.subscribe("a")
        await conn.subscribe("b")
        await conn.subscribe("b")
        await conn.send(sorted(conn.channels))
        await conn.subscribe("c")

    async with connect(WebSocketMiddleware(nothing, hub=hub), "/") as client:
        assert await client.receive_json() == ["a", "b"]
        with pytest.raises(ConnectionClosed) as error:
            await client.receive()
    assert error.value.code == 1008
    assert "'c'" in error.value.reason


# The end


async def test_a_handler_that_returns_closes_with_1000(hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.websocket("/")
    async def short(conn: Connection) -> None:
        await conn.send("bye")

    async with connect(app, "/") as client:
        assert await client.receive() == "bye"
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
    assert (closed.value.code, closed.value.reason) == (1000, "")


async def test_a_handler_that_raises_closes_with_1011_and_is_logged_once(
    hub: Hub, app: WebSocketMiddleware, caplog: pytest.LogCaptureFixture
) -> None:
    @hub.websocket("/")
    async def fail(conn: Connection) -> None:
        raise ValueError("a secret")

    async with connect(app, "/") as client:
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
    assert (closed.value.code, closed.value.reason) == (1011, "")
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (WebSocketException(4003, "not you"), 4003, "not you"),
        (HTTPException(403, "not here"), 1008, "not here"),
        (fastapi.HTTPException(404, {"room": 7}), 1008, '{"room":7}'),
        (HTTPException(500, "a secret"), 1011, ""),
        (SubscriptionDenied("a"), 1008, "subscribing to 'a' was refused: not allowed"),
        (ConnectionClosed(4000, "another's"), 1011, ""),
        (InvalidChannel("a channel's name has 1 to 255 characters, not 0"), 1008, None),
        (WebSocketException(1005), 1011, ""),
        (InvalidMessage("never sent", close_code=1006), 1011, ""),
        (InvalidMessage("by hand", close_code=4007), 4007, "by hand"),
        (ExceptionGroup("", [WebSocketException(4004, "grouped")]), 4004, "grouped"),
        (ExceptionGroup("", [ValueError(), TypeError()]), 1011, ""),
    ],
)
async def test_what_a_handler_raises_becomes_a_close_code(
    error: Exception, code: int, reason: str | None, hub: Hub, app: WebSocketMiddleware
) -> None:
    @hub.websocket("/")
    async def fail(conn: Connection) -> None:
        raise error

    async with connect(app, "/") as client:
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
    assert (closed.value.code, closed.value.reason) == (code, str(error) if reason is None else reason)


async def test_the_client_sees_the_code_and_reason_of_close(hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.websocket("/")
    async def close(conn: Connection) -> None:
        await conn.send("first")
        await conn.close(4001, "why")
        await conn.close(4002, "a second time")
        with pytest.raises(ConnectionClosed) as closed:
            await conn.send("after the end")
        assert (closed.value.code, closed.value.reason, closed.value.clean) == (4001, "why", True)
        with pytest.raises(ConnectionClosed):
            await conn.receive()
        with pytest.raises(ConnectionClosed):
            await conn.subscribe("a")

    async with connect(app, "/") as client:
        assert await client.receive() == "first"
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
    assert (closed.value.code, closed.value.reason) == (4001, "why")


async def test_what_comes_after_the_close_frame_is_not_received(hub: Hub, app: WebSocketMiddleware) -> None:
    closed, go = asyncio.Event(), asyncio.Event()

    @hub.websocket("/")
    async def close(conn: Connection) -> None:
        await conn.receive()
        await conn.close(4000)
        closed.set()
        await go.wait()
        with pytest.raises(ConnectionClosed):
            await conn.receive()

    async with connect(app, "/") as client:
        await client.send("in time")
        await closed.wait()
        await client.send("late")
        # Long enough for whoever would take it.
        for _ in range(10):
            await asyncio.sleep(0)
        go.set()


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 2999, 5000])
async def test_a_code_that_may_not_be_sent_is_refused(code: int, hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.websocket("/")
    async def close(conn: Connection) -> None:
        with pytest.raises(ValueError, match=str(code)):
            await conn.close(code)
        await conn.send("refused")

    async with connect(app, "/") as client:
        assert await client.receive() == "refused"


@pytest.mark.parametrize("clean", [True, False])
async def test_a_handler_learns_how_the_client_left(clean: bool, hub: Hub, app: WebSocketMiddleware) -> None:
    learned: asyncio.Future[ConnectionClosed] = asyncio.get_running_loop().create_future()

    @hub.websocket("/")
    async def learn(conn: Connection) -> None:
        try:
            await conn.receive()
        except ConnectionClosed as closed:
            learned.set_result(closed)
            raise

    async with connect(app, "/") as client:
        if clean:
            await client.close(4100, "had enough")
        else:
            await client.vanish()
        closed = await learned
    assert closed.clean is clean
    assert (closed.code, closed.reason) == ((4100, "had enough") if clean else (1006, ""))
    assert ("closed" in str(closed)) is clean


async def test_what_was_sent_before_the_client_left_is_still_received(hub: Hub, app: WebSocketMiddleware) -> None:
    received = []
    go = asyncio.Event()

    @hub.websocket("/")
    async def slow(conn: Connection) -> None:
        await conn.receive()
        await go.wait()
        async for message in conn:
            received.append(message)
        received.append("the end")

    async with connect(app, "/") as client:
        for word in ("one", "two", "three"):
            await client.send(word)
        await client.close()
        go.set()
    assert received == ["two", "three", "the end"]


async def test_a_handler_that_receives_nothing_is_cancelled_when_the_client_leaves(
    hub: Hub, app: WebSocketMiddleware
) -> None:
    ended = asyncio.Event()

    @hub.websocket("/")
    async def deaf(conn: Connection) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    async with connect(app, "/"):
        pass
    assert ended.is_set()


async def test_a_handler_that_waits_for_something_else_is_cancelled_in_the_end(
    hub: Hub, app: WebSocketMiddleware, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asgi_ws.connection._FINISH", 0.01)

    @hub.websocket("/")
    async def busy(conn: Connection) -> None:
        await conn.receive()
        await conn.send("busy")
        await anyio.sleep_forever()

    async with connect(app, "/") as client:
        await client.send("go")
        assert await client.receive() == "busy"


async def test_a_handler_that_swallows_its_cancellation_ends_like_any_other(hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.websocket("/")
    async def stubborn(conn: Connection) -> None:
        try:
            await anyio.sleep_forever()
        except asyncio.CancelledError:
            with pytest.raises(ConnectionClosed):
                await conn.send("anybody there?")

    async with connect(app, "/"):
        pass


async def test_a_handler_that_fails_on_its_cancellation_is_logged(
    hub: Hub, app: WebSocketMiddleware, caplog: pytest.LogCaptureFixture
) -> None:
    @hub.websocket("/")
    async def fail(conn: Connection) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("while cleaning up")

    async with connect(app, "/"):
        pass
    assert "while cleaning up" in caplog.text


async def test_a_task_group_of_a_handler_ends_with_the_client(
    hub: Hub, app: WebSocketMiddleware, caplog: pytest.LogCaptureFixture
) -> None:
    @hub.websocket("/")
    async def both(conn: Connection) -> None:
        async def tick() -> None:
            while True:
                await conn.send("tick")
                await asyncio.sleep(0.001)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(tick())
            async for _ in conn:
                pass

    async with connect(app, "/") as client:
        assert await client.receive() == "tick"
    assert caplog.text == ""


class Server:
    """The server's side of one connection, for what the test client can't do."""

    def __init__(self, *messages: typing.Any) -> None:
        self.to_app: asyncio.Queue[typing.Any] = asyncio.Queue()
        self.sent: list[typing.Any] = []
        for message in ({"type": "websocket.connect"}, *messages):
            self.to_app.put_nowait(message)

    async def receive(self) -> typing.Any:
        message = await self.to_app.get()
        if isinstance(message, Exception):
            raise message
        return message

    async def send(self, message: typing.Any) -> None:
        self.sent.append(message)

    def run(self, app: typing.Any) -> "asyncio.Task[None]":
        scope = {"type": "websocket", "path": "/", "headers": [], "query_string": b"", "subprotocols": []}
        return asyncio.create_task(app(scope, self.receive, self.send))


async def test_when_the_server_cancels_its_task_everything_is_left() -> None:
    hub = Hub(limits=Limits(inbox_messages=1))
    started = asyncio.Event()

    @hub.websocket("/")
    async def wait(conn: Connection) -> None:
        await conn.subscribe("a")
        started.set()
        await anyio.sleep_forever()

    async with hub:
        server = Server({"type": "websocket.receive", "text": "fills the inbox"})
        before = asyncio.all_tasks()
        task = server.run(WebSocketMiddleware(nothing, hub=hub))
        await started.wait()
        while not server.to_app.empty():
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before
        assert not hub.context.pubsub._channels


@pytest.mark.parametrize("how", ["return", "raise", "go on"])
async def test_the_servers_cancellation_is_not_mistaken_for_the_clients_end(how: str, hub: Hub) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    @hub.websocket("/")
    async def handler(conn: Connection) -> None:
        started.set()
        try:
            await anyio.sleep_forever()
        except asyncio.CancelledError:
            cancelled.set()
            try:
                await anyio.sleep_forever()
            except asyncio.CancelledError:
                if how == "raise":
                    raise ValueError from None
                if how == "go on":
                    raise

    async with hub:
        server = Server()
        task = server.run(WebSocketMiddleware(nothing, hub=hub))
        await started.wait()
        server.to_app.put_nowait({"type": "websocket.disconnect", "code": 1001})
        await cancelled.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_server_that_fails_to_receive_has_lost_the_client(hub: Hub) -> None:
    ended: list[ConnectionClosed] = []

    @hub.websocket("/")
    async def handler(conn: Connection) -> None:
        try:
            await conn.receive()
        except ConnectionClosed as closed:
            ended.append(closed)
            raise ExceptionGroup("", [closed, ValueError("and more")]) from None

    async with hub:
        await Server(OSError("broken")).run(WebSocketMiddleware(nothing, hub=hub))
    assert (ended[0].code, ended[0].clean) == (1006, False)


async def test_a_client_that_leaves_before_it_is_accepted_is_nobodys_error(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    @hub.websocket("/", accept=False)
    async def handler(conn: Connection) -> None:
        with pytest.raises(ConnectionClosed):
            await conn.accept()
        with pytest.raises(ConnectionClosed):
            await conn.send("too late")

    async with hub:
        server = Server()
        server.to_app.get_nowait()
        server.to_app.put_nowait({"type": "websocket.disconnect", "code": 1001})
        await server.run(WebSocketMiddleware(nothing, hub=hub))
        assert server.sent == []
    assert caplog.text == ""


@pytest.mark.parametrize("how", ["return", "raise", "wait", "client"])
async def test_after_the_end_no_task_and_no_channel_is_left(how: str, hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.websocket("/")
    async def handler(conn: Connection) -> None:
        await conn.subscribe("a")
        await conn.subscribe("b")
        await conn.unsubscribe("b")
        await conn.unsubscribe("never subscribed")
        await conn.send("ready")
        if how == "raise":
            raise ValueError
        if how == "wait":
            await anyio.sleep_forever()
        if how == "client":
            await conn.receive()

    async with hub:
        before = asyncio.all_tasks()
        async with connect(app, "/", lifespan=False) as client:
            assert await client.receive() == "ready"
            if how in ("wait", "client"):
                assert list(hub.context.pubsub._channels) == ["a"]
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before
        assert not hub.context.pubsub._channels
        assert not hub.context.connections._links
    gc.collect()


# Before the handshake


async def test_without_accepting_nothing_can_be_sent_or_received(hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.websocket("/", accept=False)
    async def early(conn: Connection) -> None:
        for use in (conn.receive, lambda: conn.send("x"), lambda: conn.subscribe("a"), conn.close):
            with pytest.raises(RuntimeError, match="accept"):
                await use()
        assert conn.dropped == 0
        await conn.accept()
        with pytest.raises(RuntimeError, match="already"):
            await conn.accept()
        await conn.send("accepted")

    async with connect(app, "/") as client:
        assert await client.receive() == "accepted"


async def test_a_handler_that_never_accepts_has_refused(hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.websocket("/", accept=False)
    async def refuse(conn: Connection) -> None:
        pass

    with pytest.raises(Refused) as refused:
        async with connect(app, "/"):
            pass
    assert refused.value.status_code == 403


@pytest.mark.parametrize("headers", [{"X-One": "1", "x-two": "é"}, [("X-One", "1"), (b"x-two", b"\xe9")]])
async def test_a_handshake_can_have_headers_and_a_subprotocol(
    headers: typing.Any, hub: Hub, app: WebSocketMiddleware
) -> None:
    @hub.websocket("/", accept=False)
    async def accept(conn: Connection) -> None:
        await conn.accept(subprotocol="own", headers=headers)
        assert conn.subprotocol == "own"

    async with connect(app, "/", subprotocols=["own"]) as client:
        assert client.subprotocol == "own"
        assert (client.headers["x-one"], client.headers["x-two"]) == ("1", "é")


@pytest.mark.parametrize("value", ["a\r\nSet-Cookie: b", "a\nb", "a\x00"])
async def test_a_header_with_a_line_break_is_refused(value: str, hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.websocket("/", accept=False)
    async def accept(conn: Connection) -> None:
        with pytest.raises(ValueError, match="line breaks"):
            await conn.accept(headers={"x-one": value})

    with pytest.raises(Refused):
        async with connect(app, "/"):
            pass


@pytest.mark.parametrize(
    ("ours", "theirs", "chosen"),
    [
        (["v2", "v1"], ["v1", "v2"], "v2"),
        (["v2", "v1"], ["v1"], "v1"),
        ([], ["v1"], None),
        (["v2", None], ["v1"], None),
        (["v2", None], [], None),
    ],
)
async def test_the_first_of_our_subprotocols_that_the_client_offers_is_chosen(
    ours: list[str | None], theirs: list[str], chosen: str | None, hub: Hub, app: WebSocketMiddleware
) -> None:
    @hub.websocket("/", subprotocols=ours)
    async def handler(conn: Connection) -> None:
        await conn.send({"subprotocol": conn.subprotocol})

    async with connect(app, "/", subprotocols=theirs) as client:
        assert client.subprotocol == chosen
        assert await client.receive_json() == {"subprotocol": chosen}


@pytest.mark.parametrize("theirs", [[], ["v9"]])
async def test_none_of_the_subprotocols_in_common_is_refused(
    theirs: list[str], hub: Hub, app: WebSocketMiddleware
) -> None:
    @hub.websocket("/", subprotocols=["v2", "v1"])
    async def handler(conn: Connection) -> None:
        raise AssertionError

    with pytest.raises(Refused) as refused:
        async with connect(app, "/", subprotocols=theirs):
            pass
    assert refused.value.status_code == 400
    assert "v2, v1" in refused.value.text


async def test_a_connection_is_a_starlette_connection(hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.websocket("/things/{thing_id:int}")
    async def describe(conn: Connection, thing_id: int) -> None:
        conn.state.seen = True
        await conn.send(
            {
                "thing": thing_id,
                "path_params": conn.path_params,
                "query": conn.query_params["page"],
                "cookie": conn.cookies["session"],
                "header": conn.headers["X-One"],
                "transport": conn.transport,
                "dropped": conn.dropped,
                "id": bool(conn.id),
            }
        )

    async with connect(app, "/things/7?page=3", headers={"cookie": "session=abc", "x-one": "1"}) as client:
        assert await client.receive_json() == {
            "thing": 7,
            "path_params": {"thing_id": 7},
            "query": "3",
            "cookie": "abc",
            "header": "1",
            "transport": "websocket",
            "dropped": 0,
            "id": True,
        }


async def test_ids_differ(hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.websocket("/")
    async def name(conn: Connection) -> None:
        await conn.send(conn.id)

    ids = set()
    for _ in range(10):
        async with connect(app, "/") as client:
            ids.add(await client.receive())
    assert len(ids) == 10


# Histories and presence


def feeding(hub: Hub) -> None:
    hub.channel("feed", history=5)

    @hub.websocket("/")
    async def feed(conn: Connection[str, Publication]) -> None:
        await conn.subscribe("feed", since=conn.query_params.get("since"))
        await asyncio.Event().wait()


async def test_a_client_that_comes_back_is_told_how_it_began_and_gets_what_it_missed(
    hub: Hub, app: WebSocketMiddleware
) -> None:
    feeding(hub)
    async with connect(app, "/") as client:
        began = await client.receive_json()
        assert (began["recovered"], began["channel"]) == (False, "feed")
        await hub.publish("feed", 1)
        seen = await client.receive_json()
        assert seen["data"] == 1
        await hub.publish("feed", 2)
        await hub.publish("feed", b"3")
        async with connect(app, f"/?since={seen['position']}") as again:
            found = [await again.receive_json() for _ in range(3)]
            assert [(each.get("data"), each.get("base64")) for each in found[1:]] == [(2, None), (None, "Mw==")]
            position = found[-1]["position"]
            assert found[0] == {"channel": "feed", "recovered": True, "position": position}


async def test_a_position_that_is_none_refuses_the_client(hub: Hub, app: WebSocketMiddleware) -> None:
    feeding(hub)
    async with connect(app, "/?since=never") as client:
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
    assert (closed.value.code, closed.value.reason) == (1008, "not a position: 'never'")


async def test_a_client_to_which_publications_are_lost_is_closed_so_that_it_comes_back() -> None:
    bus = Bus()
    broker = BusBroker(bus)
    hub = Hub(broker)
    feeding(hub)
    async with connect(WebSocketMiddleware(nothing, hub=hub), "/") as client:
        await client.receive_json()
        await bus.forget_all()
        broker.mend()
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
    assert (closed.value.code, closed.value.reason) == (1013, "insufficient state")


async def test_a_connection_that_is_closed_can_not_be_cut(hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.websocket("/")
    async def close(conn: Connection) -> None:
        await conn.close(4000, "enough")
        conn.cut(1008, "too late")

    async with connect(app, "/") as client:
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
    assert closed.value.code == 4000


async def test_one_that_subscribes_twice_at_once_is_subscribed_once(hub: Hub, app: WebSocketMiddleware) -> None:
    @hub.channel("slow", history=5)
    async def allow(conn: Connection) -> bool:
        await asyncio.sleep(0)
        return True

    @hub.websocket("/")
    async def subscribe(conn: Connection[str, Publication]) -> None:
        first = await hub.publish("slow", 1)
        await hub.publish("slow", 2)
        found = await asyncio.gather(conn.subscribe("slow", since=first), conn.subscribe("slow", since=first))
        assert sorted(each.recovered for each in found) == [False, True]
        await hub.publish("slow", 3)
        await asyncio.Event().wait()

    async with connect(app, "/") as client:
        assert [(await client.receive_json()).get("data") for _ in range(3)] == [None, 2, 3]


async def test_who_asks_for_it_is_told_who_comes_and_who_goes(
    hub: Hub, app: WebSocketMiddleware, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asgi_ws.presence.GRACE", 0.01)
    monkeypatch.setattr("asgi_ws.presence.LATER", 0.01)
    hub.channel("room", presence=True)

    @hub.websocket("/{name}")
    async def visit(conn: Connection, name: str) -> None:
        conn.user = name
        assert conn.user == name
        await conn.subscribe("room", join_leave=name == "ann")
        async for _ in conn:
            await conn.unsubscribe("room")
            await conn.send("left")

    async with connect(app, "/ann") as ann:
        assert (await ann.receive_json())["user"] == "ann"
        async with connect(app, "/bob"):
            joined = await ann.receive_json()
            assert (joined["type"], joined["channel"], joined["user"]) == ("join", "room", "bob")
        left = await ann.receive_json()
        assert (left["type"], left["user"], left["connection"]) == ("leave", "bob", joined["connection"])
        await ann.send("leave")
        assert await ann.receive() == "left"
        assert await hub.presence("room") == []
        assert not hub.context.presence._watched


@pytest.mark.parametrize("options", [{"info": 1}, {"join_leave": True}])
async def test_a_channel_without_presence_knows_nobody(
    hub: Hub, app: WebSocketMiddleware, options: dict[str, typing.Any]
) -> None:
    @hub.websocket("/")
    async def visit(conn: Connection) -> None:
        with pytest.raises(ValueError, match="'room' has no presence"):
            await conn.subscribe("room", **options)
        await conn.send("refused")

    async with connect(app, "/") as client:
        assert await client.receive() == "refused"


async def test_who_can_not_be_entered_is_not_subscribed(hub: Hub, app: WebSocketMiddleware) -> None:
    hub.channel("room", presence=True)

    @hub.websocket("/")
    async def visit(conn: Connection) -> None:
        with pytest.raises(TypeError):
            await conn.subscribe("room", info=object(), join_leave=True)
        assert not conn.channels
        assert not hub.context.pubsub._channels
        await conn.send("refused")

    async with connect(app, "/") as client:
        assert await client.receive() == "refused"


async def test_a_handler_that_is_cancelled_while_it_leaves_is_nowhere() -> None:
    bus = Bus()
    broker = BusBroker(bus)
    hub = Hub(broker)
    hub.channel("room", presence=True)
    async with hub:

        class Leaving:
            id = "1"
            user_id = None

            def cut(self, code: int, reason: str) -> None: ...

            def push(self, publication: Publication) -> None: ...

        client = Leaving()
        await hub.context.pubsub.subscribe("room", client)
        await hub.context.presence.enter("room", Member("1"))
        broker.slow = True
        leaving = asyncio.create_task(hub.context.leave(["room"], [], client))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert not hub.context.presence._members
        broker.slow = False
        while broker.is_asked:
            broker.answer()
            await asyncio.sleep(0)
        assert await hub.presence("room") == []


async def test_a_broker_that_fails_closes_with_1013_and_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    broker = BusBroker(Bus())
    hub = Hub(broker)
    hub.channel("news", history=5)

    @hub.websocket("/")
    async def read(conn: Connection) -> None:
        broker.fails = True
        await conn.subscribe("news")

    async with connect(WebSocketMiddleware(Starlette(), hub), "/") as client:
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
    assert (closed.value.code, closed.value.reason) == (1013, "try again later")
    assert "the handler of '/' could not go on" in caplog.text
    assert "Traceback" not in caplog.text


async def test_what_a_client_published_for_the_others_is_not_what_it_has_missed() -> None:
    hub = Hub()
    hub.channel("news", history=5)

    @hub.websocket("/")
    async def chat(conn: Connection) -> None:
        before = (await hub.history("news")).position
        await conn.publish("news", "own", exclude_self=True)
        await conn.publish("news", "for all")
        assert (await conn.subscribe("news", since=before)).recovered

    async with connect(WebSocketMiddleware(Starlette(), hub), "/") as client:
        assert await client.receive() == "for all"
        with pytest.raises(ConnectionClosed):
            await client.receive()


async def test_a_server_that_does_not_close_is_not_waited_for_for_ever() -> None:
    hub = Hub(limits=Limits(write_timeout=0.1))

    @hub.websocket("/")
    async def ends(conn: Connection) -> None: ...

    events = [{"type": "websocket.connect"}]
    sent: list[str] = []

    async def receive() -> typing.Any:
        return events.pop() if events else await asyncio.Event().wait()

    async def send(message: typing.Any) -> None:
        sent.append(message["type"])
        if message["type"] == "websocket.close":
            await asyncio.Event().wait()

    scope = {"type": "websocket", "path": "/", "headers": [], "query_string": b"", "subprotocols": []}
    async with asyncio.timeout(5):
        await WebSocketMiddleware(Starlette(), hub)(scope, receive, send)
        await hub.__aexit__()
    assert sent == ["websocket.accept", "websocket.close"]
