"""What the Redis broker does when Redis, or the way to it, fails; and what it puts there."""

import asyncio
import contextlib
import logging
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from asgi_ws.brokers import broker_for, redis_links
from asgi_ws.brokers.redis import RedisBroker, check_version
from asgi_ws.brokers.redis_servers import parse_url
from asgi_ws.exceptions import BrokerError
from asgi_ws.messages import Position, Retention
from asgi_ws.payloads import Payload, encode
from tests.brokers.test_contract import Deliveries, started
from tests.servers import free_port
from tests.services import RedisCluster, RedisServer, redis_cluster, redis_sentinel, redis_server

pytestmark = pytest.mark.anyio

KEPT = Retention(100, 60)


@pytest.fixture(scope="module")
def shared() -> Iterator[RedisServer]:
    """A server for tests that leave it as it was."""
    with redis_server() as server:
        yield server


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    shared.command("FLUSHALL")
    return shared


@pytest.fixture
def own() -> Iterator[RedisServer]:
    """A server that the test may do with what it likes."""
    with redis_server() as server:
        yield server


async def eventually(condition: Callable[[], Any], timeout: float = 10) -> float:
    """Wait until it is true; how long that took."""
    begin = time.monotonic()
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)
    return time.monotonic() - begin


async def succeeds(attempt: Callable[[], Awaitable[Any]], timeout: float = 10) -> Any:
    """Try again until there is no error."""
    async with asyncio.timeout(timeout):
        while True:
            try:
                return await attempt()
            except BrokerError:
                await asyncio.sleep(0.01)


async def is_heard(broker: RedisBroker, deliveries: Deliveries, channel: str = "a", timeout: float = 10) -> None:
    """Publish until something is delivered."""
    before = len(deliveries)
    async with asyncio.timeout(timeout):
        while len(deliveries) == before:
            with contextlib.suppress(BrokerError):
                await broker.publish(channel, encode("heard?"))
            await asyncio.sleep(0.01)


# URLs


def servers(url: str) -> tuple[str, dict[str, Any]]:
    found, _ = parse_url(url)
    return type(found).__name__, vars(found)


def test_a_url_says_where_redis_is_and_how_to_get_in() -> None:
    kind, one = servers("rediss://ann:p%40ss@[::1]:7000/3?ssl_cert_reqs=none&ssl_check_hostname=false&client_name=x")
    assert kind == "_One"
    assert one["_addresses"] == [("::1", 7000)]
    assert one["_class"].__name__ == "SSLConnection"
    options = one["_options"]
    assert (options["username"], options["password"], options["db"]) == ("ann", "p@ss", 3)
    assert (options["ssl_cert_reqs"], options["ssl_check_hostname"], options["client_name"]) == ("none", False, "x")
    assert servers("redis://")[1]["_addresses"] == [("localhost", 6379)]
    assert servers("redis://:secret@host?db=2")[1]["_options"]["db"] == 2

    kind, group = servers("redis+sentinel://ann:x@one,two:1234/my%20shop/4?sentinel_password=y")
    assert kind == "_Sentinel"
    assert group["_addresses"] == [("one", 26379), ("two", 1234)]
    assert (group["_service"], group["_options"]["db"]) == ("my shop", 4)
    assert group["_sentinel_options"] == {"db": 0, "username": None, "password": "y"}

    kind, cluster = servers("rediss+cluster://one,two:7001")
    assert kind == "_Cluster"
    assert cluster["_addresses"] == [("one", 6379), ("two", 7001)]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://host:port", "no address"),
        ("redis://host:99999", "no address"),
        ("redis://[::1", "(no address|Invalid IPv6)"),
        ("redis://one,two", "takes one server"),
        ("redis://host/shop", "a number, not 'shop'"),
        ("redis://host/-1", "a number, not '-1'"),
        ("redis://host?colour=red", "no parameter 'colour'"),
        ("redis://host?colour", "no query"),
        ("redis://host?prefix=", "the prefix has one printable character"),
        ("redis://host?prefix=%00", "the prefix has one printable character"),
        ("redis://host?ssl_cert_reqs=none", "is for rediss://"),
        ("redis://host?sentinel_password=x", "is for redis\\+sentinel://"),
        ("rediss://host?ssl_check_hostname=perhaps", "is true or false"),
        ("rediss://host?ssl_cert_reqs=perhaps", "none, optional or required"),
        ("redis+sentinel://host", "which master"),
        ("redis+cluster://host/1", "no databases but 0"),
    ],
)
def test_a_url_that_cannot_be_read_is_told_why(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        broker_for(url)


def test_another_scheme_is_not_for_redis() -> None:
    with pytest.raises(ValueError, match="no scheme of Redis"):
        RedisBroker("nats://host")


def test_without_redis_py_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("asgi_ws.brokers.redis")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("redis", "redis.asyncio.connection"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"(?m)^pip install 'asgi-ws-hub\[redis\]'$"):
        broker_for("redis://localhost")


# Starting


async def start_error(url: str) -> str:
    broker = broker_for(url)
    with pytest.raises(BrokerError) as caught:
        await broker.start(lambda publication: None, lambda: None)
    with pytest.raises(BrokerError, match="the broker isn't started"):
        await broker.publish("a", encode("x"))
    with pytest.raises(BrokerError, match="the broker isn't started"):
        await broker.subscribe("a")
    await broker.unsubscribe("a")
    await broker.stop()
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://127.0.0.1:{port}", "Redis can't be used: "),
        ("redis+cluster://127.0.0.1:{port}", "Redis can't be used: "),
        ("redis+sentinel://127.0.0.1:{port}/shop", "no Sentinel knows a master for 'shop'"),
        ("redis+sentinel://127.0.0.1:{port},127.0.0.1:{port}/shop", "no Sentinel knows a master for 'shop'"),
        ("redis://no-such-host.invalid", "Redis can't be used: "),
    ],
)
async def test_no_server_is_told_at_the_start(url: str, words: str) -> None:
    assert words in await start_error(url.format(port=free_port()))


