import dataclasses
import json
import time
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.socketio.packets import (
    ACK,
    CONNECT,
    CONNECT_ERROR,
    DISCONNECT,
    EVENT,
    MAX_ATTACHMENTS,
    RESERVED,
    Decoder,
    Packet,
    check_event,
    encode,
)
from tests import json_corpus

quick = settings(max_examples=150, deadline=None, database=None)
SIZE = 1_000_000


def decode(*payloads: str | bytes, max_size: int = SIZE) -> Packet:
    decoder = Decoder(max_size)
    *begin, last = (decoder.feed(payload) for payload in payloads)
    assert begin == [None] * len(begin)
    assert last is not None
    assert decoder.incomplete is None
    return last


# What is on the wire

WIRE = [
    (Packet(CONNECT), ["0"]),
    (Packet(CONNECT, {}), ["0{}"]),
    (Packet(CONNECT, {"token": "x"}, "/admin"), ['0/admin,{"token":"x"}']),
    (Packet(CONNECT, None, "/admin"), ["0/admin,"]),
    (Packet(CONNECT, None, "/?a=b"), ["0/?a=b,"]),
    (Packet(DISCONNECT), ["1"]),
    (Packet(DISCONNECT, None, "/admin"), ["1/admin,"]),
    (Packet(EVENT, ["hello", 1]), ['2["hello",1]']),
    (Packet(EVENT, ["hello", {"a": [None, True]}], "/admin", 12), ['2/admin,12["hello",{"a":[null,true]}]']),
    (Packet(EVENT, ["7"], id=0), ['20["7"]']),
    (Packet(EVENT, ["grüße", "\x1e,1-"]), ['2["grüße","\\u001e,1-"]']),
    (Packet(ACK, [], id=7), ["37[]"]),
    (Packet(ACK, ["x"], "/admin", 2**53 - 1), ['3/admin,9007199254740991["x"]']),
    (Packet(CONNECT_ERROR, {"message": "no"}), ['4{"message":"no"}']),
    (Packet(CONNECT_ERROR, "no", "/a"), ['4/a,"no"']),
    (Packet(EVENT, ["x", b"\x00"]), ['51-["x",{"_placeholder":true,"num":0}]', b"\x00"]),
    (
        Packet(EVENT, ["x", b"\x00", {"deep": [[b""]]}], "/admin", 12),
        [
            '52-/admin,12["x",{"_placeholder":true,"num":0},{"deep":[[{"_placeholder":true,"num":1}]]}]',
            b"\x00",
            b"",
        ],
    ),
    (Packet(ACK, [b"x"], id=3), ['61-3[{"_placeholder":true,"num":0}]', b"x"]),
]


@pytest.mark.parametrize(("packet", "payloads"), WIRE, ids=str)
def test_packets_on_the_wire(packet: Packet, payloads: list[str | bytes]) -> None:
    assert list(encode(packet)) == payloads
    assert decode(*payloads) == packet


@pytest.mark.parametrize(
    ("text", "packet"),
    [
        ("0/admin", Packet(CONNECT, None, "/admin")),
        ("1/admin", Packet(DISCONNECT, None, "/admin")),
        ("2007[1]", Packet(EVENT, ["1"], id=7)),
        ("2[1.5]", Packet(EVENT, ["1.5"])),
        ('2["message",{"_placeholder":true,"num":0}]', Packet(EVENT, ["message", {"_placeholder": True, "num": 0}])),
        ('2["x",{"__proto__":1}]', Packet(EVENT, ["x", {"__proto__": 1}])),
        ('2/, ["x"]', Packet(EVENT, ["x"])),
    ],
)
def test_other_ways_to_say_it(text: str, packet: Packet) -> None:
    assert decode(text) == packet


json_data = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    # No lone surrogates, which no UTF-8 has.
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc_", max_size=3), inner, max_size=4),
    max_leaves=8,
)
names = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda name: name not in RESERVED)
namespaces = st.just("/") | st.text(st.characters(exclude_categories=["Cs"], exclude_characters=","), max_size=20).map(
    lambda name: f"/{name}"
)
ids = st.integers(0, 2**53 - 1)
packets = st.one_of(
    st.builds(lambda name, args, n, i: Packet(EVENT, [name, *args], n, i), names, st.lists(json_data, max_size=3),
              namespaces, st.none() | ids),
    st.builds(lambda args, n, i: Packet(ACK, args, n, i), st.lists(json_data, max_size=3), namespaces, ids),
    st.builds(lambda n: Packet(DISCONNECT, None, n), namespaces),
    st.builds(lambda a, n: Packet(CONNECT, a, n), st.just({"a": [1]}) | st.none(), namespaces),
)  # fmt: skip


