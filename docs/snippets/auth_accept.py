from starlette.applications import Starlette
from starlette.exceptions import HTTPException

from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub()
app = Starlette()
app.add_middleware(WebSocketMiddleware, hub=hub)

FULL = {"cellar"}


@hub.websocket("/rooms/{room}", accept=False)
async def enter(conn: Connection, room: str) -> None:
    if room in FULL:
        raise HTTPException(409, f"{room} is full")
    await conn.accept(headers={"X-Room": room})
    await conn.send(f"welcome to {room}")
