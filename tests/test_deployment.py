"""What `asgi-ws doctor` finds, and what it has no reason to."""

import importlib.metadata
import shlex
import sys
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.authentication import AuthenticationBackend
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.httpsredirect import HTTPSRedirectMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from asgi_ws import Broker, Hub, Limits, WebSocketMiddleware
from asgi_ws.deployment import SETTINGS, Application, Unusable, examine, load, read_command

OURS = "asgi-ws run main:app"


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("nobody calls it")


class Anybody(AuthenticationBackend):
    async def authenticate(self, conn: HTTPConnection) -> None:
        return None


class SendWrapper:
    """As `SessionMiddleware` does it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def wrapper(message: Any) -> None:
            await send(message)

        await self.app(scope, receive, wrapper)


class Hidden:
    """Keeps the application where nobody finds it."""

    def __init__(self, app: ASGIApp) -> None:
        self.hidden = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.hidden(scope, receive, send)


def in_front(app: ASGIApp) -> ASGIApp:
    """A function as middleware."""
    return SendWrapper(app)


def outermost(*middleware: Middleware, **options: Any) -> Starlette:
    return Starlette(middleware=[*middleware, Middleware(WebSocketMiddleware, hub=Hub(**options))])


def found(app: ASGIApp, *, command: str | None = None, workers: int | None = None, **hubs: Hub) -> list[str]:
    """What is found, in a few words each."""
    return [finding.what for finding in examine(Application(app, hubs), command, workers)]


# Where the middleware is


@pytest.mark.parametrize("make", [Starlette, FastAPI])
def test_middleware_that_is_outermost_is_right(make: Callable[[], Starlette]) -> None:
    app = make()
    app.add_middleware(SendWrapper)
    app.add_middleware(WebSocketMiddleware, hub=Hub())
    assert found(app) == []


@pytest.mark.parametrize(
    "app",
    [
        WebSocketMiddleware(bare, hub=Hub()),
        WebSocketMiddleware(WebSocketMiddleware(bare, hub=Hub()), hub=Hub()),
        Starlette(middleware=[Middleware(WebSocketMiddleware, Hub())]),
        WebSocketMiddleware(Starlette(routes=[Mount("/", Starlette())]), hub=Hub()),
    ],
)
def test_middleware_is_found_wherever_it_is(app: ASGIApp) -> None:
    assert found(app) == []


TRANSPARENT = [
    Middleware(AuthenticationMiddleware, backend=Anybody()),
    Middleware(BaseHTTPMiddleware, dispatch=None),
    Middleware(CORSMiddleware, allow_origins=["*"]),
    Middleware(GZipMiddleware),
    Middleware(HTTPSRedirectMiddleware),
    Middleware(TrustedHostMiddleware),
]


@pytest.mark.anyio
@pytest.mark.parametrize("middleware", TRANSPARENT, ids=lambda middleware: middleware.cls.__name__)
async def test_middleware_in_front_is_no_fault_when_send_passes_it_as_it_is(middleware: Middleware) -> None:
    sends: list[Send] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        sends.append(send)

    async def receive() -> Any: ...
    async def send(message: Any) -> None: ...

    scope = {"type": "websocket", "scheme": "wss", "path": "/", "headers": [(b"host", b"testserver")]}
    await middleware.cls(inner, *middleware.args, **middleware.kwargs)(scope, receive, send)
    assert sends == [send]
    assert found(outermost(middleware)) == []


@pytest.mark.parametrize(
    ("app", "name"),
    [
        (outermost(Middleware(SendWrapper)), "SendWrapper"),
        (outermost(Middleware(in_front)), "in_front"),
        (outermost(Middleware(GZipMiddleware), Middleware(SendWrapper), Middleware(SendWrapper)), "SendWrapper"),
        (SendWrapper(outermost()), "SendWrapper"),
        (SendWrapper(CORSMiddleware(WebSocketMiddleware(bare, hub=Hub()))), "SendWrapper"),
    ],
)
def test_middleware_behind_one_that_may_wrap_send_is_a_fault(app: ASGIApp, name: str) -> None:
    (what,) = found(app)
    assert what.startswith(f"WebSocketMiddleware is behind {name}")
    # Our class needs no `send` to be found.
    assert found(app, command=OURS) == []


def test_middleware_in_a_mounted_application_is_behind_the_framework() -> None:
    assert found(Starlette(routes=[Mount("/live", outermost())])) == ["WebSocketMiddleware is in a mounted application"]


def test_application_that_wraps_itself_is_looked_at_once() -> None:
    app = SendWrapper(bare)
    app.app = app
    assert found(app) == ["no WebSocketMiddleware has a hub"]


@pytest.mark.parametrize("app", [bare, Starlette(), Hidden(outermost())])
def test_hub_that_no_middleware_has_is_a_fault(app: ASGIApp) -> None:
    assert found(app) == ["no WebSocketMiddleware has a hub"]
    (finding,) = examine(Application(app, {"main.live": Hub()}))
    assert finding.what == "no WebSocketMiddleware has main.live"
    assert finding.fix == "app.add_middleware(WebSocketMiddleware, hub=live)"


def test_hub_that_is_served_has_no_fault_and_the_other_one_has() -> None:
    served, other = Hub(), Hub()
    app = WebSocketMiddleware(bare, hub=served)
    assert found(app, served=served) == []
    assert found(app, served=served, other=other) == ["no WebSocketMiddleware has other"]


# The hub


def test_limits_that_are_off_are_named() -> None:
    limits = Limits(message_size=None, connections=None, ping_interval=None)
    assert found(outermost(limits=limits)) == ["Limits(message_size=None, connections=None)"]
    (finding,) = examine(Application(outermost(limits=Limits(channels=None)), {}))
    assert finding.fix.startswith("leave it out")


@pytest.mark.parametrize(("origins", "fault"), [(None, False), (["https://a.example"], False), ("*", True)])
def test_origins_of_any_site_are_a_fault(origins: Any, fault: bool) -> None:
    assert found(outermost(allowed_origins=origins)) == ['allowed_origins="*"'] * fault


class Joining(Broker):
    """One that joins processes."""

    start = stop = publish = subscribe = unsubscribe = None  # type: ignore[assignment]


def test_memory_broker_joins_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)
    fault = ["2 workers with the memory broker"]
    assert found(outermost(), workers=1) == []
    assert found(outermost(), workers=2) == fault
    assert found(outermost(), command=f"{OURS} --workers 2") == fault
    assert found(outermost(), command=f"{OURS} --workers 2", workers=1) == []
    assert found(outermost(broker=Joining()), workers=2) == []
    monkeypatch.setenv("WEB_CONCURRENCY", "2")
    assert found(outermost()) == fault


# The command


@pytest.mark.parametrize(
    "command",
    [
        OURS,
        "exec /opt/venv/bin/asgi-ws run main:app --host 0.0.0.0",
        "python -m asgi_ws run --factory main:make",
        "uvicorn main:app --ws asgi_ws.uvicorn:WebSocketProtocol --timeout-graceful-shutdown 10",
        f"LEVEL=1 python -m uvicorn main:app --ws={SETTINGS['ws']} --timeout-graceful-shutdown=10 --ws-max-size 4096",
    ],
)
def test_command_with_our_class_has_no_fault(command: str) -> None:
    assert found(outermost(), command=command) == []


NO_CLASS = "no --ws asgi_ws.uvicorn:WebSocketProtocol"


@pytest.mark.parametrize("command", ["fastapi run main.py", "hypercorn main:app", "asgi-ws demo", ""])
def test_command_without_options_of_uvicorn_is_one_fault(command: str) -> None:
    assert read_command(command) is None
    assert found(outermost(), command=command) == [NO_CLASS]


@pytest.mark.parametrize(
    ("options", "faults"),
    [
        ("", ["compression", "--ws-max-size", "no --timeout"]),
        ("--timeout-graceful-shutdown 5", ["compression", "--ws-max-size"]),
        ("--ws wsproto --ws-per-message-deflate false", ["--ws-max-size", "no --timeout"]),
        ("--ws-max-size 1048576", ["compression", "no --timeout"]),
    ],
)
def test_command_with_another_class_has_the_faults_of_its_options(options: str, faults: list[str]) -> None:
    first, *others = found(outermost(), command=f"uvicorn main:app {options}")
    assert first == NO_CLASS
    assert len(others) == len(faults)
    assert all(what.startswith(fault) for what, fault in zip(others, faults, strict=True))


def test_command_without_a_graceful_end_has_a_fault_with_our_class_as_well() -> None:
    assert found(outermost(), command=shlex.join(["uvicorn", "a:b", "--ws", SETTINGS["ws"]])) == [
        "no --timeout-graceful-shutdown"
    ]


def test_largest_message_is_compared_with_the_limit_that_there_is() -> None:
    app = outermost(limits=Limits(message_size=None))
    assert found(app, command="uvicorn main:app --timeout-graceful-shutdown 5")[2:] == [
        "compression by uvicorn's class"
    ]


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("uvicorn 'main:app", "the command can't be read: No closing quotation"),
        ("uvicorn main:app --port http", "the command fails: Invalid value for '--port'"),
        ("asgi-ws run", "the command fails: Missing argument 'APP'"),
        ("uvicorn --version", "the command starts no server"),
    ],
)
def test_command_that_fails_cant_be_examined(command: str, why: str) -> None:
    with pytest.raises(Unusable, match=f"^{why}"):
        read_command(command)


def test_command_needs_uvicorn_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(Unusable, match="needs uvicorn"):
        read_command(OURS)


# The environment


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    versions = {"uvicorn": "0.52.1", "websockets": "15.0", "uvloop": "0.21", "httptools": "0.6"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("importlib.metadata.version", version)
    return versions


@pytest.mark.parametrize("version", ["0.52.1", "0.54.0", "1.0", "0.53.0rc1"])
def test_uvicorn_that_is_new_enough_is_right(installed: dict[str, str], version: str) -> None:
    installed["uvicorn"] = version
    assert found(outermost()) == []


@pytest.mark.parametrize("version", ["0.52.0", "0.9", "0.51.4"])
def test_uvicorn_that_is_old_is_a_fault(installed: dict[str, str], version: str) -> None:
    installed["uvicorn"] = version
    assert found(outermost()) == [f"uvicorn {version} is too old"]


@pytest.mark.parametrize("name", ["uvicorn", "websockets", "uvloop", "httptools"])
def test_what_isnt_installed_is_a_fault(installed: dict[str, str], name: str) -> None:
    del installed[name]
    (finding,) = examine(Application(outermost(), {}))
    assert finding.what == f"{name} isn't installed"
    assert finding.fix == 'pip install "asgi-ws-hub[standard]"'


# The application

hub = Hub()
app = WebSocketMiddleware(bare, hub=hub)
number = 3


class _Namespace:
    app = app


namespace = _Namespace


def make() -> ASGIApp:
    return app


def make_badly() -> ASGIApp:
    raise KeyError("SECRET")


@pytest.mark.parametrize("name", ["app", "namespace.app", "make"])
def test_application_is_imported_as_uvicorn_does(name: str) -> None:
    application = load(f"{__name__}:{name}")
    assert application.app is app
    assert application.hubs == {f"{__name__}.hub": hub}
    assert load(f"{__name__}:make", factory=True).app is app


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("main", "'main' isn't an application like main:app"),
        (":app", "':app' isn't an application like main:app"),
        ("no_such_module:app", ".* can't be imported: ModuleNotFoundError: .*"),
        (f"{__name__}:missing", ".* can't be imported: AttributeError: .*"),
        (f"{__name__}:make_badly", ".* can't be imported: KeyError: 'SECRET'"),
        (f"{__name__}:number", ".* isn't an ASGI application but of type int"),
    ],
)
def test_what_cant_be_imported_is_said(name: str, why: str) -> None:
    with pytest.raises(Unusable, match=f"^{why}$"):
        load(name)
