import dataclasses
import datetime
import decimal
import enum
import json
import math
import re
import typing
import uuid
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import TypeAliasType, TypedDict

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.payloads import Payload, converter, encode, json_decoder, to_builtins, to_json
from tests import json_corpus

quick = settings(max_examples=60, deadline=None, database=None)


class ModelJoin(pydantic.BaseModel):
    type: Literal["join"]
    name: str


class ModelMove(pydantic.BaseModel):
    type: Literal["move"]
    x: int
    y: int = 0


class ModelAny(pydantic.BaseModel):
    type: Any = None
    name: Any = None


class Struct(msgspec.Struct):
    name: str
    tags: list[str] = []


class StructJoin(msgspec.Struct, tag="join"):
    name: str


class StructMove(msgspec.Struct, tag="move"):
    x: int
    y: int = 0


class LiteralStruct(msgspec.Struct):
    type: Literal["struct"]
    name: str


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


@dataclasses.dataclass
class DataJoin:
    type: Literal["join"]
    name: str


@dataclasses.dataclass
class DataMove:
    type: Literal["move", "go"]
    x: int
    y: int = 0


class DictJoin(TypedDict):
    type: Literal["join"]
    name: str


class DictMove(TypedDict, total=False):
    type: typing.Required[Literal["move"]]
    x: int


@pydantic_dataclass
class PydanticPoint:
    x: int
    y: int = 0


@dataclasses.dataclass
class Game:
    """A plain dataclass with a model inside: pydantic reads it."""

    board: ModelMove
    points: list[Point]


Alias = TypeAliasType("Alias", DataJoin | DataMove)
AliasOfAlias = TypeAliasType("AliasOfAlias", Alias)
ModelAlias = TypeAliasType("ModelAlias", ModelJoin)
Discriminated = Annotated[ModelJoin | ModelMove, pydantic.Field(discriminator="type")]

TYPES: dict[str, Any] = {
    "Any": Any,
    "dict": dict,
    "dict of integers": dict[str, int],
    "dict by number": dict[int, float],
    "list": list,
    "integer": int,
    "float": float,
    "string": str,
    "optional": str | None,
    "union of plain types": int | str | list[int],
    "date": datetime.datetime,
    "constrained": Annotated[int, msgspec.Meta(ge=0)],
    "struct": Struct,
    "list of structs": list[Struct],
    "tagged structs": StructJoin | StructMove,
    "struct and a tagged struct": StructJoin | LiteralStruct,
    "dataclass": Point,
    "optional dataclass": Point | None,
    "dataclasses": DataJoin | DataMove,
    "alias": Alias,
    "TypedDict": DictMove,
    "TypedDicts": DictJoin | DictMove,
    "model": ModelMove,
    "model of anything": ModelAny,
    "models": ModelJoin | ModelMove,
    "discriminated models": Discriminated,
    "list of models": list[ModelMove],
    "constrained by pydantic": Annotated[str, pydantic.StringConstraints(max_length=5)],
    "pydantic's dataclass": PydanticPoint,
    "dataclass with a model inside": Game,
    "models, structs, dataclasses and TypedDicts": ModelJoin | LiteralStruct | DataMove,
}
DECODERS = {name: json_decoder(type_) for name, type_ in TYPES.items()}


def refusal(decode: Callable[[str | bytes], Any], document: str | bytes) -> str | None:
    """The reason why the document isn't taken, if it isn't. Whatever else is raised isn't caught here."""
    try:
        decode(document)
    except InvalidMessage as error:
        error.reason.encode()  # a close frame has it
        return f"{error.close_code} {error.reason}"
    return None


# What is read


