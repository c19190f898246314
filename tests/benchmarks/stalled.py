"""What clients that don't read cost those that do: one in ten opens its WebSocket and never reads again.

`python -m tests.benchmarks.stalled` takes about a minute and a half. Linux only: it reads /proc, and a clock that
processes share.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from importlib.metadata import version
from typing import NamedTuple

from tests.benchmarks.end_to_end import loop_factory, processors, raise_limit_of_files, resident_bytes
from tests.benchmarks.load import Client, clients
from tests.benchmarks.ticks import Plan, Report
from tests.e2e.clients import connect, raw
from tests.servers import Process, run_process

__all__ = ["main"]

_RCVBUF = 4096
"""What the kernel may keep for a client that doesn't read."""
_HEAD = 4
"""How many bytes a message's frame has in front."""
_PATIENCE = 5
"""How many seconds may pass beyond what should, before a round goes on without."""


class Load(NamedTuple):
    connections: int
    stalled: int
    """How many of the connections, in the rounds that have stalled ones."""
    per_second: float
    size: int
    seconds: float
    write_timeout: float


class Round(NamedTuple):
    """What came of one round; times in seconds, memory in bytes."""

    latencies: list[float]
    """Of everything that arrived at clients that read, from the moment when it was to be published."""
    early: list[float]
    """Those of what was published within the write timeout, while stalled clients are there."""
    expected: int
    gone: list[float]
    """For how long the stalled clients had taken nothing when the server was rid of them."""
    memory: int


