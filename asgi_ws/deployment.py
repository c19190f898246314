"""How an application is deployed: the settings of `asgi-ws run`, and what `asgi-ws doctor` looks for."""

import importlib
import importlib.metadata
import inspect
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.httpsredirect import HTTPSRedirectMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Mount
from starlette.types import ASGIApp

from asgi_ws.brokers import MemoryBroker
from asgi_ws.hub import Hub
from asgi_ws.limits import Limits
from asgi_ws.middleware import WebSocketMiddleware

__all__ = ["SETTINGS", "Application", "Finding", "Unusable", "examine", "load", "read_command"]

_CLASS = "asgi_ws.uvicorn:WebSocketProtocol"
SETTINGS = {"ws": _CLASS, "timeout_graceful_shutdown": round(Limits().drain_timeout)}
"""What `asgi-ws run` sets of uvicorn's options, unless the user does. uvloop, httptools and compression are uvicorn's
own defaults."""

_OLDEST_UVICORN = (0, 52, 1)
_HAS_UVLOOP = sys.platform != "win32" and platform.python_implementation() == "CPython"
_LOSSES = {
    "websockets": "uvicorn's own classes need it, and ours unmasks messages slowly without it",
    "httptools": "HTTP requests are parsed by slower Python code",
    **({"uvloop": "the event loop is Python's own, which is slower"} if _HAS_UVLOOP else {}),
}
_INSTALL = 'pip install "asgi-ws-hub[standard]"'
_LIMITS = ("message_size", "channels", "connections", "connections_per_address", "messages_per_second")
_TRANSPARENT = (
    AuthenticationMiddleware,
    BaseHTTPMiddleware,
    CORSMiddleware,
    GZipMiddleware,
    HTTPSRedirectMiddleware,
    TrustedHostMiddleware,
)
"""What hands a WebSocket's `send` on as it is."""
_INNER = ("app", "_app", "asgi_app", "other_asgi_app")
"""Where middleware keeps the application that it wraps."""


class Unusable(Exception):
    """There is nothing to examine; the words say why."""


class Finding(NamedTuple):
    """Something that a deployment lacks. As text, one line."""

    what: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}. Fix: {self.fix}"


class Application(NamedTuple):
    """An application, and the hubs that its module has by name."""

    app: ASGIApp
    hubs: Mapping[str, Hub]


# The application


def load(name: str, *, factory: bool = False) -> Application:
    """Import `module:attribute` as uvicorn does, and call it where it is a factory. Raises `Unusable`."""
    module_name, _, attributes = name.partition(":")
    if not module_name or not attributes:
        raise Unusable(f"{name!r} isn't an application like main:app")
    try:
        module = importlib.import_module(module_name)
        app: Any = module
        for attribute in attributes.split("."):
            app = getattr(app, attribute)
        if factory or _takes_nothing(app):
            app = app()
    except Exception as error:
        raise Unusable(f"{name} can't be imported: {type(error).__name__}: {error}") from error
    if not callable(app):
        raise Unusable(f"{name} isn't an ASGI application but of type {type(app).__name__}")
    hubs = {f"{module_name}.{key}": value for key, value in vars(module).items() if isinstance(value, Hub)}
    return Application(app, hubs)


def _takes_nothing(app: Any) -> bool:
    """Whether it can be called without arguments: then uvicorn takes it for a factory, flag or not."""
    try:
        inspect.signature(app).bind()
    except (TypeError, ValueError):
        return False
    return True


class _Served(NamedTuple):
    """A hub that an application serves, and what stands between it and the server."""

    hub: Hub
    before: tuple[type, ...]


def _served(app: Any, before: tuple[type, ...], seen: set[int]) -> Iterator[_Served]:
    """The hubs of all middleware that can be found from here."""
    if id(app) in seen:
        return
    seen.add(id(app))
    if isinstance(app, WebSocketMiddleware):
        yield _Served(app.hub, before)
        # What it wraps around `send` it unwraps itself, for another hub behind it.
        yield from _served(app.app, before, seen)
        return
    for middleware in getattr(app, "user_middleware", ()):
        kind: Any = middleware.cls
        if inspect.isclass(kind) and issubclass(kind, WebSocketMiddleware):
            yield _Served([*middleware.args, *middleware.kwargs.values()][0], before)
        else:
            before = (*before, kind)
    if hasattr(app, "user_middleware"):
        # Starlette's own, in front of every route.
        before = (*before, ExceptionMiddleware)
    for route in getattr(app, "routes", ()):
        if isinstance(route, Mount):
            yield from _served(route.app, before, seen)
    for name in _INNER:
        if callable(inner := getattr(app, name, None)):
            yield from _served(inner, (*before, type(app)), seen)


# The command


