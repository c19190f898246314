"""The realtime layer for Starlette, FastAPI and any other ASGI application."""

from asgi_ws import testing
from asgi_ws.brokers import Broker, HistoryBroker, PresenceBroker
from asgi_ws.channels import Grant
from asgi_ws.connection import Connection
from asgi_ws.endpoints import PubSubConnection
from asgi_ws.exceptions import (
    AsgiWsError,
    BrokerError,
    CommandError,
    ConnectionClosed,
    HubNotRunning,
    InvalidChannel,
    InvalidMessage,
    InvalidPosition,
    InvalidToken,
    PublicationsLost,
    SubscriberTooSlow,
    SubscriptionDenied,
    TokenExpired,
)
from asgi_ws.hub import Hub
from asgi_ws.limits import Limits
from asgi_ws.messages import History, Position, Publication, Recovery
from asgi_ws.middleware import WebSocketMiddleware
from asgi_ws.outside import publish
from asgi_ws.presence import Member, PresenceEvent, PresenceStats
from asgi_ws.pubsub import Subscription

__version__ = "0.1.0"

__all__ = [
    "AsgiWsError",
    "Broker",
    "BrokerError",
    "CommandError",
    "Connection",
    "ConnectionClosed",
    "Grant",
    "History",
    "HistoryBroker",
    "Hub",
    "HubNotRunning",
    "InvalidChannel",
    "InvalidMessage",
    "InvalidPosition",
    "InvalidToken",
    "Limits",
    "Member",
    "Position",
    "PresenceBroker",
    "PresenceEvent",
    "PresenceStats",
    "PubSubConnection",
    "Publication",
    "PublicationsLost",
    "Recovery",
    "SubscriberTooSlow",
    "Subscription",
    "SubscriptionDenied",
    "TokenExpired",
    "WebSocketMiddleware",
    "publish",
    "testing",
]
