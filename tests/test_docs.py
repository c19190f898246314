"""What the pages say is there, and the programs that they show run."""

import asyncio
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jwt
import pytest
import yaml
from starlette.applications import Starlette

import asgi_ws
from asgi_ws import ConnectionClosed, testing
from tests.test_floors import FLOORS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SNIPPETS = sorted((DOCS / "snippets").glob("*.py"))


def load(path: Path) -> ModuleType:
    """The program in a file, run once more."""
    spec = importlib.util.spec_from_file_location(f"asgi_ws_docs_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def snippet(name: str) -> Any:
    return load(DOCS / "snippets" / f"{name}.py")


def pages_in(nav: Any) -> Iterator[str]:
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            if isinstance(value, str):
                yield value
            else:
                yield from pages_in(value)


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))


def python_in(text: str) -> list[str]:
    """The blocks of code. Pages write `{ .python }`, which ruff's formatter takes for no Python of its concern."""
    return re.findall(r"^ *```(?:py\w*| \{ \.py\w* \})\n(.*?)^ *```", text, flags=re.M | re.S)


# The pages


def test_the_navigation_names_every_page_and_no_other() -> None:
    # Zensical 0.0.73 doesn't complain about either.
    named = list(pages_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(named) == [str(page.relative_to(DOCS)) for page in PAGES]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    # Zensical checks links between pages, but neither images nor the README.
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", without_code(page.read_text()))
    for link in (first or second for first, second in links):
        if not re.match(r"[a-z]+:|#", link):
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_a_page_is_a_file_that_is_tested(page: Path) -> None:
    for code in python_in(page.read_text()):
        for line in code.strip().splitlines():
            included = re.fullmatch(r'\s*--8<-- "((?:examples|docs/snippets)/\w+\.py)"', line)
            assert included, line
            assert (ROOT / included[1]).exists(), line


def test_contributors_are_shown_the_floors_that_are_tested() -> None:
    text = (DOCS / "contributing.md").read_text()
    table = text[text.index("| floor |") : text.index("| a line that")]
    rows = re.findall(r"^\| (`[^|]+) \|", table, flags=re.M)
    assert [set(re.findall(r"`(\w+)`", row)) for row in reversed(rows)] == FLOORS


def test_release_notes_begin_with_this_version() -> None:
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert latest is not None
    assert latest[1] == asgi_ws.__version__
    assert '--8<-- "CHANGELOG.md"' in (DOCS / "release-notes.md").read_text()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_the_distribution_is_called_by_its_name(page: Path) -> None:
    # `asgi-ws` is somebody else's on the package index.
    for package in re.findall(r"(?:pip install|uv add|uv pip install)[^\n]*?\b(asgi-ws\S*)", page.read_text()):
        assert package.startswith("asgi-ws-hub"), package


def test_what_pages_load_from_elsewhere_is_what_is_tested() -> None:
    tested = json.loads((ROOT / "tests/e2e/package.json").read_text())["dependencies"]
    for page in [*PAGES, *(ROOT / "examples").glob("*.html")]:
        for name, version in re.findall(
            r"https://(?:cdn\.jsdelivr\.net/npm|unpkg\.com)/([^@/]+)@([^/]+)/", page.read_text()
        ):
            assert tested[name] == version, page
        assert set(re.findall(r'<script src="(?:https://)?([^/"]+)', page.read_text())) <= {
            "cdn.jsdelivr.net",
            "unpkg.com",
        }


# The programs


@pytest.mark.parametrize("path", SNIPPETS, ids=lambda path: path.stem)
def test_every_program_is_shown_somewhere(path: Path) -> None:
    assert any(f'"docs/snippets/{path.name}"' in page.read_text() for page in PAGES)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("starlette_app", "/echo"),
        ("bare_asgi", "/echo"),
        ("mounted", "/live/echo"),
        ("origins", "/echo"),
        ("starlette_route", "/api/chat/lobby"),
    ],
)
@pytest.mark.anyio
async def test_message_comes_back(name: str, path: str) -> None:
    async with testing.connect(snippet(name).app, path) as client:
        await client.send("hello")
        assert await client.receive() == "hello"


@pytest.mark.parametrize("name", ["starlette_app", "bare_asgi"])
@pytest.mark.anyio
async def test_http_is_answered_by_the_application_and_at_an_endpoint_with_426(name: str) -> None:
    app = snippet(name).app
    assert (await testing.request(app, "GET", "/")).text == "hello"
    if name == "starlette_app":
        response = await testing.request(app, "GET", "/echo")
        assert (response.status_code, response.headers["upgrade"]) == (426, "websocket")


@pytest.mark.anyio
async def test_readme_shows_the_chat() -> None:
    (code,) = python_in((ROOT / "README.md").read_text())
    names: dict[str, Any] = {"__name__": "readme"}
    exec(code, names)
    async with testing.connect(names["app"], "/chat/a") as ann, testing.connect(names["app"], "/chat/a") as bob:
        await ann.send("hello")
        assert await bob.receive() == "hello"


