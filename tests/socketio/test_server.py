import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import msgspec
import pydantic
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.types import Message

from asgi_ws import BrokerError, Connection, ConnectionClosed, Hub, Limits, SubscriptionDenied, WebSocketMiddleware
from asgi_ws.brokers import MemoryBroker
from asgi_ws.exceptions import HubNotRunning, InvalidChannel
from asgi_ws.frames import Frame
from asgi_ws.messages import Publication
from asgi_ws.payloads import Payload
from asgi_ws.socketio import Broadcast, ConnectionRefused, Socket, SocketIO
from asgi_ws.socketio import server as server_module
from asgi_ws.socketio import socket as socket_module
from asgi_ws.socketio.packets import (
    ACK,
    CONNECT,
    CONNECT_ERROR,
    DISCONNECT,
    EVENT,
    RESERVED,
    Packet,
)
from asgi_ws.socketio.rooms import SocketIOProtocol
from asgi_ws.testing import Refused, connect
from tests.socketio.clients import PATH, SocketIOClient, connected

pytestmark = pytest.mark.anyio


def make(**options: Any) -> SocketIO:
    sio = SocketIO(options.pop("hub", None) or Hub(), **options)

    @sio.on("is that all?")
    async def is_that_all(socket: Socket) -> str:
        return "yes"

    @sio.on("join")
    async def join(socket: Socket, room: str) -> None:
        await socket.join(room)

    @sio.on("leave")
    async def leave(socket: Socket, room: str) -> None:
        await socket.leave(room)

    return sio


def keep_sockets(sio: SocketIO, namespace: str = "/") -> dict[str, Socket]:
    """The sockets of those who have connected, by their ids."""
    sockets: dict[str, Socket] = {}

    @sio.on("connect", namespace=namespace)
    async def keep(socket: Socket) -> None:
        sockets[socket.id] = socket

    return sockets


@contextlib.asynccontextmanager
async def several(sio: SocketIO, count: int) -> AsyncIterator[list[SocketIOClient]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(connected(sio)) for _ in range(count)]


async def joined(client: SocketIOClient, *rooms: str) -> None:
    for room in rooms:
        assert await client.call("join", room) == []


# Connecting


async def test_a_client_is_connected_with_what_it_says() -> None:
    sio = make()
    auths = []

    @sio.on("connect")
    async def admit(socket: Socket, auth: dict[str, Any]) -> None:
        auths.append((auth, socket.auth, socket.transport, socket.namespace, socket.connected, socket.rooms))

    async with connected(sio, {"token": "x"}) as ann, connected(sio) as bob:
        assert ann.sids["/"] != bob.sids["/"]
    assert [auth[:-1] for auth in auths] == [
        ({"token": "x"}, {"token": "x"}, "websocket", "/", False),
        ({}, {}, "websocket", "/", False),
    ]
    assert auths[0][-1] == {ann.sids["/"]}


async def test_what_is_sent_while_connecting_comes_behind_the_answer() -> None:
    sio = make()

    @sio.on("connect")
    async def admit(socket: Socket) -> None:
        await socket.join("lobby")
        await socket.emit("first")
        await sio.to("lobby").emit("second")
        await sio.to(socket.id).emit("third")
        await sio.emit("fourth")
        with pytest.raises(RuntimeError, match="before it is connected"):
            await socket.call("never")

    async with connected(sio) as client:
        assert [(await client.event())[0] for _ in range(4)] == ["first", "second", "third", "fourth"]


async def test_more_than_can_wait_refuses_a_client_that_is_connecting() -> None:
    sio = make(hub=Hub(limits=Limits(outbox_size=100)), max_payload=1000)
    ends = []

    @sio.on("connect")
    async def admit(socket: Socket) -> None:
        for _ in range(3):
            await sio.emit("x", "x" * 60)

    @sio.on("disconnect")
    async def left(socket: Socket) -> None:
        ends.append(socket)

    async with connected(sio, namespace=None) as client:
        await client.send(Packet(CONNECT))
        packet = await client.receive()
        assert packet.type == CONNECT_ERROR
        assert "more was sent" in packet.data["message"]
    assert len(ends) == 1


@pytest.mark.parametrize(
    ("error", "data"),
    [
        (ConnectionRefused("not you", {"code": 1}), {"message": "not you", "data": {"code": 1}}),
        (ConnectionRefused(), {"message": "refused"}),
        (ConnectionRefused("what?", object()), {"message": "what?"}),
        (SubscriptionDenied("x"), {"message": "subscribing to 'x' was refused: not allowed"}),
        (RuntimeError("a secret"), {"message": "the server failed"}),
    ],
    ids=repr,
)
@pytest.mark.parametrize("where", ["connect", "use"])
async def test_a_refused_client_is_told(where: str, error: Exception, data: Any) -> None:
    sio = make()
    ends = []

    async def refuse(socket: Socket) -> None:
        if not socket.auth:
            raise error

    (sio.use if where == "use" else sio.on("connect"))(refuse)

    @sio.on("disconnect")
    async def left(socket: Socket, reason: str) -> None:
        ends.append(reason)

    async with connected(sio, namespace=None) as client:
        await client.send(Packet(CONNECT))
        assert await client.receive() == Packet(CONNECT_ERROR, data)
        # The connection goes on, and so may the client.
        await client.connect({"token": "x"})
        await client.nothing()
    assert ends == ["transport close"]


async def test_what_a_client_connects_with_is_validated() -> None:
    sio = make()

    @dataclasses.dataclass
    class Auth:
        token: str

    @sio.on("connect")
    async def admit(socket: Socket, auth: Auth) -> None:
        await socket.emit("token", auth.token)

    async with connected(sio, namespace=None) as client:
        await client.send(Packet(CONNECT, {"token": 1}))
        assert await client.receive() == Packet(CONNECT_ERROR, {"message": "$.token: Expected `str`, got `int`"})
        await client.connect({"token": "x"})
        assert await client.event() == ["token", "x"]


