import uuid
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.authentication import SimpleUser, UnauthenticatedUser

from asgi_ws.origins import Origin, OriginPolicy, parse_origin, user_id

quick = settings(max_examples=100, deadline=None, database=None)


def request(
    *origins: str | bytes, host: str | bytes | Iterable[str | bytes] = "example.com", scheme: str | None = "wss"
) -> dict[str, Any]:
    hosts = [host] if isinstance(host, str | bytes) else host
    headers = [(b"host", value) for value in hosts] + [(b"origin", value) for value in origins]
    encoded = [(name, value if isinstance(value, bytes) else value.encode()) for name, value in headers]
    scope = {"type": "websocket", "headers": encoded}
    return scope if scheme is None else {**scope, "scheme": scheme}


# To wss://example.com; whether the same origin may connect, and whether a list of "https://example.com" lets it in.
TABLE = [
    ("https://example.com", True),
    ("HTTPS://EXAMPLE.COM", True),
    ("https://Example.com:443", True),
    ("https://example.com:0443", True),
    ("http://example.com", False),
    ("http://example.com:443", False),
    ("https://example.com:80", False),
    ("https://example.com:8443", False),
    ("https://example.com:", False),
    ("https://example.com:99999", False),
    ("https://example.com:443443", False),
    ("https://example.com:-443", False),
    ("https://example.com:4 43", False),
    ("https://example.com:４４３", False),  # noqa: RUF001
    ("https://example.com.", False),
    ("https://example.com..", False),
    ("https://evil-example.com", False),
    ("https://evilexample.com", False),
    ("https://evil.example.com", False),
    ("https://example.com.evil", False),
    ("https://example.comevil", False),
    ("https://example.co", False),
    ("https://example_com", False),
    ("https://examplexcom", False),
    ("https://user@example.com", False),
    ("https://user:password@example.com", False),
    ("https://example.com@evil.com", False),
    ("https://example.com:443@evil.com", False),
    ("https://evil.com#example.com", False),
    ("https://evil.com\\example.com", False),
    ("https://example.com/", False),
    ("https://example.com/page", False),
    ("https://example.com?x", False),
    ("https://evil.com/https://example.com", False),
    ("https://exämple.com", False),
    ("https://xn--exmple-cua.com", False),
    ("https://ｅｘａｍｐｌｅ.com", False),  # noqa: RUF001
    ("https://example。com", False),
    ("null", False),
    ("NULL", False),
    ("", False),
    ("*", False),
    ("https://*", False),
    ("https://*.com", False),
    ("https://", False),
    ("://example.com", False),
    ("//example.com", False),
    ("example.com", False),
    ("https:example.com", False),
    ("https:/example.com", False),
    ("wss://example.com", False),
    ("file://", False),
    ("file:///etc/passwd", False),
    ("chrome-extension://abcdefgh", False),
    (" https://example.com", False),
    ("https://example.com ", False),
    ("https://example.com\t", False),
    ("https://example.com https://evil.com", False),
    ("https://example.com, https://evil.com", False),
    ("https://[::1]", False),
    ("https://127.0.0.1", False),
    (b"https://example.com\xff", False),
    (b"https://example.com\x00", False),
]


@pytest.mark.parametrize(("origin", "allowed"), TABLE, ids=lambda value: repr(value))
def test_origins_are_compared_by_scheme_host_and_port(origin: str | bytes, allowed: bool) -> None:
    assert OriginPolicy().allows(request(origin)) is allowed
    assert OriginPolicy(["https://example.com"]).allows(request(origin, host="other.org")) is allowed


@pytest.mark.parametrize(
    ("scheme", "host", "origin", "allowed"),
    [
        ("ws", "example.com", "http://example.com", True),
        ("ws", "example.com:80", "http://example.com", True),
        ("ws", "example.com", "http://example.com:80", True),
        ("ws", "example.com", "https://example.com", False),
        ("wss", "example.com:443", "https://example.com", True),
        ("wss", "EXAMPLE.com", "https://example.COM", True),
        ("wss", "example.com:80", "https://example.com", False),
        ("http", "example.com", "http://example.com", True),
        ("https", "example.com", "https://example.com", True),
        (None, "example.com", "http://example.com", True),
        (None, "example.com", "https://example.com", False),
        ("gopher", "example.com", "gopher://example.com", False),
        ("", "example.com", "://example.com", False),
        ("ws", "localhost:8000", "http://localhost:8000", True),
        ("ws", "localhost:8000", "http://localhost:3000", False),
        ("ws", "localhost:8000", "http://localhost", False),
        ("ws", "localhost:8000", "http://127.0.0.1:8000", False),
        ("ws", "127.0.0.1:8000", "http://127.0.0.1:8000", True),
        ("ws", "127.0.0.1:8000", "http://127.0.0.1.evil.com:8000", False),
        ("ws", "[::1]:8000", "http://[::1]:8000", True),
        ("ws", "[::1]", "http://[::1]:80", True),
        ("ws", "[::1]:8000", "http://[::1]:8001", False),
        ("ws", "[2001:DB8::1]", "http://[2001:db8::1]", True),
        ("ws", "::1", "http://::1", False),
        ("ws", "example.com.", "http://example.com.", True),
        ("ws", "example.com.", "http://example.com", False),
        ("ws", "xn--bcher-kva.de", "http://xn--bcher-kva.de", True),
        ("ws", "bücher.de", "http://bücher.de", False),
        ("ws", "under_score.example", "http://under_score.example", True),
    ],
)
def test_the_same_origin_is_that_of_the_host_header(scheme: str | None, host: str, origin: str, allowed: bool) -> None:
    assert OriginPolicy().allows(request(origin, host=host, scheme=scheme)) is allowed


