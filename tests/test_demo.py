import re
from pathlib import Path

import pytest

import asgi_ws
from asgi_ws import ConnectionClosed
from asgi_ws.demo import app
from asgi_ws.testing import connect, request

pytestmark = pytest.mark.anyio


async def test_what_one_says_arrives_at_all_in_the_room() -> None:
    async with connect(app, "/chat/lobby") as ann, connect(app, "/chat/lobby") as bob, connect(app, "/chat/b") as other:
        await ann.send({"name": "Ann", "text": "<b>hello</b>"})
        heard = await ann.receive_json()
        assert (heard["name"], heard["text"]) == ("Ann", "<b>hello</b>")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", heard["at"])
        assert await bob.receive_json() == heard
        await other.send({"name": "Eve", "text": "nobody here"})
        assert (await other.receive_json())["name"] == "Eve"


@pytest.mark.parametrize(
    "message", ["hello", "{}", '{"name": "", "text": "a"}', '{"name": "Ann", "text": "%s"}' % ("a" * 2001)]
)
async def test_what_is_not_a_chat_message_closes_with_1007(message: str) -> None:
    async with connect(app, "/chat/lobby") as client:
        await client.send(message)
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
    assert closed.value.code == 1007


async def test_a_measurement_arrives_at_all_who_watch_it() -> None:
    async with connect(app, "/metrics/cpu") as first, connect(app, "/metrics/cpu") as second:
        response = await request(app, "POST", "/metrics/cpu", json={"value": 42.5})
        assert (response.status_code, response.json()) == (200, {"value": 42.5})
        assert await first.receive_json() == {"value": 42.5}
        assert await second.receive_json() == {"value": 42.5}


async def test_a_page_that_only_watches_is_closed_when_it_sends() -> None:
    async with connect(app, "/metrics/cpu") as client:
        await client.send("hello")
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
    assert closed.value.code == 1000


@pytest.mark.parametrize("content", ["", "hello", "[1]", '{"value": "1"}', '{"value": 1e300}', b"\xff", "[" * 100_000])
async def test_what_is_no_measurement_is_refused_with_the_reason(content: str | bytes) -> None:
    response = await request(app, "POST", "/metrics/cpu", content=content)
    assert response.status_code == 400
    assert response.json()["error"]


async def test_the_page_is_one_file_that_needs_nothing_else() -> None:
    response = await request(app, "GET", "/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.text == Path(asgi_ws.__file__).with_name("demo.html").read_text()
    # A namespace's name is no address.
    assert re.findall(r"https?://[^'\"]+", response.text) == ["http://www.w3.org/2000/svg"]


async def test_the_page_shows_payloads_as_text_only() -> None:
    page = (await request(app, "GET", "/")).text
    assert "textContent" in page
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", page)
