"""Every message comes back. Run with: asgi-ws run examples.echo:app"""

from starlette.applications import Starlette

from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub()
app = Starlette()
app.add_middleware(WebSocketMiddleware, hub=hub)


@hub.websocket("/echo")
async def echo(conn: Connection) -> None:
    async for message in conn:
        await conn.send(message)
