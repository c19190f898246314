import pytest

from asgi_ws import ConnectionClosed, testing
from examples.game import app, current_user


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_a_token_is_needed() -> None:
    with pytest.raises(testing.Refused) as refused:
        async with testing.connect(app, "/games/1"):
            pass
    assert refused.value.status_code == 401
    assert refused.value.json() == {"detail": "a token is needed"}


@pytest.mark.anyio
async def test_dependencies_can_be_replaced() -> None:
    app.dependency_overrides[current_user] = lambda: "bob"
    try:
        async with testing.connect(app, "/games/1") as client:
            await client.send({"type": "move", "x": 1, "y": 2})
            assert await client.receive_json() == {"game": 1, "text": "bob moves to 1, 2"}
    finally:
        app.dependency_overrides.clear()


@pytest.mark.anyio
async def test_nothing_can_be_sent_after_the_end() -> None:
    async with testing.connect(app, "/games/1?token=let-me-in") as client:
        await client.close()
        with pytest.raises(ConnectionClosed):
            await client.send({"type": "move", "x": 1, "y": 2})
