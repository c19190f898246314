"""The command `asgi-ws`. Each of its commands is one function, and one block of `_parser`."""

import argparse
import asyncio
import contextlib
import datetime
import errno
import importlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import socket
import sys
import threading
import typing
import unicodedata
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, TextIO

from asgi_ws import deployment, outside
from asgi_ws.exceptions import AsgiWsError, InvalidPosition, PublicationsLost
from asgi_ws.hub import Hub
from asgi_ws.messages import Position

if typing.TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection
    from websockets.http11 import Response

__all__ = ["main"]

_QUIET = 1.0
"""How many seconds a server has said nothing when `connect`, whose input has ended, doesn't wait for it any more."""
_CLOSE_TIMEOUT = 5.0
"""How many seconds a server has to answer a close frame."""
_LARGEST_MESSAGE = 64 * 1024 * 1024
_SHOWN_BYTES = 64
"""How much of a binary message is shown."""
_SHOWN_BODY = 500
"""How many characters are shown of the response that refuses a handshake."""

_SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)
"""RFC 9110 section 5.6.2."""

# What moves the cursor, ends a line, or makes a line read in another order than it was sent.
_UNPRINTABLE = [
    *range(0x20),
    *range(0x7F, 0xA0),
    0x061C,
    0x200E,
    0x200F,
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
]
_ESCAPES = {code: repr(chr(code))[1:-1] for code in _UNPRINTABLE}


class CommandFailed(Exception):
    """A command can't do what it was asked for; its words are all that the user sees."""

    def __init__(self, words: str, code: int = 1) -> None:
        super().__init__(words)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the process's exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.error("a command is needed")
    try:
        code: int = arguments.command(arguments)
        sys.stdout.flush()
    except CommandFailed as failed:
        print(f"asgi-ws: {_escape(str(failed))}", file=sys.stderr)
        return failed.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone, as `head` does. Python flushes once more at its exit, and must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="asgi-ws", description="The realtime layer for ASGI applications.", allow_abbrev=False)
    parser.set_defaults(command=None)
    parser.add_argument(
        "--version", action="store_const", dest="command", const=version, help="show the version and exit"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    block = commands.add_parser(
        "demo", help="start the demo application", description="Start the demo application: a chat and a live chart."
    )
    block.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    block.add_argument("--port", type=_port, default=8000, help="0 is any free one (default: %(default)s)")
    block.set_defaults(command=demo)

    block = commands.add_parser(
        "connect",
        help="talk to a WebSocket server",
        description="Send the lines that you type, or those of a pipe, to a WebSocket server, and show what it sends. "
        f"Ctrl-C or the end of the input closes the connection; behind a pipe, when nothing came for {_QUIET:g} s.",
        epilog="The exit code is 0 when the connection ends with code 1000, 1001 or 1005.",
    )
    block.add_argument("url", metavar="URL", type=_url, help="ws://, wss://, http:// or https://")
    block.add_argument(
        "--subprotocol", metavar="NAME", type=_subprotocol, action="append", help="offer one; may be repeated"
    )
    block.add_argument(
        "--header", metavar="'NAME: VALUE'", type=_header, action="append", help="add one; may be repeated"
    )
    block.add_argument("--origin", metavar="URL", type=_header_value, help="be a page of this origin")
    block.set_defaults(command=connect)

    block = commands.add_parser(
        "publish",
        help="publish to a channel from outside",
        description="Publish one thing to a channel of the applications whose hubs have this broker.",
    )
    _add_channel(block)
    block.add_argument("data", metavar="DATA", help="JSON, or any other text; - reads it from the standard input")
    block.add_argument("--text", action="store_true", help="it is text, even if it looks like JSON")
    block.set_defaults(command=publish)

    block = commands.add_parser(
        "watch",
        help="show what is published to a channel",
        description="Show what is published to a channel, until Ctrl-C: the position, where the channel has a history, "
        "and the data.",
    )
    _add_channel(block)
    block.add_argument("--since", metavar="POSITION", type=_position, help="begin behind this one")
    block.set_defaults(command=watch)

    # What follows is for uvicorn, options and all: here, nothing looks like an option.
    block = commands.add_parser(
        "run", help="serve an application with uvicorn and asgi_ws's WebSocket class", prefix_chars="\0", add_help=False
    )
    block.add_argument("options", nargs=argparse.REMAINDER)
    block.set_defaults(command=run)

    block = commands.add_parser(
        "doctor",
        help="say what the deployment of an application lacks",
        description="Import an application and say what its deployment lacks, one line each, with the fix.",
        epilog="The exit code is 0 when nothing is found.",
    )
    block.add_argument("app", metavar="APP", help="as for uvicorn: main:app")
    block.add_argument("--factory", action="store_true", help="APP is a function that returns the application")
    block.add_argument("--app-dir", metavar="DIR", default="", help="look for APP there (default: this directory)")
    block.add_argument("--workers", metavar="N", type=_count, help="how many processes there will be")
    block.add_argument("--command", metavar="'uvicorn ...'", dest="server", help="check what starts the server, too")
    block.set_defaults(command=doctor)

    return parser


# Commands


def version(arguments: argparse.Namespace) -> int:
    """Print the installed version."""
    print(f"asgi-ws {importlib.metadata.version('asgi-ws-hub')}")
    return 0


def demo(arguments: argparse.Namespace) -> int:
    """Serve the demo application until it is interrupted."""
    uvicorn = _standard("uvicorn")
    _standard("websockets")
    # Ours, not uvicorn's: it would log a whole startup before it says that the port is taken.
    with _listen(arguments.host, arguments.port) as listening:
        host, port = listening.getsockname()[:2]
        print(f"The demo is at http://{f'[{host}]' if ':' in host else host}:{port}/ (Ctrl-C stops it)", flush=True)
        settings = {**deployment.SETTINGS, "timeout_graceful_shutdown": 5}
        config = uvicorn.Config("asgi_ws.demo:app", log_level="warning", **settings)
        # That it was interrupted is how it ends.
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])
    return 0


