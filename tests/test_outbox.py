import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_ws._types import Overflow
from asgi_ws.exceptions import ConnectionClosed
from asgi_ws.frames import Frame
from asgi_ws.outbox import Outbox

pytestmark = pytest.mark.anyio

CLOSED = ConnectionClosed(4001, "bye")


class RecordingLink:
    """A client that takes `room` frames before it is behind; `None` is a client that keeps up."""

    def __init__(self, room: int | None = None) -> None:
        self.taken: list[str | bytes] = []
        self.on_ready: Any = None
        self.written = 0
        self.buffered = 0
        self._room = room

    def write(self, frame: Frame) -> bool:
        assert self._room != 0, "the outbox waits for on_ready"
        self.taken.append(frame.payload)
        self.written += frame.size
        if self._room is not None:
            self._room -= 1
        return self._room != 0

    def ready(self, room: int | None = None) -> None:
        self._room = room
        self.on_ready()

    def close(self, code: int, reason: str) -> asyncio.Task[None]:
        raise NotImplementedError("an outbox closes nothing")

    def abort(self) -> None:
        raise NotImplementedError("an outbox aborts nothing")


class Client:
    """An outbox, its link, and how often it was said to be too slow."""

    def __init__(self, room: int | None = None, *, size: int = 10, overflow: Overflow = "close") -> None:
        self.link = RecordingLink(room)
        self.overflows = 0
        self.outbox = Outbox(self.link, size, overflow, self._on_overflow)

    def _on_overflow(self) -> None:
        self.overflows += 1

    def push(self, *payloads: str, channel: str = "a") -> None:
        for payload in payloads:
            self.outbox.push(Frame(payload), channel)

    async def put(self, payload: str) -> "asyncio.Task[None]":
        """Let a handler send; it has come as far as it can when this returns."""
        task = asyncio.create_task(self.outbox.put(Frame(payload)))
        await asyncio.sleep(0)
        return task


# A client that keeps up, and one that doesn't


async def test_while_the_client_keeps_up_nothing_is_queued() -> None:
    client = Client(size=1)
    client.push("a publication larger than the outbox")
    await client.outbox.put(Frame("and a message"))
    assert client.link.taken == ["a publication larger than the outbox", "and a message"]
    assert client.outbox.dropped == 0


async def test_what_both_doors_let_in_leaves_in_one_order() -> None:
    client = Client(room=1, size=100)
    client.push("1", "2")
    third = await client.put("3")
    client.push("4")
    fifth = await client.put("5")
    client.push("6")
    assert client.link.taken == ["1"]
    client.link.ready()
    assert client.link.taken == ["1", "2", "3", "4", "5", "6"]
    await asyncio.gather(third, fifth)


async def test_put_waits_until_the_link_has_taken_the_frame() -> None:
    client = Client(room=1)
    await client.outbox.put(Frame("1"))
    second, third = await client.put("2"), await client.put("3")
    assert not second.done()
    client.link.ready(room=1)
    await second
    assert not third.done()
    assert client.link.taken == ["1", "2"]
    client.link.ready(room=1)
    await third
    assert client.link.taken == ["1", "2", "3"]


async def test_put_waits_whatever_the_size() -> None:
    client = Client(room=1, size=1)
    client.push("first")
    tasks = [await client.put("a message larger than the outbox") for _ in range(3)]
    client.link.ready()
    await asyncio.gather(*tasks)
    assert len(client.link.taken) == 4
    assert client.overflows == 0


async def test_a_client_that_has_caught_up_gets_the_next_at_once() -> None:
    client = Client(room=1)
    client.push("1", "2")
    client.link.ready()
    client.push("3")
    await client.outbox.put(Frame("4"))
    assert client.link.taken == ["1", "2", "3", "4"]


async def test_a_client_that_is_behind_again_at_the_last_frame_is_waited_for() -> None:
    client = Client(room=1)
    client.push("1", "2")
    client.link.ready(room=1)
    client.push("3")
    assert client.link.taken == ["1", "2"]
    client.link.ready()
    assert client.link.taken == ["1", "2", "3"]


# The policies


