"""JSON in which publications say where they stand."""

import base64
from typing import Any

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.messages import INTERNAL, Position, Publication, Recovery
from asgi_ws.payloads import to_json
from asgi_ws.protocols.base import Protocol

__all__ = ["PositionsProtocol"]


class PositionsProtocol(Protocol[Any]):
    """What `Connection[..., Publication]` is sent: `{"channel": ..., "position": ..., "data": ...}` for a publication,
    with `base64` instead of `data` for bytes; before the first one of a channel, and before those that were missed,
    `{"channel": ..., "recovered": ..., "position": ...}`. Everything else is its JSON, the events of presence
    included."""

    format = "positions"

    def decode(self, payload: str | bytes) -> Any:
        raise InvalidMessage("nothing is expected from this client", 1003)

    def encode(self, message: Any) -> str:
        if isinstance(message, Publication):
            return self.encode_publication(message)
        return to_json(message)

    def encode_publication(self, publication: Publication) -> str:
        payload = publication.payload
        if publication.channel.startswith(INTERNAL) and isinstance(payload.data, str):
            # An event, which says itself what it is about.
            return payload.data
        if isinstance(payload.data, bytes):
            data = f'"base64":"{base64.b64encode(payload.data).decode()}"'
        else:
            data = '"data":' + (to_json(payload.data) if payload.kind == "text" else payload.data)
        return f'{{"channel":{to_json(publication.channel)},"position":{_words(publication.position)},{data}}}'

    def encode_recovery(self, channel: str, recovery: Recovery) -> str:
        recovered = "true" if recovery.recovered else "false"
        return f'{{"channel":{to_json(channel)},"recovered":{recovered},"position":{_words(recovery.position)}}}'


def _words(position: Position | None) -> str:
    return "null" if position is None else to_json(str(position))
