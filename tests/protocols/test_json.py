import pytest

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.messages import Publication
from asgi_ws.payloads import encode
from asgi_ws.protocols import JsonProtocol


@pytest.mark.parametrize("payload", ['{"a": [1]}', b'{"a": [1]}'])
def test_json_is_read_from_text_and_from_bytes(payload: str | bytes) -> None:
    assert JsonProtocol().decode(payload) == {"a": [1]}


def test_json_is_validated_as_the_type() -> None:
    protocol = JsonProtocol(dict[str, int])
    assert protocol.decode('{"a": 1}') == {"a": 1}
    with pytest.raises(InvalidMessage, match=r"^\$\[\.\.\.\]: Expected `int`"):
        protocol.decode('{"a": "x"}')


def test_all_that_is_sent_is_json_strings_included() -> None:
    protocol = JsonProtocol()
    assert protocol.encode("hello") == '"hello"'
    assert protocol.encode({"a": 1}) == '{"a":1}'
    assert protocol.encode(b"hi") == '"aGk="'


@pytest.mark.parametrize(("data", "payload"), [("hello", '"hello"'), ({"a": 1}, '{"a":1}'), (b"\xff", b"\xff")])
def test_only_bytes_that_were_published_stay_what_they_are(data: object, payload: str | bytes) -> None:
    assert JsonProtocol().encode_publication(Publication("news", encode(data))) == payload


def test_a_type_that_cannot_be_read_is_a_mistake_at_once() -> None:
    with pytest.raises(TypeError, match="can't be read from JSON"):
        JsonProtocol(type("Foreign", (), {}))