async def test_close_says_that_the_client_is_too_slow_and_keeps_what_waits() -> None:
    client = Client(room=1, size=10, overflow="close")
    client.push("first", "12345", "67890")
    assert client.overflows == 0
    client.push("x")
    assert client.overflows == 1
    client.link.ready()
    assert client.link.taken == ["first", "12345", "67890"]
    assert client.outbox.dropped == 0


async def test_drop_newest_keeps_what_waits() -> None:
    client = Client(room=1, size=10, overflow="drop_newest")
    client.push("first", "12345", "67890", "x", "y")
    client.link.ready()
    client.push("z")
    assert client.link.taken == ["first", "12345", "67890", "z"]
    assert client.outbox.dropped == 2
    assert client.overflows == 0


async def test_drop_oldest_makes_room_for_the_newest() -> None:
    client = Client(room=1, size=10, overflow="drop_oldest")
    client.push("first", "1234", "5678", "90", "abcdef")
    client.link.ready()
    assert client.link.taken == ["first", "90", "abcdef"]
    assert client.outbox.dropped == 2


async def test_latest_keeps_the_newest_of_each_channel() -> None:
    client = Client(room=1, size=100, overflow="latest")
    client.push("first")
    for number in range(3):
        for channel in "xy":
            client.push(f"{channel}{number}", channel=channel)
    client.link.ready()
    assert client.link.taken == ["first", "x2", "y2"]
    assert client.outbox.drops == {"x": 2, "y": 2}


async def test_latest_makes_room_where_the_newest_of_each_are_too_much() -> None:
    client = Client(room=1, size=4, overflow="latest")
    client.push("first")
    client.push("xx", channel="x")
    client.push("yy", channel="y")
    client.push("zz", channel="z")
    client.link.ready()
    assert client.link.taken == ["first", "yy", "zz"]
    assert client.outbox.drops == {"x": 1}


@pytest.mark.parametrize("overflow", ["drop_oldest", "drop_newest", "latest"])
async def test_what_the_handler_sends_is_never_dropped(overflow: Overflow) -> None:
    client = Client(room=1, size=10, overflow=overflow)
    client.push("first")
    sent = await client.put("0123456789")
    client.push("publication", "2")
    client.link.ready()
    await sent
    assert client.link.taken == ["first", "0123456789"]
    assert client.outbox.dropped == 2


@pytest.mark.parametrize("overflow", ["drop_oldest", "drop_newest", "latest"])
async def test_a_publication_larger_than_the_outbox_is_dropped(overflow: Overflow) -> None:
    client = Client(room=1, size=3, overflow=overflow)
    client.push("first", "1234", "5")
    client.link.ready()
    assert client.link.taken == ["first", "5"]
    assert client.outbox.dropped == 1


@pytest.mark.parametrize("overflow", ["close", "drop_oldest", "drop_newest", "latest"])
async def test_what_is_of_no_channel_is_never_dropped(overflow: Overflow) -> None:
    client = Client(room=1, size=4, overflow=overflow)
    client.push("1")
    client.outbox.push(Frame("22"), None)
    client.push("3333", channel="b")
    client.link.ready()
    assert client.link.taken[:2] == ["1", "22"]
    client = Client(room=1, size=4, overflow=overflow)
    client.push("1")
    client.outbox.push(Frame("2222"), None)
    client.outbox.push(Frame("3"), None)
    assert client.overflows == 1


async def test_what_was_missed_does_not_count_and_is_never_dropped() -> None:
    client = Client(room=1, size=4, overflow="drop_oldest")
    for number in range(5):
        client.outbox.recover(Frame(f"missed {number}"))
    client.push("1", "22", "333")
    assert client.outbox.dropped == 2
    client.link.ready()
    assert client.link.taken == [*(f"missed {number}" for number in range(5)), "333"]
    client.outbox.end(CLOSED, discard=True)
    client.outbox.recover(Frame("late"))
    assert client.link.taken[-1] == "333"


async def test_the_size_is_counted_in_bytes() -> None:
    client = Client(room=1, size=4, overflow="drop_newest")
    client.push("first", "üü", "x")
    client.link.ready()
    assert client.link.taken == ["first", "üü"]
    assert client.outbox.dropped == 1


