import argparse
import asyncio
import concurrent.futures
import contextlib
import http.client
import io
import logging
import os
import pty
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import typing
from collections.abc import AsyncIterator, Iterator

import pytest
import websockets
from starlette.exceptions import HTTPException
from websockets.asyncio.server import ServerConnection

from asgi_ws import Connection, Hub, WebSocketMiddleware
from asgi_ws.cli import _watch, main
from asgi_ws.messages import Position, Retention
from asgi_ws.payloads import Payload, encode
from tests.bus import Bus, BusBroker
from tests.servers import UvicornServer, free_port, run_process, serve

STAMP = re.compile(r"^\d\d:\d\d:\d\d\.\d\d\d ", re.MULTILINE)

hub = Hub()


@hub.websocket("/echo", subprotocols=["chat.v2", "chat.v1", None])
async def echo(conn: Connection) -> None:
    async for message in conn:
        await conn.send(message)


@hub.websocket("/headers")
async def headers(conn: Connection) -> None:
    for name in ("x-first", "x-second", "origin"):
        await conn.send(f"{name}: {conn.headers.get(name)}")


@hub.websocket("/send/{name}")
async def send(conn: Connection, name: str) -> None:
    await conn.send(MESSAGES[name])


@hub.websocket("/close/{code:int}")
async def close(conn: Connection, code: int) -> None:
    await conn.close(code, "as \x1b[31myou\n wish")


@hub.websocket("/refuse", accept=False)
async def refuse(conn: Connection) -> None:
    raise HTTPException(401, "first a token,\n\x1b[31mthen " + "more " * 200)


@hub.websocket("/refuse-without-words", accept=False)
async def refuse_without_words(conn: Connection) -> None:
    raise HTTPException(401, "")


MESSAGES: dict[str, str | bytes] = {
    "control": "\x1b[2J\x07a\nb\tc\x9b31m\x7f\u202edesrever\u2028",
    "plain": "grüße, 世界 👋 \\n",
    "short": b"\x00hello\xff",
    "long": bytes(range(256)),
    "empty": b"",
}


@pytest.fixture
async def server(anyio_backend: str) -> AsyncIterator[UvicornServer]:
    async with serve(WebSocketMiddleware(no_page, hub=hub)) as running:
        yield running


async def no_page(scope: object, receive: object, send: object) -> None:
    raise AssertionError("only the hub is asked")


class Pipe:
    """What the command reads, as a shell would give it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read, self._write = os.pipe()
        self._stdin = os.fdopen(read, encoding="utf-8")
        monkeypatch.setattr("sys.stdin", self._stdin)

    def write(self, data: bytes) -> None:
        os.write(self._write, data)

    def end(self) -> None:
        if self._write != -1:
            os.close(self._write)
            self._write = -1

    def close(self) -> None:
        self.end()
        self._stdin.close()


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    monkeypatch.setenv("NO_PROXY", "*")
    pipe = Pipe(monkeypatch)
    with contextlib.closing(pipe):
        yield pipe


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers come within milliseconds here."""
    monkeypatch.setattr("asgi_ws.cli._QUIET", 0.3)


async def run(*arguments: str) -> int:
    """The command, in a thread that a test which failed doesn't have to wait for."""
    ended: concurrent.futures.Future[int] = concurrent.futures.Future()

    def work() -> None:
        try:
            ended.set_result(main(["connect", *arguments]))
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return await asyncio.wait_for(asyncio.wrap_future(ended), 20)


def lines(output: str) -> list[str]:
    """What was shown, without the time that stands before each line."""
    assert all(STAMP.match(line) for line in output.splitlines()), output
    return STAMP.sub("", output).splitlines()


# connect: lines and messages


