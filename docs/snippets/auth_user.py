from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, BaseUser, SimpleUser
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection

from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub()
SESSIONS = {"f3a9": "ann"}


class CookieBackend(AuthenticationBackend):
    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        name = SESSIONS.get(conn.cookies.get("session", ""))
        return (AuthCredentials(["authenticated"]), SimpleUser(name)) if name else None


@hub.on_connect
async def users_only(conn: Connection) -> None:
    if not conn.user.is_authenticated:
        raise HTTPException(401, "log in first")


@hub.websocket("/whoami")
async def whoami(conn: Connection) -> None:
    await conn.send(conn.user.display_name)


app = Starlette(
    middleware=[
        Middleware(AuthenticationMiddleware, backend=CookieBackend()),
        Middleware(WebSocketMiddleware, hub=hub),
    ]
)
