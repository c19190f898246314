import pytest

from asgi_ws import testing
from examples.feed import app, hub


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_who_comes_back_gets_what_was_missed() -> None:
    async with hub:
        async with testing.connect(app, "/feed") as client:
            position = (await client.receive_json())["position"]
        await hub.publish("news", "missed")
        async with testing.connect(app, f"/feed?since={position}") as client:
            assert (await client.receive_json())["recovered"]
            assert (await client.receive_json())["data"] == "missed"