async def _round(load: Load, stalled: int, processors: set[int]) -> Round:
    command = (sys.executable, "-m", "tests.benchmarks.ticks", "{port}", str(load.write_timeout))
    arrivals: dict[Client, list[float]] = {}

    def note(client: Client) -> None:
        arrivals[client].append(time.monotonic())

    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(run_process(*command, ready="Application startup complete"))
        os.sched_setaffinity(server.process.pid, processors)
        # They are the first to be pushed to.
        deaf = [await stack.enter_async_context(raw(server.port, "/ticks", rcvbuf=_RCVBUF)) for _ in range(stalled)]
        healthy = await stack.enter_async_context(
            clients(server.port, "/ticks", load.connections - stalled, on_message=note)
        )
        arrivals.update({client: [] for client in healthy})
        plan = Plan(
            listeners=load.connections,
            messages=math.ceil(load.seconds * load.per_second),
            per_second=load.per_second,
            size=load.size,
            stalled=[client.sock.getsockname()[1] for client in deaf],
            patience=load.write_timeout + _PATIENCE,
        )
        expected = plan.messages * len(healthy)
        async with _growth(server) as growth:
            report = await _carry_out(server, plan)
            await _wait_for(lambda: sum(map(len, arrivals.values())) >= expected)
        latencies, early = [], []
        # Each client gets all of them, in order: the first to arrive is the first that was published.
        for times in arrivals.values():
            for due, arrived in zip(report.due, times, strict=False):
                latencies.append(arrived - due)
                if due - report.due[0] < load.write_timeout:
                    early.append(arrived - due)
        # Of which message the kernel took a last part, says how many bytes it took.
        gone = [lost - report.due[max(taken - 1, 0) // (load.size + _HEAD)] for lost, taken in report.gone.values()]
        return Round(latencies, early, expected, gone, max(growth))


async def _carry_out(server: Process, plan: Plan) -> Report:
    async with (
        asyncio.timeout(plan.messages / plan.per_second + plan.patience + 2 * _PATIENCE),
        connect(f"{server.ws}/plan") as control,
    ):
        await control.send(json.dumps(dataclasses.asdict(plan)))
        report = json.loads(await control.recv())
    return Report(report["due"], {int(port): (moment, taken) for port, (moment, taken) in report["gone"].items()})


@contextlib.asynccontextmanager
async def _growth(server: Process) -> AsyncIterator[list[int]]:
    """How much more memory the server has than at the beginning, ten times a second."""
    await asyncio.sleep(0.3)
    before = resident_bytes(server.process.pid)
    growth = [0]

    async def look() -> None:
        while True:
            await asyncio.sleep(0.1)
            growth.append(resident_bytes(server.process.pid) - before)

    looking = asyncio.create_task(look())
    try:
        yield growth
    finally:
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking


async def _wait_for(condition: Callable[[], bool]) -> None:
    """For so long, and no longer: what has not happened until then is seen in the table."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE):
            while not condition():
                await asyncio.sleep(0.02)


async def _measure(load: Load, rounds: int, processors: set[int]) -> tuple[list[Round], list[Round]]:
    """Rounds without and with stalled clients, in turns."""
    without, with_some = [], []
    for number in range(rounds):
        for stalled, done in ((0, without), (load.stalled, with_some)):
            print(f"Round {number + 1} of {rounds}: {stalled} stalled", file=sys.stderr)
            done.append(await _round(load, stalled, processors))
    return without, with_some


def _percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many of them don't exceed; not a number where there are none."""
    if not values:
        return math.nan
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def _table(load: Load, without: list[Round], with_some: list[Round]) -> str:
    """As Markdown: medians, in brackets the least and the most of all rounds."""
    healthy = load.connections - load.stalled
    lines = [
        f"| | {load.connections} that read | {healthy} that read, {load.stalled} that don't | ratio |",
        "|---|---:|---:|---:|",
    ]
    for name, get in (
        ("p50 of the latency", lambda of: _percentile(of.latencies, 50)),
        ("p99 of the latency", lambda of: _percentile(of.latencies, 99)),
        (f"p99, first {load.write_timeout:g} s", lambda of: _percentile(of.early, 99)),
    ):
        before, after = [get(of) * 1000 for of in without], [get(of) * 1000 for of in with_some]
        ratio = statistics.median(after) / statistics.median(before)
        lines.append(f"| {name}, ms | {_spread(before)} | {_spread(after)} | {ratio:.2f} |")
    lines.append(f"| delivered to those that read | {_delivered(without)} | {_delivered(with_some)} | |")
    gone = [seconds for of in with_some for seconds in of.gone]
    lines.append(f"| stalled clients that the server has ended | | {len(gone)} of {load.stalled * len(with_some)} | |")
    lines.append(f"| which had taken nothing for, s | | {_spread(gone, 2)} | |")
    grown = [[of.memory / 1e6 for of in rounds] for rounds in (without, with_some)]
    lines.append(f"| growth of the server's memory at its peak, MB | {_spread(grown[0])} | {_spread(grown[1])} | |")
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int = 1) -> str:
    if not values:
        return "none"
    middle, least, most = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


def _delivered(rounds: Iterable[Round]) -> str:
    arrived, expected = (
        sum(numbers) for numbers in zip(*((len(of.latencies), of.expected) for of in rounds), strict=True)
    )
    return f"{arrived:,} of {expected:,}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.stalled", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="for how long is published (default: 20)")
    parser.add_argument("--rounds", type=int, default=2, help="how often; medians are printed (default: 2)")
    parser.add_argument("--quick", action="store_true", help="only see that it works; the figures mean nothing")
    arguments = parser.parse_args(argv)
    if sys.platform != "linux":
        print("This reads the server's memory from /proc: it runs on Linux only.", file=sys.stderr)
        return 1
    load = Load(1000, 100, per_second=10, size=4096, seconds=arguments.seconds, write_timeout=10)
    if arguments.quick:
        load = Load(20, 2, per_second=100, size=4096, seconds=1, write_timeout=0.8)
    rounds = 1 if arguments.quick else arguments.rounds
    raise_limit_of_files()
    servers, own = processors()
    os.sched_setaffinity(0, own)
    begin = time.monotonic()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        print(_table(load, *runner.run(_measure(load, rounds, servers))))
    versions = ", ".join(f"{name} {version(name)}" for name in ("uvicorn", "starlette", "websockets"))
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"\n{versions}, Python {python}; {rounds} round(s) in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
