from typing import Any

import pytest

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.protocols import BytesProtocol, JsonProtocol, MixedProtocol, PlainProtocol, TextProtocol, choose_protocol


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ((), PlainProtocol),
        ((Any,), PlainProtocol),
        ((object,), PlainProtocol),
        ((Any, Any), PlainProtocol),
        ((str,), TextProtocol),
        ((str, str), TextProtocol),
        ((str, Any), TextProtocol),
        ((Any, str), TextProtocol),
        ((bytes,), BytesProtocol),
        ((Any, bytes), BytesProtocol),
        ((dict,), JsonProtocol),
        ((dict, list), JsonProtocol),
        ((str | None,), JsonProtocol),
        ((str, bytes), MixedProtocol),
        ((str, dict), MixedProtocol),
        ((dict, str), MixedProtocol),
        ((Any, dict), MixedProtocol),
    ],
    ids=repr,
)
def test_the_annotation_chooses_the_protocol(types: tuple[Any, ...], expected: type) -> None:
    assert type(choose_protocol(*types)) is expected


def test_mixed_reads_as_one_does_and_writes_as_the_other() -> None:
    protocol = choose_protocol(dict, str)
    assert protocol.decode('{"a": 1}') == {"a": 1}
    assert protocol.encode("hello") == "hello"
    assert protocol.format == TextProtocol.format
    with pytest.raises(InvalidMessage):
        protocol.decode("hello")


def test_an_open_way_in_takes_text_and_bytes_where_json_goes_out() -> None:
    protocol = choose_protocol(Any, dict)
    assert protocol.decode("hello") == "hello"
    assert protocol.decode(b"hello") == b"hello"
    assert protocol.encode("hello") == '"hello"'


@pytest.mark.parametrize("types", [(type("Foreign", (), {}),), (str, type("Foreign", (), {}))])
def test_a_type_that_cannot_be_read_is_a_mistake_at_once(types: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match="Foreign can't be read from JSON"):
        choose_protocol(*types)
