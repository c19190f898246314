"""What a broker between processes costs: deliveries, publications, recovery, and channels that come and go.

`python -m tests.benchmarks.brokers` takes a few minutes. Linux only: it reads /proc. redis-server has to be installed.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from asgi_ws import Hub
from tests.benchmarks import plot
from tests.benchmarks.brokers_app import KEPT
from tests.benchmarks.brokers_work import CALLERS, PUBLISHERS
from tests.benchmarks.end_to_end import cpu_seconds, loop_factory, processors, raise_limit_of_files
from tests.benchmarks.load import Client, clients
from tests.servers import Process, run_uvicorn
from tests.services import RedisServer, redis_server

__all__ = ["main"]

_TEXT = "x" * 128
_PATIENCE = 30
"""How many seconds a step may take."""
_TIMES = 4
"""How often channels come and go."""
_WORK_PATIENCE = 240
"""How many seconds the work of a process of its own may take."""


class Load(NamedTuple):
    connections: int
    messages: int
    publications: int
    returning: int
    missed: int
    channels: int


FULL = Load(500, 150, 10_000, 1_000, KEPT, 100_000)
QUICK = Load(10, 5, 128, 10, 20, 200)


class Row(NamedTuple):
    """One line of the table. What is measured in each round, and what it is compared with, if anything."""

    name: str
    measured: list[float]
    compared: list[float]
    goal: str = ""


class Machine:
    """Where things run: all servers on one processor, clients and publishers on the others."""

    def __init__(self) -> None:
        self.servers, self.own = processors()

    @contextlib.asynccontextmanager
    async def served(self, url: str, workers: int) -> AsyncIterator[list[Process]]:
        """So many processes of uvicorn, joined by the broker of the URL."""
        async with contextlib.AsyncExitStack() as stack:
            running = []
            for _ in range(workers):
                options = ("--ws", "asgi_ws.uvicorn:WebSocketProtocol", "--log-level", "info", "--no-access-log")
                server = run_uvicorn("tests.benchmarks.brokers_app:app", *options, BROKER=url)
                running.append(await stack.enter_async_context(server))
                os.sched_setaffinity(running[-1].process.pid, self.servers)
            yield running

    @contextlib.contextmanager
    def redis(self) -> Iterator[RedisServer]:
        with redis_server() as server:
            for task in Path(f"/proc/{server.pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), self.servers)
            yield server

    async def work(
        self, kind: str, url: str, number: int, rounds: int, channel: str = "", *, there: bool = False
    ) -> Any:
        """What `brokers_work` finds; where the clients run, or `there`, where the servers do."""
        command = (sys.executable, "-m", "tests.benchmarks.brokers_work", kind, url, str(number), str(rounds), channel)
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
        )
        try:
            os.sched_setaffinity(process.pid, self.servers if there else self.own)
            async with asyncio.timeout(_WORK_PATIENCE):
                shown, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} has failed")
        return json.loads(shown)


# Deliveries


class Delivered(NamedTuple):
    cpu: float
    """The servers' seconds of processor time for each delivery, without the broker's own."""
    broker: float
    """The broker's, for each publication."""
    latencies: list[float]


