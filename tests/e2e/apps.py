"""An application for servers that run as a process of their own: connections of all kinds."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub()
sending_since: dict[str, float] = {}
started = time.monotonic()


@hub.websocket("/receives")
async def receives(conn: Connection) -> None:
    async for message in conn:
        await conn.send(message)


@hub.websocket("/sleeps")
async def sleeps(conn: Connection) -> None:
    """Never receives."""
    await conn.subscribe("news")
    await conn.send("welcome")
    await asyncio.sleep(3600)


@hub.websocket("/busy")
async def busy(conn: Connection) -> None:
    """Is in the midst of what a message asked for."""
    async for _ in conn:
        await conn.send("working")
        await asyncio.sleep(3600)


@hub.websocket("/firehose")
async def firehose(conn: Connection) -> None:
    """Sends until the client reads no more."""
    try:
        while True:
            sending_since[conn.id] = time.monotonic()
            await conn.send(b"x" * 65_536)
            await asyncio.sleep(0)
    finally:
        del sending_since[conn.id]


async def stalled(request: Request) -> JSONResponse:
    """How many clients have taken nothing for a while."""
    now = time.monotonic()
    return JSONResponse(sum(now - since > 0.2 for since in sending_since.values()))


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    print("startup of", started, flush=True)
    yield
    print("shutdown", flush=True)


app = Starlette(
    routes=[Route("/stalled", stalled)],
    middleware=[Middleware(WebSocketMiddleware, hub=hub)],
    lifespan=lifespan,
)
