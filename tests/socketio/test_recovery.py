import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asgi_ws import Hub, Limits
from asgi_ws.brokers import Broker, HistoryBroker, MemoryBroker
from asgi_ws.exceptions import BrokerError
from asgi_ws.messages import History, Position, Publication, Retention
from asgi_ws.payloads import Payload
from asgi_ws.socketio import ConnectionRefused, Socket, SocketIO
from asgi_ws.socketio.packets import CONNECT, CONNECT_ERROR, DISCONNECT, EVENT, Packet
from asgi_ws.socketio.sessions import Session, name_of_session
from tests.services import RedisServer, redis_server
from tests.socketio.clients import SocketIOClient, connected

pytestmark = pytest.mark.anyio


class Client:
    """What `socket.io-client` does: it keeps its secret, and the last argument of every event if that is a string."""

    def __init__(self) -> None:
        self.pid: str | None = None
        self.offset: str | None = None
        self.sid = ""
        self.events: list[list[Any]] = []
        self.recovered = False

    async def connect(self, client: SocketIOClient) -> None:
        auth = {"pid": self.pid, "offset": self.offset, "token": "x"}
        await client.send(Packet(CONNECT, {key: value for key, value in auth.items() if value is not None}))
        packet = await client.receive()
        assert packet.type == CONNECT, packet
        self.recovered = self.pid is not None and packet.data["pid"] == self.pid
        assert not self.recovered or packet.data["sid"] == self.sid
        self.pid, self.sid = packet.data["pid"], packet.data["sid"]

    async def event(self, client: SocketIOClient) -> list[Any]:
        packet = await client.receive()
        assert packet.type == EVENT, packet
        if isinstance(packet.data[-1], str):
            self.offset = packet.data[-1]
        return packet.data[:-1]  # type: ignore[no-any-return]


def make(hub: Hub | None = None, recovery: float = 60) -> SocketIO:
    sio = SocketIO(hub or Hub(), recovery=recovery)

    @sio.on("is that all?")
    async def is_that_all(socket: Socket) -> str:
        return "yes"

    @sio.on("connect")
    async def join(socket: Socket, auth: dict[str, Any]) -> None:
        assert auth == {"token": "x"}
        if not socket.recovered:
            socket.data["visits"] = 0
            await socket.join("lobby")
        socket.data["visits"] += 1

    @sio.on("visits")
    async def visits(socket: Socket) -> int:
        return socket.data["visits"]  # type: ignore[no-any-return]

    return sio


async def gone(sio: SocketIO, count: int = 0) -> None:
    async with asyncio.timeout(2):
        while len(sio._namespaces["/"].sockets) > count:
            await asyncio.sleep(0)


async def test_a_client_that_comes_back_gets_what_it_has_missed_once_and_in_order() -> None:
    sio = make()
    ann = Client()
    async with sio.hub:
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
            await sio.to("lobby").emit("news", 1)
            await sio.emit("all", b"\x01")
            assert await ann.event(client) == ["news", 1]
            assert await ann.event(client) == ["all", b"\x01"]
            # Sent, and lost on its way.
            await sio.to("lobby").emit("news", 2)
            await sio.to(ann.sid).emit("you", 1)
            await sio.hub.publish(sio.room("lobby"), b"plain")
            await client.client.vanish()
        await gone(sio)
        for number in (3, 4):
            await sio.to("lobby").emit("news", number)
        await sio.to("lobby").except_(ann.sid).emit("not for ann")
        await sio.to("lobby").volatile.emit("volatile")
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
            assert ann.recovered
            events = [await ann.event(client) for _ in range(5)]
            # Of each room in its order.
            assert [event for event in events if event[0] != "you"] == [
                ["news", 2], ["message", b"plain"], ["news", 3], ["news", 4]
            ]  # fmt: skip
            assert ["you", 1] in events
            assert await client.call("visits") == [2]
            await client.nothing()
            await sio.to("lobby").emit("news", 5)
            assert await ann.event(client) == ["news", 5]


