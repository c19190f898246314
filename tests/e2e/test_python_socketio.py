"""python-socketio's client, unchanged, against a real server."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
import socketio

from tests.e2e.test_socketio import Application
from tests.servers import OURS, STOCK, serve

# The client leaves the answer to its last poll unread.
pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore:Unclosed:ResourceWarning")]

TRANSPORTS = [["websocket"], ["polling"], ["polling", "websocket"]]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What is left unclosed is collected while that may be."""
    yield
    gc.collect()


class Client:
    """A client with what it has heard."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.client = socketio.AsyncClient(reconnection=False, http_session=session)
        self.heard: asyncio.Queue[Any] = asyncio.Queue()

        @self.client.on("*")
        async def event(*args: Any) -> Any:
            self.heard.put_nowait(list(args))
            return args[1:]

        @self.client.on("disconnect")
        async def disconnected(reason: str) -> None:
            self.heard.put_nowait(reason)

    async def next(self) -> Any:
        return await asyncio.wait_for(self.heard.get(), 10)


@contextlib.asynccontextmanager
async def python_client(url: str, transports: list[str], **options: Any) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        client = Client(session)
        await client.client.connect(url, transports=transports, wait_timeout=10, **options)
        try:
            yield client
        finally:
            await client.client.disconnect()


@pytest.mark.parametrize("transports", TRANSPORTS, ids="+".join)
@pytest.mark.parametrize("ws", [STOCK[0], OURS])
async def test_events_acknowledgements_and_binary_values_go_both_ways(ws: str, transports: list[str]) -> None:
    application = Application()
    async with (
        serve(application.app, ws=ws) as server,
        python_client(server.http, transports, auth={"token": "x"}) as ann,
        python_client(server.http, transports, auth={}) as bob,
    ):
        assert await ann.next() == ["welcome", {"token": "x"}]
        assert await bob.next() == ["welcome", {}]
        values = ("ä", b"\x00\xff", {"deep": [b""]})
        assert tuple(await ann.client.call("echo", values, timeout=10)) == values
        await bob.client.emit("say", ("hello", b"\x01"))
        assert await ann.next() == await bob.next() == ["said", "hello", b"\x01"]
        answers = await application.sio.to("lobby").call("ask", 1, b"\x02")
        assert list(answers.values()) == [[1, b"\x02"], [1, b"\x02"]]
        assert await ann.next() == ["ask", 1, b"\x02"]


async def test_namespaces_refusals_and_the_end() -> None:
    application = Application()
    async with serve(application.app, ws=OURS) as server:
        with pytest.raises(socketio.exceptions.ConnectionError, match="failed to connect"):
            async with python_client(server.http, ["websocket"], auth={"token": "wrong"}):
                pass
        async with python_client(server.http, ["websocket"], auth={}, namespaces=["/", "/admin"]) as ann:
            assert await ann.next() == ["welcome", {}]
            assert await ann.client.call("admin", namespace="/admin", timeout=10) == "in /admin"
            (socket,) = application.sockets.values()
            await socket.disconnect(close=True)
            assert await asyncio.wait_for(application.log.get(), 10) == ("disconnect", "server namespace disconnect")
            assert await ann.next() in ("server disconnect", "transport close", "transport error")
