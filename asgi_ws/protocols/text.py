"""Text as it is."""

from typing import Any

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.messages import Publication
from asgi_ws.payloads import encode
from asgi_ws.protocols.base import Protocol

__all__ = ["PlainProtocol", "TextProtocol"]


class PlainProtocol(Protocol[Any]):
    """What an endpoint without an annotation speaks: `str` is a text frame and `bytes` are a binary one, both ways;
    anything else is sent as JSON."""

    format = "plain"

    def decode(self, payload: str | bytes) -> Any:
        return payload

    def encode(self, message: Any) -> str | bytes:
        # What most messages are needs no payload around it.
        return message if type(message) is str and message.isascii() else encode(message).data

    def encode_publication(self, publication: Publication) -> str | bytes:
        return publication.payload.data


class TextProtocol(PlainProtocol):
    """The same for an endpoint that takes text only."""

    def decode(self, payload: str | bytes) -> str:
        if isinstance(payload, str):
            return payload
        raise InvalidMessage("text is expected, not a binary message")