@pytest.mark.parametrize(
    "host",
    [
        [],
        ["example.com", "example.com"],
        ["example.com", "evil.com"],
        [""],
        ["example.com/"],
        ["example.com?"],
        ["example.com#"],
        ["user@example.com"],
        ["example.com\\"],
        ["example.com "],
        [" example.com"],
        ["example.com:"],
        ["example.com:443:443"],
        ["example.com:99999"],
        ["example.com,evil.com"],
        [b"example.com\xe4"],
    ],
    ids=repr,
)
def test_a_host_that_is_not_one_host_fails_closed(host: list[str | bytes]) -> None:
    assert not OriginPolicy().allows(request("https://example.com", host=host))
    for value in host:
        origin = "https://" + (value if isinstance(value, str) else value.decode("latin-1"))
        if len(host) == 1:
            assert not OriginPolicy().allows(request(origin, host=host))


@pytest.mark.parametrize("policy", [None, ["https://example.com"], "*"])
def test_two_origins_are_refused(policy: Any) -> None:
    assert not OriginPolicy(policy).allows(request("https://example.com", "https://example.com"))
    assert not OriginPolicy(policy).allows(request("https://example.com", "https://evil.com"))


@pytest.mark.parametrize("policy", [None, [], ["https://example.com"], "*"])
def test_a_request_without_an_origin_does_not_come_from_a_page(policy: Any) -> None:
    assert OriginPolicy(policy).allows(request())
    assert OriginPolicy(policy).allows(request(host=[]))


def test_a_list_is_exactly_what_it_names() -> None:
    policy = OriginPolicy(["https://a.example", "http://localhost:3000", "https://[2001:DB8::1]:8443"])
    assert policy.allows(request("https://A.example:443"))
    assert policy.allows(request("http://localhost:3000"))
    assert policy.allows(request("https://[2001:db8::1]:8443"))
    assert not policy.allows(request("http://a.example"))
    assert not policy.allows(request("http://localhost"))
    assert not policy.allows(request("https://example.com")), "the same origin only where it is named"


def test_an_empty_list_allows_no_page() -> None:
    assert not OriginPolicy([]).allows(request("https://example.com"))


def test_an_iterator_is_a_list() -> None:
    policy = OriginPolicy(origin for origin in ["https://example.com"])
    assert policy.allows(request("https://example.com", host="other.org"))
    assert policy.allows(request("https://example.com", host="other.org"))


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://evil.com", True),
        ("http://[::1]:1", True),
        ("chrome-extension://abc", True),
        ("null", False),
        ("", False),
    ],
)
def test_any_is_every_origin_but_null(origin: str, allowed: bool) -> None:
    assert OriginPolicy("*").allows(request(origin, host=[])) is allowed


@pytest.mark.parametrize(
    "origin", ["example.com", "https://example.com/", "null", "*", "https://*.example.com", "https://bücher.de", ""]
)
def test_a_list_with_what_is_no_origin_is_a_mistake(origin: str) -> None:
    with pytest.raises(ValueError, match="isn't an origin like"):
        OriginPolicy(["https://example.com", origin])


@pytest.mark.parametrize("text", ["https://example.com", "", "**"])
def test_one_string_is_no_list(text: Any) -> None:
    with pytest.raises(ValueError, match="give a list of origins"):
        OriginPolicy(text)


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://example.com", ("https", "example.com", 443)),
        ("HTTP://Example.COM:8080", ("http", "example.com", 8080)),
        ("http://[::1]", ("http", "[::1]", 80)),
        ("app://local", ("app", "local", 0)),
        ("https://example.com:65535", ("https", "example.com", 65535)),
        ("https://example.com:65536", None),
        ("ünknown://example.com", None),
    ],
)
def test_an_origin_is_parsed_into_three_values(text: str, origin: Origin | None) -> None:
    assert parse_origin(text) == origin


@quick
@given(st.binary(max_size=40) | st.text(max_size=40), st.binary(max_size=20))
def test_whatever_a_client_sends_is_answered_with_yes_or_no(origin: str | bytes, host: bytes) -> None:
    for policy in (OriginPolicy(), OriginPolicy(["https://example.com"]), OriginPolicy("*")):
        assert policy.allows(request(origin, host=host)) in (True, False)
    assert not OriginPolicy().allows(request(origin, host="a.host.that.nobody.has"))


@quick
@given(st.text(alphabet="exampl.com:/@#?\\[]-0123 \t", max_size=20), st.booleans())
def test_nothing_around_an_allowed_origin_is_allowed(extra: str, before: bool) -> None:
    origin = f"{extra}https://example.com" if before else f"https://example.com{extra}"
    if OriginPolicy(["https://example.com"]).allows(request(origin)):
        assert parse_origin(origin) == ("https", "example.com", 443)
        assert extra == "" or (not before and int(extra.removeprefix(":")) == 443)


# Who the user is


class Person:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        (None, None),
        ("", None),
        ("ann", "ann"),
        (7, "7"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Person(id=uuid.UUID(int=1)), "00000000-0000-0000-0000-000000000001"),
        (Person(identity="ann", id=7), "ann"),
        (Person(id=7, display_name="Ann"), "7"),
        (Person(id=0), "0"),
        (Person(id=None), None),
        (Person(id=""), None),
        (Person(id=object()), None),
        (SimpleUser("ann"), "ann"),
        (UnauthenticatedUser(), None),
        (Person(id=7, is_authenticated=False), None),
        (Person(), None),
    ],
)
def test_a_user_is_known_by_what_identifies_it(user: Any, expected: str | None) -> None:
    assert user_id({"user": user}) == expected
