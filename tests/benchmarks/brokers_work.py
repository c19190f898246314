"""What `brokers` has done in processes of their own: publishing, round trips, and channels that come and go.

`python -m tests.benchmarks.brokers_work KIND URL NUMBER ROUNDS [CHANNEL]` prints JSON.
"""

import asyncio
import contextlib
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from importlib import resources
from typing import Any

import redis.asyncio

from asgi_ws import Hub
from asgi_ws.messages import Publication
from tests.benchmarks.end_to_end import loop_factory, resident_bytes

__all__ = ["CALLERS", "PUBLISHERS"]

CALLERS = 64
"""How many publish at once."""
_TEXT = "x" * 128
_HISTORY = 100
_DAY = 24 * 60 * 60 * 1000
_AT_ONCE = 1000
_PATIENCE = 5

Publish = Callable[[], Awaitable[Any]]


# Publishing: each of these is given a URL, and is entered with so many callers' way to publish one or more.


@contextlib.asynccontextmanager
async def _hub(url: str) -> AsyncIterator[tuple[Publish, int]]:
    async with Hub(url) as hub:
        hub.channel("kept:{name}", history=_HISTORY)
        yield lambda: hub.publish("kept:ours", _TEXT), 1


async def _script(client: redis.asyncio.Redis) -> tuple[Any, ...]:
    """The command that publishes once, with the arguments that the broker would give."""
    text = resources.files("asgi_ws.brokers").joinpath("redis_stream.lua").read_text()
    hash_ = await client.script_load(text)
    info = await client.info("server")
    body = b"\x00" + b"\xc4" + bytes([len(_TEXT)]) + _TEXT.encode() + b"\xc0"
    channel = "bare:0:{kept:theirs}"
    keys = ("bare:meta:{kept:theirs}", "bare:stream:{kept:theirs}")
    what = ("publish", info["run_id"], "0", "bare-1", 2 * _DAY, "PUBLISH", channel, _HISTORY, _DAY, body)
    return hash_, len(keys), *keys, *what


@contextlib.asynccontextmanager
async def _redis_py(url: str) -> AsyncIterator[tuple[Publish, int]]:
    async with redis.asyncio.Redis.from_url(url) as client:
        script = await _script(client)
        yield lambda: client.evalsha(*script), 1


@contextlib.asynccontextmanager
async def _pipeline(url: str) -> AsyncIterator[tuple[Publish, int]]:
    """One caller that sends as many at once as there are callers elsewhere."""
    async with redis.asyncio.Redis.from_url(url) as client:
        script = await _script(client)

        async def publish() -> None:
            async with client.pipeline(transaction=False) as pipeline:
                for _ in range(CALLERS):
                    pipeline.evalsha(*script)
                await pipeline.execute()

        yield publish, CALLERS


PUBLISHERS = {"asgi_ws": _hub, "redis-py": _redis_py, "redis-py, a pipeline": _pipeline}


