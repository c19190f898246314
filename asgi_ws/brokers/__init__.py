"""What joins processes: the broker for a URL."""

from asgi_ws.brokers.base import Broker, HistoryBroker, PresenceBroker
from asgi_ws.brokers.memory import MemoryBroker

__all__ = ["Broker", "HistoryBroker", "MemoryBroker", "PresenceBroker", "broker_for"]


def broker_for(url: str) -> Broker:
    """The broker that the URL's scheme names. Raises `ValueError` for a scheme that isn't known."""
    scheme, found, rest = url.partition("://")
    if scheme == "memory" and found and not rest:
        return MemoryBroker()
    raise ValueError(f"no broker is known for {scheme + found!r}; known is 'memory://'")
