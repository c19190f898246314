from starlette.applications import Starlette

from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub(allowed_origins=["https://www.example.com", "http://localhost:5173"])
app = Starlette()
app.add_middleware(WebSocketMiddleware, hub=hub)


@hub.websocket("/echo")
async def echo(conn: Connection) -> None:
    async for message in conn:
        await conn.send(message)
