"""An event loop whose clock is a number: it waits for nothing, so that what takes minutes is a matter of its order."""

import asyncio
import selectors
from typing import Any

__all__ = ["VirtualLoop"]


class _Selector(selectors.SelectSelector):
    """Instead of waiting, the clock is put forward."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "nothing will ever happen"
        self.now += max(timeout, 0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs on one thread, with nothing outside; what has the same beginning has the same end."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now
