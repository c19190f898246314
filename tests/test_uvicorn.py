"""Which link is found from a server's `send`, and what is known of workers."""

import asyncio
import logging
import signal
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_ws.links import AsgiLink, Link
from asgi_ws.uvicorn import _TICKS, UvicornLink, WebSocketProtocol, _Tick, find_link, worker_count
from tests.e2e.clients import connect
from tests.servers import OURS, STOCK, serve, serve_with

pytestmark = pytest.mark.anyio


class Finder:
    """An application that looks for the link of each connection."""

    def __init__(self) -> None:
        self.links: list[Link] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.links.append(find_link(send, scope.get("extensions")))
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close"})


def wrapping(app: ASGIApp) -> ASGIApp:
    """A middleware that puts a `send` of its own in between, as many do."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def own_send(message: Message) -> None:
            await send(message)

        await app(scope, receive, own_send)

    return wrapped


@pytest.mark.parametrize("ws", STOCK)
async def test_frames_go_to_the_transport_of_both_of_uvicorns_classes(ws: str) -> None:
    finder = Finder()
    async with serve(finder, ws=ws, lifespan="off") as address, connect(address.ws):
        pass
    assert [type(link) for link in finder.links] == [UvicornLink]


@pytest.mark.parametrize("front", [lambda app: app, wrapping], ids=["alone", "behind a middleware"])
async def test_our_own_class_is_the_link_itself(front: Callable[[ASGIApp], ASGIApp]) -> None:
    finder = Finder()
    async with serve(front(finder), ws=OURS, lifespan="off") as address, connect(address.ws):
        pass
    assert [type(link) for link in finder.links] == [WebSocketProtocol]


async def test_proxy_headers_do_not_hide_the_transport() -> None:
    finder = Finder()
    async with serve(finder, proxy_headers=True, lifespan="off") as address, connect(address.ws):
        pass
    assert [type(link) for link in finder.links] == [UvicornLink]


async def test_send_that_is_wrapped_is_used_as_it_is() -> None:
    finder = Finder()
    async with serve(wrapping(finder), lifespan="off") as address, connect(address.ws):
        pass
    assert [type(link) for link in finder.links] == [AsgiLink]


async def test_other_servers_send_is_used_as_it_is() -> None:
    finder = Finder()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await finder(scope, receive, send)

    async with serve_with("hypercorn", app) as address, connect(address.ws):
        pass
    assert [type(link) for link in finder.links] == [AsgiLink]


def other_version(**attributes: Any) -> Any:
    """uvicorn's class as it may be one day: what was there is elsewhere."""

    async def send(self: Any, message: Message) -> None: ...

    members = {"__module__": "uvicorn.protocols.websockets.wsproto_impl", "send": send, **attributes}
    return type("WSProtocol", (), members)()


@pytest.mark.parametrize(
    "attributes",
    [{}, {"transport": object()}, {"writable": True, "transport": object()}],
    ids=["none", "some", "other"],
)
async def test_version_that_is_not_known_is_written_to_through_asgi(
    attributes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "asgi_ws")
    protocol = other_version(**{"writable": asyncio.Event(), **attributes})
    assert type(find_link(protocol.send)) is AsgiLink
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "WSProtocol" in record.message


async def test_class_that_only_has_the_same_name_is_not_taken_for_uvicorns(caplog: pytest.LogCaptureFixture) -> None:
    class WSProtocol:
        async def send(self, message: Message) -> None: ...

    caplog.set_level(logging.DEBUG, "asgi_ws")
    assert type(find_link(WSProtocol().send)) is AsgiLink
    assert caplog.records == []


# Workers


async def nothing(scope: Scope, receive: Receive, send: Send) -> None: ...


def handled_by(handler: Any) -> int:
    before = signal.signal(signal.SIGTERM, handler)
    try:
        return worker_count()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_are_those_of_the_server_that_handles_sigterm(workers: int) -> None:
    server = uvicorn.Server(uvicorn.Config(nothing, workers=workers, log_config=None))
    assert handled_by(server.handle_exit) == workers


@pytest.mark.parametrize(
    "handler", [signal.SIG_DFL, lambda *_: None, signal.Handlers], ids=["default", "function", "class"]
)
def test_there_is_one_worker_where_no_uvicorn_runs(handler: Any) -> None:
    assert handled_by(handler) == 1


def test_there_is_one_worker_where_uvicorn_does_not_say_how_many() -> None:
    server = uvicorn.Server(uvicorn.Config(nothing, log_config=None))
    server.config = None  # type: ignore[assignment]
    assert handled_by(server.handle_exit) == 1


async def test_writing_waits_while_clients_are_heard_but_not_for_long() -> None:
    """What several clients, or one in several pieces, make the application say leaves together."""
    flushed = asyncio.Event()

    class Recording:
        def flush(self) -> None:
            flushed.set()

    tick = _Tick()
    tick.add(Recording())  # type: ignore[arg-type]
    for _ in range(_TICKS):
        tick.heard = True
        await asyncio.sleep(0)
        assert not flushed.is_set()
    tick.heard = True
    await asyncio.sleep(0)
    assert flushed.is_set()