@pytest.mark.anyio
async def test_lines_of_a_pipe_are_sent_and_answers_are_shown(
    server: UvicornServer, stdin: Pipe, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin.write("one\nzwei ü\r\n\nfour".encode())
    stdin.end()
    assert await run(f"{server.ws}/echo") == 0
    shown = lines(capsys.readouterr().out)
    assert shown[0] == "* connected"
    assert shown[-1] == "* closed: 1000 (OK)"
    assert [line for line in shown if line[0] == ">"] == ["> one", "> zwei ü", "> ", "> four"]
    assert [line for line in shown if line[0] == "<"] == ["< one", "< zwei ü", "< ", "< four"]


@pytest.mark.anyio
async def test_a_pipe_that_isnt_utf8_is_sent_with_replacements(
    server: UvicornServer, stdin: Pipe, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin.write(b"a\xffb\n")
    stdin.end()
    assert await run(f"{server.ws}/echo") == 0
    assert "< a\ufffdb" in lines(capsys.readouterr().out)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("control", r"< \x1b[2J\x07a\nb\tc\x9b31m\x7f\u202edesrever\u2028"),
        ("plain", "< grüße, 世界 👋 \\n"),
        ("short", "< (7 bytes) 00 68 65 6c 6c 6f ff"),
        ("long", f"< (256 bytes) {bytes(range(64)).hex(' ')}…"),
        ("empty", "< (0 bytes) "),
    ],
)
async def test_messages_stand_in_one_line_and_do_nothing_to_the_terminal(
    server: UvicornServer, stdin: Pipe, capsys: pytest.CaptureFixture[str], name: str, expected: str
) -> None:
    assert await run(f"{server.ws}/send/{name}") == 0
    assert lines(capsys.readouterr().out) == ["* connected", expected, "* closed: 1000 (OK)"]


