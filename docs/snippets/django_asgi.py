import os
from typing import Any

from django.contrib.auth import aget_user
from django.contrib.sessions.backends.db import SessionStore
from django.core.asgi import get_asgi_application
from django.http import HttpRequest
from starlette.exceptions import HTTPException

from asgi_ws import Connection, Hub, WebSocketMiddleware

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mysite.settings")
hub = Hub()
app = WebSocketMiddleware(get_asgi_application(), hub=hub)


@hub.on_connect
async def authenticate(conn: Connection[Any, Any]) -> None:
    request = HttpRequest()
    request.session = SessionStore(conn.cookies.get("sessionid"))
    user = await aget_user(request)
    if not user.is_authenticated:
        raise HTTPException(401, "log in first")
    conn.user = user


@hub.websocket("/chat/{room}")
async def chat(conn: Connection, room: str) -> None:
    await conn.subscribe(f"chat:{room}")
    async for text in conn:
        await conn.publish(f"chat:{room}", f"{conn.user.username}: {text}")
