"""An Engine.IO client for an application without a network."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import ASGIApp

from asgi_ws.testing import Client, Response, connect, request, stream

QUERY = "EIO=4&transport="


class EngineClient:
    """A session by polling; `path` may have a query."""

    def __init__(self, app: ASGIApp, path: str, headers: dict[str, str] | None = None) -> None:
        self.app = app
        self.path = path + ("&" if "?" in path else "?") + QUERY
        self.headers = headers or {}
        self.sid = ""

    async def request(self, method: str, *, query: str | None = None, **options: Any) -> Response:
        if query is None:
            query = "polling" + (f"&sid={self.sid}" if self.sid else "")
        options.setdefault("headers", self.headers)
        return await request(self.app, method, self.path + query, lifespan=False, **options)

    async def open(self) -> dict[str, Any]:
        """Begin a session: what the open packet says."""
        response = await self.request("GET")
        assert response.status_code == 200, response.text
        assert response.text[0] == "0"
        values: dict[str, Any] = json.loads(response.text[1:])
        self.sid = values["sid"]
        return values

    async def poll(self) -> str:
        response = await self.request("GET")
        assert response.status_code == 200, response.text
        return response.text

    def park(self) -> "asyncio.Task[Response]":
        """A poll that waits."""
        return asyncio.create_task(self.request("GET"))

    async def post(self, body: str | bytes) -> None:
        response = await self.request("POST", content=body)
        assert (response.status_code, response.text) == (200, "ok")

    async def receive(self, count: int = 1) -> list[str]:
        """So many packets, by as many polls as it takes."""
        packets: list[str] = []
        while len(packets) < count:
            packets += (await self.poll()).split("\x1e")
        assert len(packets) == count, packets
        return packets

    @contextlib.asynccontextmanager
    async def parked(self) -> AsyncIterator["asyncio.Task[Response]"]:
        """A poll that is waiting in the block."""
        poll = self.park()
        await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        yield poll
        poll.cancel()
        await asyncio.wait([poll])

    def websocket(self) -> contextlib.AbstractAsyncContextManager[Client]:
        """A WebSocket for the session, or for a new one."""
        query = "websocket" + (f"&sid={self.sid}" if self.sid else "")
        return connect(self.app, self.path + query, headers=self.headers, lifespan=False)

    @contextlib.asynccontextmanager
    async def upgraded(self) -> AsyncIterator[Client]:
        """The session, moved to a WebSocket."""
        async with self.websocket() as socket:
            poll = self.park()
            await socket.send("2probe")
            assert await socket.receive() == "3probe"
            assert (await poll).text == "6"
            await socket.send("5")
            yield socket


__all__ = ["EngineClient", "stream"]
