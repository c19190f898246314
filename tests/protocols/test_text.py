import pytest

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.protocols import PlainProtocol, TextProtocol


@pytest.mark.parametrize("payload", ["hello", "", '{"a": 1}', b"\x00\xff", b""])
def test_plain_reads_what_came(payload: str | bytes) -> None:
    assert PlainProtocol().decode(payload) == payload


@pytest.mark.parametrize("protocol", [PlainProtocol(), TextProtocol()])
def test_text_and_bytes_are_sent_as_they_are_and_the_rest_as_json(protocol: PlainProtocol) -> None:
    assert protocol.encode("hello") == "hello"
    assert protocol.encode(b"\x00") == b"\x00"
    assert protocol.encode({"a": 1}) == '{"a":1}'


def test_text_takes_no_binary_message() -> None:
    assert TextProtocol().decode("hello") == "hello"
    with pytest.raises(InvalidMessage, match="text is expected, not a binary message"):
        TextProtocol().decode(b"hello")
