"""Who a client is: what browsers and other clients can show, and hooks that check it before the handshake."""

import dataclasses
import hashlib
import importlib
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.exceptions import HTTPException

from asgi_ws.connection import Connection
from asgi_ws.exceptions import InvalidToken, TokenExpired
from asgi_ws.hub import Hub
from asgi_ws.payloads import json_decoder, to_json

__all__ = ["JWT", "InvalidToken", "Tickets"]

_SYMMETRIC = {"HS256", "HS384", "HS512"}


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
        """The claims of a token. Raises `InvalidToken`, and `TokenExpired`, which is one, for what was right once."""
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
        except self._jwt.ExpiredSignatureError as error:
            raise TokenExpired(str(error)) from error
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


class Tickets:
    """One-time tickets, for browsers, which can't send a header with a handshake: a hook for `hub.on_connect`.

        tickets = Tickets(hub)
        hub.on_connect(tickets)

        @app.post("/ticket")
        async def ticket(user: Annotated[User, Depends(current_user)]) -> str:
            return await tickets.issue(user.id, path="/chat")

    The page then opens `/chat?ticket=...`, and the connection's `user` is the one whom the ticket was issued to. A
    ticket is a secret of 256 bits, good for one handshake within `ttl` seconds, in whatever process; the broker knows
    only its hash. Without a good one a client is refused with 401.
    """

    def __init__(self, hub: Hub, *, ttl: float = 30, query: str = "ticket") -> None:
        if not 0 < ttl <= 3600:
            raise ValueError(f"ttl={ttl!r}: must be more than 0 seconds, and an hour at most")
        self._hub = hub
        self._ttl = ttl
        self._query = query

    async def issue(self, user: str | int, *, path: str | None = None, origin: str | None = None) -> str:
        """A ticket for a user, only for the endpoint at `path` and for pages of `origin` where these are given.

        Raises `HubNotRunning`, `BrokerError`, and `ValueError` for a broker that keeps nothing.
        """
        ticket = secrets.token_urlsafe(32)
        holder = to_json({"user": str(user), "path": path, "origin": origin})
        await self._hub.context.pubsub.keep(_name_of(ticket), holder, self._ttl)
        return ticket

    async def __call__(self, conn: Connection[Any, Any]) -> None:
        """Take a connection's ticket. Raises `HTTPException`, and what `issue` does."""
        ticket = conn.query_params.get(self._query)
        if not ticket:
            raise HTTPException(401, "a ticket is needed")
        words = await self._hub.context.pubsub.take(_name_of(ticket))
        holder = _read_holder(words) if words is not None else None
        if (
            holder is None
            or holder.path not in (None, conn.scope["path"])
            or holder.origin not in (None, conn.headers.get("origin"))
        ):
            raise HTTPException(401, "the ticket is not valid, or not any more")
        conn.user = holder.user


@dataclasses.dataclass(frozen=True, slots=True)
class _Holder:
    """Whom a ticket was issued to, and what for."""

    user: str
    path: str | None
    origin: str | None


_read_holder = json_decoder(_Holder)


def _name_of(ticket: str) -> str:
    return "ticket:" + hashlib.sha256(ticket.encode()).hexdigest()


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
