"""What every protocol owes."""

import dataclasses
from typing import Any, Literal

import msgspec
import pydantic
import pytest
from hypothesis import given, settings

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.messages import Publication
from asgi_ws.payloads import encode
from asgi_ws.protocols import (
    BytesProtocol,
    JsonProtocol,
    MixedProtocol,
    PlainProtocol,
    Protocol,
    TextProtocol,
    choose_protocol,
)
from tests import json_corpus

quick = settings(max_examples=60, deadline=None, database=None)


class Join(pydantic.BaseModel):
    type: Literal["join"]
    name: str


@dataclasses.dataclass
class Move:
    type: Literal["move"]
    x: int


class Board(msgspec.Struct):
    cells: list[int]


PROTOCOLS: dict[str, Protocol[Any]] = {
    "plain": PlainProtocol(),
    "text": TextProtocol(),
    "bytes": BytesProtocol(),
    "json": JsonProtocol(),
    "json of a model": JsonProtocol(Join),
    "json of a struct": JsonProtocol(Board),
    "json of a union": JsonProtocol(Join | Move),
    "text in, json out": MixedProtocol(TextProtocol(), JsonProtocol()),
    "json in, bytes out": MixedProtocol(JsonProtocol(Board), BytesProtocol()),
    "chosen for nothing": choose_protocol(),
}

DATA: list[Any] = [
    "",
    "text",
    "grüß 🎈",
    '{"looks": "like JSON"}',
    b"",
    b"\x00\xff",
    bytearray(b"ab"),
    None,
    0,
    [1, "x"],
    {"a": {"b": None}},
    Join(type="join", name="ann"),
    Move("move", 1),
    Board([1, 2]),
]

protocols = pytest.mark.parametrize("name", PROTOCOLS)


@protocols
def test_decoding_raises_nothing_but_invalid_message(name: str) -> None:
    protocol = PROTOCOLS[name]
    for document in json_corpus.ALL.values():
        try:
            protocol.decode(document)
        except InvalidMessage as error:
            assert error.reason.encode()  # noqa: PT017


@quick
@given(json_corpus.documents)
def test_decoding_whatever_a_client_sends_raises_nothing_but_invalid_message(document: str | bytes) -> None:
    for protocol in PROTOCOLS.values():
        try:
            protocol.decode(document)
        except InvalidMessage as error:
            assert error.reason.encode()  # noqa: PT017


@protocols
@pytest.mark.parametrize("data", DATA, ids=repr)
def test_what_is_sent_is_a_frame_s_payload(name: str, data: Any) -> None:
    protocol = PROTOCOLS[name]
    payload = protocol.encode(data)
    assert type(payload) in (str, bytes)
    assert protocol.encode(data) == payload


@protocols
@pytest.mark.parametrize("data", [object(), {1j: 2}, "\ud800", ["\udfff"], Join], ids=repr)
def test_what_cannot_be_sent_is_a_type_error(name: str, data: Any) -> None:
    with pytest.raises(TypeError):
        PROTOCOLS[name].encode(data)


@protocols
@pytest.mark.parametrize("data", DATA, ids=repr)
def test_what_was_published_is_sent_as_a_frame_s_payload(name: str, data: Any) -> None:
    protocol = PROTOCOLS[name]
    publication = Publication("news", encode(data))
    payload = protocol.encode_publication(publication)
    assert type(payload) in (str, bytes)
    if publication.payload.kind != "binary":
        assert payload == protocol.encode(data), "the same for everybody as for one"
    assert publication.frame(protocol).payload == payload


@protocols
@pytest.mark.parametrize("other", PROTOCOLS)
def test_the_same_format_makes_the_same_of_a_publication(name: str, other: str) -> None:
    one, two = PROTOCOLS[name], PROTOCOLS[other]
    publications = [Publication("news", encode(data)) for data in DATA]
    if one.format == two.format:
        for publication in publications:
            assert one.encode_publication(publication) == two.encode_publication(publication)
            assert publication.frame(one) is publication.frame(two)
    else:
        assert any(one.encode_publication(each) != two.encode_publication(each) for each in publications)
