"""Which web pages may connect (RFC 6455 section 10.2, RFC 6454).

A browser sends cookies with a cross-site WebSocket handshake and asks nobody; so a request that carries `Origin` is
checked here, by parsed values and never by prefixes. A request without one doesn't come from a page.
"""

import contextlib
import re
import uuid
from collections.abc import Iterable
from typing import Literal

from starlette.types import Scope

__all__ = ["Origin", "OriginPolicy", "parse_origin", "user_id"]

Origin = tuple[str, str, int]
"""Scheme, host, port."""

_Id = str | int | uuid.UUID
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SCHEMES = {"ws": "http", "wss": "https", "http": "http", "https": "https"}
_AUTHORITY = re.compile(r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::(?P<port>[0-9]{1,5}))?", re.ASCII)


def parse_origin(text: str) -> Origin | None:
    """`https://example.com` becomes `("https", "example.com", 443)`; what isn't such an origin becomes `None`."""
    scheme, found, authority = text.lower().partition("://")
    return _parse(scheme, authority) if found else None


def _parse(scheme: str, authority: str) -> Origin | None:
    match = _AUTHORITY.fullmatch(authority.lower())
    if match is None or not scheme.isascii() or not scheme:
        return None
    port = int(match["port"]) if match["port"] else _DEFAULT_PORTS.get(scheme, 0)
    return (scheme, match["host"], port) if port < 65536 else None


class OriginPolicy:
    """Says whether a request may connect.

    `allowed` is `None` for the same origin only, a list of origins, or `"*"` for any. `null`, the origin of sandboxed
    pages, is never allowed. Raises `ValueError` for an origin that can't be parsed.
    """

    def __init__(self, allowed: Iterable[str] | Literal["*"] | None = None) -> None:
        self.any = allowed == "*"
        """Whether pages of any origin may connect."""
        self._origins: set[Origin] | None = None
        if isinstance(allowed, str):
            if not self.any:
                raise ValueError(f'allowed_origins={allowed!r}: give a list of origins, or "*"')
        elif allowed is not None:
            self._origins = {self._checked(origin) for origin in allowed}

    @staticmethod
    def _checked(text: str) -> Origin:
        origin = parse_origin(text)
        if origin is None:
            raise ValueError(f"allowed_origins: {text!r} isn't an origin like 'https://example.com'")
        return origin

    def allows(self, scope: Scope) -> bool:
        """Whether the request's `Origin`, if it has one, is among the allowed ones."""
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        if not origins:
            return True
        if len(origins) > 1:
            return False
        origin = parse_origin(origins[0].decode("latin-1"))
        if origin is None:
            return False
        if self._origins is not None:
            return origin in self._origins
        return self.any or origin == _own_origin(scope)


def _own_origin(scope: Scope) -> Origin | None:
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    if len(hosts) != 1:
        return None
    return _parse(_SCHEMES.get(scope.get("scheme", "ws"), ""), hosts[0].decode("latin-1"))


def user_id(scope: Scope) -> str | None:
    """Who a middleware says that the user is: a string, a number, a UUID, or the `identity`, `id` or `display_name` of
    an object; `None` for nobody."""
    user = scope.get("user")
    if user is None or isinstance(user, _Id):
        return None if user is None else str(user) or None
    if getattr(user, "is_authenticated", True) is False:
        return None
    for name in ("identity", "id", "display_name"):
        # Starlette's own users have an identity that isn't implemented.
        with contextlib.suppress(AttributeError, NotImplementedError):
            value = getattr(user, name)
            return str(value) if isinstance(value, _Id) and value != "" else None
    return None