@pytest.mark.anyio
async def test_router_gives_its_prefix_and_converts() -> None:
    async with testing.connect(snippet("fastapi_router").app, "/api/games/7") as client:
        assert await client.receive() == "this is game 7"


@pytest.mark.anyio
async def test_dependency_lets_in_by_cookie() -> None:
    app = snippet("auth_depends").app
    with pytest.raises(testing.Refused) as refused:
        async with testing.connect(app, "/inbox"):
            pass
    assert (refused.value.status_code, refused.value.json()) == (401, {"detail": "log in first"})
    async with testing.connect(app, "/inbox", headers={"Cookie": "session=f3a9"}) as client:
        assert await client.receive() == "hello ann"


@pytest.mark.anyio
async def test_hook_lets_in_by_token() -> None:
    app = snippet("auth_hook").app
    with pytest.raises(testing.Refused) as refused:
        async with testing.connect(app, "/whoami"):
            pass
    assert (refused.value.status_code, refused.value.headers["www-authenticate"]) == (401, "Bearer")
    async with testing.connect(app, "/whoami", headers={"Authorization": "Bearer s3cret"}) as client:
        assert await client.receive() == "ann"


@pytest.mark.anyio
async def test_middleware_in_front_gives_the_user() -> None:
    app = snippet("auth_user").app
    with pytest.raises(testing.Refused):
        async with testing.connect(app, "/whoami"):
            pass
    async with testing.connect(app, "/whoami", headers={"Cookie": "session=f3a9"}) as client:
        assert await client.receive() == "ann"


@pytest.mark.anyio
async def test_token_lets_in_until_it_expires_or_a_newer_one_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "a secret of the application's, which is long enough"

    def token(seconds: float, **claims: Any) -> str:
        return jwt.encode({"sub": "ann", "aud": "chat", "exp": time.time() + seconds, **claims}, secret, "HS256")

    monkeypatch.setenv("JWT_SECRET", secret)
    app = snippet("auth_jwt").app
    with pytest.raises(testing.Refused, match="401"):
        async with testing.connect(app, "/whoami", headers={"Authorization": f"Bearer {token(60, aud='news')}"}):
            pass
    async with testing.connect(app, "/whoami", headers={"Cookie": f"token={token(60)}"}) as client:
        assert str(await client.receive()).startswith("ann, until ")
        await client.send(token(60, sub="bob"))
        assert await client.receive() == "no: it is another user's"
    async with testing.connect(app, "/whoami", subprotocols=["bearer", token(1.2)]) as client:
        assert client.subprotocol == "bearer"
        await client.receive()
        with pytest.raises(asgi_ws.ConnectionClosed) as closed:
            await client.receive()
        assert (closed.value.code, closed.value.reason) == (4401, "expired")


@pytest.mark.anyio
async def test_ticket_lets_in_once() -> None:
    app, origin = snippet("auth_tickets").app, {"Origin": "http://testserver"}
    assert (await testing.request(app, "POST", "/ticket")).status_code == 401
    ticket = (await testing.request(app, "POST", "/ticket", headers={"Cookie": "session=f3a9", **origin})).json()
    async with testing.connect(app, f"/inbox?ticket={ticket}", headers=origin) as client:
        assert await client.receive() == "hello ann"
    with pytest.raises(testing.Refused, match="401"):
        async with testing.connect(app, f"/inbox?ticket={ticket}", headers=origin):
            pass


def test_django_s_sessions_let_in(tmp_path: Path) -> None:
    pytest.importorskip("django")
    site = ROOT / "tests" / "django"
    subprocess.run(
        [sys.executable, site / "check.py", DOCS / "snippets" / "django_asgi.py"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{site}", "DJANGO_DATABASE": str(tmp_path / "database")},
        check=True,
        timeout=30,
    )


@pytest.mark.anyio
async def test_handler_finishes_the_handshake_itself() -> None:
    app = snippet("auth_accept").app
    with pytest.raises(testing.Refused) as refused:
        async with testing.connect(app, "/rooms/cellar"):
            pass
    assert refused.value.status_code == 409
    async with testing.connect(app, "/rooms/attic") as client:
        assert client.headers["x-room"] == "attic"
        assert await client.receive() == "welcome to attic"


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://www.example.com", True),
        ("http://localhost:5173", True),
        ("https://example.com", False),
        ("http://testserver", False),
        ("null", False),
    ],
)
@pytest.mark.anyio
async def test_listed_origins_may_connect(origin: str, allowed: bool) -> None:
    connecting = testing.connect(snippet("origins").app, "/echo", headers={"Origin": origin})
    if allowed:
        async with connecting:
            pass
    else:
        with pytest.raises(testing.Refused, match="403"):
            async with connecting:
                pass


@pytest.mark.anyio
async def test_client_is_told_what_was_dropped() -> None:
    module = snippet("slow_clients")
    async with testing.connect(module.app, "/prices") as client:
        await module.hub.publish("price:gold", {"price": 1})
        assert await client.receive_json() == {"price": 1}
        await client.send("how many?")
        assert await client.receive_json() == {"dropped": 0}


