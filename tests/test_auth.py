import asyncio
import base64
import contextlib
import json
import sys
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from starlette.applications import Starlette

from asgi_ws import Connection, ConnectionClosed, Hub, WebSocketMiddleware
from asgi_ws.auth import JWT, InvalidToken, Tickets
from asgi_ws.testing import Refused, connect

pytestmark = pytest.mark.anyio

SECRET = "a secret of thirty-two bytes, and some more"
PRIVATE = rsa.generate_private_key(public_exponent=65537, key_size=2048)
PEM = PRIVATE.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def token(seconds: float = 60, key: Any = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    headers = {"kid": claims.pop("kid")} if "kid" in claims else None
    return jwt.encode({"sub": "ann", "exp": time.time() + seconds, **claims}, key, algorithm, headers=headers)


def application(verify: JWT, **options: Any) -> WebSocketMiddleware:
    hub = Hub()
    hub.on_connect(verify)

    @hub.websocket("/me", **options)
    async def me(conn: Connection) -> None:
        await conn.send(f"{conn.user} {conn.state.claims['sub']} {conn.user_id}")
        async for newer in conn:
            try:
                verify.admit(conn, newer)
                await conn.send("longer")
            except InvalidToken as error:
                await conn.send(str(error))

    return WebSocketMiddleware(Starlette(), hub)


async def test_a_token_in_the_authorization_header_says_who_it_is() -> None:
    app = application(JWT(SECRET, algorithms=["HS256"]))
    async with connect(app, "/me", headers={"Authorization": f"bearer {token()}"}) as client:
        assert await client.receive() == "ann ann ann"


async def test_a_browser_shows_it_behind_the_subprotocol_bearer_which_alone_is_echoed() -> None:
    app = application(JWT(SECRET, algorithms="HS256"), subprotocols=["bearer"])
    async with connect(app, "/me", subprotocols=["bearer", token()]) as client:
        assert client.subprotocol == "bearer"
        assert await client.receive() == "ann ann ann"


async def test_or_in_a_cookie_where_that_is_named() -> None:
    cookie = {"Cookie": f"session={token()}"}
    async with connect(
        application(JWT(SECRET, algorithms=["HS256"], cookie="session")), "/me", headers=cookie
    ) as client:
        assert await client.receive() == "ann ann ann"
    with pytest.raises(Refused) as refused:
        async with connect(application(JWT(SECRET, algorithms=["HS256"])), "/me", headers=cookie):
            pass
    assert refused.value.status_code == 401


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Basic YTpi"}, {"Authorization": "Bearer "}])
async def test_without_a_token_nobody_comes_in(headers: dict[str, str]) -> None:
    with pytest.raises(Refused) as refused:
        async with connect(application(JWT(SECRET, algorithms=["HS256"])), "/me", headers=headers):
            pass
    assert (refused.value.status_code, refused.value.headers["www-authenticate"]) == (401, "Bearer")
    assert "a token is needed" in refused.value.text


def unsigned() -> str:
    def part(value: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'none', 'typ': 'JWT'})}.{part({'sub': 'ann', 'exp': time.time() + 60})}."


@pytest.mark.parametrize(
    ("shown", "why"),
    [
        (lambda: token(-1), "expired"),
        (lambda: token(key="another secret of thirty-two bytes, and some"), "verification failed"),
        (lambda: jwt.encode({"sub": "ann"}, SECRET, "HS256"), '"exp"'),
        (lambda: jwt.encode({"exp": time.time() + 60}, SECRET, "HS256"), '"sub"'),
        (lambda: token(key=SECRET * 2, algorithm="HS512"), "alg"),
        (lambda: token(aud="others"), "Invalid audience"),
        (unsigned, "alg"),
        (lambda: "not.a.token", "not valid"),
        (lambda: "ä" * 10, "not valid"),
    ],
)
async def test_what_is_not_valid_is_refused_with_the_reason(shown: Any, why: str) -> None:
    with pytest.raises(Refused) as refused:
        headers = {"Authorization": "Bearer " + shown()}
        async with connect(application(JWT(SECRET, algorithms=["HS256"])), "/me", headers=headers):
            pass
    assert refused.value.status_code == 401
    assert why in refused.value.text


def test_a_public_key_is_no_secret() -> None:
    verify = JWT(PEM, algorithms=["RS256"])
    assert verify.verify(token(key=PRIVATE, algorithm="RS256"))["sub"] == "ann"
    header, payload, _ = token(key=PRIVATE, algorithm="RS256").split(".")
    forged = json.loads(base64.urlsafe_b64decode(header + "=="))
    forged["alg"] = "HS256"
    words = base64.urlsafe_b64encode(json.dumps(forged).encode()).decode().rstrip("=") + "." + payload
    key = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    signature = base64.urlsafe_b64encode(key.sign(words.encode(), PEM)).decode().rstrip("=")
    with pytest.raises(InvalidToken):
        verify.verify(f"{words}.{signature}")


