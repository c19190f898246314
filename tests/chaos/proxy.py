"""A proxy of our own between a hub and its server, that does what networks do."""

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator

__all__ = ["Proxy", "proxy"]


class Proxy:
    """Passes bytes on: late, in small pieces, not at all, or until it resets the connection."""

    def __init__(self, target: int) -> None:
        self.port = 0
        self.delay = 0.0
        self.slice = 0
        """The most bytes that pass at once; 0 for all."""
        self._target = target
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()

    def blackhole(self) -> None:
        """Nothing passes, and nobody hears of it."""
        self._open.clear()

    def heal(self) -> None:
        self._open.set()

    def reset(self) -> None:
        """Every connection ends with an RST."""
        for writer in list(self._writers):
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def drop(self) -> None:
        """Every connection is closed, with a FIN."""
        for writer in list(self._writers):
            writer.close()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        self._writers.add(upstream[1])
        tasks = [
            asyncio.create_task(self._pass(reader, upstream[1])),
            asyncio.create_task(self._pass(upstream[0], writer)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for each in (writer, upstream[1]):
                self._writers.discard(each)
                each.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._open.wait()
                if self.delay:
                    await asyncio.sleep(random.uniform(0, self.delay))
                size = self.slice or len(data)
                for begin in range(0, len(data), size):
                    writer.write(data[begin : begin + size])
                    await writer.drain()
                    if self.slice:
                        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def proxy(target: int) -> AsyncIterator[Proxy]:
    """One that runs."""
    it = Proxy(target)
    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(it.connected(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    it.port = server.sockets[0].getsockname()[1]
    try:
        yield it
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
