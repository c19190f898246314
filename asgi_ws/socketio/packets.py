"""Socket.IO packets, version 5 of the protocol: values in, values out, no I/O.

A packet is one text message, `<type>[<attachments>-][<namespace>,][<id>][<JSON>]`, followed by as many binary ones as
it has attachments; in its JSON, `{"_placeholder": true, "num": 0}` stands where the first of them belongs.
"""

import dataclasses
import re
from typing import Any, Final

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.frames import size_of
from asgi_ws.payloads import json_decoder, to_builtins, to_json

__all__ = [
    "ACK",
    "BINARY_ACK",
    "BINARY_EVENT",
    "CONNECT",
    "CONNECT_ERROR",
    "DISCONNECT",
    "EVENT",
    "MAX_ATTACHMENTS",
    "RESERVED",
    "Decoder",
    "Packet",
    "check_event",
    "encode",
    "head",
]

CONNECT: Final = 0
DISCONNECT: Final = 1
EVENT: Final = 2
ACK: Final = 3
CONNECT_ERROR: Final = 4
BINARY_EVENT: Final = 5
BINARY_ACK: Final = 6

MAX_ATTACHMENTS = 10
"""How many binary values a packet can have; the clients' own parsers take no more."""
RESERVED = frozenset({"connect", "connect_error", "disconnect", "disconnecting", "newListener", "removeListener"})
"""Names that no event can have: clients and servers have uses of their own for them."""

_MAX_ID = 2**53 - 1
"""The largest number that every client's JSON can say."""
_MAX_NAMESPACE = 128
_HEAD = re.compile(r"([0-6])(?:([0-9]{1,2})-)?(?:(/[^,]*)(?:,|$))?([0-9]{1,16})?", re.ASCII)


@dataclasses.dataclass(frozen=True, slots=True)
class Packet:
    """`data` is a list for events, whose first item is the name, and for acknowledgements. The binary types aren't
    told apart: whether a packet is one shows in its data."""

    type: int
    data: Any = None
    namespace: str = "/"
    id: int | None = None


# Writing


def encode(packet: Packet) -> tuple[str, *tuple[bytes, ...]]:
    """The text, and the attachments behind it. Raises `TypeError` for data that can't be sent."""
    type_, data = packet.type, packet.data
    if data is None:
        return (head(type_, packet.namespace, packet.id),)
    if type_ not in (EVENT, ACK) or all(type(item) in (str, int, float, bool) for item in data):
        return (head(type_, packet.namespace, packet.id) + to_json(data),)
    data = to_builtins(data)
    attachments = _take_out(data)
    if attachments:
        type_ += BINARY_EVENT - EVENT
    return head(type_, packet.namespace, packet.id, len(attachments)) + to_json(data), *attachments


def head(type_: int, namespace: str = "/", id_: int | None = None, attachments: int = 0) -> str:
    """What stands before the JSON."""
    count = f"{attachments}-" if attachments else ""
    where = "" if namespace == "/" else f"{namespace},"
    return f"{type_}{count}{where}" if id_ is None else f"{type_}{count}{where}{id_}"


def _take_out(data: Any) -> list[bytes]:
    """The binary values in `data`, which are replaced by placeholders there."""
    attachments: list[bytes] = []
    lookalike = False
    containers = [data]
    # Not by recursion: it may be nested as deeply as JSON can be.
    while containers:
        container = containers.pop()
        lookalike |= isinstance(container, dict) and container.get("_placeholder") is True
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, bytes | bytearray | memoryview):
                container[key] = {"_placeholder": True, "num": len(attachments)}
                attachments.append(bytes(value))
            elif isinstance(value, dict | list):
                containers.append(value)
            elif isinstance(value, tuple):
                container[key] = list(value)
                containers.append(container[key])
    if attachments and lookalike:
        # Passed on from one client, it would end the others, whose parsers take it for a broken packet.
        raise TypeError('an event with binary values can\'t have a dict with `"_placeholder": True` of its own')
    if len(attachments) > MAX_ATTACHMENTS:
        raise TypeError(f"an event can have {MAX_ATTACHMENTS} binary values, not {len(attachments)}")
    return attachments


def check_event(event: str) -> None:
    """Raise `TypeError` or `ValueError` for a name that no event can have."""
    if not isinstance(event, str):
        raise TypeError(f"an event's name is a str, not {type(event).__name__}")
    if event in RESERVED:
        raise ValueError(f"{event!r} is a reserved name: no event can have it")


# Reading