def test_of_several_keys_it_is_the_one_that_the_token_names() -> None:
    verify = JWT({"old": SECRET, "new": SECRET + "!"}, algorithms=["HS256"], audience=["chat"], issuer="us")
    assert verify.verify(token(key=SECRET + "!", kid="new", aud="chat", iss="us"))["sub"] == "ann"
    for wrong in (token(kid="new", aud="chat", iss="us"), token(kid="other"), token()):
        with pytest.raises(InvalidToken):
            verify.verify(wrong)


@pytest.mark.parametrize("algorithms", [[], ["none"], ["HS256", "none"], ["HS256", "RS256"], ["AB12"]])
def test_algorithms_that_do_not_go_together_stop_the_developer(algorithms: list[str]) -> None:
    with pytest.raises(ValueError, match="algorithms="):
        JWT(SECRET, algorithms=algorithms)


def test_without_pyjwt_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jwt", None)
    with pytest.raises(ImportError, match=r"pip install 'asgi-ws-hub\[jwt\]'"):
        JWT(SECRET, algorithms=["HS256"])


async def test_a_connection_ends_with_its_token_unless_a_newer_one_of_the_same_user_is_shown() -> None:
    verify = JWT(SECRET, algorithms=["HS256"])
    async with connect(application(verify), "/me", headers={"Authorization": f"Bearer {token(1.5)}"}) as client:
        await client.receive()
        await client.send(token(sub="bob"))
        assert await client.receive() == "it is another user's"
        await client.send(token(1.5))
        assert await client.receive() == "longer"
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
        assert (closed.value.code, closed.value.reason) == (4401, "expired")


async def test_an_expiry_can_be_taken_back_and_one_that_has_passed_refuses() -> None:
    hub = Hub()

    @hub.websocket("/stays")
    async def stays(conn: Connection) -> None:
        conn.expire(time.time() + 0.05)
        conn.expire(None)
        async for text in conn:
            await conn.send(text)

    @hub.websocket("/late", accept=False)
    async def late(conn: Connection) -> None:
        conn.expire(0)
        await asyncio.sleep(0.01)
        await conn.accept()

    app = WebSocketMiddleware(Starlette(), hub)
    with pytest.raises(Refused) as refused:
        async with connect(app, "/late"):
            pass
    assert refused.value.status_code == 401
    async with connect(app, "/stays") as client:
        await asyncio.sleep(0.1)
        await client.send("here")
        assert await client.receive() == "here"


# Tickets


def ticket_office(**options: Any) -> tuple[WebSocketMiddleware, Hub, Tickets]:
    hub = Hub()
    tickets = Tickets(hub, **options)
    hub.on_connect(tickets)

    @hub.websocket("/{name}")
    async def me(conn: Connection, name: str) -> None:
        await conn.send(f"{conn.user} at {name}")

    return WebSocketMiddleware(Starlette(), hub), hub, tickets


async def test_a_ticket_is_good_for_one_handshake() -> None:
    app, hub, tickets = ticket_office()
    async with hub:
        ticket = await tickets.issue(17)
        assert len(ticket) >= 43
        async with connect(app, f"/chat?ticket={ticket}") as client:
            assert await client.receive() == "17 at chat"
        for again in (ticket, "", ticket[:-1]):
            with pytest.raises(Refused) as refused:
                async with connect(app, f"/chat?ticket={again}"):
                    pass
            assert refused.value.status_code == 401


async def test_of_many_who_have_the_same_ticket_one_comes_in() -> None:
    app, hub, tickets = ticket_office()
    came = []

    async def come(ticket: str) -> None:
        with contextlib.suppress(Refused):
            async with connect(app, f"/chat?ticket={ticket}") as client:
                came.append(await client.receive())

    async with hub:
        ticket = await tickets.issue("ann")
        await asyncio.gather(*(come(ticket) for _ in range(100)))
    assert came == ["ann at chat"]


@pytest.mark.parametrize(
    ("bound", "path", "headers", "good"),
    [
        ({"path": "/chat"}, "/chat", {}, True),
        ({"path": "/chat"}, "/admin", {}, False),
        ({"origin": "http://testserver"}, "/chat", {"Origin": "http://testserver"}, True),
        ({"origin": "http://testserver"}, "/chat", {}, False),
    ],
)
async def test_a_ticket_is_for_one_endpoint_and_one_origin_where_that_is_said(
    bound: dict[str, str], path: str, headers: dict[str, str], good: bool
) -> None:
    app, hub, tickets = ticket_office()
    async with hub:
        ticket = await tickets.issue("ann", **bound)
        came = False
        with contextlib.suppress(Refused):
            async with connect(app, f"{path}?ticket={ticket}", headers=headers) as client:
                came = (await client.receive()).startswith("ann")
        assert came == good


async def test_a_ticket_expires() -> None:
    app, hub, tickets = ticket_office(ttl=0.05)
    async with hub:
        ticket = await tickets.issue("ann")
        await asyncio.sleep(0.1)
        with pytest.raises(Refused):
            async with connect(app, f"/chat?ticket={ticket}"):
                pass


@pytest.mark.parametrize("ttl", [0, -1, 3601])
def test_a_tickets_time_is_short(ttl: float) -> None:
    with pytest.raises(ValueError, match="ttl="):
        Tickets(Hub(), ttl=ttl)