async def test_drops_are_counted_by_channel() -> None:
    client = Client(room=1, size=1, overflow="drop_newest")
    assert client.outbox.drops is None
    client.push("first", "1")
    client.push("2", "3", channel="x")
    client.push("4", channel="y")
    assert client.outbox.drops == {"x": 2, "y": 1}
    assert client.outbox.dropped == 3


async def test_what_leaves_makes_room() -> None:
    client = Client(room=1, size=3)
    client.push("first", "1", "2", "3")
    client.link.ready(room=2)
    client.push("4", "5")
    assert client.overflows == 0
    client.push("6")
    assert client.overflows == 1
    client.link.ready()
    assert client.link.taken == ["first", "1", "2", "3", "4", "5"]


operations = st.lists(
    st.tuples(st.sampled_from(["x", "y", "z"]), st.integers(1, 6)) | st.integers(1, 3), min_size=1, max_size=40
)


@settings(max_examples=80, deadline=None, database=None)
@given(operations, st.sampled_from(["close", "drop_oldest", "drop_newest", "latest"]))
def test_each_publication_leaves_once_and_in_order_or_is_counted(operations: list[Any], overflow: Overflow) -> None:
    client = Client(room=1, size=12, overflow=overflow)
    client.push("first")
    pushed: list[str] = []
    for operation in operations:
        if isinstance(operation, int):
            client.link.ready(operation)
        else:
            channel, size = operation
            pushed.append(f"{channel}{len(pushed)}".ljust(size, "."))
            client.push(pushed[-1], channel=channel)
    waiting = len(pushed) + 1 - len(client.link.taken) - client.outbox.dropped - client.overflows
    client.link.ready()
    taken = client.link.taken[1:]
    assert taken == [payload for payload in pushed if payload in taken]
    assert len(taken) + client.outbox.dropped + client.overflows == len(pushed)
    assert 0 <= waiting <= 12
    if overflow == "latest":
        assert [payload[0] for payload in taken[len(taken) - waiting :]].count("x") <= 1


# Taking back


async def test_a_message_whose_handler_is_cancelled_is_not_sent() -> None:
    client = Client(room=1, size=2)
    client.push("1")
    second, third = await client.put("22"), await client.put("3")
    second.cancel()
    await asyncio.wait([second])
    assert second.cancelled()
    client.push("44")
    assert client.overflows == 1, "what still waits counts"
    client.link.ready()
    await third
    assert client.link.taken == ["1", "3"]


async def test_the_room_of_a_cancelled_message_is_free() -> None:
    client = Client(room=1, size=2)
    client.push("1")
    cancelled = await client.put("22")
    cancelled.cancel()
    await asyncio.wait([cancelled])
    client.push("33")
    assert client.overflows == 0
    client.link.ready()
    assert client.link.taken == ["1", "33"]


async def test_cancelling_comes_too_late_for_a_message_that_was_taken() -> None:
    client = Client(room=1)
    client.push("1")
    second = await client.put("2")
    client.link.ready()
    second.cancel()
    await asyncio.wait([second])
    assert client.link.taken == ["1", "2"]
    client.push("3")
    assert client.link.taken == ["1", "2", "3"]


async def test_a_handler_may_limit_its_patience() -> None:
    client = Client(room=1)
    client.push("1")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await client.outbox.put(Frame("2"))
    client.link.ready()
    assert client.link.taken == ["1"]


# The end


async def test_after_the_end_nothing_is_let_in() -> None:
    client = Client()
    client.outbox.end(CLOSED, discard=False)
    client.push("1")
    with pytest.raises(ConnectionClosed) as raised:
        await client.outbox.put(Frame("2"))
    assert (raised.value.code, raised.value.reason) == (4001, "bye")
    assert client.link.taken == []


async def test_what_waits_at_the_end_is_still_sent() -> None:
    client = Client(room=1)
    client.push("1", "2")
    third = await client.put("3")
    client.outbox.end(CLOSED, discard=False)
    client.push("4")
    client.link.ready(room=1)
    client.link.ready(room=1)
    await third
    assert client.link.taken == ["1", "2", "3"]


async def test_no_publication_follows_one_that_the_end_kept_out() -> None:
    client = Client(room=1)
    client.push("1", "2")
    client.outbox.end(CLOSED, discard=False)
    client.push("kept out")
    client.link.ready()
    client.push("would leave a gap")
    assert client.link.taken == ["1", "2"]