def connect(arguments: argparse.Namespace) -> int:
    """Send lines and show messages until either side closes."""
    _standard("websockets")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A server may send what this terminal has no character for.
        sys.stdout.reconfigure(errors="backslashreplace")
    return asyncio.run(_connect(arguments))


def publish(arguments: argparse.Namespace) -> int:
    """Publish, and show the position."""
    text = sys.stdin.read().removesuffix("\n") if arguments.data == "-" else arguments.data
    with _broker_troubles():
        position = outside.publish(arguments.url, arguments.channel, text if arguments.text else _data(text))
    print("published" if position is None else position)
    return 0


def watch(arguments: argparse.Namespace) -> int:
    """Show publications until it is interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with _broker_troubles():
        asyncio.run(_watch(arguments))
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Serve an application with uvicorn. All options are uvicorn's own; some have better defaults."""
    uvicorn = _standard("uvicorn")
    import click

    try:
        # By this way the user's options win, those in the environment as well, and --help shows these defaults.
        context = uvicorn.main.make_context("asgi-ws run", arguments.options, default_map=dict(deployment.SETTINGS))
        with context:
            _check_port(context.params)
            uvicorn.main.invoke(context)
    except click.ClickException as error:
        words = " ".join(error.format_message().split()).removesuffix(".")
        raise CommandFailed(f"{words} (see asgi-ws run --help)", error.exit_code) from error
    except click.exceptions.Exit as shown:  # --help, --version
        return shown.exit_code
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Say what an application's deployment lacks."""
    sys.path.insert(0, arguments.app_dir)
    try:
        application = deployment.load(arguments.app, factory=arguments.factory)
        findings = deployment.examine(application, arguments.server, arguments.workers)
    except deployment.Unusable as unusable:
        raise CommandFailed(str(unusable)) from unusable
    count = {0: "nothing is missing", 1: "1 finding"}.get(len(findings), f"{len(findings)} findings")
    print(f"{arguments.app}: {count}")
    for finding in findings:
        print(f"- {finding}")
    if arguments.server is None:
        # What it doesn't see is the command line.
        options = [f"--app-dir {shlex.quote(arguments.app_dir)}"] if arguments.app_dir else []
        options += ["--factory"] if arguments.factory else []
        options += [f"--workers {arguments.workers}"] if arguments.workers else []
        print(" ".join(["Start it with: asgi-ws run", arguments.app, *options]))
    return 1 if findings else 0


# Arguments


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_escape(message)} (see {self.prog} --help)\n")


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a port; give a number from 0 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number from 1")
    return int(text)


