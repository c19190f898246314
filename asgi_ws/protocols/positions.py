"""JSON in which publications say where they stand."""

import base64
import json
from typing import Any

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.messages import Publication, Recovery
from asgi_ws.payloads import to_json
from asgi_ws.protocols.base import Protocol

__all__ = ["PositionsProtocol"]


class PositionsProtocol(Protocol[Any]):
    """What `Connection[..., Publication]` is sent: `{"channel": ..., "position": ..., "data": ...}` for a publication,
    with `base64` instead of `data` for bytes, and `{"recovered": ..., "position": ...}` for a `Recovery`. Everything
    else is its JSON."""

    format = "positions"

    def decode(self, payload: str | bytes) -> Any:
        raise InvalidMessage("nothing is expected from this client", 1003)

    def encode(self, message: Any) -> str:
        if isinstance(message, Publication):
            return self.encode_publication(message)
        if isinstance(message, Recovery):
            position = None if message.position is None else str(message.position)
            return to_json({"recovered": message.recovered, "position": position})
        return to_json(message)

    def encode_publication(self, publication: Publication) -> str:
        payload = publication.payload
        if isinstance(payload.data, bytes):
            data = f'"base64":"{base64.b64encode(payload.data).decode()}"'
        else:
            data = '"data":' + (to_json(payload.data) if payload.kind == "text" else payload.data)
        position = "null" if publication.position is None else json.dumps(str(publication.position))
        return f'{{"channel":{to_json(publication.channel)},"position":{position},{data}}}'
