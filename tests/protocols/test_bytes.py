import pytest

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.messages import Publication
from asgi_ws.payloads import encode
from asgi_ws.protocols import BytesProtocol

protocol = BytesProtocol()


def test_bytes_take_no_text() -> None:
    assert protocol.decode(b"\x00\xff") == b"\x00\xff"
    with pytest.raises(InvalidMessage, match="a binary message is expected, not text"):
        protocol.decode("hello")


def test_everything_is_sent_as_a_binary_message() -> None:
    assert protocol.encode(b"\x00") == b"\x00"
    assert protocol.encode("grüß") == "grüß".encode()
    assert protocol.encode({"a": 1}) == b'{"a":1}'
    assert protocol.encode_publication(Publication("news", encode("grüß"))) == "grüß".encode()
    assert protocol.encode_publication(Publication("news", encode(b"\xff"))) == b"\xff"
