"""examples/sse_feed.html in Chromium."""

from collections.abc import Iterator

import pytest

from examples import sse_feed
from tests.e2e.clients import until
from tests.e2e.node import Browser, Page, chromium
from tests.servers import OURS, serve

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


async def shows(page: Page, *lines: tuple[str, str]) -> None:
    """Wait until the page shows these, and no others."""
    await page.until(f"document.querySelectorAll('#news li').length >= {len(lines)}")
    found = await page.evaluate(
        "[...document.querySelectorAll('#news li')].map(i => [...i.childNodes].map(c => c.textContent))"
    )
    assert [tuple(line) for line in found] == list(lines)


async def cut() -> None:
    """End the streams of all pages, as a server that restarts does, until they come back."""
    connections = list(sse_feed.hub.context.clients)
    for connection in connections:
        await sse_feed.hub.disconnect(connection=connection, code=1012)
    await until(lambda: not set(connections) & set(sse_feed.hub.context.clients))


async def test_a_page_gets_what_it_missed_of_each_topic_or_is_told(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The delay of a page that comes back.
    monkeypatch.setattr("asgi_ws.transports.sse.random.randint", lambda low, high: low // 5)
    async with serve(sse_feed.app, ws=OURS) as server, browser.page(server.http) as page:
        await page.until("document.querySelector('#state').textContent === 'connected'")
        await page.fill("#text", "<i>rain</i>")
        await page.press("#text", "Enter")
        await shows(page, ("weather", "<i>rain</i>"))
        await sse_feed.hub.publish("news:sport", "one all")
        await shows(page, ("weather", "<i>rain</i>"), ("sport", "one all"))
        await cut()
        for number in range(101):
            await sse_feed.hub.publish("news:sport", str(number))
        await sse_feed.hub.publish("news:weather", "clouds")
        await sse_feed.hub.publish("news:weather", "sun")
        lines = [("weather", "<i>rain</i>"), ("sport", "one all")]
        # Its topics in the order in which it subscribes to them; of sport, more than is kept.
        lines += [("weather", "clouds"), ("weather", "sun"), ("sport", "something was missed")]
        await shows(page, *lines)
        assert await page.evaluate("opened") == 2
        await sse_feed.hub.publish("news:sport", "the end")
        await shows(page, *lines, ("sport", "the end"))
