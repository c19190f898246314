import asyncio
import logging
import math

import pytest
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect

from asgi_ws.frames import Frame
from asgi_ws.links import AsgiLink

pytestmark = pytest.mark.anyio

KIB = 1024


class Server:
    """A server's `send`: it takes as many messages as its client reads, and fails once it has an error."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.error: BaseException | None = None
        self._reads = math.inf
        self._open = asyncio.Event()
        self._open.set()
        self._taken = asyncio.Event()

    async def __call__(self, message: Message) -> None:
        await self._open.wait()
        if self.error is not None:
            raise self.error
        self.messages.append(message)
        self._reads -= 1
        if not self._reads:
            self._open.clear()
            self._taken.set()

    def stop_reading(self) -> None:
        self._open.clear()

    def read(self) -> None:
        self._reads = math.inf
        self._open.set()

    async def take(self, count: int) -> None:
        """Take so many messages, and no more."""
        self._reads = count
        self._taken.clear()
        self._open.set()
        await self._taken.wait()

    @property
    def payloads(self) -> list[str | bytes | int]:
        return [message.get("text", message.get("bytes", message.get("code"))) for message in self.messages]


class Ready:
    """Counts calls of `on_ready`, and can be waited for."""

    def __init__(self, link: AsgiLink) -> None:
        self.calls = 0
        self._called = asyncio.Event()
        link.on_ready = self

    def __call__(self) -> None:
        self.calls += 1
        self._called.set()

    async def wait(self) -> None:
        await self._called.wait()
        self._called.clear()


def writers() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name() == "asgi_ws writer"]


async def test_frames_arrive_in_their_order_and_a_close_behind_them() -> None:
    server = Server()
    link = AsgiLink(server)
    assert link.write(Frame("one"))
    assert link.write(Frame(b"two"))
    assert link.write(Frame(""))
    await link.close(4001, "bye")
    assert server.messages == [
        {"type": "websocket.send", "text": "one"},
        {"type": "websocket.send", "bytes": b"two"},
        {"type": "websocket.send", "text": ""},
        {"type": "websocket.close", "code": 4001, "reason": "bye"},
    ]


async def test_a_writer_exists_only_while_there_is_something_to_write() -> None:
    server = Server()
    link = AsgiLink(server)
    assert writers() == []
    for number in range(3):
        link.write(Frame(str(number)))
        link.write(Frame("and more"))
        assert len(writers()) == 1
        await server.take(2)
        server.read()
        await asyncio.sleep(0)
        assert writers() == []


async def test_nothing_waits_and_nothing_is_said_while_the_client_keeps_up() -> None:
    server = Server()
    link = AsgiLink(server)
    ready = Ready(link)
    for _ in range(100):
        assert link.write(Frame("x" * 10 * KIB))
        await server.take(1)
        server.read()
    assert link.buffered == 0
    assert link.written == 1000 * KIB
    assert ready.calls == 0


async def test_the_client_is_behind_at_64_kib() -> None:
    server = Server()
    server.stop_reading()
    link = AsgiLink(server)
    assert link.write(Frame("x" * (64 * KIB - 1)))
    assert not link.write(Frame("x"))
    assert link.buffered == link.written == 64 * KIB
    link.abort()


async def test_bytes_are_counted_not_characters() -> None:
    server = Server()
    server.stop_reading()
    link = AsgiLink(server)
    assert not link.write(Frame("ü" * 32 * KIB))
    assert link.written == 64 * KIB
    link.abort()


async def test_ready_is_said_once_when_the_client_has_taken_most_of_it() -> None:
    server = Server()
    server.stop_reading()
    link = AsgiLink(server)
    ready = Ready(link)
    for _ in range(9):
        behind = not link.write(Frame("x" * 8 * KIB))
    assert behind
    await server.take(6)
    assert (ready.calls, link.buffered) == (0, 24 * KIB)
    await server.take(1)
    await ready.wait()
    assert (ready.calls, link.buffered) == (1, 16 * KIB)
    server.read()
    await link.close(1000, "")
    assert ready.calls == 1
    assert link.buffered == 0


async def test_what_is_written_when_ready_is_said_follows() -> None:
    server = Server()
    link = AsgiLink(server)
    answers: list[bool] = []

    def on_ready() -> None:
        answers.append(link.write(Frame(f"more {len(answers)}".ljust(64 * KIB if len(answers) < 2 else 1))))

    link.on_ready = on_ready
    assert not link.write(Frame("x" * 64 * KIB))
    await server.take(4)
    assert answers == [False, False, True]
    assert [str(payload)[:6] for payload in server.payloads] == ["xxxxxx", "more 0", "more 1", "more 2"]


async def test_closing_waits_for_what_the_client_has_not_taken() -> None:
    server = Server()
    server.stop_reading()
    link = AsgiLink(server)
    link.write(Frame("one"))
    closing = link.close(1000, "")
    await asyncio.sleep(0)
    assert not closing.done()
    server.read()
    await closing
    assert server.payloads == ["one", 1000]


async def test_after_close_what_is_written_goes_nowhere() -> None:
    server = Server()
    link = AsgiLink(server)
    closing = link.close(1000, "")
    assert link.write(Frame("late"))
    await closing
    assert link.write(Frame("later"))
    assert server.payloads == [1000]
    assert link.written == link.buffered == 0
    assert writers() == []


async def test_abort_ends_it_whatever_is_buffered() -> None:
    server = Server()
    server.stop_reading()
    link = AsgiLink(server)
    link.write(Frame("x" * 100 * KIB))
    link.write(Frame("y"))
    await asyncio.sleep(0)
    link.abort()
    assert link.buffered == 0
    assert link.write(Frame("late"))
    await asyncio.sleep(0)
    assert writers() == []
    server.read()
    assert server.messages == []


async def test_abort_at_once_or_with_nothing_to_write_is_all_the_same() -> None:
    server = Server()
    for link in (AsgiLink(server), AsgiLink(server)):
        link.abort()
        link.abort()
        assert link.write(Frame("late"))
    link = AsgiLink(server)
    link.write(Frame("not even begun"))
    link.abort()
    await asyncio.sleep(0)
    assert writers() == []
    assert server.messages == []


async def test_abort_ends_a_close_that_the_server_does_not_take() -> None:
    server = Server()
    server.stop_reading()
    link = AsgiLink(server)
    closing = link.close(1000, "")
    await asyncio.sleep(0)
    link.abort()
    await asyncio.wait([closing])
    assert closing.cancelled()
    assert server.messages == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(),
        ConnectionResetError(),
        RuntimeError("Unexpected ASGI message"),
        WebSocketDisconnect(1006),
        ValueError("a server's own"),
    ],
    ids=repr,
)
async def test_a_client_that_is_gone_is_no_error(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    server.stop_reading()
    server.error = error
    link = AsgiLink(server)
    ready = Ready(link)
    assert not link.write(Frame("x" * 100 * KIB))
    server.read()
    await ready.wait()
    assert link.buffered == 0
    assert link.write(Frame("late")), "who waits is not held up any more"
    await asyncio.sleep(0)
    assert writers() == []
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


async def test_a_client_that_is_gone_can_be_closed_and_aborted() -> None:
    server = Server()
    server.error = OSError()
    link = AsgiLink(server)
    link.write(Frame("x"))
    await link.close(1000, "")
    await link.close(1000, "")
    link.abort()
    assert server.messages == []


async def test_nobody_needs_to_wait_for_a_link() -> None:
    server = Server()
    server.stop_reading()
    link = AsgiLink(server)
    assert not link.write(Frame("x" * 64 * KIB))
    server.read()
    await link.close(1000, "")
    assert server.payloads == ["x" * 64 * KIB, 1000]
