import importlib.util
import itertools
import os
import random
import struct
import sys
import zlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame as OtherFrame
from websockets.frames import Opcode
from websockets.protocol import State
from websockets.uri import parse_uri
from websockets.utils import apply_mask

from asgi_ws import frames
from asgi_ws.frames import BINARY, CLOSE, PING, PONG, TEXT, Frame, Parser, Received, control_frame

quick = settings(max_examples=60, deadline=None, database=None)

KIB = 1024


# What a server sends, as another implementation's client reads it


def read_by_client(wire: bytes, *, deflate: bool = False) -> list[tuple[Opcode, bytes, bool]]:
    client = ClientProtocol(parse_uri("ws://localhost/"), state=State.OPEN, max_size=None)
    client.extensions = [PerMessageDeflate(True, True, 15, 15)] if deflate else []
    client.receive_data(wire)
    assert client.parser_exc is None
    events = client.events_received()
    assert all(isinstance(event, OtherFrame) for event in events)
    return [(event.opcode, bytes(event.data), event.fin) for event in events]


def expected_of(payload: str | bytes) -> tuple[Opcode, bytes, bool]:
    return (Opcode.TEXT, payload.encode(), True) if isinstance(payload, str) else (Opcode.BINARY, payload, True)


@pytest.mark.parametrize(
    ("length", "header"),
    [
        (0, b"\x82\x00"),
        (1, b"\x82\x01"),
        (125, b"\x82\x7d"),
        (126, b"\x82\x7e\x00\x7e"),
        (127, b"\x82\x7e\x00\x7f"),
        (65535, b"\x82\x7e\xff\xff"),
        (65536, b"\x82\x7f\x00\x00\x00\x00\x00\x01\x00\x00"),
        (200_000, b"\x82\x7f\x00\x00\x00\x00\x00\x03\x0d\x40"),
    ],
)
def test_the_length_has_7_16_or_64_bits(length: int, header: bytes) -> None:
    frame = Frame(b"x" * length)
    assert frame.wire == header + b"x" * length
    assert frame.size == length
    assert read_by_client(frame.wire) == [(Opcode.BINARY, b"x" * length, True)]


def test_text_is_utf8() -> None:
    frame = Frame("grüß € 🎈")
    assert frame.wire[0] == 0x81
    assert read_by_client(frame.wire) == [(Opcode.TEXT, "grüß € 🎈".encode(), True)]
    assert frame.size == len("grüß € 🎈".encode())


def test_wire_size_and_compressed_are_made_once() -> None:
    frame = Frame("ü" * 1000)
    assert frame.size == frame.size == 2000
    assert frame.wire is frame.wire
    assert frame.compressed is frame.compressed
    assert frame.payload == "ü" * 1000


@quick
@given(st.lists(st.text() | st.binary(), min_size=1, max_size=5))
def test_a_client_reads_what_was_framed(payloads: list[str | bytes]) -> None:
    wire = b"".join(Frame(payload).wire for payload in payloads)
    assert read_by_client(wire) == [expected_of(payload) for payload in payloads]


@quick
@given(st.text() | st.binary(), st.integers(0, 700))
def test_frames_are_those_of_another_implementation(payload: str | bytes, repeat: int) -> None:
    payload *= repeat
    opcode, data, _ = expected_of(payload)
    assert Frame(payload).wire == OtherFrame(opcode, data).serialize(mask=False)
    assert Frame(payload).size == len(data)


@pytest.mark.parametrize("payload", ["hello " * 100, b"hello " * 100, "grüß €" * 20_000, "x" * 256])
def test_a_compressed_frame_is_smaller_and_reads_the_same(payload: str | bytes) -> None:
    frame = Frame(payload)
    assert len(frame.compressed) < len(frame.wire)
    assert frame.compressed[0] == frame.wire[0] | 0x40
    # Twice, since no frame may lean on the one before.
    assert read_by_client(frame.compressed * 2, deflate=True) == [expected_of(payload)] * 2


@pytest.mark.parametrize("payload", ["", "x" * 255, b"x" * 255, bytes(range(256))], ids=len)
def test_what_compression_does_not_make_smaller_is_sent_as_it_is(payload: str | bytes) -> None:
    frame = Frame(payload)
    assert frame.compressed is frame.wire
    assert read_by_client(frame.compressed, deflate=True) == [expected_of(payload)]


