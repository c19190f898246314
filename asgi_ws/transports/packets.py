"""Engine.IO v4 packets: read and written as a WebSocket carries them, one to a message, and as polling does, several
to a body. No I/O.

Over a WebSocket a packet is text, its type's digit first; a binary message is its bytes alone. In a body, packets stand
one behind the other with U+001E between them, and a binary message is `b` and its base64.
"""

import base64
import binascii
import json
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.frames import Frame
from asgi_ws.messages import Publication, Recovery
from asgi_ws.protocols import Protocol

__all__ = [
    "CLOSE",
    "MAX_PACKETS",
    "MESSAGE",
    "NOOP",
    "OPEN",
    "PING",
    "PONG",
    "PROBE",
    "UPGRADE",
    "Packet",
    "PacketFrame",
    "PacketProtocol",
    "decode_body",
    "decode_packet",
    "encode_body",
    "open_packet",
]

OPEN: Final = "0"
CLOSE: Final = "1"
PING: Final = "2"
PONG: Final = "3"
MESSAGE: Final = "4"
UPGRADE: Final = "5"
NOOP: Final = "6"

PROBE: Final = "probe"
"""What a ping says that tries a WebSocket before the session moves there, and the pong that answers it."""
MAX_PACKETS: Final = 10_000
"""How many packets one body may have. engine.io-client puts all that it has to say into one."""

_SEPARATOR = "\x1e"
_TYPES = frozenset("0123456")


class Packet(NamedTuple):
    """What one side tells the other; `data` is `bytes` for a binary message alone."""

    type: str
    data: str | bytes = ""


def decode_packet(payload: str | bytes) -> Packet:
    """The packet in a WebSocket's message. Raises `InvalidMessage`."""
    if isinstance(payload, bytes):
        return Packet(MESSAGE, payload)
    if payload[:1] not in _TYPES or not payload:
        raise InvalidMessage("not an Engine.IO packet", 1002)
    return Packet(payload[0], payload[1:])


def decode_body(body: bytes) -> Iterator[Packet]:
    """The packets in a request's body, read one by one and no further than they are asked for. Raises
    `InvalidMessage`."""
    start = 0
    for _ in range(MAX_PACKETS):
        end = body.find(b"\x1e", start)
        yield _decode_polled(body[start:] if end < 0 else body[start:end])
        if end < 0:
            return
        start = end + 1
    raise InvalidMessage(f"a body can have {MAX_PACKETS} packets", 1008)


def _decode_polled(part: bytes) -> Packet:
    if part[:1] == b"b":
        try:
            return Packet(MESSAGE, base64.b64decode(part[1:], validate=True))
        except binascii.Error:
            raise InvalidMessage("not base64", 1002) from None
    try:
        return decode_packet(part.decode())
    except UnicodeDecodeError:
        raise InvalidMessage("the text isn't UTF-8") from None


def encode_body(frames: Sequence["PacketFrame"]) -> bytes:
    """A response's body with the packets of these frames."""
    return frames[0].polled if len(frames) == 1 else b"\x1e".join([frame.polled for frame in frames])


def open_packet(values: dict[str, Any]) -> str:
    """The first packet of a session, which has the values that the client needs to know."""
    return OPEN + json.dumps(values, separators=(",", ":"))


class PacketFrame(Frame):
    """Packets for a client, which a WebSocket carries as every frame, and polling as a part of a body."""

    __slots__ = ("_polled",)

    def __init__(self, payload: str | bytes, attachments: Sequence[str | bytes] = ()) -> None:
        super().__init__(payload, attachments)
        self._polled: bytes | None = None

    @property
    def polled(self) -> bytes:
        """What stands in a body for these packets; like the rest, made once for all clients."""
        if self._polled is None:
            self._polled = b"\x1e".join(map(_encode_polled, self.payloads))
        return self._polled


def _encode_polled(payload: str | bytes) -> bytes:
    if isinstance(payload, str):
        if _SEPARATOR not in payload:
            return payload.encode()
        # A body has no other way to say U+001E, and what follows it would be read as packets that nobody has sent:
        # such a text arrives whole, as a binary message of its UTF-8.
        payload = payload[1:].encode()
    return b"b" + base64.b64encode(payload)


class PacketProtocol(Protocol[Any]):
    """What another protocol makes of messages and publications, as Engine.IO's message packets."""

    def __init__(self, contents: Protocol[Any]) -> None:
        self._contents = contents
        self.format = "eio4+" + contents.format

    def decode(self, payload: str | bytes) -> Any:
        """`payload` is a packet's content, as the link has handed it over."""
        return self._contents.decode(payload)

    def encode(self, message: Any) -> PacketFrame:
        return _wrap(self._contents.encode(message))

    def encode_publication(self, publication: Publication) -> PacketFrame:
        return _wrap(self._contents.encode_publication(publication))

    def encode_recovery(self, channel: str, recovery: Recovery) -> PacketFrame | None:
        words = self._contents.encode_recovery(channel, recovery)
        return None if words is None else _wrap(words)


def _wrap(encoded: str | bytes | Frame) -> PacketFrame:
    if isinstance(encoded, Frame):
        return PacketFrame(_packet(encoded.payload), [_packet(payload) for payload in encoded.attachments])
    return PacketFrame(_packet(encoded))


def _packet(payload: str | bytes) -> str | bytes:
    return MESSAGE + payload if isinstance(payload, str) else payload