async def test_what_is_discarded_is_not_sent_and_its_handlers_are_told() -> None:
    client = Client(room=1)
    client.push("1", "2")
    tasks = [await client.put("3"), await client.put("4")]
    client.outbox.end(CLOSED, discard=True)
    client.link.ready()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, ConnectionClosed)
        assert result.code == 4001
        assert result is not CLOSED
    assert client.link.taken == ["1"]
    assert client.outbox.dropped == 0


async def test_the_first_end_says_why() -> None:
    client = Client(room=1)
    client.push("1")
    second = await client.put("2")
    client.outbox.end(CLOSED, discard=False)
    client.outbox.end(ConnectionClosed(1006, clean=False), discard=True)
    with pytest.raises(ConnectionClosed, match="4001"):
        await second
    with pytest.raises(ConnectionClosed, match="4001"):
        await client.outbox.put(Frame("3"))


async def test_overflow_may_end_the_outbox_at_once() -> None:
    link = RecordingLink(room=1)
    outbox = Outbox(link, 1, "close", lambda: outbox.end(CLOSED, discard=True))
    for payload in ("1", "2", "3", "4"):
        outbox.push(Frame(payload), "a")
    link.ready()
    assert link.taken == ["1"]


# Flushing


async def flushing(client: Client) -> "asyncio.Task[None]":
    task = asyncio.create_task(client.outbox.flush())
    await asyncio.sleep(0)
    return task


async def test_there_is_nothing_to_flush_where_nothing_waits() -> None:
    client = Client(room=1)
    await client.outbox.flush()
    client.push("1")
    await client.outbox.flush()


@pytest.mark.parametrize("last", ["publication", "message"])
async def test_flush_waits_until_the_link_has_taken_everything(last: str) -> None:
    client = Client(room=1)
    client.push("1", "2")
    if last == "message":
        await client.put("3")
    else:
        client.push("3")
    client.outbox.end(CLOSED, discard=False)
    flush = await flushing(client)
    client.link.ready(room=1)
    await asyncio.sleep(0)
    assert not flush.done()
    client.link.ready(room=1)
    await flush
    assert client.link.taken == ["1", "2", "3"]


async def test_flush_ends_when_everything_is_discarded() -> None:
    client = Client(room=1)
    client.push("1", "2")
    flush = await flushing(client)
    client.outbox.end(CLOSED, discard=True)
    await flush
    assert client.link.taken == ["1"]


async def test_flush_goes_on_when_the_last_message_is_taken_back() -> None:
    client = Client(room=1)
    client.push("1", "2")
    last = await client.put("3")
    flush = await flushing(client)
    last.cancel()
    await asyncio.wait([last])
    await asyncio.sleep(0)
    assert not flush.done()
    client.link.ready()
    await flush
    assert client.link.taken == ["1", "2"]


async def test_two_may_flush_and_one_that_is_cancelled_disturbs_nobody() -> None:
    client = Client(room=1)
    client.push("1")
    sent = await client.put("2")
    one, two = await flushing(client), await flushing(client)
    one.cancel()
    await asyncio.wait([one])
    client.link.ready()
    await asyncio.gather(two, sent)
    assert client.link.taken == ["1", "2"]


# What has to arrive and isn't waited for


async def test_a_post_leaves_in_its_order_and_is_never_dropped() -> None:
    client = Client(room=1, overflow="drop_oldest")
    client.outbox.post(Frame("1"))
    client.outbox.post(Frame("2"))
    client.push("3" * 5, "4" * 5, "5" * 5)
    client.outbox.post(Frame("6"))
    client.link.ready()
    assert client.link.taken == ["1", "2", "5" * 5, "6"]
    assert (client.outbox.dropped, client.overflows) == (2, 0)


async def test_posts_beyond_the_bound_are_too_much_but_one_of_any_size_is_not() -> None:
    client = Client(room=0)
    client.outbox._behind = True
    client.outbox.post(Frame("larger than the outbox"))
    assert client.overflows == 0
    client.outbox.post(Frame("x"))
    assert client.overflows == 1
    client.outbox.end(CLOSED, discard=True)
    client.outbox.post(Frame("nobody hears it"))
    client.link.ready()
    assert client.link.taken == []
