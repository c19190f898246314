"""Typed messages, a dependency, and answers to what can't be read. Run with: asgi-ws run examples.game:app"""

from typing import Annotated, Literal

from fastapi import Depends, FastAPI, HTTPException, Query
from pydantic import BaseModel, Field

from asgi_ws import Connection, Hub, InvalidMessage, WebSocketMiddleware

hub = Hub()
app = FastAPI()
app.add_middleware(WebSocketMiddleware, hub=hub)


class Join(BaseModel):
    type: Literal["join"]
    name: str = Field(max_length=20)


class Move(BaseModel):
    type: Literal["move"]
    x: int
    y: int


class Board(BaseModel):
    game: int
    text: str


async def current_user(token: Annotated[str, Query()] = "") -> str:
    if token != "let-me-in":
        raise HTTPException(401, "a token is needed")
    return "ann"


async def explain(conn: Connection, error: InvalidMessage) -> None:
    await conn.send({"error": error.reason})


@hub.websocket("/games/{game_id}", on_invalid=explain)
async def play(conn: Connection[Join | Move, Board], game_id: int, user: Annotated[str, Depends(current_user)]) -> None:
    await conn.subscribe(f"game:{game_id}")
    async for message in conn:
        match message:
            case Join(name=name):
                text = f"{user} joins as {name}"
            case Move(x=x, y=y):
                text = f"{user} moves to {x}, {y}"
        await conn.publish(f"game:{game_id}", Board(game=game_id, text=text))
