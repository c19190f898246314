import dataclasses

import pytest

from asgi_ws.limits import Limits

FIELDS = [field.name for field in dataclasses.fields(Limits)]
OPTIONAL = [
    "message_size",
    "channels",
    "recovery",
    "connections",
    "connections_per_address",
    "messages_per_second",
    "ping_interval",
    "ping_timeout",
]


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [0, -1, -0.5, float("nan"), float("-inf")])
def test_every_limit_is_more_than_nothing(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Limits\({name}=.*\): must be more than 0"):
        Limits(**{name: value})


@pytest.mark.parametrize("name", FIELDS)
def test_every_limit_can_be_changed_alone(name: str) -> None:
    limits = Limits(**{name: 7})
    assert getattr(limits, name) == 7
    assert dataclasses.replace(limits, **{name: getattr(Limits(), name)}) == Limits()


@pytest.mark.parametrize("name", OPTIONAL)
def test_none_is_no_limit(name: str) -> None:
    assert getattr(Limits(**{name: None}), name) is None


@pytest.mark.parametrize("name", sorted(set(FIELDS) - set(OPTIONAL)))
def test_what_holds_memory_or_the_servers_stop_has_a_limit(name: str) -> None:
    with pytest.raises(ValueError, match=rf"Limits\({name}=None\): this one can't be switched off"):
        Limits(**{name: None})


def test_limits_are_given_by_name_and_stay() -> None:
    with pytest.raises(TypeError):
        Limits(1024)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits().channels = 1
    with pytest.raises(TypeError, match="chanels"):
        Limits(chanels=3)
    assert hash(Limits()) == hash(Limits(channels=128))
