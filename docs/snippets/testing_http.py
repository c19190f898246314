import pytest

from asgi_ws import testing
from examples.dashboard import app


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_a_report_reaches_who_watches() -> None:
    async with testing.connect(app, "/watch/load") as client:
        response = await testing.request(app, "POST", "/metrics/load?value=0.5")
        assert response.status_code == 200
        assert await client.receive_json() == {"value": 0.5}


@pytest.mark.anyio
async def test_a_response_can_be_read_while_it_is_sent() -> None:
    async with testing.stream(app, "POST", "/metrics/load?value=1") as response:
        pieces = [piece async for piece in response.aiter_bytes()]
    assert b"".join(pieces) == b'{"value":1.0}'
