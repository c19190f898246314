"""The browser's EventSource in Chromium, and streams over HTTP/2."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from asgi_ws import Connection, Hub, WebSocketMiddleware
from tests.e2e.clients import until
from tests.e2e.node import Browser, chromium
from tests.servers import Address, serve, serve_hypercorn

pytestmark = pytest.mark.anyio

PAGE = """
<title>news</title>
<script>
  window.seen = []; window.ended = []; window.opened = 0;
  const source = window.source = new EventSource(new URLSearchParams(location.search).get("from") ?? "/news");
  source.onopen = () => opened++;
  source.onmessage = event => seen.push(event.data);
  source.addEventListener("binary", event => seen.push([...atob(event.data)].map(c => c.charCodeAt(0))));
  source.addEventListener("close", event => ended.push(JSON.parse(event.data).code));
</script>
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


class Site:
    def __init__(self, **options: Any) -> None:
        self.hub = Hub(**options)
        self.connections: list[Connection] = []
        self.requests = 0

        async def page(request: Request) -> Response:
            return HTMLResponse(PAGE)

        middleware = [Middleware(WebSocketMiddleware, hub=self.hub)]
        self.app = Starlette(routes=[Route("/", page)], middleware=middleware)

        @self.hub.channel("news", history=100)
        async def anybody(conn: Connection) -> bool:
            return True

        @self.hub.on_connect
        async def count(conn: Connection) -> None:
            self.requests += 1

        @self.hub.websocket("/news")
        async def news(conn: Connection) -> None:
            await conn.subscribe("news")
            self.connections.append(conn)
            with contextlib.suppress(Exception):
                await conn.receive()
            self.connections.remove(conn)

        @self.hub.websocket("/once")
        async def once(conn: Connection) -> None:
            await conn.send("all there is")


async def test_event_source_comes_back_for_what_it_missed(browser: Browser) -> None:
    site = Site()
    async with serve(site.app) as server, browser.page(server.http) as page:
        await until(lambda: site.connections)
        await site.hub.publish("news", "<b>one</b>\ntwo")
        await site.hub.publish("news", {"__proto__": {"x": 1}})
        await site.hub.publish("news", b"\x00\x80\xff")
        await page.until("seen.length === 3")
        assert await page.evaluate("seen") == ["<b>one</b>\ntwo", '{"__proto__":{"x":1}}', [0, 128, 255]]
        connection = site.connections[0]
        connection.cut(1013, "come back")
        await until(lambda: not site.connections)
        for n in range(5):
            await site.hub.publish("news", str(n))
        await page.until("seen.length === 8")
        await site.hub.publish("news", "again")
        await page.until("seen.length === 9")
        assert (await page.evaluate("seen"))[3:] == ["0", "1", "2", "3", "4", "again"]
        assert await page.evaluate("ended") == [1013]
        assert site.connections[0].transport == "sse"


async def test_event_source_stops_when_there_is_nothing_more(browser: Browser) -> None:
    site = Site()
    async with serve(site.app) as server, browser.page(f"{server.http}/?from=/once") as page:
        await page.until("ended.length === 1")
        # It comes back once, and is told not to.
        await page.until("source.readyState === EventSource.CLOSED")
        assert await page.evaluate("seen") == ["all there is"]
        assert await page.evaluate("ended") == [1000]
        assert site.requests == 1


async def test_page_of_another_origin_needs_to_be_allowed(browser: Browser) -> None:
    site, other = Site(), Site()
    async with serve(other.app) as pages:
        friendly = Site(allowed_origins=[pages.http])
        async with serve(site.app) as strict, serve(friendly.app) as open_:
            async with browser.page(f"{pages.http}/?from={open_.http}/news") as page:
                await until(lambda: friendly.connections)
                await friendly.hub.publish("news", "hello")
                await page.until("seen.length === 1")
            async with browser.page(f"{pages.http}/?from={strict.http}/news") as page:
                await page.until("source.readyState === EventSource.CLOSED")
            assert site.requests == 0


@contextlib.asynccontextmanager
async def streamed(server: Address, **options: Any) -> AsyncIterator[httpx2.Response]:
    async with httpx2.AsyncClient(trust_env=False, **options) as client:
        headers = {"accept": "text/event-stream"}
        async with client.stream("GET", f"{server.http}/news", headers=headers) as response:
            yield response


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/2"])
async def test_hypercorn_streams_events(version: str) -> None:
    site = Site()
    options = {"http1": False, "http2": True} if version == "HTTP/2" else {}
    async with serve_hypercorn(site.app) as server:
        async with streamed(server, **options) as response:
            assert response.http_version == version
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            await until(lambda: site.connections)
            await site.hub.publish("news", "hello")
            text = ""
            async with asyncio.timeout(5):
                async for chunk in response.aiter_text():
                    text += chunk
                    if "data: hello\n\n" in text:
                        break
            assert "id: news=1:" in text
        await until(lambda: not site.connections)
