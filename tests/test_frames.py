import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import Frame as Parsed
from websockets.frames import Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from asgi_ws.frames import Frame

quick = settings(max_examples=60, deadline=None, database=None)


def parsed(*frames: Frame) -> list[tuple[Opcode, bytes, bool]]:
    """What a client makes of the frames."""
    client = ClientProtocol(parse_uri("ws://localhost/"), state=State.OPEN, max_size=None)
    client.receive_data(b"".join(frame.wire for frame in frames))
    assert client.parser_exc is None
    events = client.events_received()
    assert all(isinstance(event, Parsed) and not (event.rsv1 or event.rsv2 or event.rsv3) for event in events)
    return [(event.opcode, bytes(event.data), event.fin) for event in events]


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
    assert parsed(frame) == [(Opcode.BINARY, b"x" * length, True)]


def test_text_is_utf8() -> None:
    frame = Frame("grüß € 🎈")
    assert frame.wire[0] == 0x81
    assert parsed(frame) == [(Opcode.TEXT, "grüß € 🎈".encode(), True)]
    assert frame.size == len("grüß € 🎈".encode())


def test_wire_and_size_are_made_once() -> None:
    frame = Frame("ü" * 1000)
    assert frame.size == frame.size == 2000
    assert frame.wire is frame.wire
    assert frame.payload == "ü" * 1000


@quick
@given(st.lists(st.text() | st.binary(), min_size=1, max_size=5))
def test_a_client_reads_what_was_framed(payloads: list[str | bytes]) -> None:
    expected = [
        (Opcode.TEXT, payload.encode(), True) if isinstance(payload, str) else (Opcode.BINARY, payload, True)
        for payload in payloads
    ]
    assert parsed(*map(Frame, payloads)) == expected


@quick
@given(st.text() | st.binary(), st.integers(0, 700))
def test_frames_are_those_of_another_implementation(payload: str | bytes, repeat: int) -> None:
    payload *= repeat
    data = payload.encode() if isinstance(payload, str) else payload
    opcode = Opcode.TEXT if isinstance(payload, str) else Opcode.BINARY
    assert Frame(payload).wire == Parsed(opcode, data).serialize(mask=False)
    assert Frame(payload).size == len(data)
