"""What breaks. Each scenario returns the ledger of what happened, and what was measured besides."""

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

from tests.chaos.ledger import Ledger
from tests.chaos.load import Load, chaos_hub, follow, follow_socket, run_load, workers
from tests.chaos.proxy import proxy
from tests.services import RedisServer, redis_sentinel, redis_server
from tests.services_nats import NatsServer, nats_server

__all__ = ["SCENARIOS", "Outcome", "Scale"]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much of it."""

    topics: int = 4
    followers: int = 2
    """How many follow each topic, on each of two nodes."""
    rate: float = 200
    times: int = 3
    """How often it breaks."""
    pause: float = 1.0
    """How many seconds lie between."""
    hang: float = 6.0


@dataclasses.dataclass
class Outcome:
    ledger: Ledger
    may_be_told: bool = False
    """Whether losses are in order, as long as everybody is told."""
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    def problems(self) -> list[str]:
        found = self.ledger.problems() + self.ledger.missing()
        if self.ledger.told and not self.may_be_told:
            found.append(f"{self.ledger.told} times somebody was told that he can't have all, and everything was there")
        return found


async def _two_nodes(
    scale: Scale, urls: tuple[str, str], fault: Callable[[Ledger], Awaitable[None]], publisher: str | None = None
) -> Ledger:
    """Two hubs, each with followers of all topics."""
    ledger = Ledger()
    load = Load(ledger, scale.topics, scale.rate)

    async def follow_all(stack: contextlib.AsyncExitStack) -> list[Awaitable[None]]:
        following: list[Awaitable[None]] = []
        for node, url in enumerate(urls):
            hub = await stack.enter_async_context(chaos_hub(url))
            for channel in load.channels:
                for number in range(scale.followers):
                    follower = ledger.follower(f"node {node} {channel} #{number}", channel)
                    following.append(follow(hub, follower))
        return following

    await run_load(load, publisher or urls[0], follow_all, lambda: fault(ledger))
    return ledger


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


async def _killed(scale: Scale, server: RedisServer | NatsServer) -> Outcome:
    """kill -9 and restart."""
    firsts: list[float] = []

    async def fault(ledger: Ledger) -> None:
        for _ in range(scale.times):
            await asyncio.sleep(scale.pause)
            server.kill()
            await asyncio.sleep(0.5)
            await asyncio.to_thread(server.start)
            firsts.append(time.monotonic())
        await asyncio.sleep(scale.pause)

    ledger = await _two_nodes(scale, (server.url, server.url), fault)
    waits = [wait for moment in firsts for wait in ledger.latencies_after(moment)]
    return Outcome(ledger, figures={"first delivery p99 (s)": round(_percentile(waits, 0.99), 2)})


async def redis_killed_with_its_memory(scale: Scale) -> Outcome:
    """kill -9 and restart without anything on disk: nobody can have all, and everybody is told."""
    with redis_server() as server:
        outcome = await _killed(scale, server)
    outcome.may_be_told = True
    return outcome


async def redis_killed_durable(scale: Scale) -> Outcome:
    """kill -9 and restart with an append-only file that is synced always: nothing is lost, and nobody is told."""
    with redis_server(appendonly="yes", appendfsync="always") as server:
        return await _killed(scale, server)


async def nats_killed(scale: Scale) -> Outcome:
    """kill -9 and restart of NATS, whose streams are on disk."""
    with nats_server() as server:
        return await _killed(scale, server)


async def redis_hangs(scale: Scale) -> Outcome:
    """SIGSTOP and SIGCONT: how soon a publisher knows, and how soon all is well."""
    figures: dict[str, Any] = {}
    with redis_server() as server:

        async def fault(ledger: Ledger) -> None:
            await asyncio.sleep(scale.pause)
            refused = ledger.refused
            server.pause()
            begin = time.monotonic()
            try:
                while ledger.refused == refused:
                    await asyncio.sleep(0.01)
                figures["noticed after (s)"] = round(time.monotonic() - begin, 2)
                await asyncio.sleep(max(scale.hang - (time.monotonic() - begin), 0))
            finally:
                server.resume()
            moment = time.monotonic()
            await asyncio.sleep(max(scale.pause, 3))
            figures["healed after (s)"] = round(max(ledger.latencies_after(moment)), 2)

        ledger = await _two_nodes(scale, (server.url, server.url), fault)
    return Outcome(ledger, figures=figures)


async def network_breaks(scale: Scale) -> Outcome:
    """A proxy in front of one of the nodes slices, delays, drops, resets and swallows."""
    with redis_server() as server:
        async with proxy(server.port) as between:

            async def fault(ledger: Ledger) -> None:
                for _ in range(max(scale.times // 3, 1)):
                    between.slice = 7
                    await asyncio.sleep(scale.pause)
                    between.slice, between.delay = 0, 0.05
                    await asyncio.sleep(scale.pause)
                    between.delay = 0
                    between.drop()
                    await asyncio.sleep(scale.pause)
                    between.reset()
                    await asyncio.sleep(scale.pause)
                    between.blackhole()
                    await asyncio.sleep(scale.hang)
                    between.heal()
                    await asyncio.sleep(scale.pause)

            ledger = await _two_nodes(
                scale, (server.url, f"redis://127.0.0.1:{between.port}"), fault, publisher=server.url
            )
    return Outcome(ledger)


async def links_killed(scale: Scale) -> Outcome:
    """CLIENT KILL of everybody who subscribes, and of everybody else."""
    with redis_server() as server:

        async def fault(ledger: Ledger) -> None:
            for number in range(scale.times * 2):
                await asyncio.sleep(scale.pause / 2)
                kind = "pubsub" if number % 2 else "normal"
                await asyncio.to_thread(server.command, "CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
            await asyncio.sleep(scale.pause)

        return Outcome(await _two_nodes(scale, (server.url, server.url), fault))


async def subscriber_is_cut_off_for_its_buffer(scale: Scale) -> Outcome:
    """More is published than Redis keeps for a subscriber that is held up: it cuts him off."""
    with redis_server(client_output_buffer_limit="pubsub 64kb 32kb 1") as server:
        async with proxy(server.port) as between:

            async def fault(ledger: Ledger) -> None:
                for _ in range(scale.times):
                    between.blackhole()
                    async with chaos_hub(server.url) as hub:
                        for number in range(200):
                            channel = "topic:0"
                            data = f"large {random.random()} {number} " + "x" * 4096
                            ledger.attempt(channel, data)
                            ledger.confirm(channel, data, await hub.publish(channel, data))
                    between.heal()
                    await asyncio.sleep(scale.pause)

            return Outcome(
                await _two_nodes(scale, (server.url, f"redis://127.0.0.1:{between.port}"), fault, publisher=server.url)
            )


async def memory_runs_out(scale: Scale) -> Outcome:
    """`maxmemory` refuses writes for a while: whoever publishes is told."""
    with redis_server(maxmemory_policy="noeviction") as server:

        async def fault(ledger: Ledger) -> None:
            for _ in range(scale.times):
                await asyncio.sleep(scale.pause / 2)
                server.command("CONFIG", "SET", "maxmemory", "1mb")
                refused = ledger.refused
                async with asyncio.timeout(10):
                    while ledger.refused < refused + 5:
                        await asyncio.sleep(0.01)
                server.command("CONFIG", "SET", "maxmemory", "0")
            await asyncio.sleep(scale.pause / 2)

        return Outcome(await _two_nodes(scale, (server.url, server.url), fault))


async def sentinel_fails_over(scale: Scale) -> Outcome:
    """The master is killed and its replica takes over, which may lack the last of what was confirmed."""
    with redis_sentinel() as group:

        async def fault(ledger: Ledger) -> None:
            await asyncio.sleep(scale.pause)
            group.master.kill()
            moment = time.monotonic()
            async with asyncio.timeout(20):
                while max(ledger.latencies_after(moment + 0.2)) == float("inf"):
                    await asyncio.sleep(0.05)
            await asyncio.sleep(scale.pause)

        return Outcome(await _two_nodes(scale, (group.url, group.url), fault), may_be_told=True)


async def _sockets(
    scale: Scale, server: RedisServer, fault: Callable[[Ledger, set[int]], Awaitable[None]], cut_every: float | None
) -> Ledger:
    """Two workers behind one port, and followers who come by WebSocket."""
    ledger = Ledger()
    load = Load(ledger, scale.topics, scale.rate)
    pids: set[int] = set()

    async def follow_all(stack: contextlib.AsyncExitStack) -> list[Awaitable[None]]:
        address = await stack.enter_async_context(workers(server.url, 2))
        return [
            follow_socket(
                lambda: address.ws,
                ledger.follower(f"{channel} #{number}", channel),
                cut_every=cut_every,
                pids=pids,
            )
            for channel in load.channels
            for number in range(scale.followers * 2)
        ]

    await run_load(load, server.url, follow_all, lambda: fault(ledger, pids))
    return ledger


async def clients_cut(scale: Scale) -> Outcome:
    """Every client is cut off every two seconds and comes back with its position, to whichever worker."""
    with redis_server() as server:

        async def fault(ledger: Ledger, pids: set[int]) -> None:
            await asyncio.sleep(scale.times * 2.5)

        ledger = await _sockets(scale, server, fault, cut_every=2)
    returns = sum(follower.returns for follower in ledger.followers)
    return Outcome(ledger, figures={"returns": returns})


async def worker_killed(scale: Scale) -> Outcome:
    """kill -9 of one of two workers under load; its clients go to the other, or to the one that takes its place."""
    with redis_server() as server:

        async def fault(ledger: Ledger, pids: set[int]) -> None:
            for _ in range(scale.times):
                await asyncio.sleep(scale.pause)
                pid = random.choice(sorted(pids))
                pids.discard(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(scale.pause * 2)

        return Outcome(await _sockets(scale, server, fault, cut_every=None))


SCENARIOS: dict[str, Callable[[Scale], Awaitable[Outcome]]] = {
    scenario.__name__.replace("_", " "): scenario
    for scenario in (
        redis_killed_durable,
        redis_killed_with_its_memory,
        redis_hangs,
        network_breaks,
        links_killed,
        subscriber_is_cut_off_for_its_buffer,
        memory_runs_out,
        sentinel_fails_over,
        clients_cut,
        worker_killed,
        nats_killed,
    )
}