async def test_middlewares_are_asked_in_their_order_and_each_namespace_has_its_own() -> None:
    sio = make()
    asked = []

    @sio.use
    async def first(socket: Socket) -> None:
        asked.append("first")
        socket.data["user"] = "ann"

    @sio.use
    async def second(socket: Socket) -> None:
        asked.append("second")

    @sio.use(namespace="/admin")
    async def admin(socket: Socket) -> None:
        asked.append("admin")

    @sio.on("connect")
    async def admit(socket: Socket) -> None:
        asked.append(socket.data["user"])

    async with connected(sio) as client:
        await client.connect(namespace="/admin")
    assert asked == ["first", "second", "ann", "admin"]


async def test_a_namespace_that_nobody_serves_is_refused_in_the_protocol_s_words() -> None:
    sio = make()
    async with connected(sio, namespace=None) as client:
        for namespace in ("/nowhere", "/?a=b"):
            await client.send(Packet(CONNECT, None, namespace))
            assert await client.receive() == Packet(CONNECT_ERROR, {"message": "Invalid namespace"}, namespace)
        await client.connect()


async def test_namespaces_have_sockets_handlers_and_rooms_of_their_own() -> None:
    sio = make()

    @sio.on("who", namespace="/admin")
    async def who(socket: Socket) -> str:
        await socket.join("lobby")
        return socket.namespace

    async with connected(sio) as client:
        await joined(client, "lobby")
        await client.connect(namespace="/admin")
        assert client.sids["/"] != client.sids["/admin"]
        assert await client.call("who", namespace="/admin") == ["/admin"]
        await client.emit("who")
        await sio.to("lobby", namespace="/admin").emit("x", 1)
        assert await client.event("/admin") == ["x", 1]
        await sio.emit("y", namespace="/admin")
        assert await client.event("/admin") == ["y"]
        await sio.to("lobby").emit("z")
        assert await client.event() == ["z"]
        await client.nothing()


@pytest.mark.parametrize(
    "say",
    [
        Packet(CONNECT),
        Packet(EVENT, ["x"], "/admin"),
        Packet(ACK, [], "/admin", 1),
        Packet(DISCONNECT, None, "/admin"),
        Packet(CONNECT_ERROR, {"message": "no"}),
        "2",
        "9",
        "",
        "2[",
        '51-["x"]',
        "0null",
        '52-["x",{"_placeholder":true,"num":0},{"_placeholder":true,"num":0}]',
    ],
    ids=str,
)
async def test_a_client_that_breaks_the_protocol_is_closed_and_nobody_else(say: Packet | str) -> None:
    sio = make()
    reasons = []

    @sio.on("disconnect")
    async def left(socket: Socket, reason: str) -> None:
        reasons.append(reason)

    @sio.on("x", namespace="/admin")
    async def admin(socket: Socket) -> None:
        pass

    async with connected(sio) as other:
        async with connected(sio) as client:
            if isinstance(say, Packet):
                await client.send(say)
            else:
                await client.raw(say, b"x", b"y")
            code, reason = await client.closed()
            assert code in (1007, 1008)
            assert reason
        assert reasons == ["parse error"]
        await other.nothing()


async def test_nothing_is_collected_for_a_namespace_that_the_client_is_not_in() -> None:
    async with connected(make(), namespace=None) as client:
        await client.raw('51-["x",{"_placeholder":true,"num":0}]')
        assert (await client.closed())[0] == 1008


async def test_attachments_have_a_time_and_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_ATTACHMENTS_TIME", 0.05)
    sio = make(max_payload=1000)
    async with connected(sio) as other, connected(sio) as slow, connected(sio) as large:
        await slow.raw('51-["x",{"_placeholder":true,"num":0}]')
        assert await slow.closed() == (1008, "the attachments took too long")
        await large.raw('52-["x",{"_placeholder":true,"num":0},{"_placeholder":true,"num":1}]', bytes(500), bytes(500))
        assert (await large.closed())[0] == 1009
        # In time they are taken.
        await other.emit("x", b"1", b"2")
        await asyncio.sleep(0.06)
        await other.nothing()


async def test_who_connects_to_no_namespace_is_closed() -> None:
    sio = make(connect_timeout=0.05)
    sockets = keep_sockets(sio)
    async with connected(sio) as client, connected(sio, namespace=None) as silent, connected(sio) as ended:
        assert await silent.closed() == (1008, "no namespace was connected to")
        await sockets[ended.sids["/"]].disconnect()
        assert (await ended.receive()).type == DISCONNECT
        assert await ended.closed() == (1008, "no namespace was connected to")
        await client.nothing()


# Events


async def test_arguments_are_validated_where_they_are_annotated(caplog: pytest.LogCaptureFixture) -> None:
    sio = make()

    class Point(msgspec.Struct):
        x: int
        label: str = ""

    class Model(pydantic.BaseModel):
        name: str

    @sio.on("typed")
    async def typed(
        socket: Socket, number: int, point: Point, model: Model, data: bytes, untyped: Any = None, *rest: float
    ) -> Any:
        return number, point.x, model.name, data, untyped, rest

    @sio.on("short")
    async def short(socket: Socket, name: Annotated[str, msgspec.Meta(max_length=3)], /) -> str:
        return name

    good = [1, {"x": 2}, {"name": "ann"}, b"\xff"]
    async with connected(sio) as client:
        assert await client.call("typed", *good) == [1, 2, "ann", b"\xff", None, []]
        assert await client.call("typed", *good, [b"1"], 1, 2.5) == [1, 2, "ann", b"\xff", [b"1"], [1.0, 2.5]]
        bad: list[list[Any]] = [["1", *good[1:]], [1, {"x": "2"}, *good[2:]], [*good[:2], {}, b""], [*good[:3], "eA=="]]
        for args in (*bad, good[:3], [*good, 1, "x"]):
            await client.emit("typed", *args, id=1)
        for args in (["long"], [], ["a", "b"]):
            await client.emit("short", *args, id=1)
        assert await client.call("short", "abc") == ["abc"]
        await client.nothing()
    assert sum("is invalid" in record.message for record in caplog.records) == 9