async def publish(url: str, number: int, rounds: int, channel: str) -> dict[str, Any]:
    """Publications each second, and the processor's µs for one in this process, by who publishes; they take turns."""
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in PUBLISHERS}
    async with contextlib.AsyncExitStack() as stack:
        ways = {name: await stack.enter_async_context(publisher(url)) for name, publisher in PUBLISHERS.items()}
        for name, (publish_some, each) in ways.items():
            await _call(publish_some, CALLERS // each, CALLERS // each)
            figures[name].clear()
        for _ in range(rounds):
            for name, (publish_some, each) in ways.items():
                begin, busy = time.perf_counter(), time.process_time()
                await _call(publish_some, number // each, CALLERS // each)
                took, busy = time.perf_counter() - begin, time.process_time() - busy
                figures[name].append((number / took, busy / number * 1e6))
    return figures


async def _call(publish_some: Publish, number: int, callers: int) -> None:
    left = number

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await publish_some()

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())


async def round_trips(url: str, number: int, rounds: int, channel: str) -> list[float]:
    """Seconds from the call that publishes to the message's arrival, both by redis-py."""
    times = []
    async with redis.asyncio.Redis.from_url(url) as client, client.pubsub() as pubsub:
        await pubsub.subscribe("bare")
        await pubsub.get_message(timeout=_PATIENCE)
        for _ in range(number):
            begin = time.perf_counter()
            sent = asyncio.create_task(client.publish("bare", _TEXT))
            message = await pubsub.get_message(timeout=_PATIENCE)
            assert message is not None
            assert message["type"] == "message"
            times.append(time.perf_counter() - begin)
            await sent
    return times


async def come_back(url: str, number: int, rounds: int, channel: str) -> list[int]:
    """How often the history is read for so many subscribers that come back in one tick of the loop."""
    reads = []
    async with Hub(url) as hub, redis.asyncio.Redis.from_url(url) as client:
        hub.channel("kept:{name}", history=_HISTORY)
        pubsub = hub.context.pubsub

        async def scripts_run() -> int:
            return int((await client.info("commandstats"))["cmdstat_evalsha"]["calls"])

        for round_ in range(rounds):
            name = f"kept:{round_}"
            position = (await hub.history(name, limit=0)).position
            await hub.publish(name, _TEXT)
            before = await scripts_run()
            async with asyncio.timeout(_PATIENCE), asyncio.TaskGroup() as group:
                coming = [group.create_task(pubsub.subscribe(name, _Recorder(), since=position)) for _ in range(number)]
            assert all(one.result().recovered for one in coming)
            reads.append(await scripts_run() - before)
    return reads


class _Recorder:
    def __init__(self) -> None:
        self.publications: list[Publication] = []

    def push(self, publication: Publication) -> None:
        self.publications.append(publication)


async def come_and_go(url: str, number: int, rounds: int, channel: str) -> list[list[tuple[int, int]]]:
    """This process's memory before, with, and after so many channels, of names that are new in each round: its bytes,
    and how many blocks Python has allocated, which says the same without the gaps between them."""
    found = []
    async with Hub(url) as hub:
        hub.channel("kept:{name}", history=_HISTORY)
        pubsub, subscriber = hub.context.pubsub, _Recorder()

        async def subscribe(name: str) -> None:
            await pubsub.subscribe(name, subscriber)

        async def unsubscribe(name: str) -> None:
            await pubsub.unsubscribe([name], subscriber)

        async def all_of(round_: int, count: int) -> list[tuple[int, int]]:
            """With them, and without."""
            await _at_once(subscribe, (f"{channel}{round_}-{index}" for index in range(count)))
            most = _memory()
            await _at_once(unsubscribe, (f"{channel}{round_}-{index}" for index in range(count)))
            # What the broker was told last, it has heard when this was answered.
            await subscribe("last")
            await unsubscribe("last")
            return [most, _memory()]

        # What a process allocates the first time, and keeps whatever comes.
        await all_of(0, min(number, _AT_ONCE))
        for round_ in range(1, rounds + 1):
            before = _memory()
            found.append([before, *await all_of(round_, number)])
    return found


async def _at_once(do: Callable[[str], Coroutine[Any, Any, None]], names: Iterable[str]) -> None:
    """A thousand at a time. Not by `asyncio.gather`, whose every call leaves a few bytes in a cache of CPython's, and
    those hold whole megabytes."""
    rest = iter(names)
    while some := list(itertools.islice(rest, _AT_ONCE)):
        async with asyncio.timeout(_PATIENCE), asyncio.TaskGroup() as group:
            for name in some:
                group.create_task(do(name))


def _memory() -> tuple[int, int]:
    gc.collect()
    return resident_bytes(os.getpid()), sys.getallocatedblocks()


KINDS = {each.__name__: each for each in (publish, round_trips, come_back, come_and_go)}


def main(kind: str, url: str, number: str, rounds: str, channel: str = "") -> None:
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        print(json.dumps(runner.run(KINDS[kind](url, int(number), int(rounds), channel))))


if __name__ == "__main__":
    main(*sys.argv[1:])