class Decoder:
    """Puts packets together, of text and the attachments that follow it, `max_size` bytes of both at the most."""

    __slots__ = ("_attachments", "_max_size", "_missing", "_size", "incomplete")

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self.incomplete: Packet | None = None
        """The packet whose attachments have not all come."""
        self._attachments: list[bytes] = []
        self._missing = 0
        self._size = 0

    def feed(self, payload: str | bytes) -> Packet | None:
        """The packet that is complete with this message, if it is. Raises `InvalidMessage` and nothing else; what had
        come of a packet is forgotten then."""
        try:
            return self._attach(payload) if isinstance(payload, bytes) else self._begin(payload)
        except InvalidMessage:
            self._forget()
            raise

    def _begin(self, text: str) -> Packet | None:
        if self.incomplete is not None:
            raise InvalidMessage("an attachment is missing")
        self._size = self._checked(size_of(text))
        packet, count = _parse(text)
        if not count:
            return packet
        self.incomplete, self._missing = packet, count
        return None

    def _attach(self, data: bytes) -> Packet | None:
        packet = self.incomplete
        if packet is None:
            raise InvalidMessage("an attachment without a packet")
        self._size = self._checked(self._size + len(data))
        self._attachments.append(data)
        if len(self._attachments) < self._missing:
            return None
        _put_in(packet.data, self._attachments)
        self._forget()
        return packet

    def _checked(self, size: int) -> int:
        if size > self._max_size:
            raise InvalidMessage(f"a packet can have {self._max_size} bytes with its attachments", 1009)
        return size

    def _forget(self) -> None:
        self.incomplete = None
        self._attachments = []
        self._missing = self._size = 0


def _parse(text: str) -> tuple[Packet, int]:
    """A packet, and how many attachments it has."""
    match = _HEAD.match(text)
    if match is None:
        raise InvalidMessage("not a Socket.IO packet")
    type_, count = int(match[1]), 0
    if type_ in (BINARY_EVENT, BINARY_ACK):
        type_ -= BINARY_EVENT - EVENT
        count = int(match[2] or 0)
        if not 0 < count <= MAX_ATTACHMENTS:
            raise InvalidMessage(f"a binary packet has 1 to {MAX_ATTACHMENTS} attachments")
    elif match[2] is not None:
        raise InvalidMessage("only binary packets have attachments")
    namespace = match[3] or "/"
    if len(namespace) > _MAX_NAMESPACE:
        raise InvalidMessage(f"a namespace has {_MAX_NAMESPACE} characters at the most")
    id_ = None if match[4] is None else int(match[4])
    if id_ is not None and id_ > _MAX_ID:
        raise InvalidMessage("the acknowledgement's id is too large")
    data = _read_json(text[match.end() :]) if match.end() < len(text) else _NOTHING
    return Packet(type_, _checked_data(type_, id_, data), namespace, id_), count


_NOTHING: Any = object()
_read_json = json_decoder(Any)


def _checked_data(type_: int, id_: int | None, data: Any) -> Any:
    if type_ == EVENT:
        if not isinstance(data, list) or not data:
            raise InvalidMessage("an event is a list that begins with its name")
        name = data[0]
        # Numbers are legal, and the same as their text.
        if isinstance(name, bool) or not isinstance(name, str | int | float):
            raise InvalidMessage("an event's name is a string")
        data[0] = str(name)
        if name in RESERVED:
            raise InvalidMessage(f"{name!r} is a reserved name")
        return data
    if type_ == ACK:
        if not isinstance(data, list) or id_ is None:
            raise InvalidMessage("an acknowledgement has an id and a list")
        return data
    if id_ is not None:
        raise InvalidMessage("only events and acknowledgements have an id")
    if type_ == DISCONNECT:
        if data is not _NOTHING:
            raise InvalidMessage("a disconnect has no data")
    elif not (data is _NOTHING or isinstance(data, dict) or (type_ == CONNECT_ERROR and isinstance(data, str))):
        raise InvalidMessage("what a client connects with is an object")
    return None if data is _NOTHING else data


def _put_in(data: list[Any], attachments: list[bytes]) -> None:
    """Replace each placeholder in `data` by its attachment."""
    missing = dict(enumerate(attachments))
    containers: list[Any] = [data]
    while containers:
        container = containers.pop()
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, dict) and value.get("_placeholder") is True:
                number = value.get("num")
                # `True` is 1 to a dict, and a client may say anything.
                if type(number) is not int or number not in missing:
                    raise InvalidMessage("a placeholder names no attachment, or one that is used already")
                container[key] = missing.pop(number)
            elif isinstance(value, dict | list):
                containers.append(value)
    if missing:
        raise InvalidMessage("an attachment has no placeholder")
