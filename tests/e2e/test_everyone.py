"""examples/everyone_together.py: what the page and Node have, in one room of two processes."""

import sys
from collections.abc import Iterator

import pytest

from examples import everyone_together
from tests.e2e.clients import until
from tests.e2e.node import Browser, NodeClient, Page, chromium, everyone
from tests.servers import OURS, run_process, serve
from tests.services import redis_server

pytestmark = pytest.mark.anyio

CLIENTS = ["websocket", "eventsource", "engineio", "socketio", "centrifuge"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


async def connected(page: Page, clients: NodeClient) -> None:
    """All of the page's clients, and all of Node's."""
    opened = {(await clients.event("open"))["client"] for _ in CLIENTS}
    assert opened == set(CLIENTS)
    await page.until(f"document.querySelectorAll('section').length === {len(CLIENTS)}")
    for client in CLIENTS:
        way = " by websocket" if client in ("engineio", "socketio", "centrifuge") else ""
        await page.until(f"document.querySelector('#{client} output').textContent === 'connected{way}'")


async def say_all(page: Page, clients: NodeClient) -> list[str]:
    """Have every client say something, one after another, each when all have seen what was before."""
    said = []
    for client in CLIENTS:
        for where in ("node", "page"):
            text = f"{client} of {where}"
            if where == "node":
                clients.command(client=client, text=text)
            else:
                await page.fill(f"#{client} input", text)
                await page.press(f"#{client} input", "Enter")
            said.append(text)
            seen = [await clients.event("message") for _ in CLIENTS]
            assert {event["client"] for event in seen} == set(CLIENTS)
            assert {event["text"] for event in seen} == {text}
            for each in CLIENTS:
                await page.until(f"document.querySelectorAll('#{each} li').length === {len(said)}")
    return said


async def shown(page: Page, client: str) -> list[str]:
    texts: list[str] = await page.evaluate(
        f"[...document.querySelectorAll('#{client} li')].map(item => item.firstChild.textContent.trim())"
    )
    return texts


async def test_everybody_sees_what_everybody_says(browser: Browser) -> None:
    async with (
        serve(everyone_together.app, ws=OURS) as server,
        everyone(f"127.0.0.1:{server.port}") as clients,
        browser.page(server.http) as page,
    ):
        await connected(page, clients)
        said = await say_all(page, clients)
        for client in CLIENTS:
            assert await shown(page, client) == said


async def test_also_where_they_come_to_two_processes_over_redis(browser: Browser) -> None:
    command = [sys.executable, "-m", "asgi_ws", "run", "examples.everyone_together:app"]
    with redis_server() as redis:
        async with run_process(
            *(*command, "--port", "{port}", "--workers", "2"),
            ready="Application startup complete",
            BROKER_URL=redis.url,
        ) as server:
            await until(lambda: server.output.count("Application startup complete") == 2, 15)
            async with everyone(f"127.0.0.1:{server.port}") as clients, browser.page(server.http) as page:
                await connected(page, clients)
                said = await say_all(page, clients)
                for client in CLIENTS:
                    assert await shown(page, client) == said
