"""Bytes as they are."""

from typing import Any

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.messages import Publication
from asgi_ws.payloads import encode
from asgi_ws.protocols.base import Protocol

__all__ = ["BytesProtocol"]


class BytesProtocol(Protocol[bytes]):
    """Binary messages both ways; what is published as text is sent as its UTF-8."""

    format = "bytes"

    def decode(self, payload: str | bytes) -> bytes:
        if isinstance(payload, bytes):
            return payload
        raise InvalidMessage("a binary message is expected, not text")

    def encode(self, message: Any) -> bytes:
        return _to_bytes(encode(message).data)

    def encode_publication(self, publication: Publication) -> bytes:
        return _to_bytes(publication.payload.data)


def _to_bytes(data: str | bytes) -> bytes:
    return data.encode() if isinstance(data, str) else data
