"""How much one client, and all clients together, may take."""

import dataclasses

__all__ = ["Limits"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds for a hub's connections. Sizes are in bytes, times in seconds; `None` is no limit.

    Raises `ValueError` for a number that isn't positive.
    """

    message_size: int | None = 1024 * 1024
    """The largest message that a client may send; a larger one is answered with close code 1009. It also bounds what
    waits in a connection's inbox."""
    inbox_messages: int = 32
    """How many received messages may wait for the handler; then nothing more is read, and TCP pushes back."""
    outbox_size: int = 1024 * 1024
    """How much may wait for a client that doesn't read; then the hub's `overflow` policy decides."""
    channels: int | None = 128
    """How many channels one connection may subscribe to."""
    recovery: int | None = 300
    """How many missed publications a client that comes back is sent at most; one that missed more is told to load the
    state anew."""
    connections: int | None = 10_000
    """How many connections one process serves; one more is refused with HTTP status 503."""
    connections_per_address: int | None = 10_000
    """The same for each client address (an IPv6 address counts by its /64 network). Lower it where the server sees
    the clients' own addresses, not a proxy's."""
    messages_per_second: float | None = 2_000
    """How fast one client may send in the long run; a faster one is closed with code 1008."""
    burst: int = 10_000
    """How many messages a client may send at once before `messages_per_second` counts."""
    write_timeout: float = 10
    """How long a client may take nothing of what waits for it before its connection is aborted."""
    ping_interval: float | None = 25
    """How often a client is pinged where asgi_ws itself sends the pings; a server's own WebSocket class has its own
    setting (uvicorn: `--ws-ping-interval`)."""
    ping_timeout: float | None = 10
    """How long the answer to such a ping may take."""
    drain_timeout: float = 30
    """How long connections may take to end when the server stops."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                if "None" not in str(field.type):
                    raise ValueError(f"Limits({field.name}=None): this one can't be switched off")
            elif not value > 0:
                raise ValueError(f"Limits({field.name}={value!r}): must be more than 0")
