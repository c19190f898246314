"""HTTP requests that imitate a websocket, for clients and networks where there is none."""

from asgi_ws.transports.base import HttpSession, answer_preflight, is_preflight
from asgi_ws.transports.centrifuge import KINDS, CentrifugeTransport, Kind, StreamLink
from asgi_ws.transports.engineio import EngineLink, EngineTransport
from asgi_ws.transports.relay import Bus, OwnerGone, Relay
from asgi_ws.transports.sse import EventLink, EventTransport, wants_events

__all__ = [
    "KINDS",
    "Bus",
    "CentrifugeTransport",
    "EngineLink",
    "EngineTransport",
    "EventLink",
    "EventTransport",
    "HttpSession",
    "Kind",
    "OwnerGone",
    "Relay",
    "StreamLink",
    "answer_preflight",
    "is_preflight",
    "wants_events",
]