@quick
@given(packets)
def test_what_is_encoded_is_decoded_to_the_same(packet: Packet) -> None:
    assert decode(*encode(packet)) == packet


def test_records_and_all_kinds_of_binary_values_are_sent() -> None:
    @dataclasses.dataclass
    class Picture:
        name: str
        data: bytes

    text, *attachments = encode(
        Packet(EVENT, ["x", (Picture("a", b"1"), bytearray(b"2")), {"m": memoryview(b"3"), 1: {b"4"}}])
    )
    assert sorted(attachments) == [b"1", b"2", b"3", b"4"]
    event, (picture, array), rest = decode(text, *attachments).data
    assert (event, picture, array) == ("x", {"name": "a", "data": b"1"}, b"2")
    assert rest == {"m": b"3", "1": [b"4"]}


def test_what_is_sent_is_not_changed() -> None:
    data = ["x", {"a": [b"1"]}, b"2"]
    encode(Packet(EVENT, data))
    assert data == ["x", {"a": [b"1"]}, b"2"]


@pytest.mark.parametrize(
    "args",
    [
        [object()],
        ["\ud800"],
        [{1j: b""}],
        [b"x"] * (MAX_ATTACHMENTS + 1),
        # A client would take it for a placeholder.
        [b"x", {"a": {"_placeholder": True, "num": 99}}],
        [{"_placeholder": True}, [b"x"]],
    ],
    ids=repr,
)
def test_what_cannot_be_sent_is_a_type_error(args: list[Any]) -> None:
    with pytest.raises(TypeError):
        encode(Packet(EVENT, ["x", *args]))


def test_cycles_cannot_be_sent() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(TypeError):
        encode(Packet(EVENT, ["x", cycle]))


# What clients may not say

HOSTILE: dict[str, Iterable[str | bytes]] = {
    "nothing": [""],
    "no type": ["[1]"],
    "unknown type": ["7"],
    "a sign": ["-1"],
    "an attachment without a packet": [b"x"],
    "event without data": ["2"],
    "event of nothing": ["2[]"],
    "event as an object": ['2{"0":"x"}'],
    "event without a name": ["2[null]"],
    "event called true": ["2[true]"],
    "event called by an object": ['2[{"toString":"x"}]'],
    "event in pieces": ['2["x"'],
    "event and more": ['2["x"]["y"]'],
    "event with an attachment": ['21-["x"]'],
    "event with a comma": ['2,["x"]'],
    "event with NaN": ['2["x",NaN]'],
    "event with a lone surrogate": ['2["x","\\ud800"]'],
    "text with a lone surrogate": ['2["x","\ud800"]'],
    "event with a huge number": ['2["x",1e999]'],
    "event nested deeply": ['2["x",' + "[" * 100_000 + "]" * 100_001],
    "an id of 17 digits": ['212345678901234567["x"]'],
    "an id of 30 digits": ['2123456789012345678901234567890["x"]'],
    "an id above 2^53": ['29007199254740992["x"]'],
    "an id in other digits": ['2\u0661["x"]'],
    "acknowledgement without an id": ["3[]"],
    "acknowledgement without data": ["31"],
    "acknowledgement of an object": ["31{}"],
    "connect with null": ["0null"],
    "connect with a list": ["0[1]"],
    "connect with a string": ['0"x"'],
    "connect with an id": ["012{}"],
    "disconnect with data": ["1{}"],
    "disconnect with null": ["1null"],
    "a long namespace": ["0/" + "x" * 200],
    "a namespace without a slash": ["0admin,"],
    "connect error with a list": ["4[]"],
    "zero attachments": ['50-["x"]'],
    "no number of attachments": ['5["x"]'],
    "eleven attachments": ['511-["x"]'],
    "many attachments": ['5999999999-["x"]'],
    "binary acknowledgement without an id": ['61-[{"_placeholder":true,"num":0}]'],
    "text in the place of an attachment": ['51-["x",{"_placeholder":true,"num":0}]', '2["y"]'],
    "no placeholder": ['51-["x"]', b"x"],
    "a placeholder in the place of the name": ['51-[{"_placeholder":true,"num":0}]'],
    "a placeholder twice": ['51-["x",{"_placeholder":true,"num":0},{"_placeholder":true,"num":0}]', b"x"],
    "one of two placeholders": ['52-["x",{"_placeholder":true,"num":0}]', b"x", b"y"],
    "a reserved name with an attachment": ['51-["connect",{"_placeholder":true,"num":0}]'],
    **{
        f"num {num}": [f'51-["x",{{"_placeholder":true,"num":{num}}}]', b"x"]
        for num in ("1", "-1", "1e3", "0.0", '"0"', "true", "null", "[]", '"splice"', "9007199254740993")
    },
    "no num": ['51-["x",{"_placeholder":true}]', b"x"],
    **{f"reserved {name}": [f'2["{name}"]'] for name in RESERVED},
}


