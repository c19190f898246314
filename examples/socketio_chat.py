"""A chat in rooms for Socket.IO clients; its page is socketio_chat.html.

Run with: asgi-ws run examples.socketio_chat:app
"""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

from asgi_ws import Hub, WebSocketMiddleware
from asgi_ws.socketio import ConnectionRefused, Socket, SocketIO

hub = Hub()
sio = SocketIO(hub)
app = FastAPI()
app.mount("/socket.io", sio)
app.add_middleware(WebSocketMiddleware, hub=hub)


@sio.on("connect")
async def connect(socket: Socket, auth: dict[str, str]) -> None:
    if not auth.get("name"):
        raise ConnectionRefused("a name is needed")
    socket.data["name"] = auth["name"]


@sio.on("enter")
async def enter(socket: Socket, room: str) -> str:
    await socket.join(room)
    await socket.to(room).emit("entered", socket.data["name"])
    return f"Welcome to {room}!"  # the acknowledgement


@sio.on("say")
async def say(socket: Socket, room: str, text: str) -> None:
    if room in socket.rooms:
        await sio.to(room).emit("said", socket.data["name"], text)


@sio.on("disconnect")
async def disconnect(socket: Socket, reason: str) -> None:
    for room in socket.rooms:
        await sio.to(room).emit("left", socket.data["name"], reason)


@app.post("/announce/{room}")
async def announce(room: str, text: str) -> None:
    await sio.to(room).emit("said", "the house", text)


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("socketio_chat.html"))
