"""Names for shapes that more than one room uses."""

import typing
from collections.abc import Awaitable, Callable

__all__ = ["Handler", "Overflow"]

Overflow = typing.Literal["close", "drop_oldest", "drop_newest", "latest"]
"""What happens when more waits for a client than `Limits.outbox_size`."""

Handler = Callable[..., Awaitable[None]]
"""An endpoint's function: it takes a `Connection` and whatever the framework injects."""
