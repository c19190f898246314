import pytest

from tests.chaos.scenarios import SCENARIOS, Scale
from tests.programs import program

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("name", SCENARIOS)
async def test_promises_hold_while(name: str) -> None:
    # Who needs another program asks for it.
    if "nats" not in name:
        program("redis-server")
    outcome = await SCENARIOS[name](Scale())
    assert outcome.problems() == []
    assert len(outcome.ledger.confirmed) > 100
    assert outcome.figures.get("noticed after (s)", 0) <= 5.5
    assert outcome.figures.get("healed after (s)", 0) <= 5
