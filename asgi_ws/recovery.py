"""What a subscriber has missed: positions compared, history and live publications joined. No I/O.

Whoever comes back gets all that it missed, once and in order, or nothing of it and the word that it can't have it.
"""

from collections.abc import Iterable, Sequence

from asgi_ws.messages import History, Position, Publication

__all__ = ["Stream", "follows", "merge", "read_again_from", "read_from", "top_of"]


def follows(position: Position, publication: Publication) -> bool:
    """Whether the publication is the very next one."""
    found = publication.position
    return found is not None and found.offset == position.offset + 1 and found.epoch == position.epoch


def top_of(history: History, live: Iterable[Publication]) -> Position:
    """The latest position that is known of a channel: of what was read, and of what came while it was read."""
    top = history.position
    for publication in live:
        position = publication.position
        if position is not None and (position.epoch != top.epoch or position.offset > top.offset):
            top = position
    return top


def merge(
    since: Position, history: History, live: Sequence[Publication], *, limit: int | None = None
) -> tuple[Publication, ...] | None:
    """All publications after `since`, of what was read and what came while it was read.

    `None` when it can't be all of them: when one is missing, be it the first or the last, when the position is of
    another epoch or from the future, and when there are more than `limit`.
    """
    top = top_of(history, live)
    if not since.epoch == history.position.epoch == top.epoch or since.offset > history.position.offset:
        return None
    missed = top.offset - since.offset
    if limit is not None and missed > limit:
        return None
    found: dict[int, Publication] = {}
    for publication in (*history.publications, *live):
        position = publication.position
        if position is not None and position.epoch == since.epoch and position.offset > since.offset:
            found.setdefault(position.offset, publication)
    if len(found) != missed:
        return None
    return tuple(found[offset] for offset in range(since.offset + 1, top.offset + 1))


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
    last = history.publications[-1].position if history.publications else None
    reached = since is not None and since.epoch == top.epoch and since.offset <= first.offset and last == top
    return None if reached else first


class Stream:
    """How far the subscribers of one channel have got in it, and what is held back from them.

    What is delivered passes as long as each follows the one before; from a gap on it is held, until what is missing
    has been read or is known to be lost.
    """

    __slots__ = ("_collected", "_reading", "_started", "gap", "position")

    MOST_COLLECTED = 10_000
    """How many publications are collected during one read; of more, the later ones have to be read again."""

    def __init__(self) -> None:
        self.position: Position | None = None
        """Up to where everything has been passed on; `None` before the first read."""
        self.gap = False
        """Whether something is missing, so that nothing passes."""
        self._reading = False
        self._started: Position | None = None
        self._collected: list[Publication] = []

    def passes(self, publication: Publication) -> bool:
        """Whether a publication is to be passed on now: not what was already, nor what stands behind a gap."""
        found = publication.position
        if found is None:
            return True
        if self._reading and len(self._collected) < self.MOST_COLLECTED:
            self._collected.append(publication)
        now = self.position
        if now is None or self.gap:
            return False
        if follows(now, publication):
            self.position = found
            return True
        self.gap = found.epoch != now.epoch or found.offset > now.offset
        return False

    def begin(self) -> None:
        """A read begins. What came before is in it, what comes from now on may be."""
        self._reading = True
        self._started = self.position
        self._collected.clear()

    def fail(self) -> None:
        """The read came to nothing."""
        self._reading = False
        self._collected.clear()

    def end(self, history: History) -> tuple[list[Publication], tuple[Publication, ...] | None]:
        """The read has ended with this. What was collected meanwhile; and what the subscribers are to be given now,
        which closes a gap, or `None` when something is lost to them. The position is the channel's latest one then."""
        collected, self._collected = self._collected, []
        self._reading = False
        started, now = self._started, self.position
        if now is None or started is None:
            rest = merge(history.position, History((), history.position), collected)
            self.gap = rest is None
            self.position = history.position if rest is None else top_of(history, collected)
            return collected, ()
        missed = merge(now, history, collected)
        went_back = history.position.epoch != started.epoch or history.position.offset < started.offset
        if missed is None and not self.gap and not went_back:
            # Much is on its way, more than was read; it will come.
            return collected, ()
        self.position = top_of(history, collected)
        self.gap = False
        return collected, missed

    def differs(self, before: Position, top: Position) -> bool:
        """Whether the channel's latest position, read while this one's was `before` or later, shows a loss."""
        now = self.position
        if now is None or self.gap:
            return False
        return top.epoch != now.epoch or top.offset > now.offset or top.offset < before.offset