@pytest.mark.parametrize(
    ("type_", "document", "expected"),
    [
        (Any, '{"a": [1, 2.5, "x", null, true]}', {"a": [1, 2.5, "x", None, True]}),
        (Any, b'"bytes are read, too"', "bytes are read, too"),
        (dict, '{"a": 1}', {"a": 1}),
        (dict[str, int], '{"a": 1}', {"a": 1}),
        (list, "[1]", [1]),
        (str, '"x"', "x"),
        (int | None, "null", None),
        (int | str, '"7"', "7"),
        (datetime.date, '"2024-02-29"', datetime.date(2024, 2, 29)),
        (Struct, '{"name": "ann"}', Struct("ann", [])),
        (StructJoin | StructMove, '{"x": 1, "type": "move"}', StructMove(1)),
        (StructJoin | LiteralStruct, '{"type": "join", "name": "ann"}', StructJoin("ann")),
        (StructJoin | LiteralStruct, '{"type": "struct", "name": "ann"}', LiteralStruct("struct", "ann")),
        (Point, '{"x": 1, "unknown": 2}', Point(1)),
        (Point | None, "null", None),
        (DataJoin | DataMove, '{"type": "join", "name": "ann"}', DataJoin("join", "ann")),
        (DataJoin | DataMove, '{"x": 1, "type": "go"}', DataMove("go", 1)),
        (Alias, '{"type": "join", "name": "ann"}', DataJoin("join", "ann")),
        (AliasOfAlias, '{"type": "join", "name": "ann"}', DataJoin("join", "ann")),
        (ModelAlias, '{"type": "join", "name": "ann"}', ModelJoin(type="join", name="ann")),
        (list[ModelAlias], '[{"type": "join", "name": "ann"}]', [ModelJoin(type="join", name="ann")]),
        (DictJoin | DictMove, '{"type": "move"}', {"type": "move"}),
        (DictJoin, '{"type": "join", "name": "ann"}', {"type": "join", "name": "ann"}),
        (ModelMove, '{"type": "move", "x": 1}', ModelMove(type="move", x=1)),
        (ModelJoin | ModelMove, '{"type": "move", "x": 1}', ModelMove(type="move", x=1)),
        (Discriminated, '{"type": "move", "x": 1}', ModelMove(type="move", x=1)),
        (ModelMove | None, "null", None),
        (list[ModelMove], '[{"type": "move", "x": 1}]', [ModelMove(type="move", x=1)]),
        (PydanticPoint, '{"x": 1}', PydanticPoint(1)),
        (Game, '{"board": {"type": "move", "x": 1}, "points": []}', Game(ModelMove(type="move", x=1), [])),
        (ModelJoin | LiteralStruct | DataMove, '{"type": "join", "name": "a"}', ModelJoin(type="join", name="a")),
        (ModelJoin | LiteralStruct | DataMove, '{"type": "struct", "name": "a"}', LiteralStruct("struct", "a")),
        (ModelJoin | LiteralStruct | DataMove, '{"type": "move", "x": 1}', DataMove("move", 1)),
    ],
    ids=repr,
)
def test_json_is_read_as_the_type(type_: Any, document: str | bytes, expected: Any) -> None:
    result = json_decoder(type_)(document)
    assert result == expected
    assert type(result) is type(expected)


def test_tags_may_be_numbers_booleans_and_null() -> None:
    @dataclasses.dataclass
    class One:
        op: Literal[1, None]

    @dataclasses.dataclass
    class Two:
        op: Literal[2]

    decode = json_decoder(One | Two)
    assert decode('{"op": 2}') == Two(2)
    assert decode('{"op": null}') == One(None)
    with pytest.raises(InvalidMessage, match=r"^\$\.op: must be one of 1, null, 2$"):
        decode('{"op": 3}')
    with pytest.raises(InvalidMessage):
        decode('{"op": true}')


def test_the_tag_is_the_field_whose_values_differ() -> None:
    @dataclasses.dataclass
    class A:
        version: Literal[1]
        kind: Literal["a"]
        mode: Literal["x"] = "x"

    @dataclasses.dataclass
    class B:
        version: Literal[1]
        kind: Literal["b"]

    assert json_decoder(A | B)('{"version": 1, "kind": "b"}') == B(1, "b")


def test_models_without_a_tag_are_pydantics_to_tell_apart() -> None:
    class A(pydantic.BaseModel):
        a: int

    class B(pydantic.BaseModel):
        b: int

    assert json_decoder(A | B)('{"b": 1}') == B(b=1)
    with pytest.raises(InvalidMessage, match=r"^\$\.A\.a: "):
        json_decoder(A | B)("{}")