def _url(text: str) -> str:
    try:
        url = urllib.parse.urlsplit(text)
        right = url.scheme in _SCHEMES and url.hostname and url.port != 0 and not re.search(r"[\s\0-\x1f\x7f#]", text)
    except ValueError:
        right = False
    if not right:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a URL like ws://localhost:8000/chat/lobby")
    return url._replace(scheme=_SCHEMES[url.scheme]).geturl()


def _subprotocol(text: str) -> str:
    if not _TOKEN.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} can't be the name of a subprotocol")
    return text


def _header(text: str) -> tuple[str, str]:
    name, found, value = text.partition(":")
    if not found or not _TOKEN.fullmatch(name):
        raise argparse.ArgumentTypeError(f"{text!r} isn't a header like 'Name: value'")
    return name, _header_value(value.strip())


def _header_value(text: str) -> str:
    if not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} can't be the value of a header")
    return text


# demo and run


def _add_channel(block: argparse.ArgumentParser) -> None:
    block.add_argument("url", metavar="URL", help="the broker's, for example redis://localhost")
    block.add_argument("channel", metavar="CHANNEL")


def _position(text: str) -> Position:
    try:
        return Position.parse(text)
    except InvalidPosition as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _data(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@contextlib.contextmanager
def _broker_troubles() -> Iterator[None]:
    try:
        yield
    except (AsgiWsError, ImportError, TypeError, ValueError) as error:
        raise CommandFailed(str(error)) from error


async def _watch(arguments: argparse.Namespace) -> None:
    outside.check_url(arguments.url)
    since = arguments.since
    async with Hub(arguments.url, wait=True) as hub:
        while True:
            try:
                async with hub.subscribe(arguments.channel, since=since) as publications:
                    if since is not None and not publications.recovery.recovered:
                        print("* what was published since then can't be had", file=sys.stderr, flush=True)
                    async for publication in publications:
                        position = publication.position
                        words = _escape(_shown(publication.payload.data))
                        print(words if position is None else f"{position} {words}", flush=True)
                    return
            except PublicationsLost as lost:
                since = None
                print(f"* {lost}", file=sys.stderr, flush=True)


def _standard(name: str) -> Any:
    """A module that comes with the extra `standard`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CommandFailed(f'this needs {name}: pip install "asgi-ws-hub[standard]"') from error


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        why = "the port is taken; choose another one with --port" if _is(error, errno.EADDRINUSE) else _words(error)
        raise CommandFailed(f"can't listen on {host}:{port}: {why}") from error


def _check_port(options: Mapping[str, Any]) -> None:
    """uvicorn would start the application before it says that the port is taken."""
    if options["uds"] is None and options["fd"] is None:
        try:
            _listen(options["host"], options["port"]).close()
        except CommandFailed as failed:
            # Other troubles are uvicorn's to tell: it takes more hosts than one.
            if _is(failed.__cause__, errno.EADDRINUSE):
                raise


def _is(error: BaseException | None, code: int) -> bool:
    """Whether this is why; asyncio has only text of several attempts that failed."""
    return getattr(error, "errno", None) == code or f"[Errno {code}]" in str(error)


def _words(error: Exception) -> str:
    """An operating system's error without its number."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# connect


async def _connect(arguments: argparse.Namespace) -> int:
    from websockets.exceptions import ConnectionClosed

    async with await _handshake(arguments) as websocket:
        screen = _Screen(sys.stdin, sys.stdout)
        screen.show("*", "connected" + (f", subprotocol {websocket.subprotocol}" if websocket.subprotocol else ""))
        heard = asyncio.Event()

        async def receive() -> None:
            with contextlib.suppress(ConnectionClosed):
                while True:
                    screen.show("<", _shown(await websocket.recv()))
                    heard.set()

        async def send() -> None:
            with contextlib.suppress(ConnectionClosed, TimeoutError):
                while (line := await screen.read()) is not None:
                    await websocket.send(line)
                    screen.show(">", line)
                while not screen.interactive:
                    # The answers to what came out of the pipe are on their way.
                    heard.clear()
                    await asyncio.wait_for(heard.wait(), _QUIET)

        receiving, sending = asyncio.create_task(receive()), asyncio.create_task(send())
        with contextlib.suppress(asyncio.CancelledError):  # Ctrl-C: as good a way to leave as any
            await asyncio.wait([receiving, sending], return_when=asyncio.FIRST_COMPLETED)
        sending.cancel()
        await websocket.close()
        # `receive` ends behind the last message.
        await asyncio.wait([receiving, sending])
        for task in (receiving, sending):
            if not task.cancelled():
                task.result()
    code = websocket.close_code
    screen.show("*", f"closed: {_close(code, websocket.close_reason)}", last=True)
    return 0 if code in (1000, 1001, 1005) else 1


async def _handshake(arguments: argparse.Namespace) -> "ClientConnection":
    from websockets.asyncio.client import connect
    from websockets.exceptions import InvalidStatus, WebSocketException

    try:
        return await connect(
            arguments.url,
            origin=arguments.origin,
            subprotocols=arguments.subprotocol,
            additional_headers=arguments.header,
            close_timeout=_CLOSE_TIMEOUT,
            max_size=_LARGEST_MESSAGE,
        )
    except InvalidStatus as error:
        raise CommandFailed(_refusal(error.response)) from error
    except (OSError, ValueError, WebSocketException) as error:
        why = "connection refused: nothing listens there" if _is(error, errno.ECONNREFUSED) else _words(error)
        raise CommandFailed(f"can't connect to {arguments.url}: {why}") from error


def _refusal(response: "Response") -> str:
    body = " ".join(bytes(response.body or b"").decode(errors="replace").split())
    if len(body) > _SHOWN_BODY:
        body = body[:_SHOWN_BODY] + "…"
    return f"refused with {response.status_code} {response.reason_phrase}" + (f": {body}" if body else "")


def _close(code: int | None, reason: str | None) -> str:
    from websockets.frames import Close

    if code is None or code == 1006:
        return "1006 (the connection was lost)"
    return str(Close(code, reason or ""))


def _shown(message: str | bytes) -> str:
    if isinstance(message, str):
        return message
    cut = "…" if len(message) > _SHOWN_BYTES else ""
    return f"({len(message)} bytes) {message[:_SHOWN_BYTES].hex(' ')}{cut}"


def _escape(text: str) -> str:
    """On a terminal, the text does nothing but stand there."""
    return text.translate(_ESCAPES)


class _Screen:
    """Lines of input and lines of output, which on a terminal are the same screen."""

    def __init__(self, source: TextIO | None, target: TextIO) -> None:
        self.interactive = source is not None and source.isatty()
        self._target = target
        # A reader of our own: Python would lock the one of `sys.stdin` at its exit, while a thread still waits in it.
        self._source: TextIO = io.StringIO()
        if source is not None:
            self._source = os.fdopen(source.fileno(), encoding=source.encoding, errors="replace", closefd=False)
        self._shared = self.interactive and target.isatty() and os.environ.get("TERM", "dumb") != "dumb"

    def show(self, direction: str, text: str, *, last: bool = False) -> None:
        """Print a line, with the time; the last one where somebody may have been typing."""
        line = f"{datetime.datetime.now():%H:%M:%S.%f}"[:-3] + f" {direction} {_escape(text)}"
        if self._shared and last:
            line = f"\r\x1b[J{line}\n"
        elif self._shared:
            # Keep the cursor where somebody may be typing; make room above that, print there, and come back.
            rows = -(-_width(line) // shutil.get_terminal_size().columns)
            line = "\x1b7" + "\n" * rows + f"\x1b[{rows}A\x1b[{rows}L\r{line}\n\x1b8\x1b[{rows}B"
        else:
            line += "\n"
        self._target.write(line)
        self._target.flush()

    async def read(self) -> str | None:
        """The next line that is typed or comes out of the pipe; `None` behind the last."""
        loop = asyncio.get_running_loop()
        lines: asyncio.Queue[str] = asyncio.Queue()

        def read() -> None:
            line = ""
            with contextlib.suppress(OSError):  # the terminal is gone
                line = self._source.readline()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(lines.put_nowait, line)

        # A read can't be given up. A thread that is left behind in one must not keep the process from ending.
        threading.Thread(target=read, daemon=True).start()
        line = await lines.get()
        return line.rstrip("\r\n") if line else None


def _width(line: str) -> int:
    """How many columns a terminal needs."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)
