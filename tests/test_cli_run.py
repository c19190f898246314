"""`asgi-ws run` serves with our class, and `asgi-ws doctor` says what a deployment lacks."""

import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
import websockets
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from asgi_ws import Hub, WebSocketMiddleware
from asgi_ws.cli import main
from tests.servers import ROOT, run_process

RUN = (sys.executable, "-m", "asgi_ws", "run", "--host", "127.0.0.1", "--port", "{port}")

hub = Hub()
app = Starlette()
app.add_middleware(WebSocketMiddleware, hub=hub)


async def spoken(scope: Scope, receive: Receive, send: Send) -> None:
    """Tells the client which extensions the server has, and echoes. In a process of its own."""
    assert scope["type"] == "websocket"
    await receive()
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "text": " ".join(sorted(scope["extensions"]))})
    message = await receive()
    while message["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"]})
        message = await receive()


def make() -> object:
    return spoken


# run


@pytest.mark.anyio
async def test_run_serves_with_our_class_and_compression() -> None:
    async with run_process(*RUN, "examples.echo:app", ready="Uvicorn running on") as server:
        async with websockets.connect(f"{server.ws}/echo", proxy=None) as client:
            assert client.response is not None
            # uvicorn's own classes keep the context of what they compress.
            assert "server_no_context_takeover" in client.response.headers["Sec-WebSocket-Extensions"]
            await client.send("grüße" * 1000)
            assert await client.recv() == "grüße" * 1000
        server.stop()
        await server.wait()
    assert "Traceback" not in server.output


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("options", "environment", "ours"),
    [
        (["tests.test_cli_run:spoken"], {}, True),
        (["--factory", "tests.test_cli_run:make"], {}, True),
        (["tests.test_cli_run:spoken", "--ws", "wsproto"], {}, False),
        (["tests.test_cli_run:spoken"], {"UVICORN_WS": "wsproto"}, False),
    ],
)
async def test_options_and_environment_of_the_user_win(
    options: list[str], environment: dict[str, str], ours: bool
) -> None:
    options = [*options, "--lifespan", "off"]
    async with (
        run_process(*RUN, *options, ready="Uvicorn running on", **environment) as server,
        websockets.connect(server.ws, proxy=None) as client,
    ):
        assert ("asgi_ws.link" in str(await client.recv()).split()) is ours
        await client.send("hello")
        assert await client.recv() == "hello"


@pytest.mark.anyio
async def test_workers_all_have_our_class_and_warn_of_the_memory_broker() -> None:
    async with run_process(*RUN, "examples.echo:app", "--workers", "2", ready="Uvicorn running on") as server:
        for _ in range(2):
            await server.until("Application startup complete")
        async with websockets.connect(f"{server.ws}/echo", proxy=None) as client:
            assert client.response is not None
            assert "server_no_context_takeover" in client.response.headers["Sec-WebSocket-Extensions"]
        await server.until("2 workers don't share the memory broker")


