"""Whatever a client sends goes to all clients. Run with: asgi-ws run examples.broadcast_to_all:app"""

from starlette.applications import Starlette

from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub()
app = Starlette()
app.add_middleware(WebSocketMiddleware, hub=hub)


@hub.websocket("/")
async def everybody(conn: Connection) -> None:
    await conn.subscribe("everybody")
    async for message in conn:
        await conn.publish("everybody", message)
