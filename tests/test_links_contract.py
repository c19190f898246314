"""What every link owes, over each server: a tiny application hands its link to the test, and a client reads."""

import asyncio
import contextlib
import dataclasses
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_ws.frames import Frame
from asgi_ws.links import AsgiLink, Link
from asgi_ws.uvicorn import TransportLink, find_link
from tests.e2e.clients import BINARY, CLOSE, TEXT, RawClient, close_frame, raw, until
from tests.servers import OURS, Address, serve_with

pytestmark = pytest.mark.anyio

KINDS = (
    "recorder",
    "websockets-sansio",
    "websockets-sansio on uvloop",
    "wsproto",
    OURS,
    f"{OURS} on uvloop",
    "hypercorn",
)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def anyio_backend(kind: str) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": kind.endswith("on uvloop")}


@dataclasses.dataclass(frozen=True)
class Closed:
    code: int
    reason: str


class Recorder:
    """An ASGI server of a few lines: its client takes a message when it reads."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._moved = asyncio.Event()
        self._lost = False

    async def send(self, message: Message) -> None:
        while len(self._messages) >= 2 and not self._lost:
            await self._move()
        if self._lost:
            raise OSError("the client is gone")
        self._messages.append(message)
        self._moved.set()

    async def receive(self) -> str | bytes | Closed:
        while not self._messages:
            await self._move()
        message = self._messages.popleft()
        self._moved.set()
        if message["type"] == "websocket.close":
            return Closed(message["code"], message["reason"])
        payload: str | bytes = message["text"] if "text" in message else message["bytes"]
        return payload

    def lose(self) -> None:
        self._lost = True
        self._moved.set()

    async def _move(self) -> None:
        self._moved.clear()
        await self._moved.wait()


class SocketClient:
    """A client on a bare socket with a small window."""

    def __init__(self, client: RawClient) -> None:
        self._client = client

    async def receive(self) -> str | bytes | Closed:
        opcode, payload = await self._client.receive()
        if opcode == CLOSE:
            await self._client.send(CLOSE, payload)
            return Closed(*close_frame(payload))
        assert opcode in (TEXT, BINARY)
        return payload.decode() if opcode == TEXT else payload

    async def drain(self) -> list[tuple[int, bytes]]:
        return await self._client.drain()

    def lose(self) -> None:
        self._client.reset()


Client = Recorder | SocketClient


def handing_over(links: "asyncio.Future[Link]") -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await receive()
        await send({"type": "websocket.accept"})
        links.set_result(find_link(send, scope["extensions"]))
        while (await receive())["type"] != "websocket.disconnect":
            pass

    return app


@dataclasses.dataclass
class Opened:
    """A link, and who is at its other end."""

    link: Link
    client: Client
    address: Address | None = None
    ready: int = 0

    def __post_init__(self) -> None:
        self.link.on_ready = self._count

    def _count(self) -> None:
        self.ready += 1

    async def write(self, payload: str | bytes) -> None:
        """Write as the contract says: wait where the link is behind."""
        before = self.ready
        if not self.link.write(Frame(payload)):
            await until(lambda: self.ready > before)

    def write_until_behind(self, size: int = 4_096) -> int:
        """Write without ever leaving the event loop to others; how many frames it took."""
        for number in range(2_000):
            if not self.link.write(Frame(f"{number}:".ljust(size, "x"))):
                return number + 1
        raise AssertionError("the link never said that the client is behind")

    async def until_behind(self, size: int = 4_096) -> int:
        """The same, with the kernel's buffers filled as well; how many frames were written."""
        number = 0
        while self.link.write(Frame(f"{number}:".ljust(size, "x"))):
            number += 1
            assert number < 2_000
            await asyncio.sleep(0)
        return number + 1


Open = Callable[[], contextlib.AbstractAsyncContextManager[Opened]]


@pytest.fixture
def opened(kind: str) -> Open:
    @contextlib.asynccontextmanager
    async def open_link() -> AsyncIterator[Opened]:
        if kind == "recorder":
            recorder = Recorder()
            yield Opened(AsgiLink(recorder.send), recorder)
            return
        links: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        server = kind.removesuffix(" on uvloop")
        async with (
            serve_with(server, handing_over(links), sndbuf=16_384) as address,
            raw(address.port, "/", rcvbuf=4_096) as client,
        ):
            assert client.status == 101
            yield Opened(await links, SocketClient(client), address)

    return open_link


def numbers(received: list[Any]) -> list[int]:
    return [int(payload.partition(":")[0]) for payload in received]


async def take(client: Client, count: int) -> list[str | bytes | Closed]:
    return [await client.receive() for _ in range(count)]


async def test_frames_arrive_in_the_order_of_write(opened: Open) -> None:
    payloads = [f"text {n}" if n % 3 else b"binary %d" % n for n in range(300)]
    async with opened() as at:
        for payload in payloads:
            at.link.write(Frame(payload))
        assert await take(at.client, len(payloads)) == payloads


@pytest.mark.parametrize("fill", ["x", b"\x00\xff", "ü👋"], ids=["ascii", "binary", "unicode"])
async def test_payloads_of_every_size_arrive_whole(opened: Open, fill: str | bytes) -> None:
    sizes = (0, 1, 124, 125, 126, 127, 65_534, 65_535, 65_536, 65_537, 1_000_000)
    payloads: list[Any] = [(fill * size)[:size] for size in sizes]
    async with opened() as at, asyncio.TaskGroup() as tasks:
        received = tasks.create_task(take(at.client, len(payloads)))
        for payload in payloads:
            await at.write(payload)
        assert await received == payloads