async def test_a_client_that_has_had_no_event_can_be_recovered_again_and_again() -> None:
    sio = make()
    ann = Client()
    async with sio.hub:
        for visit in range(4):
            async with connected(sio, namespace=None) as client:
                await ann.connect(client)
                assert ann.recovered == (visit > 0)
                await client.nothing() if not visit else None
                for number in range(visit):
                    packet = await client.receive()
                    assert packet.data[:2] == ["news", number]
            await gone(sio)
            await sio.to("lobby").emit("news", visit)


async def test_no_event_makes_a_client_forget_where_it_was() -> None:
    sio = make()
    ann = Client()
    sockets: list[Socket] = []

    @sio.use
    async def keep(socket: Socket) -> None:
        sockets.append(socket)

    async with sio.hub:
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
            await sio.to("lobby").volatile.emit("volatile", "text")
            await sockets[0].emit("direct", "text")
            await sockets[0].volatile.emit("direct", "text")
            assert await ann.event(client) == ["volatile", "text"]
            assert await ann.event(client) == ["direct", "text"]
            assert await ann.event(client) == ["direct", "text"]
            await client.client.vanish()
        await gone(sio)
        await sio.to("lobby").emit("news", 1)
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
            assert ann.recovered
            assert await ann.event(client) == ["news", 1]
            await client.nothing()


async def test_a_room_that_was_left_is_not_recovered() -> None:
    sio = make()
    ann = Client()

    @sio.on("leave")
    async def leave(socket: Socket) -> None:
        await socket.leave("lobby")

    async with sio.hub:
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
            await client.call("leave")
        await gone(sio)
        await sio.to("lobby").emit("news", 1)
        await sio.emit("all", 1)
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
            assert ann.recovered
            assert await ann.event(client) == ["all", 1]
            await client.nothing()


async def test_an_event_of_several_rooms_comes_once_also_across_a_disconnection() -> None:
    sio = make()
    ann = Client()

    @sio.on("join")
    async def join(socket: Socket) -> None:
        await socket.join("hall")

    async with sio.hub:
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
            await client.call("join")
            await sio.to("lobby").to("hall").emit("x", 1)
            assert await ann.event(client) == ["x", 1]
            await sio.to("lobby").to("hall").emit("x", 2)
            await client.client.vanish()
        await gone(sio)
        await sio.to("hall").to("lobby").emit("x", 3)
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
            assert ann.recovered
            assert sorted([await ann.event(client), await ann.event(client)]) == [["x", 2], ["x", 3]]
            await client.nothing()


async def test_nothing_is_lost_while_a_client_that_came_back_is_admitted() -> None:
    sio = make()
    ann = Client()
    entered, go_on = asyncio.Event(), asyncio.Event()

    async with sio.hub:
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
        await gone(sio)

        @sio.use
        async def slowly(socket: Socket) -> None:
            entered.set()
            await go_on.wait()

        await sio.to("lobby").emit("news", 0)
        async with connected(sio, namespace=None) as client:
            connecting = asyncio.create_task(ann.connect(client))
            await entered.wait()
            for number in (1, 2):
                await sio.to("lobby").emit("news", number)
            go_on.set()
            await connecting
            assert ann.recovered
            assert [await ann.event(client) for _ in range(3)] == [["news", 0], ["news", 1], ["news", 2]]


async def test_a_client_that_comes_back_before_it_was_missed_takes_its_socket_over() -> None:
    sio = make()
    ann = Client()
    reasons = []

    @sio.on("disconnect")
    async def left(socket: Socket, reason: str) -> None:
        reasons.append((reason, socket.id))

    async with connected(sio, namespace=None) as first:
        await ann.connect(first)
        await sio.to("lobby").emit("news", 1)
        async with connected(sio, namespace=None) as second:
            await ann.connect(second)
            assert ann.recovered
            assert reasons == [("transport close", ann.sid)]
            assert await ann.event(second) == ["news", 1]
            await second.nothing()
            with contextlib.suppress(AssertionError):
                assert (await first.closed())[0] == 1008


