"""Connections to Redis that many share: what they send leaves in batches, and the answers come back in order."""

import asyncio
import contextlib
import itertools
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio.connection import Connection
from redis.exceptions import ResponseError

from asgi_ws.brokers.redis_servers import ERRORS, Servers

__all__ = ["COMMAND_TIMEOUT", "Lines", "Link", "SubscriberLink", "words"]

COMMAND_TIMEOUT = 5.0
"""How long an answer may take in all."""
PATIENCE = 1.0
"""How long a command waits for a link that is being made again."""

_TICK = 0.5
_SILENCE = 3.0
"""How long a server that owes an answer may say nothing; a link that is idle is asked for one each second."""
_BATCH = 64 * 1024
_FIRST_DELAY, _LAST_DELAY = 0.02, 1.0

_logger = logging.getLogger("asgi_ws.brokers")


def words(error: BaseException) -> str:
    """What an error says, or at least what it is."""
    return str(error) or type(error).__name__


class _Call:
    """A command on its way, and how many replies there will be."""

    __slots__ = ("command", "future", "replies", "tick")

    def __init__(
        self, command: tuple[Any, ...], future: "asyncio.Future[Any] | None", tick: float, replies: int
    ) -> None:
        self.command = command
        self.future = future
        self.tick = tick
        self.replies = replies

    def fail(self, error: Exception) -> None:
        if self.future is not None and not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # whoever waited may be about to be cancelled


