import dataclasses

from starlette.applications import Starlette

from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub()
app = Starlette()
app.add_middleware(WebSocketMiddleware, hub=hub)


@dataclasses.dataclass
class Point:
    x: int
    y: int


@hub.websocket("/mirror")
async def mirror(conn: Connection[Point, Point]) -> None:
    async for point in conn:
        await conn.send(Point(-point.x, -point.y))
