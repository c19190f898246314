"""Who is here; its page is who_is_online.html. Run with: asgi-ws run examples.who_is_online:app"""

import datetime
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

from asgi_ws import Connection, Hub, PresenceStats, WebSocketMiddleware

hub = Hub()
hub.channel("lobby", presence=True)
app = FastAPI()
app.add_middleware(WebSocketMiddleware, hub=hub)


@hub.websocket("/lobby")
async def lobby(conn: Connection, name: str) -> None:
    conn.user = name  # here, everybody is who he says he is
    came = f"{datetime.datetime.now():%H:%M}"
    await conn.subscribe("lobby", info={"came": came}, join_leave=True)
    async for _ in conn:  # whatever it says, it asks for the list
        await conn.send(await hub.presence("lobby"))


@app.get("/count")
async def count() -> PresenceStats:
    return await hub.presence_stats("lobby")


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("who_is_online.html"))
