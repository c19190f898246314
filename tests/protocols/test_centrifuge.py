"""The words of the Centrifuge protocol: text in, commands out; values in, text out."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_ws.exceptions import CommandError, InvalidMessage
from asgi_ws.messages import Position, Publication, Recovery
from asgi_ws.payloads import Payload, encode, to_json
from asgi_ws.presence import PresenceEvent, events_of
from asgi_ws.protocols import CentrifugeProtocol, error_reply, push_text, reply
from tests import json_corpus

quick = settings(max_examples=150, deadline=None, database=None)
PROTOCOL = CentrifugeProtocol(lambda channel: channel.startswith("kept"))

NAMES = [
    "connect",
    "subscribe",
    "unsubscribe",
    "publish",
    "presence",
    "presence_stats",
    "history",
    "rpc",
    "send",
    "refresh",
    "sub_refresh",
]
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
fields = st.dictionaries(
    st.sampled_from(["channel", "token", "data", "limit", "since", "recover", "offset", "epoch", "type", "x"]),
    values | st.integers(-3, 3) | st.sampled_from(["news", ""]),
    max_size=5,
)
commands = st.fixed_dictionaries({}, optional={"id": st.integers(-1, 10) | values}) | st.builds(
    lambda number, name, body: {"id": number, name: body}, st.integers(-1, 10), st.sampled_from(NAMES), fields | values
)


@quick
@given(st.lists(commands, min_size=1, max_size=3))
def test_whatever_clients_say_is_commands_or_invalid(said: list[Any]) -> None:
    try:
        found = PROTOCOL.decode("\n".join(json.dumps(each) for each in said))
    except InvalidMessage as error:
        assert (error.close_code, error.reason) == (3501, "bad request")  # noqa: PT017
        return
    for command in found:
        name, request = command.request()
        assert request is None or command.id or name == "send"
        assert getattr(request, "channel", "x")
        assert getattr(request, "offset", 0) >= 0


@quick
@given(json_corpus.documents)
def test_whatever_comes_is_commands_or_invalid(document: str | bytes) -> None:
    try:
        PROTOCOL.decode(document)
    except InvalidMessage as error:
        assert error.close_code == 3501  # noqa: PT017


@quick
@given(values)
def test_any_json_comes_through_unchanged_on_one_line(value: Any) -> None:
    (command,) = PROTOCOL.decode(json.dumps({"id": 1, "rpc": {"method": "x", "data": value}}))
    assert command.rpc is not None
    assert msgspec.json.decode(command.rpc.data) == value
    text = PROTOCOL.encode_publication(Publication("news", encode(value)))
    assert "\n" not in text
    assert json.loads(text) == {"push": {"channel": "news", "pub": {"data": value}}}
    assert json.loads(PROTOCOL.encode(value)) == {"push": {"message": {"data": value}}}


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_known_by_its_name(name: str) -> None:
    (command,) = PROTOCOL.decode(json.dumps({"id": 7, name: {"channel": "news", "unknown": 1}, "unknown": 2}))
    assert command.id == 7
    assert command.request()[0] == name


def test_of_several_the_first_counts() -> None:
    (command,) = PROTOCOL.decode('{"id":1,"rpc":{},"connect":{},"send":{}}')
    assert command.request()[0] == "connect"


def test_a_frame_has_lines_and_may_end_with_one_line_end() -> None:
    assert len(PROTOCOL.decode("{}\n{}")) == len(PROTOCOL.decode("{}\n{}\n")) == 2
    for frame in ("", "\n", "{}\n\n", "\n{}", "{}\n\n{}"):
        with pytest.raises(InvalidMessage):
            PROTOCOL.decode(frame)


def test_zero_values_and_missing_ones_are_the_same() -> None:
    said = '{"id":1,"subscribe":{"channel":"news","recover":false,"offset":0,"epoch":"","flag":0,"token":"","type":0}}'
    assert PROTOCOL.decode(said) == PROTOCOL.decode('{"id":1,"subscribe":{"channel":"news"}}')


def test_positions_are_numbers_that_every_client_can_say() -> None:
    for offset in (-1, 2**53, 1.5, "1", True):
        (command,) = PROTOCOL.decode(json.dumps({"id": 1, "subscribe": {"channel": "news", "offset": offset}}))
        assert command.request()[0] == "unreadable"


def test_replies_and_errors() -> None:
    assert reply(3, "unsubscribe") == '{"id":3,"unsubscribe":{}}'
    assert error_reply(3, CommandError(103)) == '{"id":3,"error":{"code":103,"message":"permission denied"}}'
    temporary = json.loads(error_reply(3, CommandError(500, 'a "quote"', temporary=True)))
    assert temporary == {"id": 3, "error": {"code": 500, "message": 'a "quote"', "temporary": True}}
    assert push_text("pub", "{}", 'a"b') == '{"push":{"channel":"a\\"b","pub":{}}}'


@pytest.mark.parametrize(
    ("publication", "expected"),
    [
        (Publication("news", encode("text"), Position(7, "e")), {"data": "text"}),
        (Publication("kept", encode("text"), Position(7, "e")), {"data": "text", "offset": 7}),
        (Publication("kept", encode({"a": 1})), {"data": {"a": 1}}),
        (Publication("news", encode(b"\xff"), sender="abc"), {"data": "/w==", "tags": {"encoding": "base64"}}),
        (
            Publication("news", encode(1), sender='{"user":"ann","client":"c"}'),
            {"data": 1, "info": {"user": "ann", "client": "c"}},
        ),
    ],
)
def test_publications(publication: Publication, expected: dict[str, Any]) -> None:
    said = json.loads(PROTOCOL.encode_publication(publication))
    assert said == {"push": {"channel": publication.channel, "pub": expected}}


def test_one_frame_serves_all_clients() -> None:
    publication = Publication("news", encode("text"))
    assert publication.frame(PROTOCOL) is publication.frame(CentrifugeProtocol(lambda channel: False))


def test_presence_events_are_told_as_joins_and_leaves() -> None:
    for kind, user, connection, info in (("join", "ann", "c", {"a": 1}), ("leave", None, None, None)):
        event = PresenceEvent(kind, "room", user, connection, info)  # type: ignore[arg-type]
        said = json.loads(PROTOCOL.encode_publication(Publication(events_of("room"), Payload("json", to_json(event)))))
        who = {"user": user or "", "client": connection or ""} | ({"conn_info": info} if info else {})
        assert said == {"push": {"channel": "room", kind: {"info": who}}}


def test_how_a_subscription_has_begun() -> None:
    def said(*args: Any, **options: Any) -> Any:
        return json.loads(PROTOCOL.subscribe_result(*args, **options))

    missed = (Publication("kept", encode(1), Position(6, "e")),)
    top = {"recoverable": True, "positioned": True, "epoch": "e", "offset": 6}
    assert said(Recovery(False, None), recovering=True, data=0, ttl=5) == {"data": 0, "expires": True, "ttl": 5}
    assert said(Recovery(False, Position(6, "e"))) == top
    assert said(Recovery(False, Position(6, "e")), Position(1, "e"), recovering=True) == top | {"was_recovering": True}
    assert said(Recovery(True, Position(6, "e"), missed), Position(5, "e"), recovering=True) == top | {
        "offset": 5,
        "was_recovering": True,
        "recovered": True,
        "publications": [{"data": 1, "offset": 6}],
    }


@quick
@given(st.integers(1000, 4999), st.text())
def test_no_reason_is_an_order_to_the_client(code: int, reason: str) -> None:
    told, words = PROTOCOL.farewell(code, reason)
    assert words
    assert told == 1009 or told >= 3000 or told == code
    with pytest.raises(ValueError):  # noqa: PT011
        json.loads(words)