async def test_what_a_handler_returns_is_the_acknowledgement() -> None:
    sio = make()
    results = {"none": None, "value": {"a": 1}, "several": (1, [2], b"3"), "list": [1, 2], "empty": ()}

    @sio.on("ask")
    async def ask(socket: Socket, which: str) -> Any:
        return results[which]

    async with connected(sio) as client:
        for which, values in zip(results, ([], [{"a": 1}], [1, [2], b"3"], [[1, 2]], []), strict=True):
            assert await client.call("ask", which, id=0) == values
        await client.emit("ask", "value")
        await client.nothing()


async def test_a_handler_that_fails_is_logged_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    sio = make()

    @sio.on("fail")
    async def fail(socket: Socket, with_what: str) -> Any:
        if with_what == "result":
            return object()
        raise RuntimeError("oh")

    async with connected(sio) as client:
        await client.emit("fail", "error", id=1)
        await client.emit("fail", "result", id=2)
        await client.nothing()
    assert sum("failed" in record.message for record in caplog.records) == 2


async def test_events_without_a_handler_go_to_the_one_for_all_or_nowhere() -> None:
    sio = make()
    async with connected(sio) as client:
        await client.emit("nobody's", 1, id=5)
        await client.emit("__proto__", id=5)
        await client.emit("error", id=5)
        await client.nothing()

    @sio.on("*")
    async def everything(socket: Socket, event: str, *args: Any) -> Any:
        return event, args

    async with connected(sio) as client:
        assert await client.call("anybody's", 1, b"2") == ["anybody's", [1, b"2"]]
        assert await client.call("*", "connect") == ["*", ["connect"]]
        await client.raw("23[7]")
        assert await client.receive() == Packet(ACK, ["7", []], id=3)
        await client.nothing()


async def test_handlers_of_a_socket_run_one_after_another_in_the_order_of_its_events() -> None:
    sio = make()
    done = []

    @sio.on("slow")
    async def slow(socket: Socket, number: int) -> None:
        await asyncio.sleep(0.01 if number % 2 else 0)
        done.append(number)

    async with connected(sio) as client:
        for number in range(10):
            await client.emit("slow", number)
        await client.nothing()
    assert done == list(range(10))


async def test_sockets_of_one_client_do_not_wait_for_each_other() -> None:
    sio = make()
    release = asyncio.Event()

    @sio.on("wait", namespace="/slow")
    async def wait(socket: Socket) -> None:
        await release.wait()

    async with connected(sio) as client:
        await client.connect(namespace="/slow")
        await client.emit("wait", namespace="/slow", id=1)
        await client.nothing()
        release.set()
        assert await client.receive() == Packet(ACK, [], "/slow", 1)


@pytest.mark.parametrize(("count", "size"), [(600, 1), (80, 30_000)])
async def test_a_client_that_sends_faster_than_its_handlers_are_has_to_wait(count: int, size: int) -> None:
    sio = make(max_payload=100_000)
    release = asyncio.Event()
    handled = []

    @sio.on("wait")
    async def wait(socket: Socket, data: str) -> None:
        await release.wait()
        handled.append(data)

    async with connected(sio) as client:
        sent = 0
        with contextlib.suppress(TimeoutError):
            client.client._running.timeout = 0.1
            for _ in range(count):
                await client.emit("wait", "x" * size)
                sent += 1
        assert sent < count
        client.client._running.timeout = 2
        release.set()
        await client.nothing()
    assert len(handled) == sent


# Acknowledgements of clients


async def test_the_server_can_wait_for_an_acknowledgement() -> None:
    sio = make()
    sockets = keep_sockets(sio)

    @sio.on("ask me")
    async def ask_me(socket: Socket) -> Any:
        return await socket.call("ask", 1, b"2")

    async with connected(sio) as client:
        socket = sockets[client.sids["/"]]
        for answer, result in (([], None), (["x"], "x"), ([1, b"2"], [1, b"2"])):
            call = asyncio.create_task(socket.call("ask", 1))
            packet = await client.receive()
            assert packet.data == ["ask", 1]
            assert packet.id is not None
            await client.send(Packet(ACK, answer, id=packet.id))
            assert await call == result
        # Also from a handler, while events wait behind it.
        await client.emit("ask me", id=1)
        await client.emit("is that all?", id=2)
        packet = await client.receive()
        await client.send(Packet(ACK, ["yes"], id=packet.id))
        assert await client.receive() == Packet(ACK, ["yes"], id=1)
        assert await client.receive() == Packet(ACK, ["yes"], id=2)


async def test_an_acknowledgement_that_does_not_come_is_given_up() -> None:
    sio = make()
    sockets = keep_sockets(sio)
    async with connected(sio) as client:
        socket = sockets[client.sids["/"]]
        with pytest.raises(TimeoutError):
            await socket.call("ask", timeout=0.01)
        assert not socket._pending
        packet = await client.receive()
        # Too late, twice, and for nothing that was asked.
        for _ in range(2):
            await client.send(Packet(ACK, ["late"], id=packet.id))
        for id in (0, 999, 2**53 - 1):
            await client.send(Packet(ACK, [], id=id))
        await client.nothing()
        call = asyncio.create_task(socket.call("ask"))
        await client.receive()
        await client.client.close()
        with pytest.raises(ConnectionClosed):
            await call
        with pytest.raises(ConnectionClosed):
            await socket.call("ask")
        with pytest.raises(ConnectionClosed):
            await socket.emit("x")
        with pytest.raises(ConnectionClosed):
            await socket.join("x")