async def test_a_client_that_is_lost_while_it_comes_back_can_come_back_again() -> None:
    sio = make()
    ann = Client()
    entered, go_on = asyncio.Event(), asyncio.Event()
    async with sio.hub:
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
            await sio.to("lobby").emit("news", 1)
        await gone(sio)

        @sio.use
        async def slowly(socket: Socket) -> None:
            entered.set()
            await go_on.wait()

        async with connected(sio, namespace=None) as client:
            await client.send(Packet(CONNECT, {"pid": ann.pid, "token": "x"}))
            await entered.wait()
            await client.client.vanish()
            for _ in range(20):
                await asyncio.sleep(0)
            go_on.set()
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
            assert ann.recovered
            assert await ann.event(client) == ["news", 1]


@pytest.mark.parametrize("why", ["expired", "left", "sent away", "unknown", "no secret", "offset", "another user"])
async def test_who_cannot_be_recovered_is_a_new_client(why: str) -> None:
    sio = make(recovery=0.02 if why == "expired" else 60)
    ann = Client()
    sockets: list[Socket] = []

    @sio.use
    async def keep(socket: Socket) -> None:
        sockets.append(socket)

    async with sio.hub:
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
            if why == "left":
                await client.send(Packet(DISCONNECT))
            elif why == "sent away":
                await sockets[0].disconnect()
                assert (await client.receive()).type == DISCONNECT
        await gone(sio)
        await sio.to("lobby").emit("news", 1)
        sid = ann.sid
        if why == "expired":
            await asyncio.sleep(0.05)
        elif why == "unknown":
            ann.pid = "x"
        elif why == "offset":
            ann.offset = "7:x:0"
        elif why == "another user":
            for session, _ in sio._sessions._sessions.values():  # type: ignore[union-attr]
                session.user = "bob"
        async with connected(sio, namespace=None) as client:
            if why == "no secret":
                await client.send(Packet(CONNECT, {"pid": 7, "offset": [], "token": "x"}))
                assert (await client.receive()).data["pid"] != ann.pid
            else:
                await ann.connect(client)
                assert not ann.recovered
                assert ann.sid != sid
                assert await client.call("visits") == [1]
            await client.nothing()


async def test_what_is_no_longer_kept_recovers_nobody() -> None:
    sio = make(Hub(limits=Limits(recovery=2)))
    ann = Client()
    async with sio.hub:
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
        await gone(sio)
        for number in range(3):
            await sio.to("lobby").emit("news", number)
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
            assert not ann.recovered
            # No partial tail.
            await client.nothing()
            await sio.to("lobby").emit("news", 3)
            assert await ann.event(client) == ["news", 3]


async def test_more_than_can_wait_recovers_nobody() -> None:
    sio = make(Hub(limits=Limits(outbox_size=1000)))
    ann = Client()
    async with sio.hub:
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
        await gone(sio)
        for _ in range(3):
            await sio.to("lobby").emit("news", "x" * 400)
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
            assert not ann.recovered
            await client.nothing()


async def test_a_client_that_lost_something_for_good_is_ended_and_not_recovered() -> None:
    sio = make()
    ann = Client()
    sockets: list[Socket] = []

    @sio.use
    async def keep(socket: Socket) -> None:
        sockets.append(socket)

    async with sio.hub:
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
            sockets[0].lost(sio.room("lobby"))
            assert await client.closed() == (1013, "insufficient state")
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
            assert not ann.recovered
    # Without recovery nobody expects more than what comes.
    plain = SocketIO(Hub())

    @plain.use
    async def keep_plain(socket: Socket) -> None:
        sockets.append(socket)

    async with connected(plain):
        sockets[-1].lost("x")
        assert sockets[-1].connected


async def test_a_refused_client_is_not_recovered() -> None:
    sio = make()
    ann = Client()
    async with sio.hub:
        async with connected(sio, namespace=None) as client:
            await ann.connect(client)
        await gone(sio)
        refuses = True

        @sio.use
        async def refuse(socket: Socket) -> None:
            if refuses:
                raise ConnectionRefused

        async with connected(sio, namespace=None) as client:
            await client.send(Packet(CONNECT, {"pid": ann.pid, "token": "x"}))
            assert (await client.receive()).type == CONNECT_ERROR
            refuses = False
            await ann.connect(client)
            assert not ann.recovered


