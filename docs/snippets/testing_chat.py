import pytest

from asgi_ws import testing
from examples.chat import app


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_everybody_in_the_room_gets_it() -> None:
    async with testing.connect(app, "/chat/lobby") as ann, testing.connect(app, "/chat/lobby") as bob:
        await ann.send("hello")
        assert await ann.receive() == "hello"
        assert await bob.receive() == "hello"


@pytest.mark.anyio
async def test_rooms_are_apart() -> None:
    async with testing.connect(app, "/chat/lobby") as ann, testing.connect(app, "/chat/cellar") as bob:
        await ann.send("hello")
        assert await ann.receive() == "hello"
        await bob.send("anybody here?")
        assert await bob.receive() == "anybody here?"
