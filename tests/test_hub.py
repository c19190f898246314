"""Publishing, subscribing and rules, and how a hub starts and stops."""

import asyncio
import threading
import typing

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_ws import (
    BrokerError,
    Connection,
    ConnectionClosed,
    Hub,
    HubNotRunning,
    InvalidChannel,
    InvalidPosition,
    Limits,
    Position,
    Publication,
    SubscriberTooSlow,
    SubscriptionDenied,
    WebSocketMiddleware,
)
from asgi_ws.brokers import Broker, MemoryBroker
from asgi_ws.payloads import encode
from asgi_ws.presence import Member, PresenceStats
from asgi_ws.testing import Client, connect, request
from tests.bus import Bus, BusBroker

pytestmark = pytest.mark.anyio


def make_app(hub: Hub, routes: typing.Sequence[Route] = ()) -> Starlette:
    """Everybody at /{channel} hears that channel, and what is sent there is published there."""
    app = Starlette(routes=list(routes))
    app.add_middleware(WebSocketMiddleware, hub=hub)

    @hub.websocket("/{channel}")
    async def listen(conn: Connection, channel: str) -> None:
        await conn.subscribe(channel)
        await conn.send("subscribed")
        async for message in conn:
            await conn.publish(channel, message)

    return app


async def subscribed(client: Client) -> Client:
    assert await client.receive() == "subscribed"
    return client


@pytest.fixture
def hub() -> Hub:
    return Hub()


# Publishing


@pytest.mark.parametrize(
    ("data", "received"),
    [("text", "text"), (b"\x00", b"\x00"), ({"a": [1, None]}, '{"a":[1,null]}'), (17, "17"), (None, "null")],
)
async def test_text_bytes_and_json_reach_every_subscriber(data: object, received: object, hub: Hub) -> None:
    app = make_app(hub)
    async with connect(app, "/a") as ann, connect(app, "/a") as bob, connect(app, "/b") as eve:
        for client in (ann, bob, eve):
            await subscribed(client)
        await hub.publish("a", data)
        await hub.publish("b", "for b")
        assert await ann.receive() == received
        assert await bob.receive() == received
        assert await eve.receive() == "for b"


async def test_the_order_of_a_channel_is_the_same_for_all(hub: Hub) -> None:
    app = make_app(hub)
    async with connect(app, "/a") as ann, connect(app, "/a") as bob:
        await subscribed(ann)
        await subscribed(bob)

        async def talk(client: Client, name: str) -> None:
            for number in range(20):
                await client.send(f"{name}{number}")

        async def listen(client: Client) -> list[str | bytes]:
            return [await client.receive() for _ in range(60)]

        hears = asyncio.gather(listen(ann), listen(bob))
        await asyncio.gather(talk(ann, "ann"), talk(bob, "bob"), *(hub.publish("a", f"hub{n}") for n in range(20)))
        by_ann, by_bob = await hears
    assert by_ann == by_bob
    assert [word for word in by_ann if str(word).startswith("ann")] == [f"ann{n}" for n in range(20)]


async def test_one_connection_can_be_left_out(hub: Hub) -> None:
    app = Starlette()
    app.add_middleware(WebSocketMiddleware, hub=hub)

    @hub.websocket("/{how}")
    async def talk(conn: Connection, how: str) -> None:
        await conn.subscribe("a")
        await conn.send("subscribed")
        async for text in conn:
            if how == "self":
                await conn.publish("a", text, exclude_self=True)
            elif how == "connection":
                await hub.publish("a", text, exclude=conn)
            else:
                await hub.publish("a", text, exclude=conn.id)

    async with (
        connect(app, "/self") as one,
        connect(app, "/connection") as two,
        connect(app, "/id") as three,
    ):
        clients = [one, two, three]
        for client in clients:
            await subscribed(client)
        for client in clients:
            await client.send(client.path)
        for client in clients:
            heard = {await client.receive(), await client.receive()}
            assert heard == {other.path for other in clients if other is not client}