def test_fields_are_named_as_on_the_wire() -> None:
    class RenamedA(msgspec.Struct, rename="camel"):
        message_type: Literal["a"]

    class RenamedB(msgspec.Struct, rename="camel"):
        message_type: Literal["b"]

    class AliasC(pydantic.BaseModel):
        kind: Literal["c"] = pydantic.Field(alias="messageType")

    class AliasD(pydantic.BaseModel):
        kind: Literal["d"] = pydantic.Field(validation_alias="messageType")

    class AliasE(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(alias_generator=lambda name: "messageType")
        kind: Literal["e"]

    @dataclasses.dataclass
    class PlainF:
        messageType: Literal["f"]

    class ClassVariable(pydantic.BaseModel):
        other: typing.ClassVar[Literal["x"]] = "x"
        kind: Literal["g"] = pydantic.Field(alias="messageType")

    for members in (RenamedA | RenamedB, RenamedA | AliasC | AliasD | AliasE | PlainF | ClassVariable):
        for member in typing.get_args(members):
            letter = {RenamedA: "a", RenamedB: "b", AliasC: "c", AliasD: "d", AliasE: "e", PlainF: "f"}.get(member, "g")
            assert type(json_decoder(members)(json.dumps({"messageType": letter}))) is member


def test_a_name_that_is_one_of_several_aliases_counts_by_the_field() -> None:
    class A(pydantic.BaseModel):
        kind: Literal["a"] = pydantic.Field(validation_alias=pydantic.AliasChoices("kind", "k"))

    class B(pydantic.BaseModel):
        kind: Literal["b"]

    assert type(json_decoder(A | B)('{"kind": "a"}')) is A


def test_tags_may_be_enums_of_strings() -> None:
    class Kind(enum.StrEnum):
        A = "a"
        B = "b"

    class A(pydantic.BaseModel):
        kind: Literal[Kind.A]

    class B(pydantic.BaseModel):
        kind: Literal[Kind.B]

    assert type(json_decoder(A | B)('{"kind": "b"}')) is B


# What is not


@pytest.mark.parametrize(
    ("type_", "document", "reason"),
    [
        (Struct, '{"name": 1}', "$.name: Expected `str`, got `int`"),
        (Struct, "{}", "Object missing required field `name`"),
        (list[Struct], '[{"name": "a"}, {"name": "b", "tags": [1]}]', "$[1].tags[0]: Expected `str`, got `int`"),
        (dict[str, int], '{"a": "x"}', "$[...]: Expected `int`, got `str`"),
        (dict[int, int], '{"a": 1}', "key in $: Expected `int`, got `str`"),
        (DataJoin | DataMove, '{"type": "move", "x": "y"}', "$.x: Expected `int`, got `str`"),
        (DataJoin | DataMove, '{"type": "jump"}', '$.type: must be one of "join", "move", "go"'),
        (DataJoin | DataMove, "{}", "Object missing required field `type`"),
        (DataJoin | DataMove, '{"type": [1]}', "$.type: Expected `bool | int | str | null`, got `array`"),
        (DataJoin | DataMove, "3", "Expected `object`, got `int`"),
        (ModelMove, '{"type": "move"}', "$.x: Field required"),
        (ModelMove, "3", "Input should be an object"),
        (Game, '{"board": {"type": "move", "x": 1}, "points": [{}]}', "$.points.0.x: Field required"),
        (Any, "[" * 100_000, "the JSON is nested too deeply"),
        (Any, b'"\xff"', "the message isn't UTF-8"),
        (Any, '"\ud800"', "the message isn't UTF-8"),
    ],
    ids=repr,
)
def test_the_reason_names_the_field_first(type_: Any, document: str | bytes, reason: str) -> None:
    with pytest.raises(InvalidMessage) as raised:
        json_decoder(type_)(document)
    assert raised.value.reason == reason


def test_a_validator_of_the_application_says_the_reason() -> None:
    class Even(pydantic.BaseModel):
        number: int

        @pydantic.field_validator("number")
        @classmethod
        def even(cls, number: int) -> int:
            if number % 2:
                raise ValueError("must be even")
            return number

    with pytest.raises(InvalidMessage, match=r"^\$\.number: Value error, must be even$"):
        json_decoder(Even)('{"number": 3}')


def test_the_corpus_has_at_least_forty_documents_that_are_no_json() -> None:
    assert len(json_corpus.MALFORMED) >= 40
    for document in json_corpus.HOSTILE.values():
        assert document


@pytest.mark.parametrize("decoder", DECODERS)
def test_hostile_documents_raise_nothing_but_invalid_message(decoder: str) -> None:
    for document in json_corpus.ALL.values():
        reason = refusal(DECODERS[decoder], document)
        assert reason is None or re.fullmatch("1007 .+", reason, re.DOTALL)


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_is_no_json_is_refused(decoder: str) -> None:
    accepted = [name for name, document in json_corpus.MALFORMED.items() if not refusal(DECODERS[decoder], document)]
    assert accepted == []


@pytest.mark.parametrize("decoder", sorted(DECODERS.keys() - {"model of anything"}))
def test_numbers_that_are_not_finite_are_refused(decoder: str) -> None:
    accepted = [name for name, document in json_corpus.NOT_FINITE.items() if not refusal(DECODERS[decoder], document)]
    assert accepted == []


def test_strings_that_were_read_can_be_sent() -> None:
    for document in json_corpus.ALL.values():
        try:
            value = DECODERS["Any"](document)
        except InvalidMessage:
            continue
        to_json(value).encode()


@quick
@given(json_corpus.documents)
def test_nothing_a_client_sends_raises_anything_but_invalid_message(document: str | bytes) -> None:
    for decode in DECODERS.values():
        reason = refusal(decode, document)
        assert reason is None or reason.startswith("1007 ")


@quick
@given(json_corpus.values)
def test_any_reads_what_json_says(value: Any) -> None:
    text = json.dumps(value)
    if "NaN" in text or "Infinity" in text:
        return
    assert DECODERS["Any"](text) == DECODERS["Any"](text.encode()) == json.loads(text)


# Types that can't be read


class Foreign:
    pass


class NeedsForeign(msgspec.Struct):
    inner: dict[str, list[Foreign]]


class Recursive(msgspec.Struct):
    children: list["Recursive"] = []


class ModelInStruct(msgspec.Struct):
    model: ModelMove


@dataclasses.dataclass
class ModelAndForeign:
    model: ModelMove
    foreign: Foreign


@dataclasses.dataclass
class Untagged:
    type: str


@pytest.mark.parametrize(
    ("type_", "reason"),
    [
        (Foreign, "Foreign can't be read from JSON: use a pydantic model"),
        (list[Foreign], "Foreign can't be read from JSON"),
        (NeedsForeign, "Foreign can't be read from JSON"),
        (ModelInStruct, "ModelMove can't be read from JSON"),
        (ModelAndForeign, "Foreign"),
        (object(), "is not supported"),
        (Point | Untagged, "can't tell Point, Untagged apart: give each a field of the same name"),
        (DataJoin | Untagged, "can't tell DataJoin, Untagged apart"),
        (DataJoin | DictJoin, "can't tell DataJoin, DictJoin apart"),
        (ModelJoin | Point, "can't tell ModelJoin, Point apart"),
        (Struct | StructJoin, "can't tell Struct, StructJoin apart"),
        (DataJoin | DataMove | None, "union"),
    ],
    ids=repr,
)
def test_types_that_cannot_be_read_are_the_developers_mistake(type_: Any, reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        json_decoder(type_)


def test_types_may_contain_themselves() -> None:
    assert json_decoder(Recursive)('{"children": [{}]}') == Recursive([Recursive()])


# What is written


class Aliased(pydantic.BaseModel):
    inner: int = pydantic.Field(serialization_alias="outer")


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("data", "payload"),
    [
        ("hello", Payload("text", "hello")),
        ("", Payload("text", "")),
        ("grüß 🎈", Payload("text", "grüß 🎈")),
        (b"\x00\xff", Payload("binary", b"\x00\xff")),
        (bytearray(b"ab"), Payload("binary", b"ab")),
        (memoryview(b"abcd")[1:3], Payload("binary", b"bc")),
        (None, Payload("json", "null")),
        (7, Payload("json", "7")),
        (True, Payload("json", "true")),
        (math.nan, Payload("json", "null")),
        (2**100, Payload("json", "1267650600228229401496703205376")),
        ({"a": ["b", 1.5]}, Payload("json", '{"a":["b",1.5]}')),
        ((1, "x"), Payload("json", '[1,"x"]')),
        (Point(1, 2), Payload("json", '{"x":1,"y":2}')),
        (StructMove(1, 2), Payload("json", '{"type":"move","x":1,"y":2}')),
        (DictMove(type="move", x=1), Payload("json", '{"type":"move","x":1}')),
        (ModelMove(type="move", x=1), Payload("json", '{"type":"move","x":1,"y":0}')),
        (Aliased(inner=1), Payload("json", '{"outer":1}')),
        (PydanticPoint(1), Payload("json", '{"x":1,"y":0}')),
        ({"deep": [Aliased(inner=1), Point(1)]}, Payload("json", '{"deep":[{"outer":1},{"x":1,"y":0}]}')),
        (Game(ModelMove(type="move", x=1), []), Payload("json", '{"board":{"type":"move","x":1,"y":0},"points":[]}')),
        (datetime.date(2024, 2, 29), Payload("json", '"2024-02-29"')),
        (uuid.UUID(int=0), Payload("json", '"00000000-0000-0000-0000-000000000000"')),
        (decimal.Decimal("1.50"), Payload("json", '"1.50"')),
        ([b"hi"], Payload("json", '["aGk="]')),
    ],
    ids=repr,
)
def test_data_becomes_text_bytes_or_json(data: Any, payload: Payload) -> None:
    assert encode(data) == payload


def test_a_subclass_of_str_is_text_that_json_and_servers_take() -> None:
    class Color(str, enum.Enum):  # noqa: UP042  the one that `str()` turns into "Color.RED"
        RED = "red"

    for data, text in ((Text("x"), "x"), (Color.RED, "red")):
        payload = encode(data)
        assert payload == Payload("text", text)
        assert type(payload.data) is str
        assert to_json(payload.data) == f'"{text}"'


cycle: list[Any] = []
cycle.append(cycle)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (object(), "object can't be written as JSON; send a dict, a dataclass, a model, or its text"),
        ({"a": [Foreign()]}, "Foreign can't be written as JSON"),
        (ModelMove, "can't be written as JSON"),
        (1j, "complex can't be written as JSON"),
        ({(1, 2): 3}, "can't be written as JSON"),
        (iter([]), "list_iterator can't be written as JSON"),
        ("a\ud800", "this text can't be sent: .*surrogates not allowed"),
        ({"a": "\ud800"}, "dict can't be written as JSON: .*surrogates not allowed"),
        (10**5000, "int can't be written as JSON: .*4300 digits"),
        (cycle, "list can't be written as JSON: .*recursion"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isascii() else type(value).__name__,
)
def test_what_cannot_be_encoded_is_a_type_error(data: Any, reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        encode(data)


@pytest.mark.parametrize("data", ["text", b"binary", {"a": [1, None]}, 3, None, "", b""], ids=repr)
def test_a_payload_is_read_back_as_it_was(data: Any) -> None:
    assert encode(data).decode() == data


@quick
@given(json_corpus.values)
def test_whatever_json_says_is_written_as_any_reader_reads_it(value: Any) -> None:
    payload = encode([value])
    assert payload.kind == "json"
    finite = json.loads(json.dumps([value]), parse_constant=lambda name: None)
    assert json.loads(payload.data) == payload.decode() == finite


# Values that have been read already


@dataclasses.dataclass
class Picture:
    name: str
    data: bytes
    at: datetime.date | None = None


class ModelPicture(pydantic.BaseModel):
    name: str
    data: bytes


@pytest.mark.parametrize(
    ("type_", "value", "converted"),
    [
        (Any, [1, b"x"], [1, b"x"]),
        (int, 1, 1),
        (float, 1, 1.0),
        (bytes, b"\xff", b"\xff"),
        (bytes | None, None, None),
        (Alias, {"type": "join", "name": "ann"}, DataJoin("join", "ann")),
        (dict[int, bytes], {"1": b"x"}, {1: b"x"}),
        (tuple[int, str], [1, "x"], (1, "x")),
        (
            Picture,
            {"name": "a", "data": b"\xff", "at": "2026-11-23"},
            Picture("a", b"\xff", datetime.date(2026, 11, 23)),
        ),
        (ModelPicture, {"name": "a", "data": b"\xff"}, ModelPicture.model_construct(name="a", data=b"\xff")),
        (list[ModelPicture], [], []),
        (ModelJoin | ModelMove, {"type": "move", "x": 1}, ModelMove(type="move", x=1)),
        (StructJoin | StructMove, {"type": "join", "name": "a"}, StructJoin("a")),
    ],
    ids=repr,
)
def test_values_that_were_read_are_converted(type_: Any, value: Any, converted: Any) -> None:
    assert converter(type_)(value) == converted


@pytest.mark.parametrize(
    ("type_", "value", "words"),
    [
        (int, "1", "Expected `int`"),
        (bytes, "eA==", "Expected `bytes`"),
        (str, b"x", "Expected `str`"),
        (Picture, {"name": 1, "data": b""}, r"\$.name: Expected `str`"),
        (ModelPicture, {"name": 1, "data": b""}, r"\$.name: "),
        (ModelJoin | ModelMove, {"type": "leave"}, "type"),
    ],
    ids=repr,
)
def test_values_that_are_something_else_are_invalid(type_: Any, value: Any, words: str) -> None:
    with pytest.raises(InvalidMessage, match=words):
        converter(type_)(value)


def test_types_that_nothing_can_be_converted_to_are_the_developer_s_error() -> None:
    with pytest.raises(TypeError):
        converter(re.Pattern)


def test_bytes_stay_bytes_in_plain_values() -> None:
    data = {"picture": Picture("a", b"x"), "all": (bytearray(b"y"), ModelMove(type="move", x=1)), 1: {2}}
    assert to_builtins(data) == {
        "picture": {"name": "a", "data": b"x", "at": None},
        "all": (bytearray(b"y"), {"type": "move", "x": 1, "y": 0}),
        "1": [2],
    }
    assert to_builtins(data["all"])[0] is data["all"][0]  # type: ignore[index]


def test_what_json_cannot_say_has_no_plain_values() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    for data in (object(), cycle, {1j: 1}):
        with pytest.raises(TypeError):
            to_builtins(data)
