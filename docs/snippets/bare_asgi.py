from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub()


@hub.websocket("/echo")
async def echo(conn: Connection) -> None:
    async for message in conn:
        await conn.send(message)


async def application(scope, receive, send):
    """Any ASGI application: Django's, Quart's, one without a framework."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"hello"})


app = WebSocketMiddleware(application, hub=hub)
