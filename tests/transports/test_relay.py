import asyncio
from collections import defaultdict
from typing import Any

import pytest

from asgi_ws.exceptions import BrokerError
from asgi_ws.messages import Publication
from asgi_ws.payloads import Payload
from asgi_ws.transports import OwnerGone, Relay
from asgi_ws.transports import relay as relay_module

pytestmark = pytest.mark.anyio


class Bus:
    """Joins relays as a broker does: in order, and not at once."""

    def __init__(self) -> None:
        self.subscribers: defaultdict[str, list[Any]] = defaultdict(list)
        self.passed = 0
        self.broken = False

    async def publish(self, channel: str, payload: Payload) -> None:
        await asyncio.sleep(0)
        if self.broken:
            raise BrokerError("no answer")
        self.passed += 1
        for subscriber in self.subscribers[channel]:
            subscriber.push(Publication(channel, payload))

    async def subscribe(self, channel: str, subscriber: Any) -> None:
        self.subscribers[channel].append(subscriber)


@pytest.fixture
async def bus() -> Bus:
    return Bus()


@pytest.fixture
async def two(bus: Bus) -> Any:
    relays = Relay(bus), Relay(bus)
    for each in relays:
        await each.start()
    yield relays
    for each in relays:
        await each.stop()


SCOPE = {
    "type": "http",
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": "/chat/",
    "raw_path": b"/chat/",
    "root_path": "",
    "query_string": b"sid=1",
    "headers": [(b"host", b"example.org")],
    "client": ("127.0.0.1", 1234),
    "server": ("127.0.0.1", 80),
    "user": "ann",
    "app": object(),
}


