"""The Centrifuge client protocol in JSON, as the `centrifuge` clients speak it: commands in, replies and pushes out.

A frame has one or more messages, one on each line. What a client asks for is a command, with an id that its reply
repeats; what nobody asked for is a push. Only words are known here: what they do is for the endpoint.
"""

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec

from asgi_ws.exceptions import CommandError, InvalidMessage
from asgi_ws.messages import INTERNAL, Position, Publication, Recovery
from asgi_ws.payloads import json_decoder, to_json
from asgi_ws.protocols.base import Protocol

__all__ = [
    "PING",
    "REJECT_UNRECOVERED",
    "CentrifugeProtocol",
    "ClientInfo",
    "Command",
    "Connect",
    "HistoryRequest",
    "InChannel",
    "Publish",
    "Refresh",
    "Request",
    "Rpc",
    "SendRequest",
    "ServerSide",
    "Since",
    "SubRefresh",
    "Subscribe",
    "Unreadable",
    "bad_request",
    "disconnect_push",
    "error_reply",
    "presence_result",
    "publications_result",
    "push_text",
    "reply",
]

PING = "{}"
REJECT_UNRECOVERED = 2
"""In the flags of a subscribe: an error, rather than a beginning without what was missed."""

_MAX_COMMANDS = 10_000
"""How many commands one frame may have."""
_MAX_NUMBER = 2**53 - 1
_Number = Annotated[int, msgspec.Meta(ge=0, le=_MAX_NUMBER)]
_NOTHING = msgspec.Raw(b"null")

_CODES = {
    1000: (3503, "force disconnect"),
    1001: (3001, "shutdown"),
    1003: (3501, "bad request"),
    1007: (3501, "bad request"),
    1008: (3503, "force disconnect"),
    1009: (1009, "message too big"),
    1011: (3004, "internal server error"),
    1012: (3001, "shutdown"),
    1013: (3008, "slow"),
}
"""What a close code is to these clients, who come back after 3000 to 3499 and stay away after 3500 to 3999."""


# What clients say. What isn't known here is ignored: newer clients say more.


class Since(msgspec.Struct):
    """A position. Without an epoch it is one of whatever epoch there is."""

    offset: _Number = 0
    epoch: str = ""


class ServerSide(Since):
    """How far a client had got in a channel that the server has subscribed it to."""

    recover: bool = False


class Connect(msgspec.Struct):
    token: str = ""
    data: msgspec.Raw = _NOTHING
    subs: dict[str, ServerSide] = {}


class InChannel(msgspec.Struct):
    """What has nothing but a channel: unsubscribe, presence, presence_stats."""

    channel: str = ""


class Subscribe(Since):
    channel: str = ""
    token: str = ""
    data: msgspec.Raw = _NOTHING
    recover: bool = False
    join_leave: bool = False
    flag: int = 0
    type: int = 0
    tf: Any = None


class Publish(msgspec.Struct):
    channel: str = ""
    data: msgspec.Raw = msgspec.Raw(b"")
    type: int = 0
    key: str = ""
    removed: bool = False


class HistoryRequest(msgspec.Struct):
    channel: str = ""
    limit: int = 0
    since: Since | None = None
    reverse: bool = False


class Rpc(msgspec.Struct):
    method: str = ""
    data: msgspec.Raw = _NOTHING


class SendRequest(msgspec.Struct):
    data: msgspec.Raw = _NOTHING


class Refresh(msgspec.Struct):
    token: str = ""


class SubRefresh(msgspec.Struct):
    channel: str = ""
    token: str = ""
    type: int = 0


class Unreadable(msgspec.Struct):
    """A command of which only the id can be read."""


Request = (
    Connect | Subscribe | InChannel | Publish | HistoryRequest | Rpc | SendRequest | Refresh | SubRefresh | Unreadable
)


class Command(msgspec.Struct):
    """One thing that a client asks for. Of several the first one counts; none at all is a pong."""

    id: _Number = 0
    connect: Connect | None = None
    subscribe: Subscribe | None = None
    unsubscribe: InChannel | None = None
    publish: Publish | None = None
    presence: InChannel | None = None
    presence_stats: InChannel | None = None
    history: HistoryRequest | None = None
    rpc: Rpc | None = None
    send: SendRequest | None = None
    refresh: Refresh | None = None
    sub_refresh: SubRefresh | None = None
    unreadable: Unreadable | None = None

    def request(self) -> tuple[str, Request | None]:
        """What is asked for: its name, and what belongs to it. `None` for a pong."""
        for name in _NAMES:
            request = getattr(self, name)
            if request is not None:
                return name, request
        return "", None


_NAMES = Command.__struct_fields__[1:]
_decode = msgspec.json.Decoder(Command).decode


def _read(line: str) -> Command:
    try:
        command: Command = _decode(line)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return Command(id=_id_of(line), unreadable=Unreadable())
    name, request = command.request()
    if getattr(request, "channel", None) == "" or (name not in ("", "send") and not command.id):
        raise bad_request()
    if not name and command.id:
        # Something that isn't known here; without an id it would be taken for a pong.
        raise bad_request()
    return command


