"""Where the Redis servers are that a URL names: one, the master that Sentinels know, or a cluster."""

import abc
import asyncio
import random
import urllib.parse
from typing import Any

from redis.asyncio.connection import Connection, SSLConnection
from redis.crc import key_slot
from redis.exceptions import RedisError

__all__ = ["ERRORS", "Servers", "parse_url"]

ERRORS = (RedisError, OSError)
"""What a server that is away, or doesn't want, makes redis-py and asyncio raise."""

CONNECT_TIMEOUT = 5.0
DISCOVERY_TIMEOUT = 2.0

_TEXTS = {"client_name", "username", "password"}
_TLS = {"ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_password", "ssl_cert_reqs"}
_OWN = {"prefix", "db", "sentinel_username", "sentinel_password"}


class Servers(abc.ABC):
    """The servers that hold the data, by names of the form `host:port`."""

    sharded = False
    """Whether a publication goes to the server of its channel only."""
    can_fail_over = True
    """Whether a replica may take over, without the latest that its master had."""

    def __init__(self, addresses: list[tuple[str, int]], tls: bool, options: dict[str, Any]) -> None:
        self._addresses = addresses
        self._class = SSLConnection if tls else Connection
        self._options = options
        self.database: int = options["db"]

    @property
    @abc.abstractmethod
    def nodes(self) -> frozenset[str]:
        """The servers that are known now."""

    @abc.abstractmethod
    def node_of(self, name: bytes) -> str:
        """The server for a key or a sharded channel."""

    async def refresh(self) -> None:
        """Find out where the servers are. Raises one of `ERRORS`."""
        return

    @abc.abstractmethod
    async def connect(self, node: str) -> Connection:
        """A connection to one of the nodes. Raises one of `ERRORS`."""

    async def _open(self, host: str, port: int, *, timeout: float = CONNECT_TIMEOUT, **options: Any) -> Connection:
        connection = self._class(host=host, port=port, **{**self._options, **options})
        try:
            async with asyncio.timeout(timeout):
                await connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def _ask(self, host: str, port: int, *command: str, **options: Any) -> Any:
        """One command's answer, from a connection of its own."""
        connection = await self._open(host, port, timeout=DISCOVERY_TIMEOUT, **options)
        try:
            async with asyncio.timeout(DISCOVERY_TIMEOUT):
                await connection.send_command(*command)
                return await connection.read_response(disable_decoding=True)
        finally:
            await connection.disconnect(nowait=True)

    async def _ask_any(self, addresses: list[tuple[str, int]], *command: str, **options: Any) -> tuple[str, Any]:
        """The first answer that says something, and the host that gave it."""
        trouble: Exception = ConnectionError("nobody could be asked")
        for host, port in random.sample(addresses, len(addresses)):
            try:
                answer = await self._ask(host, port, *command, **options)
            except ERRORS as error:
                trouble = error
            else:
                if answer:
                    return host, answer
        raise trouble


class _One(Servers):
    can_fail_over = False

    @property
    def nodes(self) -> frozenset[str]:
        return frozenset([_node(*self._addresses[0])])

    def node_of(self, name: bytes) -> str:
        return _node(*self._addresses[0])

    async def connect(self, node: str) -> Connection:
        return await self._open(*self._addresses[0])


class _Sentinel(Servers):
    """The master is asked for at each connect: it may be another one by then."""

    def __init__(
        self,
        addresses: list[tuple[str, int]],
        tls: bool,
        options: dict[str, Any],
        service: str,
        sentinel_options: dict[str, Any],
    ) -> None:
        super().__init__(addresses, tls, options)
        self._service = service
        self._sentinel_options = {"db": 0, "username": None, "password": None, **sentinel_options}

    @property
    def nodes(self) -> frozenset[str]:
        return frozenset([self._service])

    def node_of(self, name: bytes) -> str:
        return self._service

    async def connect(self, node: str) -> Connection:
        command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
        try:
            _, (host, port) = await self._ask_any(self._addresses, *command, **self._sentinel_options)
        except ERRORS as error:
            raise ConnectionError(f"no Sentinel knows a master for {self._service!r}: {error}") from error
        return await self._open(host.decode(), int(port))


