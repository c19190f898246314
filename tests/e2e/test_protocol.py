"""RFC 6455 and 7692 as asgi_ws.uvicorn.WebSocketProtocol speaks them, over real sockets, and ASGI behind it.

The cases are those of the Autobahn test suite; each table has one server, and a connection for each case.
"""

import asyncio
import base64
import contextlib
import itertools
import logging
import os
import socket
import ssl
import struct
import subprocess
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import websockets
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

import asgi_ws.uvicorn
from asgi_ws.uvicorn import ClientDisconnected, WebSocketProtocol
from tests.e2e.clients import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    RawClient,
    accept_for,
    close_frame,
    connect,
    end_of,
    memory,
    raw,
    until,
)
from tests.programs import program
from tests.servers import OURS, UvicornServer, serve

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def uvicorns_records_arrive(caplog: pytest.LogCaptureFixture) -> None:
    """Also where another server of this process was told to be quiet."""
    caplog.set_level(logging.INFO, "uvicorn.error")


CONT = 0
KEY = b"\x37\xfa\x21\x3d"


def frame(opcode: int, data: bytes | str = b"", *, fin: bool = True, rsv: int = 0, size: int | None = None) -> bytes:
    """A client's frame, with a mask that changes every byte. `size` is what its head says, where that is a lie."""
    data = data.encode() if isinstance(data, str) else data
    size = len(data) if size is None else size
    first = opcode | fin << 7 | rsv << 4
    if size < 126:
        head = struct.pack("!BB", first, 0x80 | size)
    elif size < 65_536:
        head = struct.pack("!BBH", first, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", first, 0x80 | 127, size)
    keys = (KEY * (len(data) // 4 + 1))[: len(data)]
    return head + KEY + (int.from_bytes(data) ^ int.from_bytes(keys)).to_bytes(len(data))


def closing(code: int, reason: str | bytes = b"") -> bytes:
    return frame(CLOSE, code.to_bytes(2) + (reason.encode() if isinstance(reason, str) else reason))


def deflated(data: bytes, window: int = 15, flush: int = zlib.Z_SYNC_FLUSH) -> bytes:
    compressor = zlib.compressobj(wbits=-window)
    return (compressor.compress(data) + compressor.flush(flush)).removesuffix(b"\x00\x00\xff\xff")


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "websocket"
    assert await receive() == {"type": "websocket.connect"}
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({**message, "type": "websocket.send"})


def ours(app: ASGIApp = echo, **options: Any) -> contextlib.AbstractAsyncContextManager[UvicornServer]:
    return serve(app, ws=OURS, lifespan="off", **options)


async def write(client: RawClient, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(client.sock, data)


async def write_slowly(client: RawClient, data: bytes) -> None:
    """Every byte by itself."""
    client.sock.setsockopt(6, 1, 1)  # TCP_NODELAY
    for byte in data:
        await write(client, bytes((byte,)))
        await asyncio.sleep(0)


async def answers(client: RawClient) -> list[tuple[int, bytes]]:
    """What comes until the server is heard no more; it is told goodbye, if it isn't at its end already."""
    frames = []
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            frames.append(await client.receive())
            if frames[-1][0] == CLOSE:
                with contextlib.suppress(ConnectionError):
                    await write(client, frame(CLOSE, frames[-1][1]))
                assert await client.drain() == []
                break
    return frames


END = frame(CLOSE, b"\x03\xe8")
ENDED = (CLOSE, b"\x03\xe8")

Case = tuple[bytes, list[tuple[int, bytes]]]


async def check(cases: Iterable[Case], writing: Callable[[RawClient, bytes], Awaitable[None]] = write) -> None:
    async with ours() as server:
        for number, (wire, expected) in enumerate(cases):
            async with raw(server.port, "/") as client:
                writer = asyncio.create_task(writing(client, wire))
                assert [await client.receive() for _ in expected] == expected, f"case {number}"
                await writer
                await writing(client, END)
                assert await client.drain() == [ENDED], f"case {number}"
        await until(lambda: not server.server.server_state.tasks)


async def check_violations(cases: Iterable[tuple[bytes, int]], *, deflate: bool = False) -> None:
    """What comes before is answered, then there is the code, then nothing more, whatever is sent."""
    headers = ["Sec-WebSocket-Extensions: permessage-deflate"] if deflate else []
    async with ours() as server:
        for (number, (wire, code)), writing in itertools.product(enumerate(cases), (write, write_slowly)):
            async with raw(server.port, "/", headers=headers) as client:
                await write(client, frame(TEXT, "before"))
                assert await client.receive() == (TEXT, b"before")
                with contextlib.suppress(ConnectionError):
                    await writing(client, wire + frame(TEXT, "after") + frame(PING))
                got = await answers(client)
                assert [(opcode, close_frame(data)[0]) for opcode, data in got] == [(CLOSE, code)], f"case {number}"
                assert len(got[0][1]) <= 125


# Autobahn 1 and 9: messages


async def test_text_of_every_size_comes_back() -> None:
    texts = [b"*" * size for size in (0, 1, 125, 126, 127, 128, 65_535, 65_536, 65_537, 1_000_000)]
    texts += ["grüß € 👋".encode() * 1_000]
    await check([(frame(TEXT, text), [(TEXT, text)]) for text in texts])


async def test_binary_of_every_size_comes_back() -> None:
    payloads = [os.urandom(size) for size in (0, 1, 125, 126, 127, 128, 65_535, 65_536, 65_537, 1_000_000)]
    await check([(frame(BINARY, payload), [(BINARY, payload)]) for payload in payloads])


async def test_messages_come_back_that_arrive_byte_by_byte() -> None:
    payloads = [b"*" * size for size in (0, 1, 125, 126, 127, 128, 2_000)]
    wire = b"".join(frame(opcode, payload) for payload in payloads for opcode in (TEXT, BINARY))
    await check([(wire, [(opcode, payload) for payload in payloads for opcode in (TEXT, BINARY)])], write_slowly)


async def test_messages_come_back_in_fragments_of_every_size() -> None:
    data = b"*" * 65_536
    cases = []
    for step in (64, 1_000, 32_768, 65_536):
        pieces = [data[start : start + step] for start in range(0, len(data), step)]
        parts = [
            frame(CONT if number else TEXT, piece, fin=number == len(pieces) - 1) for number, piece in enumerate(pieces)
        ]
        cases.append((b"".join(parts), [(TEXT, data)]))
    await check(cases)


async def test_a_thousand_small_messages_in_a_row_come_back() -> None:
    await check([(frame(TEXT, "x" * 16) * 1_000, [(TEXT, b"x" * 16)] * 1_000)])


# Autobahn 2: pings and pongs


async def test_pings_are_answered_with_their_payload() -> None:
    payloads = [b"", b"hello", b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff", b"\xfe" * 125]
    cases = [(frame(PING, payload), [(PONG, payload)]) for payload in payloads]
    cases.append((b"".join(frame(PING, b"%d" % n) for n in range(100)), [(PONG, b"%d" % n) for n in range(100)]))
    await check(cases)
    await check(cases[3:], write_slowly)


async def test_pongs_that_nobody_asked_for_are_ignored() -> None:
    unsolicited = frame(PONG) + frame(PONG, b"unsolicited")
    await check([(unsolicited, []), (unsolicited + frame(PING, b"?") + unsolicited, [(PONG, b"?")])])


# Autobahn 3 and 4: reserved bits and opcodes


async def test_reserved_bits_break_the_protocol() -> None:
    await check_violations(
        (frame(opcode, data, rsv=rsv), 1002)
        for rsv in range(1, 8)
        for opcode, data in ((TEXT, b"x"), (BINARY, b"x"), (PING, b""), (PONG, b""), (CLOSE, b"\x03\xe8"))
    )
    # With compression agreed on, only the first of them means something, and only to messages.
    await check_violations(
        (
            (frame(opcode, deflated(b"x"), rsv=rsv), 1002)
            for opcode, rsv in ((TEXT, 1), (TEXT, 6), (BINARY, 2), (PING, 4), (CLOSE, 4))
        ),
        deflate=True,
    )


async def test_reserved_opcodes_break_the_protocol() -> None:
    await check_violations(
        (before + frame(opcode, data), 1002)
        for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
        for before, data in ((b"", b""), (b"", b"reserved"), (frame(TEXT, "x", fin=False), b""))
    )


async def test_heads_that_are_wrong_break_the_protocol() -> None:
    unmasked = b"\x81\x05hello"
    await check_violations(
        [
            (unmasked, 1002),
            (b"\x88\x02\x03\xe8", 1002),
            (frame(PING, b"x" * 126), 1002),
            (frame(PONG, b"x" * 126), 1002),
            (frame(CLOSE, b"\x03\xe8" + b"x" * 124), 1002),
            (frame(PING, b"x", fin=False), 1002),
            (frame(PONG, fin=False) + frame(CONT), 1002),
            (frame(BINARY, size=1 << 63), 1002),
            (frame(BINARY, size=(1 << 63) - 1), 1009),
        ]
    )


# Autobahn 5: fragments


async def test_fragments_make_a_message_whatever_comes_in_between() -> None:
    one, two = frame(TEXT, "one ", fin=False), frame(CONT, "two")
    whole = (TEXT, b"one two")
    ping, pong = frame(PING, b"?"), (PONG, b"?")
    await check(
        [
            (one + two, [whole]),
            (one + ping + two, [pong, whole]),
            (one + frame(PONG, b"!") + two, [whole]),
            ((one + ping + two) * 2, [pong, pong, whole, whole]),
            (frame(TEXT, fin=False) + frame(CONT, fin=False) + frame(CONT), [(TEXT, b"")]),
            (frame(TEXT, fin=False) + frame(CONT, "x", fin=False) + frame(CONT), [(TEXT, b"x")]),
            (
                frame(BINARY, b"1", fin=False)
                + b"".join(ping + frame(CONT, b"%d" % n, fin=n == 5) for n in range(2, 6)),
                [*[pong] * 4, (BINARY, b"12345")],
            ),
        ]
    )
    await check([(one + ping + two, [pong, whole])], write_slowly)


async def test_fragments_in_the_wrong_order_break_the_protocol() -> None:
    await check_violations(
        [
            (frame(CONT, "x"), 1002),
            (frame(CONT, "x", fin=False), 1002),
            (frame(CONT) + frame(TEXT, "x"), 1002),
            (frame(TEXT, "x", fin=False) + frame(TEXT, "x"), 1002),
            (frame(TEXT, "x", fin=False) + frame(BINARY, b"x", fin=False), 1002),
        ]
    )


# Autobahn 6: UTF-8

VALID = [
    b"",
    b"hello",
    "κόσμε".encode(),
    b"\x00",
    b"\x7f",
    b"\xc2\x80",
    b"\xdf\xbf",
    b"\xe0\xa0\x80",
    b"\xef\xbf\xbf",
    b"\xf0\x90\x80\x80",
    b"\xf4\x8f\xbf\xbf",
    b"\xed\x9f\xbf",
    b"\xee\x80\x80",
    b"\xef\xbf\xbd",
    b"\xef\xbf\xbe",
]
INVALID = [
    b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited",
    b"\xf8\x88\x80\x80\x80",
    b"\xfc\x84\x80\x80\x80\x80",
    b"\xf7\xbf\xbf\xbf",
    b"\xf4\x90\x80\x80",
    b"\x80",
    b"\xbf",
    b"\x80\xbf\x80",
    b"\xc0 \xc1 ",
    b"\xe0 \xe1 ",
    b"\xf5 ",
    b"\xc0\xaf",
    b"\xe0\x80\xaf",
    b"\xf0\x80\x80\xaf",
    b"\xc1\xbf",
    b"\xe0\x9f\xbf",
    b"\xf0\x8f\xbf\xbf",
    b"\xed\xa0\x80",
    b"\xed\xbf\xbf",
    b"\xed\xa0\x80\xed\xb0\x80",
    b"\xff",
    b"\xfe\xfe\xff\xff",
    b"\xce",
    b"\xf0\x9f\x91",
]


def in_bytes(text: bytes) -> bytes:
    """A message in fragments of one byte each."""
    parts = [frame(CONT if number else TEXT, text[number : number + 1], fin=False) for number in range(len(text))]
    return b"".join(parts) + frame(CONT if parts else TEXT)


async def test_text_that_is_utf8_comes_back_however_it_is_cut() -> None:
    await check([(frame(TEXT, text), [(TEXT, text)]) for text in VALID])
    await check([(in_bytes(text), [(TEXT, text)]) for text in VALID])


async def test_text_that_is_not_utf8_is_refused_however_it_is_cut() -> None:
    await check_violations((frame(TEXT, text), 1007) for text in INVALID)
    await check_violations((in_bytes(text), 1007) for text in INVALID)


@pytest.mark.parametrize("text", [b"\xce\xba\xe1\xbd\xb9\xf4\x90", b"x" * 70_000 + b"\xff"], ids=len)
async def test_text_that_can_never_become_utf8_is_refused_before_its_end(text: bytes) -> None:
    async with ours() as server, raw(server.port, "/") as client:
        await write(client, frame(TEXT, "good so far", fin=False) + frame(CONT, text, fin=False))
        assert close_frame((await client.receive())[1])[0] == 1007


# Autobahn 7: closing


async def test_close_frames_are_answered_with_their_code() -> None:
    codes = [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999]
    async with ours() as server:
        for code, reason in [*((code, "") for code in codes), (1000, "x" * 123), (4000, "grüß")]:
            async with raw(server.port, "/") as client:
                await write(client, frame(PING) + closing(code, reason) + frame(PING) + frame(TEXT, "more"))
                assert await client.drain() == [(PONG, b""), (CLOSE, code.to_bytes(2))]
        async with raw(server.port, "/") as client:
            await write(client, frame(CLOSE) + frame(CLOSE))
            assert await client.drain() == [(CLOSE, b"")]
        async with raw(server.port, "/") as client:
            await write(client, frame(TEXT, "begun", fin=False) + closing(1000) + frame(CONT, "too late"))
            assert await client.drain() == [ENDED]


async def test_close_frames_that_are_wrong_break_the_protocol() -> None:
    codes = [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65_535]
    await check_violations(
        [
            *((closing(code), 1002) for code in codes),
            (frame(CLOSE, b"\x03"), 1002),
            (frame(CLOSE, b"\x03\xe8" + b"x" * 124), 1002),
            (closing(1000, b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80"), 1007),
        ]
    )


# Autobahn 10, 12 and 13: compression

FLATE = "permessage-deflate"
AGREED = f"{FLATE}; server_no_context_takeover; client_no_context_takeover"


async def extension(server: UvicornServer, *offers: str) -> str | None:
    async with raw(server.port, "/", headers=[f"Sec-WebSocket-Extensions: {offer}" for offer in offers]) as client:
        assert client.status == 101
        return client.header("Sec-WebSocket-Extensions")


async def test_compression_is_agreed_on_without_context() -> None:
    server_parameters = ["", "; server_no_context_takeover"]
    client_parameters = ["", "; client_no_context_takeover"]
    windows = ["", "; client_max_window_bits", *(f"; client_max_window_bits={bits}" for bits in range(8, 16))]
    async with ours() as server:
        for parts in itertools.product(server_parameters, client_parameters, windows):
            assert await extension(server, FLATE + "".join(parts)) == AGREED
        for bits in range(8, 16):
            agreed = f"{AGREED}; server_max_window_bits={bits}"
            assert await extension(server, f"{FLATE};server_max_window_bits={bits}") == agreed
            assert await extension(server, f'{FLATE} ; server_max_window_bits = "{bits}"') == agreed
        assert await extension(server, FLATE.upper()) == AGREED


async def test_first_offer_that_can_be_taken_is_taken() -> None:
    async with ours() as server:
        assert await extension(server, f"{FLATE}; server_max_window_bits=20, {FLATE}") == AGREED
        assert await extension(server, f"{FLATE}; nonsense", "x-other", f"{FLATE}; client_max_window_bits") == AGREED
        assert await extension(server, f"x-webkit-deflate-frame, {FLATE}, {FLATE}; server_max_window_bits=9") == AGREED


@pytest.mark.parametrize(
    "parameters",
    [
        "nonsense",
        "server_no_context_takeover=1",
        "client_no_context_takeover=x",
        "client_max_window_bits=7",
        "client_max_window_bits=16",
        "client_max_window_bits=08",
        "client_max_window_bits=",
        "server_max_window_bits",
        "server_max_window_bits=16",
        "server_max_window_bits=x",
        "server_max_window_bits=10; server_max_window_bits=10",
        "client_max_window_bits; client_max_window_bits=9",
        "",
    ],
)
async def test_offers_with_wrong_parameters_are_declined(parameters: str) -> None:
    async with ours() as server:
        assert await extension(server, f"{FLATE}; {parameters}") is None


async def test_without_the_setting_nothing_is_compressed() -> None:
    async with ours(ws_per_message_deflate=False) as server:
        assert await extension(server, FLATE) is None
        async with raw(server.port, "/", headers=[f"Sec-WebSocket-Extensions: {FLATE}"]) as client:
            await write(client, frame(TEXT, deflated(b"x"), rsv=4))
            assert close_frame((await client.receive())[1])[0] == 1002


async def first_byte(client: RawClient, message: bytes) -> int:
    await write(client, message)
    while not client._unread:
        await client._read()
    return client._unread[0]


async def test_frames_for_all_are_compressed_where_the_clients_window_is_large_enough() -> None:
    text = "compressible " * 100
    async with ours() as server:
        for offer, compressed in [
            (FLATE, True),
            (f"{FLATE}; server_max_window_bits=15", True),
            *((f"{FLATE}; server_max_window_bits={bits}", False) for bits in range(8, 15)),
            (f"{FLATE}; client_max_window_bits=8", True),
        ]:
            async with raw(server.port, "/", headers=[f"Sec-WebSocket-Extensions: {offer}"]) as client:
                assert await first_byte(client, frame(TEXT, text)) == (0xC1 if compressed else 0x81)
                _, payload = await client.receive()
                assert (zlib.decompressobj(-15).decompress(payload) if compressed else payload) == text.encode()
                # What is short isn't worth it.
                assert await first_byte(client, frame(TEXT, "short")) == 0x81


@pytest.mark.parametrize("window", range(9, 16))
async def test_compressed_messages_of_every_window_are_understood(window: int) -> None:
    payloads = [os.urandom(size // 8) * 8 for size in (16, 64, 256, 1_024, 4_096, 8_192, 16_384, 131_072)]
    wire = b"".join(frame(BINARY, deflated(payload, window), rsv=4) for payload in payloads)
    headers = [f"Sec-WebSocket-Extensions: {FLATE}; server_max_window_bits=8"]
    async with ours() as server, raw(server.port, "/", headers=headers) as client:
        assert client.status == 101
        for writing in (write(client, wire), write(client, wire)):
            writer = asyncio.create_task(writing)
            assert [await client.receive() for _ in payloads] == [(BINARY, payload) for payload in payloads]
            await writer


async def test_compressed_fragments_with_control_frames_in_between() -> None:
    data = "grüß € ".encode() * 500
    packed = deflated(data)
    third = len(packed) // 3
    pieces = [packed[:third], packed[third : 2 * third], packed[2 * third :], b""]
    parts = [
        frame(CONT if number else TEXT, piece, fin=number == 3, rsv=0 if number else 4)
        for number, piece in enumerate(pieces)
    ]
    headers = [f"Sec-WebSocket-Extensions: {FLATE}; server_max_window_bits=8"]
    final_block = frame(TEXT, deflated(b"hello", flush=zlib.Z_FINISH) + b"\x00", rsv=4)
    async with ours() as server, raw(server.port, "/", headers=headers) as client:
        await write(
            client, frame(PING, b"?").join(parts) + final_block + frame(TEXT, b"\x00", rsv=4) + frame(TEXT, "x")
        )
        expected = [*[(PONG, b"?")] * 3, (TEXT, data), (TEXT, b"hello"), (TEXT, b""), (TEXT, b"x")]
        assert [await client.receive() for _ in expected] == expected


async def test_compressed_messages_that_are_wrong_are_refused() -> None:
    bad_text = deflated(b"\xce\xba\xff")
    half = len(bad_text) // 2
    await check_violations(
        [
            (frame(TEXT, b"\xff\xff\xff", rsv=4), 1007),
            (frame(TEXT, bad_text, rsv=4), 1007),
            (frame(TEXT, bad_text[:half], rsv=4, fin=False) + frame(CONT, bad_text[half:]), 1007),
            (frame(TEXT, deflated(b"x"), rsv=4, fin=False) + frame(CONT, rsv=4), 1002),
        ],
        deflate=True,
    )


# Limits


async def test_a_bomb_is_refused_and_takes_no_memory() -> None:
    bomb = frame(BINARY, deflated(bytes(200_000_000)), rsv=4)
    assert len(bomb) < 250_000
    async with ours(ws_max_size=1_000_000) as server:
        before = memory()
        for _ in range(5):
            async with raw(server.port, "/", headers=[f"Sec-WebSocket-Extensions: {FLATE}"]) as client:
                await write(client, bomb)
                assert [close_frame(data)[0] for _, data in await answers(client)] == [1009]
        assert memory() - before < 10_000_000


async def test_a_message_that_is_too_large_is_refused_while_it_is_still_being_sent() -> None:
    """Closing at once would be a reset, and the client would never read why."""
    async with ours(ws_max_size=1_000_000) as server, raw(server.port, "/") as client:
        before = memory()
        writer = asyncio.create_task(write(client, frame(BINARY, bytes(20_000_000))))
        opcode, payload = await client.receive()
        assert (opcode, close_frame(payload)[0]) == (CLOSE, 1009)
        await writer
        await write(client, frame(CLOSE, payload))
        assert await client.drain() == []
        client.leave()
        await until(lambda: not server.server.server_state.connections)
        assert memory() - before < 60_000_000  # the message itself, three times, is this process's, too


async def test_fragments_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi_ws.uvicorn, "_MAX_FRAGMENTS", 100)
    await check_violations([(frame(TEXT, fin=False) + frame(CONT, fin=False) * 100, 1008)])


# The handshake


def request(*lines: str, method: str = "GET", target: str = "/", without: str = "", key: str = "x" * 16) -> bytes:
    head = [
        "Host: localhost",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {base64.b64encode(key.encode()).decode()}",
    ]
    kept = [line for line in head if not without or not line.startswith(without)]
    return "".join(f"{line}\r\n" for line in [f"{method} {target} HTTP/1.1", *kept, *lines, ""]).encode()


async def ask(port: int, wire: bytes) -> tuple[bytes, dict[bytes, bytes], bytes]:
    """An HTTP answer up to the end of the connection: status line, headers and body."""
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(wire)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    return status, {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}, body


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize(
    ("wire", "status"),
    [
        (request(without="Sec-WebSocket-Key"), b"400 Bad Request"),
        (request(key="short"), b"400 Bad Request"),
        (request("Sec-WebSocket-Key: !", without="Sec-WebSocket-Key"), b"400 Bad Request"),
        (request("Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\x20x", without="Sec-WebSocket-Key"), b"400 Bad Request"),
        (request("Sec-WebSocket-Key: eHh4eHh4eHh4eHh4eHh4eA=="), b"400 Bad Request"),
        (request(method="POST"), b"400 Bad Request"),
        (request(without="Sec-WebSocket-Version"), b"426 Upgrade Required"),
        (request("Sec-WebSocket-Version: 8", without="Sec-WebSocket-Version"), b"426 Upgrade Required"),
        (request("Sec-WebSocket-Version: 13"), b"426 Upgrade Required"),
    ],
    ids=[
        "no key",
        "short key",
        "no base64",
        "bad base64",
        "two keys",
        "POST",
        "no version",
        "version 8",
        "two versions",
    ],
)
async def test_what_is_no_handshake_is_told_so(wire: bytes, status: bytes, http: str) -> None:
    async with ours(http=http, headers=[("X-Served-By", "us")]) as server:
        line, headers, body = await ask(server.port, wire)
    assert line == b"HTTP/1.1 " + status
    assert headers[b"connection"] == b"close"
    assert headers[b"content-length"] == b"%d" % len(body)
    assert headers[b"x-served-by"] == b"us"
    assert (headers.get(b"sec-websocket-version") == b"13") is status.startswith(b"426")
    assert body


def accepting(**accept: Any) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept", **accept})
        await receive()

    return app


@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_handshake_is_answered_with_the_applications_headers(http: str) -> None:
    app = accepting(subprotocol="v2", headers=[(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")])
    key = "dGhlIHNhbXBsZSBub25jZQ=="
    async with ours(app, http=http) as server, raw(server.port, "/", key=key) as client:
        status, *lines = client.response.split(b"\r\n")
        assert status == b"HTTP/1.1 101 Switching Protocols"
        assert client.header("Sec-WebSocket-Accept") == accept_for(key) == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        assert client.header("Upgrade") == "websocket"
        assert client.header("Connection") == "Upgrade"
        assert client.header("Sec-WebSocket-Protocol") == "v2"
        assert client.header("server") == "uvicorn"
        assert [line for line in lines if line.startswith(b"set-cookie")] == [b"set-cookie: a=1", b"set-cookie: b=2"]


@pytest.mark.parametrize(
    "message",
    [
        {"type": "websocket.accept", "headers": [(b"x", b"a\r\nset-cookie: evil")]},
        {"type": "websocket.accept", "headers": [(b"x\n", b"a")]},
        {"type": "websocket.accept", "subprotocol": "a\r\nb: c"},
    ],
)
async def test_header_with_a_line_break_is_the_applications_error(
    message: Message, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(message)

    async with ours(app) as server, raw(server.port, "/") as client:
        assert client.status == 500
        assert b"evil" not in client.response
    assert "a header can't have line breaks" in caplog.text


async def test_refusal_with_a_line_break_is_the_applications_error(caplog: pytest.LogCaptureFixture) -> None:
    app = denying((200, [(b"x", b"a\r\nset-cookie: evil")], [b"body"]))
    async with ours(app) as server:
        line, headers, body = await ask(server.port, request())
    assert line == b"HTTP/1.1 500 Internal Server Error"
    assert b"set-cookie" not in headers
    assert body == b"Internal Server Error"


def denying(answer: tuple[int, list[tuple[bytes, bytes]], list[bytes]]) -> ASGIApp:
    status, headers, parts = answer

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert "websocket.http.response" in scope["extensions"]
        await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
        for number, part in enumerate(parts):
            more = number < len(parts) - 1
            await send({"type": "websocket.http.response.body", "body": part, "more_body": more})
        with pytest.raises(RuntimeError):
            await send({"type": "websocket.http.response.body", "body": b"behind the end"})
        assert (await receive())["type"] == "websocket.connect"
        assert await receive() == {"type": "websocket.disconnect", "code": 1006, "reason": ""}

    return app


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((404, [], [b"nothing here"]), {b"content-length": b"12", b"content-type": b"text/plain; charset=utf-8"}),
        ((404, [(b"Content-Type", b"text/html")], [b"<p>"]), {b"content-length": b"3", b"content-type": b"text/html"}),
        ((401, [(b"WWW-Authenticate", b"Bearer")], [b""]), {b"content-length": b"0", b"www-authenticate": b"Bearer"}),
        ((302, [(b"location", b"/x"), (b"content-length", b"4")], [b"go", b"", b"on"]), {b"content-length": b"4"}),
        ((299, [], [b"of unknown ", b"x" * 300_000, b" length"]), {}),
    ],
    ids=["body", "own type", "no body", "own length", "streamed"],
)
async def test_denial_is_an_http_answer(
    answer: tuple[int, list[tuple[bytes, bytes]], list[bytes]],
    expected: dict[bytes, bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with ours(denying(answer)) as server:
        line, headers, body = await ask(server.port, request())
        await until(lambda: not server.server.server_state.tasks)
    status, _, parts = answer
    assert line.startswith(b"HTTP/1.1 %d" % status)
    assert body == b"".join(parts)
    assert headers.items() >= expected.items()
    assert (b"content-length" in headers) is (status != 299)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_streamed_denial_waits_for_a_client_that_is_slow() -> None:
    sent: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.http.response.start", "status": 403})
        for number in range(100):
            body = {"type": "websocket.http.response.body", "body": b"x" * 16_384, "more_body": True}
            await send(body)
            sent.append(number)
        # And without an end.

    async with ours(app, sndbuf=16_384) as server, raw(server.port, "/", rcvbuf=4_096) as client:
        assert client.status == 403
        await asyncio.sleep(0.1)
        assert len(sent) < 50
        size = len(client._unread)
        with contextlib.suppress(EOFError):
            while True:
                client._unread.clear()
                await client._read()
                size += len(client._unread)
        assert size == 100 * 16_384


async def test_client_that_leaves_during_a_streamed_denial_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.http.response.start", "status": 403})
        for _ in range(1_000):
            await send({"type": "websocket.http.response.body", "body": b"x" * 16_384, "more_body": True})
        raise AssertionError

    async with ours(app) as server, raw(server.port, "/") as client:
        client.reset()
        await until(lambda: not server.server.server_state.tasks)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def before_accept_closes(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 4000})
    with pytest.raises(RuntimeError):
        await send({"type": "websocket.accept"})
    assert (await receive())["type"] == "websocket.disconnect"


async def before_accept_returns(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()


async def before_accept_raises(scope: Scope, receive: Receive, send: Send) -> None:
    raise ZeroDivisionError


async def before_accept_sends(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "websocket.send", "text": "too early"})


async def denies_and_accepts(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "websocket.http.response.start", "status": 401})
    await send({"type": "websocket.accept"})


@pytest.mark.parametrize(
    ("app", "status", "logged"),
    [
        (before_accept_closes, 403, ""),
        (before_accept_returns, 500, "without completing handshake"),
        (before_accept_raises, 500, "ZeroDivisionError"),
        (before_accept_sends, 500, "unexpected ASGI message 'websocket.send'"),
        (denies_and_accepts, 500, "unexpected ASGI message 'websocket.accept'"),
    ],
)
async def test_application_that_does_not_accept(
    app: ASGIApp, status: int, logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with ours(app) as server:
        line, headers, _ = await ask(server.port, request())
        await until(lambda: not server.server.server_state.tasks)
    assert int(line.split()[1]) == status
    assert headers[b"connection"] == b"close"
    errors = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(errors) == bool(logged)
    assert logged in caplog.text


@contextlib.asynccontextmanager
async def undecided(**options: Any) -> AsyncIterator[tuple[UvicornServer, asyncio.Event, RawClient]]:
    """A client whose handshake isn't answered until the event is set."""
    decide = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await decide.wait()
        await echo(scope, receive, send)

    async with ours(app, **options) as server:
        with contextlib.closing(socket.create_connection(("127.0.0.1", server.port))) as sock:
            sock.setblocking(False)
            client = RawClient(sock)
            await write(client, request())
            await until(lambda: server.server.server_state.tasks)
            yield server, decide, client


async def skip_head(client: RawClient) -> None:
    while b"\r\n\r\n" not in client._unread:
        await client._read()
    del client._unread[: client._unread.index(b"\r\n\r\n") + 4]


async def test_what_is_sent_before_the_handshake_is_answered_is_not_lost() -> None:
    async with undecided() as (_, decide, client):
        for number in range(100):
            await write(client, frame(TEXT, str(number)))
        await asyncio.sleep(0.02)
        decide.set()
        await skip_head(client)
        for number in range(100):
            assert await client.receive() == (TEXT, b"%d" % number)


async def test_what_is_sent_before_the_handshake_is_answered_is_bounded() -> None:
    async with undecided(rcvbuf=16_384) as (server, decide, client):
        (protocol,) = server.server.server_state.connections
        assert isinstance(protocol, WebSocketProtocol)
        writer = asyncio.create_task(write(client, frame(BINARY, b"x" * 60_000) * 100))
        await until(lambda: not protocol._reading)
        assert len(protocol._unparsed) < 600_000
        assert not writer.done()
        decide.set()
        await skip_head(client)
        for _ in range(100):
            assert await client.receive() == (BINARY, b"x" * 60_000)
        await writer


async def test_server_that_stops_during_a_handshake_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async with undecided() as (server, decide, client):
        server.server.stop()
        await until(lambda: client.sock.fileno() >= 0 and server.server.should_exit)
        await client._read()
        assert client._unread.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"retry-after: 1\r\n" in client._unread
        decide.set()
        await until(lambda: not server.server.server_state.tasks)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_client_that_leaves_before_the_handshake_is_answered_is_nobodys_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with undecided() as (server, decide, client):
        client.reset()
        await until(lambda: not server.server.server_state.connections)
        decide.set()
        await until(lambda: not server.server.server_state.tasks)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# ASGI applications that know nothing of asgi_ws


async def test_starlette_runs_unchanged() -> None:
    ends: list[tuple[int, str | None]] = []

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept(subprotocol=next(iter(websocket["subprotocols"]), None))
        try:
            while True:
                text = await websocket.receive_text()
                if text == "close":
                    await websocket.close(4001, "as you wish")
                    return
                await websocket.send_json({"path": websocket.path_params["name"], "said": text})
                await websocket.send_bytes(memoryview(text.encode()))  # type: ignore[arg-type]
        except WebSocketDisconnect as end:
            ends.append((end.code, end.reason))

    async def streamed(websocket: WebSocket) -> None:
        await websocket.send_denial_response(StreamingResponse(iter(["not ", "here"]), 404))

    async def denied(websocket: WebSocket) -> None:
        await websocket.send_denial_response(PlainTextResponse("log in", 401))

    app = Starlette(
        routes=[
            WebSocketRoute("/echo/{name}", endpoint),
            WebSocketRoute("/streamed", streamed),
            WebSocketRoute("/denied", denied),
        ]
    )
    async with ours(app) as server:
        async with connect(f"{server.ws}/echo/a%20b", subprotocols=["v1"], compression="deflate") as client:
            assert client.subprotocol == "v1"
            await client.send("hello")
            assert await client.recv() == '{"path":"a b","said":"hello"}'
            assert await client.recv() == b"hello"
            await client.send("close")
            assert await end_of(client) == (4001, "as you wish")
        async with connect(f"{server.ws}/echo/x") as client:
            await client.close(4100, "leaving")
        async with raw(server.port, "/echo/x") as lost:
            lost.reset()
        async with raw(server.port, "/echo/x") as lost:
            lost.leave()
        await until(lambda: len(ends) == 3)
        assert sorted(ends) == [(1006, ""), (1006, ""), (4100, "leaving")]
        for path, status, body in (("/streamed", 404, b"not here"), ("/denied", 401, b"log in"), ("/x", 403, b"")):
            line, _, answered = await ask(server.port, request(target=path))
            assert (int(line.split()[1]), answered) == (status, body)


def after_accept(then: Callable[[Receive, Send], Awaitable[None]]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await then(receive, send)

    return app


async def test_disconnect_has_the_clients_code_and_reason_and_sending_raises_oserror() -> None:
    assert issubclass(ClientDisconnected, OSError)
    seen: list[Message] = []

    async def then(receive: Receive, send: Send) -> None:
        seen.append(await receive())
        for _ in range(2):
            with pytest.raises(ClientDisconnected):
                await send({"type": "websocket.send", "text": "too late"})
        seen.append(await receive())
        await send({"type": "websocket.send", "text": "too late"})

    async with ours(after_accept(then)) as server:
        for wire in (closing(4000, "bye"), frame(CLOSE), b"\x81\x05hello"):
            async with raw(server.port, "/") as client:
                await write(client, wire)
                await client.drain()
        async with raw(server.port, "/") as client:
            client.reset()
        await until(lambda: len(seen) == 8)
        await until(lambda: not server.server.server_state.tasks)
    assert [(end["code"], end.get("reason", "")) for end in seen] == [
        *((4000, "bye"), (1006, ""), (1005, ""), (1006, "")),
        *((1002, "a client's frames are masked"), (1006, ""), (1006, ""), (1006, "")),
    ]


async def test_sending_behind_ones_own_close_frame_is_the_applications_error() -> None:
    done = asyncio.Event()

    async def then(receive: Receive, send: Send) -> None:
        await send({"type": "websocket.close", "code": 4000, "reason": "enough"})
        assert await receive() == {"type": "websocket.disconnect", "code": 4000, "reason": "enough"}
        for kind in ("websocket.send", "websocket.close", "websocket.accept"):
            with pytest.raises(RuntimeError, match=kind):
                await send({"type": kind, "text": "more"})
        done.set()

    async with ours(after_accept(then)) as server, raw(server.port, "/") as client:
        assert await client.receive() == (CLOSE, b"\x0f\xa0enough")
        await asyncio.wait_for(done.wait(), 5)
        await write(client, closing(4000) + closing(4000))
        assert await client.drain() == []


@pytest.mark.parametrize(
    ("code", "reason"), [(1005, ""), (1006, ""), (999, ""), (70_000, ""), (1000, "x" * 124), (1000, "ü" * 62)]
)
async def test_close_frame_that_may_not_be_sent_is_the_applications_error(code: int, reason: str) -> None:
    async def then(receive: Receive, send: Send) -> None:
        with pytest.raises(ValueError, match="close frame"):
            await send({"type": "websocket.close", "code": code, "reason": reason})
        await send({"type": "websocket.close", "code": None, "reason": None})

    async with ours(after_accept(then)) as server, raw(server.port, "/") as client:
        assert await client.receive() == ENDED


async def returns(receive: Receive, send: Send) -> None:
    await send({"type": "websocket.send", "bytes": b"last", "text": None})


async def raises(receive: Receive, send: Send) -> None:
    await send({"type": "websocket.send", "bytes": None, "text": "last"})
    raise ZeroDivisionError("the password is swordfish")


async def sends_nonsense(receive: Receive, send: Send) -> None:
    await send({"type": "websocket.send", "text": "half a \ud800 character"})


async def fails_elsewhere(receive: Receive, send: Send) -> None:
    raise ClientDisconnected


@pytest.mark.parametrize(
    ("then", "code", "logged"),
    [
        (returns, 1000, None),
        (raises, 1011, "swordfish"),
        (sends_nonsense, 1011, "surrogates"),
        (fails_elsewhere, 1011, "ClientDisconnected"),
    ],
)
async def test_end_of_the_application_is_told_to_the_client(
    then: Any, code: int, logged: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    async with ours(after_accept(then)) as server, raw(server.port, "/") as client:
        got = await answers(client)
    assert got[-1] == (CLOSE, code.to_bytes(2))
    assert [payload for _, payload in got[:-1]] in ([], [b"last"])
    errors = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.name for record in errors] == (["uvicorn.error"] if logged else [])
    if logged:
        assert errors[0].exc_info is not None
        assert logged in caplog.text


async def test_application_that_is_cancelled_cuts_its_client_off() -> None:
    async def then(receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    async with ours(after_accept(then)) as server, raw(server.port, "/") as client:
        (task,) = server.server.server_state.tasks
        task.cancel()
        assert await client.drain() == []
        await until(lambda: not server.server.server_state.connections)


async def test_receive_can_be_cancelled_and_called_again() -> None:
    async def then(receive: Receive, send: Send) -> None:
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(receive(), 0.01)
        await send({"type": "websocket.send", "text": "now"})
        await send({**await receive(), "type": "websocket.send"})

    async with ours(after_accept(then)) as server, raw(server.port, "/") as client:
        assert await client.receive() == (TEXT, b"now")
        await write(client, frame(TEXT, "hello"))
        assert await client.receive() == (TEXT, b"hello")


async def test_plain_application_hears_that_the_server_stops() -> None:
    seen: list[Message] = []

    async def then(receive: Receive, send: Send) -> None:
        seen.append(await receive())
        with pytest.raises(ClientDisconnected):
            await send({"type": "websocket.send", "text": "too late"})

    async with ours(after_accept(then)) as server, raw(server.port, "/") as client:
        server.server.stop()
        assert await client.receive() == (CLOSE, (1012).to_bytes(2))
        assert await client.drain() == []
    assert seen == [{"type": "websocket.disconnect", "code": 1012, "reason": ""}]


# What the scope says


def reporting(scopes: list[Scope]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            scope["state"]["database"] = "connected"
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            scopes.append(scope)
            await echo(scope, receive, send)

    return app


@pytest.mark.parametrize("ws", ["websockets-sansio", OURS])
async def test_scope_is_what_uvicorns_own_classes_make_of_the_request(ws: str) -> None:
    scopes: list[Scope] = []
    headers = ["X-Token:  a b ", "Sec-WebSocket-Protocol: v1, v2", "Sec-WebSocket-Protocol: v3"]
    async with (
        serve(reporting(scopes), ws=ws, root_path="/api") as server,
        raw(server.port, "/chat/a%20b/%C3%BC?x=1&y=%20", headers=headers) as client,
    ):
        client_address = client.sock.getsockname()
        await write(client, END)
    (scope,) = scopes
    assert scope["path"] == "/api/chat/a b/ü"
    assert scope["raw_path"] == b"/api/chat/a%20b/%C3%BC"
    assert scope["query_string"] == b"x=1&y=%20"
    assert scope["root_path"] == "/api"
    assert scope["scheme"] == "ws"
    assert scope["http_version"] == "1.1"
    assert scope["server"] == ("127.0.0.1", server.port)
    assert scope["client"] == client_address
    assert list(scope["subprotocols"]) == ["v1", "v2", "v3"]
    assert scope["state"] == {"database": "connected"}
    assert scope["asgi"]["spec_version"] >= "2.4"
    assert (b"x-token", b"a b") in list(scope["headers"])
    assert "websocket.http.response" in scope["extensions"]


async def test_state_of_the_lifespan_is_each_connections_own() -> None:
    scopes: list[Scope] = []
    async with serve(reporting(scopes), ws=OURS) as server:
        for _ in range(2):
            async with raw(server.port, "/") as client:
                scopes[-1]["state"]["own"] = len(scopes)
                await write(client, END)
    assert [scope["state"]["own"] for scope in scopes] == [1, 2]


async def test_unix_socket(tmp_path: Path) -> None:
    scopes: list[Scope] = []
    path = str(tmp_path / "server")
    async with ours(reporting(scopes)) as server:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(path)
        config = server.server.config
        loop = asyncio.get_running_loop()
        state = server.server.server_state

        def http() -> Any:
            return config.http_protocol_class(config=config, server_state=state, app_state={})

        unix = await loop.create_unix_server(http, sock=listening)
        async with websockets.unix_connect(path, "ws://localhost/", proxy=None) as client:
            await client.send("hello")
            assert await client.recv() == "hello"
        unix.close()
        await unix.wait_closed()
    assert scopes[0]["client"] is None
    assert scopes[0]["server"] == (path, None)
    assert not scopes[0]["subprotocols"]


async def test_tls(tmp_path: Path) -> None:
    scopes: list[Scope] = []
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = [program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.create_default_context(cafile=str(certificate))
    options = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key), "ws_max_size": 200_000}
    async with ours(reporting(scopes), **options) as server:
        url = server.ws.replace("ws:", "wss:")
        async with connect(url, ssl=context, compression="deflate") as client:
            for message in ("hello", "x" * 100_000, b"\x00" * 100_000, ""):
                await client.send(message)
                assert await client.recv() == message
            await client.send("x" * 200_001)
            assert (await end_of(client))[0] == 1009
        async with connect(url, ssl=context) as client:
            server.server.stop()
            assert await end_of(client) == (1012, "")
    assert scopes[0]["scheme"] == "wss"