@pytest.mark.anyio
async def test_what_the_terminal_has_no_character_for_is_escaped(
    server: UvicornServer, stdin: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", output)
    assert await run(f"{server.ws}/send/plain") == 0
    output.seek(0)
    assert lines(output.read())[1] == r"< gr\xfc\xdfe, \u4e16\u754c \U0001f44b " + "\\n"


@pytest.mark.anyio
async def test_output_may_be_any_stream_and_input_may_be_none(
    server: UvicornServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.StringIO()
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("sys.stdout", output)
    monkeypatch.setattr("sys.stdin", None)
    assert await run(f"{server.ws}/echo") == 0
    assert lines(output.getvalue()) == ["* connected", "* closed: 1000 (OK)"]


@pytest.mark.anyio
async def test_the_end_waits_until_the_server_is_quiet(
    stdin: Pipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin.end()
    sent = []

    async def handler(websocket: ServerConnection) -> None:
        for number in range(5):
            await asyncio.sleep(0.15)
            await websocket.send(str(number))
            sent.append(number)
        await websocket.wait_closed()

    async with websockets.serve(handler, "127.0.0.1", 0) as server:
        assert await run(f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}") == 0
    assert sent == list(range(5))
    assert lines(capsys.readouterr().out)[1:-1] == [f"< {number}" for number in range(5)]


# connect: how it ends


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("code", "exit_code", "words"),
    [(1000, 0, "OK"), (1001, 0, "going away"), (1011, 1, "internal error"), (4001, 1, "private use")],
)
async def test_the_exit_code_says_whether_the_server_closed_well(
    server: UvicornServer,
    stdin: Pipe,
    capsys: pytest.CaptureFixture[str],
    code: int,
    exit_code: int,
    words: str,
) -> None:
    assert await run(f"{server.ws}/close/{code}") == exit_code
    assert lines(capsys.readouterr().out)[-1] == rf"* closed: {code} ({words}) as \x1b[31myou\n wish"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("lost", "exit_code", "words"),
    [(False, 0, "1005 (no status received [internal])"), (True, 1, "1006 (the connection was lost)")],
)
async def test_an_end_without_a_code(
    stdin: Pipe, capsys: pytest.CaptureFixture[str], lost: bool, exit_code: int, words: str
) -> None:
    async def handler(websocket: ServerConnection) -> None:
        if lost:
            websocket.transport.abort()
        else:
            async with websocket.send_context():
                websocket.protocol.send_close()

    async with websockets.serve(handler, "127.0.0.1", 0) as server:
        assert await run(f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}") == exit_code
    assert lines(capsys.readouterr().out)[-1] == f"* closed: {words}"


@pytest.mark.anyio
async def test_sending_ends_with_the_connection(
    server: UvicornServer, stdin: Pipe, capsys: pytest.CaptureFixture[str]
) -> None:
    # More than the connection takes: the server, which reads nothing, closes while a line is being sent.
    stdin.write(b"a" * 60_000 + b"\n")

    async def handler(websocket: ServerConnection) -> None:
        await websocket.recv()
        await websocket.close(1001)

    async with websockets.serve(handler, "127.0.0.1", 0) as server:
        assert await run(f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}") == 0
    assert lines(capsys.readouterr().out)[-1] == "* closed: 1001 (going away)"
    # The thread that still waits for a line finds nobody to give it to.
    before = threading.active_count()
    stdin.write(b"too late\n")
    limit = time.monotonic() + 5
    while threading.active_count() >= before and time.monotonic() < limit:
        await asyncio.sleep(0.01)
    assert threading.active_count() < before


@pytest.mark.anyio
async def test_an_output_that_nobody_reads_ends_it_quietly(
    server: UvicornServer, stdin: Pipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        assert await run(f"{server.ws}/echo") == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


@pytest.mark.anyio
async def test_an_output_that_is_lost_later_ends_it_as_well(
    server: UvicornServer, stdin: Pipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as output, os.fdopen(read) as reader:
        monkeypatch.setattr("sys.stdout", output)
        running = asyncio.create_task(run(f"{server.ws}/echo"))
        assert "connected" in await asyncio.wait_for(asyncio.to_thread(reader.readline), 10)
        reader.close()
        stdin.write(b"hello\n")
        assert await running == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


async def _interrupted(command: asyncio.subprocess.Process, shown: str) -> tuple[int, str]:
    """Send Ctrl-C when the process has shown something: its exit code, and all that it showed."""
    assert command.stdout is not None
    output = ""
    async with asyncio.timeout(20):
        while shown not in output:
            chunk = await command.stdout.read(1000)
            assert chunk, output
            output += chunk.decode()
        command.send_signal(signal.SIGINT)
        output += (await command.stdout.read()).decode()
        return await command.wait(), output


@pytest.mark.anyio
async def test_ctrl_c_closes_with_1000(server: UvicornServer) -> None:
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "asgi_ws", "connect", f"{server.ws}/echo"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "NO_PROXY": "*"},
    )
    code, output = await _interrupted(command, "connected")
    assert code == 0
    assert lines(output) == ["* connected", "* closed: 1000 (OK)"]


def _interrupt_this() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_during_the_handshake_leaves_quietly(stdin: Pipe, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def interrupt() -> None:
            with listening.accept()[0] as silent:
                assert silent.recv(1000)
                _interrupt_this()
                silent.recv(1000)

        thread = threading.Thread(target=interrupt)
        thread.start()
        assert main(["connect", f"ws://127.0.0.1:{listening.getsockname()[1]}"]) == 130
        thread.join(10)
    assert capsys.readouterr() == ("", "")


# connect: a terminal


class Terminal:
    """A terminal with somebody before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._master, slave = pty.openpty()
        self._stdin = os.fdopen(os.dup(slave), encoding="utf-8")
        self._stdout = os.fdopen(slave, "w", encoding="utf-8")
        self._monkeypatch = monkeypatch
        os.set_blocking(self._master, False)
        self._shown = b""
        monkeypatch.setattr("sys.stdin", self._stdin)
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setenv("COLUMNS", "40")

    @property
    def output(self) -> str:
        return self._shown.decode(errors="ignore")

    def show_output(self) -> None:
        """In the test itself: pytest has its own output from phase to phase."""
        self._monkeypatch.setattr("sys.stdout", self._stdout)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    async def until(self, text: str) -> None:
        async with asyncio.timeout(10):
            while text not in self.output:
                with contextlib.suppress(BlockingIOError):
                    self._shown += os.read(self._master, 65536)
                await asyncio.sleep(0.01)

    def hang_up(self) -> None:
        if self._master != -1:
            os.close(self._master)
            self._master = -1

    def close(self) -> None:
        self.hang_up()
        self._stdin.close()
        with contextlib.suppress(OSError):
            self._stdout.close()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    with contextlib.closing(Terminal(monkeypatch)) as terminal:
        yield terminal


@pytest.mark.anyio
async def test_on_a_terminal_messages_stand_above_the_line_that_is_being_typed(
    server: UvicornServer, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.show_output()
    monkeypatch.setenv("TERM", "xterm")
    running = asyncio.create_task(run(f"{server.ws}/echo"))
    await terminal.until("connected")
    terminal.type("hello\n")
    await terminal.until("< hello")
    # Room for one row, or for as many as a long line of wide characters takes, and back to where the cursor was.
    assert re.search(r"\x1b7\r\n\x1b\[1A\x1b\[1L\r[\d:.]+ < hello\r\n\x1b8\x1b\[1B", terminal.output)
    terminal.type("世" * 40 + "\n")
    await terminal.until("< " + "世" * 40)
    assert re.search(r"\x1b7(\r\n){3}\x1b\[3A\x1b\[3L\r[\d:.]+ < 世+\r\n", terminal.output)
    # The end of the input is typed: nothing is waited for.
    monkeypatch.setattr("asgi_ws.cli._QUIET", 100)
    terminal.type("\x04")
    assert await running == 0
    await terminal.until("closed: 1000 (OK)\r\n")
    assert re.search(r"\r\x1b\[J[\d:.]+ \* closed: 1000 \(OK\)\r\n$", terminal.output)


@pytest.mark.anyio
async def test_a_terminal_without_abilities_gets_lines_only(
    server: UvicornServer, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.show_output()
    monkeypatch.setenv("TERM", "dumb")
    running = asyncio.create_task(run(f"{server.ws}/echo"))
    await terminal.until("connected")
    terminal.type("hello\n")
    await terminal.until("< hello")
    terminal.type("\x04")
    assert await running == 0
    await terminal.until("closed: 1000 (OK)")
    assert "\x1b" not in terminal.output


@pytest.mark.anyio
async def test_a_terminal_that_is_gone_is_the_end_of_the_input(
    server: UvicornServer, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.StringIO()
    monkeypatch.setattr("sys.stdout", output)
    running = asyncio.create_task(run(f"{server.ws}/echo"))
    terminal.type("hello\n")
    async with asyncio.timeout(10):
        while "< hello" not in output.getvalue():
            await asyncio.sleep(0.01)
    terminal.hang_up()
    assert await running == 0
    assert lines(output.getvalue())[-1] == "* closed: 1000 (OK)"


# connect: the handshake


@pytest.mark.anyio
async def test_headers_and_origin_are_sent(
    server: UvicornServer, stdin: Pipe, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--header", "X-First: one", "--header", "X-Second:two: three ", "--origin", server.http]
    assert await run(f"{server.http}/headers", *given) == 0
    shown = lines(capsys.readouterr().out)
    assert shown[1:-1] == ["< x-first: one", "< x-second: two: three", f"< origin: {server.http}"]


@pytest.mark.anyio
async def test_the_agreed_subprotocol_is_shown(
    server: UvicornServer, stdin: Pipe, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin.end()
    assert await run(f"{server.ws}/echo", "--subprotocol", "chat.v1", "--subprotocol", "chat.v2") == 0
    assert lines(capsys.readouterr().out)[0] == "* connected, subprotocol chat.v2"


@pytest.mark.anyio
async def test_a_refusal_is_shown_in_one_line(
    server: UvicornServer, stdin: Pipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await run(f"{server.ws}/refuse") == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(r"asgi-ws: refused with 401 Unauthorized: first a token, \x1b[31mthen more more")
    assert shown.err.endswith("…\n")
    assert shown.err.count("\n") == 1
    assert len(shown.err) < 600


@pytest.mark.anyio
async def test_a_refusal_may_have_no_words(
    server: UvicornServer, stdin: Pipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await run(f"{server.ws}/refuse-without-words") == 1
    assert capsys.readouterr().err == "asgi-ws: refused with 401 Unauthorized\n"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_refused_connection_is_said_in_one_line(stdin: Pipe, capsys: pytest.CaptureFixture[str], host: str) -> None:
    url = f"ws://{host}:{free_port()}/chat"
    assert main(["connect", url]) == 1
    expected = f"asgi-ws: can't connect to {url}: connection refused: nothing listens there\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ws://name.invalid/", r"\S.*"),
        (f"ws://{'a' * 70}/", r".*label.*"),
        ("ws://user@127.0.0.1/", r".*password"),
    ],
)
def test_other_troubles_with_an_address_are_said_in_one_line(
    stdin: Pipe, capsys: pytest.CaptureFixture[str], url: str, why: str
) -> None:
    assert main(["connect", url]) == 1
    assert re.fullmatch(rf"asgi-ws: can't connect to {re.escape(url)}: {why}\n", capsys.readouterr().err)


def test_a_server_that_speaks_something_else_is_said_in_one_line(
    stdin: Pipe, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with listening.accept()[0] as other:
                other.recv(10_000)
                other.sendall(b"220 mail\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert main(["connect", f"ws://127.0.0.1:{listening.getsockname()[1]}"]) == 1
        thread.join(10)
    error = capsys.readouterr().err
    assert "can't connect" in error
    assert error.count("\n") == 1


# Arguments


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["connect"],
        ["connect", "localhost:8000/chat"],
        ["connect", "ftp://localhost"],
        ["connect", "ws://"],
        ["connect", "ws://:80/"],
        ["connect", "ws://localhost:99999/"],
        ["connect", "ws://localhost:0/"],
        ["connect", "ws://[::1/"],
        ["connect", "ws://localhost/#fragment"],
        ["connect", "ws://localhost/my room"],
        ["connect", "ws://localhost/\r\nX-Header: injected"],
        ["connect", "ws://localhost", "--subprotocol", "a b"],
        ["connect", "ws://localhost", "--subprotocol", ""],
        ["connect", "ws://localhost", "--header", "X-Header"],
        ["connect", "ws://localhost", "--header", "X Header: a"],
        ["connect", "ws://localhost", "--header", "X-Header: a\r\nX-Other: b"],
        ["connect", "ws://localhost", "--origin", "http://a\x1b"],
        ["demo", "--port", "http"],
        ["demo", "--port", "65536"],
        ["demo", "--port", "-1"],
        ["demo", "extra"],
    ],
)
def test_bad_arguments_are_said_in_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(r"asgi-ws( connect| demo)?: [^\x00-\x1f]+ \(see asgi-ws( connect| demo)? --help\)\n", shown.err)


@pytest.mark.parametrize("command", [[], ["demo"], ["connect"]])
def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage: asgi-ws" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"asgi-ws \d+\.\d+\.\S+\n", capsys.readouterr().out)


def test_it_runs_as_a_module(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["asgi_ws", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("asgi_ws", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("asgi-ws ")


def test_importing_the_module_runs_nothing() -> None:
    assert runpy.run_module("asgi_ws.__main__")["main"] is main


# demo


@pytest.fixture
def uvicorns_loggers() -> Iterator[None]:
    """uvicorn configures them for the whole process."""
    loggers = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")]
    before = [(logger, logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, propagate, handlers in before:
        logger.level, logger.propagate, logger.handlers = level, propagate, handlers


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_demo_serves_its_page_until_ctrl_c(
    capsys: pytest.CaptureFixture[str], uvicorns_loggers: None, host: str, shown: str
) -> None:
    if host == "::1" and not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    port = free_port()
    answers: list[tuple[int, bytes]] = []

    def visit() -> None:
        try:
            page = _when_it_listens(host, port)
            page.request("GET", "/")
            response = page.getresponse()
            answers.append((response.status, response.read()))
            page.close()
        finally:
            _interrupt_this()

    thread = threading.Thread(target=visit)
    thread.start()
    try:
        assert main(["demo", "--host", host, "--port", str(port)]) == 0
    finally:
        thread.join(20)
    [(status, body)] = answers
    assert status == 200
    assert b"<title>asgi_ws demo</title>" in body
    assert capsys.readouterr().out == f"The demo is at http://{shown}:{port}/ (Ctrl-C stops it)\n"


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def _when_it_listens(host: str, port: int) -> http.client.HTTPConnection:
    limit = time.monotonic() + 10
    while True:
        page = http.client.HTTPConnection(host, port, timeout=10)
        try:
            page.connect()
            return page
        except OSError:
            page.close()
            if time.monotonic() > limit:
                raise
            time.sleep(0.01)


@pytest.mark.anyio
async def test_demo_says_its_address_and_ends_with_ctrl_c() -> None:
    async with run_process(sys.executable, "-m", "asgi_ws", "demo", "--port", "{port}", ready="The demo is at") as demo:
        async with websockets.connect(f"{demo.ws}/chat/lobby", proxy=None) as client:
            demo.process.send_signal(signal.SIGINT)
            async with asyncio.timeout(10):
                await client.wait_closed()
            assert client.close_code == 1012
        assert await demo.wait() == 0
        assert "Traceback" not in demo.output


def test_a_taken_port_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 1
    expected = f"asgi-ws: can't listen on 127.0.0.1:{port}: the port is taken; choose another one with --port\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize("host", ["name.invalid", "192.0.2.1", "a" * 70])
def test_a_host_that_is_not_here_is_said_in_one_line(capsys: pytest.CaptureFixture[str], host: str) -> None:
    assert main(["demo", "--host", host, "--port", "0"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(rf"asgi-ws: can't listen on {host}:0: .+\n", shown.err)


@pytest.mark.parametrize("command", [["demo"], ["connect", "ws://localhost"]])
def test_a_missing_extra_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "websockets", None)
    assert main(command) == 1
    expected = 'asgi-ws: this needs websockets: pip install "asgi-ws-hub[standard]"\n'
    assert capsys.readouterr() == ("", expected)


# publish and watch


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> Bus:
    """What `bus://` is."""
    bus = Bus()
    monkeypatch.setattr("asgi_ws.hub.broker_for", lambda url: BusBroker(bus))
    return bus


class Heard:
    """What passes on a bus."""

    def __init__(self, bus: Bus) -> None:
        self.data: list[object] = []
        publish = bus.publish

        async def listen(channel: str, payload: Payload, sender: str | None, retention: Retention | None) -> object:
            self.data.append(payload.decode())
            return await publish(channel, payload, sender, retention)

        bus.publish = listen  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize(
    ("arguments", "data"),
    [
        (['{"a": 1}'], {"a": 1}),
        (["17"], 17),
        (['"17"'], "17"),
        (["hello"], "hello"),
        (["{"], "{"),
        (["--text", "17"], "17"),
    ],
)
def test_publish_sends_json_or_text(
    bus: Bus, capsys: pytest.CaptureFixture[str], arguments: list[str], data: object
) -> None:
    heard = Heard(bus)
    assert main(["publish", "bus://", "a", *arguments]) == 0
    assert heard.data == [data]
    assert capsys.readouterr().out == "published\n"


def test_publish_reads_the_standard_input_and_shows_the_position(
    bus: Bus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(bus.store.remember("rules", '[["a", 10, 60.0]]'))
    heard = Heard(bus)
    monkeypatch.setattr("sys.stdin", io.StringIO("[1,\n2]"))
    assert main(["publish", "bus://", "a", "-"]) == 0
    assert heard.data == [[1, 2]]
    position = Position.parse(capsys.readouterr().out.strip())
    assert position.offset == 1


@pytest.mark.parametrize("command", [["publish", "{url}", "{channel}", "1"], ["watch", "{url}", "{channel}"]])
@pytest.mark.parametrize(
    ("url", "channel", "words"),
    [
        ("memory://", "a", "is the memory of one process"),
        ("bus://", "", "a channel's name has 1 to 255 characters"),
    ],
)
def test_what_can_not_be_done_is_told_in_a_line(
    bus: Bus, capsys: pytest.CaptureFixture[str], command: list[str], url: str, channel: str, words: str
) -> None:
    assert main([word.format(url=url, channel=channel) for word in command]) == 1
    error = capsys.readouterr().err
    assert error.startswith("asgi-ws: ")
    assert words in error
    assert error.count("\n") == 1


def test_publish_says_when_it_may_not_have_gone_out(bus: Bus, capsys: pytest.CaptureFixture[str]) -> None:
    bus.fails = True
    assert main(["publish", "bus://", "a", "1"]) == 1
    assert capsys.readouterr().err == "asgi-ws: no answer\n"


def test_watch_begins_at_a_position(bus: Bus, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["watch", "bus://", "a", "--since", "never"])
    assert error.value.code == 2
    assert "not a position: 'never'" in capsys.readouterr().err


@pytest.mark.anyio
async def test_watch_shows_what_passes_until_the_hub_stops(bus: Bus, capsys: pytest.CaptureFixture[str]) -> None:
    await bus.store.remember("rules", '[["a", 3, 60.0]]')
    arguments = argparse.Namespace(url="bus://", channel="a", since=Position(7, "over"))
    watching = asyncio.create_task(_watch(arguments))
    out, err = "", ""

    async def until(words: str) -> None:
        nonlocal out, err
        async with asyncio.timeout(2):
            while words not in out + err:
                await asyncio.sleep(0.002)
                shown = capsys.readouterr()
                out, err = out + shown.out, err + shown.err

    await until("can't be had")
    position = await bus.publish("a", encode("one\x1b[31m"), None, Retention(3, 60))
    await until(f"{position} one\\x1b[31m\n")
    await bus.forget_all()
    bus.brokers[0].mend()
    await until("were lost; load its state anew")
    position = await bus.publish("a", encode(b"\x00\x01"), None, Retention(3, 60))
    await until(f"{position} (2 bytes) 00 01\n")
    watching.cancel()
    await asyncio.wait([watching])
    watching = asyncio.create_task(_watch(argparse.Namespace(url="bus://", channel="unkept", since=None)))
    async with asyncio.timeout(2):
        while not (bus.brokers and "unkept" in bus.brokers[0].subscribed):
            await asyncio.sleep(0)
    await bus.publish("unkept", encode({"a": 1}), None, None)
    await until('{"a":1}\n')
    assert out.endswith('\n{"a":1}\n')
    pubsub = bus.brokers[0]._deliver.__self__  # type: ignore[union-attr]
    for subscription in pubsub.subscriptions:
        subscription.end()
    await watching
    assert bus.brokers == []


@pytest.mark.parametrize("terminal", [io.StringIO(), io.TextIOWrapper(io.BytesIO(), "ascii")], ids=["text", "ascii"])
def test_watch_shows_whatever_the_terminal_can(monkeypatch: pytest.MonkeyPatch, terminal: typing.TextIO) -> None:
    async def show(arguments: argparse.Namespace) -> None:
        print("é", end="")

    monkeypatch.setattr("asgi_ws.cli._watch", show)
    monkeypatch.setattr("sys.stdout", terminal)
    assert main(["watch", "bus://", "a"]) == 0
    if isinstance(terminal, io.StringIO):
        assert terminal.getvalue() == "é"
    else:
        assert terminal.buffer.getvalue() == b"\\xe9"  # type: ignore[attr-defined]