Answer = Callable[[list[bytes]], Awaitable[bytes]]


@contextlib.asynccontextmanager
async def scripted(answer: Answer) -> AsyncIterator[str]:
    """The URL of a server that says to each command what `answer` makes of it."""
    tasks: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            while line := await reader.readline():
                command = []
                for _ in range(int(line[1:]) if line.startswith(b"*") else 0):
                    size = int((await reader.readline())[1:])
                    command.append((await reader.readexactly(size + 2))[:-2])
                writer.write(await answer(command))
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        yield f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        for task in tasks:
            if task is not None:
                task.cancel()
                await asyncio.wait([task])


async def test_what_is_no_redis_is_told_at_the_start() -> None:
    async def answer(command: list[bytes]) -> bytes:
        return b"HTTP/1.1 400 Bad Request\r\n\r\n"

    async with scripted(answer) as url:
        assert "can't be used" in await start_error(url)


async def test_a_redis_that_loads_its_data_is_waited_for_by_nobody(own: RedisServer) -> None:
    for number in range(50):
        own.command("SET", str(number), random.randbytes(1000).hex())
    own.command("SAVE")
    own.stop()
    own.options |= {"key-load-delay": "40000", "loading-process-events-interval-bytes": "1024"}
    own.launch()
    await eventually(lambda: connects(own))
    assert "it is loading its data" in await start_error(own.url)


def connects(server: RedisServer) -> bool:
    with contextlib.suppress(OSError):
        server.command("INFO")
        return True
    return False


async def test_starting_can_be_given_up(own: RedisServer) -> None:
    own.pause()
    broker = RedisBroker(own.url)
    starting = asyncio.create_task(broker.start(lambda publication: None, lambda: None))
    await asyncio.sleep(0.1)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    own.resume()
    async with started(broker):
        assert await broker.recall("x") is None


async def test_stopping_waits_for_nothing_that_redis_owes(caplog: pytest.LogCaptureFixture) -> None:
    """Neither a subscription that isn't confirmed, nor those that are asked for again."""
    asked = 0

    async def answer(command: list[bytes]) -> bytes:
        nonlocal asked
        match command[0].upper():
            case b"INFO":
                info = b"redis_version:7.0.0\r\nrole:master\r\nrun_id:0123456789"
                return b"$%d\r\n%s\r\n" % (len(info), info)
            case b"CONFIG":
                return b"-NOPERM no\r\n"
            case b"SUBSCRIBE":
                asked += 1
                if asked == 1:
                    return b"*3\r\n$9\r\nsubscribe\r\n$1\r\nx\r\n:1\r\n"
                if asked == 2:
                    raise ConnectionError
                return b""
            case _:
                return b"+OK\r\n"

    async with scripted(answer) as url:
        broker = RedisBroker(url)
        await broker.start(lambda publication: None, lambda: None)
        await broker.subscribe("a")
        waiting = asyncio.create_task(broker.subscribe("b"))
        await eventually(lambda: asked == 3)
        begin = time.monotonic()
        await broker.stop()
        with pytest.raises(BrokerError, match="the broker was stopped"):
            await waiting
        assert time.monotonic() - begin < 1


