"""Whatever a client sends, asgi_ws.uvicorn.WebSocketProtocol raises nothing, leaves no task and says why it ends."""

import asyncio
import os
import struct
import zlib
from typing import Any

import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from asgi_ws.frames import may_be_sent
from asgi_ws.uvicorn import WebSocketProtocol
from tests.test_frames import read_by_client, sent

quick = settings(
    max_examples=int(os.environ.get("ASGI_WS_FUZZ", "200")),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
HANDSHAKE = (
    b"GET / HTTP/1.1\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-extensions: permessage-deflate\r\n\r\n"
)
MAX_SIZE = 1_000


class Transport(asyncio.Transport):
    """Keeps what is written to it."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.protocol = protocol
        self.written = bytearray()
        self.closing = False

    def write(self, data: Any) -> None:
        assert not self.closing
        self.written += data

    def write_eof(self) -> None:
        """The client's turn."""

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    abort = close

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        """What is fed comes all the same, as what a transport has read already."""

    resume_reading = pause_reading


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({**message, "type": "websocket.send"})


CONFIG = uvicorn.Config(echo, log_config=None, ws_max_size=MAX_SIZE, ws_ping_interval=None)
CONFIG.load()


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


async def converse(pieces: list[bytes]) -> None:
    state = ServerState()
    protocol = WebSocketProtocol(CONFIG, state, {})
    transport = Transport(protocol)
    protocol.connection_made(transport)
    protocol.data_received(HANDSHAKE)
    await settle()
    for piece in pieces:
        if transport.closing:
            break
        protocol.data_received(piece)
        assert protocol._parser is not None
        assert protocol._parser.pending <= 2 * (MAX_SIZE + 14) + len(piece)
        await settle()
    head, _, wire = bytes(transport.written).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    frames = read_by_client(wire, deflate=True)
    closes = [payload for opcode, payload, _ in frames if opcode == 8]
    # Open, or ended by one close frame and nothing behind it.
    assert len(closes) == protocol._ended
    assert protocol._ended or protocol._parser.violation is None
    if closes:
        assert frames[-1][0] == 8
        assert not closes[0] or may_be_sent(int.from_bytes(closes[0][:2]))
    transport.close()
    await settle()
    assert not state.tasks
    assert not state.connections
    assert protocol._closing is protocol._keepalive is None


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


payloads = st.binary(max_size=140) | st.text(max_size=40).map(str.encode) | st.sampled_from([bytes(900), bytes(1_100)])
opcodes = st.sampled_from([0, 1, 1, 2, 2, 8, 9, 10]) | st.integers(0, 15)
frames = st.builds(
    lambda opcode, data, fin, packed: sent(opcode, deflated(data) if packed else data, fin=fin, rsv1=packed),
    opcodes,
    payloads,
    st.booleans() | st.just(True),
    st.sampled_from([False, False, True]),
)
closes = st.builds(lambda code, reason: sent(8, struct.pack("!H", code) + reason), st.integers(0, 5_001), payloads)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A stream of frames, in which some bytes have been changed, lost, or come twice."""
    wire = bytearray(b"".join(draw(st.lists(frames | closes, min_size=1, max_size=6))))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, max(len(wire) - 1, 0)))
        match draw(st.integers(0, 2)):
            case 0:
                wire[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                del wire[place : place + draw(st.integers(1, 5))]
            case _:
                wire[place:place] = wire[place : place + draw(st.integers(1, 20))]
    return bytes(wire)


@pytest.fixture(scope="module")
def runner() -> Any:
    with asyncio.Runner() as runner:
        yield runner


def pieces_of(wire: bytes, step: int) -> list[bytes]:
    return [wire[start : start + step] for start in range(0, len(wire), step)]


@quick
@given(st.lists(st.binary(min_size=1, max_size=60), max_size=8))
def test_random_bytes(runner: asyncio.Runner, pieces: list[bytes]) -> None:
    runner.run(converse(pieces))


@quick
@given(st.lists(mutated(), max_size=3), st.integers(1, 400))
def test_streams_that_were_changed(runner: asyncio.Runner, streams: list[bytes], step: int) -> None:
    runner.run(converse(pieces_of(b"".join(streams), step)))


@quick
@given(st.lists(frames | closes, max_size=8), st.integers(1, 400))
def test_frames_in_any_order(runner: asyncio.Runner, wires: list[bytes], step: int) -> None:
    runner.run(converse(pieces_of(b"".join(wires), step)))


def test_second_close_frame_behind_a_transport_that_still_delivers_is_ignored(runner: asyncio.Runner) -> None:
    """As that of TLS does until it has said its own goodbye."""

    async def closes_twice() -> None:
        protocol = WebSocketProtocol(CONFIG, ServerState(), {})
        transport = Transport(protocol)
        protocol.connection_made(transport)
        protocol.data_received(HANDSHAKE)
        await settle()
        protocol.data_received(sent(8, b"\x03\xe8"))
        assert transport.closing
        protocol.data_received(sent(8, b"\x03\xe9"))
        await settle()
        assert transport.written.endswith(b"\r\n\r\n\x88\x02\x03\xe8")

    runner.run(closes_twice())
