"""Channel names, patterns, and the rules that say who may subscribe."""

import dataclasses
import re
import unicodedata
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from asgi_ws.exceptions import InvalidChannel
from asgi_ws.messages import Retention

__all__ = ["MAX_LENGTH", "Grant", "Rule", "Rules", "check_name", "compile_pattern"]

MAX_LENGTH = 255
"""How many characters a channel's name may have."""
MAX_HISTORY = 100_000
"""How many publications of a channel can be kept."""
DEFAULT_TTL = 24 * 60 * 60.0
"""How many seconds a history is kept after the last publication where a rule doesn't say."""
MAX_TTL = 366 * DEFAULT_TTL

_PARAMETER = re.compile(r"\{([^{}]*)\}")


def check_name(channel: str) -> None:
    """Raise `InvalidChannel` unless `channel` is a string of 1 to 255 characters without control characters."""
    if not isinstance(channel, str):
        raise InvalidChannel(f"a channel's name is a str, not {type(channel).__name__}")
    if not 0 < len(channel) <= MAX_LENGTH:
        raise InvalidChannel(f"a channel's name has 1 to {MAX_LENGTH} characters, not {len(channel)}")
    # Printable strings have no control characters, and this is the quick way to know.
    if not channel.isprintable() and any(unicodedata.category(character) in ("Cc", "Cs") for character in channel):
        raise InvalidChannel(f"a channel's name has no control characters: {channel!r}")


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """`metrics:{name}` becomes a regular expression in which `name` matches up to the next colon.

    Raises `ValueError` for a pattern that no channel can match.
    """
    check_name(pattern)
    expression, end = "", 0
    for parameter in _PARAMETER.finditer(pattern):
        name = parameter[1]
        if not name.isidentifier():
            raise ValueError(f"{pattern!r}: {{{name}}} isn't a name")
        if f"(?P<{name}>" in expression:
            raise ValueError(f"{pattern!r}: {{{name}}} stands there twice")
        if end and ":" not in pattern[end : parameter.start()]:
            # Two would share what is between the colons in many ways, and a client could have all of them tried.
            raise ValueError(f"{pattern!r}: there is more than one name between two colons")
        expression += re.escape(pattern[end : parameter.start()]) + f"(?P<{name}>[^:]+)"
        end = parameter.end()
    if not {"{", "}"}.isdisjoint(_PARAMETER.sub("", pattern)):
        raise ValueError(f"{pattern!r}: a brace has no partner")
    return re.compile(expression + re.escape(pattern[end:]))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """A yes with more to it, to a client of `hub.serve_pubsub`: from its `authenticate` function, or from a channel's
    rule."""

    user: Any = None
    """Who the client is, as `conn.user`; only from `authenticate`."""
    info: Any = None
    """What others see of the client, besides its id and its user."""
    data: Any = None
    """What the client is told."""
    expires_at: float | None = None
    """When it ends, in seconds since 1970, unless the client comes with a new token: the `exp` of a JWT."""


@dataclasses.dataclass(slots=True)
class Rule:
    """What holds for the channels that match a pattern."""

    pattern: str
    expression: re.Pattern[str]
    retention: Retention | None = None
    presence: bool = False
    allows: Callable[..., Awaitable[bool | Grant]] | None = None
    asks_for: frozenset[str] = frozenset()
    """What of `token` and `data` the rule's function takes, besides the connection and the names."""
    publish: bool | Callable[..., Awaitable[bool]] = False
    """Whether clients that subscribe for themselves may publish, too."""

    async def ask(self, conn: Any, parameters: Mapping[str, Any], *, token: str = "", data: Any = None) -> bool | Grant:
        """Whether the connection may subscribe. It may where no function decides."""
        if self.allows is None:
            return True
        said = {"token": token, "data": data}
        return await self.allows(conn, **parameters, **{name: said[name] for name in self.asks_for})

    @property
    def parameters(self) -> list[str]:
        """The names in the pattern, in their order."""
        return list(self.expression.groupindex)


class Rules:
    """The rules of a hub; of those that match a channel the first one holds."""

    def __init__(self) -> None:
        self._rules: dict[str, Rule] = {}

    def __iter__(self) -> Iterator[Rule]:
        return iter(self._rules.values())

    def add(self, pattern: str, history: int = 0, ttl: float | None = None, presence: bool = False) -> Rule:
        """A new rule for `pattern`. Raises `ValueError` for a pattern that has one or that can't match, and for a
        history that can't be kept."""
        if pattern in self._rules:
            raise ValueError(f"{pattern!r} has a rule already")
        rule = Rule(pattern, compile_pattern(pattern), _retention(history, ttl), presence)
        self._rules[pattern] = rule
        return rule

    def find(self, channel: str) -> tuple[Rule | None, dict[str, Any]]:
        """The rule for a channel, and the values of its pattern's names."""
        for rule in self._rules.values():
            if match := rule.expression.fullmatch(channel):
                return rule, match.groupdict()
        return None, {}


def _retention(history: int, ttl: float | None) -> Retention | None:
    if not isinstance(history, int) or not 0 <= history <= MAX_HISTORY:
        raise ValueError(f"history={history!r}: must be a number of publications, 0 to {MAX_HISTORY}")
    if ttl is not None and not history:
        raise ValueError(f"ttl={ttl!r} without history=: there is nothing to keep")
    if ttl is not None and not 0 < ttl <= MAX_TTL:
        raise ValueError(f"ttl={ttl!r}: must be a number of seconds, more than 0 and at most {MAX_TTL:.0f}")
    return Retention(history, DEFAULT_TTL if ttl is None else float(ttl)) if history else None
