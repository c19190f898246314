import asyncio
import contextlib
from collections.abc import AsyncIterator

import anyio.from_thread
from fastapi import FastAPI

from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub()


async def tick() -> None:
    """A background task."""
    seconds = 0
    while True:
        await asyncio.sleep(1)
        seconds += 1
        await hub.publish("clock", {"seconds": seconds})


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    ticking = asyncio.create_task(tick())
    yield
    ticking.cancel()


app = FastAPI(lifespan=lifespan)
app.add_middleware(WebSocketMiddleware, hub=hub)


@hub.websocket("/watch/{channel}")
async def watch(conn: Connection, channel: str) -> None:
    await conn.subscribe(channel)
    await conn.receive()  # nothing is expected; ends when the client leaves


@app.post("/news")
async def from_a_route(text: str) -> None:
    await hub.publish("news", text)


@app.post("/report")
def from_a_thread(text: str) -> None:
    """FastAPI runs a plain `def` in a thread."""
    anyio.from_thread.run(hub.publish, "news", text)


async def count(channel: str, most: int) -> list[str]:
    """On the server's side: an asynchronous iterator."""
    seen = []
    async with hub.subscribe(channel) as publications:
        async for publication in publications:
            seen.append(publication.data)
            if len(seen) == most:
                break
    return seen
