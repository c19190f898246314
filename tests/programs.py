"""Programs that tests need and that may not be installed: then the test is skipped, or, where ASGI_WS_REQUIRE names
the program, it fails."""

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

import pytest


def program(name: str, *, reason: str = "") -> str:
    """The path of an executable, or a skip. In ASGI_WS_REQUIRE the name is that of the executable, or
    `redis` and `nats` for their servers."""
    found = shutil.which(name)
    if found is None:
        missing(name, reason or f"{name} is not installed")
        raise AssertionError  # not reached
    return found


def missing(name: str, reason: str) -> None:
    """Skip the test, or fail where the program has to be there."""
    required = os.environ.get("ASGI_WS_REQUIRE", "").split(",")
    if name in required or name.removesuffix("-server") in required:
        pytest.fail(f"{reason}, and ASGI_WS_REQUIRE names {name}")
    pytest.skip(reason)


def pause(pid: int) -> None:
    """SIGSTOP; returns when all threads of the process stand still, where the system tells (Linux)."""
    os.kill(pid, signal.SIGSTOP)
    threads = Path(f"/proc/{pid}/task")
    deadline = time.monotonic() + 5
    while threads.exists() and not all(map(_stands_still, threads.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.001)


def _stands_still(thread: Path) -> bool:
    with contextlib.suppress(OSError):
        return (thread / "stat").read_text().rpartition(")")[2].split()[0] in "tT"
    return True
