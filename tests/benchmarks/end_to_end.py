"""What a delivered message costs a real server: its own processor time, which holds on a busy machine, where a
throughput doesn't.

`python -m tests.benchmarks.end_to_end` takes about a minute. Linux only: it reads /proc.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks import plot
from tests.benchmarks.load import Client, clients
from tests.servers import Process, run_uvicorn

__all__ = ["SERVERS", "loop_factory", "main", "processors", "raise_limit_of_files", "resident_bytes"]

_OURS = ("--ws", "asgi_ws.uvicorn:WebSocketProtocol")
SERVERS = {
    "asgi_ws": ("tests.benchmarks.apps:app", *_OURS),
    "asgi_ws, stock class": ("tests.benchmarks.apps:app",),
    "Starlette by hand": ("tests.benchmarks.apps:by_hand",),
}
"""The application, and uvicorn's options."""

_SHORT = "x" * 128
_LONG = json.dumps([{"id": number, "name": "gold", "price": number * 7919 % 10007 / 7} for number in range(170)])[:8192]
_PATIENCE = 30
"""How many seconds a scenario may take."""


class Scenario(NamedTuple):
    name: str
    connections: int
    run: Callable[[Process, int, int], Coroutine[Any, Any, float]]
    """Gets the server, the connections, and by how much less there is to do. Returns the figure."""


# The server, seen from outside


def cpu_seconds(pid: int) -> float:
    """The processor time of a process."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
    except OSError:
        # A kernel that counts in hundredths of a second only.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.asynccontextmanager
async def _served(name: str, processors: set[int]) -> AsyncIterator[Process]:
    app, *options = SERVERS[name]
    async with run_uvicorn(app, *options, "--log-level", "info", "--no-access-log") as server:
        os.sched_setaffinity(server.process.pid, processors)
        yield server


def processors() -> tuple[set[int], set[int]]:
    """The server's and the clients': where there are two, each has one of its own."""
    free = sorted(os.sched_getaffinity(0))
    return {free[0]}, set(free[1:]) or {free[0]}


# Scenarios


def _broadcast(messages: int, text: str, *, window: int, deflate: bool = False) -> Any:
    """One client sends, all get it; `window` messages at a time."""

    async def run(server: Process, connections: int, less: int) -> float:
        arrived, waited_for = 0, 0
        everybody = asyncio.Event()

        def count(client: Client) -> None:
            nonlocal arrived
            arrived += 1
            if arrived == waited_for:
                everybody.set()

        async with clients(server.port, "/broadcast", connections, deflate=deflate, on_message=count) as opened:

            async def send(number: int) -> None:
                nonlocal arrived, waited_for
                arrived, waited_for = 0, number * connections
                everybody.clear()
                for _ in range(number):
                    opened[0].send(text)
                async with asyncio.timeout(_PATIENCE):
                    await everybody.wait()

            # Also who is the last to subscribe has, a moment behind the handshake.
            await asyncio.sleep(0.2)
            await send(1)
            rounds = max(1, messages // window // less)
            before = cpu_seconds(server.process.pid)
            for _ in range(rounds):
                await send(window)
            return (cpu_seconds(server.process.pid) - before) / (rounds * window * connections) * 1e6

    return run


def _echo(messages: int) -> Any:
    """Every client sends its next message when the one before has come back."""

    async def run(server: Process, connections: int, less: int) -> float:
        left = [messages // less] * connections
        numbers: dict[Client, int] = {}
        busy, finished = connections, asyncio.Event()

        def next_one(client: Client) -> None:
            nonlocal busy
            number = numbers[client]
            if left[number]:
                left[number] -= 1
                client.send(_SHORT)
            else:
                busy -= 1
                if not busy:
                    finished.set()

        async with clients(server.port, "/echo", connections, on_message=next_one) as opened:
            numbers.update({client: number for number, client in enumerate(opened)})
            before = cpu_seconds(server.process.pid)
            for client in opened:
                client.send(_SHORT)
            async with asyncio.timeout(_PATIENCE):
                await finished.wait()
            return (cpu_seconds(server.process.pid) - before) / (connections * (messages // less + 1)) * 1e6

    return run


async def _idle(server: Process, connections: int, less: int) -> float:
    """Clients that are there. The first hundred have made the server allocate what it keeps in any case."""
    async with clients(server.port, "/broadcast", max(1, 100 // less), on_message=lambda client: None):
        await asyncio.sleep(0.2)
        before = resident_bytes(server.process.pid)
        async with clients(server.port, "/broadcast", connections, on_message=lambda client: None):
            await asyncio.sleep(0.3)
            return (resident_bytes(server.process.pid) - before) / connections / 1000


SCENARIOS = (
    # The first: afterwards a process has memory that it only reuses.
    Scenario("KB of memory for each of 1,000 idle connections", 1000, _idle),
    Scenario("µs for each delivery of 128 B to 500 connections", 500, _broadcast(150, _SHORT, window=1)),
    Scenario("µs for each, 8 messages at a time", 500, _broadcast(400, _SHORT, window=8)),
    Scenario("µs for each of 8 KB to 200 that take compression", 200, _broadcast(60, _LONG, window=1, deflate=True)),
    Scenario("µs for each echo of 128 B, 100 connections", 100, _echo(200)),
)


async def _measure(rounds: int, quick: bool, processors: set[int]) -> dict[str, dict[str, float]]:
    """The figures of all servers by scenario: medians of rounds, in which the servers take turns."""
    figures: dict[str, dict[str, list[float]]] = {scenario.name: {} for scenario in SCENARIOS}
    for number in range(rounds):
        for name in SERVERS:
            print(f"Round {number + 1} of {rounds}: {name}", file=sys.stderr)
            async with _served(name, processors) as server:
                for scenario in SCENARIOS:
                    connections = 10 if quick else scenario.connections
                    figure = await scenario.run(server, connections, 20 if quick else 1)
                    figures[scenario.name].setdefault(name, []).append(figure)
                    # Those who left have been forgotten.
                    await asyncio.sleep(0.02 if quick else 0.3)
    return {name: {of: statistics.median(all_of) for of, all_of in row.items()} for name, row in figures.items()}


def _table(figures: dict[str, dict[str, float]]) -> str:
    """As Markdown; behind a figure stands its ratio to what it is by hand."""
    lines = ["| " + " | ".join(["", *SERVERS]) + " |", "|---|" + "---:|" * len(SERVERS)]
    for name, row in figures.items():
        by_hand = row["Starlette by hand"]
        cells = [
            plot.number(row[server]) + (f" ({row[server] / by_hand:.2f})" if by_hand else "") for server in SERVERS
        ]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def raise_limit_of_files() -> None:
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.end_to_end", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="how often; medians are printed (default: 2)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a plot")
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
        figures = runner.run(_measure(1 if arguments.quick else arguments.rounds, arguments.quick, servers))
    print(_table(figures))
    versions = ", ".join(f"{name} {version(name)}" for name in ("uvicorn", "starlette", "websockets"))
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"\n{versions}, Python {python}; {arguments.rounds} round(s) in {time.monotonic() - begin:.0f} s")
    if arguments.svg is not None:
        groups = {name: list(row.values()) for name, row in figures.items()}
        arguments.svg.write_text(plot.bars("What connections and messages cost the server", list(SERVERS), groups))
    return 0


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.new_event_loop
    return None


if __name__ == "__main__":
    sys.exit(main())
