import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "asgi_ws"

FLOORS = [
    {"exceptions", "limits", "frames", "tables", "tasks", "_types"},
    {"payloads", "links", "origins"},
    {"messages"},
    {"brokers", "channels", "protocols", "inbox", "outbox", "recovery", "uvicorn"},
    {"pubsub", "transports"},
    {"presence"},
    {"context"},
    {"connection"},
    {"endpoints"},
    {"hub"},
    {"auth", "middleware", "outside", "socketio", "testing"},
    {"deployment"},
    {"__init__", "demo", "cli"},  # the face, and what a terminal gets
    {"__main__"},
]
INSIDE = {
    "brokers": [{"base"}, {"memory", "nats_link", "redis_servers"}, {"redis_links"}, {"nats", "redis"}, {"__init__"}],
    "protocols": [{"base"}, {"bytes", "centrifuge", "json", "positions", "text"}, {"choice"}, {"__init__"}],
    "transports": [
        {"base", "packets", "relay"},
        {"centrifuge", "session", "sse"},
        {"engine_link"},
        {"engine_handshake"},
        {"engineio"},
        {"__init__"},
    ],
    "endpoints": [{"function"}, {"pubsub"}, {"__init__"}],
    "socketio": [{"packets", "handlers", "sessions"}, {"rooms"}, {"socket"}, {"server"}, {"__init__"}],
}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """The room and the module inside it, or "", of everything of the package that a module imports, wherever."""
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for package, *rest in (name.split(".") for name in names):
            if package == PACKAGE.name:
                room, inside = (*rest, "", "")[:2]
                if not (PACKAGE / f"{room}.py").exists() and not (PACKAGE / room / "__init__.py").exists():
                    room = "__init__"
                yield room, inside if (PACKAGE / room / f"{inside}.py").exists() else ""


def floor(name: str, floors: list[set[str]]) -> int:
    return next(number for number, names in enumerate(floors) if name in names)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_down(path: Path) -> None:
    room = path.parts[0].removesuffix(".py")
    for imported, inside in imports(path):
        if imported == room:
            inner = INSIDE[room]
            assert floor(inside or "__init__", inner) < floor(path.stem, inner), f"{path} imports {room}.{inside}"
        else:
            assert floor(imported, FLOORS) < floor(room, FLOORS), f"{path} imports {imported}"
            assert not inside, f"{path} imports {imported}.{inside}: other rooms are entered through their face"


def test_every_module_has_its_floor() -> None:
    rooms = {path.parts[0].removesuffix(".py") for path in MODULES}
    assert rooms <= set().union(*FLOORS)
    for package, floors in INSIDE.items():
        assert {path.stem for path in MODULES if path.parts[0] == package} == set().union(*floors)
    assert {path.parts[0] for path in MODULES if len(path.parts) > 1} == set(INSIDE)