async def test_publishing_works_from_routes_background_tasks_and_threads(hub: Hub) -> None:
    async def from_route(request: Request) -> JSONResponse:
        await hub.publish("a", "route")
        return JSONResponse({}, background=BackgroundTask(hub.publish, "a", "background"))

    def from_threadpool(request: Request) -> JSONResponse:
        anyio.from_thread.run(hub.publish, "a", "thread")
        return JSONResponse({})

    app = make_app(hub, [Route("/route/x", from_route), Route("/thread/x", from_threadpool)])
    async with connect(app, "/a") as client:
        await subscribed(client)
        assert (await request(app, "GET", "/route/x")).status_code == 200
        assert (await request(app, "GET", "/thread/x")).status_code == 200
        assert [await client.receive() for _ in range(3)] == ["route", "background", "thread"]


async def test_the_memory_broker_delivers_before_publish_returns(hub: Hub) -> None:
    async with hub, hub.subscribe("a") as publications:
        first = await hub.publish("a", "one")
        second = await hub.publish("a", {"two": 2})
        assert first is not None
        assert (first, second) == (Position(1, first.epoch), Position(2, first.epoch))
        with anyio.fail_after(0.1):
            assert await anext(publications) == Publication("a", encode("one"), first)
            publication = await anext(publications)
        assert (publication.data, publication.position, publication.channel) == ({"two": 2}, second, "a")


async def test_a_subscription_on_the_servers_side_ends_with_the_hub(hub: Hub) -> None:
    heard: list[object] = []
    async with hub:
        subscription = hub.subscribe("a")

        async def listen() -> None:
            async with subscription as publications:
                async for publication in publications:
                    heard.append(publication.data)

        listening = asyncio.create_task(listen())
        await asyncio.sleep(0)
        await hub.publish("a", "one")
        await asyncio.sleep(0)
    await asyncio.wait_for(listening, 1)
    assert heard == ["one"]


async def test_a_subscription_that_is_not_read_says_so() -> None:
    hub = Hub(limits=Limits(outbox_size=10))
    async with hub, hub.subscribe("a") as publications:
        for _ in range(3):
            await hub.publish("a", "12345")
        assert [(await anext(publications)).data for _ in range(2)] == ["12345", "12345"]
        with pytest.raises(SubscriberTooSlow, match="'a'"):
            await anext(publications)


@pytest.mark.parametrize("name", ["", "x" * 256, "a\nb", "a\x00", "\x7f", 17])
async def test_a_name_that_no_channel_has_is_refused(name: typing.Any, hub: Hub) -> None:
    async with hub:
        with pytest.raises(ValueError, match="channel's name"):
            await hub.publish(name, "x")
        with pytest.raises(ValueError, match="channel's name"):
            hub.subscribe(name)


async def test_data_that_cant_be_encoded_is_refused(hub: Hub) -> None:
    async with hub:
        with pytest.raises(TypeError, match="object"):
            await hub.publish("a", object())


# Rules


async def test_a_rule_decides_who_may_subscribe(hub: Hub) -> None:
    app = make_app(hub)
    asked = []

    @hub.channel("rooms:{room}:{part}")
    async def may(conn: Connection, room: str, part: str) -> bool:
        asked.append((room, part))
        return conn.headers.get("x-user") == room

    async with connect(app, "/rooms:ann:1", headers={"x-user": "ann"}) as client:
        await subscribed(client)
    async with connect(app, "/rooms:ann:1", headers={"x-user": "eve"}) as client:
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
    assert closed.value.code == 1008
    assert asked == [("ann", "1"), ("ann", "1")]
    async with connect(app, "/rooms:ann:1:2") as client:
        await subscribed(client)


async def test_a_handler_may_go_on_after_a_refusal(hub: Hub) -> None:
    app = Starlette()
    app.add_middleware(WebSocketMiddleware, hub=hub)

    @hub.channel("closed")
    async def nobody(conn: Connection) -> bool:
        return False

    @hub.websocket("/")
    async def handler(conn: Connection) -> None:
        with pytest.raises(SubscriptionDenied) as denied:
            await conn.subscribe("closed")
        assert denied.value.channel == "closed"
        await conn.send(sorted(conn.channels))

    async with connect(app, "/") as client:
        assert await client.receive_json() == []


async def test_a_connection_that_ends_while_its_rule_is_asked_is_not_subscribed(hub: Hub) -> None:
    app = make_app(hub)
    asked, answer = asyncio.Event(), asyncio.Event()

    @hub.channel("a")
    async def slowly(conn: Connection) -> bool:
        asked.set()
        await answer.wait()
        return True

    async with hub:
        async with connect(app, "/a") as client:
            await asked.wait()
            await client.close()
        # The handler received nothing yet, so it was cancelled in the midst of its rule.
        assert not hub.context.pubsub._channels


