"""What is measured: a channel that everybody listens to, and an echo; with asgi_ws, and as FastAPI's page does it."""

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from asgi_ws import Connection, Hub, WebSocketMiddleware

# asgi_ws

hub = Hub()
app = Starlette()
app.add_middleware(WebSocketMiddleware, hub=hub)


@hub.websocket("/broadcast")
async def broadcast(conn: Connection) -> None:
    await conn.subscribe("all")
    async for text in conn:
        await conn.publish("all", text)


@hub.websocket("/echo")
async def echo(conn: Connection) -> None:
    async for text in conn:
        await conn.send(text)


# By hand


class ConnectionManager:
    """The one of FastAPI's page "WebSockets", but for the list, from which a client may leave during a broadcast."""

    def __init__(self) -> None:
        self.active_connections: list[WebSocket] = []

    async def connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        self.active_connections.append(websocket)

    def disconnect(self, websocket: WebSocket) -> None:
        self.active_connections.remove(websocket)

    async def broadcast(self, message: str) -> None:
        for connection in list(self.active_connections):
            await connection.send_text(message)


manager = ConnectionManager()


async def broadcast_by_hand(websocket: WebSocket) -> None:
    await manager.connect(websocket)
    try:
        while True:
            await manager.broadcast(await websocket.receive_text())
    except WebSocketDisconnect:
        manager.disconnect(websocket)


async def echo_by_hand(websocket: WebSocket) -> None:
    await websocket.accept()
    try:
        while True:
            await websocket.send_text(await websocket.receive_text())
    except WebSocketDisconnect:
        pass


by_hand = Starlette(
    routes=[WebSocketRoute("/broadcast", broadcast_by_hand), WebSocketRoute("/echo", echo_by_hand)],
)
