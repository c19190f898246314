"""Positions compared, and history and live publications joined: values in, values out."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_ws.messages import History, Position, Publication
from asgi_ws.payloads import encode
from asgi_ws.recovery import Stream, by_offset, follows, merge, read_again_from, read_from


def at(offset: int, epoch: str = "e") -> Position:
    return Position(offset, epoch)


def pub(offset: int, epoch: str = "e") -> Publication:
    return Publication("a", encode(offset), at(offset, epoch))


def pubs(*offsets: int, epoch: str = "e") -> tuple[Publication, ...]:
    return tuple(pub(offset, epoch) for offset in offsets)


def history(*offsets: int, top: int, epoch: str = "e") -> History:
    return History(pubs(*offsets, epoch=epoch), at(top, epoch))


def offsets(publications: Iterable[Publication] | None) -> list[int] | None:
    return None if publications is None else [each.position.offset for each in publications if each.position]


def stream_at(offset: int, epoch: str = "e") -> Stream:
    stream = Stream()
    stream.begin()
    stream.end(History((), at(offset, epoch)))
    return stream


# Positions


def test_the_next_one_has_the_next_offset_of_the_same_epoch() -> None:
    assert follows(at(4), pub(5))
    assert not follows(at(4), pub(6))
    assert not follows(at(4), pub(4))
    assert not follows(at(4), pub(5, "other"))
    assert not follows(at(4), Publication("a", encode("without a position")))


def test_what_is_known_is_of_one_epoch_and_once() -> None:
    known = by_offset([*pubs(1, 2), *pubs(2, 3), pub(4, "other"), Publication("a", encode("x"))], "e")
    assert list(known) == [1, 2, 3]


# Merging


@pytest.mark.parametrize(
    ("since", "until", "found"),
    [
        (0, 4, [1, 2, 3, 4]),
        (2, 4, [3, 4]),
        (2, 3, [3]),
        (4, 4, []),
        (5, 4, None),
    ],
)
def test_what_was_missed_is_all_between_two_positions(since: int, until: int, found: list[int] | None) -> None:
    assert offsets(merge(at(since), at(until), by_offset(pubs(1, 2, 3, 4), "e"))) == found


@pytest.mark.parametrize("missing", [1, 2, 4])
def test_where_one_is_missing_there_is_nothing(missing: int) -> None:
    known = by_offset((each for each in pubs(1, 2, 3, 4) if each != pub(missing)), "e")
    assert merge(at(0), at(4), known) is None


def test_the_first_may_not_be_missing_even_if_there_is_only_one() -> None:
    assert merge(at(10), at(12), by_offset(pubs(12), "e")) is None


def test_another_epoch_has_other_publications() -> None:
    assert merge(at(0, "old"), at(2), by_offset(pubs(1, 2), "e")) is None
    assert merge(at(2, "old"), at(2), {}) is None


def test_more_than_the_limit_is_too_much() -> None:
    known = by_offset(pubs(1, 2, 3), "e")
    assert offsets(merge(at(0), at(3), known, limit=3)) == [1, 2, 3]
    assert merge(at(0), at(3), known, limit=2) is None
    assert offsets(merge(at(1), at(3), known, limit=2)) == [2, 3]


@given(
    since=st.integers(0, 12),
    until=st.integers(0, 12),
    kept=st.sets(st.integers(1, 12)),
    live=st.lists(st.integers(1, 12)),
    limit=st.none() | st.integers(1, 12),
)
def test_merging_gives_exactly_the_missing_suffix_or_nothing(
    since: int, until: int, kept: set[int], live: list[int], limit: int | None
) -> None:
    wanted = list(range(since + 1, until + 1))
    found = merge(at(since), at(until), by_offset((*pubs(*sorted(kept)), *pubs(*live)), "e"), limit=limit)
    can = since <= until and {*wanted} <= {*kept, *live} and (limit is None or len(wanted) <= limit)
    assert offsets(found) == (wanted if can else None)


# From where to read


def test_one_read_serves_all_positions_of_its_epoch() -> None:
    assert read_from([at(5), at(3), at(1, "old")], "e") == at(3)
    assert read_from([at(1, "old")], "e") is None
    assert read_from([], "e") is None


@pytest.mark.parametrize(
    ("wanted", "found", "since", "limit", "again"),
    [
        # It began with the oldest, and got all.
        ([5, 7], history(6, 7, 8, top=8), at(5), 10, None),
        # Nobody has missed anything.
        ([8], history(top=8), None, 10, None),
        # The oldest has missed more than the limit, and all that was read is of no use to the others.
        ([1, 7], history(2, 3, top=8), at(1), 2, at(7)),
        ([1, 6], history(2, 3, top=8), at(1), 2, at(6)),
        ([1], history(2, 3, top=8), at(1), 2, None),
        # Read to the limit, which was enough.
        ([6], history(7, 8, top=8), at(6), 2, None),
        # Some of it is gone, and reading again doesn't bring it back.
        ([5], history(7, 8, top=8), at(5), 3, None),
        ([5], history(top=8), at(5), None, None),
        # It began where another epoch was, or too late.
        ([5], history(top=8), at(3, "old"), None, at(5)),
        ([5], history(top=8), None, None, at(5)),
        ([5], history(8, top=8), at(7), None, at(5)),
        # From the future.
        ([9], history(top=8), at(9), 10, None),
    ],
)
def test_once_more_is_read_where_that_helps_somebody(
    wanted: list[int], found: History, since: Position | None, limit: int | None, again: Position | None
) -> None:
    assert read_again_from(map(at, wanted), found, since, limit) == again


# A stream


def test_nothing_passes_before_the_first_read() -> None:
    stream = Stream()
    assert not stream.passes(pub(1))
    assert stream.position is None
    assert not stream.gap


def test_what_has_no_position_always_passes() -> None:
    assert Stream().passes(Publication("a", encode("x")))


def test_what_follows_passes_and_what_was_passed_on_does_not() -> None:
    stream = stream_at(4)
    assert stream.passes(pub(5))
    assert stream.passes(pub(6))
    assert not stream.passes(pub(6))
    assert not stream.passes(pub(5))
    assert not stream.gap
    assert stream.position == at(6)


@pytest.mark.parametrize("found", [pub(6), pub(1, "new"), pub(5, "new")])
def test_from_a_gap_on_nothing_passes(found: Publication) -> None:
    stream = stream_at(4)
    assert not stream.passes(found)
    assert stream.gap
    assert not stream.passes(pub(5))
    assert stream.position == at(4)


def test_a_first_read_begins_at_the_latest_position() -> None:
    stream = Stream()
    stream.begin()
    step = stream.end(history(3, 4, top=4))
    assert (step.missed, step.reached, stream.position, stream.gap) == ((), True, at(4), False)
    assert list(step.known) == [3, 4]


def test_what_comes_during_a_first_read_follows_it() -> None:
    stream = Stream()
    stream.passes(pub(3))
    stream.begin()
    for offset in (4, 5, 6):
        assert not stream.passes(pub(offset))
    step = stream.end(history(4, top=4))
    assert offsets(step.missed) == [5, 6]
    assert (stream.position, stream.gap) == (at(6), False)
    assert list(step.known) == [4, 5, 6]


def test_a_gap_in_what_comes_during_a_first_read_is_read_again() -> None:
    stream = Stream()
    stream.begin()
    for offset in (5, 7):
        stream.passes(pub(offset))
    step = stream.end(history(top=4))
    assert (offsets(step.missed), step.reached, stream.position, stream.gap) == ([5], True, at(5), True)
    stream.begin()
    step = stream.end(history(6, 7, top=7))
    assert (offsets(step.missed), stream.position, stream.gap) == ([6, 7], at(7), False)


def test_a_gap_is_closed_by_what_was_kept_and_what_came_meanwhile() -> None:
    stream = stream_at(4)
    stream.passes(pub(6))
    stream.begin()
    stream.passes(pub(7))
    stream.passes(pub(8))
    step = stream.end(history(5, 6, 7, top=7))
    assert (offsets(step.missed), stream.position, stream.gap) == ([5, 6, 7, 8], at(8), False)
    assert stream.passes(pub(9))


def test_what_is_not_kept_any_more_is_lost_and_the_stream_goes_on() -> None:
    stream = stream_at(4)
    stream.passes(pub(9))
    stream.begin()
    step = stream.end(history(7, 8, 9, top=9))
    assert (step.missed, step.reached, stream.position, stream.gap) == (None, True, at(9), False)
    assert stream.passes(pub(10))


def test_a_gap_that_comes_during_a_read_is_closed_by_the_next() -> None:
    stream = stream_at(4)
    stream.begin()
    stream.passes(pub(6))
    # This was read before there was a gap, so not what would close it; nor was it asked for.
    step = stream.end(history(top=4))
    assert (step.missed, step.reached, stream.position, stream.gap) == ((), True, at(4), True)
    stream.begin()
    step = stream.end(history(5, 6, top=6))
    assert (offsets(step.missed), stream.position, stream.gap) == ([5, 6], at(6), False)


def test_what_comes_before_such_a_gap_is_not_given_twice() -> None:
    stream = stream_at(4)
    stream.begin()
    assert stream.passes(pub(5))
    assert not stream.passes(pub(7))
    step = stream.end(history(5, 6, top=6))
    assert (offsets(step.missed), stream.position, stream.gap) == ([6, 7], at(7), False)


def test_a_read_that_was_not_asked_for_the_gap_says_nothing_of_it() -> None:
    stream = stream_at(4)
    stream.begin()
    stream.passes(pub(9))
    # For somebody who has missed less.
    step = stream.end(history(8, 9, top=9))
    assert (step.missed, step.reached, stream.position, stream.gap) == ((), False, at(4), True)


def test_a_read_that_is_ahead_of_what_was_delivered_is_passed_on_and_not_again() -> None:
    stream = stream_at(4)
    stream.begin()
    step = stream.end(history(5, 6, top=6))
    assert (offsets(step.missed), stream.position) == ([5, 6], at(6))
    assert not stream.passes(pub(5))
    assert not stream.passes(pub(6))
    assert stream.passes(pub(7))


def test_what_is_on_its_way_and_was_not_read_will_come() -> None:
    stream = stream_at(4)
    stream.begin()
    step = stream.end(history(7, 8, top=8))
    assert (step.missed, step.reached, stream.position, stream.gap) == ((), False, at(4), False)
    assert stream.passes(pub(5))


def test_what_was_delivered_meanwhile_stays_delivered() -> None:
    stream = stream_at(4)
    stream.begin()
    for offset in (5, 6):
        assert stream.passes(pub(offset))
    step = stream.end(history(5, top=5))
    assert (step.missed, stream.position, stream.gap) == ((), at(6), False)
    assert list(step.known) == [5, 6]


def test_a_stream_that_began_again_is_lost() -> None:
    stream = stream_at(4)
    stream.passes(pub(1, "new"))
    stream.begin()
    stream.passes(pub(2, "new"))
    step = stream.end(history(1, top=1, epoch="new"))
    assert (step.missed, stream.position, stream.gap) == (None, at(2, "new"), False)
    assert list(step.known) == [1, 2]


def test_a_stream_that_lost_its_end_is_lost() -> None:
    stream = stream_at(4)
    stream.doubt()
    stream.begin()
    step = stream.end(history(1, 2, 3, top=3))
    assert (step.missed, stream.position, stream.gap) == (None, at(3), False)


def test_what_is_of_another_epoch_than_the_read_is_read_again() -> None:
    stream = stream_at(4)
    stream.begin()
    stream.passes(pub(1, "new"))
    assert stream.end(history(top=4)).missed == ()
    assert (stream.position, stream.gap) == (at(4), True)
    stream.begin()
    assert stream.end(history(1, top=1, epoch="new")).missed is None
    assert (stream.position, stream.gap) == (at(1, "new"), False)


def test_what_came_of_an_epoch_that_is_over_is_nothing_any_more() -> None:
    stream = stream_at(4, "old")
    stream.begin()
    assert stream.passes(pub(5, "old"))
    assert stream.end(history(1, top=1, epoch="new")).missed is None
    assert stream.position == at(1, "new")
    stream.begin()
    assert stream.end(history(top=1, epoch="new")).missed == ()
    assert not stream.gap


def test_a_doubt_during_a_read_is_about_what_was_read_too() -> None:
    stream = stream_at(4)
    stream.begin()
    stream.doubt()
    step = stream.end(history(5, top=5))
    assert (offsets(step.missed), stream.position, stream.gap) == ([5], at(5), True)
    stream.begin()
    assert offsets(stream.end(history(6, top=6)).missed) == [6]
    assert not stream.gap
    stream.begin()
    stream.doubt()
    stream.end(history(9, top=9))
    assert (stream.position, stream.gap) == (at(6), True)


def test_a_doubt_during_a_first_read_is_read_again() -> None:
    stream = Stream()
    stream.doubt()
    assert not stream.gap, "nothing was read yet, so nothing is missing"
    stream.begin()
    stream.doubt()
    assert stream.end(history(top=4)).missed == ()
    assert (stream.position, stream.gap) == (at(4), True)


def test_so_many_are_collected_and_the_rest_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "MOST_COLLECTED", 2)
    stream = Stream()
    stream.begin()
    for offset in (5, 6, 7, 8):
        stream.passes(pub(offset))
    step = stream.end(history(top=4))
    assert (offsets(step.missed), stream.position, stream.gap) == ([5, 6], at(6), True)
    stream = stream_at(4)
    stream.begin()
    for offset in (5, 6, 7, 8):
        assert stream.passes(pub(offset))
    step = stream.end(history(top=4))
    assert (step.missed, stream.position, stream.gap) == ((), at(8), False)
    assert list(step.known) == [5, 6]


def test_a_read_that_failed_leaves_the_gap() -> None:
    stream = stream_at(4)
    stream.passes(pub(6))
    stream.begin()
    stream.passes(pub(7))
    stream.fail()
    assert stream.gap
    stream.begin()
    assert offsets(stream.end(history(5, 6, 7, top=7)).missed) == [5, 6, 7]


@pytest.mark.parametrize(
    ("before", "top", "differs"),
    [
        (at(4), at(4), False),
        (at(3), at(3), False),  # meanwhile one more was delivered
        (at(4), at(5), True),
        (at(4), at(3), True),
        (at(4), at(4, "new"), True),
    ],
)
def test_a_stream_differs_from_its_channel_where_something_was_lost(
    before: Position, top: Position, differs: bool
) -> None:
    assert stream_at(4).differs(before, top) is differs


def test_a_stream_that_has_a_gap_or_has_read_nothing_does_not_differ() -> None:
    stream = stream_at(4)
    stream.passes(pub(6))
    assert not stream.differs(at(4), at(6))
    assert not Stream().differs(at(4), at(6))


@given(data=st.data())
def test_subscribers_get_a_contiguous_stream_or_are_told(data: st.DataObject) -> None:
    """Whatever is lost on the way or forgotten, and whenever is read."""
    stream, kept, top, got = stream_at(0), list[int](), 0, 0
    reading: History | None = None
    for _ in range(data.draw(st.integers(0, 30))):
        what = data.draw(st.sampled_from(["publish", "lose", "forget", "read", "end"]))
        if what in ("publish", "lose"):
            top += 1
            kept.append(top)
            if what == "publish" and stream.passes(pub(top)):
                assert top == got + 1
                got = top
        elif what == "forget":
            kept.clear()
        elif what == "read" and reading is None:
            stream.begin()
            assert stream.position is not None
            after = stream.position.offset
            reading = history(*(offset for offset in kept if offset > after), top=top)
        elif what == "end" and reading is not None:
            step, reading = stream.end(reading), None
            assert stream.position is not None
            if step.missed is None:
                got = stream.position.offset
            for publication in step.missed or ():
                assert follows(at(got), publication)
                got += 1
        assert stream.position == at(got)
        assert stream.gap or got <= top