class _Cluster(Servers):
    sharded = True

    def __init__(self, addresses: list[tuple[str, int]], tls: bool, options: dict[str, Any]) -> None:
        super().__init__(addresses, tls, options)
        self._slots: list[str] = []
        self._known: dict[str, tuple[str, int]] = {}

    @property
    def nodes(self) -> frozenset[str]:
        return frozenset(self._known)

    def node_of(self, name: bytes) -> str:
        return self._slots[key_slot(name)]

    async def connect(self, node: str) -> Connection:
        return await self._open(*self._known[node])

    async def refresh(self) -> None:
        asked = list({*self._known.values(), *self._addresses})
        host, ranges = await self._ask_any(asked, "CLUSTER", "SLOTS")
        slots = [""] * 16384
        known: dict[str, tuple[str, int]] = {}
        for first, last, (announced, port, *_), *_replicas in ranges:
            # A node that doesn't know its own name is where it was asked.
            address = (announced.decode() if announced not in (None, b"", b"?") else host, port)
            known[_node(*address)] = address
            slots[first : last + 1] = [_node(*address)] * (last + 1 - first)
        if "" in slots:
            raise ConnectionError("the cluster has slots that no server serves")
        self._slots, self._known = slots, known


def _node(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_url(url: str) -> tuple[Servers, str | None]:
    """The servers that a URL names, and the prefix, if it has one. Raises `ValueError`."""
    parts = urllib.parse.urlsplit(url)
    scheme, _, kind = parts.scheme.partition("+")
    if scheme not in ("redis", "rediss") or kind not in ("", "sentinel", "cluster"):
        raise ValueError(f"{parts.scheme!r} is no scheme of Redis: it is redis or rediss, with +sentinel or +cluster")
    userinfo, _, hosts = parts.netloc.rpartition("@")
    addresses = [_address(host, 26379 if kind == "sentinel" else 6379, scheme) for host in hosts.split(",")]
    if not kind and len(addresses) > 1:
        raise ValueError(f"{scheme}:// takes one server; several are a {scheme}+cluster:// or {scheme}+sentinel://")
    query = _query(parts.query, tls=scheme == "rediss", sentinel=kind == "sentinel")
    service, database = "", parts.path.strip("/")
    if kind == "sentinel":
        service, _, database = database.partition("/")
        service = urllib.parse.unquote(service)
        if not service:
            raise ValueError(f"which master? {parts.scheme}://host:port/NAME names it")
    database = query.pop("db", database) or "0"
    if not (database.isascii() and database.isdecimal()):
        raise ValueError(f"a database of Redis is a number, not {database!r}")
    if kind == "cluster" and int(database):
        raise ValueError("a Redis Cluster has no databases but 0")
    username, _, password = userinfo.partition(":")
    prefix = query.pop("prefix", None)
    sentinel = {name.removeprefix("sentinel_"): query.pop(name) for name in list(query) if name.startswith("sentinel_")}
    options: dict[str, Any] = {
        "username": urllib.parse.unquote(username) or None,
        "password": urllib.parse.unquote(password) or None,
        "db": int(database),
        **query,
        # RESP2 is all that is needed, and its replies look the same with and without hiredis. Waits are limited here,
        # not by redis-py, which would give up a connection that has nothing to say.
        "protocol": 2,
        "socket_timeout": None,
        "socket_connect_timeout": CONNECT_TIMEOUT,
    }
    tls = scheme == "rediss"
    if kind == "sentinel":
        return _Sentinel(addresses, tls, options, service, sentinel), prefix
    return (_Cluster if kind == "cluster" else _One)(addresses, tls, options), prefix


def _address(text: str, port: int, scheme: str) -> tuple[str, int]:
    try:
        parts = urllib.parse.urlsplit(f"//{text}")
        return parts.hostname or "localhost", port if parts.port is None else parts.port
    except ValueError as error:
        raise ValueError(f"{text!r} is no address of a {scheme} server: {error}") from error


def _query(text: str, *, tls: bool, sentinel: bool) -> dict[str, Any]:
    try:
        query = dict(urllib.parse.parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text)))
    except ValueError as error:
        raise ValueError(f"{text!r} is no query: {error}") from error
    known = _TEXTS | _OWN | {"ssl_check_hostname"} | _TLS
    for name in query:
        if name not in known:
            raise ValueError(f"a Redis URL has no parameter {name!r}; known are {', '.join(sorted(known))}")
        if name.startswith("ssl_") and not tls:
            raise ValueError(f"{name!r} is for rediss://")
        if name.startswith("sentinel_") and not sentinel:
            raise ValueError(f"{name!r} is for redis+sentinel://")
    options: dict[str, Any] = dict(query)
    if "ssl_check_hostname" in query:
        options["ssl_check_hostname"] = _boolean("ssl_check_hostname", query["ssl_check_hostname"])
    if query.get("ssl_cert_reqs", "none") not in ("none", "optional", "required"):
        raise ValueError("'ssl_cert_reqs' is none, optional or required")
    return options


def _boolean(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{name!r} is true or false")
    return text == "true"
