"""A handler as an endpoint of Starlette or FastAPI: the one place that inspects a function's signature."""

import contextvars
import functools
import importlib.util
import inspect
import typing
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from starlette.convertors import Convertor, FloatConvertor, IntegerConvertor, UUIDConvertor
from starlette.routing import WebSocketRoute, compile_path
from starlette.types import ASGIApp, Scope
from starlette.websockets import WebSocket

from asgi_ws._types import Handler
from asgi_ws.connection import Connection, OnInvalid
from asgi_ws.context import Context
from asgi_ws.exceptions import HubNotRunning
from asgi_ws.payloads import json_decoder
from asgi_ws.protocols import choose_protocol

__all__ = ["Endpoint", "Procedure", "check_async", "check_takes", "current_app", "make_route", "parameters_of", "takes"]

current_app: contextvars.ContextVar[Any] = contextvars.ContextVar("current_app", default=None)
"""The application whose `dependency_overrides` hold for the request."""


def check_async(function: Any, what: str) -> None:
    """Raise `TypeError` unless calling `function` gives a coroutine."""
    if not inspect.iscoroutinefunction(function) and not inspect.iscoroutinefunction(type(function).__call__):
        raise TypeError(f"{_name(function)}: {what} must be an `async def` function, and not a generator")


def check_takes(function: Any, names: Iterable[str]) -> None:
    """Raise `TypeError` unless `function` can be called with a connection and values of these names."""
    try:
        inspect.signature(function).bind(None, **dict.fromkeys(names))
    except TypeError as error:
        expected = ", ".join(["conn", *names])
        raise TypeError(f"{_name(function)}: is called with ({expected}), but {error}") from None


def takes(function: Any, name: str) -> bool:
    """Whether a function has a parameter of this name."""
    return name in inspect.signature(function).parameters


class Procedure:
    """A function that a client calls with JSON: with its connection, and with the data as the second parameter's
    annotation says, if there is one.

    Raises `TypeError` for a function that can't be called so, or a type that can't be read from JSON.
    """

    def __init__(self, function: Any, what: str, namespace: Mapping[str, Any]) -> None:
        check_async(function, what)
        parameters = list(_parameters(function, namespace).values())
        check_takes(function, [each.name for each in parameters[1:2]])
        self._function = function
        self._decode = None
        if len(parameters) > 1:
            annotation = parameters[1].annotation
            self._decode = json_decoder(Any if annotation is inspect.Parameter.empty else annotation)

    async def __call__(self, conn: Any, data: bytes) -> Any:
        """What the function returns. Raises what it does, and `InvalidMessage` for other data than it takes."""
        if self._decode is None:
            return await self._function(conn)
        return await self._function(conn, self._decode(data))


class Endpoint:
    """A handler for the frameworks: an ASGI application, as which Starlette's routes run it, and, called by keywords
    alone, a function with the handler's parameters, as FastAPI wants it for injection.

    `namespace` has the names of annotations that were written where the handler was defined. Raises `TypeError` for a
    handler that can't be called with a connection.
    """

    def __init__(
        self,
        handler: Handler,
        context: Context,
        *,
        subprotocols: Iterable[str | None] = (),
        accept: bool = True,
        on_invalid: OnInvalid | None = None,
        namespace: Mapping[str, Any],
    ) -> None:
        check_async(handler, "a handler")
        if on_invalid is not None:
            check_async(on_invalid, "on_invalid")
        if isinstance(subprotocols, str):
            raise TypeError("subprotocols: give a list of names, not one string")
        parameters = _parameters(handler, namespace)
        name = self._connection = _connection_parameter(handler, parameters)
        self.injected = [parameter for parameter in parameters.values() if parameter.name != name]
        """What the handler takes besides its connection."""
        self._handler = handler
        self._context = context
        self._protocol = choose_protocol(*typing.get_args(parameters[name].annotation))
        self._subprotocols = tuple(subprotocols)
        self._accept = accept
        self._on_invalid = on_invalid
        functools.update_wrapper(self, handler, updated=())
        parameters[name] = parameters[name].replace(annotation=WebSocket)
        self.__signature__ = inspect.Signature(list(parameters.values()))

    async def __call__(self, *asgi: Any, **values: Any) -> None:
        if asgi:
            scope: Scope = asgi[0]
            values = self._path_values(scope["path_params"])
        else:
            scope = values[self._connection].scope
        exchange = scope.get("asgi_ws")
        if exchange is None or not self._context.runs_here:
            raise HubNotRunning
        self._context.admit(scope, exchange)
        values[self._connection] = conn = Connection[Any, Any](
            scope,
            exchange,
            context=self._context,
            protocol=self._protocol,
            subprotocols=self._subprotocols,
            on_invalid=self._on_invalid,
        )
        await conn.serve(self._handler, values, accept=self._accept)

    def _path_values(self, path_params: Mapping[str, Any]) -> dict[str, Any]:
        """What the handler takes, where nothing is injected."""
        values = {}
        for parameter in self.injected:
            default = parameter.default
            if parameter.name in path_params:
                values[parameter.name] = path_params[parameter.name]
            elif default is parameter.empty or type(default).__module__.partition(".")[0] == "fastapi":
                raise TypeError(
                    f"{_name(self._handler)}: {parameter.name!r} isn't in the path of this Starlette route, "
                    "which injects nothing else"
                )
        return values


