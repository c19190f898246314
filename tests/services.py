"""Redis for tests: servers of their own on free ports, alone, as a cluster, or looked after by a Sentinel."""

import contextlib
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.programs import pause, program
from tests.servers import free_port

TIMEOUT = 15


class RedisServer:
    """A redis-server that is started, stopped, killed, paused and started again, always on the same port.

    It keeps nothing on disk unless `options` say so, which are those of its command line: `appendonly="yes"`. What it
    has on disk stays until `remove`.
    """

    def __init__(self, *, port: int | None = None, sentinel: str | None = None, **options: str) -> None:
        self.port = free_port() if port is None else port
        self.options = {"save": "", "appendonly": "no", **options}
        self.directory = Path(tempfile.mkdtemp(prefix="asgi-ws-redis-"))
        self._sentinel = sentinel
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Run it, and wait until it answers."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Run it, without waiting."""
        command = [program("redis-server")]
        if self._sentinel is not None:
            # A Sentinel writes into its configuration.
            config = self.directory / "sentinel.conf"
            config.write_text(self._sentinel)
            command += [str(config), "--sentinel"]
        command += ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        if self._sentinel is None:
            for name, value in self.options.items():
                command += [f"--{name.replace('_', '-')}", value]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait(self) -> None:
        """Wait until it answers, and has loaded what it had."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            assert self._process is not None
            assert self._process.poll() is None, (self.directory / "log").read_text()
            with contextlib.suppress(OSError):
                if self.command("PING").startswith(("+PONG", "-NOAUTH")):
                    return
            assert time.monotonic() < deadline, (self.directory / "log").read_text()
            time.sleep(0.01)

    def command(self, *words: str) -> str:
        """The answer to a command as Redis writes it, from a connection of its own."""
        with socket.create_connection(("127.0.0.1", self.port), 5) as link:
            parts = [f"*{len(words)}\r\n"]
            parts += [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
            link.sendall("".join(parts).encode())
            answer = link.recv(65536)
            while select.select([link], [], [], 0.02)[0] and (more := link.recv(65536)):
                answer += more
            return answer.decode(errors="replace")

    def stop(self) -> None:
        """End it as a service manager does."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it without a chance to say or write anything."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill it and start it."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Let it hang: its port takes connections, and nothing answers."""
        assert self._process is not None
        pause(self._process.pid)

    def resume(self) -> None:
        """The end of that."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def remove(self) -> None:
        """End it, and delete what it has on disk."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self, signal_number: int) -> None:
        if self._process is not None:
            self._process.send_signal(signal_number)
            self._process.wait(TIMEOUT)
            self._process = None


@contextlib.contextmanager
def redis_server(**options: str) -> Iterator[RedisServer]:
    """A server that runs."""
    server = RedisServer(**options)
    try:
        server.start()
        yield server
    finally:
        server.remove()


class RedisCluster:
    """Three masters, each with a third of the slots, and as many replicas as asked for, of the first."""

    def __init__(self, *, replicas: int = 0, **options: str) -> None:
        self._options = {
            "cluster_enabled": "yes",
            "cluster_node_timeout": "1000",
            "cluster_require_full_coverage": "no",
            "repl_diskless_sync_delay": "0",
            **options,
        }
        self.masters = [self._server() for _ in range(3)]
        self.replicas = [self._server() for _ in range(replicas)]

    @property
    def servers(self) -> list[RedisServer]:
        return [*self.masters, *self.replicas]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in self.masters)

    def start(self) -> None:
        for server in self.servers:
            server.launch()
        for server in self.servers:
            server.wait()
        third = 16384 // 3 + 1
        for number, server in enumerate(self.masters):
            first, last = number * third, min((number + 1) * third, 16384) - 1
            server.command("CLUSTER", "ADDSLOTSRANGE", str(first), str(last))
            server.command("CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))
        self._meet()
        self._until(lambda: all(self._agrees(server) for server in self.servers))
        for server in self.replicas:
            first = self.node_id(self.masters[0])
            server.command("CLUSTER", "REPLICATE", first)
            self._until(lambda server=server: "master_link_status:up" in server.command("INFO", "replication"))

    def node_id(self, server: RedisServer) -> str:
        return server.command("CLUSTER", "MYID").split("\r\n")[1]

    def remove(self) -> None:
        for server in self.servers:
            server.remove()

    def _server(self) -> RedisServer:
        # The port of the cluster's own bus has to be free, too.
        return RedisServer(cluster_port=str(free_port()), **self._options)

    def _meet(self) -> None:
        for server in self.servers[1:]:
            bus = server.options["cluster_port"]
            self.masters[0].command("CLUSTER", "MEET", "127.0.0.1", str(server.port), bus)

    def _agrees(self, server: RedisServer) -> bool:
        info = server.command("CLUSTER", "INFO")
        return (
            f"cluster_known_nodes:{len(self.servers)}\r" in info
            and "cluster_state:ok" in info
            and "cluster_slots_ok:16384" in info
        )

    @staticmethod
    def _until(condition: Any) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, "the cluster doesn't come together"
            time.sleep(0.02)


@contextlib.contextmanager
def redis_cluster(*, replicas: int = 0, **options: str) -> Iterator[RedisCluster]:
    """A cluster that runs."""
    cluster = RedisCluster(replicas=replicas, **options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()


class RedisSentinel:
    """A master, its replica, and a Sentinel that makes the replica the master when that is gone for half a second."""

    def __init__(self) -> None:
        self.master = RedisServer(repl_diskless_sync_delay="0")
        self.replica = RedisServer(replicaof=f"127.0.0.1 {self.master.port}")
        self.sentinel = RedisServer(
            sentinel=f"sentinel monitor shop 127.0.0.1 {self.master.port} 1\n"
            "sentinel down-after-milliseconds shop 500\n"
            "sentinel failover-timeout shop 2000\n"
        )

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.sentinel.port}/shop"

    def start(self) -> None:
        self.master.start()
        self.replica.start()
        deadline = time.monotonic() + TIMEOUT
        while "master_link_status:up" not in self.replica.command("INFO", "replication"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self.sentinel.start()
        while "num-slaves\r\n$1\r\n1" not in self.sentinel.command("SENTINEL", "MASTER", "shop"):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def remove(self) -> None:
        for server in (self.sentinel, self.replica, self.master):
            server.remove()


@contextlib.contextmanager
def redis_sentinel() -> Iterator[RedisSentinel]:
    """All three, running."""
    group = RedisSentinel()
    try:
        group.start()
        yield group
    finally:
        group.remove()
