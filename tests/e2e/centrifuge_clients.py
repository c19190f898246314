"""The two Centrifuge clients behind one face: `centrifuge` of npm in a Node process, and `centrifuge-python`."""

import asyncio
import contextlib
import json
import subprocess
import warnings
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from typing import Any

from tests.e2e.node import HERE, node
from tests.servers import Address

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import centrifuge

TRANSPORTS = ("websocket", "http_stream", "sse")


class Failed(Exception):
    """A call was answered with an error."""

    def __init__(self, code: int, message: str, temporary: bool) -> None:
        super().__init__(code, message, temporary)
        self.code = code
        self.message = message
        self.temporary = temporary


class Events:
    """What a client has told of, by kind and channel."""

    def __init__(self) -> None:
        self._waiting: defaultdict[str, asyncio.Queue[dict[str, Any]]] = defaultdict(asyncio.Queue)

    def put(self, kind: str, channel: str | None, event: dict[str, Any]) -> None:
        self._waiting[f"{kind} {channel or ''}"].put_nowait(event)

    async def event(self, kind: str, channel: str | None = None, timeout: float = 8) -> dict[str, Any]:
        """The next one of this kind."""
        try:
            return await asyncio.wait_for(self._waiting[f"{kind} {channel or ''}"].get(), timeout)
        except TimeoutError:
            told = {name: queue.qsize() for name, queue in self._waiting.items() if queue.qsize()}
            raise AssertionError(f"no {kind!r} of {channel!r}; but {told}") from None

    def has(self, kind: str, channel: str | None = None) -> bool:
        """Whether there is one."""
        return not self._waiting[f"{kind} {channel or ''}"].empty()


class NodeClient(Events):
    """`centrifuge` of npm."""

    language = "js"

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        super().__init__()
        self._process = process
        self._calls: dict[int, asyncio.Future[Any]] = {}

    async def read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            event = json.loads(line)
            kind = event.pop("event")
            if kind == "answer":
                call = self._calls.pop(event["number"])
                if "error" in event:
                    call.set_exception(Failed(**event["error"]))
                else:
                    call.set_result(event["result"])
            else:
                self.put(kind, event.pop("channel", None), event)

    def start(self, do: str, **command: Any) -> asyncio.Future[Any]:
        """Have it done; what is returned is done with the answer."""
        call = asyncio.get_running_loop().create_future()
        number = id(call)
        self._calls[number] = call
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"number": number, "do": do, **command}).encode() + b"\n")
        return call

    async def do(self, do: str, **command: Any) -> Any:
        return await asyncio.wait_for(self.start(do, **command), 8)


