from starlette.applications import Starlette

from asgi_ws import Connection, Grant, Hub, WebSocketMiddleware
from asgi_ws.auth import JWT

hub = Hub()
app = Starlette()
app.add_middleware(WebSocketMiddleware, hub=hub)
jwt = JWT("a secret of 32 bytes or more, kept", algorithms=["HS256"])


async def authenticate(conn: Connection, token: str) -> Grant:
    claims = jwt.verify(token)
    return Grant(user=claims["sub"], expires_at=claims["exp"])


async def own_channel(conn: Connection) -> list[str]:
    return [f"user:{conn.user_id}"]


hub.serve_pubsub("/live", authenticate=authenticate, channels=own_channel)
