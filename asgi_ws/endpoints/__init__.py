"""What a client meets behind a path."""

from asgi_ws.endpoints.function import (
    Endpoint,
    Procedure,
    check_async,
    check_takes,
    current_app,
    make_route,
    parameters_of,
    takes,
)
from asgi_ws.endpoints.pubsub import Authenticate, PubSubConnection, PubSubEndpoint, ServerChannels

__all__ = [
    "Authenticate",
    "Endpoint",
    "Procedure",
    "PubSubConnection",
    "PubSubEndpoint",
    "ServerChannels",
    "check_async",
    "check_takes",
    "current_app",
    "make_route",
    "parameters_of",
    "takes",
]
