import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.messages import Position
from asgi_ws.socketio import sessions
from asgi_ws.socketio.sessions import Mark, Session, Sessions, token_of

quick = settings(max_examples=100, deadline=None, database=None)


def mark(channel: str, offset: int, id: str | None = None) -> Mark:
    return Mark(channel, Position(offset, "e"), id)


def joined(*channels: str) -> Session:
    session = Session("sid", None)
    for channel in channels:
        session.joined(channel, Position(0, "e"))
    return session


def offsets(session: Session | None) -> dict[str, int] | None:
    return None if session is None else {channel: position.offset for channel, position in session.positions.items()}


def test_a_token_is_of_one_publication() -> None:
    assert len({token_of(channel, Position(n, e)) for channel in "ab" for n in (1, 2) for e in "xy"}) == 8


def test_a_client_that_has_had_nothing_lacks_everything() -> None:
    session = joined("a", "b")
    session.sent(mark("a", 1))
    assert offsets(session.resume(None)) == {"a": 0, "b": 0}


def test_what_was_sent_behind_the_last_event_that_a_client_has_had_is_missing() -> None:
    session = joined("a", "b")
    for each in (mark("a", 1, "x"), mark("b", 1), mark("b", 2, "y"), mark("a", 2)):
        session.sent(each)
    again = session.resume(mark("b", 1).token)
    assert offsets(again) == {"a": 1, "b": 1}
    assert again is not None
    assert again.ids == ("x",)
    assert (again.sid, again.pid) == (session.sid, session.pid)
    # And once more, when it had got nothing since.
    assert offsets(again.resume(mark("b", 1).token)) == {"a": 1, "b": 1}
    again.sent(mark("b", 2, "y"))
    third = again.resume(mark("b", 2).token)
    assert offsets(third) == {"a": 1, "b": 2}
    assert third is not None
    assert third.ids == ("x", "y")


def test_channels_are_as_they_were_joined_and_left() -> None:
    session = joined("a", "b")
    session.sent(mark("a", 1))
    session.left("a")
    session.sent(mark("b", 1))
    session.joined("a", Position(5, "e"))
    session.sent(mark("a", 6))
    assert offsets(session.resume(mark("b", 1).token)) == {"a": 5, "b": 1}
    assert offsets(session.resume(mark("a", 6).token)) == {"a": 6, "b": 1}
    session.left("nowhere")


def test_what_is_not_known_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_MAX_LOG", 3)
    session = joined("a")
    assert session.resume("1:e:0") is None
    for offset in range(1, 6):
        session.sent(mark("a", offset))
    assert session.resume(None) is None
    assert session.resume(mark("a", 1).token) is None
    assert offsets(session.resume(mark("a", 2).token)) == {"a": 2}
    assert offsets(session.resume(mark("a", 3).token)) == {"a": 3}
    session.whole = False
    assert session.resume(mark("a", 3).token) is None
    unknown = joined("a")
    unknown.joined("b", None)
    assert unknown.resume(None) is None


@quick
@given(st.lists(st.sampled_from("abc"), max_size=30), st.data())
def test_every_event_behind_the_named_one_is_missing_and_no_other(rooms: list[str], data: st.DataObject) -> None:
    session, sent = joined(*"abc"), []
    counts = dict.fromkeys("abc", 0)
    for room in rooms:
        counts[room] += 1
        sent.append(mark(room, counts[room]))
        session.sent(sent[-1])
    had = data.draw(st.integers(0, len(sent)))
    again = session.resume(sent[had - 1].token if had else None)
    assert again is not None
    missing = {(room, offset) for room in "abc" for offset in range(again.positions[room].offset + 1, counts[room] + 1)}
    assert missing == {(each.channel, each.position.offset) for each in sent[had:]}


@quick
@given(st.lists(st.sampled_from("ab"), max_size=12), st.data())
def test_another_process_has_the_same_session(rooms: list[str], data: st.DataObject) -> None:
    session = Session("sid", "ann")
    session.data, session.rooms = {"a": [1]}, {"sid", "a", "b"}
    sent: list[Mark] = []
    for channel in "ab":
        session.joined(channel, Position(0, "e"))
    for count, room in enumerate(rooms):
        sent.append(mark(room, rooms[: count + 1].count(room), f"id{count}" if count % 3 else None))
        session.sent(sent[-1])
    again = Session.load(session.pid, session.save())
    for each in [None, *(each.token for each in sent)]:
        one, other = session.resume(each), again.resume(each)
        assert one is not None
        assert other is not None
        assert (one.positions, one.ids, one.data, one.rooms) == (other.positions, other.ids, other.data, other.rooms)
        assert (one.pid, one.sid, one.user) == (other.pid, other.sid, other.user)


def test_another_process_knows_the_latest_of_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_MAX_SAVED", 2)
    session = joined("a")
    for offset in range(1, 5):
        session.sent(mark("a", offset))
    again = Session.load(session.pid, session.save())
    assert again.resume(None) is None
    assert again.resume(mark("a", 1).token) is None
    assert [offsets(again.resume(mark("a", offset).token)) for offset in (2, 3, 4)] == [{"a": 2}, {"a": 3}, {"a": 4}]
    assert session.resume(None) is not None
    session.data["x"] = object()
    with pytest.raises(TypeError):
        session.save()
    for text in ("null", "[]", "{", session.save.__doc__ or ""):
        with pytest.raises(InvalidMessage):
            Session.load("x", text)


@pytest.mark.anyio
async def test_sessions_are_kept_for_a_time_for_their_user_and_once() -> None:
    kept = Sessions(0.02, 2)
    first, second, third = (Session("sid", user) for user in ("ann", "bob", "eve"))
    for session in (first, second, third):
        kept.keep(session)
    assert len(kept) == 2
    assert kept.take(first.pid, "ann") is None
    assert kept.take(second.pid, "ann") is None
    assert kept.take(second.pid, "bob") is second
    assert kept.take(second.pid, "bob") is None
    await asyncio.sleep(0.04)
    assert kept.take(third.pid, "eve") is None
    assert not len(kept)
    endless = Sessions(60, None)
    endless.keep(first)
    assert endless.take(first.pid, "ann") is first