async def test_few_acknowledgements_are_waited_for_at_once() -> None:
    sio = make()
    sockets = keep_sockets(sio)
    async with connected(sio) as client:
        socket = sockets[client.sids["/"]]
        first = asyncio.create_task(socket.call("first"))
        await client.receive()
        for _ in range(256):
            await socket.emit("x", callback=print)
            await client.receive()
        with pytest.raises(TimeoutError):
            await first
        assert socket._pending is not None
        assert len(socket._pending) == 256


async def test_callbacks_are_called_with_acknowledgements_in_their_turn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sio = make()
    sockets = keep_sockets(sio)
    got: list[Any] = []

    async def slowly(*args: Any) -> None:
        await asyncio.sleep(0)
        got.append(args)

    def fails() -> None:
        raise RuntimeError

    async with connected(sio) as client:
        socket = sockets[client.sids["/"]]
        for callback in (slowly, lambda *args: got.append(args), fails):
            await socket.emit("ask", callback=callback)
        packets = [await client.receive() for _ in range(3)]
        for packet, answer in zip(packets, ([1, 2], [b"3"], []), strict=True):
            await client.send(Packet(ACK, answer, id=packet.id))
        await client.nothing()
        assert got == [(1, 2), (b"3",)]
        assert "the callback" in caplog.text
        monkeypatch.setattr(socket_module, "_CALLBACK_TIME", 0.01)
        await socket.emit("ask", callback=fails)
        await asyncio.sleep(0.02)
        assert not socket._pending
        await socket.emit("ask", callback=fails)
    assert not socket._pending


async def test_a_broadcast_can_wait_for_acknowledgements() -> None:
    sio = make()
    async with several(sio, 3) as (ann, bob, eve):
        for client in (ann, bob):
            await joined(client, "lobby")
        call = asyncio.create_task(sio.to("lobby").except_("nowhere").call("ask", b"x", timeout=0.2))
        for client in (ann, bob):
            packet = await client.receive()
            assert packet.data == ["ask", b"x"]
            if client is ann:
                await client.send(Packet(ACK, ["a"], id=packet.id))
        assert await call == {ann.sids["/"]: "a"}
        assert await sio.to("nowhere").call("ask") == {}
        call = asyncio.create_task(sio.except_("lobby").call("ask"))
        packet = await eve.receive()
        await eve.send(Packet(ACK, [], id=packet.id))
        assert await call == {eve.sids["/"]: None}
        call = asyncio.create_task(sio.call("ask", timeout=1))
        for client in (ann, bob):
            packet = await client.receive()
            await client.send(Packet(ACK, [1], id=packet.id))
        await eve.receive()
        await eve.client.close()
        assert await call == {ann.sids["/"]: 1, bob.sids["/"]: 1}


# Rooms


async def test_rooms_are_left_and_joined_and_a_socket_is_in_its_own() -> None:
    sio = make()
    sockets = keep_sockets(sio)
    async with several(sio, 2) as (ann, bob):
        socket = sockets[ann.sids["/"]]
        await joined(ann, "lobby", "lobby", "kitchen")
        assert socket.rooms == {socket.id, "lobby", "kitchen"}
        await sio.to("lobby").emit("news", 1)
        await sio.to("kitchen").emit("news", 2)
        await sio.to(socket.id).emit("news", 3)
        assert [await ann.event() for _ in range(3)] == [["news", 1], ["news", 2], ["news", 3]]
        await ann.call("leave", "lobby")
        await ann.call("leave", "lobby")
        # Its own can't be left.
        await ann.call("leave", socket.id)
        await sio.to("lobby").emit("news", 4)
        await sio.to(socket.id).emit("news", 5)
        assert await ann.event() == ["news", 5]
        await bob.nothing()


async def test_who_is_in_several_rooms_gets_an_event_once() -> None:
    sio = make()
    async with several(sio, 4) as (ann, bob, eve, out):
        await joined(ann, "a", "b", "c")
        await joined(bob, "b")
        await joined(eve, "c")
        await sio.to("a").to("b").to("a").to("c").emit("x", 1)
        await sio.to("b").to("c").emit("y")
        await sio.to("a").to("c").except_("b").emit("z")
        assert [await ann.event(), await ann.event()] == [["x", 1], ["y"]]
        assert [await bob.event(), await bob.event()] == [["x", 1], ["y"]]
        assert [await eve.event() for _ in range(3)] == [["x", 1], ["y"], ["z"]]
        for client in (ann, bob, eve, out):
            await client.nothing()


async def test_the_sender_and_rooms_can_be_left_out() -> None:
    sio = make()

    @sio.on("say")
    async def say(socket: Socket, where: str) -> None:
        targets: dict[str, Callable[[], Broadcast]] = {
            "to": lambda: socket.to("lobby"),
            "broadcast": lambda: socket.broadcast,
            "broadcast.except": lambda: socket.broadcast.except_("lobby"),
            "to eve": lambda: socket.to(eve.sids["/"]),
            "all but eve": lambda: sio.except_(eve.sids["/"]),
        }
        await targets[where]().emit("said", where)

    async with several(sio, 3) as (ann, bob, eve):
        await joined(ann, "lobby")
        await joined(bob, "lobby")
        heard = {
            "to": [bob],
            "broadcast": [bob, eve],
            "broadcast.except": [eve],
            "to eve": [eve],
            "all but eve": [ann, bob],
        }
        for where, clients in heard.items():
            await ann.emit("say", where)
            for client in clients:
                assert await client.event() == ["said", where]
            for client in (ann, bob, eve):
                await client.nothing()


