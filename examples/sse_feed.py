"""News by topics for the browser's own EventSource, which comes back for what it missed; its page is sse_feed.html.

Run with: asgi-ws run examples.sse_feed:app
"""

import os
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query
from fastapi.responses import FileResponse

from asgi_ws import Connection, Hub, Publication, WebSocketMiddleware

hub = Hub(os.environ.get("BROKER_URL", "memory://"))
hub.channel("news:{topic}", history=100, ttl=3600)
app = FastAPI()
app.add_middleware(WebSocketMiddleware, hub=hub)


@hub.websocket("/news")
async def news(conn: Connection[str, Publication], topic: Annotated[list[str], Query()]) -> None:
    for each in topic:
        await conn.subscribe(f"news:{each}")  # from where the client's Last-Event-ID says, if it has one
    await conn.receive()  # nothing is expected; ends when the client leaves


@app.post("/news/{topic}")
async def report(topic: str, text: str) -> str:
    return str(await hub.publish(f"news:{topic}", text))


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("sse_feed.html"))
