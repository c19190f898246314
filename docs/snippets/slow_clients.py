from fastapi import FastAPI

from asgi_ws import Connection, Hub, Limits, WebSocketMiddleware

hub = Hub(overflow="latest", limits=Limits(outbox_size=64 * 1024, write_timeout=5))
app = FastAPI()
app.add_middleware(WebSocketMiddleware, hub=hub)


@hub.websocket("/prices")
async def prices(conn: Connection) -> None:
    for symbol in ("gold", "silver"):
        await conn.subscribe(f"price:{symbol}")
    async for _ in conn:
        await conn.send({"dropped": conn.dropped})