@pytest.mark.parametrize("payloads", HOSTILE.values(), ids=HOSTILE)
def test_what_is_not_a_packet_is_an_invalid_message(payloads: Iterable[str | bytes]) -> None:
    decoder = Decoder(SIZE)
    *begin, last = payloads
    for payload in begin:
        assert decoder.feed(payload) is None
    with pytest.raises(InvalidMessage) as caught:
        decoder.feed(last)
    assert caught.value.reason.encode()
    # Nothing of it stays.
    assert decoder.incomplete is None
    assert decoder.feed('2["next"]') == Packet(EVENT, ["next"])


@pytest.mark.parametrize("document", json_corpus.ALL.values(), ids=json_corpus.ALL)
@pytest.mark.parametrize("prefix", ["", "0", '2["x",', "31", "51-", '52-/admin,12["x",'])
def test_hostile_documents_raise_nothing_but_invalid_message(prefix: str, document: str | bytes) -> None:
    decoder = Decoder(SIZE)
    for payload in (prefix + document if isinstance(document, str) else document, b"a", b"b"):
        try:
            decoder.feed(payload)
        except InvalidMessage:
            assert decoder.incomplete is None


@quick
@given(
    st.lists(
        st.binary(max_size=8)
        | st.text(max_size=30)
        | st.from_regex(r'[0-6]([0-9]{1,3}-)?(/[a-z?]*,)?[0-9]{0,3}(\["x"(,\{"_placeholder":true,"num":[0-3]\})*\])?'),
        max_size=8,
    )
)
def test_whatever_a_client_sends_raises_nothing_but_invalid_message(payloads: list[str | bytes]) -> None:
    decoder = Decoder(100)
    for payload in payloads:
        try:
            packet = decoder.feed(payload)
        except InvalidMessage:
            assert decoder.incomplete is None
        else:
            assert (packet is None) == (decoder.incomplete is not None)


def test_text_and_attachments_together_have_a_largest_size() -> None:
    text = '52-["x",{"_placeholder":true,"num":0},{"_placeholder":true,"num":1}]'
    assert decode(text, bytes(10), bytes(10), max_size=len(text) + 20).data[2] == bytes(10)
    decoder = Decoder(len(text) + 19)
    decoder.feed(text)
    decoder.feed(bytes(10))
    with pytest.raises(InvalidMessage) as caught:
        decoder.feed(bytes(10))
    assert caught.value.close_code == 1009
    with pytest.raises(InvalidMessage):
        decoder.feed('2["' + "ü" * 60 + '"]')


def test_hundreds_of_attachments_are_never_held() -> None:
    decoder = Decoder(SIZE)
    tracemalloc.start()
    try:
        for _ in range(200):
            with pytest.raises(InvalidMessage):
                decoder.feed('5200-["x",{"_placeholder":true,"num":0}]')
            with pytest.raises(InvalidMessage):
                decoder.feed(bytes(900_000))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1_000_000


@pytest.mark.parametrize(
    "text",
    ["2" + "1" * SIZE, "0/" + "x" * SIZE, "0" + "/," * (SIZE // 2), "5" + "1-" * (SIZE // 2), "2[" + "[]," * 300],
)
def test_time_grows_with_the_size_and_no_faster(text: str) -> None:
    begin = time.process_time()
    with pytest.raises(InvalidMessage):
        Decoder(SIZE + 10).feed(text)
    assert time.process_time() - begin < 0.1


def test_events_have_names_that_are_not_reserved() -> None:
    check_event("news")
    check_event("error")
    with pytest.raises(TypeError):
        check_event(1)  # type: ignore[arg-type]
    for name in RESERVED:
        with pytest.raises(ValueError, match="reserved"):
            check_event(name)


def test_the_same_json_as_everybody_s() -> None:
    data = ["x", {"a": [1, None, "ü"], "b": {"c": 1.5}}]
    (text,) = encode(Packet(EVENT, data))
    assert json.loads(text[1:]) == data
