"""An HTTP route publishes, and every browser that watches gets it. Run with: asgi-ws run examples.dashboard:app"""

from fastapi import FastAPI

from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub()
app = FastAPI()
app.add_middleware(WebSocketMiddleware, hub=hub)


@hub.channel("metrics:{name}")
async def may_watch(conn: Connection, name: str) -> bool:
    return not name.startswith("secret-")


@hub.websocket("/watch/{name}")
async def watch(conn: Connection, name: str) -> None:
    await conn.subscribe(f"metrics:{name}")
    await conn.receive()  # nothing is expected; ends when the client leaves


@app.post("/metrics/{name}")
async def report(name: str, value: float) -> dict[str, float]:
    await hub.publish(f"metrics:{name}", {"value": value})
    return {"value": value}
