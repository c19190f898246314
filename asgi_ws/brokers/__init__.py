"""What joins processes: the broker for a URL."""

from asgi_ws.brokers.base import Broker, HistoryBroker, PresenceBroker
from asgi_ws.brokers.memory import MemoryBroker

__all__ = ["Broker", "HistoryBroker", "MemoryBroker", "PresenceBroker", "broker_for"]

_REDIS = ("redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")


def broker_for(url: str) -> Broker:
    """The broker that the URL's scheme names. Raises `ValueError` for a scheme that isn't known, or a URL that can't
    be read, and `ImportError` when the broker's client isn't installed."""
    scheme, found, rest = url.partition("://")
    if scheme == "memory" and found and not rest:
        return MemoryBroker()
    if scheme in _REDIS and found:
        return _redis(url)
    if scheme in ("nats", "tls") and found:
        return _nats(url)
    raise ValueError(
        f"no broker is known for {scheme + found!r}; known are 'memory://', 'redis://', which has '+sentinel', "
        "'+cluster' and 'rediss', too, and 'nats://' and 'tls://'"
    )


def _redis(url: str) -> Broker:
    try:
        from asgi_ws.brokers.redis import RedisBroker
    except ModuleNotFoundError as error:
        raise ImportError("redis:// needs redis-py:\npip install 'asgi-ws-hub[redis]'") from error
    return RedisBroker(url)


def _nats(url: str) -> Broker:
    try:
        from asgi_ws.brokers.nats import NatsBroker
    except ModuleNotFoundError as error:
        raise ImportError("nats:// needs nats-py:\npip install 'asgi-ws-hub[nats]'") from error
    return NatsBroker(url)