@pytest.mark.anyio
async def test_reload_starts_the_changed_application(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text((ROOT / "examples/echo.py").read_text())
    # The delay is also what passes before uvicorn watches.
    options = ["main:app", "--reload", "--reload-delay", "0"]
    options += ["--app-dir", str(tmp_path), "--reload-dir", str(tmp_path)]
    async with run_process(*RUN, *options, ready="Application startup complete") as server:
        async with websockets.connect(f"{server.ws}/echo", proxy=None) as client:
            await client.send("hello")
            assert await client.recv() == "hello"
        (tmp_path / "main.py").write_text((ROOT / "examples/echo.py").read_text().replace("/echo", "/again"))
        await server.until("Reloading...")
        server.output = server.output.partition("Reloading...")[2]
        await server.until("Application startup complete")
        async with websockets.connect(f"{server.ws}/again", proxy=None) as client:
            await client.send("hello")
            assert await client.recv() == "hello"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "Missing argument 'APP'"),
        (["main:app", "--ports", "80"], r"No such option '--ports'.*"),
        (["main:app", "--port", "http"], r"Invalid value for '--port': .*"),
    ],
)
def test_options_that_uvicorn_has_not_are_said_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    assert main(["run", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(rf"asgi-ws: {why} \(see asgi-ws run --help\)\n", shown.err)


@pytest.mark.parametrize("arguments", [["--help"], ["main:app", "--help"]])
def test_help_of_run_is_uvicorns_with_our_defaults(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(["run", *arguments]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Usage: asgi-ws run [OPTIONS] APP")
    assert "asgi_ws.uvicorn:WebSocketProtocol" in "".join(shown.split())


@pytest.mark.parametrize("options", [[], ["--workers", "2"], ["--reload"]])
def test_a_port_that_is_taken_is_said_in_one_line_before_anything_starts(
    capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["run", "examples.echo:app", "--port", str(port), *options]) == 1
    expected = f"asgi-ws: can't listen on 127.0.0.1:{port}: the port is taken; choose another one with --port\n"
    assert capsys.readouterr() == ("", expected)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What uvicorn would serve."""
    calls: list[dict[str, object]] = []
    monkeypatch.setattr("uvicorn.main.callback", lambda **options: calls.append(options))
    return calls


@pytest.mark.parametrize("options", [["--uds", "/tmp/socket"], ["--fd", "3"], ["--host", "name.invalid"]])
def test_addresses_that_arent_known_are_left_to_uvicorn(served: list[dict[str, object]], options: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["run", "main:app", "--port", str(taken.getsockname()[1]), *options]) == 0
    (given,) = served
    assert given["app"] == "main:app"


def test_settings_are_sensible(served: list[dict[str, object]]) -> None:
    assert main(["run", "--port", "0", "main:app", "--ws-max-size", "4096"]) == 0
    (given,) = served
    assert given["ws"] == "asgi_ws.uvicorn:WebSocketProtocol"
    assert given["timeout_graceful_shutdown"] == 30
    assert (given["loop"], given["http"]) == ("auto", "auto")  # uvloop and httptools, where they are
    assert given["ws_per_message_deflate"] is True
    assert given["ws_max_size"] == 4096


@pytest.mark.anyio
async def test_a_wrong_application_is_said_in_one_line() -> None:
    async with run_process(*RUN, "no_such_module:app", ready="ERROR") as server:
        assert await server.wait() == 3
    assert re.fullmatch(r'ERROR: +Error loading ASGI app. Could not import module "no_such_module".\n', server.output)


def test_a_missing_uvicorn_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["run", "main:app"]) == 1
    assert capsys.readouterr().err == 'asgi-ws: this needs uvicorn: pip install "asgi-ws-hub[standard]"\n'


# doctor


def test_doctor_has_nothing_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "tests.test_cli_run:app"]) == 0
    expected = "tests.test_cli_run:app: nothing is missing\nStart it with: asgi-ws run tests.test_cli_run:app\n"
    assert capsys.readouterr() == (expected, "")


def test_doctor_says_a_finding_in_a_line_with_the_fix(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "tests.test_cli_run:app", "--workers", "2"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "tests.test_cli_run:app: 1 finding",
        "- 2 workers with the memory broker: what one worker publishes, the clients of the others don't get. "
        'Fix: --workers 1, or a broker for all of them: Hub("redis://localhost")',
        "Start it with: asgi-ws run tests.test_cli_run:app --workers 2",
    ]


def test_doctor_checks_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "tests.test_cli_run:app", "--command", "uvicorn tests.test_cli_run:app"]) == 1
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "tests.test_cli_run:app: 4 findings"
    assert [line.partition(":")[0] for line in lines] == [
        "- no --ws asgi_ws.uvicorn",
        "- compression by uvicorn's class",
        "- --ws-max-size is 16777216",
        "- no --timeout-graceful-shutdown",
    ]


def test_doctor_looks_where_uvicorn_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "doctored.py").write_text(
        (ROOT / "examples/echo.py").read_text() + "\n\ndef make() -> Starlette:\n    return app\n"
    )
    assert main(["doctor", "doctored:make", "--factory", "--app-dir", str(tmp_path)]) == 0
    assert f"asgi-ws run doctored:make --app-dir {tmp_path} --factory\n" in capsys.readouterr().out


def test_doctor_says_in_one_line_what_it_cant_examine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "no_such_module:app"]) == 1
    expected = "asgi-ws: no_such_module:app can't be imported: ModuleNotFoundError: No module named 'no_such_module'\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize("arguments", [[], ["main:app", "--workers", "0"], ["main:app", "--workers", "many"]])
def test_bad_arguments_of_doctor_are_said_in_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    assert ended.value.code == 2
    assert re.fullmatch(r"asgi-ws doctor: .+ \(see asgi-ws doctor --help\)\n", capsys.readouterr().err)


@pytest.mark.anyio
async def test_the_installed_command_finds_an_application_in_the_current_directory(tmp_path: Path) -> None:
    command = shutil.which("asgi-ws", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("the command is installed elsewhere")
    (tmp_path / "main.py").write_text((ROOT / "examples/echo.py").read_text())
    async with run_process(command, "doctor", "main:app", ready="Start it with", cwd=tmp_path) as doctor:
        assert await doctor.wait() == 0
