"""Who a client is: what browsers and other clients can show, and hooks that check it before the handshake."""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.exceptions import HTTPException

from asgi_ws.connection import Connection
from asgi_ws.exceptions import AsgiWsError

__all__ = ["JWT", "InvalidToken"]

_SYMMETRIC = {"HS256", "HS384", "HS512"}


class InvalidToken(AsgiWsError):
    """A token isn't valid: not signed by whom it has to be, expired, or not meant for this application."""


class JWT:
    """JSON Web Tokens (RFC 7519): a hook for `hub.on_connect`, and `verify` for those that come later.

        hub.on_connect(JWT(key, algorithms=["HS256"], audience="chat"))

    `key` is the secret or the public key, or several by the `kid` that a token's header names. `algorithms` are those
    that a token may be signed with. A token needs an `exp`, at which the connection ends with close code 4401, and the
    claim that `user` names, which becomes the connection's `user`; all claims are `conn.state.claims`.

    It is taken from `Authorization: Bearer`, from the subprotocols `["bearer", token]`, which browsers can send (the
    endpoint then has `subprotocols=["bearer"]`), or from the cookie that `cookie` names. A client without a valid one
    is refused with 401.

    Raises `ValueError` for algorithms that don't go together, `ImportError` without PyJWT.
    """

    def __init__(
        self,
        key: str | bytes | Mapping[str, str | bytes],
        *,
        algorithms: Iterable[str],
        audience: str | Iterable[str] | None = None,
        issuer: str | None = None,
        user: str = "sub",
        cookie: str | None = None,
        leeway: float = 0,
    ) -> None:
        try:
            self._jwt = importlib.import_module("jwt")
        except ImportError as error:
            raise ImportError("JWT needs PyJWT: pip install 'asgi-ws-hub[jwt]'") from error
        self._algorithms = [algorithms] if isinstance(algorithms, str) else list(algorithms)
        known = set(self._jwt.algorithms.get_default_algorithms()) - {"none"}
        if not self._algorithms or not known.issuperset(self._algorithms):
            raise ValueError(f"algorithms={self._algorithms!r}: name those that your tokens are signed with")
        if 0 < len(_SYMMETRIC.intersection(self._algorithms)) < len(self._algorithms):
            # A public key, which everybody has, would do as a secret.
            raise ValueError(f"algorithms={self._algorithms!r}: either those with a secret, or those with a public key")
        self._key = key
        self._audience = audience
        self._issuer = issuer
        self._user = user
        self._cookie = cookie
        self._leeway = leeway

    def verify(self, token: str) -> dict[str, Any]:
        """The claims of a token. Raises `InvalidToken`."""
        try:
            key = self._key
            if isinstance(key, Mapping):
                key = key[self._jwt.get_unverified_header(token)["kid"]]
            claims: dict[str, Any] = self._jwt.decode(
                token,
                key,
                algorithms=self._algorithms,
                audience=self._audience,
                issuer=self._issuer,
                leeway=self._leeway,
                options={"require": ["exp", self._user]},
            )
        except KeyError as error:
            raise InvalidToken("it names no key that is known") from error
        except self._jwt.InvalidTokenError as error:
            raise InvalidToken(str(error)) from error
        return claims

    async def __call__(self, conn: Connection[Any, Any]) -> None:
        """Ask a connection for its token. Raises `HTTPException`."""
        token = bearer_token(conn, self._cookie)
        if token is None:
            raise _unauthorized("a token is needed")
        try:
            self.admit(conn, token)
        except InvalidToken as error:
            raise _unauthorized(f"the token is not valid: {error}") from error

    def admit(self, conn: Connection[Any, Any], token: str) -> dict[str, Any]:
        """Let a connection be the token's user until it expires: also for one that shows a newer token later.

        Returns its claims. Raises `InvalidToken`, also when it is another user's than the one before.
        """
        claims = self.verify(token)
        before = conn.scope.get("user")
        if hasattr(conn.state, "claims") and before != claims[self._user]:
            raise InvalidToken("it is another user's")
        conn.user = claims[self._user]
        conn.state.claims = claims
        conn.expire(claims["exp"] + self._leeway)
        return claims


def bearer_token(conn: Connection[Any, Any], cookie: str | None = None) -> str | None:
    """What a client shows: in `Authorization`, behind the subprotocol `bearer`, or in a cookie."""
    scheme, _, token = conn.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    offered = list(conn.scope.get("subprotocols") or ())
    if "bearer" in offered[:-1]:
        return str(offered[offered.index("bearer") + 1])
    return conn.cookies.get(cookie) if cookie else None


def _unauthorized(detail: str) -> HTTPException:
    return HTTPException(401, detail, headers={"WWW-Authenticate": "Bearer"})
