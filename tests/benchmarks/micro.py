"""Micro-benchmarks without sockets: each is an async function that does something a number of times."""

import asyncio
import json
import time
import zlib
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import uvicorn
from uvicorn.server import ServerState

from asgi_ws.brokers import MemoryBroker
from asgi_ws.frames import BINARY, TEXT, Frame, Parser
from asgi_ws.messages import Publication
from asgi_ws.payloads import encode
from asgi_ws.pubsub import PubSub
from asgi_ws.uvicorn import WebSocketProtocol
from tests.benchmarks import apps

__all__ = ["BENCHMARKS", "Benchmark", "measure"]

RECORD = {"id": 17, "name": "gold", "price": 1912.5, "tags": ["metal", "spot"]}
SHORT = "x" * 128
LONG = json.dumps([{**RECORD, "id": number, "price": number * 7919 % 10007 / 7} for number in range(110)])[:8192]
MASK = bytes(4)


class Benchmark(NamedTuple):
    name: str
    run: Callable[[int], Awaitable[float]]
    """Does it so many times, and returns the seconds of one."""


def measure(benchmark: Benchmark, seconds: float) -> float:
    """The seconds that one takes: the best of three runs, which together take about as long as asked for."""
    count, took = 1, 0.0
    while took < seconds / 10:
        count *= 4
        took = asyncio.run(_timed(benchmark, count)) * count
    again = max(1, round(count * seconds / 3 / took))
    return min(asyncio.run(_timed(benchmark, again)) for _ in range(3))


async def _timed(benchmark: Benchmark, count: int) -> float:
    return await benchmark.run(count)


def _each(count: int, do: Callable[[], object]) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        do()
    return (time.perf_counter() - begin) / count


# Payloads and frames


async def encode_json(count: int) -> float:
    return _each(count, lambda: encode(RECORD))


async def build_short(count: int) -> float:
    return _each(count, lambda: Frame(SHORT).wire)


async def build_long(count: int) -> float:
    return _each(count, lambda: Frame(LONG).wire)


async def compress_long(count: int) -> float:
    return _each(count, lambda: Frame(LONG).compressed)


def masked(opcode: int, payload: bytes, *, compressed: bool = False) -> bytes:
    """A client's frame. Masked with zeros, which is allowed, and costs the server as much as any other mask."""
    first = bytes((0x80 | (0x40 if compressed else 0) | opcode,))
    length = len(payload)
    if length < 126:
        return first + bytes((0x80 | length,)) + MASK + payload
    return first + b"\xfe" + length.to_bytes(2) + MASK + payload


def deflated(payload: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)).removesuffix(b"\x00\x00\xff\xff")


def _parsing(wire: bytes) -> Callable[[int], Awaitable[float]]:
    async def run(count: int) -> float:
        parser = Parser(None, 1000, deflate=True)
        assert parser.feed(wire)
        return _each(count, lambda: parser.feed(wire))

    return run


# Publishing


class Nobody:
    """A subscriber that does nothing with what it gets."""

    def push(self, publication: Publication) -> None:
        pass


async def push_to_subscribers(count: int) -> float:
    pubsub = PubSub(MemoryBroker())
    await pubsub.start()
    for _ in range(100):
        await pubsub.subscribe("channel", Nobody())
    begin = time.perf_counter()
    for _ in range(0, count, 100):
        await pubsub.publish("channel", encode(SHORT))
    seconds = time.perf_counter() - begin
    await pubsub.stop()
    return seconds / (len(range(0, count, 100)) * 100)


async def subscribe_and_unsubscribe(count: int) -> float:
    pubsub = PubSub(MemoryBroker())
    await pubsub.start()
    subscriber = Nobody()
    begin = time.perf_counter()
    for number in range(count):
        channel = f"channel:{number % 100}"
        await pubsub.subscribe(channel, subscriber)
        await pubsub.unsubscribe([channel], subscriber)
    seconds = time.perf_counter() - begin
    await pubsub.stop()
    return seconds / count


class Wire(asyncio.Transport):
    """A transport whose client takes everything at once."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.written = 0
        self.last = b""
        self.closing = False

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.written += len(data)
        self.last = data

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        self.closing = True

    abort = close


class Clients:
    """Clients of a hub behind our WebSocket class, without the sockets."""

    def __init__(self) -> None:
        self._config = uvicorn.Config(apps.app, log_config=None, log_level="critical", lifespan="off")
        self._config.load()
        self._state = ServerState()
        self.protocols: list[WebSocketProtocol] = []
        self.wires: list[Wire] = []

    async def connect(self, path: str, count: int) -> None:
        for _ in range(count):
            wire = Wire()
            protocol = WebSocketProtocol(self._config, self._state, {})
            protocol.connection_made(wire)
            protocol.data_received(
                f"GET {path} HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
                "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\nsec-websocket-version: 13\r\n\r\n".encode()
            )
            self.protocols.append(protocol)
            self.wires.append(wire)
        hearing = self.wires if path == "/broadcast" else self.wires[:1]
        async with asyncio.timeout(30):
            # Who has heard it has subscribed, or is in the handler's loop.
            while not all(wire.last.endswith(b"hello") for wire in hearing):
                self.protocols[0].data_received(masked(TEXT, b"hello"))
                for _ in range(20):
                    await asyncio.sleep(0)

    async def leave(self) -> None:
        for protocol in self.protocols:
            protocol.connection_lost(None)
        async with asyncio.timeout(30):
            while self._state.tasks:
                await asyncio.sleep(0)


async def publish_to_connections(count: int) -> float:
    number, size = 100, 4 + len(SHORT)
    clients = Clients()
    await clients.connect("/broadcast", number)
    message = masked(TEXT, SHORT.encode())
    rounds = max(1, count // number)
    begin = time.perf_counter()
    for _ in range(rounds):
        goal = clients.wires[-1].written + size
        clients.protocols[0].data_received(message)
        while clients.wires[-1].written < goal:
            await asyncio.sleep(0)
    seconds = time.perf_counter() - begin
    await clients.leave()
    return seconds / (rounds * number)


async def echo_through_the_handler(count: int) -> float:
    clients = Clients()
    await clients.connect("/echo", 1)
    (protocol,), (wire,) = clients.protocols, clients.wires
    message = masked(TEXT, SHORT.encode())
    begin = time.perf_counter()
    for _ in range(count):
        goal = wire.written + 4 + len(SHORT)
        protocol.data_received(message)
        while wire.written < goal:
            await asyncio.sleep(0)
    seconds = time.perf_counter() - begin
    await clients.leave()
    return seconds / count


BENCHMARKS = [
    Benchmark("encode a small record as JSON", encode_json),
    Benchmark("build a frame, 128 B", build_short),
    Benchmark("build a frame, 8 KB", build_long),
    Benchmark("compress a frame, 8 KB", compress_long),
    Benchmark("parse a message, 128 B", _parsing(masked(TEXT, SHORT.encode()))),
    Benchmark("parse a message, 8 KB", _parsing(masked(BINARY, LONG.encode()))),
    Benchmark("parse a compressed message, 8 KB", _parsing(masked(TEXT, deflated(LONG.encode()), compressed=True))),
    Benchmark("push to one of 100 subscribers", push_to_subscribers),
    Benchmark("publish to one of 100 connections, down to the transport", publish_to_connections),
    Benchmark("echo through a handler, transport to transport", echo_through_the_handler),
    Benchmark("subscribe and unsubscribe", subscribe_and_unsubscribe),
]
