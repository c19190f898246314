"""Messages and frame payloads: how a client's words are read and written."""

from asgi_ws.protocols.base import Protocol
from asgi_ws.protocols.bytes import BytesProtocol
from asgi_ws.protocols.centrifuge import (
    PING,
    REJECT_UNRECOVERED,
    CentrifugeProtocol,
    ClientInfo,
    Command,
    Connect,
    HistoryRequest,
    InChannel,
    Publish,
    Refresh,
    Request,
    Rpc,
    SendRequest,
    ServerSide,
    Since,
    SubRefresh,
    Subscribe,
    bad_request,
    disconnect_push,
    error_reply,
    presence_result,
    publications_result,
    push_text,
    reply,
)
from asgi_ws.protocols.choice import MixedProtocol, choose_protocol
from asgi_ws.protocols.json import JsonProtocol
from asgi_ws.protocols.positions import PositionsProtocol
from asgi_ws.protocols.text import PlainProtocol, TextProtocol

__all__ = [
    "PING",
    "REJECT_UNRECOVERED",
    "BytesProtocol",
    "CentrifugeProtocol",
    "ClientInfo",
    "Command",
    "Connect",
    "HistoryRequest",
    "InChannel",
    "JsonProtocol",
    "MixedProtocol",
    "PlainProtocol",
    "PositionsProtocol",
    "Protocol",
    "Publish",
    "Refresh",
    "Request",
    "Rpc",
    "SendRequest",
    "ServerSide",
    "Since",
    "SubRefresh",
    "Subscribe",
    "TextProtocol",
    "bad_request",
    "choose_protocol",
    "disconnect_push",
    "error_reply",
    "presence_result",
    "publications_result",
    "push_text",
    "reply",
]