def read_command(command: str) -> Mapping[str, Any] | None:
    """The options that a command gives uvicorn, by their names; `None` when it doesn't start uvicorn itself.

    Raises `Unusable` for a command that fails.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise Unusable(f"the command can't be read: {error}") from error
    for number, word in enumerate(words):
        program, rest = PurePath(word).name, words[number + 1 :]
        if program == "uvicorn":
            return _options(rest, {})
        if program in ("asgi-ws", "asgi_ws") and rest[:1] == ["run"]:
            return _options(rest[1:], SETTINGS)
    return None


def _options(arguments: list[str], settings: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        import click
        import uvicorn
    except ImportError as error:
        raise Unusable(f"checking a command needs uvicorn: {_INSTALL}") from error
    try:
        return uvicorn.main.make_context("uvicorn", arguments, default_map=dict(settings)).params
    except click.ClickException as error:
        raise Unusable(f"the command fails: {' '.join(error.format_message().split())}") from error
    except click.exceptions.Exit as error:
        raise Unusable("the command starts no server") from error


# The findings


def examine(application: Application, command: str | None = None, workers: int | None = None) -> list[Finding]:
    """What the deployment of an application lacks. Raises `Unusable` for a command that fails."""
    served = list(_served(application.app, (), set()))
    hubs = list({id(entry.hub): entry.hub for entry in served}.values())
    options = None if command is None else read_command(command)
    ours = options is not None and options["ws"] == _CLASS
    if workers is None:
        workers = (options or {}).get("workers") or int(os.environ.get("WEB_CONCURRENCY") or 1)
    findings = [*_reached(application, hubs)]
    if not ours:
        findings += _hidden(served)
    for hub in hubs:
        findings += _of_hub(hub, workers)
    if command is not None:
        findings += _of_options(options, ours, hubs)
    return [*dict.fromkeys(findings), *_environment()]


def _reached(application: Application, hubs: list[Hub]) -> Iterator[Finding]:
    missed = [name for name, hub in application.hubs.items() if hub not in hubs]
    if missed or not hubs:
        yield Finding(
            f"no WebSocketMiddleware has {missed[0] if missed else 'a hub'}",
            "nobody starts the hub and answers for its endpoints",
            f"app.add_middleware(WebSocketMiddleware, hub={missed[0].rpartition('.')[2] if missed else 'hub'})",
        )


def _hidden(served: Iterable[_Served]) -> Iterator[Finding]:
    for entry in served:
        hiding = [kind for kind in entry.before if not (inspect.isclass(kind) and issubclass(kind, _TRANSPARENT))]
        if ExceptionMiddleware in hiding:
            yield Finding(
                "WebSocketMiddleware is in a mounted application",
                "what is in front of it wraps send, so without asgi_ws's class stuck clients aren't cut off",
                "add it to the outer application, or start with asgi-ws run",
            )
        elif hiding:
            names = ", ".join(getattr(kind, "__name__", str(kind)) for kind in hiding)
            yield Finding(
                f"WebSocketMiddleware is behind {names}",
                "where that wraps send, without asgi_ws's class stuck clients aren't cut off",
                "add WebSocketMiddleware last, which makes it outermost, or start with asgi-ws run",
            )


def _of_hub(hub: Hub, workers: int) -> Iterator[Finding]:
    if workers > 1 and isinstance(hub._broker, MemoryBroker):
        yield Finding(
            f"{workers} workers with the memory broker",
            "what one worker publishes, the clients of the others don't get",
            '--workers 1, or a broker for all of them: Hub("redis://localhost")',
        )
    limits = hub.context.limits
    off = [name for name in _LIMITS if getattr(limits, name) is None]
    if off:
        yield Finding(
            f"Limits({', '.join(f'{name}=None' for name in off)})",
            "a single client can take all there is",
            f"leave {'it' if len(off) == 1 else 'them'} out, the defaults are generous; or name a number",
        )
    if hub.context.origins.allows({"headers": [(b"origin", b"https://any.invalid"), (b"host", b"host.invalid")]}):
        yield Finding(
            'allowed_origins="*"',
            "pages of any site connect with your users' cookies",
            "leave it out for the same origin, or list the origins that may connect",
        )


def _of_options(options: Mapping[str, Any] | None, ours: bool, hubs: Iterable[Hub]) -> Iterator[Finding]:
    if not ours:
        yield Finding(
            f"no --ws {_CLASS}",
            "clients take about twice the memory, and their messages more processor time",
            f"start with asgi-ws run, or give uvicorn --ws {_CLASS}",
        )
    if options is None:
        return
    if not ours and options["ws_per_message_deflate"]:
        yield Finding(
            "compression by uvicorn's class",
            "it keeps some 35 KB for each client, and what asgi_ws sends isn't compressed there",
            f"--ws {_CLASS}, which compresses once for all, or --ws-per-message-deflate false",
        )
    sizes = [size for hub in hubs if (size := hub.context.limits.message_size) is not None]
    if not ours and sizes and options["ws_max_size"] > max(sizes):
        yield Finding(
            f"--ws-max-size is {options['ws_max_size']}",
            f"uvicorn takes so much into memory before Limits(message_size={max(sizes)}) can say no",
            f"--ws-max-size {max(sizes)}",
        )
    if options["timeout_graceful_shutdown"] is None:
        yield Finding(
            "no --timeout-graceful-shutdown",
            "one request that doesn't end keeps the server from stopping",
            f"--timeout-graceful-shutdown {SETTINGS['timeout_graceful_shutdown']}",
        )


def _environment() -> Iterator[Finding]:
    version = _version("uvicorn")
    if version is None:
        yield Finding("uvicorn isn't installed", "asgi-ws run needs it", _INSTALL)
    elif tuple(map(int, re.findall(r"\d+", version)[:3])) < _OLDEST_UVICORN:
        oldest = ".".join(map(str, _OLDEST_UVICORN))
        yield Finding(
            f"uvicorn {version} is too old",
            f"before {oldest} it buffers for slow clients without a limit",
            f'pip install "uvicorn[standard]>={oldest}"',
        )
    for name, loss in _LOSSES.items():
        if _version(name) is None:
            yield Finding(f"{name} isn't installed", loss, _INSTALL)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