async def test_a_room_is_a_channel_of_the_hub() -> None:
    hub = Hub()
    sio = make(hub=hub)

    async with connected(sio) as ann, connected(sio) as bob, hub.subscribe(sio.room("lobby")) as publications:
        for client in (ann, bob):
            await joined(client, "lobby")
        data: list[Any] = ["text", 'with "quotes" \x1e', {"a": [1]}, ["list"], None, b"\x00\xff"]
        for value in data:
            await hub.publish(sio.room("lobby"), value)
            assert await ann.event() == await bob.event() == ["message", value]
            assert (await anext(publications)).data == value
        await hub.publish(sio.room("lobby"), "to bob", exclude=ann.sids["/"])
        assert await bob.event() == ["message", "to bob"]
        await ann.nothing()
        assert (await anext(publications)).data == "to bob"
        await sio.to("lobby").emit("x", 1, {"a": [b"\xff", (b"",)]})
        assert (await anext(publications)).data == ["x", 1, {"a": ["/w==", [""]]}]
        assert await ann.event() == ["x", 1, {"a": [b"\xff", [b""]]}]


async def test_a_plain_connection_and_a_socket_meet_in_a_room() -> None:
    hub = Hub()
    sio = make(hub=hub)
    app = Starlette()
    app.mount("/socket.io", sio)
    app.add_middleware(WebSocketMiddleware, hub=hub)

    @hub.websocket("/plain")
    async def plain(conn: Connection[Any]) -> None:
        await conn.subscribe(sio.room("lobby"))
        await conn.send("subscribed")
        async for text in conn:
            await conn.publish(sio.room("lobby"), text, exclude_self=True)

    async with connect(app, "/plain") as client, connected(app, path=f"/socket.io{PATH}") as socket:
        assert await client.receive() == "subscribed"
        await joined(socket, "lobby")
        await client.send("hello")
        assert await socket.event() == ["message", "hello"]
        await sio.to("lobby").emit("said", "x")
        assert await client.receive() == '["said","x"]'


async def test_a_connection_below_sockets_can_subscribe_to_channels_as_well() -> None:
    sio = make()

    @sio.on("watch")
    async def watch(socket: Socket) -> None:
        await socket.connection.subscribe("news")

    async with connected(sio) as client:
        await client.call("watch")
        await sio.hub.publish("news", {"a": 1})
        assert await client.event() == ["message", {"a": 1}]


