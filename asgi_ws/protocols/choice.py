"""Which protocol an endpoint's annotation asks for."""

import typing
from typing import Any

from asgi_ws.frames import Frame
from asgi_ws.messages import Publication, Recovery
from asgi_ws.protocols.base import Protocol
from asgi_ws.protocols.bytes import BytesProtocol
from asgi_ws.protocols.json import JsonProtocol
from asgi_ws.protocols.positions import PositionsProtocol
from asgi_ws.protocols.text import PlainProtocol, TextProtocol

__all__ = ["MixedProtocol", "choose_protocol"]


class MixedProtocol(Protocol[Any]):
    """Reads as one protocol does and writes as another."""

    def __init__(self, reads: Protocol[Any], writes: Protocol[Any]) -> None:
        self._reads = reads
        self._writes = writes
        self.format = writes.format

    def decode(self, payload: str | bytes) -> Any:
        return self._reads.decode(payload)

    def encode(self, message: Any) -> str | bytes | Frame:
        return self._writes.encode(message)

    def encode_publication(self, publication: Publication) -> str | bytes | Frame:
        return self._writes.encode_publication(publication)

    def encode_recovery(self, channel: str, recovery: Recovery) -> str | bytes | Frame | None:
        return self._writes.encode_recovery(channel, recovery)


def choose_protocol(incoming: Any = Any, outgoing: Any = Any) -> Protocol[Any]:
    """The protocol for `Connection[incoming, outgoing]`: `str` and `bytes` travel as they are, every other type as
    JSON; a direction that is left open follows the other. Where `outgoing` is `Publication`, or a union with it,
    publications travel with their positions.

    Raises `TypeError` for a type that can't be read from JSON.
    """
    reads = _protocol_for(outgoing if incoming is Any and outgoing in (str, bytes) else incoming)
    if outgoing is Any:
        return reads
    positions = Publication in (outgoing, *typing.get_args(outgoing))
    writes = PositionsProtocol() if positions else _protocol_for(outgoing)
    return reads if reads.format == writes.format else MixedProtocol(reads, writes)


def _protocol_for(type_: Any) -> Protocol[Any]:
    if type_ in (Any, object):
        return PlainProtocol()
    if type_ is str:
        return TextProtocol()
    if type_ is bytes:
        return BytesProtocol()
    return JsonProtocol(type_)
