"""The contract between a connection and the words that its client speaks."""

import abc
from typing import Any, Generic, TypeVar

from asgi_ws.frames import Frame
from asgi_ws.messages import Publication, Recovery

__all__ = ["Protocol"]

T_co = TypeVar("T_co", covariant=True)


class Protocol(abc.ABC, Generic[T_co]):
    """Makes messages of frame payloads, and frame payloads of messages and publications. No I/O, no state."""

    format: str
    """Two protocols of the same format make the same of a publication, so that its frame is built once for both."""

    @abc.abstractmethod
    def decode(self, payload: str | bytes) -> T_co:
        """What the client says: `str` from a text frame, `bytes` from a binary one. Raises `InvalidMessage` and
        nothing else."""

    @abc.abstractmethod
    def encode(self, message: Any) -> str | bytes | Frame:
        """What is sent to the client; a `Frame` where that is more than one payload. Raises `TypeError` for what
        can't be sent."""

    @abc.abstractmethod
    def encode_publication(self, publication: Publication) -> str | bytes | Frame:
        """The same for what was published, already encoded."""

    def encode_recovery(self, channel: str, recovery: Recovery) -> str | bytes | Frame | None:
        """What the client is told of how a subscription began, before anything is sent that was published; `None` for
        nothing."""
        return None

    def farewell(self, code: int, reason: str) -> tuple[int, str]:
        """The close code and the reason, as this protocol's clients understand them."""
        return code, reason
