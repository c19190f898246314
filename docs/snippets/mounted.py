from fastapi import FastAPI

from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub()
live = FastAPI()
live.add_middleware(WebSocketMiddleware, hub=hub)


@hub.websocket("/echo")
async def echo(conn: Connection) -> None:
    async for message in conn:
        await conn.send(message)


app = FastAPI()
app.mount("/live", live)  # clients connect to /live/echo
