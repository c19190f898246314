"""RFC 6455 frames: built as a server sends them, parsed as a server receives them, with the compression of RFC 7692.

Bytes in, values out; nothing here knows of a socket. Compression is without context takeover in both directions, so
that one compressed frame serves every client, and no connection keeps a compressor.
"""

import codecs
import struct
import zlib
from collections.abc import Sequence
from typing import Final, NamedTuple, cast

__all__ = [
    "BINARY",
    "CLOSE",
    "PING",
    "PONG",
    "TEXT",
    "Frame",
    "Parser",
    "Received",
    "Violation",
    "control_frame",
    "frame_of",
    "may_be_sent",
    "size_of",
]

TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

_FIN = 0x80
_RSV1 = 0x40
_MASKED = 0x80
_TAIL = b"\x00\x00\xff\xff"
"""RFC 7692 section 7.2: every message's compressed data ends with it, so it isn't sent."""

_COMPRESS_FROM = 256
"""Below so many bytes, compression saves less than it costs."""
_WINDOW_BITS = 15
_LEVEL = 5
"""Of zlib's 1 to 9, the one behind which text gets hardly smaller."""


class Frame:
    """One message for a client: its payload, and the bytes that go over the wire, built when first asked for.

    `attachments` are messages that belong to it: they follow directly, and nothing comes between. One frame is shared
    by every connection that gets the same message.
    """

    __slots__ = ("_compressed", "_size", "_wire", "attachments", "payload")

    def __init__(self, payload: str | bytes, attachments: Sequence[str | bytes] = ()) -> None:
        self.payload = payload
        self.attachments = attachments
        self._wire: bytes | None = None
        self._compressed: bytes | None = None
        self._size: int | None = None

    @property
    def size(self) -> int:
        """The payload's length in bytes, with those of the attachments."""
        if self._size is None:
            self._size = size_of(self.payload)
            if self.attachments:
                self._size += sum(map(size_of, self.attachments))
        return self._size

    @property
    def payloads(self) -> Sequence[str | bytes]:
        """The payload and the attachments, each of which is a message of its own."""
        return (self.payload, *self.attachments)

    @property
    def wire(self) -> bytes:
        """The frame's bytes: unmasked, in one fragment, not compressed (RFC 6455 section 5.2)."""
        if self._wire is None:
            wire = _build_plain(self.payload)
            self._wire = wire + b"".join(map(_build_plain, self.attachments)) if self.attachments else wire
        return self._wire

    @property
    def compressed(self) -> bytes:
        """The same for clients that take compression (RFC 7692 section 7.2.1), where it makes a frame smaller."""
        if self._compressed is None:
            self._compressed = self.wire
            if self.size >= _COMPRESS_FROM:
                compressed = b"".join(map(_build_compressed, self.payloads))
                if len(compressed) < len(self.wire):
                    self._compressed = compressed
        return self._compressed


def frame_of(encoded: str | bytes | Frame) -> Frame:
    """What a protocol has encoded, as a frame."""
    return encoded if isinstance(encoded, Frame) else Frame(encoded)


def size_of(payload: str | bytes) -> int:
    """In bytes. A lone surrogate, which no UTF-8 has, counts as what it would take."""
    if isinstance(payload, bytes) or payload.isascii():
        return len(payload)
    return len(payload.encode(errors="surrogatepass"))


def control_frame(opcode: int, payload: bytes = b"") -> bytes:
    """A ping, a pong or a close frame. The payload has 125 bytes at the most (RFC 6455 section 5.5)."""
    return bytes((_FIN | opcode, len(payload))) + payload


def may_be_sent(code: int) -> bool:
    """Whether a close frame can have this code: RFC 6455 section 7.4, and what IANA has registered since."""
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999


def _build_plain(payload: str | bytes) -> bytes:
    if isinstance(payload, str):
        return _build(_FIN | TEXT, payload.encode())
    return _build(_FIN | BINARY, payload)


def _build_compressed(payload: str | bytes) -> bytes:
    opcode, data = (TEXT, payload.encode()) if isinstance(payload, str) else (BINARY, payload)
    if len(data) >= _COMPRESS_FROM:
        compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, -_WINDOW_BITS)
        compressed = compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)
        if len(compressed) < len(data):
            return _build(_FIN | _RSV1 | opcode, compressed.removesuffix(_TAIL))
    return _build(_FIN | opcode, data)


