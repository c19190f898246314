"""Clients of five kinds in one room; its page, everyone_together.html, has one of each.

Run with: asgi-ws run examples.everyone_together:app
"""

import os
from pathlib import Path

from fastapi import Body, FastAPI
from fastapi.responses import FileResponse

from asgi_ws import Connection, Hub, WebSocketMiddleware
from asgi_ws.socketio import Socket, SocketIO

hub = Hub(os.environ.get("BROKER_URL", "memory://"))
sio = SocketIO(hub)
app = FastAPI()
app.mount("/socket.io", sio)
app.add_middleware(WebSocketMiddleware, hub=hub)

ROOM = sio.room("lobby")  # a Socket.IO room is a channel of the hub
hub.channel(ROOM, history=100)


async def say(by: str, text: str) -> None:
    await hub.publish(ROOM, {"by": by, "text": text})


@hub.websocket("/room")  # new WebSocket, new EventSource, and engine.io-client with this path
async def room(conn: Connection) -> None:
    await conn.subscribe(ROOM)
    async for text in conn:
        await say(f"/room by {conn.transport}", text)


@app.post("/room/messages")  # an EventSource only listens
async def post(text: str = Body(embed=True)) -> None:
    await say("a POST", text)


@sio.on("connect")
async def connect(socket: Socket) -> None:
    await socket.join("lobby")


@sio.on("say")
async def said(socket: Socket, text: str) -> None:
    await say(f"Socket.IO by {socket.transport}", text)


async def lobby(conn: Connection) -> list[str]:
    return [ROOM]


hub.serve_pubsub("/live", channels=lobby)  # the Centrifuge protocol


@hub.rpc("say")
async def called(conn: Connection, text: str) -> None:
    await say(f"/live by {conn.transport}", text)


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("everyone_together.html"))
