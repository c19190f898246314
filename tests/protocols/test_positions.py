import json
from typing import Any

import pytest

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.messages import Position, Publication, Recovery
from asgi_ws.payloads import encode
from asgi_ws.protocols import PositionsProtocol

PROTOCOL = PositionsProtocol()


@pytest.mark.parametrize(
    ("data", "name", "value"),
    [
        ('say "hello"', "data", 'say "hello"'),
        ({"a": [1, None]}, "data", {"a": [1, None]}),
        (b"\x00\xff", "base64", "AP8="),
    ],
)
def test_a_publication_says_where_it_stands(data: Any, name: str, value: Any) -> None:
    publication = Publication('room:"1"', encode(data), Position(7, "e-1"))
    expected = {"channel": 'room:"1"', "position": "7:e-1", name: value}
    assert json.loads(PROTOCOL.encode_publication(publication)) == expected
    assert PROTOCOL.encode(publication) == PROTOCOL.encode_publication(publication)


def test_without_a_history_it_stands_nowhere() -> None:
    publication = Publication("a", encode(1))
    assert json.loads(PROTOCOL.encode_publication(publication)) == {"channel": "a", "position": None, "data": 1}


@pytest.mark.parametrize(
    ("recovery", "recovered", "position"),
    [
        (Recovery(True, Position(3, "e")), True, "3:e"),
        (Recovery(False, Position(0, "e")), False, "0:e"),
        (Recovery(False, None), False, None),
    ],
)
def test_how_a_subscription_began_is_told(recovery: Recovery, recovered: bool, position: str | None) -> None:
    expected = {"channel": "a", "recovered": recovered, "position": position}
    assert json.loads(PROTOCOL.encode_recovery("a", recovery)) == expected


def test_everything_else_is_its_json() -> None:
    assert PROTOCOL.encode({"a": 1}) == '{"a":1}'


@pytest.mark.parametrize("payload", ["text", b"bytes", "{}"])
def test_nothing_is_expected_from_the_client(payload: str | bytes) -> None:
    with pytest.raises(InvalidMessage) as error:
        PROTOCOL.decode(payload)
    assert error.value.close_code == 1003


def test_an_event_says_itself_what_it_is_about() -> None:
    assert PROTOCOL.encode_publication(Publication("\x1fpresence:a", encode({"type": "join"}))) == '{"type":"join"}'
