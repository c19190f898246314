"""examples/socketio_chat.html in Chromium, with socket.io-client from the npm package in the place of the CDN's."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse
from starlette.routing import Mount, Route

from examples import socketio_chat
from tests.e2e.clients import get
from tests.e2e.node import HERE, Browser, chromium, node
from tests.servers import OURS, serve

pytestmark = pytest.mark.anyio

PAGE = Path(socketio_chat.__file__).with_suffix(".html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


async def page(request: Request) -> HTMLResponse:
    text, count = re.subn(r'src="https://[^"]+/socket.io.min.js"', 'src="/client.js"', PAGE.read_text())
    assert count == 1
    return HTMLResponse(text)


async def client(request: Request) -> FileResponse:
    return FileResponse(HERE / "node_modules/socket.io-client/dist/socket.io.min.js")


def shows(text: str) -> str:
    return f"[...document.querySelectorAll('#messages li')].some(item => item.textContent === {text!r})"


async def test_two_people_chat(browser: Browser) -> None:
    node("socket.io-client")
    routes = [Route("/", page), Route("/client.js", client), Mount("/", socketio_chat.app)]
    async with serve(Starlette(routes=routes), ws=OURS) as server:
        async with browser.page(f"{server.http}/?name=ann") as ann:
            await ann.until(shows("Welcome to lobby!"))
            await ann.until("document.querySelector('#state').textContent === 'connected by websocket'")
            async with browser.page(f"{server.http}/?name=bob") as bob:
                await bob.until(shows("Welcome to lobby!"))
                await ann.until(shows("bob is here"))
                await bob.fill("#text", "<b>hello</b> 👋")
                await bob.press("#text", "Enter")
                for who in (ann, bob):
                    await who.until(shows("bob: <b>hello</b> 👋"))
                assert (await get(f"{server.http}/announce/lobby?text=closing", "POST")).status_code == 200
                for who in (ann, bob):
                    await who.until(shows("the house: closing"))
            await ann.until(shows("bob has left (transport close)"))
        async with browser.page(f"{server.http}/?name=") as nobody:
            await nobody.until(shows("a name is needed"))
