"""Sessions of several requests, with several workers and nothing that sends a client to the same one again."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.chaos.load import workers
from tests.e2e.node import NodeClient, engine_client
from tests.servers import Address
from tests.services import RedisServer, redis_server

pytestmark = pytest.mark.anyio

MESSAGES = 200


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@contextlib.asynccontextmanager
async def four_workers(redis: RedisServer) -> AsyncIterator[Address]:
    async with workers(redis.url, 4, "tests.e2e.relay_app:app") as address:
        yield address


async def talk(client: NodeClient) -> None:
    """Send many messages, and get the answers to all, in order."""
    for number in range(MESSAGES):
        await client.send(f"message {number}")
    for number in range(MESSAGES):
        assert await client.receive() == f"{number} message {number}"


@pytest.mark.parametrize("transports", [["polling"], ["polling", "websocket"]], ids=",".join)
async def test_nothing_is_lost_or_doubled_whichever_worker_a_request_reaches(
    redis: RedisServer, transports: list[str]
) -> None:
    async with four_workers(redis) as server, contextlib.AsyncExitStack() as stack:
        clients = []
        for _ in range(4):
            client = await stack.enter_async_context(engine_client(server.http, "/count", transports=transports))
            await client.event("open")
            assert str(await client.receive()).startswith("process")
            if len(transports) > 1:
                assert await client.event("upgrade") == {"transport": "websocket"}
            clients.append(client)
        await asyncio.gather(*map(talk, clients))


async def test_a_session_whose_owner_died_begins_anew_at_once(redis: RedisServer) -> None:
    async with (
        four_workers(redis) as server,
        engine_client(server.http, "/count", transports=["polling"], again=True) as client,
    ):
        await client.event("open")
        owner = int(str(await client.receive()).split()[1])
        await client.send("here")
        assert await client.receive() == "0 here"
        os.kill(owner, signal.SIGKILL)
        async with asyncio.timeout(10):
            await client.event("open")
            assert await client.receive() != f"process {owner}"
            await client.send("here again")
            assert await client.receive() == "0 here again"