async def test_attachments_follow_their_message_directly(opened: Open) -> None:
    frame = Frame("head", [b"\x01\x02", "tail"])
    async with opened() as at:
        for number in range(20):
            at.link.write(Frame(str(number)))
            at.link.write(frame)
        for number in range(20):
            assert await take(at.client, 4) == [str(number), "head", b"\x01\x02", "tail"]
        await until(lambda: at.link.buffered == 0)


async def test_one_frame_goes_to_several_links(opened: Open) -> None:
    frame = Frame("shared")
    async with opened() as ann, opened() as bob:
        for at in (ann, bob, ann):
            at.link.write(frame)
        assert await take(ann.client, 2) == ["shared", "shared"]
        assert await take(bob.client, 1) == ["shared"]


async def test_client_that_reads_nothing_is_behind_and_ready_when_it_reads_again(opened: Open) -> None:
    async with opened() as at:
        for _ in range(3):
            ready = at.ready
            count = await at.until_behind()
            assert at.ready == ready
            assert at.link.buffered >= 16 * 1024
            assert numbers(await take(at.client, count)) == list(range(count))
            await until(lambda: at.ready > ready)
            assert at.ready == ready + 1
            await until(lambda: at.link.buffered == 0)


async def test_frame_written_while_behind_is_kept_in_its_place(opened: Open) -> None:
    async with opened() as at:
        count = await at.until_behind()
        assert not at.link.write(Frame(f"{count}:"))
        assert numbers(await take(at.client, count + 1)) == list(range(count + 1))
        await until(lambda: at.ready)
        assert at.ready == 1


async def test_burst_in_one_tick_is_behind_within_bounds(opened: Open) -> None:
    async with opened() as at:
        count = at.write_until_behind()
        assert count * 4_096 < 300_000
        assert numbers(await take(at.client, count)) == list(range(count))
        await until(lambda: at.ready == 1)


async def test_close_goes_behind_what_was_written(opened: Open) -> None:
    async with opened() as at:
        count = await at.until_behind()
        closing = at.link.close(4001, "auf Wiedersehen, schön war's")
        assert numbers(await take(at.client, count)) == list(range(count))
        assert await at.client.receive() == Closed(4001, "auf Wiedersehen, schön war's")
        await closing
        await until(lambda: at.link.buffered == 0)


async def test_closing_at_once_sends_the_code(opened: Open) -> None:
    async with opened() as at:
        closing = at.link.close(1000, "")
        assert await at.client.receive() == Closed(1000, "")
        await closing


async def test_what_is_written_behind_close_goes_nowhere(opened: Open) -> None:
    async with opened() as at:
        at.link.write(Frame("before"))
        closing = at.link.close(1000, "")
        assert at.link.write(Frame("behind"))
        await closing
        assert at.link.write(Frame("behind"))
        assert await take(at.client, 2) == ["before", Closed(1000, "")]
        if isinstance(at.client, SocketClient):
            assert await at.client.drain() == []


async def test_after_abort_nothing_waits_and_nothing_is_sent(opened: Open) -> None:
    async with opened() as at:
        count = await at.until_behind()
        at.link.abort()
        for _ in range(100):
            assert at.link.write(Frame("x" * 4_096))
        # uvloop frees what was buffered in its next iteration.
        await until(lambda: at.link.buffered == 0, 0.1)
        at.link.abort()
        if isinstance(at.link, TransportLink) and isinstance(at.client, SocketClient):
            # The connection itself is cut: no close frame, and not all that was written.
            frames = await at.client.drain()
            assert len(frames) < count
            assert {opcode for opcode, _ in frames} <= {TEXT}
            assert at.address is not None
            await until(lambda: not at.address.server.server_state.connections)  # type: ignore[union-attr]


async def test_link_to_a_client_that_is_lost_ends_by_itself(opened: Open) -> None:
    async with opened() as at:
        await at.until_behind()
        at.client.lose()
        # Whoever waits for the client is woken.
        await until(lambda: at.ready == 1)
        await until(lambda: at.link.buffered == 0)
        for _ in range(100):
            assert at.link.write(Frame("x" * 4_096))
            await asyncio.sleep(0)
        await until(lambda: at.link.buffered == 0)
        async with asyncio.timeout(2):
            await at.link.close(1000, "")
        at.link.abort()


async def test_written_counts_what_went_in_and_buffered_what_has_not_been_taken(opened: Open) -> None:
    async with opened() as at:
        assert (at.link.written, at.link.buffered) == (0, 0)
        at.link.write(Frame("x" * 1_000))
        at.link.write(Frame(b"y" * 70_000))
        assert 71_000 <= at.link.written < 71_100
        assert 0 <= at.link.buffered <= at.link.written
        await take(at.client, 2)
        await until(lambda: at.link.buffered == 0)
        written = at.link.written
        count = await at.until_behind()
        assert written + count * 4_096 <= at.link.written < written + count * 4_110
        assert 0 < at.link.buffered <= at.link.written - written


async def test_nothing_runs_while_nothing_is_written(opened: Open) -> None:
    async with opened() as at:
        await at.write("hello")
        await take(at.client, 1)
        await until(lambda: not named_tasks())
        count = await at.until_behind()
        await take(at.client, count)
        await until(lambda: not named_tasks())


def named_tasks() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("asgi_ws")}
