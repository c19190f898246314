"""The server that `brokers` measures. The environment's BROKER is the URL of what joins its processes."""

import os

from starlette.applications import Starlette

from asgi_ws import Connection, Hub, WebSocketMiddleware

__all__ = ["KEPT", "app"]

KEPT = 300
"""How many publications the channels have that keep any: their names begin with `kept:`."""

hub = Hub(os.environ.get("BROKER", "memory://"))
hub.channel("kept:{name}", history=KEPT)
app = Starlette()
app.add_middleware(WebSocketMiddleware, hub=hub)


@hub.websocket("/channels/{channel}")
async def listen(conn: Connection, channel: str) -> None:
    """Subscribe, since the position in the query if there is one, and publish what comes."""
    await conn.subscribe(channel, since=conn.query_params.get("since"))
    async for text in conn:
        await conn.publish(channel, text)


@hub.websocket("/channels/{channel}/later")
async def listen_later(conn: Connection, channel: str) -> None:
    """Subscribe when told to, since the position that the message says."""
    async for position in conn:
        await conn.subscribe(channel, since=position)
