"""The link of an Engine.IO session: over polling by itself, and over a link that hands messages in."""

import asyncio
import json

import pytest

from asgi_ws import Connection, Hub, Limits, WebSocketMiddleware
from asgi_ws.transports import EngineLink
from asgi_ws.transports.packets import PacketFrame
from tests.e2e.clients import connect, until
from tests.servers import OURS, STOCK, serve
from tests.transports.test_engineio import nothing

pytestmark = pytest.mark.anyio


def frame(text: str) -> PacketFrame:
    return PacketFrame("4" + text)


async def test_what_is_written_behind_close_goes_nowhere() -> None:
    finished: list[EngineLink] = []
    link = EngineLink("sid", "polling", finished.append)
    link.session.begin_poll()
    assert link.write(frame("before"))
    closing = link.close(1000, "")
    assert link.close(1001, "") is closing
    assert link.write(frame("behind"))
    assert link.buffered == 8
    assert link.take() == b"4before\x1e1"
    assert not closing.done()
    link.poll_answered()
    assert closing.done()
    assert finished == [link]
    assert link.buffered == 0


async def test_link_is_behind_from_one_mark_to_the_other() -> None:
    ready: list[int] = []
    link = EngineLink("sid", "polling", lambda link: None)
    link.on_ready = lambda: ready.append(link.buffered)
    count = 0
    while link.write(frame("x" * 9_999)):
        count += 1
    assert count == 6
    assert link.written == link.buffered == 70_000
    link.session.begin_poll()
    assert len(link.take()) == 70_006
    link.session.sending(70_006)
    assert not link.write(frame("more"))
    assert ready == []
    link.poll_answered()
    assert ready == [5]
    assert link.write(frame("more"))


async def test_after_abort_nothing_waits() -> None:
    link = EngineLink("sid", "polling", lambda link: None)
    link.write(frame("lost"))
    link.abort()
    link.abort()
    assert link.buffered == 0
    assert link.write(frame("lost"))
    assert (await link.close(1000, "")) is None


@pytest.mark.parametrize("ws", [STOCK[0], OURS])
async def test_handler_that_has_enough_is_sent_no_more_over_a_websocket(ws: str) -> None:
    hub = Hub(limits=Limits(inbox_messages=2))
    go = asyncio.Event()

    @hub.websocket("/busy")
    async def busy(conn: Connection) -> None:
        await go.wait()
        async for message in conn:
            await conn.send(message)

    async with (
        serve(WebSocketMiddleware(nothing, hub=hub), ws=ws) as server,
        connect(f"{server.ws}/busy/?EIO=4&transport=websocket") as client,
    ):
        assert json.loads((await client.recv())[1:])["upgrades"] == []
        for number in range(200):
            await client.send(f"4{number}")
        go.set()
        assert [await client.recv() for _ in range(200)] == [f"4{number}" for number in range(200)]
        await client.send(b"\x01")
        assert await client.recv() == b"\x01"


@pytest.mark.parametrize("ws", [STOCK[0], OURS])
async def test_message_that_is_too_large_is_refused_over_a_websocket(ws: str) -> None:
    hub = Hub(limits=Limits(message_size=1_000))

    @hub.websocket("/echo")
    async def echo(conn: Connection) -> None:
        async for message in conn:
            await conn.send(message)

    app = WebSocketMiddleware(nothing, hub=hub)
    async with serve(app, ws=ws) as server, connect(f"{server.ws}/echo?EIO=4&transport=websocket") as client:
        await client.recv()
        await client.send("4" + "x" * 1_000)
        assert await client.recv() == "4" + "x" * 1_000
        await client.send(b"x" * 1_000)
        assert await client.recv() == b"x" * 1_000
        await client.send("4" + "x" * 1_001)
        await client.wait_closed()
        assert client.close_code == 1009
        await until(lambda: app.engine.sessions == 0)
