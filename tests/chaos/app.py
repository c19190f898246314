"""The application of the workers: channels with a history, for clients who say where they were."""

import os
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware

from asgi_ws import Connection, Hub, Publication, WebSocketMiddleware

hub = Hub(os.environ["CHAOS_BROKER"], wait=True)
hub.channel("topic:{number}", history=20_000, ttl=600)


@hub.websocket("/topics/{number}")
async def topic(conn: Connection[str, Publication | Any], number: str) -> None:
    await conn.subscribe(f"topic:{number}", since=conn.query_params.get("since"))
    await conn.send({"pid": os.getpid()})
    async for _ in conn:
        pass


app = Starlette(middleware=[Middleware(WebSocketMiddleware, hub=hub)])
