"""What the transports over HTTP have in common."""

import asyncio

import pytest
from starlette.types import Message

from asgi_ws.transports.base import send_body, while_connected

pytestmark = pytest.mark.anyio


async def test_receive_that_fails_is_a_client_that_has_left() -> None:
    gone = asyncio.Event()

    async def receive() -> Message:
        raise RuntimeError("on purpose")

    async with while_connected(receive, gone.set):
        await asyncio.wait_for(gone.wait(), 1)


@pytest.mark.parametrize(("size", "pieces"), [(0, 1), (1, 1), (65_536, 1), (65_537, 2), (200_000, 4)])
async def test_large_body_leaves_in_pieces(size: int, pieces: int) -> None:
    sent: list[Message] = []
    left: list[int] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await send_body(send, b"x" * size, False, left.append)
    assert b"".join(message["body"] for message in sent) == b"x" * size
    assert [message["more_body"] for message in sent] == [True] * (pieces - 1) + [False]
    assert left == [size - 65_536 * n for n in range(pieces)]
