"""A dashboard for the Centrifuge client, whose page is dashboard_centrifuge.html: it chooses what it watches, gets what
it missed, and knows who else watches. Run with: asgi-ws run examples.dashboard_centrifuge:app"""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub()
app = FastAPI()
app.add_middleware(WebSocketMiddleware, hub=hub)
hub.serve_pubsub("/live")
latest: dict[str, float] = {}


@hub.channel("metrics:{name}", history=100, presence=True)
async def may_watch(conn: Connection, name: str) -> bool:
    return not name.startswith("secret-")


@hub.rpc("names")
async def names(conn: Connection) -> list[str]:
    return sorted(latest)


@app.post("/metrics/{name}")
async def report(name: str, value: float) -> dict[str, float]:
    latest[name] = value
    await hub.publish(f"metrics:{name}", {"value": value})
    return {"value": value}


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("dashboard_centrifuge.html"))
