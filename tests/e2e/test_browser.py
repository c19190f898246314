"""Chromium with the pages as they are: those in examples/, and the demo's."""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator

import pytest

from asgi_ws import Hub, demo, presence
from asgi_ws.testing import request
from examples import chat, feed, who_is_online
from tests.e2e.node import Browser, Page, chromium
from tests.programs import program
from tests.servers import OURS, STOCK, run_process, serve

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def state(text: str) -> str:
    return f"document.querySelector('#state').textContent === '{text}'"


async def texts(page: Page, selector: str) -> list[str]:
    found: list[str] = await page.evaluate(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")
    return found


async def say(page: Page, text: str) -> None:
    await page.fill("#text", text)
    await page.press("#text", "Enter")


def shows(text: str) -> str:
    return f"[...document.querySelectorAll('#messages li')].some(item => item.textContent.endsWith({text!r}))"


# examples/chat.html


@pytest.mark.parametrize("ws", [STOCK[0], OURS])
async def test_two_pages_chat(ws: str, browser: Browser) -> None:
    async with (
        serve(chat.app, ws=ws) as server,
        browser.page(f"{server.http}/#garden") as ann,
        browser.page(f"{server.http}/#garden") as bob,
        browser.page(server.http) as eve,
    ):
        for page in (ann, bob, eve):
            await page.until(state("1 OPEN"))
        await say(bob, "here")
        await bob.until(shows("here"))
        await say(ann, "<b>hello</b> grüße 👋")
        await bob.until(shows("<b>hello</b> grüße 👋"))
        await say(bob, "to you, too")
        await ann.until(shows("to you, too"))
        assert (await texts(ann, "#messages li"))[-2:] == ["<b>hello</b> grüße 👋", "to you, too"]
        assert await texts(bob, "#messages b") == []
        assert await texts(eve, "#messages li") == []
        assert await texts(eve, "#room") == ["lobby"]


@pytest.mark.parametrize("ws", [STOCK[0], OURS])
async def test_all_four_states_and_events_are_seen(ws: str, browser: Browser) -> None:
    async with browser.page("about:blank") as page:
        async with serve(chat.app, ws=ws) as server:
            # What #state showed, from its first text on.
            await page.addInitScript(
                "window.seen = []; new MutationObserver(() => {"
                " const shown = document.querySelector('#state')?.textContent;"
                " if (shown && shown !== seen.at(-1)) seen.push(shown);"
                "}).observe(document, {subtree: true, childList: true, characterData: true});"
            )
            await page.goto(server.http)
            await page.until(state("1 OPEN"))
            await say(page, "hello")
            await page.until(shows("hello"))
            await page.click("#toggle")
            await page.until(state("3 CLOSED"))
            assert await page.evaluate("seen") == ["0 CONNECTING", "1 OPEN", "2 CLOSING", "3 CLOSED"]
            await page.click("#toggle")
            await page.until(state("1 OPEN"))
        # The server has stopped, and said so.
        await page.until(state("3 CLOSED"))
        await page.click("#toggle")
        await page.until("document.querySelectorAll('#events li').length >= 7")
        assert await texts(page, "#events li") == [
            "open (readyState 1)",
            "message (readyState 1)",
            "close 1000  (readyState 3)",
            "open (readyState 1)",
            "close 1012  (readyState 3)",
            "error (readyState 3)",
            "close 1006  (readyState 3)",
        ]


async def test_a_page_of_another_origin_is_refused_before_open(
    browser: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        serve(chat.app) as server,
        serve(demo.app) as elsewhere,
        browser.page(elsewhere.http) as page,
    ):
        events = await page.evaluate(
            f"""new Promise(resolve => {{
              const events = [], socket = new WebSocket("{server.ws}/chat/lobby");
              for (const type of ["open", "message", "error", "close"])
                socket.addEventListener(type, event => {{
                  events.push([type, event.code ?? null, socket.readyState]);
                  if (type === "close") resolve(events);
                }});
            }})"""
        )
        assert events == [["error", None, 3], ["close", 1006, 3]]
        [record] = [record for record in caplog.records if "refused a page" in record.message]
        assert elsewhere.http in record.message


# examples/feed.html


def lines(*texts: str) -> str:
    """That the page shows these, and no others."""
    shown = "JSON.stringify([...document.querySelectorAll('#news li')].map(item => item.textContent))"
    return f"{shown} === JSON.stringify({json.dumps(texts)})"


async def report(*texts: str, pause: float = 0) -> None:
    for text in texts:
        await feed.hub.publish("news", text)
        await asyncio.sleep(pause)


async def cut() -> None:
    """End the connections of all pages, as a server that restarts does."""
    for connection in list(feed.hub.context.clients):
        await feed.hub.disconnect(connection=connection, code=1012)


async def test_a_page_that_comes_back_misses_nothing_and_shows_nothing_twice(browser: Browser) -> None:
    async with serve(feed.app, ws=OURS) as server:
        await report("before")
        async with browser.page(server.http) as page, browser.page(server.http) as other:
            for each in (page, other):
                await each.until(lines("before"))
            await report("live")
            await page.until(lines("before", "live"))
            # The user leaves and comes back.
            await page.click("#toggle")
            await page.until("document.querySelector('#state').textContent === 'disconnected'")
            await report("missed", "missed too")
            await page.click("#toggle")
            await page.until(lines("before", "live", "missed", "missed too"))
            assert await texts(page, "#news .missed") == ["missed", "missed too"]
            # Then the server cuts it off, and it comes back by itself, while much is published.
            await cut()
            await report(*map(str, range(30)), pause=0.03)
            await report("last")
            everything = lines("before", "live", "missed", "missed too", *map(str, range(30)), "last")
            for each in (page, other):
                await each.until(everything)


async def test_a_page_that_missed_more_than_is_kept_loads_everything_anew(browser: Browser) -> None:
    async with serve(feed.app, ws=OURS) as server, browser.page(server.http) as page:
        await page.until("document.querySelectorAll('#events li').length === 1")
        await report("old")
        await page.until(lines("old"))
        await cut()
        await report(*map(str, range(150)))
        await page.until(lines(*map(str, range(50, 150))))
        await report("live")
        await page.until(lines(*map(str, range(50, 150)), "live"))
        assert (await texts(page, "#events li"))[-1].startswith("nothing to recover")
        await page.fill("#text", "from the page")
        await page.press("#text", "Enter")
        await page.until(lines(*map(str, range(50, 150)), "live", "from the page"))


async def test_pages_of_two_workers_miss_nothing_when_one_is_killed(browser: Browser) -> None:
    redis_command = [program("redis-server"), "--port", "{port}", "--bind", "127.0.0.1", "--save", ""]
    command = [sys.executable, "-m", "asgi_ws", "run", "examples.feed:app", "--port", "{port}", "--workers", "2"]
    started = re.compile(r"Started server process \[(\d+)\]")
    everything = [str(number) for number in range(40)]
    async with run_process(*redis_command, ready="Ready to accept connections") as redis:
        url = f"redis://127.0.0.1:{redis.port}"
        async with (
            run_process(*command, ready="Application startup complete", BROKER_URL=url) as server,
            contextlib.AsyncExitStack() as stack,
            Hub(url) as hub,
        ):
            async with asyncio.timeout(15):
                while server.output.count("Application startup complete") < 2:
                    await asyncio.sleep(0.01)
            pages = [await stack.enter_async_context(browser.page(server.http)) for _ in range(3)]
            for page in pages:
                await page.until("document.querySelectorAll('#events li').length === 1")
            for number, text in enumerate(everything):
                if number == 10:
                    os.kill(int(started.findall(server.output)[0]), signal.SIGKILL)
                await hub.publish("news", text)
                await asyncio.sleep(0.03)
            for page in pages:
                await page.until(lines(*everything))


# examples/who_is_online.html


def people(*names: str) -> str:
    shown = "[...document.querySelectorAll('#people li')].map(item => item.textContent.split(',')[0]).join()"
    return f"{shown} === '{','.join(names)}'"


async def test_pages_show_who_is_online(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "GRACE", 0.1)
    async with (
        serve(who_is_online.app, ws=OURS) as server,
        browser.page(server.http) as ann,
        browser.page(server.http) as bob,
        browser.page(server.http) as bobs_phone,
    ):
        for page, name in ((ann, "ann"), (bob, "bob"), (bobs_phone, "bob")):
            await page.fill("#name", name)
            await page.click("#toggle")
            await page.until(people("ann") if page is ann else people("ann", "bob"))
        await ann.until(people("ann", "bob"))
        assert (await request(who_is_online.app, "GET", "/count")).json() == {"connections": 3, "users": 2}
        await bob.click("#toggle")
        await bob.until(people())
        await asyncio.sleep(0.5)  # beyond the grace
        assert (await texts(ann, "#people li"))[1].startswith("bob, since ")
        await bobs_phone.click("#toggle")
        await ann.until(people("ann"))


# The demo


def chip(line: str, number: int) -> str:
    return f"document.querySelector('[data-name={line}] li:nth-child({number + 1})[aria-current]') !== null"


async def log(page: Page, line: str) -> list[tuple[str, str, str]]:
    """Type, state and details of the events of one of the page's two connections, the oldest first."""
    entries = await page.evaluate(
        "[...document.querySelectorAll('#log li')].reverse().map("
        "entry => ['name', 'type', 'state', 'detail'].map(name => entry.querySelector('.' + name).textContent))"
    )
    return [tuple(entry[1:]) for entry in entries if entry[0] == line]


async def open_demo(page: Page, name: str) -> None:
    await page.until(chip("chat", 1))
    await page.until(chip("chart", 1))
    await page.fill("#name", name)


async def test_demo_pages_chat_and_show_the_same_chart(browser: Browser) -> None:
    async with (
        serve(demo.app) as server,
        browser.page(f"{server.http}/#garden") as ann,
        browser.page(f"{server.http}/#garden") as bob,
    ):
        await open_demo(ann, "Ann")
        await open_demo(bob, "Bob")
        # Subscribed when it comes back.
        await say(bob, "here")
        await bob.until(shows("here"))
        await say(ann, "<i>hello</i>")
        await bob.until(shows("<i>hello</i>"))
        await say(bob, "good day")
        await ann.until(shows("good day"))
        assert (await texts(ann, "#messages .own .said"))[-1:] == ["<i>hello</i>"]
        assert (await texts(ann, "#messages .said"))[-1:] == ["good day"]
        assert await texts(bob, "#messages i") == []

        for value in (20, 70):
            await ann.fill("#slider", str(value))
            for page in (ann, bob):
                await page.until(f"document.querySelector('#value').textContent === '{value}'")
        curve = await ann.getAttribute(".curve", "d")
        assert curve is not None
        assert curve == await bob.getAttribute(".curve", "d")
        assert curve.count("L") == 1
        # Until the button is pressed again, values keep coming.
        await bob.click("#walk")
        await ann.until("document.querySelector('.curve').getAttribute('d').split('L').length > 4")
        await bob.click("#walk")
        assert await bob.getAttribute("#walk", "aria-pressed") == "false"


async def test_demo_shows_states_and_events(browser: Browser) -> None:
    async with browser.page("about:blank") as page:
        async with serve(demo.app) as server:
            await page.goto(server.http)
            await open_demo(page, "Ann")
            assert not await page.isDisabled("#send button")
            await say(page, "hello")
            await page.until(shows("hello"))
            await page.click("#toggle")
            await page.until(chip("chat", 3))
            await page.until(chip("chart", 3))
            assert await page.isDisabled("#send button")
            kinds = [(kind, state) for kind, state, _ in await log(page, "chat")]
            assert kinds == [
                ("new", "0 CONNECTING"),
                ("open", "1 OPEN"),
                ("message", "1 OPEN"),
                ("close()", "2 CLOSING"),
                ("close", "3 CLOSED"),
            ]
            assert (await log(page, "chat"))[-1][2] == "code 1000, clean, the page says goodbye"
            await page.click("#toggle")
            await page.until(chip("chat", 1))
            await page.until(chip("chart", 1))
        for line in ("chat", "chart"):
            await page.until(chip(line, 3))
            kind, _, detail = (await log(page, line))[-1]
            assert kind == "close"
            # Clean or not: uvicorn does not wait for the browser's close frame, so the end of TCP may come first.
            assert detail.startswith("code 1012, ")
        await page.click("#clear")
        await page.click("#toggle")
        await page.until("document.querySelectorAll('#log .close').length === 2")
        assert [kind for kind, _, _ in await log(page, "chat")] == ["new", "error", "close"]
        assert "code 1006, not clean" in (await log(page, "chat"))[-1][2]


async def test_demo_follows_the_room(browser: Browser) -> None:
    async with serve(demo.app) as server, browser.page(f"{server.http}/#%zz") as page:
        await open_demo(page, "Ann")
        assert await page.inputValue("#room") == "lobby"
        await page.fill("#room", "Küche & Bad")
        await page.press("#room", "Enter")
        await page.until(chip("chat", 1) + " && document.querySelectorAll('#log .open').length === 3")
        await say(page, "hello")
        await page.until(shows("hello"))
        assert (await log(page, "chat"))[-1][:2] == ("message", "1 OPEN")
        assert await page.evaluate("location.hash") == "#K%C3%BCche%20%26%20Bad"


@pytest.mark.parametrize("width", [360, 900, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_demo_fits_its_window_and_names_its_fields(browser: Browser, width: int, scheme: str) -> None:
    options = {"viewport": {"width": width, "height": 800}, "colorScheme": scheme}
    async with serve(demo.app) as server, browser.page(server.http, **options) as page:
        await open_demo(page, "Ann")
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        unnamed = "[...document.querySelectorAll('input')].filter(input => !input.labels.length).length"
        assert await page.evaluate(unnamed) == 0
