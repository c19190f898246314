from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub()


@hub.websocket("/echo")
async def echo(conn: Connection) -> None:
    async for message in conn:
        await conn.send(message)


async def home(request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


app = Starlette(
    routes=[Route("/", home)],
    middleware=[Middleware(WebSocketMiddleware, hub=hub)],
)
