import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_ws.channels import MAX_LENGTH, Rules, check_name, compile_pattern
from asgi_ws.messages import Retention

quick = settings(max_examples=60, deadline=None, database=None)


@pytest.mark.parametrize(
    "name",
    ["a", "room:1", "chat:Räume/€ 🎈", " ", "{x}", "a\u2028b", "\u200f", "x" * MAX_LENGTH, "#$%&*?[]"],
)
def test_names_are_printable_or_not_but_have_no_control_characters(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", ["\x00", "a\nb", "a\tb", "\x1f", "\x7f", "\x85", "\x9f", "a\ud800", "\udfff"])
def test_control_characters_and_lone_surrogates_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no control characters"):
        check_name(name)


@pytest.mark.parametrize("name", ["", "x" * (MAX_LENGTH + 1)])
def test_names_have_1_to_255_characters(name: str) -> None:
    with pytest.raises(ValueError, match=f"1 to 255 characters, not {len(name)}"):
        check_name(name)


@pytest.mark.parametrize("name", [None, 7, b"room", ["room"]])
def test_names_are_strings(name: object) -> None:
    with pytest.raises(ValueError, match="a channel's name is a str, not"):
        check_name(name)


@quick
@given(st.text(max_size=300))
def test_a_name_that_passes_can_be_sent(name: str) -> None:
    try:
        check_name(name)
    except ValueError:
        return
    assert name.encode().decode() == name
    assert not any(character in name for character in "\0\r\n")


@pytest.mark.parametrize(
    ("pattern", "channel", "values"),
    [
        ("news", "news", {}),
        ("news", "new", None),
        ("news", "news2", None),
        ("metrics:{name}", "metrics:cpu", {"name": "cpu"}),
        ("metrics:{name}", "metrics:", None),
        ("metrics:{name}", "metrics:a:b", None),
        ("metrics:{name}", "xmetrics:a", None),
        ("{kind}:{id}", "job:17", {"kind": "job", "id": "17"}),
        ("{kind}:{id}", "job", None),
        ("{all}", "anything at all/€", {"all": "anything at all/€"}),
        ("a.c:{x}", "abc:1", None),
        ("a.c:{x}", "a.c:1", {"x": "1"}),
        ("(x)*:{n}", "(x)*:1", {"n": "1"}),
        ("{größe}-cm", "3-cm", {"größe": "3"}),
        ("room:{a}:x-{b}", "room:1:x-2", {"a": "1", "b": "2"}),
    ],
)
def test_a_name_matches_up_to_the_next_colon(pattern: str, channel: str, values: dict[str, str] | None) -> None:
    match = compile_pattern(pattern).fullmatch(channel)
    assert (match and match.groupdict()) == values


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("", "1 to 255"),
        ("a\nb", "control"),
        ("{}", "isn't a name"),
        ("{1}", "isn't a name"),
        ("{a b}", "isn't a name"),
        ("{name:int}", "isn't a name"),
        ("{a}:{a}", "stands there twice"),
        ("{a}{b}", "more than one name"),
        ("room:{a}-{b}", "more than one name"),
        ("{a", "no partner"),
        ("a}", "no partner"),
        ("{{a}}", "no partner"),
        ("}{", "no partner"),
    ],
)
def test_patterns_that_cannot_match_are_refused(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        compile_pattern(pattern)


@quick
@given(st.text(max_size=40))
def test_text_without_braces_matches_itself_alone(text: str) -> None:
    if "{" in text or "}" in text:
        return
    try:
        check_name(text)
    except ValueError:
        return
    expression = compile_pattern(text)
    assert expression.fullmatch(text)
    assert not expression.fullmatch(text + "x")


def test_the_first_rule_that_matches_holds() -> None:
    rules = Rules()
    lobby, any_room = rules.add("room:lobby"), rules.add("room:{name}")
    assert rules.find("room:lobby") == (lobby, {})
    assert rules.find("room:1") == (any_room, {"name": "1"})
    assert rules.find("other") == (None, {})


def test_a_rule_knows_its_names_in_their_order() -> None:
    rule = Rules().add("{kind}:{id}:{part}")
    assert rule.pattern == "{kind}:{id}:{part}"
    assert rule.parameters == ["kind", "id", "part"]
    assert rule.allows is None


def test_a_pattern_has_one_rule() -> None:
    rules = Rules()
    rules.add("room:{name}")
    with pytest.raises(ValueError, match=r"'room:\{name\}' has a rule already"):
        rules.add("room:{name}")


def test_a_rule_says_what_is_kept_and_for_how_long() -> None:
    rules = Rules()
    assert rules.add("a").retention is None
    assert rules.add("b", history=1).retention == Retention(1, 24 * 60 * 60)
    assert rules.add("c", history=100_000, ttl=3).retention == Retention(100_000, 3.0)
    assert not rules.add("d", history=0).presence
    assert rules.add("e", presence=True).presence
    assert [rule.pattern for rule in rules] == list("abcde")


@pytest.mark.parametrize("history", [-1, 100_001, 1.5, "10", None])
def test_a_history_is_a_number_of_publications_that_can_be_kept(history: object) -> None:
    with pytest.raises(ValueError, match="must be a number of publications, 0 to 100000"):
        Rules().add("a", history=history)  # type: ignore[arg-type]


@pytest.mark.parametrize("ttl", [0, -1.0, float("nan"), float("inf"), 366 * 24 * 60 * 60 + 1])
def test_a_time_to_keep_is_a_number_of_seconds(ttl: float) -> None:
    with pytest.raises(ValueError, match="must be a number of seconds"):
        Rules().add("a", history=1, ttl=ttl)


def test_a_time_without_a_history_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="there is nothing to keep"):
        Rules().add("a", ttl=5)
