from typing import Annotated

from fastapi import Cookie, Depends, FastAPI, HTTPException, Request

from asgi_ws import Connection, Hub, WebSocketMiddleware
from asgi_ws.auth import Tickets

hub = Hub()
app = FastAPI()
app.add_middleware(WebSocketMiddleware, hub=hub)

tickets = Tickets(hub)
hub.on_connect(tickets)

SESSIONS = {"f3a9": "ann"}  # yours are in a database


async def current_user(session: Annotated[str, Cookie()] = "") -> str:
    if session not in SESSIONS:
        raise HTTPException(401, "log in first")
    return SESSIONS[session]


@app.post("/ticket")
async def ticket(request: Request, user: Annotated[str, Depends(current_user)]) -> str:
    return await tickets.issue(user, path="/inbox", origin=request.headers.get("origin"))


@hub.websocket("/inbox")
async def inbox(conn: Connection) -> None:
    await conn.subscribe(f"inbox:{conn.user}")
    await conn.send(f"hello {conn.user}")
    await conn.receive()
