"""A Socket.IO client for tests, over the in-process client of `asgi_ws.testing`."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import ASGIApp

from asgi_ws import testing
from asgi_ws.socketio.packets import ACK, CONNECT, EVENT, Decoder, Packet, encode

PATH = "/?EIO=4&transport=websocket"


class SocketIOClient:
    def __init__(self, client: testing.Client) -> None:
        self.client = client
        self.sids: dict[str, str] = {}

    async def send(self, packet: Packet) -> None:
        text, *attachments = encode(packet)
        await self.raw(text, *attachments)

    async def raw(self, text: str, *attachments: bytes) -> None:
        """The contents of Engine.IO messages."""
        await self.client.send("4" + text)
        for attachment in attachments:
            await self.client.send(attachment)

    async def emit(self, event: str, *args: Any, namespace: str = "/", id: int | None = None) -> None:
        await self.send(Packet(EVENT, [event, *args], namespace, id))

    async def call(self, event: str, *args: Any, namespace: str = "/", id: int = 7) -> list[Any]:
        """What an event is acknowledged with."""
        await self.emit(event, *args, namespace=namespace, id=id)
        packet = await self.receive()
        assert (packet.type, packet.namespace, packet.id) == (ACK, namespace, id), packet
        return packet.data  # type: ignore[no-any-return]

    async def receive(self) -> Packet:
        decoder = Decoder(10_000_000)
        while True:
            payload = await self.client.receive()
            if isinstance(payload, str):
                if payload == "2":
                    await self.client.send("3")
                    continue
                assert payload[0] == "4", payload
                payload = payload[1:]
            packet = decoder.feed(payload)
            if packet is not None:
                return packet

    async def event(self, namespace: str = "/") -> list[Any]:
        """The next event's name and arguments."""
        packet = await self.receive()
        assert (packet.type, packet.namespace) == (EVENT, namespace), packet
        return packet.data  # type: ignore[no-any-return]

    async def connect(self, auth: Any = None, namespace: str = "/") -> str:
        """Connect to a namespace; the socket's id."""
        await self.send(Packet(CONNECT, auth, namespace))
        packet = await self.receive()
        assert (packet.type, packet.namespace) == (CONNECT, namespace), packet
        self.sids[namespace] = packet.data["sid"]
        return self.sids[namespace]

    async def nothing(self) -> None:
        """Nothing has been sent to this client: what is sent next comes next."""
        await self.emit("is that all?", id=999)
        packet = await self.receive()
        assert packet == Packet(ACK, ["yes"], id=999), packet

    async def closed(self) -> tuple[int, str]:
        """Wait for the server to close; the code and the reason."""
        error = await ended(self.client)
        return error.code, error.reason


async def ended(client: testing.Client) -> Any:
    with contextlib.suppress(asyncio.TimeoutError):
        while True:
            try:
                await client.receive()
            except Exception as error:
                return error


@contextlib.asynccontextmanager
async def connected(
    app: ASGIApp, auth: Any = None, *, namespace: str | None = "/", path: str = PATH, **options: Any
) -> AsyncIterator[SocketIOClient]:
    """A client in a namespace, or in none yet."""
    async with testing.connect(app, path, **options) as raw:
        opened = await raw.receive()
        assert isinstance(opened, str)
        assert opened[0] == "0"
        client = SocketIOClient(raw)
        if namespace is not None:
            await client.connect(auth, namespace)
        yield client
