from typing import Annotated

from fastapi import Cookie, Depends, FastAPI, HTTPException

from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub()
app = FastAPI()
app.add_middleware(WebSocketMiddleware, hub=hub)

SESSIONS = {"f3a9": "ann"}  # yours are in a database


async def current_user(session: Annotated[str, Cookie()] = "") -> str:
    if session not in SESSIONS:
        raise HTTPException(401, "log in first")
    return SESSIONS[session]


@hub.websocket("/inbox")
async def inbox(conn: Connection, user: Annotated[str, Depends(current_user)]) -> None:
    await conn.subscribe(f"inbox:{user}")
    await conn.send(f"hello {user}")
    async for text in conn:
        await conn.publish("inbox:support", f"{user}: {text}")
