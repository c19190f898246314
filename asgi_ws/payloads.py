"""The application's data as text or bytes, and back: encoding, decoding, validation.

JSON is msgspec's, both ways; where a type is made of pydantic models, pydantic validates. Which words a client's
protocol puts around a payload isn't known here.
"""

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.frames import size_of

__all__ = ["Payload", "converter", "encode", "json_decoder", "to_builtins", "to_json"]


@dataclasses.dataclass(frozen=True, slots=True)
class Payload:
    """The application's data, encoded: `kind` tells a string from JSON, both of which are text, and from bytes."""

    kind: typing.Literal["text", "json", "binary"]
    data: str | bytes

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return size_of(self.data)

    def decode(self) -> Any:
        """The data again: a `str`, `bytes`, or what the JSON says."""
        return msgspec.json.decode(self.data) if self.kind == "json" else self.data


def encode(data: Any) -> Payload:
    """`str` is text, `bytes` are binary, anything else becomes JSON. Raises `TypeError` for what can't be said so."""
    if isinstance(data, str):
        text = str.__str__(data)  # of a subclass, what JSON and servers can be given
        if not text.isascii():
            _check_utf8(text)
        return Payload("text", text)
    if isinstance(data, bytes | bytearray | memoryview):
        return Payload("binary", bytes(data))
    return Payload("json", to_json(data))


def to_json(data: Any) -> str:
    """JSON text of plain values, msgspec structs, dataclasses, `TypedDict`s and pydantic models, in any depth.

    Raises `TypeError` for what JSON can't say.
    """
    try:
        return msgspec.json.encode(data, enc_hook=_encode_other).decode()
    except (ValueError, RecursionError) as error:  # lone surrogates, giant numbers; cycles
        raise TypeError(f"{type(data).__name__} can't be written as JSON: {error}") from error


def to_builtins(data: Any) -> Any:
    """A copy of data in which all is what JSON can say, but `bytes`, `bytearray` and `memoryview` are what they were.

    Raises `TypeError` for anything else.
    """
    try:
        return msgspec.to_builtins(data, builtin_types=_BINARY, str_keys=True, enc_hook=_encode_other)
    except (ValueError, RecursionError) as error:
        raise TypeError(f"{type(data).__name__} can't be written as JSON: {error}") from error


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TypeError(f"this text can't be sent: {error}") from error


def _encode_other(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)
    if dump is None or isinstance(value, type):
        raise TypeError(
            f"{type(value).__name__} can't be written as JSON; send a dict, a dataclass, a model, or its text"
        )
    return dump(mode="json", by_alias=True)


Decoder = Callable[[str | bytes], Any]
Converter = Callable[[Any], Any]

_BINARY = (bytes, bytearray, memoryview)


def json_decoder(type_: Any) -> Decoder:
    """A function that reads JSON as `type_` and raises `InvalidMessage`, with the name of the field, for what isn't.

    `type_` is whatever msgspec or pydantic can validate, or a union of such records told apart by a tag: a field with
    a different `Literal` in each. Raises `TypeError` for a type that can't be read from JSON.
    """
    while hasattr(type_, "__value__"):  # `type Message = Join | Move`
        type_ = type_.__value__
    records = _untagged_records(type_)
    if len(records) > 1:
        tag_field, members = _tagged(records)
        if tag_field is not None:
            return _tagged_decoder(tag_field, members)
        if not all(_is_pydantic(record) for record in records):
            names = ", ".join(record.__name__ for record in records)
            raise TypeError(f"can't tell {names} apart: give each a field of the same name with a Literal of its own")
    if _mentions_pydantic(type_):
        return _pydantic_decoder(type_)
    return _msgspec_decoder(type_)


def converter(type_: Any) -> Converter:
    """The same for values that have been read already, in which there may be `bytes`."""
    read_json = json_decoder(type_)
    while hasattr(type_, "__value__"):
        type_ = type_.__value__
    if _mentions_pydantic(type_):
        return _pydantic_converter(type_)
    if len(_untagged_records(type_)) > 1:
        # Told apart by our own tags. `bytes` are their base64 there, as in all JSON.
        return lambda value: read_json(to_json(value))

    def convert(value: Any) -> Any:
        try:
            return msgspec.convert(value, type_, builtin_types=_BINARY, str_keys=True)
        except msgspec.ValidationError as error:
            raise InvalidMessage(_field_first(str(error))) from error

    return convert


# Reading


def _msgspec_decoder(type_: Any) -> Decoder:
    for unknown in _custom_types(msgspec.inspect.type_info(type_), set()):
        raise TypeError(
            f"{unknown.__name__} can't be read from JSON: use a pydantic model, a msgspec.Struct, a dataclass, "
            "a TypedDict or plain types"
        )
    decode = msgspec.json.Decoder(type_).decode

    def read(payload: str | bytes) -> Any:
        try:
            return decode(payload)
        except msgspec.MsgspecError as error:
            raise InvalidMessage(_field_first(str(error))) from error
        except UnicodeError as error:
            raise InvalidMessage("the message isn't UTF-8") from error
        except RecursionError as error:
            raise InvalidMessage("the JSON is nested too deeply") from error

    return read


def _field_first(message: str) -> str:
    """msgspec names the place last; a close reason is cut at its end, so the place goes first."""
    what, found, where = message.partition(" - at `")
    return f"{where.replace('`', '')}: {what}" if found else what


