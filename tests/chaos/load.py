"""Nodes, their subscribers, and those who publish while something breaks."""

import asyncio
import contextlib
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import websockets

from asgi_ws import BrokerError, Hub, Limits, Position, PublicationsLost, Recovery
from tests.chaos.ledger import Follower, Ledger
from tests.e2e.clients import connect
from tests.servers import ROOT, Address, free_port

__all__ = ["Load", "chaos_hub", "follow_socket", "run_load", "workers"]

PATIENCE = 30.0
"""How long everybody has to get the last publication when all is well again, in seconds."""


def chaos_hub(url: str) -> Hub:
    """A hub as the workers have it."""
    hub = Hub(url, wait=True, limits=Limits(recovery=20_000, outbox_size=64 * 1024 * 1024))
    hub.channel("topic:{number}", history=20_000, ttl=600)
    return hub


class Load:
    """Topics, and what is published to them: `rate` publications a second over all of them."""

    def __init__(self, ledger: Ledger, topics: int, rate: float) -> None:
        self.ledger = ledger
        self.channels = [f"topic:{number}" for number in range(topics)]
        self.rate = rate
        self.stopped = False

    async def publish(self, hub: Hub, data: str, channel: str) -> bool:
        """One attempt; whether it was confirmed. What was not may have gone out or not, so it is not tried again by
        the same name."""
        self.ledger.attempt(channel, data)
        try:
            position = await hub.publish(channel, data)
        except BrokerError:
            self.ledger.refused += 1
            return False
        self.ledger.confirm(channel, data, position)
        return True

    async def publish_all(self, hub: Hub, channel: str) -> int:
        """Publish until `stopped`, and something to end with until it is confirmed. How many were confirmed."""
        interval = len(self.channels) / self.rate
        confirmed = number = 0
        due = time.monotonic() + random.uniform(0, interval)
        while not self.stopped:
            await asyncio.sleep(max(due - time.monotonic(), 0))
            due = max(due + interval, time.monotonic() - 1)
            number += 1
            confirmed += await self.publish(hub, f"{channel}/{number}", channel)
        deadline = time.monotonic() + PATIENCE
        while not await self.publish(hub, f"{channel}/last/{number}", channel):
            assert time.monotonic() < deadline, "nothing can be published any more"
            number += 1
            await asyncio.sleep(0.05)
        return confirmed + 1


async def follow(hub: Hub, follower: Follower) -> None:
    """Subscribe in this process, and again whenever that has ended."""
    since: Position | None = None
    while True:
        try:
            async with hub.subscribe(follower.channel, since=since) as publications:
                follower.begin(publications.recovery, since)
                if not publications.recovery.recovered:
                    since = publications.recovery.position
                async for publication in publications:
                    assert publication.position is not None
                    since = publication.position
                    follower.deliver(publication.position, publication.data)
        except PublicationsLost:
            follower.returns += 1
        except BrokerError:
            await asyncio.sleep(0.05)


async def follow_socket(
    address: Callable[[], str], follower: Follower, *, cut_every: float | None = None, pids: set[int] | None = None
) -> None:
    """The same by a WebSocket, as a page does it; `cut_every` so many seconds the client cuts it off itself."""
    since: str | None = None
    number = follower.channel.partition(":")[2]
    while True:
        with contextlib.suppress(OSError, websockets.WebSocketException, TimeoutError):
            query = f"?since={since}" if since else ""
            async with connect(f"{address()}/topics/{number}{query}", open_timeout=5, close_timeout=1) as socket:
                limit = None if cut_every is None else random.uniform(0.5, 1.5) * cut_every
                async with asyncio.timeout(limit):
                    async for words in socket:
                        said = json.loads(words)
                        if "recovered" in said:
                            recovery = Recovery(said["recovered"], Position.parse(said["position"]))
                            follower.begin(recovery, None if since is None else Position.parse(since))
                            since = since if recovery.recovered else said["position"]
                        elif "position" in said:
                            since = said["position"]
                            follower.deliver(Position.parse(since), said["data"])
                        elif pids is not None:
                            pids.add(said["pid"])
        follower.returns += 1
        await asyncio.sleep(random.uniform(0, 0.1))


async def run_load(
    load: Load,
    publisher_url: str,
    follow_all: Callable[[contextlib.AsyncExitStack], Awaitable[list[Awaitable[None]]]],
    fault: Callable[[], Awaitable[None]],
) -> None:
    """Publish to all topics while the fault goes on; then everybody is to get the last publication."""
    async with contextlib.AsyncExitStack() as stack:
        hub = await stack.enter_async_context(chaos_hub(publisher_url))
        following = [asyncio.ensure_future(each) for each in await follow_all(stack)]
        try:
            async with asyncio.timeout(PATIENCE):
                while not all(follower.began for follower in load.ledger.followers):
                    await asyncio.sleep(0.01)
            publishing = [asyncio.create_task(load.publish_all(hub, channel)) for channel in load.channels]
            try:
                await fault()
            finally:
                load.stopped = True
            await asyncio.gather(*publishing)
            last = {channel: data for (channel, _, _), data in load.ledger.confirmed.items()}
            async with asyncio.timeout(PATIENCE):
                for follower in load.ledger.followers:
                    await follower.until(last[follower.channel])
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)


class Workers(Address):
    """uvicorn with worker processes."""

    def __init__(self, port: int, process: asyncio.subprocess.Process) -> None:
        super().__init__(port)
        self.process = process


@contextlib.asynccontextmanager
async def workers(url: str, count: int, app: str = "tests.chaos.app:app") -> AsyncIterator[Workers]:
    """An application behind one port, by so many processes. They find the broker in CHAOS_BROKER."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "uvicorn", "--port", str(port), "--workers", str(count), "--log-level", "warning"),
        *("--ws", "asgi_ws.uvicorn:WebSocketProtocol", "--timeout-graceful-shutdown", "3", app),
        cwd=ROOT,
        env={**os.environ, "CHAOS_BROKER": url},
        stdin=asyncio.subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
            assert time.monotonic() < deadline, "the workers don't start"
            await asyncio.sleep(0.05)
        yield Workers(port, process)
    finally:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 15)
        except TimeoutError:
            process.kill()
            await process.wait()