class Link:
    """One connection, for all. Entered it reads, writes and watches, until one of these fails; then all that is waited
    for fails. Whoever stops waiting leaves no reply to the next: the reply is read, and thrown away.
    """

    run = ""
    """The server's run id, where somebody has asked for it."""
    durable = False
    """Whether the server comes back with all that it has ever confirmed."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._unsent: deque[_Call] = deque()
        self._unanswered: deque[_Call] = deque()
        self._wake = asyncio.Event()
        self._ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self._ticks = 0
        self._heard = False

    @property
    def alive(self) -> bool:
        """Whether commands can still be given to it."""
        return not self._ended.done()

    def call(self, *command: Any, replies: int = 1) -> "asyncio.Future[Any]":
        """Send a command; its answer, or one of `ERRORS`, comes by the future, which may be cancelled."""
        if not self.alive:
            raise ConnectionError("the link is lost")
        future = asyncio.get_running_loop().create_future()
        self._unsent.append(_Call(command, future, self._ticks, replies))
        self._wake.set()
        return future

    def tell(self, *command: Any, replies: int = 1) -> None:
        """Send a command whose answer nobody waits for."""
        self._unsent.append(_Call(command, None, self._ticks, replies))
        self._wake.set()

    async def ended(self) -> Exception:
        """Wait for the link's end; why it came."""
        return await asyncio.shield(self._ended)

    def end(self, error: Exception) -> None:
        """Give the link up, and all that is waited for."""
        if self._ended.done():
            return
        self._ended.set_result(error)
        for call in (*self._unanswered, *self._unsent):
            lost = ConnectionError(f"the link was lost: {words(error)}")
            lost.__cause__ = error
            call.fail(lost)
        self._unanswered.clear()
        self._unsent.clear()

    async def __aenter__(self) -> "Link":
        for work in (self._read(), self._write(), self._watch()):
            self._tasks.append(asyncio.create_task(self._until_error(work)))
        return self

    async def __aexit__(self, *error: object) -> None:
        self.end(ConnectionError("it was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._connection.disconnect(nowait=True)

    async def _until_error(self, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as error:  # here a link's task ends, whatever redis-py thinks of what it has read
            if not isinstance(error, ERRORS):
                _logger.exception("a link to Redis has failed")
            self.end(error)

    async def _read(self) -> None:
        read = self._connection.read_response
        while True:
            try:
                reply = await read(disable_decoding=True, disconnect_on_error=False)
            except ResponseError as error:
                reply = error
            self._heard = True
            self._receive(reply)

    def _receive(self, reply: Any) -> None:
        self._answer(reply)

    def _answer(self, reply: Any) -> None:
        call = self._unanswered[0]
        call.replies -= 1
        failed = isinstance(reply, ResponseError)
        if call.replies and not failed:
            return
        self._unanswered.popleft()
        if failed:
            call.fail(reply)
        elif call.future is not None and not call.future.done():
            call.future.set_result(reply)

    async def _write(self) -> None:
        pack, send = self._connection.pack_command, self._connection.send_packed_command
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._unsent:
                packed, size = [], 0
                while self._unsent and size < _BATCH:
                    call = self._unsent.popleft()
                    if call.future is None or not call.future.done():
                        chunks = pack(*call.command)
                        packed += chunks
                        size += sum(map(len, chunks))
                        self._unanswered.append(call)
                await send(packed, check_health=False)

    async def _watch(self) -> None:
        """Time counts in ticks of this loop, so that one that was held up itself doesn't blame the server."""
        silent = 0
        while silent * _TICK < _SILENCE:
            await asyncio.sleep(_TICK)
            self._ticks += 1
            if self._heard:
                silent, self._heard = 0, False
            elif self._unanswered or self._unsent:
                silent += 1
            else:
                self.tell(b"PING")
            self._expire()
        raise TimeoutError(f"nothing was heard for {_SILENCE:g} seconds")

    def _expire(self) -> None:
        for call in itertools.chain(self._unanswered, self._unsent):
            if (self._ticks - call.tick) * _TICK < COMMAND_TIMEOUT:
                break
            call.fail(TimeoutError(f"no answer came within {COMMAND_TIMEOUT:g} seconds"))


class SubscriberLink(Link):
    """A link that messages come by, too."""

    def __init__(
        self, connection: Connection, on_message: Callable[[bytes, bytes], None], on_dropped: Callable[[bytes], None]
    ) -> None:
        super().__init__(connection)
        self._on_message = on_message
        self._on_dropped = on_dropped

    def _receive(self, reply: Any) -> None:
        if type(reply) is list:
            kind = reply[0]
            if kind == b"message" or kind == b"smessage":
                self._on_message(reply[1], reply[2])
                return
            if kind == b"sunsubscribe" and not self._asked_for(reply[1]):
                # The channel's slot has moved to another server.
                self._on_dropped(reply[1])
                return
        self._answer(reply)

    def _asked_for(self, name: bytes) -> bool:
        command = self._unanswered[0].command if self._unanswered else ()
        return b"sunsubscribe" in command[:1] and name in command[1:]


class Lines:
    """A link to each of the servers, made again for ever.

    `prepare` is given each new link before anybody else; when it raises one of `ERRORS`, the link is given up.
    `trouble` is called when a link was lost or couldn't be made.
    """

    def __init__(
        self,
        servers: Servers,
        make: Callable[[Connection], Link],
        prepare: Callable[[Link, str], Awaitable[None]],
        trouble: Callable[[], None],
    ) -> None:
        self._servers = servers
        self._make = make
        self._prepare = prepare
        self._trouble = trouble
        self._links: dict[str, Link] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._errors: dict[str, Exception] = {}
        self._up = asyncio.Event()

    async def start(self) -> None:
        """Raises one of `ERRORS` when a server can't be reached."""
        first = [self._keep_up(node) for node in self._servers.nodes]
        await asyncio.gather(*first)

    async def stop(self) -> None:
        """Close all."""
        keepers = list(self._keepers.values())
        self._keepers.clear()
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        self._up.set()  # whoever waits finds nothing

    def follow(self) -> None:
        """Keep links to the servers that there are now, and no others."""
        for node in self._servers.nodes - self._keepers.keys():
            self._keep_up(node, patient=True)
        for node in self._keepers.keys() - self._servers.nodes:
            self._keepers.pop(node).cancel()

    def get(self, node: str) -> Link | None:
        """The link to a server, if it is up."""
        link = self._links.get(node)
        return link if link is not None and link.alive else None

    async def wait(self, node: str) -> Link:
        """The link to a server; waits a moment for one that is being made. Raises one of `ERRORS`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while self.get(node) is None and node in self._keepers:
                    await self._up.wait()
        link = self.get(node)
        if link is None:
            error = self._errors.get(node)
            raise ConnectionError(f"there is no link: {words(error) if error else 'it is being made'}") from error
        return link

    def _keep_up(self, node: str, *, patient: bool = False) -> "asyncio.Future[None]":
        opened = asyncio.get_running_loop().create_future()
        if patient:
            opened.set_result(None)
        self._keepers[node] = asyncio.create_task(self._keep(node, opened))
        return opened

    async def _keep(self, node: str, opened: "asyncio.Future[None]") -> None:
        failures = 0
        while True:
            try:
                async with self._make(await self._servers.connect(node)) as link:
                    await self._prepare(link, node)
                    failures = 0
                    self._set_up(node, link)
                    if not opened.done():
                        opened.set_result(None)
                    error = await link.ended()
            except ERRORS as failure:
                error = failure
                if not opened.done():
                    opened.set_exception(error)
                    return
            finally:
                self._links.pop(node, None)
            if node not in self._errors:
                _logger.warning("the link to Redis at %s is lost: %s", node, words(error))
            self._errors[node] = error
            self._trouble()
            await asyncio.sleep(random.uniform(0, min(_LAST_DELAY, _FIRST_DELAY * 2**failures)))
            failures = min(failures + 1, 16)

    def _set_up(self, node: str, link: Link) -> None:
        if self._errors.pop(node, None) is not None:
            _logger.info("the link to Redis at %s is back", node)
        self._links[node] = link
        self._up.set()
        self._up.clear()
