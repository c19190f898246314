"""Handlers of events: what they take, and how what a client sends becomes that."""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from asgi_ws.endpoints import check_async, parameters_of
from asgi_ws.exceptions import InvalidMessage
from asgi_ws.payloads import converter

__all__ = ["Handler"]


class Handler:
    """An async function that takes a socket and arguments, which are validated where they are annotated.

    `namespace` has the names of annotations that were written where the function was defined. Raises `TypeError` for
    a function that can't be called so, or with an annotation that nothing can be read as.
    """

    def __init__(self, function: Callable[..., Awaitable[Any]], namespace: Mapping[str, Any]) -> None:
        check_async(function, "a handler")
        self.function = function
        self.name = getattr(function, "__qualname__", repr(function))
        self._converters: list[Callable[[Any], Any] | None] = []
        self._rest: Callable[[Any], Any] | None = None
        self._takes_rest = False
        self._required = 0
        socket, *parameters = self._parameters(namespace)
        if socket.kind is socket.VAR_POSITIONAL:
            self._takes_rest = True
        for parameter in parameters:
            convert = None if parameter.annotation in (parameter.empty, Any) else converter(parameter.annotation)
            if parameter.kind is parameter.VAR_POSITIONAL:
                self._rest, self._takes_rest = convert, True
            elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                self._converters.append(convert)
                self._required += parameter.default is parameter.empty
            elif parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
                raise TypeError(f"{self.name}: nothing can give it {parameter.name!r}: events have no names for values")

    def _parameters(self, namespace: Mapping[str, Any]) -> list[inspect.Parameter]:
        parameters = list(parameters_of(self.function, namespace).values())
        if not parameters or parameters[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
            raise TypeError(f"{self.name}: a handler's first parameter is its socket")
        return parameters

    @property
    def most(self) -> int | None:
        """How many arguments it takes at the most."""
        return None if self._takes_rest else len(self._converters)

    def convert(self, args: list[Any]) -> list[Any]:
        """The arguments, validated. Raises `InvalidMessage`."""
        most = self.most
        if len(args) < self._required or (most is not None and len(args) > most):
            takes = f"{self._required}" if most == self._required else f"{self._required} to {most or 'any number'}"
            raise InvalidMessage(f"{self.name} takes {takes} arguments, not {len(args)}")
        converters = self._converters
        return [
            arg if convert is None else convert(arg)
            for arg, convert in zip(args, [*converters, *[self._rest] * (len(args) - len(converters))], strict=False)
        ]
