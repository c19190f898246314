from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount, WebSocketRoute

from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub()


async def chat(conn: Connection, room: str) -> None:
    await conn.subscribe(f"chat:{room}")
    async for text in conn:
        await conn.publish(f"chat:{room}", text)


app = Starlette(
    routes=[Mount("/api", routes=[WebSocketRoute("/chat/{room}", hub.endpoint(chat))])],
    middleware=[Middleware(WebSocketMiddleware, hub=hub)],
)
