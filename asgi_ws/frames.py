"""The bytes of RFC 6455 frames, as a server sends them."""

import struct

__all__ = ["Frame"]

_TEXT = 0x81  # FIN, opcode 1
_BINARY = 0x82  # FIN, opcode 2


class Frame:
    """One message for a client: its payload, and the bytes that go over the wire, built when first asked for.

    One frame is shared by every connection that gets the same message.
    """

    __slots__ = ("_size", "_wire", "payload")

    def __init__(self, payload: str | bytes) -> None:
        self.payload = payload
        self._wire: bytes | None = None
        self._size: int | None = None

    @property
    def size(self) -> int:
        """The payload's length in bytes."""
        if self._size is None:
            payload = self.payload
            if isinstance(payload, str) and not payload.isascii():
                payload = payload.encode()
            self._size = len(payload)
        return self._size

    @property
    def wire(self) -> bytes:
        """The frame's bytes: unmasked, in one fragment, not compressed (RFC 6455 section 5.2)."""
        if self._wire is None:
            payload = self.payload
            if isinstance(payload, str):
                self._wire = _frame(_TEXT, payload.encode())
            else:
                self._wire = _frame(_BINARY, payload)
        return self._wire


def _frame(first: int, payload: bytes) -> bytes:
    length = len(payload)
    if length < 126:
        return bytes((first, length)) + payload
    if length < 65536:
        return struct.pack("!BBH", first, 126, length) + payload
    return struct.pack("!BBQ", first, 127, length) + payload
