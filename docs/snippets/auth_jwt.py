import os

from starlette.applications import Starlette

from asgi_ws import Connection, Hub, WebSocketMiddleware
from asgi_ws.auth import JWT, InvalidToken

hub = Hub()
app = Starlette()
app.add_middleware(WebSocketMiddleware, hub=hub)

tokens = JWT(os.environ["JWT_SECRET"], algorithms=["HS256"], audience="chat", cookie="token")
hub.on_connect(tokens)


@hub.websocket("/whoami", subprotocols=["bearer", None])
async def whoami(conn: Connection) -> None:
    await conn.send(f"{conn.user}, until {conn.state.claims['exp']}")
    async for newer in conn:  # a client that wants to stay sends a newer token in time
        try:
            tokens.admit(conn, newer)
        except InvalidToken as error:
            await conn.send(f"no: {error}")
