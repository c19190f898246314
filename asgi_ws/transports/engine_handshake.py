"""What an application is given as `receive` and `send` of a websocket that is an Engine.IO session."""

import abc
import asyncio
import logging
from collections.abc import Callable

from starlette.types import Message, Receive, Scope, Send

from asgi_ws.frames import Frame
from asgi_ws.links import closed_by
from asgi_ws.transports.base import Headers
from asgi_ws.transports.engine_link import EngineLink
from asgi_ws.uvicorn import find_link

__all__ = ["Handshake", "Reader", "Socket"]

logger = logging.getLogger("asgi_ws")


class Application(abc.ABC):
    """What an application is given as `receive` and `send`, before and behind its `websocket.accept`."""

    def __init__(self, link: EngineLink, begin: Callable[[EngineLink], str]) -> None:
        self.link = link
        self._begin = begin
        self._connected = False
        self._accepted = False

    async def receive(self) -> Message:
        if self._connected:
            return await self.link.receive()
        self._connected = True
        return await self._connect()

    async def send(self, message: Message) -> None:
        if self._accepted:
            await self.link.send(message)
        elif message["type"] == "websocket.accept":
            await self._accept(message)
        else:
            await self._deny(message)

    @abc.abstractmethod
    async def _connect(self) -> Message:
        """The first message, of a client that wants to be let in."""

    @abc.abstractmethod
    async def _accept(self, message: Message) -> None:
        """Let it in."""

    @abc.abstractmethod
    async def _deny(self, message: Message) -> None:
        """Don't."""


_Answer = tuple[int, Headers, bytes]


class Handshake(Application):
    """That of a session which begins with polling: the answer to its first request."""

    def __init__(self, link: EngineLink, begin: Callable[[EngineLink], str]) -> None:
        super().__init__(link, begin)
        self.answered: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._denial: Message | None = None
        self._body = b""

    async def _connect(self) -> Message:
        return {"type": "websocket.connect"}

    async def _accept(self, message: Message) -> None:
        if self.link.ended.done():
            raise OSError("the client is gone")
        self._accepted = True
        self.answered.set_result((200, list(message.get("headers", ())), self._begin(self.link).encode()))

    async def _deny(self, message: Message) -> None:
        if message["type"] == "websocket.http.response.start":
            self._denial = message
            return
        if message["type"] == "websocket.close" or self._denial is None:
            self._answer(403, [(b"content-type", b"application/json")], b'{"code":4,"message":"Forbidden"}')
            return
        self._body += message.get("body", b"")
        if not message.get("more_body", False):
            self._answer(self._denial["status"], list(self._denial.get("headers", ())), self._body)

    def _answer(self, status: int, headers: Headers, body: bytes) -> None:
        if not self.answered.done():
            self.answered.set_result((status, headers, body))

    def finished(self) -> None:
        """The application has returned."""
        self._answer(500, [], b"Internal Server Error")

    def client_gone(self) -> None:
        """The client has not waited for the answer."""
        self.link.lose()
        self._answer(499, [], b"")


class Reader:
    """Hands over what comes over a WebSocket, where that has to be waited for."""

    def __init__(self, link: EngineLink, receive: Receive) -> None:
        self.receive = receive
        self._link = link
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._read(), name="asgi_ws reader")

    async def _read(self) -> None:
        link = self._link
        try:
            while not link.ended.done():
                message = await self.receive()
                if message["type"] != "websocket.receive":
                    link.connection_lost(closed_by(message))
                    return
                text = message.get("text")
                link.message_received(bytes(message["bytes"]) if text is None else text)
                await link.room()
        except Exception:
            logger.debug("receiving failed", exc_info=True)
            link.lose()

    async def leave(self) -> None:
        """The session is over."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])


class Socket(Application):
    """That of a session which begins with a WebSocket."""

    def __init__(
        self, link: EngineLink, begin: Callable[[EngineLink], str], scope: Scope, reader: Reader, send: Send
    ) -> None:
        super().__init__(link, begin)
        self._scope = scope
        self._reader = reader
        self._send = send

    async def _connect(self) -> Message:
        return await self._reader.receive()

    async def _accept(self, message: Message) -> None:
        await self._send(message)
        self._accepted = True
        under = find_link(self._send, self._scope.get("extensions"))
        self.link.attach(under, self._reader.start)
        under.write(Frame(self._begin(self.link)))

    async def _deny(self, message: Message) -> None:
        await self._send(message)
