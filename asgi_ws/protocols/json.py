"""JSON, validated on the way in."""

from typing import Any

from asgi_ws.messages import Publication
from asgi_ws.payloads import json_decoder, to_json
from asgi_ws.protocols.base import Protocol

__all__ = ["JsonProtocol"]


class JsonProtocol(Protocol[Any]):
    """JSON both ways: a message is read as the type that the endpoint expects, and all that is sent is JSON, strings
    included. Only `bytes` that somebody published stay what they are.

    Raises `TypeError` for a type that can't be read from JSON.
    """

    format = "json"

    def __init__(self, type_: Any = Any) -> None:
        self._decode = json_decoder(type_)

    def decode(self, payload: str | bytes) -> Any:
        return self._decode(payload)

    def encode(self, message: Any) -> str:
        return to_json(message)

    def encode_publication(self, publication: Publication) -> str | bytes:
        payload = publication.payload
        return to_json(payload.data) if payload.kind == "text" else payload.data