class Forgetful(Broker):
    """A broker that keeps no histories."""

    def __init__(self) -> None:
        self._memory = MemoryBroker()

    async def start(self, *args: Any) -> None:
        await self._memory.start(*args)

    async def stop(self) -> None:
        await self._memory.stop()

    async def publish(self, channel: str, payload: Payload, *, sender: str | None = None) -> Position | None:
        await self._memory.publish(channel, payload, sender=sender)
        return None

    async def subscribe(self, channel: str) -> None:
        await self._memory.subscribe(channel)

    async def unsubscribe(self, channel: str) -> None:
        await self._memory.unsubscribe(channel)


async def test_without_histories_nobody_is_recovered() -> None:
    sio = make(Hub(Forgetful()))
    ann = Client()
    async with sio.hub:
        for _ in range(2):
            async with connected(sio, namespace=None) as client:
                await ann.connect(client)
                assert not ann.recovered
            await gone(sio)


async def test_a_direct_event_waits_while_the_client_is_behind() -> None:
    sio = make()
    ann = Client()
    sockets: list[Socket] = []

    @sio.use
    async def keep(socket: Socket) -> None:
        sockets.append(socket)

    async with connected(sio, namespace=None) as client:
        await ann.connect(client)
        sockets[0]._outbox._behind = True
        task = asyncio.create_task(sockets[0].emit("x"))
        await asyncio.sleep(0)
        sockets[0]._outbox._flush()
        await task
        assert await ann.event(client) == ["x"]


# Several processes


class Center:
    """Joins brokers as if each were in a process of its own."""

    def __init__(self) -> None:
        self.memory = MemoryBroker()
        self.sides: list[Side] = []

    def deliver(self, publication: Publication) -> None:
        for side in self.sides:
            if publication.channel in side.channels:
                side.deliver(dataclasses.replace(publication))


class Side(HistoryBroker):
    def __init__(self, center: Center) -> None:
        self.center = center
        self.channels: set[str] = set()
        self.fails = False

    async def start(self, deliver: Any, lost: Any) -> None:
        self.deliver = deliver
        if not self.center.sides:
            await self.center.memory.start(self.center.deliver, lambda: None)
        self.center.sides.append(self)

    async def stop(self) -> None:
        self.center.sides.remove(self)
        if not self.center.sides:
            await self.center.memory.stop()

    async def publish(
        self, channel: str, payload: Payload, *, sender: str | None = None, retention: Retention | None = None
    ) -> Position | None:
        if self.fails:
            raise BrokerError
        return await self.center.memory.publish(channel, payload, sender=sender, retention=retention)

    async def subscribe(self, channel: str) -> None:
        if not any(channel in side.channels for side in self.center.sides):
            await self.center.memory.subscribe(channel)
        self.channels.add(channel)

    async def unsubscribe(self, channel: str) -> None:
        self.channels.remove(channel)
        if not any(channel in side.channels for side in self.center.sides):
            await self.center.memory.unsubscribe(channel)

    async def history(self, channel: str, *, since: Position | None, limit: int | None) -> History:
        if self.fails:
            raise BrokerError
        return await self.center.memory.history(channel, since=since, limit=limit)

    async def remember(self, name: str, value: str, *, ttl: float | None = None) -> None:
        if self.fails:
            raise BrokerError
        await self.center.memory.remember(name, value, ttl=ttl)

    async def take(self, name: str) -> str | None:
        if self.fails:
            raise BrokerError
        return await self.center.memory.take(name)

    async def recall(self, name: str) -> str | None:
        return await self.center.memory.recall(name)


def pair() -> tuple[SocketIO, SocketIO]:
    center = Center()
    return make(Hub(Side(center))), make(Hub(Side(center)))


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(params=["joined", "redis"])
def new_hub(request: pytest.FixtureRequest) -> Callable[[], Hub]:
    """Makes hubs that are joined, each as if it were in a process of its own."""
    if request.param == "joined":
        center = Center()
        return lambda: Hub(Side(center))
    server = request.getfixturevalue("redis")
    server.command("FLUSHALL")
    return lambda: Hub(server.url)