async def test_wrong_credentials_are_told_at_the_start() -> None:
    with redis_server(requirepass="secret") as server:
        for url in (f"redis://127.0.0.1:{server.port}", f"redis://:wrong@127.0.0.1:{server.port}"):
            words = await start_error(url)
            assert "Redis refuses the credentials" in words
            assert "wrong" not in words
        async with started(broker_for(f"redis://:secret@127.0.0.1:{server.port}")):
            pass


async def test_a_replica_is_not_taken_for_its_master(server: RedisServer) -> None:
    with redis_server(replicaof=f"127.0.0.1 {server.port}") as replica:
        assert "it is a replica" in await start_error(replica.url)


def test_a_redis_that_is_too_old_is_refused() -> None:
    for version in ("7.0.0", "7.2.4", "8.0.1", "10.1", "255.255.255"):
        check_version(version)
    for version in ("6.2.14", "2.8", "unknown", ""):
        with pytest.raises(Exception, match=f"its version is {version}, and asgi_ws needs 7 or later"):
            check_version(version)


# Losing the link


async def test_a_server_that_was_killed_and_is_back_is_used_again(
    own: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    broker = RedisBroker(own.url)
    async with started(broker) as deliveries:
        await asyncio.gather(*(broker.subscribe(f"room:{number}") for number in range(5000)))
        await broker.subscribe("a")
        for round_ in range(1, 4):
            own.kill()
            with pytest.raises(BrokerError):
                await broker.publish("a", encode("lost"))
            await asyncio.to_thread(own.start)
            begin = time.monotonic()
            await is_heard(broker, deliveries)
            assert time.monotonic() - begin < 2.5
            assert deliveries.lost == round_
            await succeeds(lambda: broker.publish("room:4999", encode("x")))
            await eventually(lambda: deliveries[-1].channel == "room:4999")
    assert "lost" not in [publication.data for publication in deliveries]
    words = [record.getMessage() for record in caplog.records]
    assert len([text for text in words if "is lost" in text]) == len([text for text in words if "is back" in text]) == 6


async def test_what_is_asked_for_while_redis_is_away_is_had_when_it_is_back(own: RedisServer) -> None:
    broker = RedisBroker(own.url)
    async with started(broker) as deliveries:
        await broker.subscribe("gone")
        own.kill()
        subscribing = asyncio.create_task(broker.subscribe("a"))
        given_up = asyncio.create_task(broker.subscribe("b"))
        await asyncio.sleep(0.1)
        given_up.cancel()
        await broker.unsubscribe("gone")
        await asyncio.to_thread(own.start)
        await subscribing
        for channel in ("gone", "b", "a"):
            await succeeds(lambda channel=channel: broker.publish(channel, encode(channel)))  # type: ignore[misc]
        assert await deliveries.until(1) == ["a"]
        assert deliveries.lost == 0, "nothing that was subscribed before is now"


async def test_a_server_that_hangs_is_noticed_and_healed(own: RedisServer) -> None:
    broker = RedisBroker(own.url)
    async with started(broker) as deliveries:
        await broker.subscribe("a")
        own.pause()
        begin = time.monotonic()
        with pytest.raises(BrokerError, match="nothing was heard for 3 seconds"):
            await broker.publish("a", encode("unheard"))
        assert time.monotonic() - begin < 5
        with pytest.raises(BrokerError, match="there is no link"):
            await broker.publish("a", encode("unheard"))
        own.resume()
        begin = time.monotonic()
        await is_heard(broker, deliveries)
        assert time.monotonic() - begin < 3
        assert deliveries.lost == 1


async def test_a_killed_connection_is_made_again(server: RedisServer) -> None:
    broker = RedisBroker(server.url)
    async with started(broker) as deliveries:
        await broker.subscribe("a")
        server.command("CLIENT", "KILL", "TYPE", "pubsub")
        await eventually(lambda: deliveries.lost == 1)
        await is_heard(broker, deliveries)
        server.command("CLIENT", "KILL", "TYPE", "normal")
        await succeeds(lambda: broker.publish("a", encode("x")))
        assert deliveries.lost == 1


async def test_a_subscriber_that_redis_gives_up_says_that_something_was_lost(own: RedisServer) -> None:
    own.command("CONFIG", "SET", "client-output-buffer-limit", "pubsub 200kb 0 0")
    broker = RedisBroker(own.url)
    async with started(broker) as deliveries:
        await broker.subscribe("a")
        name = broker._names.channel("a").decode()
        for _ in range(300):  # meanwhile the event loop, which would read them, stands still
            own.command("PUBLISH", name, "x" * 100_000)
            if own.command("CLIENT", "LIST", "TYPE", "pubsub").startswith("$0"):
                break
        await eventually(lambda: deliveries.lost == 1)
        await is_heard(broker, deliveries)
        assert broker.ignored > 0


# What waits, and stops waiting


async def test_callers_that_go_away_leave_no_reply_to_others(server: RedisServer) -> None:
    """The class of CVE-2023-28858: one connection, many users, and cancellations at every step."""
    broker = RedisBroker(server.url)
    async with started(broker):
        await asyncio.gather(*(broker.remember(f"user {number}", str(number)) for number in range(50)))
        done = False

        async def user(number: int) -> int:
            asked = 0
            while not done:
                assert await broker.recall(f"user {number}") == str(number)
                asked += 1
            return asked

        users = [asyncio.create_task(user(number)) for number in range(50)]
        choice = random.Random(1)
        for steps in range(400):
            leaving = asyncio.create_task(broker.recall(f"user {steps % 50}"))
            for _ in range(steps % 20):
                await asyncio.sleep(0)
            if steps % 3:
                await asyncio.sleep(choice.random() / 1000)
            leaving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert await leaving == str(steps % 50)
        done = True
        assert all(await asyncio.gather(*users))
        clients = server.command("INFO", "clients")
        assert "connected_clients:3\r" in clients, "two of ours and the one that asks"


async def test_an_answer_that_takes_too_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers one command after the other, but slowly: the link lives, the last callers don't wait."""
    monkeypatch.setattr(redis_links, "_TICK", 0.02)
    monkeypatch.setattr(redis_links, "COMMAND_TIMEOUT", 0.3)

    async def answer(command: list[bytes]) -> bytes:
        await asyncio.sleep(0.05)
        return b"+OK\r\n"

    async with scripted(answer) as url:
        found, _ = parse_url(url)
        (node,) = found.nodes
        async with redis_links.Link(await found.connect(node)) as link:
            calls = [link.call("ECHO", str(number)) for number in range(15)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert results[0] == b"OK"
            assert isinstance(results[-1], TimeoutError)
            await asyncio.sleep(0.6)
            assert await link.call("ECHO", "again") == b"OK"
        with pytest.raises(ConnectionError, match="the link is lost"):
            link.call("ECHO", "late")


async def test_a_link_ends_when_its_reader_fails(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever redis-py may raise, nobody waits for an answer that can't come."""

    class Connection:
        async def read_response(self, **options: object) -> None:
            await asyncio.sleep(0.01)
            raise RecursionError("too deep")

        def pack_command(self, *command: object) -> list[bytes]:
            return [b""]

        async def send_packed_command(self, packed: list[bytes], check_health: bool) -> None: ...

        async def disconnect(self, nowait: bool) -> None: ...

    async with redis_links.Link(Connection()) as link:  # type: ignore[arg-type]
        with pytest.raises(ConnectionError, match="too deep"):
            await link.call("PING")
        assert isinstance(await link.ended(), RecursionError)
    assert "a link to Redis has failed" in caplog.text


# What is on the bus, and in the keys


async def test_garbage_on_the_bus_is_counted_and_dropped(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    broker = RedisBroker(server.url)
    async with started(broker) as deliveries:
        await broker.subscribe("a")
        name = broker._names.channel("a")
        good = b"\x01\x95\x00\xc4\x01x\xc0\x00\xa0"
        garbage = [
            b"",
            b"\x01",
            b"\x02" + good[1:],
            b"\x01\x95\x03\xc4\x01x\xc0\x00\xa0",  # a kind that there isn't
            b"\x01\x95\x00\xc4\x01\xff\xc0\x00\xa0",  # text that isn't
            b"\x01\x95\x00\xc4\x01x\xc0\x01\xa0",  # an offset without an epoch
            b"\x01\x95\x00\xc4\x01x\xc0\x00\xa1e",  # an epoch without an offset
            b"\x01\x95\x00\xa1x\xc0\x00\xa0",
            b"\x80\x04\x95.",
            b'{"a":1}',
        ]
        choice = random.Random(2)
        mutated = [
            bytes(choice.choice((byte, byte, byte, choice.randrange(256))) for byte in good[: choice.randrange(10)])
            for _ in range(2000)
        ]
        for message in garbage:
            await broker._execute(name, b"PUBLISH", name, message)
        await broker.publish("a", encode("1"))
        assert await deliveries.until(1) == ["1"]
        assert broker.ignored == len(garbage)
        await asyncio.gather(*(broker._execute(name, b"PUBLISH", name, message) for message in mutated))
        await broker.publish("a", encode("end"))
        await eventually(lambda: deliveries[-1].data == "end")
        assert broker.ignored + len(deliveries) == len(garbage) + len(mutated) + 2
    assert caplog.text.count("nothing that asgi_ws has published") == 1, "one line a minute"


async def test_a_publication_that_is_too_large_is_refused(server: RedisServer) -> None:
    broker = RedisBroker(server.url)
    async with started(broker):
        with pytest.raises(BrokerError, match="too large"):
            await broker.publish("a", Payload("binary", bytes(64 * 1024 * 1024)))


async def test_databases_keep_hubs_apart(server: RedisServer) -> None:
    async with started(RedisBroker(server.url)), started(RedisBroker(f"{server.url}/1")) as deliveries:
        zero, one = RedisBroker(server.url), RedisBroker(f"{server.url}/1")
        async with started(zero) as in_zero, started(one) as in_one:
            for broker in (zero, one):
                await broker.subscribe("a")
            await zero.publish("a", encode("zero"))
            await one.publish("a", encode("one"))
            assert await in_zero.until(1) == ["zero"]
            assert await in_one.until(1) == ["one"]
    assert deliveries == []


async def test_every_key_goes_by_itself(server: RedisServer) -> None:
    broker = RedisBroker(server.url, prefix="{shop}")
    async with started(broker):
        await broker.publish("a", encode("1"), retention=Retention(10, 60))
        await broker.history("b", since=None, limit=None)
        await broker.enter("a", "1", "ann", "", expiry=60)
        await broker.enter("a", "2", "ann", "", expiry=60)
        await broker.enter("a", "3", "bob", "", expiry=60)
        await broker.leave("a", "3", grace=10)
        keys = server.command("KEYS", "*").split("\r\n")[2::2]
        kinds = ("expiries", "gone", "keys", "members", "meta", "stream")
        assert set(keys) == {*(f"%7Bshop%7D:{kind}:{{a}}" for kind in kinds), "%7Bshop%7D:meta:{b}"}
        for key in keys:
            left = int(server.command("PTTL", key)[1:])
            assert 0 < left <= 60_000 + 24 * 60 * 60 * 1000, key
        assert int(server.command("PTTL", "%7Bshop%7D:stream:{a}")[1:]) <= 60_000


async def test_an_evicted_position_is_a_new_epoch_and_leaves_no_old_stream(server: RedisServer) -> None:
    broker = RedisBroker(server.url)
    async with started(broker):
        for _ in range(3):
            before = await broker.publish("a", encode("old"), retention=KEPT)
        meta, stream = (name.decode() for name in broker._names.stream("a"))
        server.command("DEL", meta)
        after = await broker.publish("a", encode("new"), retention=KEPT)
        assert before is not None
        assert after is not None
        assert after.offset == 1
        assert after.epoch != before.epoch
        history = await broker.history("a", since=None, limit=None)
        assert [publication.data for publication in history.publications] == ["new"]
        server.command("DEL", meta)
        history = await broker.history("a", since=after, limit=None)
        assert history.publications == ()
        assert history.position.offset == 0
        assert history.position.epoch != after.epoch
        assert server.command("EXISTS", stream) == ":0\r\n"


async def epoch_after_restart(server: RedisServer) -> tuple[Position | None, Position | None]:
    broker = RedisBroker(server.url)
    async with started(broker):
        before = await broker.publish("a", encode("1"), retention=KEPT)
        server.kill()
        await asyncio.to_thread(server.start)
        return before, await succeeds(lambda: broker.publish("a", encode("2"), retention=KEPT))


async def test_a_restart_keeps_the_epoch_where_all_is_on_disk() -> None:
    with redis_server(appendonly="yes", appendfsync="always") as server:
        before, after = await epoch_after_restart(server)
        assert before is not None
        assert after == Position(2, before.epoch)


@pytest.mark.parametrize("options", [{}, {"appendonly": "yes", "appendfsync": "everysec"}])
async def test_a_restart_begins_an_epoch_where_something_may_be_missing(options: dict[str, str]) -> None:
    with redis_server(**options) as server:
        before, after = await epoch_after_restart(server)
        assert before is not None
        assert after is not None
        assert after.offset == 1
        assert after.epoch != before.epoch


async def test_flushed_scripts_are_sent_again(server: RedisServer) -> None:
    broker = RedisBroker(server.url)
    async with started(broker):
        first = await broker.publish("a", encode("1"), retention=KEPT)
        server.command("SCRIPT", "FLUSH")
        assert first is not None
        assert await broker.publish("a", encode("2"), retention=KEPT) == Position(2, first.epoch)
        assert await broker.count("a") == (0, 0)


async def test_a_full_redis_refuses_and_nothing_has_happened(own: RedisServer) -> None:
    broker = RedisBroker(own.url)
    async with started(broker) as deliveries:
        await broker.subscribe("a")
        first = await broker.publish("a", encode("1"), retention=KEPT)
        own.command("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(BrokerError, match="maxmemory"):
            await broker.publish("a", encode("2"), retention=KEPT)
        own.command("CONFIG", "SET", "maxmemory", "0")
        assert first is not None
        assert await broker.publish("a", encode("3"), retention=KEPT) == Position(2, first.epoch)
        assert await deliveries.until(2) == ["1", "3"]


async def test_a_user_that_may_only_what_is_needed_is_enough(own: RedisServer) -> None:
    own.command("ACL", "SETUSER", "hub", "on", ">x", "~shop:*", "&shop:*", "+@all", "-@dangerous", "+info")
    url = f"redis://hub:x@127.0.0.1:{own.port}"
    broker = RedisBroker(f"{url}?prefix=shop")
    async with started(broker) as deliveries:
        await broker.subscribe("a")
        assert await broker.publish("a", encode("1"), retention=KEPT)
        assert await deliveries.until(1) == ["1"]
    elsewhere = RedisBroker(url)
    async with started(elsewhere):
        with pytest.raises(BrokerError, match="Redis didn't confirm a subscription"):
            await elsewhere.subscribe("a")
        with pytest.raises(BrokerError):
            await elsewhere.publish("a", encode("1"))


# Sentinels


async def test_another_master_is_found() -> None:
    with redis_sentinel() as group:
        assert "no Sentinel knows a master for 'other'" in await start_error(group.url.replace("shop", "other"))
        broker = RedisBroker(group.url)
        async with started(broker) as deliveries:
            await broker.subscribe("a")
            before = await broker.publish("a", encode("1"), retention=KEPT)
            await deliveries.until(1)
            group.master.kill()
            await is_heard(broker, deliveries)
            after = await succeeds(lambda: broker.publish("a", encode("2"), retention=KEPT))
            assert before is not None
            assert after.epoch != before.epoch, "the replica may not have had all"
            assert deliveries.lost >= 1


async def test_a_master_that_becomes_a_replica_is_left(server: RedisServer) -> None:
    with redis_server() as demoted:
        broker = RedisBroker(demoted.url)
        async with started(broker) as deliveries:
            await broker.subscribe("a")
            demoted.command("CONFIG", "SET", "replica-read-only", "yes")
            demoted.command("REPLICAOF", "127.0.0.1", str(server.port))
            with pytest.raises(BrokerError):
                await broker.publish("a", encode("x"), retention=KEPT)
            demoted.command("REPLICAOF", "NO", "ONE")
            await is_heard(broker, deliveries)


# Clusters


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with redis_cluster(replicas=1) as cluster:
        yield cluster


def slot_of(broker: RedisBroker, channel: str) -> int:
    from redis.crc import key_slot

    return key_slot(broker._names.channel(channel))


def channel_at(broker: RedisBroker, server: RedisServer) -> str:
    """A channel that this server has."""
    return next(
        channel
        for channel in map(str, range(10_000))
        if broker._servers.node_of(broker._names.channel(channel)) == f"127.0.0.1:{server.port}"
    )


async def test_a_channel_whose_slot_moves_goes_on(cluster: RedisCluster) -> None:
    broker, late = RedisBroker(cluster.url), RedisBroker(cluster.url)
    async with started(broker) as deliveries, started(late) as late_deliveries:
        source, target = cluster.masters[1:]
        channel = channel_at(broker, source)
        slot = str(slot_of(broker, channel))
        await broker.subscribe(channel)
        await broker.subscribe(channel_at(broker, target))
        before = await broker.publish(channel, encode("1"), retention=KEPT)
        assert before is not None

        source_id, target_id = cluster.node_id(source), cluster.node_id(target)
        target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
        source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
        meta, stream = (name.decode() for name in broker._names.stream(channel))
        source.command("MIGRATE", "127.0.0.1", str(target.port), meta, "0", "5000")
        moving = asyncio.create_task(broker.publish(channel, encode("2"), retention=KEPT))
        await asyncio.sleep(0.2)
        assert not moving.done(), "half of the channel is here, half there"
        source.command("MIGRATE", "127.0.0.1", str(target.port), stream, "0", "5000")
        moved = await moving
        assert moved is not None
        assert moved.epoch != before.epoch, "another server may not have had all"
        for server in (target, source, cluster.masters[0]):
            server.command("CLUSTER", "SETSLOT", slot, "NODE", target_id)

        await eventually(lambda: deliveries.lost == 1)
        after = await broker.publish(channel, encode("3"), retention=KEPT)
        assert after is not None
        await eventually(lambda: deliveries[-1].data == "3")
        history = await broker.history(channel, since=None, limit=None)
        assert [publication.data for publication in history.publications] == ["2", "3"]
        await late.subscribe(channel)  # where it looks for it, it isn't any more
        await late.publish(channel, encode("4"), retention=KEPT)
        assert await late_deliveries.until(1) == ["4"]
        assert late_deliveries.lost == 0
        await eventually(lambda: deliveries[-1].data == "4")
        await broker.unsubscribe(channel)
        await late.unsubscribe(channel)
        await broker.publish(channel, encode("unheard"))


async def test_a_replica_that_takes_over_is_used() -> None:
    with redis_cluster(replicas=1) as cluster:
        broker = RedisBroker(cluster.url)
        async with started(broker) as deliveries:
            lost, kept = (channel_at(broker, server) for server in cluster.masters[:2])
            await broker.subscribe(lost)
            await broker.subscribe(kept)
            cluster.masters[0].kill()
            await broker.publish(kept, encode("1"))
            assert await deliveries.until(1) == ["1"]
            await is_heard(broker, deliveries, lost)
            assert deliveries.lost >= 1
            assert f"127.0.0.1:{cluster.masters[0].port}" not in broker._servers.nodes


async def test_a_cluster_that_was_away_is_used_again() -> None:
    with redis_cluster() as cluster:
        broker = RedisBroker(cluster.url)
        async with started(broker) as deliveries:
            channels = [channel_at(broker, server) for server in cluster.masters]
            for channel in channels:
                await broker.subscribe(channel)
            for server in cluster.masters:
                server.kill()
            with pytest.raises(BrokerError):
                await broker.publish("a", encode("x"))
            await asyncio.sleep(0.5)
            for server in cluster.masters:
                await asyncio.to_thread(server.start)
            for channel in channels:
                await is_heard(broker, deliveries, channel)
        cluster.masters[0].command("CLUSTER", "DELSLOTS", "17")
        url = f"redis+cluster://127.0.0.1:{cluster.masters[0].port}"
        assert "the cluster has slots that no server serves" in await start_error(url)
