"""Messages and frame payloads: how a client's words are read and written."""

from asgi_ws.protocols.base import Protocol
from asgi_ws.protocols.bytes import BytesProtocol
from asgi_ws.protocols.choice import MixedProtocol, choose_protocol
from asgi_ws.protocols.json import JsonProtocol
from asgi_ws.protocols.positions import PositionsProtocol
from asgi_ws.protocols.text import PlainProtocol, TextProtocol

__all__ = [
    "BytesProtocol",
    "JsonProtocol",
    "MixedProtocol",
    "PlainProtocol",
    "PositionsProtocol",
    "Protocol",
    "TextProtocol",
    "choose_protocol",
]
