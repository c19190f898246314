"""Socket.IO: its clients, unchanged, in the hub's channels."""

__all__: list[str] = []
