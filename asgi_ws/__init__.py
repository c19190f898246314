"""The realtime layer for Starlette, FastAPI and any other ASGI application."""

from asgi_ws import testing
from asgi_ws.brokers import Broker
from asgi_ws.connection import Connection
from asgi_ws.exceptions import (
    AsgiWsError,
    BrokerError,
    ConnectionClosed,
    HubNotRunning,
    InvalidChannel,
    InvalidMessage,
    SubscriberTooSlow,
    SubscriptionDenied,
)
from asgi_ws.hub import Hub
from asgi_ws.limits import Limits
from asgi_ws.messages import Position, Publication
from asgi_ws.middleware import WebSocketMiddleware

__version__ = "0.1.0"

__all__ = [
    "AsgiWsError",
    "Broker",
    "BrokerError",
    "Connection",
    "ConnectionClosed",
    "Hub",
    "HubNotRunning",
    "InvalidChannel",
    "InvalidMessage",
    "Limits",
    "Position",
    "Publication",
    "SubscriberTooSlow",
    "SubscriptionDenied",
    "WebSocketMiddleware",
    "testing",
]
