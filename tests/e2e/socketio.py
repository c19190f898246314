"""Node's `socket.io-client`, unchanged, and an application for it."""

import asyncio
import contextlib
import json
import subprocess
from collections.abc import AsyncIterator
from typing import Any

from tests.e2e.node import HERE, node


class NodeSocket:
    """A socket of `socket.io-client`."""

    def __init__(self, sockets: "NodeSockets", name: str) -> None:
        self._sockets = sockets
        self.name = name
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.upgraded = asyncio.Event()
        """Whether it has moved to a WebSocket; that comes at any time."""

    async def said(self, kind: str) -> dict[str, Any]:
        """The next that the client says, which has to be of this kind."""
        event = await asyncio.wait_for(self.events.get(), 15)
        assert event["event"] == kind, event
        return event

    async def event(self) -> list[Any]:
        """The next event's name and arguments."""
        return (await self.said("event"))["args"]  # type: ignore[no-any-return]

    def emit(self, *args: Any, ack: bool = False) -> None:
        self.do("emit", args=args, ack=ack)

    async def call(self, *args: Any) -> list[Any]:
        """What the server acknowledges an event with."""
        self.emit(*args, ack=True)
        return (await self.said("ack"))["args"]  # type: ignore[no-any-return]

    def do(self, command: str, **options: Any) -> None:
        self._sockets.command(do=command, name=self.name, **options)


class NodeSockets:
    """A process of Node with sockets."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._sockets: dict[str, NodeSocket] = {}

    def open(
        self,
        url: str,
        *,
        namespace: str = "/",
        auth: Any = None,
        manager: str | None = None,
        path: str = "/socket.io/",
        **options: Any,
    ) -> NodeSocket:
        """A socket; those of one `manager` share a connection."""
        socket = NodeSocket(self, f"socket {len(self._sockets)}")
        self._sockets[socket.name] = socket
        socket.do(
            "open",
            manager=manager or socket.name,
            url=url,
            options={"path": path, "forceNew": True, **options},
            namespace=namespace,
            auth=auth or {},
        )
        return socket

    def command(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command, default=_to_hex).encode() + b"\n")

    async def read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            event = json.loads(line, object_hook=_from_hex)
            socket = self._sockets[event.pop("socket")]
            if event["event"] == "upgrade":
                socket.upgraded.set()
            else:
                socket.events.put_nowait(event)


@contextlib.asynccontextmanager
async def node_sockets() -> AsyncIterator[NodeSockets]:
    """Sockets of `socket.io-client`, in a process that ends with the block."""
    process = await asyncio.create_subprocess_exec(
        *(node("socket.io-client"), str(HERE / "socketio.mjs")),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        limit=16 * 1024 * 1024,
    )
    sockets = NodeSockets(process)
    reader = asyncio.create_task(sockets.read())
    try:
        yield sockets
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 5)
        except TimeoutError:
            process.kill()
            await process.wait()
        await reader


def _to_hex(value: bytes) -> dict[str, str]:
    return {"$hex": value.hex()}


def _from_hex(value: dict[str, Any]) -> Any:
    return bytes.fromhex(value["$hex"]) if "$hex" in value else value
