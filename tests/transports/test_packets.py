"""Engine.IO packets: what is read of what a client sends, and what a client reads of what it is sent."""

import base64
import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.frames import Frame
from asgi_ws.messages import Position, Publication, Recovery
from asgi_ws.payloads import encode
from asgi_ws.protocols import JsonProtocol, PlainProtocol, PositionsProtocol, Protocol
from asgi_ws.transports.packets import (
    MAX_PACKETS,
    MESSAGE,
    Packet,
    PacketFrame,
    PacketProtocol,
    decode_body,
    decode_packet,
    encode_body,
    open_packet,
)

texts = st.text(st.characters(codec="utf-8"))
payloads = st.one_of(texts, st.binary())


def read_as_client(body: bytes) -> list[str | bytes]:
    """What `engine.io-parser` makes of a response: the contents of its messages."""
    contents: list[str | bytes] = []
    for part in body.decode().split("\x1e"):
        if part.startswith("b"):
            contents.append(base64.b64decode(part[1:], validate=True))
        else:
            assert part[0] == MESSAGE
            contents.append(part[1:])
    return contents


@pytest.mark.parametrize(
    ("payload", "packet"),
    [
        ("4", Packet("4")),
        ("4hello", Packet("4", "hello")),
        ("2probe", Packet("2", "probe")),
        (b"\x00\xff", Packet("4", b"\x00\xff")),
        (b"", Packet("4", b"")),
    ],
)
def test_packet_is_read_from_a_message(payload: str | bytes, packet: Packet) -> None:
    assert decode_packet(payload) == packet


@pytest.mark.parametrize("payload", ["", "7", "x", "٤hello", " 4", "b4", "-1"])
def test_what_is_no_packet_is_refused(payload: str) -> None:
    with pytest.raises(InvalidMessage) as caught:
        decode_packet(payload)
    assert caught.value.close_code == 1002


def test_body_has_several_packets() -> None:
    body = "4hello\x1ebAQL/\x1e3\x1e4€".encode()
    assert list(decode_body(body)) == [
        Packet("4", "hello"),
        Packet("4", b"\x01\x02\xff"),
        Packet("3"),
        Packet("4", "€"),
    ]


@pytest.mark.parametrize(
    "body",
    [b"", b"\x1e", b"4a\x1e", b"\x1e4a", b"b!", b"bAQL", b"bAQ L/", b"4\xff\xfe", b"\xff", b"bAQL/\n", b"b\xc3\xa4"],
)
def test_what_is_no_body_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidMessage):
        list(decode_body(body))


def test_body_has_a_bounded_number_of_packets() -> None:
    assert len(list(decode_body(b"\x1e".join([b"4"] * MAX_PACKETS)))) == MAX_PACKETS
    packets = decode_body(b"\x1e".join([b"4"] * (MAX_PACKETS + 1)))
    for _ in range(MAX_PACKETS):
        next(packets)
    with pytest.raises(InvalidMessage, match="10000 packets"):
        next(packets)


def test_body_is_read_no_further_than_it_is_asked_for() -> None:
    """CVE-2026-32689: eight megabytes of separators were a list of eight million items."""
    begin = time.perf_counter()
    with pytest.raises(InvalidMessage):
        list(decode_body(b"4" + b"\x1e4" * 4_000_000))
    assert time.perf_counter() - begin < 1


@given(st.binary())
def test_no_body_raises_anything_else(body: bytes) -> None:
    with contextlib.suppress(InvalidMessage):
        for packet in decode_body(body):
            assert packet.type in "0123456"


@given(payloads)
def test_no_message_raises_anything_else(payload: str | bytes) -> None:
    with contextlib.suppress(InvalidMessage):
        assert decode_packet(payload).type in "0123456"


@given(st.lists(payloads, min_size=1, max_size=50))
def test_client_reads_what_was_written(contents: list[str | bytes]) -> None:
    protocol = PacketProtocol(PlainProtocol())
    read = read_as_client(encode_body([protocol.encode(content) for content in contents]))
    # What a body can't say as text arrives as bytes, and whole.
    assert read == [
        content.encode() if isinstance(content, str) and "\x1e" in content else content for content in contents
    ]


@given(st.lists(payloads, min_size=1, max_size=50))
def test_what_a_client_writes_is_read(contents: list[str | bytes]) -> None:
    contents = [content.replace("\x1e", "") if isinstance(content, str) else content for content in contents]
    body = encode_body([PacketProtocol(PlainProtocol()).encode(content) for content in contents])
    assert [packet.data for packet in decode_body(body)] == contents


def test_text_with_a_separator_makes_no_packets_of_its_own() -> None:
    frame = PacketProtocol(PlainProtocol()).encode("hello\x1e1")
    assert frame.payload == "4hello\x1e1"
    assert read_as_client(encode_body([frame])) == [b"hello\x1e1"]


def test_publication_is_wrapped_once_for_all() -> None:
    publication = Publication("chat", encode({"a": 1}), Position(1, "e"))
    frame = publication.frame(PacketProtocol(JsonProtocol()))
    assert frame is publication.frame(PacketProtocol(JsonProtocol()))
    assert isinstance(frame, PacketFrame)
    assert frame.payload == '4{"a":1}'
    assert frame.polled is frame.polled
    assert frame is not publication.frame(JsonProtocol())


def test_what_the_contents_protocol_reads_is_the_content() -> None:
    assert PacketProtocol(JsonProtocol()).decode("[1]") == [1]


def test_begin_of_a_subscription_is_wrapped_as_well() -> None:
    recovery = Recovery(False, None)
    assert PacketProtocol(JsonProtocol()).encode_recovery("news", recovery) is None
    frame = PacketProtocol(PositionsProtocol()).encode_recovery("news", recovery)
    assert frame is not None
    assert str(frame.payload).startswith('4{"channel":"news","recovered":false')


class Attaching(Protocol[Any]):
    """As Socket.IO does it."""

    format = "attaching"

    def decode(self, payload: str | bytes) -> Any:
        raise NotImplementedError

    def encode(self, message: Any) -> Frame:
        return Frame("51-[]", [b"\x01", b"\x02"])

    def encode_publication(self, publication: Publication) -> Frame:
        return Frame("51-[]", [b"\x03"])


def test_several_packets_stay_together() -> None:
    protocol = PacketProtocol(Attaching())
    frame = protocol.encode(None)
    assert frame.payloads == ("451-[]", b"\x01", b"\x02")
    assert frame.polled == b"451-[]\x1ebAQ==\x1ebAg=="
    assert Publication("chat", encode("")).frame(protocol).payloads == ("451-[]", b"\x03")


def test_open_packet_says_what_the_client_needs_to_know() -> None:
    packet = open_packet({"sid": "abc", "upgrades": []})
    assert packet[0] == "0"
    assert json.loads(packet[1:]) == {"sid": "abc", "upgrades": []}