@quick
@given(st.text(min_size=1) | st.binary(min_size=1), st.integers(0, 500))
def test_a_client_inflates_what_was_compressed(payload: str | bytes, repeat: int) -> None:
    payload *= repeat
    assert read_by_client(Frame(payload).compressed, deflate=True) == [expected_of(payload)]


@pytest.mark.parametrize("opcode", [PING, PONG, CLOSE])
@pytest.mark.parametrize("payload", [b"", b"\x03\xe8", b"\x03\xe8" + b"x" * 123])
def test_control_frames_are_those_of_another_implementation(opcode: int, payload: bytes) -> None:
    assert control_frame(opcode, payload) == OtherFrame(Opcode(opcode), payload).serialize(mask=False)


# What a server receives


def sent(opcode: int, data: bytes = b"", *, fin: bool = True, rsv1: bool = False) -> bytes:
    size, key = len(data), b"\x01\xf2\x03\xf4"
    if size < 126:
        head = struct.pack("!BB", opcode | fin << 7 | rsv1 << 6, 0x80 | size)
    elif size < 65536:
        head = struct.pack("!BBH", opcode | fin << 7 | rsv1 << 6, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", opcode | fin << 7 | rsv1 << 6, 0x80 | 127, size)
    return head + key + apply_mask(data, key)


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


def parser(max_size: int | None = 1000, max_fragments: int = 10, *, deflate: bool = True) -> Parser:
    return Parser(max_size, max_fragments, deflate=deflate)


def violated(parser: Parser) -> tuple[int, str] | None:
    return parser.violation and (parser.violation.code, parser.violation.reason)


@pytest.mark.parametrize(
    ("wire", "received"),
    [
        (sent(TEXT), Received(TEXT, "")),
        (sent(TEXT, "grüß".encode()), Received(TEXT, "grüß")),
        (sent(BINARY, b"\x00\xff"), Received(BINARY, b"\x00\xff")),
        (sent(BINARY, b"x" * 125), Received(BINARY, b"x" * 125)),
        (sent(BINARY, b"x" * 126), Received(BINARY, b"x" * 126)),
        (sent(BINARY, b"x" * 65535), Received(BINARY, b"x" * 65535)),
        (sent(BINARY, b"x" * 65536), Received(BINARY, b"x" * 65536)),
        (sent(PING), Received(PING, b"")),
        (sent(PING, b"x" * 125), Received(PING, b"x" * 125)),
        (sent(PONG, b"x"), Received(PONG, b"x")),
        (sent(CLOSE), Received(CLOSE, (1005, ""))),
        (sent(CLOSE, b"\x03\xe8"), Received(CLOSE, (1000, ""))),
        (sent(CLOSE, b"\x0f\xa1" + "tschüß".encode()), Received(CLOSE, (4001, "tschüß"))),
        (sent(TEXT, deflated(b"hello"), rsv1=True), Received(TEXT, "hello")),
        (sent(BINARY, deflated(b"hello"), rsv1=True), Received(BINARY, b"hello")),
        (sent(TEXT, b"\x00", rsv1=True), Received(TEXT, "")),
        (
            sent(TEXT, b"grau: gr", fin=False) + sent(0, b"\xc3", fin=False) + sent(0, b"\xa4u"),
            Received(TEXT, "grau: gräu"),
        ),
        (sent(BINARY, b"a", fin=False) + sent(0, b"", fin=False) + sent(0, b"b"), Received(BINARY, b"ab")),
        (sent(TEXT, fin=False) + sent(0), Received(TEXT, "")),
        (
            sent(TEXT, deflated(b"hello")[:3], fin=False, rsv1=True) + sent(0, deflated(b"hello")[3:]),
            Received(TEXT, "hello"),
        ),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else repr(value)[:40],
)
def test_messages_and_control_frames_are_parsed(wire: bytes, received: Received) -> None:
    whole = parser(None)
    assert whole.feed(wire) == [received]
    assert whole.pending == 0
    in_pieces = parser(None)
    step = max(1, len(wire) // 300)
    pieces = [wire[start : start + step] for start in range(0, len(wire), step)]
    assert list(itertools.chain(*map(in_pieces.feed, pieces))) == [received]
    assert in_pieces.pending == 0
    assert whole.violation is in_pieces.violation is None


def test_control_frames_may_come_between_fragments() -> None:
    wire = sent(TEXT, b"one ", fin=False) + sent(PING, b"?") + sent(0, b"two", fin=False) + sent(PONG) + sent(0)
    assert parser().feed(wire) == [Received(PING, b"?"), Received(PONG, b""), Received(TEXT, "one two")]


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("size", [0, 1, 124, 125, 126, 127, 128, 1000, 1001])
@pytest.mark.parametrize("last", [b"a", b"\xff"])
def test_one_message_alone_is_what_it_is_in_pieces(opcode: int, size: int, last: bytes) -> None:
    wire = sent(opcode, (b"a" * size)[:-1] + last if size else b"")
    alone, pieces = parser(), parser()
    received = alone.feed(wire)
    assert received == [each for byte in wire for each in pieces.feed(bytes([byte]))]
    assert violated(alone) == violated(pieces)
    assert bool(received) == (violated(alone) is None)


def test_a_length_of_16_bits_may_say_what_7_could() -> None:
    assert parser().feed(masked(0x81, 126, b"\0\3\0\0\0\0abc")) == [Received(TEXT, "abc")]
    incomplete = parser()
    assert incomplete.feed(masked(0x81, 126, b"\0\4\0\0\0\0abc")) == []
    assert incomplete.feed(b"d") == [Received(TEXT, "abcd")]


def test_messages_follow_each_other_each_from_its_own_beginning() -> None:
    one = sent(TEXT, b"\xc3", fin=False) + sent(0, b"\xa4")
    two = sent(BINARY, deflated(b"x" * 500), fin=False, rsv1=True) + sent(0)
    three = sent(BINARY, b"y" * 600, fin=False) + sent(0, b"y" * 400)
    parsing = parser(1000, 2)
    expected = [Received(TEXT, "ä"), Received(BINARY, b"x" * 500), Received(BINARY, b"y" * 1000)]
    assert parsing.feed((one + two + three) * 3) == expected * 3
    assert violated(parsing) is None


def test_without_a_limit_everything_is_taken() -> None:
    parsing = parser(None)
    data = os.urandom(300 * KIB)
    assert parsing.feed(sent(BINARY, data) + sent(BINARY, deflated(bytes(2_000_000)), rsv1=True)) == [
        Received(BINARY, data),
        Received(BINARY, bytes(2_000_000)),
    ]


def unmasked(first: int, second: int = 0, rest: bytes = b"") -> bytes:
    return bytes((first, second)) + rest


def masked(first: int, size: int, rest: bytes = b"\0\0\0\0") -> bytes:
    return bytes((first, 0x80 | size)) + rest


@pytest.mark.parametrize(
    ("wire", "code", "reason"),
    [
        (unmasked(0x81, 1, b"x"), 1002, "a client's frames are masked"),
        (unmasked(0x88), 1002, "masked"),
        (masked(0x83, 0), 1002, "there is no opcode 0x3"),
        (masked(0x87, 0), 1002, "there is no opcode 0x7"),
        (masked(0x8B, 0), 1002, "there is no opcode 0xb"),
        (masked(0x8F, 0), 1002, "there is no opcode 0xf"),
        (masked(0xA1, 0), 1002, "a reserved bit is set"),
        (masked(0x91, 0), 1002, "a reserved bit is set"),
        (masked(0xC9, 0), 1002, "a reserved bit is set"),
        (masked(0x99, 0), 1002, "a reserved bit is set"),
        (masked(0x09, 0), 1002, "a control frame is whole"),
        (masked(0x89, 126, b"\x00\x7e\0\0\0\0"), 1002, "125 bytes at the most"),
        (masked(0x80, 0), 1002, "no message has begun"),
        (sent(TEXT, fin=False) + sent(TEXT), 1002, "a message has begun already"),
        (sent(TEXT, fin=False) + sent(BINARY, fin=False), 1002, "a message has begun already"),
        (sent(TEXT, fin=False, rsv1=True) + sent(0, rsv1=True), 1002, "a reserved bit is set"),
        (masked(0x82, 127, b"\x80" + bytes(11)), 1002, "a length has 63 bits"),
        (masked(0x82, 127, b"\x7f" + b"\xff" * 7 + bytes(4)), 1009, "1000 bytes"),
        (masked(0x82, 126, b"\x03\xe9\0\0\0\0"), 1009, "a message can have 1000 bytes"),
        (sent(BINARY, b"x" * 600, fin=False) + sent(0, b"x" * 401), 1009, "1000 bytes"),
        (sent(BINARY, deflated(b"x" * 1001), rsv1=True), 1009, "1000 bytes"),
        (sent(BINARY, deflated(bytes(50_000_000)), fin=False, rsv1=True), 1009, "1000 bytes"),
        (sent(TEXT, deflated(bytes(500_000)), rsv1=True), 1009, "1000 bytes"),
        (sent(BINARY, fin=False) + sent(0, fin=False) * 10, 1008, "a message can have 10 fragments"),
        (sent(TEXT, b"\xff"), 1007, "the text isn't UTF-8"),
        (sent(TEXT, b"\xed\xa0\x80"), 1007, "the text isn't UTF-8"),
        (sent(TEXT, b"\xc3"), 1007, "the text isn't UTF-8"),
        (sent(TEXT, b"\xff", fin=False), 1007, "the text isn't UTF-8"),
        (sent(TEXT, b"\xc3", fin=False) + sent(0), 1007, "the text isn't UTF-8"),
        (sent(TEXT, deflated(b"\xff"), rsv1=True), 1007, "the text isn't UTF-8"),
        (sent(TEXT, deflated(b"\xff"), rsv1=True, fin=False) + sent(0), 1007, "the text isn't UTF-8"),
        (sent(TEXT, b"\xff\xff\xff", rsv1=True), 1007, "the message can't be inflated"),
        (sent(CLOSE, b"\x03"), 1002, "a close code has two bytes"),
        (sent(CLOSE, b"\x03\xe8\xff"), 1007, "the text isn't UTF-8"),
        *((sent(CLOSE, code.to_bytes(2)), 1002, f"{code} isn't a close code") for code in (0, 999, 1004, 1005, 1006)),
        *((sent(CLOSE, code.to_bytes(2)), 1002, f"{code} isn't a close code") for code in (1015, 1016, 2999, 5000)),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else str(value),
)
def test_what_breaks_the_protocol_is_said_and_ends_it(wire: bytes, code: int, reason: str) -> None:
    parsing = parser()
    before = [Received(TEXT, "before")]
    assert parsing.feed(sent(TEXT, b"before") + wire + sent(TEXT, b"after")) == before
    assert parsing.violation is not None
    assert parsing.violation.code == code
    assert reason in parsing.violation.reason
    assert len(parsing.violation.reason.encode()) <= 123
    assert parsing.feed(sent(TEXT, b"later")) == []
    assert parsing.feed(b"\x00") == []
    in_pieces = parser()
    for byte in wire:
        assert in_pieces.feed(bytes((byte,))) == []
    assert violated(in_pieces) == violated(parsing)
    assert in_pieces.pending <= 1001


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, 1007, 1011, 1014, 3000, 3999, 4000, 4999])
def test_close_codes_that_may_be_sent(code: int) -> None:
    assert parser().feed(sent(CLOSE, code.to_bytes(2))) == [Received(CLOSE, (code, ""))]


def test_compression_that_was_not_agreed_on_breaks_the_protocol() -> None:
    parsing = parser(deflate=False)
    assert parsing.feed(sent(TEXT, deflated(b"hello"), rsv1=True)) == []
    assert violated(parsing) == (1002, "a reserved bit is set")


def test_the_limits_themselves_are_allowed() -> None:
    parsing = parser(1000, 10)
    exact = sent(BINARY, b"x" * 1000)
    inflated = sent(BINARY, deflated(b"x" * 1000), rsv1=True)
    fragments = sent(BINARY, b"x" * 100, fin=False) + sent(0, b"x" * 100, fin=False) * 8 + sent(0, b"x" * 100)
    assert parsing.feed(exact + inflated + fragments) == [Received(BINARY, b"x" * 1000)] * 3
    assert violated(parsing) is None


def test_a_message_that_is_too_large_is_refused_by_its_head() -> None:
    parsing = parser(1000)
    assert parsing.feed(masked(0x82, 127, (1 << 40).to_bytes(8) + bytes(4))) == []
    assert violated(parsing) == (1009, "a message can have 1000 bytes")
    assert parsing.pending == 0


def test_what_is_pending_is_known() -> None:
    parsing = parser(1000)
    wire = sent(BINARY, b"x" * 500, fin=False) + sent(0, b"x" * 300)
    parsing.feed(wire[:100])
    assert parsing.pending == 100
    parsing.feed(wire[100:508])
    assert parsing.pending == 500
    parsing.feed(wire[508:600])
    assert parsing.pending == 592
    assert parsing.feed(wire[600:]) == [Received(BINARY, b"x" * 800)]
    assert parsing.pending == 0


def cut(wire: bytes, places: Iterable[int]) -> list[bytes]:
    edges = sorted({0, len(wire), *(place % (len(wire) + 1) for place in places)})
    return [wire[start:end] for start, end in itertools.pairwise(edges)]


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, Received]:
    """A message in any number of fragments, compressed or not."""
    opcode = draw(st.sampled_from([TEXT, BINARY]))
    data = draw(st.text(max_size=50).map(str.encode) if opcode == TEXT else st.binary(max_size=200))
    compressed = draw(st.booleans())
    parts = cut(deflated(data) if compressed else data, draw(st.lists(st.integers(0, 300), max_size=4))) or [b""]
    wire = b""
    for number, part in enumerate(parts):
        fin, first = number == len(parts) - 1, not number
        wire += sent(opcode if first else 0, part, fin=fin, rsv1=compressed and first)
    return wire, Received(opcode, data.decode() if opcode == TEXT else data)


@quick
@given(st.lists(messages(), max_size=4), st.lists(st.integers(0, 3000), max_size=8))
def test_what_a_client_sends_is_received_in_whatever_pieces(
    conversation: list[tuple[bytes, Received]], places: list[int]
) -> None:
    parsing = parser()
    wire = b"".join(each for each, _ in conversation)
    received = list(itertools.chain(*(parsing.feed(piece) for piece in cut(wire, places))))
    assert received == [message for _, message in conversation]
    assert parsing.violation is None
    assert parsing.pending == 0


@quick
@given(st.lists(messages().map(lambda message: message[0]) | st.binary(max_size=30), max_size=5), st.booleans())
def test_whatever_a_client_sends_nothing_is_raised_and_memory_is_bounded(pieces: list[bytes], deflate: bool) -> None:
    parsing = Parser(100, 5, deflate=deflate)
    for piece in pieces:
        for received in parsing.feed(piece):
            assert len(received.data) <= 125
        assert parsing.pending <= 2 * 114 + len(piece)
    if parsing.violation is not None:
        assert 1002 <= parsing.violation.code <= 1009


@pytest.fixture(scope="module")
def without_speedups() -> Any:
    """The module as it is where nothing compiled is installed."""
    spec = importlib.util.spec_from_file_location("frames_without_speedups", frames.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "websockets.speedups", None)
        spec.loader.exec_module(module)
    return module


def test_masks_are_taken_off_without_compiled_code_too(without_speedups: ModuleType) -> None:
    assert without_speedups.apply_mask is without_speedups.mask
    for length in (*range(20), 125, 126, 1000, 65536, 65537):
        data, key = os.urandom(length), os.urandom(4)
        expected = bytes(byte ^ key[place % 4] for place, byte in enumerate(data))
        assert without_speedups.mask(data, key) == expected
        if data:
            assert frames.apply_mask(data, key) == expected
    parsing = without_speedups.Parser(1000, 10, deflate=False)
    assert parsing.feed(sent(TEXT, b"hello")) == [Received(TEXT, "hello")]


# Attachments


def test_attachments_are_messages_directly_behind() -> None:
    frame = Frame("head", [b"\x01", "tail"])
    assert frame.payloads == ("head", b"\x01", "tail")
    assert frame.size == 9
    assert frame.wire == Frame("head").wire + Frame(b"\x01").wire + Frame("tail").wire
    assert frame.compressed is frame.wire


def test_each_of_several_messages_is_compressed_where_that_makes_it_smaller() -> None:
    noise = random.Random(1).randbytes(300)
    frame = Frame("x" * 300, [noise, b"short", b"y" * 300])
    parts = [Frame("x" * 300).compressed, Frame(noise).wire, Frame(b"short").wire, Frame(b"y" * 300).compressed]
    assert frame.compressed == b"".join(parts)
