"""Clients for the end-to-end tests: the `websockets` library, and a bare socket that reads only what it is told to."""

import asyncio
import base64
import contextlib
import hashlib
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, Self

import httpx2
import websockets

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def connect(url: str, **options: Any) -> websockets.connect:
    """The `websockets` client, without a proxy and without pings of its own."""
    return websockets.connect(url, **{"proxy": None, "ping_interval": None, "compression": None, **options})


async def get(url: str, method: str = "GET", **options: Any) -> httpx2.Response:
    async with httpx2.AsyncClient(trust_env=False) as client:
        return await client.request(method, url, **options)


async def end_of(client: websockets.ClientConnection, timeout: float = 5) -> tuple[int | None, str | None]:
    """Read until the connection is closed: the server's code and reason."""
    async with asyncio.timeout(timeout):
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                await client.recv()
        await client.wait_closed()
    return client.close_code, client.close_reason


async def until(condition: Callable[[], Any], timeout: float = 5) -> float:
    """Wait until something becomes true that tells nobody when; how long it took."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > timeout:
            raise TimeoutError(f"not so within {timeout} s")
        await asyncio.sleep(0.01)
    return time.monotonic() - begin


async def settled(value: Callable[[], int], still: float = 0.2, timeout: float = 5) -> int:
    """Wait until a number has not changed for a while."""
    async with asyncio.timeout(timeout):
        last, since = value(), time.monotonic()
        while time.monotonic() - since < still:
            await asyncio.sleep(0.01)
            if value() != last:
                last, since = value(), time.monotonic()
    return last


def memory() -> int:
    """How many bytes of memory this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_sockets() -> int:
    """How many sockets this process has open."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    return count


def accept_for(key: str) -> str:
    """RFC 6455 section 4.2.2."""
    digest = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()
    return base64.b64encode(digest).decode()


def masked(opcode: int, payload: bytes) -> bytes:
    """A client's frame; the mask is zero, which leaves the payload as it is."""
    length = len(payload)
    if length < 126:
        head = struct.pack("!BB", 0x80 | opcode, 0x80 | length)
    elif length < 65536:
        head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, length)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, length)
    return head + bytes(4) + payload


class RawClient:
    """A websocket client on a bare socket. While nobody calls `receive`, it reads nothing; with a small `rcvbuf` its
    TCP window is soon zero."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.response = b""
        self._unread = bytearray()

    async def handshake(self, port: int, path: str, headers: Iterable[str] = (), key: str = "") -> Self:
        loop = asyncio.get_running_loop()
        key = key or base64.b64encode(os.urandom(16)).decode()
        await loop.sock_connect(self.sock, ("127.0.0.1", port))
        lines = [
            f"GET {path} HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {key}",
            *headers,
        ]
        await loop.sock_sendall(self.sock, "".join(line + "\r\n" for line in [*lines, ""]).encode())
        async with asyncio.timeout(5):
            while b"\r\n\r\n" not in self._unread:
                await self._read()
        head = self._unread.index(b"\r\n\r\n")
        self.response = bytes(self._unread[:head])
        del self._unread[: head + 4]
        return self

    @property
    def status(self) -> int:
        return int(self.response.split()[1])

    def header(self, name: str) -> str | None:
        for line in self.response.decode("latin-1").split("\r\n")[1:]:
            key, _, value = line.partition(":")
            if key.lower() == name.lower():
                return value.strip()
        return None

    async def send(self, opcode: int, payload: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, masked(opcode, payload))

    async def receive(self, timeout: float = 5) -> tuple[int, bytes]:
        """The next frame: its opcode and payload. Raises `EOFError` at the end of the stream, `ConnectionError` when
        it was cut."""
        async with asyncio.timeout(timeout):
            first, length = await self._take(2)
            if length == 126:
                (length,) = struct.unpack("!H", await self._take(2))
            elif length == 127:
                (length,) = struct.unpack("!Q", await self._take(8))
            return first & 15, await self._take(length)

    async def drain(self, timeout: float = 5) -> list[tuple[int, bytes]]:
        """All frames until the stream ends, however it does."""
        frames = []
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                frames.append(await self.receive(timeout))
        return frames

    def leave(self) -> None:
        """Close the socket: FIN, or RST where something was left unread."""
        self.sock.close()

    def reset(self) -> None:
        """RST, as from a peer that has crashed."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    async def _take(self, size: int) -> bytes:
        while len(self._unread) < size:
            await self._read()
        taken = bytes(self._unread[:size])
        del self._unread[:size]
        return taken

    async def _read(self) -> None:
        data = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
        if not data:
            raise EOFError
        self._unread += data


@contextlib.asynccontextmanager
async def raw(
    port: int,
    path: str,
    *,
    headers: Iterable[str] = (),
    key: str = "",
    rcvbuf: int | None = None,
    sndbuf: int | None = None,
) -> AsyncIterator[RawClient]:
    """A `RawClient` after its handshake, whatever the answer was."""
    with socket.socket() as sock:
        sock.setblocking(False)
        for option, size in ((socket.SO_RCVBUF, rcvbuf), (socket.SO_SNDBUF, sndbuf)):
            if size is not None:
                sock.setsockopt(socket.SOL_SOCKET, option, size)
        yield await RawClient(sock).handshake(port, path, headers, key)


def close_frame(payload: bytes) -> tuple[int, str]:
    """The code and the reason in a close frame's payload."""
    return struct.unpack("!H", payload[:2])[0], payload[2:].decode()
