from fastapi import APIRouter, FastAPI

from asgi_ws import Connection, Hub, WebSocketMiddleware

hub = Hub()
router = APIRouter(prefix="/api")


@router.websocket("/games/{game_id}")
@hub.endpoint
async def play(conn: Connection, game_id: int) -> None:
    await conn.send(f"this is game {game_id}")
    async for text in conn:
        await conn.send(text)


app = FastAPI()
app.include_router(router)
app.add_middleware(WebSocketMiddleware, hub=hub)