async def test_a_subscription_that_is_left_while_it_is_made_is_taken_back() -> None:
    entered, go = asyncio.Event(), asyncio.Event()

    class SlowBroker(MemoryBroker):
        async def subscribe(self, channel: str) -> None:
            entered.set()
            await go.wait()
            await super().subscribe(channel)

    hub = Hub(SlowBroker())
    app = Starlette()
    app.add_middleware(WebSocketMiddleware, hub=hub)
    done = asyncio.Event()

    @hub.websocket("/")
    async def handler(conn: Connection) -> None:
        subscribing = asyncio.create_task(conn.subscribe("a"))
        await entered.wait()
        await conn.unsubscribe("a")
        go.set()
        await subscribing
        assert not conn.channels
        done.set()

    async with hub, connect(app, "/") as client:
        await done.wait()
        assert not hub.context.pubsub._channels
        with pytest.raises(ConnectionClosed):
            await client.receive()


async def test_a_broker_that_fails_leaves_nothing_behind() -> None:
    class BrokenBroker(MemoryBroker):
        async def subscribe(self, channel: str) -> None:
            raise OSError("no broker")

    hub = Hub(BrokenBroker())
    app = Starlette()
    app.add_middleware(WebSocketMiddleware, hub=hub)

    @hub.websocket("/")
    async def handler(conn: Connection) -> None:
        with pytest.raises(OSError, match="no broker"):
            await conn.subscribe("a")
        await conn.send(sorted(conn.channels))

    async with connect(app, "/") as client:
        assert await client.receive_json() == []
        assert not hub.context.pubsub._channels


async def test_a_subscription_after_the_handlers_end_is_refused(hub: Hub) -> None:
    app = Starlette()
    app.add_middleware(WebSocketMiddleware, hub=hub)
    kept: list[Connection] = []

    @hub.websocket("/")
    async def handler(conn: Connection) -> None:
        kept.append(conn)

    async with connect(app, "/") as client:
        with pytest.raises(ConnectionClosed):
            await client.receive()
        with pytest.raises(ConnectionClosed):
            await kept[0].subscribe("a")


# Mistakes of the developer


def test_a_rule_must_take_what_its_pattern_names(hub: Hub) -> None:
    with pytest.raises(TypeError, match="room"):

        @hub.channel("rooms:{room}")
        async def rule(conn: Connection, name: str) -> bool:
            return True


def test_a_rule_must_be_async(hub: Hub) -> None:
    with pytest.raises(TypeError, match="async def"):

        @hub.channel("a")
        def rule(conn: Connection) -> bool:  # type: ignore[type-var]
            return True


@pytest.mark.parametrize("pattern", ["", "a:{b", "a}", "{a}:{a}", "{1}", "{}", "a\n", "x" * 256])
def test_a_pattern_that_cant_match_is_refused(pattern: str, hub: Hub) -> None:
    with pytest.raises(ValueError, match=r"."):
        hub.channel(pattern)


def test_a_pattern_can_have_one_rule(hub: Hub) -> None:
    hub.channel("a:{b}")
    with pytest.raises(ValueError, match="already"):
        hub.channel("a:{b}")


