"""Clients without a WebSocket, or not yet: what a long poll costs, what a move to a WebSocket loses, and how soon a
server with polls and event streams ends.

`python -m tests.benchmarks.fallbacks` takes about three minutes. Linux only: it reads /proc.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple, cast

from tests.benchmarks.end_to_end import cpu_seconds, loop_factory, processors, raise_limit_of_files
from tests.e2e.clients import connect
from tests.servers import OURS, Process, run_process, run_uvicorn

__all__ = ["main"]

_APP = "tests.benchmarks.fallbacks_app:app"
_THEIRS = "tests.benchmarks.fallbacks_app:theirs"
_SEPARATOR = "\x1e"
_TEXT = "x" * 128
_PATIENCE = 30
"""How many seconds anything may take that takes no more than moments."""
_AT_ONCE = 50
"""How many clients begin at the same time."""


class Size(NamedTuple):
    polling: int
    seconds: int
    """For how long there is one broadcast in each."""
    moves: int
    moving: int
    """How many clients move at the same time."""
    per_second: float
    """How many numbers are published meanwhile."""
    open: int
    """How many polls, and how many event streams, a server has that is stopped."""
    rounds: int


_FULL = Size(500, 20, 10_000, 64, 100, 300, 3)
_QUICK = Size(5, 1, 20, 5, 200, 5, 1)


# A client


class Http(asyncio.Protocol):
    """One connection that is kept, for one request at a time."""

    def __init__(self) -> None:
        self._buffer = b""
        self._answers: deque[asyncio.Future[tuple[int, str]]] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def request(self, method: str, target: str, body: str = "") -> "asyncio.Future[tuple[int, str]]":
        """The status and the body of the answer, when it is there."""
        answer = asyncio.get_running_loop().create_future()
        self._answers.append(answer)
        length = f"Content-Length: {len(body)}\r\n" if method == "POST" else ""
        self.transport.write(f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n{body}".encode())
        return answer

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if length is None:
            # In chunks; the last one is empty.
            if not rest.endswith(b"0\r\n\r\n"):
                return
            body = b""
            while (chunk := rest.partition(b"\r\n"))[0] != b"0":
                size = int(chunk[0], 16)
                body, rest = body + chunk[2][:size], chunk[2][size + 2 :]
        else:
            if len(rest) < int(length[1]):
                return
            body = rest
        self._buffer = b""
        answer = self._answers.popleft()
        if not answer.done():
            answer.set_result((int(head[9:12]), body.decode()))

    def connection_lost(self, error: Exception | None) -> None:
        for answer in self._answers:
            if not answer.done():
                answer.set_exception(ConnectionError("the server closed the connection"))


async def _http(port: int, stack: contextlib.AsyncExitStack) -> Http:
    transport, http = await asyncio.get_running_loop().create_connection(Http, "127.0.0.1", port)
    stack.callback(transport.abort)
    return http


class Session:
    """A session of Engine.IO, by polling. It has a connection for polls, and one for what the client says."""

    def __init__(self, polls: Http, posts: Http, target: str) -> None:
        self._polls = polls
        self._posts = posts
        self.target = target

    async def poll(self) -> list[str]:
        status, body = await self._polls.request("GET", self.target)
        assert status == 200, body
        return body.split(_SEPARATOR)

    async def post(self, *packets: str) -> None:
        answer = await self._posts.request("POST", self.target, _SEPARATOR.join(packets))
        assert answer[0] == 200, answer


async def _session(port: int, path: str, stack: contextlib.AsyncExitStack) -> Session:
    polls = await _http(port, stack)
    target = f"{path}/?EIO=4&transport=polling"
    status, opening = await polls.request("GET", target)
    assert status == 200, opening
    packet = opening.split(_SEPARATOR)[0]
    return Session(polls, await _http(port, stack), f"{target}&sid={json.loads(packet[1:])['sid']}")


async def _in_groups(all_of_them: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    done: list[Any] = []
    rest = iter(all_of_them)
    while group := list(itertools.islice(rest, _AT_ONCE)):
        async with asyncio.timeout(_PATIENCE):
            done += await asyncio.gather(*group)
    return done


# Long polling


async def _polling(size: Size, cpus: set[int], app: str, *options: str) -> float:
    """The processor time of one delivery, in seconds."""
    arrived, waited_for = 0, size.polling
    everybody = asyncio.Event()

    async def listen(session: Session) -> None:
        nonlocal arrived
        while True:
            for packet in await session.poll():
                if packet.startswith("42"):
                    arrived += 1
                    if arrived == waited_for:
                        everybody.set()
                elif packet == "2":
                    await session.post("3")

    async def begin(port: int, stack: contextlib.AsyncExitStack) -> Session:
        session = await _session(port, "/socket.io", stack)
        await session.post("40")
        while not any(packet.startswith("40") for packet in await session.poll()):
            pass
        return session

    async with run_uvicorn(app, "--no-access-log", *options) as server, contextlib.AsyncExitStack() as stack:
        os.sched_setaffinity(server.process.pid, cpus)
        sessions = await _in_groups(begin(server.port, stack) for _ in range(size.polling))
        listening = asyncio.gather(*(listen(session) for session in sessions))
        event = "42" + json.dumps(["message", _TEXT])
        before = 0.0
        for second in range(size.seconds + 1):
            # The first one isn't counted.
            if second == 1:
                before = cpu_seconds(server.process.pid)
            begin_of_second = time.monotonic()
            await sessions[0].post(event)
            async with asyncio.timeout(_PATIENCE):
                await everybody.wait()
            everybody.clear()
            waited_for += size.polling
            await asyncio.sleep(max(begin_of_second + 1 - time.monotonic(), 0))
        spent = cpu_seconds(server.process.pid) - before
        assert arrived == size.polling * (size.seconds + 1)
        assert not listening.done()
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening
        # One of the two would wait for its polls.
        server.process.kill()
        return spent / (size.polling * size.seconds)


# Moves to a WebSocket


class Moved(NamedTuple):
    """What came of all moves, in numbers of messages."""

    down: int
    up: int
    lost: int
    doubled: int
    out_of_order: int
    seconds: float


_SAID = 10
"""How many messages each client says: half of them by polling."""
_BEFORE, _AFTER = 3, 10
"""How many numbers a client waits for before it moves, and at least afterwards."""


async def _move(port: int) -> tuple[list[int], list[int]]:
    """Move one client: the numbers that it was sent, and those that the server heard of it."""
    received: list[int] = []
    heard: list[int] | None = None

    def take(packets: Iterable[str]) -> None:
        nonlocal heard
        for packet in packets:
            if packet.startswith("4["):
                heard = json.loads(packet[1:])
            elif packet[1:].isdecimal():
                received.append(int(packet[1:]))

    async with contextlib.AsyncExitStack() as stack:
        session = await _session(port, "/numbers", stack)
        while len(received) < _BEFORE:
            take(await session.poll())
        url = f"ws://127.0.0.1:{port}" + session.target.replace("=polling", "=websocket")
        socket = await stack.enter_async_context(connect(url))
        poll = asyncio.ensure_future(session.poll())
        said = [f"4{number}" for number in range(_SAID)]
        posted = asyncio.ensure_future(session.post(*said[: _SAID // 2]))
        await socket.send("2probe")
        assert await socket.recv() == "3probe"
        await posted
        take(await poll)
        await socket.send("5")
        for packet in [*said[_SAID // 2 :], "4done"]:
            await socket.send(packet)
        enough = len(received) + _AFTER
        while heard is None or len(received) < enough:
            take([str(await socket.recv())])
    return received, heard


async def _moves(size: Size, cpus: set[int]) -> Moved:
    down = up = lost = doubled = out_of_order = 0
    waiting = iter(range(size.moves))

    async def publish(port: int) -> None:
        async with connect(f"ws://127.0.0.1:{port}/publish") as socket:
            begin = time.monotonic()
            for number in itertools.count():
                await socket.send(str(number))
                await asyncio.sleep(max(begin + number / size.per_second - time.monotonic(), 0))

    async def move_some(port: int) -> None:
        nonlocal down, up, lost, doubled, out_of_order
        for _ in waiting:
            async with asyncio.timeout(_PATIENCE):
                received, heard = await _move(port)
            first = received[0]
            for numbers, expected in (
                (received, set(range(first, max(received) + 1))),
                ([int(text) for text in heard], set(range(_SAID))),
            ):
                lost += len(expected - set(numbers))
                doubled += len(numbers) - len(set(numbers))
                out_of_order += sum(after < before for before, after in itertools.pairwise(numbers))
            down += len(received)
            up += len(heard)

    async with run_uvicorn(_APP, "--ws", OURS, "--no-access-log") as server:
        os.sched_setaffinity(server.process.pid, cpus)
        publishing = asyncio.create_task(publish(server.port))
        begin = time.monotonic()
        try:
            async with asyncio.TaskGroup() as clients:
                for _ in range(size.moving):
                    clients.create_task(move_some(server.port))
            assert not publishing.done()
        finally:
            publishing.cancel()
            await asyncio.wait([publishing])
        assert "Traceback" not in server.output, server.output
        return Moved(down, up, lost, doubled, out_of_order, time.monotonic() - begin)


# The end


class Stopped(NamedTuple):
    seconds: float
    told: int
    """How many polls and streams got a proper end."""


_RUN = (sys.executable, "-m", "asgi_ws", "run", "--port", "{port}", _APP)
_STOPPED = {
    "`asgi-ws run`": _RUN,
    "`uvicorn`, our class": (*_RUN[:2], "uvicorn", *_RUN[4:], "--ws", OURS, "--timeout-graceful-shutdown", "30"),
    "`uvicorn`, its own class": (*_RUN[:2], "uvicorn", *_RUN[4:], "--timeout-graceful-shutdown", "30"),
}


async def _stop(size: Size, command: Sequence[str]) -> Stopped:
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(run_process(*command, ready="Uvicorn running on"))

        async def parked() -> "asyncio.Task[list[str]]":
            session = await _session(server.port, "/numbers", stack)
            assert await session.poll() == ["4welcome"]
            return asyncio.create_task(session.poll())

        polls = await _in_groups(parked() for _ in range(size.open))
        streams = await _in_groups(_stream(server, stack) for _ in range(size.open))
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        await server.wait(_PATIENCE)
        seconds = time.monotonic() - begin
        ended = await asyncio.gather(*polls)
        last = [await asyncio.wait_for(stream.read(), _PATIENCE) for stream in streams]
        assert "Traceback" not in server.output, server.output
        told = sum(packets == ["1"] for packets in ended) + sum(b'"code": 1012' in end for end in last)
        return Stopped(seconds, told)


async def _stream(server: Process, stack: contextlib.AsyncExitStack) -> asyncio.StreamReader:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    stack.callback(writer.close)
    writer.write(b"GET /numbers HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n")
    await reader.readuntil(b"data: welcome\n\n")
    return reader


# All of it


async def _lines(size: Size, cpus: set[int]) -> AsyncIterator[str]:
    yield "| | | goal |"
    yield "|---|---:|---:|"
    ours, theirs = [], []
    for _ in range(size.rounds):
        ours.append(await _polling(size, cpus, _APP, "--ws", OURS) * 1e6)
        theirs.append(await _polling(size, cpus, _THEIRS, "--factory") * 1e6)
    yield f"| a delivery to each of {size.polling} long polls, µs | {_spread(ours)} | |"
    yield f"| the same with python-socketio, µs | {_spread(theirs)} | |"
    ratio = statistics.median(ours) / statistics.median(theirs)
    yield f"| ratio | {ratio:.2f} | ≤ 0.5 |"
    moved = await _moves(size, cpus)
    yield f"| moves to a WebSocket, {moved.down + moved.up:,} messages in {moved.seconds:.0f} s | {size.moves:,} | |"
    for name, number in (("lost", moved.lost), ("doubled", moved.doubled), ("out of order", moved.out_of_order)):
        yield f"| {name} | {number} | 0 |"
    for name, command in _STOPPED.items():
        stopped = await _stop(size, command)
        yield f"| SIGTERM to the end of {name}, s | {stopped.seconds:.2f} | ≤ 3 |"
        yield f"| polls and event streams that were told so | {stopped.told} of {2 * size.open} | |"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


async def _print(size: Size, cpus: set[int]) -> None:
    async for line in _lines(size, cpus):
        print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fallbacks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only see that it works; the figures mean nothing")
    arguments = parser.parse_args(argv)
    if sys.platform != "linux":
        print("This reads the server's processor time from /proc: it runs on Linux only.", file=sys.stderr)
        return 1
    raise_limit_of_files()
    servers, own = processors()
    os.sched_setaffinity(0, own)
    begin = time.monotonic()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_print(_QUICK if arguments.quick else _FULL, servers))
    versions = ", ".join(f"{name} {version(name)}" for name in ("uvicorn", "starlette", "python-socketio"))
    print(f"\n{versions}, Python {'.'.join(map(str, sys.version_info[:3]))}; in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
