"""News of which no page misses any; its page is feed.html. Run with: asgi-ws run examples.feed:app"""

import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse

from asgi_ws import Connection, Hub, Publication, WebSocketMiddleware

hub = Hub(os.environ.get("BROKER_URL", "memory://"))
hub.channel("news", history=100, ttl=3600)
app = FastAPI()
app.add_middleware(WebSocketMiddleware, hub=hub)


@hub.websocket("/feed")
async def feed(conn: Connection[str, Publication], since: str | None = None) -> None:
    await conn.subscribe("news", since=since)
    await conn.receive()  # nothing is expected; ends when the client leaves


@app.get("/news")
async def latest() -> dict[str, Any]:
    history = await hub.history("news")
    return {"position": str(history.position), "news": [publication.data for publication in history]}


@app.post("/news")
async def report(text: str) -> str:
    return str(await hub.publish("news", text))


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("feed.html"))
