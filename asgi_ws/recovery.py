"""What a subscriber has missed: positions compared, history and live publications joined. No I/O.

Whoever comes back gets all that it missed, once and in order, or nothing of it and the word that it can't have it.
"""

import dataclasses
import typing
from collections.abc import Iterable, Mapping

from asgi_ws.messages import History, Position, Publication

__all__ = ["Step", "Stream", "by_offset", "follows", "merge", "read_again_from", "read_from"]


def follows(position: Position, publication: Publication) -> bool:
    """Whether the publication is the very next one."""
    found = publication.position
    return found is not None and found.offset == position.offset + 1 and found.epoch == position.epoch


def by_offset(publications: Iterable[Publication], epoch: str) -> dict[int, Publication]:
    """Those of one epoch; what is there twice, once."""
    known: dict[int, Publication] = {}
    for publication in publications:
        if publication.position is not None and publication.position.epoch == epoch:
            known.setdefault(publication.position.offset, publication)
    return known


def merge(
    since: Position, until: Position, known: Mapping[int, Publication], *, limit: int | None = None
) -> tuple[Publication, ...] | None:
    """All publications after `since` up to `until`, out of what is known of their epoch.

    `None` when it can't be all of them: when one is missing, be it the first or the last, when `since` is of another
    epoch or comes after `until`, and when there are more than `limit`.
    """
    count = until.offset - since.offset
    if since.epoch != until.epoch or count < 0 or (limit is not None and count > limit):
        return None
    found = tuple(known[offset] for offset in range(since.offset + 1, until.offset + 1) if offset in known)
    return found if len(found) == count else None


def read_from(wanted: Iterable[Position], epoch: str) -> Position | None:
    """From where to read so that one read serves all positions of an epoch."""
    return min((each for each in wanted if each.epoch == epoch), key=lambda each: each.offset, default=None)


def read_again_from(
    wanted: Iterable[Position], history: History, since: Position | None, limit: int | None
) -> Position | None:
    """From where to read once more, because somebody can have what he missed and it wasn't in this read, which began
    at `since`. `None` when once was enough."""
    top = history.position
    oldest = 0 if limit is None else top.offset - limit
    first = read_from((each for each in wanted if oldest <= each.offset < top.offset), top.epoch)
    if first is None:
        return None
    began_in_time = since is not None and since.epoch == top.epoch and since.offset <= first.offset
    got_all = limit is None or len(history.publications) < limit or history.publications[-1].position == top
    return None if began_in_time and got_all else first


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What a read has brought.

    `missed` is what the subscribers are to be given now; `None` when something is lost to them. `known` is all that is
    known of the channel's present epoch. With `reached`, the subscribers have got as far as the read has.
    """

    missed: tuple[Publication, ...] | None
    known: Mapping[int, Publication]
    reached: bool


class Stream:
    """How far the subscribers of one channel have got in it, and what is held back from them.

    What is delivered passes as long as each follows the one before; from a gap on it is held, until what is missing
    has been read or is known to be lost.
    """

    __slots__ = ("_collected", "_doubted", "_incomplete", "_reading", "_repairing", "_started", "gap", "position")

    MOST_COLLECTED = 10_000
    """How many publications are collected during one read; of more, the later ones have to be read again."""

    def __init__(self) -> None:
        self.position: Position | None = None
        """Up to where everything has been passed on; `None` before the first read."""
        self.gap = False
        """Whether something is missing, or may be, so that nothing passes."""
        self._reading = False
        self._repairing = False
        self._doubted = False
        self._incomplete = False
        self._started: Position | None = None
        self._collected: list[Publication] = []

    def passes(self, publication: Publication) -> bool:
        """Whether a publication is to be passed on now: not what was already, nor what stands behind a gap."""
        found = publication.position
        if found is None:
            return True
        if self._reading:
            if len(self._collected) < self.MOST_COLLECTED:
                self._collected.append(publication)
            else:
                self._incomplete = True
        now = self.position
        if now is None or self.gap:
            return False
        if follows(now, publication):
            self.position = found
            return True
        self.gap = found.epoch != now.epoch or found.offset > now.offset
        return False

    def doubt(self) -> None:
        """Something may be missing of which nothing is known here; nor does a read know that has begun already."""
        self.gap = self.position is not None
        self._doubted = True

    def begin(self) -> None:
        """A read begins: of everything behind the position, if there is a gap. What was delivered before is in it,
        what is delivered from now on may be."""
        self._reading, self._repairing = True, self.gap
        self._doubted = self._incomplete = False
        self._started = self.position
        self._collected.clear()

    def fail(self) -> None:
        """The read came to nothing."""
        self._reading = False
        self._collected.clear()

    def end(self, history: History) -> Step:
        """The read has ended with this. Where `gap` stays, it has to be read again."""
        collected, self._collected = self._collected, []
        self._reading = False
        top, now, started, held = history.position, self.position, self._started, self.gap
        known = by_offset((*history.publications, *collected), top.epoch)
        missed: tuple[Publication, ...] | None = ()
        if now is None or started is None:
            now, held = top, True
        elif started.epoch != top.epoch or top.offset < started.offset:
            # It has begun again, or has lost its end: what was passed on is of another stream.
            missed, now, held = None, top, True
        elif now.epoch == top.epoch and now.offset < top.offset:
            found = merge(now, top, known)
            if found is None and not self._repairing:
                # Not everything behind the position was asked for. It is on its way; or there is a gap since, and the
                # next read is made to close it.
                self.gap |= self._doubted
                return Step((), known, False)
            missed, now = found, top
        self.gap = self._doubted or (held and self._incomplete)
        behind = list[Publication]()
        for publication in collected if held else ():
            if follows(now, publication):
                now = typing.cast(Position, publication.position)
                behind.append(publication)
            elif not _is_behind(now, publication):
                self.gap = True
                break
        self.position = now
        return Step(None if missed is None else (*missed, *behind), known, True)

    def differs(self, before: Position, top: Position) -> bool:
        """Whether the channel's latest position, read while this one's was `before` or later, shows a loss."""
        now = self.position
        if now is None or self.gap:
            return False
        return top.epoch != now.epoch or top.offset > now.offset or top.offset < before.offset


def _is_behind(position: Position, publication: Publication) -> bool:
    found = publication.position
    return found is not None and found.epoch == position.epoch and found.offset <= position.offset