def _pydantic_decoder(type_: Any) -> Decoder:
    import pydantic

    try:
        validate = pydantic.TypeAdapter(type_).validate_json
    except pydantic.PydanticUserError as error:
        raise TypeError(str(error)) from error

    def read(payload: str | bytes) -> Any:
        try:
            return validate(payload)
        except pydantic.ValidationError as error:
            raise _invalid(error) from error

    return read


def _pydantic_converter(type_: Any) -> Converter:
    import pydantic

    validate = pydantic.TypeAdapter(type_).validate_python

    def convert(value: Any) -> Any:
        try:
            return validate(value)
        except pydantic.ValidationError as error:
            raise _invalid(error) from error

    return convert


def _invalid(error: Any) -> InvalidMessage:
    """The first of pydantic's complaints."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = "".join(f".{part}" for part in first["loc"])
    return InvalidMessage(f"${where}: {first['msg']}" if where else first["msg"])


def _tagged_decoder(tag_field: str, members: dict[Any, Any]) -> Decoder:
    tag_type = str | int | bool | None
    read_tag = _msgspec_decoder(msgspec.defstruct("Tagged", [("tag", tag_type, msgspec.field(name=tag_field))]))
    readers = {tag: json_decoder(member) for tag, member in members.items()}
    known = ", ".join(json.dumps(tag) for tag in members)

    def read(payload: str | bytes) -> Any:
        reader = readers.get(read_tag(payload).tag)
        if reader is None:
            raise InvalidMessage(f"$.{tag_field}: must be one of {known}")
        return reader(payload)

    return read


# Looking at types


def _untagged_records(type_: Any) -> list[Any]:
    """The members of a union in which msgspec or pydantic alone might not tell which is meant."""
    if typing.get_origin(type_) not in (typing.Union, types.UnionType):
        return []
    members = typing.get_args(type_)
    if not all(_is_record(member) for member in members) or all(_struct_tag(member) for member in members):
        return []
    return list(members)


def _tagged(records: list[Any]) -> tuple[str | None, dict[Any, Any]]:
    """The field by which the records are told apart, and the record for each of its values."""
    tags = [_literals(record) for record in records]
    for field in tags[0]:
        if not all(field in other for other in tags):
            continue
        values = [value for tag in tags for value in tag[field]]
        if len(set(values)) == len(values):
            return field, {value: record for record, tag in zip(records, tags, strict=True) for value in tag[field]}
    return None, {}


def _literals(record: Any) -> dict[str, tuple[Any, ...]]:
    tag = _struct_tag(record)
    literals = {tag[0]: (tag[1],)} if tag else {}
    for name, hint in typing.get_type_hints(record).items():
        if typing.get_origin(hint) is typing.Literal:
            literals[_wire_name(record, name)] = typing.get_args(hint)
    return literals


def _wire_name(record: Any, name: str) -> str:
    """The field's name in JSON, which an alias can change."""
    if _is_struct(record):
        return record.__struct_encode_fields__[record.__struct_fields__.index(name)]  # type: ignore[no-any-return]
    if _is_pydantic(record) and name in record.__pydantic_fields__:
        alias = record.__pydantic_fields__[name].validation_alias
        return alias if isinstance(alias, str) else name
    return name


def _struct_tag(record: Any) -> tuple[str, Any] | None:
    config = record.__struct_config__ if _is_struct(record) else None
    return (config.tag_field, config.tag) if config is not None and config.tag is not None else None


def _is_struct(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, msgspec.Struct)


def _is_record(type_: Any) -> bool:
    return (
        _is_struct(type_)
        or (isinstance(type_, type) and dataclasses.is_dataclass(type_))
        or _is_typeddict(type_)
        or _is_pydantic(type_)
    )


def _is_typeddict(type_: Any) -> bool:
    """One of typing's or of typing_extensions', which not every `typing.is_typeddict` knows."""
    return isinstance(type_, type) and issubclass(type_, dict) and hasattr(type_, "__total__")


def _is_pydantic(type_: Any) -> bool:
    """A model or a dataclass of pydantic's. Nothing can be one before pydantic has been imported."""
    return "pydantic" in sys.modules and isinstance(type_, type) and hasattr(type_, "__pydantic_validator__")


def _mentions_pydantic(type_: Any) -> bool:
    return "pydantic" in sys.modules and any(
        _is_pydantic(part) or type(part).__module__.partition(".")[0] == "pydantic" for part in _parts(type_, set())
    )


def _parts(type_: Any, seen: set[int]) -> Iterator[Any]:
    """The type itself and all that it is made of, the metadata of `Annotated` included."""
    if id(type_) in seen:
        return
    seen.add(id(type_))
    yield type_
    parts: list[Any] = [*typing.get_args(type_), *getattr(type_, "__metadata__", ()), getattr(type_, "__value__", None)]
    if isinstance(type_, type) and (dataclasses.is_dataclass(type_) or _is_typeddict(type_)):
        parts += typing.get_type_hints(type_, include_extras=True).values()
    for part in parts:
        yield from _parts(part, seen)


def _custom_types(info: Any, seen: set[int]) -> Iterator[type]:
    """The classes in msgspec's view of a type that it can't read by itself."""
    if isinstance(info, msgspec.inspect.CustomType):
        yield info.cls
    elif isinstance(info, tuple | list):
        for part in info:
            yield from _custom_types(part, seen)
    elif isinstance(info, msgspec.inspect.Type | msgspec.inspect.Field) and id(info) not in seen:
        seen.add(id(info))
        for name in info.__struct_fields__:
            yield from _custom_types(getattr(info, name), seen)