async def _deliver(machine: Machine, url: str, workers: int, channel: str, load: Load, broker: int | None) -> Delivered:
    """One client sends, all get it, and only then comes the next message."""
    latencies: list[float] = []
    sent, arrived, everybody = 0.0, 0, asyncio.Event()

    def note(client: Client) -> None:
        nonlocal arrived
        latencies.append(time.perf_counter() - sent)
        arrived += 1
        if arrived == load.connections:
            everybody.set()

    async with contextlib.AsyncExitStack() as stack:
        servers = await stack.enter_async_context(machine.served(url, workers))
        opened = []
        for server in servers:
            each = clients(server.port, f"/channels/{channel}", load.connections // workers, on_message=note)
            opened += await stack.enter_async_context(each)

        async def send() -> None:
            nonlocal sent, arrived
            arrived, sent = 0, time.perf_counter()
            everybody.clear()
            opened[0].send(_TEXT)
            async with asyncio.timeout(_PATIENCE):
                await everybody.wait()

        # Also who is the last to subscribe has, a moment behind the handshake.
        await asyncio.sleep(0.3)
        await send()
        latencies.clear()
        pids = [server.process.pid for server in servers]
        before, broker_before = sum(map(cpu_seconds, pids)), cpu_seconds(broker) if broker else 0.0
        for _ in range(load.messages):
            await send()
        cpu = (sum(map(cpu_seconds, pids)) - before) / (load.messages * load.connections)
        of_broker = (cpu_seconds(broker) - broker_before) / load.messages if broker else 0.0
    return Delivered(cpu, of_broker, latencies)


async def _deliveries(machine: Machine, load: Load, rounds: int) -> list[Row]:
    found: dict[tuple[str, str], list[Delivered]] = {}
    trips = []
    for number in range(rounds):
        _tell(f"deliveries, round {number + 1} of {rounds}")
        with machine.redis() as server:
            for channel in ("plain", "kept:feed"):
                for name, url, workers, pid in (("memory", "memory://", 1, None), ("redis", server.url, 2, server.pid)):
                    delivered = await _deliver(machine, url, workers, channel, load, pid)
                    found.setdefault((name, channel), []).append(delivered)
            trips.append(statistics.median(await machine.work("round_trips", server.url, load.messages, 1, there=True)))
    rows = []
    each = f"{load.connections // 2} clients each, against one process with the memory broker"
    for channel, what in (("plain", ""), ("kept:feed", ", with a history")):
        memory, redis = found["memory", channel], found["redis", channel]
        cpu = [[of.cpu * 1e6 for of in some] for some in (redis, memory)]
        rows.append(Row(f"µs of CPU for each delivery{what}: two workers over Redis, {each}", *cpu, "≤ 1.3"))
        p50 = [statistics.median(of.latencies) * 1e3 for of in redis]
        bare = [statistics.median(of.latencies) * 1e3 + trip * 1e3 for of, trip in zip(memory, trips, strict=True)]
        name = f"p50 of the latency in ms{what}, against the memory broker's plus a round trip of redis-py's"
        rows.append(Row(name, p50, bare, "≤ 1.5"))
        rows.append(Row(f"µs of Redis' own CPU for each publication{what}", [of.broker * 1e6 for of in redis], []))
    rows.append(Row("(that round trip in µs)", [trip * 1e6 for trip in trips], []))
    return rows


# Publications


async def _publications(machine: Machine, load: Load, rounds: int) -> list[Row]:
    _tell(f"publications, {rounds} rounds")
    with machine.redis() as server:
        found = await machine.work("publish", server.url, load.publications, rounds)
    ours, bare, pipeline = ([rate for rate, _ in found[name]] for name in PUBLISHERS)
    cpu = [[cpu for _, cpu in found[name]] for name in PUBLISHERS]
    what = f"{CALLERS} callers with a history"
    return [
        Row(f"publications a second, {what}, against redis-py calling the same script", ours, bare, "≥ 0.7"),
        Row(f"the same, against redis-py's pipelines of {CALLERS}", ours, pipeline),
        Row("µs of the publisher's CPU for each, against redis-py", cpu[0], cpu[1]),
    ]


# Recovery


async def _recover(machine: Machine, server: RedisServer, load: Load, *, later: bool) -> tuple[float, int]:
    """Seconds until all have what they missed, and how often the history was read for that."""
    arrived, expected = 0, load.returning * load.missed
    everybody = asyncio.Event()

    def note(client: Client) -> None:
        nonlocal arrived
        arrived += 1
        if arrived == expected:
            everybody.set()

    server.command("FLUSHALL")
    async with Hub(server.url) as hub, machine.served(server.url, 1) as (worker,):
        hub.channel("kept:{name}", history=KEPT)
        position = str((await hub.history("kept:feed", limit=0)).position)
        for _ in range(load.missed):
            await hub.publish("kept:feed", _TEXT)
        # Warm: whoever comes first isn't the first of all.
        async with clients(worker.port, "/channels/plain", min(load.returning, 100), on_message=lambda client: None):
            pass
        if later:
            async with clients(worker.port, "/channels/kept:feed/later", load.returning, on_message=note) as opened:
                reads, begin = _scripts_run(server), time.perf_counter()
                for client in opened:
                    client.send(position)
                async with asyncio.timeout(_PATIENCE):
                    await everybody.wait()
                return time.perf_counter() - begin, _scripts_run(server) - reads
        reads, begin = _scripts_run(server), time.perf_counter()
        path = f"/channels/kept:feed?since={position}"
        async with clients(worker.port, path, load.returning, on_message=note), asyncio.timeout(_PATIENCE):
            await everybody.wait()
            return time.perf_counter() - begin, _scripts_run(server) - reads


def _scripts_run(server: RedisServer) -> int:
    """Nothing but publishing and reading a history runs one here."""
    found = re.search(r"cmdstat_evalsha:calls=(\d+)", server.command("INFO", "commandstats"))
    return int(found[1]) if found else 0


async def _recoveries(machine: Machine, load: Load, rounds: int) -> list[Row]:
    rows = []
    with machine.redis() as server:
        for later, what in ((True, "that all ask at once"), (False, "that all connect anew")):
            found = []
            for number in range(rounds):
                _tell(f"recovery of clients {what}, round {number + 1} of {rounds}")
                found.append(await _recover(machine, server, load, later=later))
            name = f"s until {load.returning:,} clients {what} have the {load.missed} that they missed"
            rows.append(Row(name, [seconds for seconds, _ in found], [], "≤ 3 s"))
            rows.append(Row("reads of the history for that, one at a time", [reads for _, reads in found], []))
        reads = await machine.work("come_back", server.url, load.returning, rounds)
        rows.append(Row(f"reads of it for {load.returning:,} subscribers that come in one tick", reads, [], "1"))
    return rows


# Channels that come and go


async def _churn(machine: Machine, load: Load, rounds: int) -> list[Row]:
    """Each with a fresh process. The first time it takes memory that it never had before."""
    rows = []
    with machine.redis() as server:
        for name, url in (("memory broker", "memory://"), ("Redis", server.url)):
            for channel, what in (("plain:", ""), ("kept:", ", with a history")):
                _tell(f"{load.channels:,} channels that come and go, {name}{what}")
                found = await machine.work("come_and_go", url, load.channels, _TIMES, channel)
                before, most, after = ([size / 1e6 for size, _ in moment] for moment in zip(*found, strict=True))
                blocks = [[count / 1e3 for _, count in moment] for moment in zip(*found, strict=True)]
                words = f"{load.channels:,} channels were subscribed, and left again: {name}{what}"
                rows += [
                    Row(f"1,000 blocks that Python has allocated after {words}", blocks[2], blocks[0], "≤ 1.05"),
                    Row("MB of memory with them, against before the first time", most[:1], before[:1]),
                    Row("after the first time", after[:1], before[:1], "≤ 1.05"),
                    Row(f"after the {_TIMES}th time, against the most with them", after[-1:], [max(most)]),
                ]
    return rows


# What is printed


def _table(rows: Sequence[Row]) -> str:
    """As Markdown: medians, in brackets the least and the most of the rounds. Ratios are those within one round."""
    lines = ["| | asgi_ws | compared with | ratio | goal |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        ratios = [ours / theirs for ours, theirs in zip(row.measured, row.compared, strict=bool(row.compared))]
        cells = [row.name, *map(_spread, (row.measured, row.compared, ratios)), row.goal]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    middle = plot.number(statistics.median(values))
    return f"{middle} ({plot.number(min(values))} to {plot.number(max(values))})" if len(values) > 1 else middle


def _tell(what: str) -> None:
    print(what[0].upper() + what[1:], file=sys.stderr)


def _busy_seconds() -> float:
    """The processor time of everything on this machine."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """That of this process, and of all that it has started and seen end."""
    return sum(os.times()[:4])


PARTS = {"deliveries": _deliveries, "publications": _publications, "recovery": _recoveries, "channels": _churn}


async def _measure(machine: Machine, load: Load, rounds: int, parts: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    for part in parts:
        rows += await PARTS[part](machine, load, rounds)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.brokers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often; medians are printed (default: 5)")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this only; may be given several times")
    parser.add_argument("--quick", action="store_true", help="only see that it works; the figures mean nothing")
    arguments = parser.parse_args(argv)
    if sys.platform != "linux":
        print("This reads the servers' processor time from /proc: it runs on Linux only.", file=sys.stderr)
        return 1
    if shutil.which("redis-server") is None:
        print("This needs redis-server, which isn't installed.", file=sys.stderr)
        return 1
    load, rounds = (QUICK, 1) if arguments.quick else (FULL, arguments.rounds)
    raise_limit_of_files()
    begin, busy, own = time.monotonic(), _busy_seconds(), _own_seconds()
    machine = Machine()
    os.sched_setaffinity(0, machine.own)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        print(_table(runner.run(_measure(machine, load, rounds, arguments.only or list(PARTS)))))
    took = time.monotonic() - begin
    others = (_busy_seconds() - busy - (_own_seconds() - own)) / took
    versions = ", ".join(f"{name} {version(name)}" for name in ("redis", "uvicorn", "starlette"))
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"\n{versions}, Python {python}; {rounds} round(s) in {took:.0f} s")
    print(f"Other work took {others:.1f} of {os.cpu_count()} processors meanwhile.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