async def test_rooms_reach_the_sockets_of_all_processes(new_hub: Callable[[], Hub]) -> None:
    one, two = make(new_hub()), make(new_hub())
    async with one.hub, two.hub, connected(one, {"token": "x"}) as ann, connected(two, {"token": "x"}) as bob:
        await one.to("lobby").emit("x", b"\x01")
        await two.to("lobby").to(ann.sids["/"]).emit("y")
        await one.emit("z")
        await two.except_(ann.sids["/"]).emit("for bob")
        assert [(await ann.event())[:-1] for _ in range(3)] == [["x", b"\x01"], ["y"], ["z"]]
        assert [(await bob.event())[:-1] for _ in range(4)] == [["x", b"\x01"], ["y"], ["z"], ["for bob"]]
        await ann.nothing()


async def test_a_client_is_recovered_by_whatever_process_it_comes_to(new_hub: Callable[[], Hub]) -> None:
    one, two = make(new_hub()), make(new_hub())
    ann = Client()
    async with one.hub, two.hub:
        for visit, sio in enumerate((one, two, two, one, two, one)):
            async with connected(sio, namespace=None) as client:
                await ann.connect(client)
                assert ann.recovered == (visit > 0)
                if visit:
                    assert await ann.event(client) == ["news", visit]
                assert await client.call("visits") == [visit + 1]
                await client.nothing()
            await gone(sio)
            await one.to("lobby").emit("news", visit + 1)


async def test_what_is_published_from_outside_is_not_missed(new_hub: Callable[[], Hub]) -> None:
    one, outside = make(new_hub()), new_hub()
    ann = Client()
    async with one.hub:
        async with connected(one, namespace=None) as client:
            await ann.connect(client)
        await gone(one)
        async with outside:
            await outside.publish(one.room("lobby"), "from outside")
            await SocketIO(outside).to("lobby").emit("news", 1)
            await outside.publish("elsewhere", "not kept")
        async with connected(one, namespace=None) as client:
            await ann.connect(client)
            assert ann.recovered
            assert await ann.event(client) == ["message", "from outside"]
            assert await ann.event(client) == ["news", 1]


async def test_a_session_is_taken_once(new_hub: Callable[[], Hub]) -> None:
    one, two = make(new_hub()), make(new_hub())
    ann, thief = Client(), Client()
    async with one.hub, two.hub:
        async with connected(one, namespace=None) as client:
            await ann.connect(client)
        await gone(one)
        thief.pid = ann.pid
        thief.sid = ann.sid
        async with connected(two, namespace=None) as client:
            await ann.connect(client)
            assert ann.recovered
            async with connected(one, namespace=None) as other:
                await thief.connect(other)
                assert not thief.recovered


@pytest.mark.parametrize("why", ["data", "broker", "another user", "nonsense"])
async def test_what_another_process_cannot_have_it_does_not_recover(why: str, caplog: pytest.LogCaptureFixture) -> None:
    one, two = pair()
    ann = Client()

    @one.on("keep")
    async def keep(socket: Socket) -> None:
        socket.data["x"] = object()

    async with one.hub, two.hub:
        async with connected(one, namespace=None) as client:
            await ann.connect(client)
            if why == "data":
                await client.call("keep")
        await gone(one)
        name = name_of_session("/", ann.pid or "")
        if why == "broker":
            two.hub._broker.fails = True  # type: ignore[attr-defined]
        elif why == "another user":
            session = Session("sid", "bob")
            await one.hub.context.pubsub.keep(name, session.save(), 9)
        elif why == "nonsense":
            await one.hub.context.pubsub.keep(name, "[1]", 9)
        async with connected(two, namespace=None) as client:
            if why == "broker":
                two.hub._broker.fails = True  # type: ignore[attr-defined]
                await client.send(Packet(CONNECT, {"pid": ann.pid, "token": "x"}))
                assert (await client.receive()).type == CONNECT_ERROR
                two.hub._broker.fails = False  # type: ignore[attr-defined]
            else:
                await ann.connect(client)
                assert not ann.recovered
        if why == "data":
            # The process that had it still does.
            async with connected(one, namespace=None) as client:
                ann.pid = next(iter(one._sessions._sessions), None)  # type: ignore[union-attr]
                packet = Packet(CONNECT, {"pid": ann.pid, "token": "x"})
                await client.send(packet)
                assert (await client.receive()).data["pid"] == ann.pid
    assert "recovered" in caplog.text or why == "another user"
