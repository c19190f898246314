from typing import Any

from fastapi import FastAPI

from asgi_ws import Connection, Hub, Publication, WebSocketMiddleware

hub = Hub()
hub.channel("stock", history=1000)
app = FastAPI()
app.add_middleware(WebSocketMiddleware, hub=hub)

database = {"apples": 10, "pears": 4}


@app.get("/stock")
async def stock() -> dict[str, Any]:
    history = await hub.history("stock", limit=0)  # the position, before the state
    return {"position": str(history.position), "stock": dict(database)}


@app.put("/stock/{name}")
async def change(name: str, count: int) -> None:
    database[name] = count  # first the state, then the publication
    await hub.publish("stock", {name: count})


@hub.websocket("/stock/changes")
async def changes(conn: Connection[str, Publication], since: str | None = None) -> None:
    await conn.subscribe("stock", since=since)
    await conn.receive()  # nothing is expected; ends when the client leaves