@contextlib.asynccontextmanager
async def node_client(
    server: Address,
    path: str = "/live",
    *,
    transport: str = "websocket",
    endpoint: Any = None,
    tokens: Iterable[str] | None = None,
    **options: Any,
) -> AsyncIterator[NodeClient]:
    if endpoint is None:
        endpoint = endpoint_of(server, path, transport)
    if isinstance(endpoint, list):
        options.setdefault("emulationEndpoint", f"{server.http}{path}/emulation")
    arguments = {"endpoint": endpoint, "options": options, "tokens": None if tokens is None else list(tokens)}
    process = await asyncio.create_subprocess_exec(
        *(node("centrifuge"), str(HERE / "centrifuge.mjs"), json.dumps(arguments)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        limit=16 * 1024 * 1024,
    )
    client = NodeClient(process)
    reader = asyncio.create_task(client.read())
    try:
        yield client
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await asyncio.wait_for(process.wait(), 10)
        await reader


def endpoint_of(server: Address, path: str, transport: str) -> Any:
    if transport == "websocket":
        return server.ws + path
    return [{"transport": transport, "endpoint": f"{server.http}{path}/{transport}"}]


def _info(info: Any) -> Any:
    return info and {"user": info.user, "client": info.client, "info": info.conn_info}


def _position(context: Any) -> dict[str, Any]:
    position = context.stream_position
    return {
        "recoverable": context.recoverable,
        "positioned": context.positioned,
        "wasRecovering": context.was_recovering,
        "recovered": context.recovered,
        "streamPosition": position and {"offset": position.offset, "epoch": position.epoch},
        "data": context.data,
    }


def _publication(pub: Any) -> dict[str, Any]:
    return {"data": pub.data, "offset": pub.offset, "tags": pub.tags, "info": _info(pub.info)}


class PythonClient(Events):
    """`centrifuge-python`."""

    language = "py"

    def __init__(self, url: str, *, tokens: list[str] | None = None, **options: Any) -> None:
        super().__init__()
        put = self.put

        async def next_token() -> str:
            put("token", None, {})
            return tokens.pop(0) if tokens else ""

        class Handler(centrifuge.ClientEventHandler):  # type: ignore[misc]
            async def on_connecting(self, ctx: Any) -> None:
                put("connecting", None, {"code": ctx.code, "reason": ctx.reason})

            async def on_connected(self, ctx: Any) -> None:
                put("connected", None, {"client": ctx.client, "data": ctx.data, "transport": "websocket"})

            async def on_disconnected(self, ctx: Any) -> None:
                put("disconnected", None, {"code": ctx.code, "reason": ctx.reason})

            async def on_error(self, ctx: Any) -> None:
                put("error", None, {"code": getattr(ctx.error, "code", ctx.code)})

            async def on_subscribed(self, ctx: Any) -> None:
                put("server subscribed", ctx.channel, _position(ctx))

            async def on_unsubscribed(self, ctx: Any) -> None:
                put("server unsubscribed", ctx.channel, {})

            async def on_publication(self, ctx: Any) -> None:
                put("server publication", ctx.channel, _publication(ctx.pub))

        self._client = centrifuge.Client(
            url,
            events=Handler(),
            get_token=None if tokens is None else next_token,
            min_reconnect_delay=0.05,
            max_reconnect_delay=0.2,
            **options,
        )

    def start(self, do: str, **command: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self.do(do, **command))

    async def do(self, do: str, **command: Any) -> Any:
        try:
            return await getattr(self, f"_{do}")(**command)
        except centrifuge.ReplyError as error:
            raise Failed(error.code, error.message, error.temporary) from None

    async def _connect(self) -> None:
        await self._client.connect()

    async def _disconnect(self) -> None:
        await self._client.disconnect()

    async def _subscribe(
        self,
        channel: str,
        tokens: list[str] | None = None,
        state: dict[str, Any] | None = None,
        joinLeave: bool = False,
        since: dict[str, Any] | None = None,
        data: Any = None,
    ) -> None:
        put = self.put

        async def next_token(channel: str) -> str:
            assert tokens is not None
            return tokens.pop(0) if tokens else ""

        async def get_state(channel: str) -> Any:
            assert state is not None
            put("state", channel, {})
            return centrifuge.StreamPosition(**state)

        class Handler(centrifuge.SubscriptionEventHandler):  # type: ignore[misc]
            async def on_subscribing(self, ctx: Any) -> None:
                put("subscribing", channel, {"code": ctx.code, "reason": ctx.reason})

            async def on_subscribed(self, ctx: Any) -> None:
                put("subscribed", channel, _position(ctx))

            async def on_unsubscribed(self, ctx: Any) -> None:
                put("unsubscribed", channel, {"code": ctx.code, "reason": getattr(ctx, "reason", "")})

            async def on_publication(self, ctx: Any) -> None:
                put("publication", channel, _publication(ctx.pub))

            async def on_join(self, ctx: Any) -> None:
                put("join", channel, _info(ctx.info))

            async def on_leave(self, ctx: Any) -> None:
                put("leave", channel, _info(ctx.info))

            async def on_error(self, ctx: Any) -> None:
                put("error", channel, {"code": getattr(ctx.error, "code", ctx.code)})

        subscription = self._client.get_subscription(channel) or self._client.new_subscription(
            channel,
            Handler(),
            get_token=next_token if tokens is not None else None,
            get_state=get_state if state is not None else None,
            join_leave=joinLeave,
            data=data,
            min_resubscribe_delay=0.05,
            max_resubscribe_delay=0.2,
        )
        await subscription.subscribe()

    async def _unsubscribe(self, channel: str) -> None:
        await self._client.get_subscription(channel).unsubscribe()

    async def _publish(self, channel: str, data: Any) -> None:
        await self._client.publish(channel, data)

    async def _rpc(self, method: str, data: Any = None) -> Any:
        data = (await self._client.rpc(method, data)).data
        return {"data": data}

    async def _history(self, channel: str, since: dict[str, Any] | None = None, **options: Any) -> Any:
        position = since and centrifuge.StreamPosition(**since)
        result = await self._client.history(channel, since=position, **options)
        publications = [{"data": each.data, "offset": each.offset} for each in result.publications]
        return {"publications": publications, "offset": result.offset, "epoch": result.epoch}

    async def _presence(self, channel: str) -> Any:
        return {name: _info(info) for name, info in (await self._client.presence(channel)).clients.items()}

    async def _presence_stats(self, channel: str) -> Any:
        result = await self._client.presence_stats(channel)
        return {"num_clients": result.num_clients, "num_users": result.num_users}


@contextlib.asynccontextmanager
async def python_client(
    server: Address, path: str = "/live", *, tokens: Iterable[str] | None = None, **options: Any
) -> AsyncIterator[PythonClient]:
    client = PythonClient(server.ws + path, tokens=None if tokens is None else list(tokens), **options)
    try:
        yield client
    finally:
        await client.do("disconnect")


Client = NodeClient | PythonClient


def client_of(
    kind: str, server: Address, path: str = "/live", **options: Any
) -> contextlib.AbstractAsyncContextManager[Client]:
    """One of "py", or a transport of the JavaScript client."""
    if kind == "py":
        return python_client(server, path, **options)
    return node_client(server, path, transport=kind, **options)