@pytest.mark.parametrize(
    "arguments",
    [
        {"broker": "nothing://"},
        {"broker": "memory://somewhere"},
        {"broker": "memory"},
        {"overflow": "explode"},
        {"allowed_origins": ["example.com"]},
        {"allowed_origins": "https://example.com"},
    ],
)
def test_an_argument_that_cant_work_is_refused(arguments: dict[str, typing.Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Hub(**arguments)


def test_a_hook_must_be_async(hub: Hub) -> None:
    with pytest.raises(TypeError, match="async def"):
        hub.on_connect(lambda conn: None)  # type: ignore[arg-type,return-value]


async def test_a_hub_that_isnt_running_says_so(hub: Hub) -> None:
    with pytest.raises(HubNotRunning, match="WebSocketMiddleware"):
        await hub.publish("a", "x")
    with pytest.raises(HubNotRunning):
        hub.subscribe("a")
    assert not hub.running


# Start and stop


async def test_a_hub_runs_while_somebody_uses_it(hub: Hub) -> None:
    async with hub:
        async with hub:
            assert hub.running
        assert hub.running
    assert not hub.running
    async with hub:
        assert await hub.publish("a", "again") is not None


async def test_those_who_come_while_it_starts_wait() -> None:
    starting, go = asyncio.Event(), asyncio.Event()

    class SlowBroker(MemoryBroker):
        async def start(self, *arguments: typing.Any) -> None:
            starting.set()
            await go.wait()
            await super().start(*arguments)

    hub = Hub(SlowBroker())

    async def use() -> bool:
        async with hub:
            return hub.running

    users = [asyncio.create_task(use()) for _ in range(3)]
    await starting.wait()
    go.set()
    assert await asyncio.gather(*users) == [True, True, True]
    assert not hub.running


async def test_a_hub_of_another_running_loop_is_not_used(hub: Hub) -> None:
    async with hub:

        def elsewhere() -> None:
            async def use() -> None:
                with pytest.raises(RuntimeError, match="another event loop"):
                    await hub.publish("a", "x")
                with pytest.raises(RuntimeError, match="another event loop"):
                    await hub.__aenter__()

            asyncio.run(use())

        await anyio.to_thread.run_sync(elsewhere)


def test_a_hub_starts_anew_on_another_loop_when_its_own_is_closed(hub: Hub) -> None:
    async def begin() -> None:
        await hub.__aenter__()

    async def use() -> None:
        assert not hub.running
        async with hub:
            assert await hub.publish("a", "x") is not None

    thread = threading.Thread(target=lambda: asyncio.run(begin()))
    thread.start()
    thread.join()
    asyncio.run(use())


async def test_a_client_that_is_connected_when_the_hub_stops_is_cut(hub: Hub) -> None:
    app = make_app(hub)
    async with connect(app, "/a", lifespan=False) as client:
        await subscribed(client)
        await hub.__aexit__()
        await client.close()


async def test_workers_that_dont_share_the_memory_broker_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("asgi_ws.hub.worker_count", lambda: 2)
    async with Hub():
        assert "2 workers don't share the memory broker" in caplog.text


# Histories


async def test_a_history_is_read_and_a_subscription_begins_in_it() -> None:
    hub = Hub()
    hub.channel("kept", history=3)
    async with hub:
        positions = [await hub.publish("kept", number) for number in range(1, 6)]
        history = await hub.history("kept", limit=2)
        assert ([each.data for each in history.publications], history.position) == ([4, 5], positions[-1])
        assert [each.data for each in (await hub.history("kept", since=str(positions[3]))).publications] == [5]
        assert not (await hub.history("kept", since=positions[0])).complete
        async with hub.subscribe("kept", since=str(positions[2])) as publications:
            assert publications.recovery.recovered
            assert [(await anext(publications)).data for _ in range(2)] == [4, 5]


async def test_what_can_not_be_asked_of_a_history() -> None:
    hub = Hub()
    hub.channel("kept", history=3)
    async with hub:
        for limit in (-1, 100_001):
            with pytest.raises(ValueError, match="must be a number of publications, 0 to 100000"):
                await hub.history("kept", limit=limit)
        with pytest.raises(ValueError, match="'other' has no history"):
            await hub.history("other")
        with pytest.raises(InvalidPosition):
            await hub.history("kept", since="never")
        with pytest.raises(InvalidPosition):
            hub.subscribe("kept", since="never")
        with pytest.raises(InvalidChannel):
            await hub.history("")


class PlainBroker(Broker):
    """One that does what every broker does, and no more."""

    async def start(self, deliver: typing.Any, lost: typing.Any) -> None: ...

    async def stop(self) -> None: ...

    async def publish(self, channel: str, payload: typing.Any, *, sender: str | None = None) -> None: ...

    async def subscribe(self, channel: str) -> None: ...

    async def unsubscribe(self, channel: str) -> None: ...


async def test_a_rule_asks_for_what_the_broker_has() -> None:
    hub = Hub(PlainBroker())
    with pytest.raises(ValueError, match="'a': PlainBroker keeps no history"):
        hub.channel("a", history=1)
    with pytest.raises(ValueError, match="'a': PlainBroker can't tell who is in a channel"):
        hub.channel("a", presence=True)
    async with hub:
        with pytest.raises(ValueError, match="can't tell who is in a channel"):
            await hub.presence("a")


# Presence


async def test_it_is_known_who_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.presence.GRACE", 0.01)
    monkeypatch.setattr("asgi_ws.presence.LATER", 0.01)
    hub = Hub()
    hub.channel("{room}", presence=True)
    app = Starlette()
    app.add_middleware(WebSocketMiddleware, hub=hub)

    @hub.websocket("/{user}")
    async def visit(conn: Connection, user: str) -> None:
        conn.user = user
        await conn.subscribe("room", info={"from": user})
        await conn.send(conn.id)
        async for _ in conn:
            pass

    async with hub, hub.presence_events("room") as events:
        async with connect(app, "/ann") as client:
            id_ = await client.receive()
            assert await hub.presence("room") == [Member(id_, "ann", {"from": "ann"})]
            assert await hub.presence_stats("room") == PresenceStats(1, 1)
        found = [(await anext(events)).data for _ in range(2)]
        assert [(event["type"], event["user"]) for event in found] == [("join", "ann"), ("leave", "ann")]
        assert await hub.presence("room") == []


async def test_presence_is_asked_for_where_a_rule_says_so() -> None:
    hub = Hub()
    hub.channel("a", presence=True)
    async with hub:
        assert await hub.presence("a") == []
        for ask in (hub.presence, hub.presence_stats):
            with pytest.raises(ValueError, match="'b' has no presence"):
                await ask("b")
        with pytest.raises(ValueError, match="'b' has no presence"):
            hub.presence_events("b")


# Several hubs


def make_visits(hub: Hub) -> Starlette:
    app = Starlette()
    app.add_middleware(WebSocketMiddleware, hub=hub)

    @hub.websocket("/{user}")
    async def visit(conn: Connection, user: str) -> None:
        conn.user = user
        await conn.send(conn.id)
        async for _ in conn:
            pass

    return app


async def test_connections_are_ended_wherever_they_are() -> None:
    bus = Bus()
    one, two = Hub(BusBroker(bus)), Hub(BusBroker(bus))
    here, there = make_visits(one), make_visits(two)
    async with (
        one,
        two,
        connect(here, "/ann") as ann,
        connect(there, "/ann") as again,
        connect(there, "/bob") as bob,
    ):
        await ann.receive(), await again.receive()
        id_ = await bob.receive()
        await one.disconnect(user="ann", code=4001, reason="long " * 50)
        for client in (ann, again):
            with pytest.raises(ConnectionClosed) as closed:
                await client.receive()
            assert closed.value.code == 4001
            assert closed.value.reason.startswith("long long")
        await one.disconnect(connection=id_)
        with pytest.raises(ConnectionClosed) as closed:
            await bob.receive()
        assert (closed.value.code, closed.value.reason) == (1008, "disconnected")


async def test_connections_of_this_process_alone_are_ended_too(hub: Hub) -> None:
    app = make_visits(hub)
    async with hub, connect(app, "/7") as client:
        await client.receive()
        await hub.disconnect(user=8)
        await hub.disconnect(user=7)
        with pytest.raises(ConnectionClosed):
            await client.receive()


async def test_somebody_has_to_be_named_to_be_disconnected(hub: Hub) -> None:
    async with hub:
        with pytest.raises(TypeError, match="either a user or a connection"):
            await hub.disconnect()
        with pytest.raises(TypeError, match="either a user or a connection"):
            await hub.disconnect(user="ann", connection="1")
        with pytest.raises(ValueError, match="can't have the code 1006"):
            await hub.disconnect(user="ann", code=1006)


async def test_a_hub_waits_for_its_broker_if_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.hub._RETRY", 0.01)
    bus = Bus()
    bus.fails = True
    with pytest.raises(BrokerError, match="no answer"):
        async with Hub(BusBroker(bus)):
            raise AssertionError("not started")
    hub = Hub(BusBroker(bus), wait=True)
    starting = asyncio.create_task(hub.__aenter__())
    await asyncio.sleep(0.03)
    assert not starting.done()
    bus.fails = False
    async with asyncio.timeout(2):
        await starting
    await hub.__aexit__()
