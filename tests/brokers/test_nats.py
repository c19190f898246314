"""What only the NATS broker has: its names on the bus, its URLs, its servers, and what happens to them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.aio.msg import Msg

from asgi_ws import Hub
from asgi_ws.brokers import broker_for
from asgi_ws.brokers import nats as module
from asgi_ws.brokers import nats_link as link_module
from asgi_ws.brokers.nats import NatsBroker
from asgi_ws.brokers.nats_link import token
from asgi_ws.exceptions import BrokerError
from asgi_ws.messages import Position, Publication, Retention
from asgi_ws.payloads import encode
from tests.services_nats import NatsServer, nats_server

pytestmark = pytest.mark.anyio

KEPT = Retention(100, 60)
TIMEOUT = 10


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    """One that is left running."""
    with nats_server() as running:
        yield running


class Process(NatsBroker):
    """A broker that is started, with what it has delivered and how often its link was lost."""

    def __init__(self, url: str, **options: str | int) -> None:
        super().__init__(url, **options)  # type: ignore[arg-type]
        self.delivered: list[Publication] = []
        self.lost = 0
        self._news = asyncio.Event()

    def on_delivery(self, publication: Publication) -> None:
        self.delivered.append(publication)
        self._news.set()

    def on_lost(self) -> None:
        self.lost += 1
        self._news.set()

    async def until(self, count: int) -> list[object]:
        """Wait for so many publications; their data."""
        async with asyncio.timeout(TIMEOUT):
            while len(self.delivered) < count:
                self._news.clear()
                await self._news.wait()
        return [publication.data for publication in self.delivered]

    async def until_lost(self, count: int = 1) -> None:
        """Wait until the link has been lost, and found again, so many times."""
        async with asyncio.timeout(TIMEOUT):
            while self.lost < count:
                self._news.clear()
                await self._news.wait()

    @property
    def offsets(self) -> list[int]:
        return [publication.position.offset for publication in self.delivered if publication.position is not None]


@contextlib.asynccontextmanager
async def running(url: str, **options: str | int) -> AsyncIterator[Process]:
    process = Process(url, **options)
    await process.start(process.on_delivery, process.on_lost)
    try:
        yield process
    finally:
        await process.stop()


async def publish_until_it_works(broker: NatsBroker, channel: str, data: object) -> Position | None:
    async with asyncio.timeout(2 * TIMEOUT):
        while True:
            with contextlib.suppress(BrokerError):
                return await broker.publish(channel, encode(data), retention=KEPT)
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def bus(server: NatsServer) -> AsyncIterator[Client]:
    """Somebody else on the same server."""
    client = Client()
    await client.connect(server.url)
    try:
        yield client
    finally:
        await client.close()


# Names


@given(st.text(st.characters(), max_size=300), st.text(st.characters(), max_size=300))
def test_names_on_the_bus_differ_as_the_channels_do(one: str, other: str) -> None:
    assert (token(one) == token(other)) == (one == other)


@given(st.text(st.characters()))
def test_names_on_the_bus_have_no_character_with_a_meaning(channel: str) -> None:
    name = token(channel)
    assert name.isascii()
    assert name.isprintable()
    assert name
    assert set(name).isdisjoint(" .*>")


@given(st.text(st.characters(), min_size=1))
def test_names_on_the_bus_say_which_channel_it_is(channel: str) -> None:
    first, *rest = token(channel).split("=")
    data = first.encode() + b"".join(bytes([int(part[:2], 16)]) + part[2:].encode() for part in rest)
    assert data.decode("utf-8", "surrogatepass") == channel


def test_names_on_the_bus_have_a_length_that_nats_takes() -> None:
    names = {token("🎈" * 255), token("🎈" * 254), token("." * 10_000), token("." * 10_001), token("")}
    assert len(names) == 5
    assert max(map(len, names)) <= 1500


# URLs


@pytest.mark.parametrize(
    ("url", "servers"),
    [
        ("nats://host", ("nats://host:4222",)),
        ("nats://host/", ("nats://host:4222",)),
        ("nats://host:1234", ("nats://host:1234",)),
        ("tls://one,two:1,[::1]:2", ("tls://one:4222", "tls://two:1", "tls://[::1]:2")),
        ("nats://us%40er:p%3Aw@host:?prefix=chat&replicas=3", ("nats://host:4222",)),
    ],
)
def test_a_url_says_where_the_servers_are(url: str, servers: tuple[str, ...]) -> None:
    broker = broker_for(url)
    assert isinstance(broker, NatsBroker)
    assert broker._address.servers == servers


@pytest.mark.parametrize(
    "url",
    [
        "nats://",
        "nats:///",
        "nats://host:port",
        "nats://host:99999",
        "nats://one,,two",
        "nats://host/path",
        "nats://ho st",
        "nats://host?prefix=a.b",
        "nats://host?prefix=",
        "nats://host?prefix=*",
        "nats://host?replicas=0",
        "nats://host?replicas=many",
        "nats://host?colour=red",
        "nats://host?prefix",
        "tls://user:secret@[::1",
        "redis://host",
    ],
)
def test_a_url_that_can_not_be_read_is_a_mistake(url: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        NatsBroker(url)
    assert "secret" not in str(error.value)


def test_without_nats_py_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "asgi_ws.brokers.nats", None)
    with pytest.raises(ImportError, match=r"pip install 'asgi-ws-hub\[nats\]'"):
        broker_for("nats://host")


# Starting


async def test_a_server_that_is_not_there_is_told_at_start() -> None:
    with nats_server() as server:
        server.stop()
        with pytest.raises(BrokerError, match=r"no NATS server answers at nats://127.0.0.1:\d+: .*Connect call failed"):
            async with running(server.url):
                raise AssertionError


async def test_a_server_that_does_not_answer_is_told_at_start() -> None:
    with nats_server() as server:
        server.pause()
        before = time.monotonic()
        with pytest.raises(BrokerError, match="no NATS server answers at"):
            async with running(server.url):
                raise AssertionError
        assert time.monotonic() - before < 5


async def test_a_server_that_is_not_encrypted_is_refused_when_tls_was_asked_for(server: NatsServer) -> None:
    with pytest.raises(BrokerError, match="doesn't speak TLS"):
        async with running(server.url.replace("nats://", "tls://")):
            raise AssertionError


async def test_any_of_several_servers_will_do(server: NatsServer) -> None:
    for _ in range(4):
        async with running(f"nats://127.0.0.1:1,127.0.0.1:{server.port}") as broker:
            await broker.publish("a", encode("x"))


@pytest.mark.parametrize("let_in", ["ann:s%40cret@", "token:"])
async def test_credentials_are_those_of_the_url(let_in: str) -> None:
    options = ["--auth", "t.k:n"] if let_in == "token:" else ["--user", "ann", "--pass", "s@cret"]
    with nats_server(*options) as server:
        right = "t.k%3An@" if let_in == "token:" else let_in
        async with running(server.url.replace("//", f"//{right}")) as broker:
            await broker.publish("a", encode("x"))
        for wrong in ("ann:wrong@", "wrong@", ""):
            with pytest.raises(BrokerError, match="doesn't accept these credentials") as error:
                async with running(server.url.replace("//", f"//{wrong}")):
                    raise AssertionError
            assert "wrong" not in str(error.value)


async def test_jetstream_is_asked_for_by_those_who_need_it() -> None:
    with nats_server(jetstream=False) as server:
        async with running(server.url) as broker:
            await broker.subscribe("a")
            assert await broker.publish("a", encode("x")) is None
            assert await broker.until(1) == ["x"]
            for attempt in (
                lambda: broker.publish("a", encode("x"), retention=KEPT),
                lambda: broker.history("a", since=None, limit=None),
                lambda: broker.members("a"),
                lambda: broker.remember("a", "x"),
            ):
                with pytest.raises(BrokerError, match="JetStream, which isn't enabled on this NATS server"):
                    await attempt()
            assert await broker.recall("a") is None


async def test_a_hub_that_keeps_nothing_needs_no_jetstream() -> None:
    with nats_server(jetstream=False) as server:
        async with Hub(server.url) as hub, hub.subscribe("a") as publications:
            await hub.publish("a", {"x": 1})
            assert (await anext(publications)).data == {"x": 1}
        hub = Hub(server.url)
        hub.channel("b", history=10)
        with pytest.raises(BrokerError, match="JetStream"):
            async with hub:
                raise AssertionError


async def test_more_replicas_than_servers_are_refused(server: NatsServer) -> None:
    async with running(server.url, prefix="three", replicas=3) as broker:
        with pytest.raises(BrokerError, match=r"NATS refused STREAM: .*replicas"):
            await broker.history("a", since=None, limit=None)
        with pytest.raises(BrokerError, match=r"NATS refused STREAM: .*replicas"):
            await broker.publish("a", encode("x"), retention=KEPT)


# The bus


async def test_hubs_with_different_prefixes_do_not_meet(server: NatsServer) -> None:
    async with running(server.url, prefix="one") as one, running(f"{server.url}?prefix=other") as other:
        for broker in (one, other):
            await broker.subscribe("a")
        for broker in (one, other):
            for retention in (None, KEPT):
                await broker.publish("a", encode(broker._prefix), retention=retention)
            await broker.enter("a", broker._prefix, "key", "value", expiry=60)
            await broker.remember("name", broker._prefix)
        assert await one.until(2) == ["one", "one"]
        assert await other.until(2) == ["other", "other"]
        assert list(await one.members("a")) == [await one.recall("name")] == ["one"]


async def test_those_who_wait_together_share_a_confirmation(server: NatsServer) -> None:
    async with running(server.url, prefix="shared") as broker:
        await broker.subscribe("a")
        waiting = []
        for number in range(10):
            waiting.append(asyncio.create_task(broker.publish("a", encode(number))))
            await asyncio.sleep(0)
        await asyncio.gather(*waiting)
        assert await broker.until(10) == list(range(10))


async def test_what_can_not_be_read_is_counted_and_dropped(server: NatsServer) -> None:
    record = module._Record("text", b"x", None, 0, "", 0, 0)
    garbage = [
        b"",
        b"\x01",
        b"\x02" + msgspec.msgpack.encode(record),
        b"\x01\xff",
        b"\x01" + msgspec.msgpack.encode([1, 2, 3]),
        b"\x01" + msgspec.msgpack.encode(["picture", b"x", None, 0, "", 0, 0]),
        b"\x01" + msgspec.msgpack.encode(["text", b"\xff", None, 0, "", 0, 0]),
    ]
    async with running(server.url, prefix="garbage") as broker, bus(server) as other:
        await broker.subscribe("a")
        for data in garbage:
            await other.publish("garbage.c.a", data)
        await other.publish("garbage.c.a", b"\x01" + msgspec.msgpack.encode(record), headers={"Nats-Sequence": "no"})
        assert await broker.until(1) == ["x"]
        assert broker.ignored == len(garbage)


async def test_a_history_with_garbage_starts_again(server: NatsServer) -> None:
    async with running(server.url, prefix="rubbish") as broker, bus(server) as other:
        first = await broker.publish("a", encode("1"), retention=KEPT)
        await other.request("rubbish.h.a", b"garbage", timeout=5)
        second = await broker.publish("a", encode("2"), retention=KEPT)
        assert first is not None
        assert second is not None
        assert second.epoch != first.epoch
        history = await broker.history("a", since=None, limit=None)
        assert [publication.data for publication in history.publications] == ["2"]
        await other.request("rubbish.h.a", b"garbage", timeout=5)
        assert (await broker.history("a", since=None, limit=None)).publications == ()
        await broker.remember("name", "x")
        await other.request("rubbish.v.name", b"\x01\xff", timeout=5)
        assert await broker.recall("name") is None
        await other.request("rubbish.v.name", b"garbage", timeout=5)
        assert await broker.take("name") is None
        await broker.enter("a", "c1", "ann", "x", expiry=60)
        await other.request("rubbish.p.a.x", b"garbage", timeout=5)
        assert await broker.members("a") == {"c1": "x"}
        assert broker.ignored


async def test_what_is_not_permitted_is_not_reported_as_done() -> None:
    with nats_server() as server:
        server.stop()
        config = server.directory / "config"
        config.write_text(
            'authorization { users: [ { user: ann, password: x, permissions: { publish: ["_INBOX.>", "asgi_ws.c.ok"], '
            'subscribe: ["_INBOX.>", "asgi_ws.c.ok"] } } ] }'
        )
        server._options += ["-c", str(config)]
        server.start()
        async with running(server.url.replace("//", "//ann:x@")) as broker:
            await broker.subscribe("ok")
            await broker.publish("ok", encode("x"))
            with pytest.raises(BrokerError, match="NATS doesn't permit it"):
                await broker.publish("other", encode("x"))
            with pytest.raises(BrokerError, match="NATS doesn't permit it"):
                await broker.subscribe("other")
            await broker.publish("ok", encode("y"))
            assert await broker.until(2) == ["x", "y"]


async def test_what_is_larger_than_the_server_takes_is_refused(server: NatsServer) -> None:
    async with running(server.url) as broker:
        for retention in (None, KEPT):
            with pytest.raises(BrokerError, match="more than the NATS server takes: its max_payload is 1048576"):
                await broker.publish("a", encode("x" * 1024 * 1024), retention=retention)
            await broker.publish("a", encode("x" * 1000 * 1024), retention=retention)


async def test_a_process_that_reads_too_slowly_is_told_to_look(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "_MAX_UNREAD", 10_000)
    async with running(server.url, prefix="slow") as broker:
        await broker.subscribe("a")
        await broker.publish("a", encode("x" * 20_000))
        await broker.until_lost()
        await broker.publish("a", encode("y"))
        assert await broker.until(1) == ["y"]


async def test_an_account_without_jetstream_is_told_so() -> None:
    with nats_server() as server:
        server.stop()
        config = server.directory / "config"
        config.write_text("accounts { A: { users: [ { user: ann, password: x } ] } }")
        server._options += ["-c", str(config)]
        server.start()
        async with running(server.url.replace("//", "//ann:x@")) as broker:
            with pytest.raises(BrokerError, match="JetStream, which isn't enabled"):
                await broker.history("a", since=None, limit=None)


async def test_what_the_server_refuses_is_told(server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(server.url, prefix="refused") as broker, bus(server) as other:
        await broker.publish("a", encode("1"), retention=KEPT)
        config = (await other.jetstream().stream_info("refused_history")).config
        await other.jetstream().update_stream(config.evolve(max_msg_size=200))
        with pytest.raises(BrokerError, match="NATS refused to store it: message size exceeds maximum"):
            await broker.publish("a", encode("x" * 300), retention=KEPT)
        link = broker._link
        assert link is not None
        with pytest.raises(BrokerError, match="NATS refused STREAM"):
            await link.last(broker._history_stream, "")
        for bad in (link.send("a b", b""), link.subscribe("x", "a b", Ignored())):
            with pytest.raises(BrokerError, match="NATS: "):
                await bad

        async def answer(msg: Msg) -> None:
            await msg.respond(b"garbage")

        await other.subscribe("garbage", cb=answer)
        await other.request("garbage", timeout=5)  # goes behind the subscription, which nats-py's flush does not
        with pytest.raises(BrokerError, match="an answer that can't be read"):
            await link._request("garbage", b"")
        monkeypatch.setattr(link_module, "_MAX_UNSENT", -1)
        with pytest.raises(BrokerError, match="too much waits to be sent"):
            await broker.publish("a", encode("x"))


class Ignored:
    """A handler of messages."""

    async def __call__(self, msg: Msg) -> None:
        raise AssertionError


async def test_a_link_that_was_lost_does_nothing_more(server: NatsServer) -> None:
    async with running(server.url, prefix="lost") as broker:
        link = broker._link
        assert link is not None
        await link.unsubscribe("nobody")
        reading = asyncio.create_task(link._read_batches({"name": "x"}, "x", 1))
        await asyncio.sleep(0)
        await link.close()
        attempts = [reading, link.send("a", b""), link.confirm(), link.subscribe("a", "a", Ignored())]
        for attempt in attempts:
            with pytest.raises(BrokerError, match="the link to the NATS server is lost"):
                await attempt
        await broker.until_lost()
        await broker.stop()
        broker._lose()
        broker._take("a", Msg(link._client, data=b"\x01" + msgspec.msgpack.encode(module._marker(_HEAD))))
        assert broker.lost == 1


_HEAD = module._Head(1, 0, "e")


async def test_a_link_that_is_lost_again_and_again_ends_in_an_error(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ATTEMPTS", 0)
    async with running(server.url) as broker:
        with pytest.raises(BrokerError, match="lost again and again"):
            await broker.subscribe("a")


# What is kept


async def test_a_server_that_is_behind_is_asked_again(server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def behind(*arguments: object) -> list[object]:
        return []

    async with running(server.url, prefix="behind") as broker:
        await broker.publish("a", encode("1"), retention=KEPT)
        monkeypatch.setattr(link_module.Link, "_read_batches", behind)
        assert len((await broker.history("a", since=None, limit=None)).publications) == 1
        monkeypatch.setattr(link_module.Link, "_read_by_consumer", behind)
        with pytest.raises(BrokerError, match="didn't give all that it has stored"):
            await broker.history("a", since=None, limit=None)


async def test_a_consumer_does_not_wait_for_what_was_deleted(server: NatsServer) -> None:
    async with running(server.url, prefix="purged") as broker:
        await broker.publish("a", encode("1"), retention=KEPT)
        assert broker._link is not None
        read = await broker._link._read_by_consumer(broker._history_stream, "purged.h.a", 99)
        assert [stored.sequence for stored in read] == [1]


async def test_publishers_of_many_processes_count_together(server: NatsServer) -> None:
    async with running(server.url, prefix="many") as one, running(server.url, prefix="many") as other:
        await one.subscribe("a")
        await other.subscribe("a")

        async def publish(broker: NatsBroker, name: int) -> list[Position | None]:
            return [await broker.publish("a", encode([name, number]), retention=KEPT) for number in range(25)]

        returned = await asyncio.gather(*(publish(broker, name) for name in range(4) for broker in (one, other)))
        await one.until(200)
        await other.until(200)
        history = await one.history("a", since=None, limit=None)
    assert one.offsets == other.offsets == list(range(1, 201))
    assert one.delivered == other.delivered
    assert sorted(position.offset for each in returned for position in each if position) == one.offsets
    assert list(history.publications) == one.delivered[-100:]
    assert history.position == one.delivered[-1].position


async def test_a_history_ends_its_time_after_the_last_publication_and_the_count_goes_on(server: NatsServer) -> None:
    brief = Retention(10, 0.4)
    async with running(server.url, prefix="brief") as broker, bus(server) as other:
        await broker.subscribe("a")
        for number in (1, 2):
            await broker.publish("a", encode(number), retention=brief)
            await asyncio.sleep(0.25)
        history = await broker.history("a", since=None, limit=None)
        assert [publication.data for publication in history.publications] == [1, 2]
        await asyncio.sleep(0.25)
        assert await broker.history("a", since=None, limit=None) == type(history)((), history.position)
        third = await broker.publish("a", encode(3), retention=brief)
        assert third == Position(3, history.position.epoch)
        after = await broker.history("a", since=None, limit=None)
        assert [publication.data for publication in after.publications] == [3]
        # What has ended is deleted, too, but for the position.
        async with asyncio.timeout(TIMEOUT):
            while broker._tidying._expiring:
                await asyncio.sleep(0.05)
            while (await other.jetstream().stream_info("brief_history")).state.messages > 1:
                await asyncio.sleep(0.05)
        assert await broker.history("a", since=None, limit=None) == type(history)((), third)
        assert await broker.publish("a", encode(4), retention=brief) == Position(4, history.position.epoch)
        assert await broker.until(4) == [1, 2, 3, 4]


async def test_no_more_is_stored_than_twice_what_is_kept(server: NatsServer) -> None:
    async with running(server.url, prefix="full") as broker, bus(server) as other:
        for number in range(1, 101):
            await broker.publish("a", encode(number), retention=Retention(20, 60))
        async with asyncio.timeout(TIMEOUT):
            while (await other.jetstream().stream_info("full_history")).state.messages > 20:
                await asyncio.sleep(0.05)
        history = await broker.history("a", since=None, limit=None)
        assert [publication.data for publication in history.publications] == list(range(81, 101))


async def test_who_goes_on_keeps_what_another_would_have_ended(server: NatsServer) -> None:
    async with running(server.url, prefix="two") as one, running(server.url, prefix="two") as other:
        await one.publish("a", encode(1), retention=Retention(10, 0.1))
        await other.publish("a", encode(2), retention=KEPT)
        async with asyncio.timeout(TIMEOUT):
            while one._tidying._expiring:
                await asyncio.sleep(0.05)
        assert len((await one.history("a", since=None, limit=None)).publications) == 2


async def test_only_so_many_channels_are_remembered(server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_HEADS", 2)
    monkeypatch.setattr(module, "_MAX_EXPIRING", 2)
    async with running(server.url, prefix="bound") as broker:
        for offset in (1, 2):
            for channel in "abc":
                position = await broker.publish(channel, encode("x"), retention=KEPT)
                assert position is not None
                assert position.offset == offset
            await broker.remember(str(offset), "x", ttl=60)
            await broker.remember(str(-offset), "x", ttl=60)
        assert len(broker._heads._heads) == len(broker._tidying._expiring) == len(broker._tidying._words) == 2


async def test_a_stream_that_was_deleted_is_a_new_epoch(server: NatsServer) -> None:
    async with running(server.url, prefix="deleted") as broker, bus(server) as other:
        first = await broker.publish("a", encode("1"), retention=KEPT)
        await broker.remember("name", "1")
        for stream in ("history", "values"):
            await other.jetstream().delete_stream(f"deleted_{stream}")
        second = await broker.publish("a", encode("2"), retention=KEPT)
        assert first is not None
        assert second == Position(1, second.epoch if second else "")
        assert second.epoch != first.epoch
        await broker.remember("name", "2")
        assert await broker.recall("name") == "2"
        await other.jetstream().delete_stream("deleted_history")
        history = await broker.history("a", since=first, limit=None)
        assert history.position.offset == 0
        assert history.position.epoch not in (first.epoch, second.epoch)


async def test_settings_of_a_stream_are_changed_by_who_comes_with_others(server: NatsServer) -> None:
    async with running(server.url, prefix="changed") as broker, bus(server) as other:
        await broker.publish("a", encode("1"), retention=KEPT)
        config = (await other.jetstream().stream_info("changed_history")).config
        await other.jetstream().update_stream(config.evolve(max_age=1000))
    async with running(server.url, prefix="changed") as broker, bus(server) as other:
        assert (await broker.history("a", since=None, limit=None)).position.offset == 1
        assert (await other.jetstream().stream_info("changed_history")).config.max_age == 30 * 24 * 3600


async def test_servers_that_give_no_batches_are_read_by_consumers(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "_BATCHES", (99, 0))
    async with running(server.url, prefix="consumer") as broker:
        for number in range(50):
            await broker.publish("a", encode(number), retention=KEPT)
        history = await broker.history("a", since=None, limit=20)
        assert [publication.data for publication in history.publications] == list(range(30, 50))
        assert history.publications[-1].position == history.position
        assert await broker.members("a") == {}


async def test_a_long_history_is_read_in_batches(server: NatsServer) -> None:
    async with running(server.url, prefix="long") as broker:
        many = Retention(2500, 60)
        await asyncio.gather(*(broker.publish("a", encode(number), retention=many) for number in range(2500)))
        history = await broker.history("a", since=None, limit=None)
        offsets = [publication.position.offset for publication in history.publications if publication.position]
        assert offsets == list(range(1, 2501))


async def test_a_name_as_long_as_any_can_have_all_of_it(server: NatsServer) -> None:
    channel = "🎈" * 255
    async with running(server.url) as broker:
        await broker.subscribe(channel)
        await broker.publish(channel, encode("1"))
        await broker.publish(channel, encode("2"), retention=KEPT)
        assert await broker.until(2) == ["1", "2"]
        assert len((await broker.history(channel, since=None, limit=None)).publications) == 1
        assert await broker.enter(channel, channel, channel, "x", expiry=60)
        assert await broker.members(channel) == {channel: "x"}


async def test_other_processes_can_leave_for_one(server: NatsServer) -> None:
    async with running(server.url, prefix="leave") as one, running(server.url, prefix="leave") as other:
        assert await one.enter("a", "c1", "ann", "x", expiry=60)
        await other.leave("a", "c1", grace=0)
        await other.leave("a", "c2", grace=0)
        assert await one.members("a") == {}
        assert await asyncio.gather(one.settle("a", "ann"), other.settle("a", "ann")) in ([True, False], [False, True])


async def test_many_members_are_counted_refreshed_and_forgotten(server: NatsServer) -> None:
    async with running(server.url, prefix="crowd") as one, running(server.url, prefix="crowd") as other:
        names = [f"c{number}" for number in range(300)]
        keys = {name[:3] for name in names}
        new = await asyncio.gather(*(one.enter("a", name, name[:3], "x", expiry=60) for name in names))
        assert sum(new) == len(keys)
        assert await other.count("a") == (300, len(keys))
        assert list(await other.members("a")) == names
        assert await one.refresh("a", {name: (name[:3], "y") for name in names[10:]}, expiry=0.05) == []
        assert (await other.members("a"))["c9"] == "x"
        async with asyncio.timeout(TIMEOUT):
            while await other.count("a") != (10, 10):
                await asyncio.sleep(0.01)
        gone = await asyncio.gather(one.refresh("a", {}, expiry=60), other.refresh("a", {}, expiry=60))
        assert sorted(gone[0] + gone[1]) == sorted(keys - set(names[:10]))
        assert await one.enter("a", "c11", "c11", "x", expiry=0.05), "they have been told"
        async with asyncio.timeout(TIMEOUT):
            while await other.count("a") != (10, 10):
                await asyncio.sleep(0.01)
        await one.leave("a", "c11", grace=0)
        assert not await other.enter("a", "c11", "c11", "x", expiry=0.05), "nobody has been told"
        async with asyncio.timeout(TIMEOUT):
            while await other.refresh("a", {}, expiry=60) != ["c11"]:
                await asyncio.sleep(0.01)
        assert await one.refresh("a", {}, expiry=60) == []
        assert await other.count("a") == (10, 10)


async def test_presence_that_can_not_be_written_is_told(server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(server.url, prefix="unwritten") as broker:
        await broker.enter("a", "c1", "ann", "x", expiry=60)
        await broker.leave("a", "c1", grace=0)
        monkeypatch.setattr(module, "TIMEOUT", 0)
        with pytest.raises(BrokerError, match="presence could not be changed within 0 seconds"):
            await broker.enter("a", "c2", "bob", "x", expiry=60)
        with pytest.raises(BrokerError, match="presence could not be changed"):
            await broker.refresh("a", {"c2": ("bob", "x")}, expiry=60)
        assert await broker.refresh("a", {}, expiry=60) == [], "nobody is told what may not have happened"


async def test_what_was_remembered_for_a_time_or_taken_is_deleted(server: NatsServer) -> None:
    async with running(server.url, prefix="words") as broker, bus(server) as other:
        await broker.remember("for ever", "1")
        await broker.remember("a moment", "2", ttl=0.01)
        await broker.remember("taken", "3", ttl=60)
        assert await broker.take("taken") == "3"
        async with asyncio.timeout(TIMEOUT):
            while (await other.jetstream().stream_info("words_values")).state.messages > 1:
                await asyncio.sleep(0.05)
        assert await broker.recall("for ever") == "1"


async def test_what_can_not_be_taken_in_time_is_told(server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(server.url, prefix="taken") as broker:
        await broker.remember("name", "x")
        monkeypatch.setattr(module, "TIMEOUT", 0)
        with pytest.raises(BrokerError, match="could not be taken within 0 seconds"):
            await broker.take("name")


# Order


def publications(*offsets: int, epoch: str = "e") -> list[Publication]:
    return [Publication("a", encode(str(offset)), Position(offset, epoch)) for offset in offsets]


@pytest.mark.parametrize(
    ("last", "came", "delivered"),
    [
        (None, (1, 2, 3), [1, 2, 3]),
        (None, (2, 1, 3), [1, 2, 3]),
        (Position(4, "e"), (7, 6, 5, 8), [5, 6, 7, 8]),
        (Position(0, "e"), (2, 1), [1, 2]),
        (Position(4, "e"), (5, 5, 3, 6), [5, 6]),
        (Position(4, "other"), (2, 3), [2, 3]),
        (Position(4, "e"), (5, 7, 8), [5]),
    ],
)
async def test_what_comes_too_early_waits(last: Position | None, came: tuple[int, ...], delivered: list[int]) -> None:
    taken: list[Publication] = []
    order = module._Order(taken.append, last)
    for publication in publications(*came):
        assert publication.position is not None
        order.take(publication, publication.position)
    assert taken == publications(*delivered)
    order.stop()


async def test_what_comes_too_early_does_not_wait_for_ever() -> None:
    taken: list[Publication] = []
    order = module._Order(taken.append)
    for publication in publications(9, 7, 8):
        assert publication.position is not None
        order.take(publication, publication.position)
    assert taken == []
    async with asyncio.timeout(TIMEOUT):
        while len(taken) < 3:
            await asyncio.sleep(0.01)
    late, next_one = publications(6, 10)
    order.take(late, Position(6, "e"))
    order.take(next_one, Position(10, "e"))
    assert taken == publications(7, 8, 9, 10)


async def test_nothing_waits_in_a_channel_that_was_left(server: NatsServer) -> None:
    async with running(server.url, prefix="left") as broker:
        await broker.publish("a", encode("1"), retention=KEPT)
        await broker.subscribe("a")
        await broker.publish("a", encode("2"), retention=KEPT)
        async with asyncio.timeout(TIMEOUT):
            while not broker._orders:
                await asyncio.sleep(0)
        await broker.unsubscribe("a")
        await broker.subscribe("b")
        await broker.history("b", since=None, limit=0)
        await asyncio.sleep(2 * module._PATIENCE)
        assert broker.delivered == []
        await broker.publish("b", encode("3"), retention=KEPT)
        assert await broker.until(1) == ["3"]
        assert not broker._orders.keys() - {"b"}


# What happens to servers


async def test_what_was_acknowledged_outlives_kill_9() -> None:
    with nats_server() as server:
        async with running(server.url) as one, running(server.url) as other:
            await other.subscribe("a")
            acknowledged = []
            for turn in range(1, 4):
                for number in range(20):
                    acknowledged.append(await publish_until_it_works(one, "a", [turn, number]))
                server.kill()
                with pytest.raises(BrokerError):
                    await one.publish("a", encode("x"), retention=KEPT)
                server.start()
                started = time.monotonic()
                await one.until_lost(turn)
                await other.until_lost(turn)
                assert time.monotonic() - started < 2
            last = await publish_until_it_works(one, "a", "last")
            history = await other.history("a", since=None, limit=None)
            positions = [publication.position for publication in history.publications]
            assert last is not None
            assert history.position == positions[-1] == last
            assert len({position.epoch for position in positions if position}) == 1
            assert [position.offset for position in positions if position] == list(range(1, last.offset + 1))
            assert set(acknowledged) <= set(positions)
            async with asyncio.timeout(TIMEOUT):
                while other.offsets[-1:] != [last.offset]:
                    await asyncio.sleep(0.01)
            assert other.offsets == sorted(set(other.offsets))


async def test_when_everything_was_lost_the_epoch_is_new() -> None:
    with nats_server() as server:
        async with running(server.url) as broker:
            first = await broker.publish("a", encode("1"), retention=KEPT)
            server.kill()
            server.wipe()
            server.start()
            await broker.until_lost()
            history = await broker.history("a", since=first, limit=None)
            assert first is not None
            assert history.publications == ()
            assert history.position == Position(0, history.position.epoch)
            assert history.position.epoch != first.epoch
            assert await broker.publish("a", encode("1"), retention=KEPT) == Position(1, history.position.epoch)


async def test_a_server_that_hangs_is_noticed_and_found_again() -> None:
    with nats_server() as server:
        async with running(server.url) as broker:
            await broker.subscribe("a")
            await broker.publish("a", encode("1"), retention=KEPT)
            server.pause()
            before = time.monotonic()
            waiting = [
                broker.publish("a", encode("x")),
                broker.publish("a", encode("x"), retention=KEPT),
                broker.history("a", since=None, limit=None),
            ]
            for error in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(error, BrokerError)
            assert time.monotonic() - before < 5
            with pytest.raises(BrokerError, match="there is no link to a NATS server at the moment"):
                await broker.publish("a", encode("x"))
            subscribing = asyncio.create_task(broker.subscribe("b"))
            await asyncio.sleep(0.1)
            server.resume()
            before = time.monotonic()
            await broker.until_lost()
            await subscribing
            await broker.publish("b", encode("2"))
            async with asyncio.timeout(3):
                while "2" not in [publication.data for publication in broker.delivered]:
                    await asyncio.sleep(0.01)
            assert time.monotonic() - before < 3


async def test_no_answer_is_waited_for_longer_than_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "TIMEOUT", 0.2)
    with nats_server() as server:
        async with running(server.url) as broker:
            await broker.publish("a", encode("1"), retention=KEPT)
            server.pause()
            for attempt in (
                broker.publish("a", encode("2")),
                broker.publish("a", encode("2"), retention=KEPT),
                broker.history("a", since=None, limit=None),
            ):
                with pytest.raises(BrokerError, match=r"gave no answer within 0\.2 seconds"):
                    await attempt
            monkeypatch.setattr(link_module, "TIMEOUT", 5)
            monkeypatch.setattr(module, "TIMEOUT", 0.2)
            with pytest.raises(BrokerError, match=r"could not be stored within 0\.2 seconds"):
                await broker.publish("a", encode("2"), retention=KEPT)


async def test_subscribing_without_a_server_fails_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    with nats_server() as server:
        async with running(server.url) as broker:
            server.kill()
            with pytest.raises(BrokerError, match=r"no link to a NATS server for 0\.2 seconds"):
                await broker.subscribe("a")
            server.start()
            await broker.until_lost()
            await broker.subscribe("a")
            await broker.publish("a", encode("1"))
            assert await broker.until(1) == ["1"]


async def test_a_cluster_goes_on_without_one_of_its_servers() -> None:
    with contextlib.ExitStack() as stack:
        servers = cluster(3)
        for server in servers:
            stack.callback(server.remove)
            server.start()
        by_port = {server.port: server for server in servers}
        url = f"nats://127.0.0.1:{servers[0].port}?replicas=3"
        async with running(url) as broker:
            await broker.subscribe("a")
            first = await publish_until_it_works(broker, "a", 1)
            assert broker._link is not None
            by_port[servers[0].port].kill()
            await broker.until_lost()
            second = await publish_until_it_works(broker, "a", 2)
            async with asyncio.timeout(TIMEOUT):
                history = None
                while history is None:
                    with contextlib.suppress(BrokerError):
                        history = await broker.history("a", since=None, limit=None)
            assert first is not None
            assert second is not None
            assert second.epoch == first.epoch
            assert history.publications[0].position == first
            assert history.publications[-1].position == second


def cluster(size: int) -> list[NatsServer]:
    """Servers that know of each other."""
    servers = [NatsServer() for _ in range(size)]
    routes = {server.port: NatsServer().port for server in servers}
    for number, server in enumerate(servers):
        others = ",".join(f"nats://127.0.0.1:{port}" for port in routes.values())
        own = f"nats://127.0.0.1:{routes[server.port]}"
        server._options += ["-n", f"n{number}", "--cluster_name", "tests", "--cluster", own, "--routes", others]
    return servers