def _build(first: int, payload: bytes) -> bytes:
    length = len(payload)
    if length < 126:
        return bytes((first, length)) + payload
    if length < 65536:
        return struct.pack("!BBH", first, 126, length) + payload
    return struct.pack("!BBQ", first, 127, length) + payload


class Received(NamedTuple):
    """A whole message of the client's, or one of its control frames.

    `data` is a `str` for text; for a close frame it is the code and the reason, 1005 where it has none.
    """

    opcode: int
    data: str | bytes | tuple[int, str]


def mask(data: bytes, key: bytes) -> bytes:
    """XOR with a key of four bytes, over and over (RFC 6455 section 5.3)."""
    length = len(data)
    keys = (key * (length // 4 + 1))[:length]
    return (int.from_bytes(data, "little") ^ int.from_bytes(keys, "little")).to_bytes(length, "little")


try:
    # Compiled, and many times as fast.
    from websockets.speedups import apply_mask
except ImportError:
    apply_mask = mask  # type: ignore[assignment]


class Violation(Exception):
    """The client broke the protocol: the connection is to be closed with `code` and `reason`."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class Parser:
    """Makes messages of the bytes that a client sends, in whatever pieces they come.

    `max_size` bounds a message in bytes, inflated; `max_fragments` the frames that it may come in, since empty ones
    never add up to a size. What is buffered is never more than `max_size` and what was fed last.
    """

    __slots__ = (
        "_buffer",
        "_compressed",
        "_decoder",
        "_fragments",
        "_needed",
        "_opcode",
        "_parts",
        "_size",
        "deflate",
        "max_fragments",
        "max_size",
        "violation",
    )

    def __init__(self, max_size: int | None, max_fragments: int, *, deflate: bool) -> None:
        self.max_size = max_size
        self.max_fragments = max_fragments
        self.deflate = deflate
        self.violation: Violation | None = None
        """What the client has done wrong; nothing is taken afterwards."""
        self._buffer: bytearray | None = None
        self._needed = 0
        # A message that has begun and not ended: 0 is none.
        self._opcode = 0
        self._compressed = False
        self._fragments = 0
        self._size = 0
        self._parts: bytearray | None = None
        self._decoder: codecs.IncrementalDecoder | None = None

    @property
    def pending(self) -> int:
        """How many bytes are kept of what has not come to its end."""
        return (len(self._buffer) if self._buffer else 0) + self._size

    def feed(self, data: bytes) -> list[Received]:
        """What has become whole with these bytes, in its order. Raises nothing: see `violation`."""
        received: list[Received] = []
        if self._buffer is None and not self._opcode and (short := self._short(data)) is not None:
            received.append(short)
            return received
        if self._buffer is not None:
            self._buffer += data
            if len(self._buffer) < self._needed:
                # Looked at again when the frame is whole, not with each of its pieces.
                return received
            data = bytes(self._buffer)
        if self.violation is None:
            try:
                self._parse(data, received)
            except Violation as violation:
                self.violation = violation
                self._buffer = self._parts = None
        return received

    def _short(self, data: bytes) -> Received | None:
        """What mostly comes: one short message, alone and in one frame. `None` for everything else, right or wrong."""
        size = len(data) - 6
        if size <= 0 or self.violation is not None:
            return None
        first, second, start = data[0], data[1], 6
        if second == _MASKED | 126:
            start, size = 8, size - 2
            if size <= 0 or data[2] << 8 | data[3] != size:
                return None
        elif size >= 126 or second != _MASKED | size:
            return None
        if (first != 0x81 and first != 0x82) or (self.max_size is not None and size > self.max_size):
            return None
        payload = apply_mask(data[start:], data[start - 4 : start])
        if first == 0x82:
            return Received(BINARY, payload)
        try:
            return Received(TEXT, payload.decode())
        except UnicodeDecodeError:
            return None

    def _parse(self, data: bytes, received: list[Received]) -> None:
        position, length = 0, len(data)
        self._needed = 0
        while length - position >= 2:
            first, second = data[position], data[position + 1]
            size = second & 0x7F
            start = position + 6
            if size == 126:
                if length - position < 4:
                    break
                size = int.from_bytes(data[position + 2 : position + 4])
                start += 2
            elif size == 127:
                if length - position < 10:
                    break
                size = int.from_bytes(data[position + 2 : position + 10])
                start += 8
            self._check(first, second, size)
            end = start + size
            if end > length:
                self._needed = end - position
                break
            payload = apply_mask(data[start:end], data[start - 4 : start]) if size else b""
            position = end
            if first & 0x0F >= CLOSE:
                received.append(_control(first & 0x0F, payload))
            else:
                message = self._take(first, payload)
                if message is not None:
                    received.append(message)
        self._buffer = bytearray(data[position:]) if position < length else None

    def _check(self, first: int, second: int, size: int) -> None:
        """What a frame's head alone can be wrong in (RFC 6455 sections 5.2 to 5.5, RFC 7692 section 6)."""
        opcode = first & 0x0F
        if not second & _MASKED:
            raise Violation(1002, "a client's frames are masked")
        if opcode >= CLOSE:
            if opcode > PONG:
                raise Violation(1002, f"there is no opcode {opcode:#x}")
            if first & 0x70:
                raise Violation(1002, "a reserved bit is set")
            if not first & _FIN or size > 125:
                raise Violation(1002, "a control frame is whole and has 125 bytes at the most")
            return
        if opcode > BINARY:
            raise Violation(1002, f"there is no opcode {opcode:#x}")
        if first & 0x30 or (first & _RSV1 and not (self.deflate and opcode)):
            raise Violation(1002, "a reserved bit is set")
        if bool(opcode) == bool(self._opcode):
            raise Violation(1002, "a message has begun already" if opcode else "no message has begun")
        if size >= 1 << 63:
            raise Violation(1002, "a length has 63 bits")
        if self.max_size is not None and self._size + size > self.max_size:
            raise Violation(1009, f"a message can have {self.max_size} bytes")
        if self._fragments >= self.max_fragments:
            raise Violation(1008, f"a message can have {self.max_fragments} fragments")

    def _take(self, first: int, payload: bytes) -> Received | None:
        """A frame of a message; the message, if it was the last one."""
        opcode = first & 0x0F
        if opcode and first & _FIN:
            # By far the most: a message in one frame.
            if first & _RSV1:
                payload = self._inflate(payload)
            return Received(opcode, payload) if opcode == BINARY else Received(TEXT, _text(payload))
        if opcode:
            self._opcode = opcode
            self._compressed = bool(first & _RSV1)
            self._parts = bytearray()
            if opcode == TEXT and not self._compressed:
                self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._fragments += 1
        self._size += len(payload)
        last = bool(first & _FIN)
        if self._decoder is not None:
            # Text is checked as it comes: what can't become UTF-8 any more isn't waited for. It isn't kept in as many
            # pieces as it comes in, though: those would take more memory than it has bytes.
            try:
                self._decoder.decode(payload, last)
            except UnicodeDecodeError:
                raise Violation(1007, "the text isn't UTF-8") from None
        cast(bytearray, self._parts).extend(payload)
        return self._whole() if last else None

    def _whole(self) -> Received:
        opcode, parts, compressed = self._opcode, self._parts, self._compressed
        self._opcode = self._fragments = self._size = 0
        self._parts = self._decoder = None
        self._compressed = False
        data = bytes(cast(bytearray, parts))
        if compressed:
            data = self._inflate(data)
        return Received(BINARY, data) if opcode == BINARY else Received(TEXT, _text(data))

    def _inflate(self, data: bytes) -> bytes:
        """Never more than the limit, however much a bomb would make."""
        inflater = zlib.decompressobj(-_WINDOW_BITS)
        try:
            inflated = inflater.decompress(data + _TAIL, 0 if self.max_size is None else self.max_size + 1)
        except zlib.error:
            raise Violation(1007, "the message can't be inflated") from None
        if self.max_size is not None and len(inflated) > self.max_size:
            raise Violation(1009, f"a message can have {self.max_size} bytes")
        return inflated


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Violation(1007, "the text isn't UTF-8") from None


def _control(opcode: int, payload: bytes) -> Received:
    if opcode != CLOSE:
        return Received(opcode, payload)
    if not payload:
        return Received(CLOSE, (1005, ""))
    if len(payload) == 1:
        raise Violation(1002, "a close code has two bytes")
    code = int.from_bytes(payload[:2])
    if not may_be_sent(code):
        raise Violation(1002, f"{code} isn't a close code")
    return Received(CLOSE, (code, _text(payload[2:])))