class Client:
    """The end of an exchange where the client is."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for message in messages:
            self.messages.put_nowait(message)
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        return await self.messages.get()

    async def send(self, message: Any) -> None:
        self.sent.append(message)


async def answer(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": [[b"x", scope["query_string"]]]})
    await send({"type": "http.response.body", "body": body + scope["user"].encode(), "more_body": False})


async def test_a_request_is_answered_by_the_process_that_has_the_session(two: tuple[Relay, Relay]) -> None:
    here, there = two
    sid = there.new_id()
    there.own(sid, answer)
    assert here.is_elsewhere(sid, SCOPE)
    client = Client(*({"type": "http.request", "body": b"%d," % n, "more_body": n < 99} for n in range(100)))
    async with asyncio.timeout(5):
        await here.carry(sid, SCOPE, client.receive, client.send)
    assert [message["type"] for message in client.sent] == ["http.response.start", "http.response.body"]
    assert client.sent[1]["body"] == b"".join(b"%d," % n for n in range(100)) + b"ann"
    assert not here._exchanges
    there.disown(sid)
    with pytest.raises(OwnerGone):
        await here.carry(sid, SCOPE, client.receive, client.send)


async def test_a_websocket_is_carried_both_ways_in_order(two: tuple[Relay, Relay]) -> None:
    here, there = two
    sid = there.new_id()
    done = asyncio.Event()

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        assert (scope["type"], scope["subprotocols"]) == ("websocket", ["chat"])
        assert "websocket.http.response" in scope["extensions"]
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})
        assert message["code"] == 1001
        done.set()

    there.own(sid, echo)
    client = Client({"type": "websocket.connect"})
    for number in range(200):
        client.messages.put_nowait({"type": "websocket.receive", "text": str(number)})
    client.messages.put_nowait({"type": "websocket.disconnect", "code": 1001})
    scope = {
        **SCOPE,
        "type": "websocket",
        "subprotocols": ["chat"],
        "extensions": {"websocket.http.response": {}},
    }
    async with asyncio.timeout(5):
        await here.carry(sid, scope, client.receive, client.send)
        await done.wait()
    assert [message.get("text") for message in client.sent[1:]] == list(map(str, range(200)))


async def test_few_messages_are_on_their_way_at_a_time(two: tuple[Relay, Relay], bus: Bus) -> None:
    here, there = two
    sid = there.new_id()
    read = asyncio.Event()

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await read.wait()
        count = 0
        while (await receive())["more_body"]:
            count += 1
        await send({"type": "http.response.start", "status": 200 + count, "headers": []})

    there.own(sid, waits)
    client = Client(*({"type": "http.request", "body": b"", "more_body": n < 99} for n in range(100)))
    carrying = asyncio.create_task(here.carry(sid, SCOPE, client.receive, client.send))
    for _ in range(200):
        await asyncio.sleep(0)
    assert client.messages.qsize() >= 100 - relay_module._WINDOW - 1
    read.set()
    await asyncio.wait_for(carrying, 5)
    assert client.sent[0]["status"] == 299


async def test_what_this_process_has_or_nobody_is_not_elsewhere(two: tuple[Relay, Relay]) -> None:
    here, there = two
    assert not here.is_elsewhere(here.new_id(), SCOPE)
    assert not here.is_elsewhere("abc", SCOPE)
    assert not here.is_elsewhere("abc.", SCOPE)
    assert not here.is_elsewhere(there.new_id(), {**SCOPE, "asgi_ws.relayed": True})
    assert len({here.new_id() for _ in range(1000)}) == 1000


async def test_a_process_that_does_not_answer_is_dead_until_it_is_heard_of(
    two: tuple[Relay, Relay], bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "_ANSWER", 0.05)
    here, there = two
    sid = there.new_id()
    there.own(sid, answer)
    subscribers = bus.subscribers.pop("\x1frelay:" + there.node)
    client = Client()
    with pytest.raises(OwnerGone):
        await here.carry(sid, SCOPE, client.receive, client.send)
    assert not here.is_elsewhere(sid, SCOPE)
    bus.subscribers["\x1frelay:" + there.node] = subscribers
    other = here.new_id()
    here.own(other, answer)
    client = Client({"type": "http.request", "body": b"", "more_body": False})
    await there.carry(other, SCOPE, client.receive, client.send)
    assert here.is_elsewhere(sid, SCOPE)


async def test_both_ends_hear_of_it_when_a_process_dies(
    two: tuple[Relay, Relay], bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "_BEAT", 0.02)
    monkeypatch.setattr(relay_module, "_SILENCE", 0.2)
    here, there = two
    sid = there.new_id()
    heard: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    began = asyncio.Event()

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        began.set()
        heard.set_result(await receive())
        with pytest.raises(OSError, match="gone"):
            await send({"type": "http.response.start", "status": 200, "headers": []})

    there.own(sid, waits)
    client = Client()
    carrying = asyncio.create_task(here.carry(sid, SCOPE, client.receive, client.send))
    async with asyncio.timeout(5):
        await began.wait()
        await asyncio.sleep(0.4)
        assert not carrying.done()
        bus.subscribers.clear()
        with pytest.raises(OwnerGone):
            await carrying
        assert await heard == {"type": "http.disconnect"}


async def test_a_client_that_stops_waiting_is_told_to_the_owner(two: tuple[Relay, Relay]) -> None:
    here, there = two
    sid = there.new_id()
    began, ended = asyncio.Event(), asyncio.Event()

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        began.set()
        assert await receive() == {"type": "websocket.disconnect", "code": 1006}
        ended.set()

    there.own(sid, waits)
    client = Client()
    scope = {**SCOPE, "type": "websocket", "client": None}
    carrying = asyncio.create_task(here.carry(sid, scope, client.receive, client.send))
    async with asyncio.timeout(5):
        await began.wait()
        carrying.cancel()
        await ended.wait()


async def test_a_broker_that_fails_is_the_owners_end(two: tuple[Relay, Relay], bus: Bus) -> None:
    here, there = two
    sid = there.new_id()
    began = asyncio.Event()

    async def talks(scope: Any, receive: Any, send: Any) -> None:
        began.set()
        await receive()
        bus.broken = True
        await send({"type": "http.response.start", "status": 200, "headers": []})

    there.own(sid, talks)
    client = Client({"type": "http.request", "body": b"", "more_body": False})
    with pytest.raises(OwnerGone):
        async with asyncio.timeout(5):
            carrying = asyncio.create_task(here.carry(sid, SCOPE, client.receive, client.send))
            await began.wait()
            await carrying
    with pytest.raises(OwnerGone):
        await here.carry(sid, SCOPE, client.receive, client.send)


async def test_an_application_that_fails_is_logged_and_its_client_gets_no_answer(
    two: tuple[Relay, Relay], caplog: pytest.LogCaptureFixture
) -> None:
    here, there = two
    sid = there.new_id()

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError("a bug")

    there.own(sid, fails)
    with pytest.raises(OwnerGone):
        await here.carry(sid, SCOPE, Client().receive, Client().send)
    assert "a request from another process failed" in caplog.text


@pytest.mark.parametrize(
    "words", [b"", b"\xc1", b"\x00" * 100, b"\x93\xa1a\xa1b\x00", b"\x94\xa1a\xa1b\x00\x81\xa3sid\xa1x", b"{}"]
)
async def test_garbage_on_the_bus_is_dropped(two: tuple[Relay, Relay], bus: Bus, words: bytes) -> None:
    _here, there = two
    there.own("x", answer)
    await bus.publish("\x1frelay:" + there.node, Payload("binary", words))
    await bus.publish("\x1frelay:" + there.node, Payload("text", words.decode("latin-1")))
    await asyncio.sleep(0.01)
    assert not there._exchanges


async def test_who_listens_where_the_broker_fails_hears_that_the_client_is_gone(
    two: tuple[Relay, Relay], bus: Bus
) -> None:
    here, there = two
    sid = there.new_id()
    heard: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def listens(scope: Any, receive: Any, send: Any) -> None:
        assert "user" not in scope
        await asyncio.sleep(0.01)
        bus.broken = True
        heard.set_result(await receive())

    there.own(sid, listens)
    client = Client({"type": "http.request", "body": b"", "more_body": True})
    carrying = asyncio.create_task(here.carry(sid, {**SCOPE, "user": None}, client.receive, client.send))
    assert await asyncio.wait_for(heard, 5) == {"type": "http.disconnect"}
    carrying.cancel()
    await asyncio.wait([carrying])


async def test_what_is_under_way_ends_when_a_process_stops(bus: Bus) -> None:
    here, there = Relay(bus), Relay(bus)
    await here.start()
    await there.start()
    sid = there.new_id()
    began = asyncio.Event()

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        began.set()
        while (await receive())["type"] != "http.disconnect":
            pass

    there.own(sid, waits)
    carrying = asyncio.create_task(here.carry(sid, SCOPE, Client().receive, Client().send))
    await asyncio.wait_for(began.wait(), 5)
    await there.stop()
    with pytest.raises(OwnerGone):
        await asyncio.wait_for(carrying, 5)
    await here.stop()


async def test_few_of_the_dead_are_remembered(two: tuple[Relay, Relay], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "_ANSWER", 0.01)
    monkeypatch.setattr(relay_module, "_REMEMBERED", 2)
    here, _ = two
    for number in range(4):
        with pytest.raises(OwnerGone):
            await here.carry(f"x.{number}", SCOPE, Client().receive, Client().send)
    assert [here.is_elsewhere(f"x.{number}", SCOPE) for number in range(4)] == [True, True, False, False]


async def test_what_is_no_request_is_refused(two: tuple[Relay, Relay]) -> None:
    here, there = two
    sid = there.new_id()
    there.own(sid, answer)
    with pytest.raises(OwnerGone):
        await here.carry(sid, {**SCOPE, "type": "lifespan"}, Client().receive, Client().send)


async def test_what_concerns_others_leaves_an_exchange_as_it_is(two: tuple[Relay, Relay], bus: Bus) -> None:
    here, there = two
    sid = there.new_id()
    began = asyncio.Event()

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        began.set()
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    there.own(sid, waits)
    client = Client()
    carrying = asyncio.create_task(here.carry(sid, SCOPE, client.receive, client.send))
    await asyncio.wait_for(began.wait(), 5)
    here._bury("somebody else")
    (name,) = there._exchanges
    unknown = relay_module._encoder.encode(relay_module._Words(here.node, name, 99))
    await bus.publish("\x1frelay:" + there.node, Payload("binary", unknown))
    client.messages.put_nowait({"type": "http.request", "body": b"", "more_body": False})
    await asyncio.wait_for(carrying, 5)
    assert client.sent[0]["status"] == 200