@pytest.mark.anyio
async def test_everything_can_publish() -> None:
    app = snippet("publishing").app
    async with testing.connect(app, "/watch/news") as client, testing.connect(app, "/watch/clock") as clock:
        await testing.request(app, "POST", "/news?text=one")
        await testing.request(app, "POST", "/report?text=two")
        assert [await client.receive(), await client.receive()] == ["one", "two"]
        assert await clock.receive_json() == {"seconds": 1}


@pytest.mark.anyio
async def test_server_side_iterates() -> None:
    module = snippet("publishing")
    async with module.hub:
        counting = asyncio.create_task(module.count("news", 2))
        await asyncio.sleep(0)
        await module.hub.publish("news", "one")
        await module.hub.publish("news", "two")
        assert await counting == ["one", "two"]


@pytest.mark.anyio
async def test_state_says_the_position_from_which_changes_follow() -> None:
    module = snippet("recovery_state")
    async with module.hub:
        await testing.request(module.app, "PUT", "/stock/apples?count=9")
        state = (await testing.request(module.app, "GET", "/stock")).json()
        assert state["stock"] == {"apples": 9, "pears": 4}
        await testing.request(module.app, "PUT", "/stock/pears?count=0")
        async with testing.connect(module.app, f"/stock/changes?since={state['position']}") as client:
            assert (await client.receive_json())["recovered"]
            assert (await client.receive_json())["data"] == {"pears": 0}


@pytest.mark.anyio
async def test_server_side_recovers_and_goes_on_where_it_was_too_slow() -> None:
    module = snippet("recovery_server")
    async with module.hub as hub:
        first = await hub.publish("orders", 1)
        await hub.publish("orders", 2)
        orders = module.orders(first)
        assert await anext(orders) == 2
        big = "3" * hub.context.limits.outbox_size
        for order in (big, 4, 5):
            await hub.publish("orders", order)
        assert [await anext(orders) for _ in range(3)] == [big, 4, 5]
        await orders.aclose()
        with pytest.raises(RuntimeError, match="isn't kept any more"):
            await anext(module.orders(asgi_ws.Position(1, "another-epoch")))


@pytest.mark.anyio
async def test_who_comes_and_goes_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_ws.presence.GRACE", 0.05)
    module = snippet("presence_events")

    @module.hub.websocket("/rooms/{name}")
    async def room(conn: asgi_ws.Connection, name: str) -> None:
        conn.user = "ann"
        await conn.subscribe(f"room:{name}")
        await conn.receive()

    app = Starlette()
    app.add_middleware(asgi_ws.WebSocketMiddleware, hub=module.hub)
    lines: list[str] = []
    async with module.hub:
        logging = asyncio.create_task(module.log("attic", lines))
        await asyncio.sleep(0)
        async with testing.connect(app, "/rooms/attic"):
            pass
        async with asyncio.timeout(5):
            while len(lines) < 2:
                await asyncio.sleep(0.01)
    await logging
    assert lines == ["ann: join", "ann: leave"]


@pytest.mark.anyio
async def test_dataclasses_travel() -> None:
    async with testing.connect(snippet("typed_dataclass").app, "/mirror") as client:
        await client.send({"x": 1, "y": 2})
        assert await client.receive_json() == {"x": -1, "y": -2}
        await client.send({"x": 1, "y": "two"})
        with pytest.raises(asgi_ws.ConnectionClosed) as closed:
            await client.receive()
        assert (closed.value.code, closed.value.reason) == (1007, "$.y: Expected `int`, got `str`")


def cases_of(name: str) -> list[Any]:
    module = snippet(name)
    return [pytest.param(value, id=key) for key, value in vars(module).items() if key.startswith("test_")]


@pytest.mark.parametrize(
    "test",
    [
        test
        for name in ("testing_chat", "testing_refusals", "testing_http", "testing_recovery")
        for test in cases_of(name)
    ],
)
@pytest.mark.anyio
async def test_tests_on_the_pages_pass(test: Any) -> None:
    await test()


def test_starlettes_own_client_works() -> None:
    snippet("testing_starlette").test_chat()


@pytest.mark.anyio
async def test_clients_that_choose_come_with_a_jwt() -> None:
    program = snippet("auth_centrifuge")
    for subject, seconds, expected in (("ann", 60, '"subs":{"user:ann"'), ("ann", -60, '"code":109')):
        claims = {"sub": subject, "exp": time.time() + seconds}
        token = jwt.encode(claims, "a secret of 32 bytes or more, kept", algorithm="HS256")
        async with testing.connect(program.app, "/live") as client:
            await client.send({"id": 1, "connect": {"token": token}})
            assert expected in str(await client.receive())
    async with testing.connect(program.app, "/live") as client:
        await client.send({"id": 1, "connect": {"token": "wrong"}})
        with pytest.raises(ConnectionClosed, match="3500: invalid token"):
            await client.receive()
