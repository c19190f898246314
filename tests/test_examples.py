"""The programs in examples/ that the tests of real clients don't run."""

import asyncio
import os
import sys

import pytest

from asgi_ws import ConnectionClosed, Hub
from asgi_ws.testing import connect, request
from examples import dashboard, feed, who_is_online, worker
from tests.programs import program
from tests.servers import ROOT, run_process

pytestmark = pytest.mark.anyio


async def test_dashboard_shows_what_is_reported_and_keeps_secrets() -> None:
    async with connect(dashboard.app, "/watch/load") as client:
        await request(dashboard.app, "POST", "/metrics/load?value=0.5")
        assert await client.receive_json() == {"value": 0.5}
    async with connect(dashboard.app, "/watch/secret-load") as client:
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
        assert closed.value.code == 1008


async def test_feed_gives_what_was_missed_or_says_that_it_cannot() -> None:
    async with feed.hub:
        async with connect(feed.app, "/feed") as client:
            begun = await client.receive_json()
            assert (begun["channel"], begun["recovered"]) == ("news", False)
            await request(feed.app, "POST", "/news?text=one")
            first = await client.receive_json()
            assert (first["channel"], first["data"]) == ("news", "one")
        await request(feed.app, "POST", "/news?text=two")
        last = (await request(feed.app, "POST", "/news?text=three")).json()
        assert (await request(feed.app, "GET", "/news")).json() == {"position": last, "news": ["one", "two", "three"]}
        async with connect(feed.app, f"/feed?since={first['position']}") as client:
            assert await client.receive_json() == {"channel": "news", "recovered": True, "position": last}
            assert [(await client.receive_json())["data"] for _ in range(2)] == ["two", "three"]
        async with connect(feed.app, "/feed?since=1:another-epoch") as client:
            assert await client.receive_json() == {"channel": "news", "recovered": False, "position": last}
        async with connect(feed.app, "/feed?since=yesterday") as client:
            with pytest.raises(ConnectionClosed) as closed:
                await client.receive()
            assert (closed.value.code, closed.value.reason) == (1008, "not a position: 'yesterday'")


async def test_who_comes_is_told_to_those_who_are_there_and_counted_once() -> None:
    app = who_is_online.app
    async with who_is_online.hub, connect(app, "/lobby?name=ann") as ann:
        event = await ann.receive_json()
        assert (event["type"], event["user"]) == ("join", "ann")
        async with connect(app, "/lobby?name=bob") as bob, connect(app, "/lobby?name=bob") as again:
            assert (await ann.receive_json())["user"] == "bob"
            await again.send("who is here?")
            assert [member["user"] for member in await again.receive_json()] == ["ann", "bob", "bob"]
            assert (await bob.receive_json())["user"] == "bob"
            assert (await request(app, "GET", "/count")).json() == {"connections": 3, "users": 2}


async def test_worker_reaches_the_pages_over_redis() -> None:
    command = [program("redis-server"), "--port", "{port}", "--bind", "127.0.0.1", "--save", ""]
    async with run_process(*command, ready="Ready to accept connections") as redis:
        url = f"redis://127.0.0.1:{redis.port}"
        hub = Hub(url)
        hub.channel("news", history=100)
        async with hub, hub.subscribe("news") as publications:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "examples.worker"),
                cwd=ROOT,
                env={**os.environ, "BROKER_URL": url},
                stdout=asyncio.subprocess.PIPE,
            )
            seen = [await asyncio.wait_for(anext(publications), 10) for _ in range(6)]
            output, _ = await asyncio.wait_for(process.communicate(), 10)
    assert [publication.data for publication in seen] == [
        *(f"the job is at {percent} %" for percent in range(0, 100, 20)),
        "the job is done",
    ]
    assert process.returncode == 0
    # Kept, by the rules of a hub that the worker knows nothing of.
    assert output.decode() == f"published at {seen[-1].position}\n"
    assert seen[-1].position is not None


def test_worker_is_told_that_memory_is_nobodys_but_the_applications() -> None:
    with pytest.raises(ValueError, match="from outside, nobody can be reached there"):
        worker.finished("memory://")


def test_every_example_is_shown_and_has_its_command() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    for path in (ROOT / "examples").glob("*.py"):
        if path.stem != "broadcast_to_all":
            assert f'--8<-- "examples/{path.name}"' in pages, path.name
        assert f"examples.{path.stem}" in path.read_text().partition('"""\n')[0], path.name
