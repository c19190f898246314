"""A dictionary for what comes and goes."""

from typing import Generic, TypeVar

__all__ = ["Table"]

K = TypeVar("K")
V = TypeVar("V")

_SMALL = 1024


class Table(dict[K, V], Generic[K, V]):
    """A dictionary that gives its memory back when most of what it had has gone; Python's own never does.

    It looks for that when something is deleted with `del`. Nobody may be iterating over it then.
    """

    __slots__ = ("_most",)

    def __init__(self) -> None:
        super().__init__()
        self._most = _SMALL

    def __delitem__(self, key: K) -> None:
        super().__delitem__(key)
        count = len(self)
        if count >= self._most:
            self._most = count
        elif count * 4 < self._most and self._most > _SMALL:
            rest = dict(self)
            self.clear()
            self.update(rest)
            self._most = max(count, _SMALL)