def make_route(path: str, endpoint: Endpoint | ASGIApp) -> WebSocketRoute:
    """The framework's route for an endpoint: Starlette's where the path has all that the endpoint takes, in its type,
    and FastAPI's where something is to be injected or converted.

    Raises `TypeError` when that needs FastAPI and it isn't installed, and `ValueError` for a path that can't match.
    """
    if not path.startswith("/"):
        raise ValueError(f"the path {path!r} can't match: it doesn't begin with '/'")
    convertors = compile_path(path)[2]
    if not isinstance(endpoint, Endpoint):
        return WebSocketRoute(path, endpoint)
    foreign = [p for p in endpoint.injected if not _converts(convertors.get(p.name), p.annotation)]
    if not foreign:
        return WebSocketRoute(path, endpoint)
    if importlib.util.find_spec("fastapi") is None:
        raise TypeError(_needs_fastapi(path, endpoint, foreign[0], convertors))
    from fastapi.routing import APIWebSocketRoute

    return APIWebSocketRoute(path, endpoint, dependency_overrides_provider=_Overrides())


class _Overrides:
    """The `dependency_overrides` of the application that the request came to."""

    @property
    def dependency_overrides(self) -> Mapping[Any, Any]:
        return getattr(current_app.get(), "dependency_overrides", {})


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", repr(function))


def parameters_of(function: Callable[..., Any], namespace: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    """A function's parameters, with annotations that are types even where they were written as text.

    `namespace` has the names of where it was defined. Raises `TypeError` for an annotation that can't be resolved.
    """
    target: Any = inspect.unwrap(function)
    while isinstance(target, functools.partial):
        target = target.func
    if not inspect.isroutine(target):
        target = target.__call__
    try:
        hints = typing.get_type_hints(target, localns=dict(namespace), include_extras=True)
    except NameError as error:
        raise TypeError(f"{_name(function)}: an annotation can't be resolved: {error}") from error
    return {
        name: parameter.replace(annotation=hints.get(name, parameter.empty))
        for name, parameter in inspect.signature(function).parameters.items()
    }


def _parameters(handler: Handler, namespace: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    """The handler's parameters, each of which can be given by its name."""
    parameters = parameters_of(handler, namespace)
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{_name(handler)}: the parameter {name!r} can't be given by its name")
    return parameters


def _connection_parameter(handler: Handler, parameters: Mapping[str, inspect.Parameter]) -> str:
    """The name of the parameter that is annotated as a connection, or of a first one that isn't annotated."""
    found = [name for name, parameter in parameters.items() if _is_connection(parameter.annotation)]
    if not found:
        found = [name for name, p in list(parameters.items())[:1] if p.annotation is p.empty]
    if len(found) != 1:
        raise TypeError(f"{_name(handler)}: a handler has one parameter for its client: `conn: Connection`")
    return found[0]


def _is_connection(annotation: Any) -> bool:
    return (typing.get_origin(annotation) or annotation) is Connection


def _converts(convertor: Convertor[Any] | None, annotation: Any) -> bool:
    """Whether Starlette's convertor alone gives what the annotation says."""
    if convertor is None:
        return False
    types = {IntegerConvertor: int, FloatConvertor: float, UUIDConvertor: uuid.UUID}
    return annotation in (inspect.Parameter.empty, Any, types.get(type(convertor), str))


def _needs_fastapi(
    path: str, endpoint: Endpoint, parameter: inspect.Parameter, convertors: Mapping[str, Convertor[Any]]
) -> str:
    name = parameter.name
    if name in convertors:
        return (
            f"{_name(endpoint)}: {name!r} arrives from the path {path!r} as text; let Starlette convert it "
            f"(`{{{name}:int}}`), or install FastAPI, which does (`pip install fastapi`)"
        )
    return (
        f"{_name(endpoint)}: {name!r} isn't in the path {path!r}; read `conn.query_params` or `conn.headers`, or "
        "install FastAPI, which injects it (`pip install fastapi`)"
    )
