import dataclasses
from typing import Any

import pytest

from asgi_ws.exceptions import InvalidPosition
from asgi_ws.messages import History, Position, Publication
from asgi_ws.payloads import Payload, encode


class Recorder:
    """An encoder that says how often it was asked."""

    def __init__(self, format: str) -> None:
        self.format = format
        self.asked = 0

    def encode_publication(self, publication: Publication) -> str | bytes:
        self.asked += 1
        return f"{self.format} {publication.payload.data!r}"


def test_a_frame_is_encoded_once_per_format() -> None:
    publication = Publication("news", encode("hello"))
    first, same, other = Recorder("a"), Recorder("a"), Recorder("b")
    frames = [publication.frame(encoder) for encoder in (first, same, other, first, other, same)]
    assert [frame.payload for frame in frames] == [f"{name} 'hello'" for name in "aababa"]
    assert len(set(map(id, frames))) == 2
    assert (first.asked, same.asked, other.asked) == (1, 0, 1)


def test_publications_do_not_share_frames() -> None:
    encoder = Recorder("a")
    one, two = Publication("news", encode("1")), Publication("news", encode("2"))
    assert one.frame(encoder).payload != two.frame(encoder).payload
    assert encoder.asked == 2


@pytest.mark.parametrize("data", ["text", b"binary", {"a": [1]}], ids=repr)
def test_data_is_what_was_published(data: Any) -> None:
    assert Publication("news", encode(data)).data == data


def test_frames_are_no_part_of_the_value() -> None:
    one = Publication("news", encode("1"), Position(1, "e"), "ann")
    two = Publication("news", encode("1"), Position(1, "e"), "ann")
    one.frame(Recorder("a"))
    assert one == two
    assert hash(one) == hash(two)
    assert "frame" not in repr(one)


@pytest.mark.parametrize("value", [Position(1, "e"), Publication("news", Payload("text", "x"))], ids=repr)
def test_values_that_travel_are_frozen(value: Any) -> None:
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, 2)
    assert not hasattr(value, "__dict__")


@pytest.mark.parametrize("position", [Position(0, "e"), Position(2**53 - 1, "a-b:c.1"), Position(12, "x" * 64)])
def test_a_position_is_read_from_its_own_words(position: Position) -> None:
    assert Position.parse(str(position)) == position


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "1",
        "1:",
        ":e",
        "-1:e",
        "+1:e",
        "1.0:e",
        "01:e",
        "1_0:e",
        " 1:e",
        "²:e",
        "٣:e",
        "9007199254740992:e",
        "1" * 5000 + ":e",
        "1:" + "e" * 65,
        "1:e\n",
        "1:\x00",
        "1:\ud800",
    ],
)
def test_other_words_are_no_position(text: str) -> None:
    with pytest.raises(InvalidPosition, match="not a position"):
        Position.parse(text)


def test_a_history_is_its_publications() -> None:
    publications = (Publication("a", encode(1)), Publication("a", encode(2)))
    history = History(publications, Position(2, "e"))
    assert tuple(history) == publications
    assert len(history) == 2
