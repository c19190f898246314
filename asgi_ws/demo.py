"""The demo application of `asgi-ws demo`: a chat in rooms, and a chart that an HTTP route publishes to.

Its page is demo.html, which talks to it with the browser's own `WebSocket`.
"""

import dataclasses
import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Route

from asgi_ws.connection import Connection
from asgi_ws.exceptions import InvalidMessage
from asgi_ws.hub import Hub
from asgi_ws.middleware import WebSocketMiddleware
from asgi_ws.payloads import json_decoder

__all__ = ["app", "hub"]

hub = Hub()


@dataclasses.dataclass
class Say:
    """What a page sends to the chat."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=40)]
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]


@dataclasses.dataclass
class Said(Say):
    """What all pages in the room get of it."""

    at: datetime.datetime


@dataclasses.dataclass
class Measurement:
    """A point of the chart."""

    value: Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]


read_measurement = json_decoder(Measurement)


@hub.websocket("/chat/{room}")
async def chat(conn: Connection[Say, Any], room: str) -> None:
    """Whatever one page says is published to all in the room."""
    await conn.subscribe(f"chat:{room}")
    async for said in conn:
        await conn.publish(f"chat:{room}", Said(said.name, said.text, datetime.datetime.now(datetime.UTC)))


@hub.websocket("/metrics/{name}")
async def watch(conn: Connection, name: str) -> None:
    """The page only listens; this ends when it leaves."""
    await conn.subscribe(f"metrics:{name}")
    await conn.receive()


async def report(request: Request) -> JSONResponse:
    """Publish a measurement to all pages that show its chart."""
    try:
        measurement: Measurement = read_measurement(await request.body())
    except InvalidMessage as error:
        return JSONResponse({"error": error.reason}, 400)
    await hub.publish(f"metrics:{request.path_params['name']}", measurement)
    return JSONResponse({"value": measurement.value})


async def page(request: Request) -> FileResponse:
    """demo.html"""
    return FileResponse(Path(__file__).with_name("demo.html"))


app = Starlette(routes=[Route("/", page), Route("/metrics/{name}", report, methods=["POST"])])
app.add_middleware(WebSocketMiddleware, hub=hub)