class Wire(MemoryBroker):
    """Keeps what it was asked to publish; raises where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.published: list[tuple[str, Payload, str | None]] = []
        self.fails = False

    async def publish(self, channel: str, payload: Payload, *, sender: str | None = None, **options: Any) -> Any:
        if self.fails:
            raise BrokerError
        self.published.append((channel, payload, sender))
        return await super().publish(channel, payload, sender=sender, **options)

    async def subscribe(self, channel: str) -> None:
        if self.fails:
            raise BrokerError
        await super().subscribe(channel)

    async def unsubscribe(self, channel: str) -> None:
        await super().unsubscribe(channel)
        if self.fails:
            raise BrokerError


async def test_what_is_published_is_printable_ascii_and_json() -> None:
    broker = Wire()
    sio = make(hub=Hub(broker))
    async with sio.hub:
        await sio.to("böse\u202e").to("b").except_("ü").volatile.emit("grüße", b"\xff")
    for channel, payload, sender in broker.published:
        assert channel.startswith("socketio/#")
        assert payload == Payload("json", '["grüße","/w=="]')
        assert sender is not None
        assert sender.isascii()
        assert sender.isprintable()


@pytest.mark.parametrize(
    ("payload", "sender"),
    [
        (Payload("json", '["x"]'), "socketio:"),
        (Payload("json", '["x"]'), "socketio:[]"),
        (Payload("json", '["x"]'), 'socketio:{"x":1}'),
        (Payload("json", '["x"]'), "socketio:\ud800"),
        (Payload("text", "x"), "socketio:{}"),
        (Payload("binary", b"x"), "socketio:{}"),
        (Payload("json", '["x"]'), 'socketio:{"b":[[1]]}'),
        (Payload("json", '["x",1]'), 'socketio:{"b":[[1]]}'),
        (Payload("json", '["x","!"]'), 'socketio:{"b":[[1]]}'),
        (Payload("json", '["x",{}]'), 'socketio:{"b":[[1,"a"]]}'),
        (Payload("json", '["x"'), 'socketio:{"b":[[0]]}'),
        (Payload("json", '["x"]'), 'socketio:{"b":[[]]}'),
    ],
    ids=repr,
)
async def test_what_is_no_event_of_ours_reaches_nobody(
    payload: Payload, sender: str, caplog: pytest.LogCaptureFixture
) -> None:
    broker = Wire()
    sio = make(hub=Hub(broker))
    async with several(sio, 2) as clients:
        for client in clients:
            await joined(client, "lobby")
        await broker.publish(sio.room("lobby"), payload, sender=sender)
        for client in clients:
            await client.nothing()
    assert sum("something else than an event" in record.message for record in caplog.records) == 1


async def test_an_event_that_the_broker_does_not_take_is_an_error() -> None:
    broker = Wire()
    sio = make(hub=Hub(broker))
    errors = []

    @sio.on("try")
    async def attempt(socket: Socket) -> None:
        broker.fails = True
        for action in (sio.emit("x"), socket.join("lobby")):
            try:
                await action
            except BrokerError as error:
                errors.append(error)
        assert socket.rooms == {socket.id}

    async with connected(sio) as client:
        await client.call("try")
        await client.send(Packet(DISCONNECT))
        await client.send(Packet(CONNECT))
        assert await client.receive() == Packet(CONNECT_ERROR, {"message": "the server failed"})
    assert len(errors) == 2


async def test_a_frame_is_made_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    encode = SocketIOProtocol.encode_publication

    def count(self: SocketIOProtocol, publication: Publication) -> Frame:
        made.append(publication)
        return encode(self, publication)

    monkeypatch.setattr(SocketIOProtocol, "encode_publication", count)
    sio = make()
    async with several(sio, 3) as clients:
        await sio.emit("x", {"a": 1})
        for client in clients:
            assert await client.event() == ["x", {"a": 1}]
    assert len(made) == 1


async def test_volatile_events_are_not_for_those_who_are_behind() -> None:
    sio = make()
    sockets = keep_sockets(sio)
    async with several(sio, 2) as (ann, bob):
        sockets[bob.sids["/"]]._outbox._behind = True
        await sio.volatile.emit("x", 1)
        for client in (ann, bob):
            await sockets[client.sids["/"]].volatile.emit("y")
        sockets[bob.sids["/"]]._outbox._behind = False
        assert [await ann.event(), await ann.event()] == [["x", 1], ["y"]]
        for client in (ann, bob):
            await client.nothing()


async def test_rooms_are_limited_and_have_rules() -> None:
    hub = Hub(limits=Limits(channels=2))
    sio = make(hub=hub)
    denied = []

    @hub.channel("socketio/#vip:{name}")
    async def may_join(conn: Connection[Any], name: str) -> bool:
        return name == "ann"

    @sio.on("try")
    async def attempt(socket: Socket, room: str) -> bool:
        try:
            await socket.join(room)
        except (SubscriptionDenied, InvalidChannel) as error:
            denied.append(error)
            return False
        return True

    async with connected(sio) as client:
        for room, joins in [
            ("vip:bob", False),
            ("vip:ann", True),
            ("", False),
            ("x" * 300, False),
            ("\n", False),
            ("a", True),
            ("b", False),
        ]:
            assert await client.call("try", room) == [joins], room


async def test_a_room_that_is_left_while_it_is_joined_is_left() -> None:
    hub = Hub()
    sio = make(hub=hub)
    sockets = keep_sockets(sio)
    async with connected(sio) as client:
        socket = sockets[client.sids["/"]]
        join = asyncio.ensure_future(socket.join("lobby"))
        subscribe, entered, go_on = hub.context.pubsub.subscribe, asyncio.Event(), asyncio.Event()

        async def slowly(*args: Any, **options: Any) -> Any:
            entered.set()
            await go_on.wait()
            return await subscribe(*args, **options)

        hub.context.pubsub.subscribe = slowly  # type: ignore[method-assign]
        await entered.wait()
        await socket.leave("lobby")
        go_on.set()
        await join
        await sio.to("lobby").emit("x")
        await client.nothing()
        assert sio.room("lobby") not in hub.context.pubsub._channels


# The end


@pytest.mark.parametrize("close", [False, True])
async def test_the_server_can_end_a_socket(close: bool) -> None:
    sio = make()
    ends = []

    @sio.on("quit")
    async def quit(socket: Socket) -> str:
        await socket.emit("bye")
        await socket.disconnect(close=close)
        await socket.disconnect(close=False)
        assert not socket.connected
        return "not sent"

    @sio.on("disconnect")
    async def left(socket: Socket, reason: str) -> None:
        ends.append((reason, socket.reason, socket.rooms))

    async with connected(sio) as client:
        await joined(client, "lobby")
        await client.emit("quit", id=1)
        # The client can't know yet.
        await client.emit("too late", b"with an attachment")
        await client.send(Packet(ACK, [], id=1))
        await client.send(Packet(DISCONNECT))
        assert await client.event() == ["bye"]
        if close:
            assert await client.closed() == (1000, "server namespace disconnect")
        else:
            assert await client.receive() == Packet(DISCONNECT)
            await sio.emit("not for it")
            await client.connect()
            await client.nothing()
    reasons = ["server namespace disconnect"] if close else ["server namespace disconnect", "transport close"]
    assert [end[:2] for end in ends] == [(reason, reason) for reason in reasons]
    assert ends[0][2] == {client.sids["/"], "lobby"} or not close


async def test_a_client_can_leave_a_namespace_and_come_back() -> None:
    sio = make()
    told: list[Any] = []

    @sio.on("connect")
    async def admit(socket: Socket) -> None:
        told.append("connect")

    @sio.on("disconnect")
    async def left(socket: Socket, reason: str) -> None:
        await asyncio.sleep(0.01)
        told.append(reason)

    async with connected(sio) as client:
        await client.send(Packet(DISCONNECT))
        await client.connect()
        await client.nothing()
    assert told == ["connect", "client namespace disconnect", "connect", "transport close"]


async def test_what_came_before_the_end_is_handled_and_then_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    sio = make()
    told: list[Any] = []

    @sio.on("slow")
    async def slow(socket: Socket, number: int) -> str:
        await asyncio.sleep(0.01)
        told.append(number)
        return "nobody is there"

    @sio.on("ask")
    async def ask(socket: Socket) -> None:
        await socket.emit("x")

    @sio.on("disconnect")
    async def left(socket: Socket) -> None:
        told.append("left")

    async with connected(sio) as client:
        for number in range(3):
            await client.emit("slow", number, id=number)
        await client.emit("ask")
    assert told == [0, 1, 2, "left"]


async def test_a_handler_that_does_not_end_is_ended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "_GRACE", 0.01)
    sio = make()
    told: list[Any] = []

    @sio.on("forever")
    async def forever(socket: Socket) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            told.append("cancelled")

    @sio.on("disconnect")
    async def left(socket: Socket) -> None:
        told.append("left")
        raise RuntimeError

    async with connected(sio) as client:
        await client.emit("forever")
        await client.emit("forever")
    assert told == ["cancelled", "left"]
    assert "did not finish" in caplog.text
    assert "the disconnect handler" in caplog.text


async def test_a_connection_whose_patience_is_over_ends_its_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.connection._FINISH", 0.05)
    sio = make()
    told: list[Any] = []

    @sio.on("forever")
    async def forever(socket: Socket) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            told.append("cancelled")

    async with connected(sio) as client:
        await client.emit("forever")
    assert told == ["cancelled"]
    assert not sio.hub.running or not sio.hub.context.pubsub._channels


async def test_a_client_that_leaves_while_it_is_connecting_is_let_go() -> None:
    sio = make()
    told: list[Any] = []
    entered, go_on = asyncio.Event(), asyncio.Event()

    @sio.on("connect")
    async def admit(socket: Socket) -> None:
        entered.set()
        await go_on.wait()
        if socket.auth:
            raise ConnectionRefused

    @sio.on("disconnect")
    async def left(socket: Socket) -> None:
        told.append("left")

    for auth in ({"refused": True}, {}):
        entered.clear()
        go_on.clear()
        async with connected(sio, namespace=None) as client:
            await client.send(Packet(CONNECT, auth))
            await entered.wait()
            await client.client.close()
            asyncio.get_running_loop().call_later(0.02, go_on.set)
    # The one who was admitted had been here.
    assert told == ["left"]


@pytest.mark.parametrize("refused", [True, False])
async def test_a_client_that_is_lost_in_the_moment_of_the_answer(
    refused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    sio = make()

    @sio.on("connect")
    async def admit(socket: Socket) -> None:
        socket.connection.connection_lost(ConnectionClosed(1006, clean=False))
        if refused:
            raise ConnectionRefused

    async with connected(sio, namespace=None) as client:
        await client.send(Packet(CONNECT))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_sockets_can_outlive_the_hub() -> None:
    sio = make()
    async with connected(sio, lifespan=False) as client:
        await joined(client, "lobby")
        await sio.hub.__aexit__()


async def test_an_acknowledgement_may_come_when_nobody_waits_any_more() -> None:
    sio = make()
    sockets = keep_sockets(sio)
    async with connected(sio) as client:
        socket = sockets[client.sids["/"]]
        answer = socket.ask(7, socket.frame(Packet(EVENT, ["ask"], id=7)), "x")
        answer.cancel()
        socket.acknowledged(7, ["late"])
        assert answer.cancelled()


async def test_events_before_the_answer_break_the_protocol() -> None:
    sio = make()

    @sio.on("connect")
    async def admit(socket: Socket) -> None:
        await asyncio.sleep(0.01)

    async with connected(sio, namespace=None) as client:
        await client.send(Packet(CONNECT))
        await client.emit("x")
        assert (await client.closed())[0] == 1008


async def test_nothing_is_left_of_those_who_have_gone() -> None:
    hub = Hub()
    sio = make(hub=hub)
    async with hub:
        for _ in range(5):
            async with several(sio, 3) as clients:
                for client in clients:
                    await joined(client, "lobby", "kitchen")
        assert not hub.context.pubsub._channels
        assert not sio._namespaces["/"].sockets
        assert not sio._engine.sessions


@pytest.mark.parametrize(
    ("closed", "reason"),
    [
        (ConnectionClosed(1000), "transport close"),
        (ConnectionClosed(1001), "transport close"),
        (ConnectionClosed(1005), "transport close"),
        (ConnectionClosed(1006, clean=False), "transport close"),
        (ConnectionClosed(1006, "ping timeout", clean=False), "ping timeout"),
        (ConnectionClosed(1012), "server shutting down"),
        (ConnectionClosed(1002, "not a packet"), "parse error"),
        (ConnectionClosed(1009), "transport error"),
        (ConnectionClosed(1013, "slow consumer"), "transport error"),
    ],
    ids=str,
)
def test_reasons_are_those_that_socket_io_has(closed: ConnectionClosed, reason: str) -> None:
    assert server_module._reason(closed) == reason


async def test_a_client_that_answers_no_ping_is_gone() -> None:
    sio = make(ping_interval=0.02, ping_timeout=0.02)
    reasons: asyncio.Queue[str] = asyncio.Queue()

    @sio.on("disconnect")
    async def left(socket: Socket, reason: str) -> None:
        reasons.put_nowait(reason)

    async with connected(sio):
        assert await asyncio.wait_for(reasons.get(), 2) == "ping timeout"


async def test_a_client_that_reads_nothing_harms_nobody() -> None:
    sio = make(hub=Hub(limits=Limits(outbox_size=200_000)))
    reasons: asyncio.Queue[str] = asyncio.Queue()

    @sio.on("disconnect")
    async def left(socket: Socket, reason: str) -> None:
        reasons.put_nowait(reason)

    async with connected(sio) as ann, connected(sio) as stalled:
        for number in range(100):
            await sio.emit("news", number, "x" * 10_000)
            assert await ann.event() == ["news", number, "x" * 10_000]
        assert await asyncio.wait_for(reasons.get(), 2) == "transport error"
        assert await stalled.closed() == (1013, "slow consumer")
        await ann.nothing()


# As an application


async def test_it_serves_on_its_own_and_runs_the_hub() -> None:
    sio = make()
    async with connected(sio) as client:
        assert sio.hub.running
        await client.nothing()
    assert not sio.hub.running


async def test_without_a_lifespan_the_hub_starts_with_the_first_client() -> None:
    sio = make()
    async with connected(sio, lifespan=False) as client:
        await client.nothing()
    await sio.hub.__aexit__()


async def test_a_hub_that_does_not_start_fails_the_startup() -> None:
    class Broken(MemoryBroker):
        async def start(self, *args: Any) -> None:
            raise BrokerError("no broker")

    sio = make(hub=Hub(Broken()))
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None:
        sent.append(message)

    await sio({"type": "lifespan"}, receive, send)
    assert sent == [{"type": "lifespan.startup.failed", "message": "asgi_ws: no broker"}]


async def test_origins_and_limits_are_the_hub_s() -> None:
    sio = make(hub=Hub(limits=Limits(connections=1)))
    with pytest.raises(Refused) as refused:
        async with connected(sio, headers={"origin": "https://evil.example"}):
            pass
    assert refused.value.status_code == 403
    async with connected(sio) as client:
        with pytest.raises(Refused) as refused:
            async with connected(sio):
                pass
        assert refused.value.status_code == 503
        await client.nothing()
    async with connected(sio):
        pass


async def test_the_hub_s_hooks_are_asked() -> None:
    sio = make()

    @sio.hub.on_connect
    async def refuse(conn: Connection[Any]) -> None:
        if "token" not in conn.query_params:
            raise HTTPException(401, "who are you?")
        if conn.query_params["token"] == "broken":
            raise RuntimeError

    with pytest.raises(Refused) as refused:
        async with connected(sio):
            pass
    assert (refused.value.status_code, refused.value.text) == (401, "who are you?")
    with pytest.raises(RuntimeError):
        async with connected(sio, path=f"{PATH}&token=broken"):
            pass
    async with connected(sio, path=f"{PATH}&token=x") as client:
        await client.nothing()


async def test_events_can_be_sent_without_serving_anybody() -> None:
    broker = MemoryBroker()
    sio = SocketIO(Hub(broker))
    with pytest.raises(HubNotRunning):
        await sio.emit("x")
    async with sio.hub, sio.hub.subscribe(sio.room("jobs", namespace="/elsewhere")) as publications:
        await sio.to("jobs", namespace="/elsewhere").emit("done", 17)
        assert (await anext(publications)).data == ["done", 17]
    assert "/elsewhere" not in sio._namespaces


# Mistakes of the developer's


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ping_interval": 0}, "ping_interval=0"),
        ({"ping_timeout": -1}, "ping_timeout=-1"),
        ({"max_payload": 0}, "max_payload=0"),
        ({"connect_timeout": 0}, "connect_timeout=0"),
        ({"recovery": 0}, "recovery=0"),
        ({"max_payload": 2**30}, "the hub takes 1048576 bytes"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SocketIO(Hub(), **options)


def test_it_needs_a_hub() -> None:
    with pytest.raises(TypeError, match="Hub"):
        SocketIO(Starlette())  # type: ignore[arg-type]
    SocketIO(Hub(limits=Limits(message_size=None)), max_payload=2**30)


def test_names_that_cannot_be_are_refused() -> None:
    sio = make()

    async def handler(socket: Socket) -> None: ...

    for event in RESERVED - {"connect", "disconnect"}:
        with pytest.raises(ValueError, match="reserved"):
            sio.on(event)(handler)
    with pytest.raises(TypeError, match="str"):
        sio.on(1)(handler)  # type: ignore[arg-type]
    for namespace in ("", "admin", "/a,b", "/a#b", "/a?b", "/" + "x" * 100):
        with pytest.raises(ValueError, match="namespace"):
            sio.on("x", namespace=namespace)(handler)
        with pytest.raises(ValueError, match="namespace"):
            sio.room("x", namespace=namespace)
    with pytest.raises(InvalidChannel):
        sio.on("x", namespace="/\n")(handler)
    for room in ("", "\n", None, 7):
        with pytest.raises(InvalidChannel):
            sio.to(room)  # type: ignore[arg-type]
    for event in ("x", "connect", "disconnect"):
        sio.on(event)(handler)
        with pytest.raises(ValueError, match="has a handler already"):
            sio.on(event)(handler)


async def test_events_that_cannot_be_sent_are_refused() -> None:
    sio = make()
    sockets = keep_sockets(sio)
    async with connected(sio) as client:
        socket = sockets[client.sids["/"]]
        senders = (sio.emit, sio.call, sio.to("x").emit, socket.emit, socket.call, socket.broadcast.emit)
        for send in senders:
            with pytest.raises(ValueError, match="reserved"):
                await send("connect")
            with pytest.raises(TypeError):
                await send("x", object())
            with pytest.raises(TypeError):
                await send("x", *[b"x"] * 11)
        await client.nothing()


async def no_socket() -> None: ...
async def only_by_name(*, socket: Socket) -> None: ...
async def needs_a_name(socket: Socket, *, name: str) -> None: ...
async def unreadable(socket: Socket, pattern: "asyncio.Queue[int]") -> None: ...
async def unknown(socket: Socket, value: "Nothing") -> None: ...  # type: ignore[name-defined]  # noqa: F821
def not_async(socket: Socket) -> None: ...


@pytest.mark.parametrize("function", [no_socket, only_by_name, needs_a_name, unreadable, unknown, not_async, 7])
def test_functions_that_cannot_be_handlers_are_refused(function: Any) -> None:
    sio = make()
    with pytest.raises(TypeError):
        sio.on("x")(function)
    with pytest.raises(TypeError):
        sio.use(function)


async def test_handlers_of_all_kinds() -> None:
    import functools

    sio = make()

    class Callable_:
        async def __call__(self, socket: Socket, number: int, *, extra: str = "") -> int:
            return number

        async def method(self, socket: Socket, number: int = 5, **rest: Any) -> int:
            return number

    async def with_more(prefix: str, socket: Socket, text: str) -> str:
        return prefix + text

    async def anything(*args: Any) -> int:
        return len(args)

    sio.on("object")(Callable_())
    sio.on("method")(Callable_().method)
    sio.on("partial")(functools.partial(with_more, "> "))
    sio.on("anything")(anything)
    async with connected(sio) as client:
        assert await client.call("object", 1) == [1]
        assert await client.call("method") == [5]
        assert await client.call("partial", "x") == ["> x"]
        assert await client.call("anything", 1, 2) == [3]
