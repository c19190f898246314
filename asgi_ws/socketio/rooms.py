"""Rooms are channels of the hub: how they are called, what is published to them, and what clients get of it.

An event is published as the JSON list of its name and arguments, in which binary values are base64: so an endpoint
that subscribes to a room's channel can read it. What else a socket has to know of it travels in the place of the
publication's sender.
"""

import base64
import json
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from asgi_ws.channels import check_name
from asgi_ws.exceptions import AsgiWsError, InvalidChannel
from asgi_ws.frames import Frame
from asgi_ws.messages import Publication
from asgi_ws.payloads import Payload, to_builtins, to_json
from asgi_ws.protocols import Protocol
from asgi_ws.socketio.packets import EVENT, Packet, encode, head
from asgi_ws.socketio.sessions import token_of

__all__ = [
    "PREFIX_OF_ROOMS",
    "InvalidEvent",
    "Route",
    "SocketIOProtocol",
    "channel_of",
    "channel_of_all",
    "pack",
    "read_route",
]
_PREFIX = "socketio"
PREFIX_OF_ROOMS: Final = "socketio/"
_MARK = "socketio:"
Path = list[str | int]


class InvalidEvent(AsgiWsError):
    """What came through the broker isn't an event as we publish it."""


def channel_of_all(namespace: str) -> str:
    """The channel of all sockets of a namespace."""
    return _PREFIX + namespace


def channel_of(namespace: str, room: str) -> str:
    """The channel of a room. Raises `InvalidChannel` for a name that no room can have."""
    if not isinstance(room, str) or not room:
        raise InvalidChannel("a room's name is a str that isn't empty")
    # A namespace has no "#", so that no two rooms share a channel.
    channel = f"{_PREFIX}{namespace}#{room}"
    check_name(channel)
    return channel


class Route(msgspec.Struct, frozen=True, omit_defaults=True):
    """What sockets have to know of an event: whom it isn't for, and how to read it."""

    without: tuple[str, ...] = msgspec.field(default=(), name="x")
    """The rooms whose sockets don't get it; a socket's id is a room."""
    id: str | None = msgspec.field(default=None, name="i")
    """The same in all rooms that it was published to, so that each socket takes it once."""
    volatile: bool = msgspec.field(default=False, name="v")
    """Whether clients that are behind don't get it at all."""
    binary: tuple[Path, ...] = msgspec.field(default=(), name="b")
    """Where in its list there is base64 in the place of binary values."""

    def mark(self) -> str:
        """As the sender of a publication: printable ASCII."""
        return _MARK + json.dumps(msgspec.to_builtins(self), separators=(",", ":"))


_read_route = msgspec.json.Decoder(Route).decode
_EVERYBODY = Route()


# Out of the application


def pack(event: str, args: Iterable[Any]) -> tuple[Payload, tuple[Path, ...]]:
    """An event to be published, and where its binary values are. Raises `TypeError` for what can't be sent."""
    data = [event, *args]
    if all(type(item) in (str, int, float, bool) for item in data):
        return Payload("json", to_json(data)), ()
    data = to_builtins(data)
    paths = _binary_paths(data)
    if paths:
        # What no client could read is refused here, not where it arrives.
        encode(Packet(EVENT, data))
    return Payload("json", to_json(data)), paths


def _binary_paths(data: list[Any]) -> tuple[Path, ...]:
    paths: list[Path] = []
    containers: list[tuple[Any, Path]] = [(data, [])]
    while containers:
        container, path = containers.pop()
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, bytes | bytearray | memoryview):
                paths.append([*path, key])
            elif isinstance(value, dict | list | tuple):
                containers.append((value, [*path, key]))
    return tuple(paths)


# To the clients


def read_route(publication: Publication) -> Route:
    """Whom a publication is for. Of what somebody published without an event, and not for one connection, the
    connection's id, which may as well be a socket's, is all that is known. Raises `InvalidEvent`."""
    sender = publication.sender
    if sender is None:
        return _EVERYBODY
    if not sender.startswith(_MARK):
        return Route((sender,))
    try:
        return _read_route(sender.removeprefix(_MARK))
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise InvalidEvent(f"an event in {publication.channel!r} can't be read: {error}") from error


class SocketIOProtocol(Protocol[str | bytes]):
    """What a connection speaks whose messages are packets; putting them together takes a `Decoder` of its own.

    With `positions`, an event that was published says its own as its last argument, which is how clients that can be
    recovered want it.
    """

    format = "socketio"

    def __init__(self, *, positions: bool = False) -> None:
        self._positions = positions

    def decode(self, payload: str | bytes) -> str | bytes:
        return payload

    def encode(self, message: Packet) -> Frame:
        text, *attachments = encode(message)
        return Frame(text, attachments)

    def encode_publication(self, publication: Publication) -> Frame:
        """The event; and of what somebody published without one, an event called "message". Raises `InvalidEvent`."""
        namespace = _namespace_of(publication.channel)
        payload = publication.payload
        data = payload.data
        end = []
        if self._positions and publication.position is not None:
            end = [token_of(publication.channel, publication.position)]
        route = read_route(publication)
        if not (publication.sender or "").startswith(_MARK):
            if isinstance(data, bytes):
                return self.encode(Packet(EVENT, ["message", data, *end], namespace))
            data = f'["message",{data if payload.kind == "json" else to_json(data)}]'
        elif payload.kind != "json" or not isinstance(data, str) or not data.endswith("]"):
            raise InvalidEvent(f"an event in {publication.channel!r} isn't JSON")
        if not route.binary:
            return Frame(head(EVENT, namespace) + (f'{data[:-1]},"{end[0]}"]' if end else data))
        try:
            return self.encode(Packet(EVENT, [*_unpack(data, route.binary), *end], namespace))
        except (msgspec.MsgspecError, UnicodeError, TypeError, LookupError, ValueError) as error:
            raise InvalidEvent(f"an event in {publication.channel!r} can't be read: {error}") from error


def _namespace_of(channel: str) -> str:
    """Of whatever channel: where it is none of ours, "/"."""
    namespace = channel.partition("#")[0].removeprefix(_PREFIX)
    return namespace if channel.startswith(_PREFIX + "/") else "/"


def _unpack(data: str, paths: Iterable[Path]) -> list[Any]:
    event = msgspec.json.decode(data, type=list[Any])
    for *path, key in paths:
        container: Any = event
        for step in path:
            container = container[step]
        container[key] = base64.b64decode(container[key], validate=True)
    return event