def _id_of(line: str) -> int:
    """The id of a command that can't be read otherwise, as one with half of an emoji, which no UTF-8 can say."""
    try:
        command = json.loads(line)
    except (ValueError, RecursionError):
        command = None
    number = command.get("id") if isinstance(command, dict) else None
    if type(number) is not int or not 0 < number <= _MAX_NUMBER:
        raise bad_request()
    return number


def bad_request() -> InvalidMessage:
    """What the protocol forbids: it ends the connection."""
    return InvalidMessage("bad request", 3501)


# What they are told


class ClientInfo(msgspec.Struct, omit_defaults=True):
    """A client as others see it."""

    user: str
    client: str
    conn_info: Any = None


class _Result(msgspec.Struct, omit_defaults=True):
    recoverable: bool = False
    positioned: bool = False
    epoch: str = ""
    offset: int = 0
    was_recovering: bool = False
    recovered: bool = False
    publications: list[msgspec.Raw] = []
    data: Any = None
    expires: bool = False
    ttl: int = 0


class _Event(msgspec.Struct):
    """A `PresenceEvent`."""

    type: str
    channel: str
    user: str | None
    connection: str | None
    info: Any = None


_read_event = json_decoder(_Event)


def reply(command: int, name: str, result: str = "{}") -> str:
    """The answer to a command."""
    return f'{{"id":{command},"{name}":{result}}}'


def error_reply(command: int, error: CommandError) -> str:
    """The answer to a command that failed."""
    words: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.temporary:
        words["temporary"] = True
    return reply(command, "error", to_json(words))


def push_text(kind: str, body: str, channel: str = "") -> str:
    """What nobody has asked for."""
    where = f'"channel":{to_json(channel)},' if channel else ""
    return f'{{"push":{{{where}"{kind}":{body}}}}}'


class CentrifugeProtocol(Protocol[list[Command]]):
    """Reads commands; writes publications, presence events, and what an application sends to one client. `is_kept`
    says which channels have a history: elsewhere publications have no offsets."""

    format = "centrifuge"

    def __init__(self, is_kept: Callable[[str], bool]) -> None:
        self._is_kept = is_kept

    def decode(self, payload: str | bytes) -> list[Command]:
        if isinstance(payload, bytes):
            raise bad_request()
        lines = payload.split("\n", _MAX_COMMANDS)
        if len(lines) > 1 and not lines[-1]:
            lines.pop()
        if len(lines) > _MAX_COMMANDS:
            raise InvalidMessage("too many commands", 3013)
        return [_read(line) for line in lines]

    def encode(self, message: Any) -> str:
        return push_text("message", f'{{"data":{to_json(message)}}}')

    def encode_publication(self, publication: Publication) -> str:
        if publication.channel.startswith(INTERNAL):
            # It is the channel of another's presence events.
            return self._presence_push(publication)
        return push_text("pub", self.publication(publication), publication.channel)

    def publication(self, publication: Publication) -> str:
        """A publication inside of something else. Bytes become base64, and a tag says so."""
        payload = publication.payload
        words = []
        if isinstance(payload.data, bytes):
            words.append(f'"data":{to_json(payload.data)},"tags":{{"encoding":"base64"}}')
        else:
            words.append('"data":' + (to_json(payload.data) if payload.kind == "text" else payload.data))
        if publication.publisher is not None:
            words.append(f'"info":{publication.publisher}')
        if publication.position is not None and self._is_kept(publication.channel):
            words.append(f'"offset":{publication.position.offset}')
        return "{" + ",".join(words) + "}"

    def _presence_push(self, publication: Publication) -> str:
        event: _Event = _read_event(publication.payload.data)
        info = ClientInfo(event.user or "", event.connection or "", event.info)
        return push_text(event.type, f'{{"info":{to_json(info)}}}', event.channel)

    def subscribe_result(
        self,
        recovery: Recovery,
        since: Position | None = None,
        *,
        recovering: bool = False,
        data: Any = None,
        ttl: int = 0,
    ) -> str:
        """How a subscription has begun. The position is the one that the client is to go on from: where it is given
        what it missed, that is the one that it came with."""
        result = _Result(data=data, expires=ttl > 0, ttl=ttl)
        position = recovery.position
        if position is not None:
            result.recoverable = result.positioned = True
            result.epoch = position.epoch
            result.offset = since.offset if recovery.recovered and since is not None else position.offset
            result.was_recovering = recovering
            result.recovered = recovery.recovered
            result.publications = [msgspec.Raw(self.publication(each).encode()) for each in recovery.publications]
        return to_json(result)

    def farewell(self, code: int, reason: str) -> tuple[int, str]:
        # A reason that is missing, or that is JSON, would have the JavaScript client do something else.
        code, usual = _CODES.get(code, (code, "disconnected"))
        return code, usual if not reason or _is_json(reason) else reason


def disconnect_push(code: int, reason: str) -> str:
    """The last word, where there is no close frame."""
    return push_text("disconnect", to_json({"code": code, "reason": reason}))


def publications_result(publications: list[str], position: Position) -> str:
    """What was asked for of a channel's history."""
    return f'{{"publications":[{",".join(publications)}],"offset":{position.offset},"epoch":{to_json(position.epoch)}}}'


def presence_result(clients: Mapping[str, ClientInfo]) -> str:
    """Who is in a channel."""
    return to_json({"presence": clients})


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
