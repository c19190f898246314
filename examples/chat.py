"""A chat in rooms; its page is chat.html. Run with: asgi-ws run examples.chat:app"""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub()
app = FastAPI()
app.add_middleware(WebSocketMiddleware, hub=hub)


@hub.websocket("/chat/{room}")
async def chat(conn: Connection, room: str) -> None:
    await conn.subscribe(f"chat:{room}")
    async for text in conn:
        await conn.publish(f"chat:{room}", text)


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("chat.html"))
