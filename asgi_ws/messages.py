"""The values that travel between the rooms."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from asgi_ws.exceptions import InvalidPosition
from asgi_ws.frames import Frame, frame_of
from asgi_ws.payloads import Payload

__all__ = ["INTERNAL", "Encoder", "History", "Position", "Publication", "Recovery", "Retention"]

INTERNAL = "\x1f"
"""What the names of the hub's own channels begin with. No application can make such a name."""
_MAX_OFFSET = 2**53 - 1
"""The largest number that every client's JSON can say."""


@dataclasses.dataclass(frozen=True, slots=True)
class Position:
    """A place in a channel's stream: the `offset` counts its publications from 1, the `epoch` changes whenever the
    count may have started again. As a string, for a query or an `id:`, it is `offset:epoch`."""

    offset: int
    epoch: str

    def __str__(self) -> str:
        return f"{self.offset}:{self.epoch}"

    @classmethod
    def of(cls, since: "Position | str | None") -> "Position | None":
        """A position where it is one, or the text of one. Raises `InvalidPosition`."""
        return cls.parse(since) if isinstance(since, str) else since

    @classmethod
    def parse(cls, text: str) -> "Position":
        """What `str(position)` has made. Raises `InvalidPosition` for anything else."""
        offset, found, epoch = text.partition(":")
        if not (found and 0 < len(epoch) <= 64 and epoch.isprintable() and len(offset) <= 16):
            raise InvalidPosition(text)
        if not (offset.isascii() and offset.isdecimal() and int(offset) <= _MAX_OFFSET and str(int(offset)) == offset):
            raise InvalidPosition(text)
        return cls(int(offset), epoch)


@dataclasses.dataclass(frozen=True, slots=True)
class Retention:
    """How much of a channel is kept: the latest `size` publications, for `ttl` seconds after the last one."""

    size: int
    ttl: float


class Encoder(typing.Protocol):
    """What makes a frame, or its payload, of a publication. Two with the same `format` make the same."""

    @property
    def format(self) -> str: ...

    def encode_publication(self, publication: "Publication") -> str | bytes | Frame: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Publication:
    """A payload on its way through a channel, with its position there.

    `sender` is the id of the connection that doesn't get it; or, for one that gets its own as everybody does, what
    others are told of it.
    """

    channel: str
    payload: Payload
    position: Position | None = None
    sender: str | None = None
    _frames: dict[str, Frame] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def data(self) -> Any:
        """What was published: a `str`, `bytes`, or the values that its JSON says."""
        return self.payload.decode()

    @property
    def publisher(self) -> str | None:
        """The client that has published it, as others are told: a JSON object. `None` where nobody is told."""
        return self.sender if self.sender is not None and self.sender.startswith("{") else None

    def frame(self, encoder: Encoder) -> Frame:
        """The frame for a client, built by the first that asks and shared by all of the same format."""
        frame = self._frames.get(encoder.format)
        if frame is None:
            frame = self._frames[encoder.format] = frame_of(encoder.encode_publication(self))
        return frame


@dataclasses.dataclass(frozen=True, slots=True)
class History:
    """Publications that a channel has kept, oldest first, and its current position."""

    publications: tuple[Publication, ...]
    position: Position
    complete: bool = True
    """Whether nothing is missing between the position that was asked for and the first of them."""

    def __iter__(self) -> Iterator[Publication]:
        return iter(self.publications)

    def __len__(self) -> int:
        return len(self.publications)


@dataclasses.dataclass(frozen=True, slots=True)
class Recovery:
    """How a subscription began.

    `recovered` says that nothing is missing since the position that was asked for: what was missed, `publications`,
    has been passed on. Otherwise none of it was, and the state has to be loaded anew. `position` is where the
    subscription has begun, where the channel has a history.
    """

    recovered: bool
    position: Position | None
    publications: tuple[Publication, ...] = ()
