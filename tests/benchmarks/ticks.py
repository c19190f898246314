"""The server that `stalled` measures: it publishes to everybody at a steady rate, and notes when it has lost whom.

`python -m tests.benchmarks.ticks PORT WRITE_TIMEOUT`
"""

import asyncio
import dataclasses
import sys
import time

import uvicorn
from starlette.applications import Starlette

from asgi_ws import Connection, Hub, Limits, WebSocketMiddleware
from asgi_ws.uvicorn import WebSocketProtocol
from tests.servers import listen

__all__ = ["SNDBUF", "Plan", "Report"]

SNDBUF = 16384
"""What the kernel may keep for one client. By itself it would keep megabytes, and nobody would ever be behind."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What is published, and who is expected: so many clients altogether, and those that won't read."""

    listeners: int
    messages: int
    per_second: float
    size: int
    stalled: list[int]
    """Their ports, by which the server knows them."""
    patience: float
    """For how many seconds the server waits for their end, behind the last message."""


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    due: list[float]
    """When each message was to be published, by the system's clock that never goes back. What is published late, since
    the server was busy, arrives late."""
    gone: dict[int, tuple[float, int]]
    """When the connection of which port was lost, and how many bytes the kernel had taken for it until then."""


gone: dict[int, tuple[float, int]] = {}


class NotingProtocol(WebSocketProtocol):
    """Ours, and notes when the last that the server has of a client is gone."""

    __slots__ = ("_port", "_taken")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._port = transport.get_extra_info("peername")[1]
        self._taken = 0

    def abort(self) -> None:
        self._taken = self.written - self.buffered
        super().abort()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        gone[self._port] = time.monotonic(), self._taken


def application(write_timeout: float) -> Starlette:
    hub = Hub(limits=Limits(write_timeout=write_timeout))
    app = Starlette()
    app.add_middleware(WebSocketMiddleware, hub=hub)
    listeners = 0

    @hub.websocket("/ticks")
    async def ticks(conn: Connection) -> None:
        nonlocal listeners
        await conn.subscribe("ticks")
        listeners += 1
        async for _ in conn:
            pass

    @hub.websocket("/plan")
    async def carry_out(conn: Connection[Plan, Report]) -> None:
        plan = await conn.receive()
        text = "x" * plan.size
        # Who is the last to subscribe has a moment behind the handshake.
        while listeners < plan.listeners:
            await asyncio.sleep(0.01)
        begin = time.monotonic()
        due = [begin + number / plan.per_second for number in range(plan.messages)]
        for moment in due:
            await asyncio.sleep(max(moment - time.monotonic(), 0))
            await hub.publish("ticks", text)
        patience = time.monotonic() + plan.patience
        while time.monotonic() < patience and not gone.keys() >= set(plan.stalled):
            await asyncio.sleep(0.01)
        await conn.send(Report(due, {port: gone[port] for port in plan.stalled if port in gone}))

    return app


def main(port: int, write_timeout: float) -> None:
    # No pings of the server's: what ends a client here is that it takes nothing.
    config = uvicorn.Config(
        application(write_timeout), ws=NotingProtocol, ws_ping_interval=None, access_log=False, log_level="info"
    )
    with listen(port, sndbuf=SNDBUF) as listening:
        # Before uvicorn does, which says nothing then: who comes early waits.
        listening.listen(2048)
        uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
