"""The servers that `fallbacks` measures."""

import json
from typing import Any

from starlette.applications import Starlette

from asgi_ws import Connection, Hub, WebSocketMiddleware
from asgi_ws.socketio import Socket, SocketIO

__all__ = ["app", "theirs"]

hub = Hub()
sio = SocketIO(hub)
app = Starlette()
app.mount("/socket.io", sio)
app.add_middleware(WebSocketMiddleware, hub=hub)


@sio.on("message")
async def broadcast(_: Socket, text: str) -> None:
    await sio.emit("message", text)


@hub.websocket("/numbers")
async def listen(conn: Connection) -> None:
    """Give the client all numbers that are published; one that says "done" is told what it has said before."""
    await conn.subscribe("numbers")
    await conn.send("welcome")
    said = []
    async for text in conn:
        if text == "done":
            await conn.send(json.dumps(said))
        else:
            said.append(text)


@hub.websocket("/publish")
async def publish(conn: Connection) -> None:
    async for text in conn:
        await conn.publish("numbers", text)


def theirs() -> Any:
    """What `broadcast` does, with python-socketio."""
    import socketio

    server = socketio.AsyncServer(async_mode="asgi")

    async def message(_: str, text: str) -> None:
        await server.emit("message", text)

    server.on("message", message)
    return socketio.ASGIApp(server)
