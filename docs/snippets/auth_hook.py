from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException

from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub()
app = Starlette()
app.add_middleware(WebSocketMiddleware, hub=hub)

TOKENS = {"s3cret": "ann"}  # yours are in a database


@hub.on_connect
async def authenticate(conn: Connection[Any, Any]) -> None:
    scheme, _, token = conn.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or token not in TOKENS:
        raise HTTPException(401, "a token is needed", headers={"WWW-Authenticate": "Bearer"})
    conn.state.user = TOKENS[token]


@hub.websocket("/whoami")
async def whoami(conn: Connection) -> None:
    await conn.send(conn.state.user)
