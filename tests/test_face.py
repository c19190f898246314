import dataclasses
import importlib
import inspect
import pkgutil
import subprocess
import sys
import types
import typing
from importlib import resources

import pytest

import asgi_ws
from asgi_ws import Connection, ConnectionClosed, Hub, Limits, Position, Publication, WebSocketMiddleware

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(asgi_ws.__path__, "asgi_ws.")
    if not module.name.endswith("__main__")  # it runs when it is imported
)

REQUIRED = inspect.Parameter.empty


def parameters(function: typing.Any) -> dict[str, typing.Any]:
    """The names a caller may use and their defaults; those that are given by name only begin with an asterisk."""
    return {
        ("*" if parameter.kind is parameter.KEYWORD_ONLY else "") + name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    }


def test_all_is_sorted_and_complete() -> None:
    public = [
        name
        for name, value in vars(asgi_ws).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    ]
    assert list(asgi_ws.__all__) == sorted(asgi_ws.__all__)
    assert set(asgi_ws.__all__) == {*public, "testing"}


def test_what_the_design_promises_is_there() -> None:
    assert set(asgi_ws.__all__) >= {
        "AsgiWsError",
        "Broker",
        "BrokerError",
        "Connection",
        "ConnectionClosed",
        "Hub",
        "HubNotRunning",
        "InvalidMessage",
        "Limits",
        "Position",
        "Publication",
        "SubscriptionDenied",
        "WebSocketMiddleware",
        "testing",
    }


@pytest.mark.parametrize("name", ["asgi_ws", *MODULES])
def test_every_module_says_what_is_public(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert [word for word in module.__all__ if not hasattr(module, word)] == []
    assert len(set(module.__all__)) == len(module.__all__)


@pytest.mark.parametrize("name", ["asgi_ws", *MODULES])
def test_everything_public_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    classes_and_functions = [
        value
        for value in (getattr(module, word) for word in module.__all__)
        if inspect.isclass(value) or inspect.isfunction(value)
    ]
    assert [value for value in classes_and_functions if not inspect.getdoc(value)] == []


def test_signatures_of_the_hub() -> None:
    hub = parameters(Hub)
    assert list(hub) == ["broker", "*allowed_origins", "*limits", "*overflow", "*wait"]
    assert hub["broker"] == "memory://"
    assert hub["*allowed_origins"] is None
    assert hub["*limits"] == Limits()
    assert hub["*overflow"] == "close"
    endpoint = {"*subprotocols": (), "*accept": True, "*on_invalid": None}
    assert parameters(Hub.websocket) == {"path": REQUIRED, **endpoint}
    assert parameters(Hub.endpoint) == {"handler": None, **endpoint}
    assert parameters(Hub.publish) == {"channel": REQUIRED, "data": REQUIRED, "*exclude": None}
    assert list(parameters(Hub.on_connect)) == ["hook"]
    kept = {"*history": 0, "*ttl": None, "*presence": False}
    pubsub = {"*authenticate": None, "*channels": None, "*on_message": None}
    assert parameters(Hub.serve_pubsub) == {"path": REQUIRED, **pubsub}
    assert parameters(Hub.rpc) == {"name": REQUIRED}
    assert parameters(Hub.channel) == {"pattern": REQUIRED, **kept, "*publish": False}
    assert parameters(Hub.subscribe) == {"channel": REQUIRED, "*since": None}
    assert parameters(Hub.history) == {"channel": REQUIRED, "*since": None, "*limit": None}
    assert parameters(Hub.presence) == {"channel": REQUIRED}
    assert {"*user", "*connection"} <= set(parameters(Hub.disconnect))
    assert list(parameters(asgi_ws.publish)) == ["url", "channel", "data"]
    assert hasattr(Hub, "__aenter__")
    assert hasattr(Hub, "__aexit__")


def test_signatures_of_the_connection() -> None:
    assert parameters(Connection.receive) == {}
    assert parameters(Connection.send) == {"data": REQUIRED}
    assert list(parameters(Connection.subscribe))[:2] == ["channel", "*since"]
    assert parameters(Connection.unsubscribe) == {"channel": REQUIRED}
    assert parameters(Connection.publish) == {"channel": REQUIRED, "data": REQUIRED, "*exclude_self": False}
    assert parameters(Connection.close) == {"code": 1000, "reason": ""}
    assert parameters(Connection.accept) == {"subprotocol": None, "headers": None}
    attributes = [
        "channels",
        "dropped",
        "headers",
        "cookies",
        "query_params",
        "path_params",
        "user",
        "state",
    ]
    assert [name for name in attributes if not hasattr(Connection, name)] == []


def test_connection_takes_up_to_two_types() -> None:
    assert typing.get_args(Connection[str, bytes]) == (str, bytes)
    assert typing.get_args(Connection[str])[0] is str


def test_limits_and_their_defaults() -> None:
    assert {field.name: field.default for field in dataclasses.fields(Limits)} == {
        "message_size": 1024 * 1024,
        "inbox_messages": 32,
        "outbox_size": 1024 * 1024,
        "channels": 128,
        "recovery": 300,
        "connections": 10_000,
        "connections_per_address": 10_000,
        "messages_per_second": 2_000,
        "burst": 10_000,
        "write_timeout": 10,
        "ping_interval": 25,
        "ping_timeout": 10,
        "drain_timeout": 30,
    }


def test_values_have_the_fields_of_the_design() -> None:
    assert parameters(ConnectionClosed) == {"code": REQUIRED, "reason": "", "clean": True}
    assert parameters(WebSocketMiddleware) == {"app": REQUIRED, "hub": REQUIRED}
    assert [field.name for field in dataclasses.fields(Position)] == ["offset", "epoch"]
    public = [field.name for field in dataclasses.fields(Publication) if not field.name.startswith("_")]
    assert public == ["channel", "payload", "position", "sender"]


def test_signature_of_the_test_client() -> None:
    connect = parameters(asgi_ws.testing.connect)
    assert list(connect)[:2] == ["app", "path"]
    assert connect["*headers"] is None
    assert connect["*subprotocols"] == ()
    assert connect["*timeout"] == 2


def test_types_are_shipped() -> None:
    assert resources.files("asgi_ws").joinpath("py.typed").is_file()


def test_importing_the_package_imports_no_server_and_no_other_framework() -> None:
    code = "import sys, asgi_ws; print(*{'fastapi', 'uvicorn', 'pydantic', 'httpx', 'hypercorn'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
