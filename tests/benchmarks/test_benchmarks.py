import re
import runpy
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.benchmarks import brokers, end_to_end, fallbacks, micro, plot, stalled
from tests.programs import program
from tests.servers import ROOT


@pytest.mark.anyio
async def test_benchmarks_run() -> None:
    for benchmark in micro.BENCHMARKS:
        assert await benchmark.run(2) > 0, benchmark.name


def test_benchmarks_are_printed_as_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(micro, "measure", lambda benchmark, seconds: 1e-6)
    runpy.run_module("tests.benchmarks", run_name="__main__", alter_sys=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(micro.BENCHMARKS)
    assert all(re.search(r" 1\.00 +1,000,000$", line) for line in lines[1:])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_servers_are_measured_and_drawn(tmp_path: Path) -> None:
    drawn = tmp_path / "plot.svg"
    command = [sys.executable, "-m", "tests.benchmarks.end_to_end", "--quick", "--svg", str(drawn)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert shown.returncode == 0, shown.stderr
    assert " | ".join(["", *end_to_end.SERVERS]) in shown.stdout
    assert all(f"\n| {scenario.name} | " in shown.stdout for scenario in end_to_end.SCENARIOS)
    assert "svg" in xml.etree.ElementTree.parse(drawn).getroot().tag


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_clients_that_do_not_read_are_ended_and_the_others_get_everything() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.stalled", "--quick"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert shown.returncode == 0, shown.stderr
    assert "| delivered to those that read | 2,000 of 2,000 | 1,800 of 1,800 | |" in shown.stdout
    assert "| stalled clients that the server has ended | | 2 of 2 | |" in shown.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_clients_without_a_websocket_are_measured_and_lose_nothing() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.fallbacks", "--quick"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert shown.returncode == 0, shown.stderr
    assert all(f"\n| {name} | 0 | 0 |\n" in shown.stdout for name in ("lost", "doubled", "out of order"))
    assert shown.stdout.count("\n| polls and event streams that were told so | 10 of 10 | |\n") == 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_brokers_are_measured() -> None:
    program("redis-server")
    command = [sys.executable, "-m", "tests.benchmarks.brokers", "--quick"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=80)
    assert shown.returncode == 0, shown.stderr
    assert "| reads of it for 10 subscribers that come in one tick | 1 | | | 1 |" in re.sub(" +", " ", shown.stdout)
    for goal in ("≤ 1.3", "≤ 1.5", "≥ 0.7", "≤ 3 s", "≤ 1.05"):
        assert f" {goal} |\n" in shown.stdout


def test_without_redis_there_is_nothing_to_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("PATH", "")
    assert brokers.main([]) == 1
    assert "redis-server" in capsys.readouterr().err


@pytest.mark.parametrize("main", [end_to_end.main, stalled.main, brokers.main, fallbacks.main])
def test_other_systems_are_told(
    main: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert main([]) == 1
    assert "Linux" in capsys.readouterr().err


def test_plot_is_a_drawing_that_stands_for_itself() -> None:
    drawn = plot.bars("a < b", ["ours", "theirs"], {"fan-out": [1.5, 30.0], "idle": [0.0, 4.0]})
    root = xml.etree.ElementTree.fromstring(drawn)
    words = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a < b", "fan-out", "1.5", "30"} <= set(words)
    assert not re.search(r"href|url\(|<script", drawn)
