"""Clients for a server that is measured: as many as asked for in one event loop, each as cheap as can be."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import cast

from tests.benchmarks.micro import masked

__all__ = ["Client", "clients"]

_TEXT = 0x1


class Client(asyncio.Protocol):
    """Opens a WebSocket and counts the text messages that come, without a look at what they say."""

    def __init__(self, path: str, *, deflate: bool, on_message: Callable[["Client"], None]) -> None:
        self._path = path
        self._deflate = deflate
        self._on_message = on_message
        self._buffer = b""
        self._skip = 0
        self._opcode = 0
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n" if self._deflate else ""
        self.transport.write(
            f"GET {self._path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{offer}"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )

    def send(self, text: str) -> None:
        self.transport.write(masked(_TEXT, text.encode()))

    def data_received(self, data: bytes) -> None:
        if not self.opened.done():
            self._buffer += data
            head, found, data = self._buffer.partition(b"\r\n\r\n")
            if not found:
                return
            self._buffer = b""
            if not head.startswith(b"HTTP/1.1 101"):
                self.opened.set_exception(ConnectionError(head.decode()))
                return
            self.opened.set_result(None)
        if data:
            self._frames(data)

    def _frames(self, data: bytes) -> None:
        if self._skip >= len(data):
            self._skip -= len(data)
            if not self._skip:
                self._ended()
            return
        position = self._skip
        if position:
            self._ended()
        data = self._buffer + data[position:]
        self._buffer, position, length = b"", 0, len(data)
        while length - position >= 2:
            size, start = data[position + 1], position + 2
            if size == 126:
                start += 2
                size = int.from_bytes(data[position + 2 : start])
            elif size == 127:
                start += 8
                size = int.from_bytes(data[position + 2 : start])
            if start > length:
                break
            self._opcode = data[position] & 0x0F
            if start + size > length:
                self._skip = start + size - length
                return
            position = start + size
            self._ended()
        self._skip = 0
        self._buffer = data[position:]

    def _ended(self) -> None:
        if self._opcode == _TEXT:
            self._on_message(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if not self.opened.done():
            self.opened.set_exception(ConnectionError("the server closed the connection"))


@contextlib.asynccontextmanager
async def clients(
    port: int, path: str, count: int, *, deflate: bool = False, on_message: Callable[[Client], None]
) -> AsyncIterator[list[Client]]:
    """So many connections, all open; aborted at the end."""
    loop = asyncio.get_running_loop()
    opened: list[Client] = []
    try:
        for begin in range(0, count, 100):
            some = []
            for _ in range(begin, min(begin + 100, count)):
                _, client = await loop.create_connection(
                    lambda: Client(path, deflate=deflate, on_message=on_message), "127.0.0.1", port
                )
                some.append(client)
                opened.append(client)
            async with asyncio.timeout(20):
                await asyncio.gather(*(client.opened for client in some))
        yield opened
    finally:
        for client in opened:
            client.transport.abort()
