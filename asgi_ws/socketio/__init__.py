"""Socket.IO: its clients, unchanged, in the hub's channels."""

from asgi_ws.socketio.server import SocketIO
from asgi_ws.socketio.socket import Broadcast, ConnectionRefused, Socket, Volatile

__all__ = ["Broadcast", "ConnectionRefused", "Socket", "SocketIO", "Volatile"]
