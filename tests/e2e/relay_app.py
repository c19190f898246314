"""An application for many workers: it answers every message with its number and the worker's process id."""

import os

from starlette.applications import Starlette
from starlette.middleware import Middleware

from asgi_ws import Connection, Hub, Limits, WebSocketMiddleware

hub = Hub(os.environ["CHAOS_BROKER"], limits=Limits(ping_interval=2, ping_timeout=2))


@hub.websocket("/count")
async def count(conn: Connection) -> None:
    await conn.send(f"process {os.getpid()}")
    number = 0
    async for message in conn:
        await conn.send(f"{number} {message}")
        number += 1


app = Starlette(middleware=[Middleware(WebSocketMiddleware, hub=hub)])
