"""Documents that try a reader of JSON. What is well-formed is only meant to cost much, or to be read in two ways."""

import json

from hypothesis import strategies as st

MALFORMED: dict[str, str | bytes] = {
    "nothing": "",
    "nothing binary": b"",
    "space": " \n\t ",
    "NUL": "\x00",
    "NULs": b"\x00" * 1000,
    "word": "hello",
    "truncated word": "tru",
    "Python's words": "True",
    "single quotes": "{'type': 'join'}",
    "unquoted key": '{type: "join"}',
    "no value": '{"type":}',
    "no colon": '{"type" "join"}',
    "no comma": "[1 2]",
    "trailing comma in an object": '{"type": "join",}',
    "trailing comma in an array": "[1, 2,]",
    "truncated object": '{"type": "join"',
    "truncated string": '"abc',
    "truncated escape": '"\\u12',
    "truncated array": "[1, 2",
    "only an opening brace": "{",
    "closed by the wrong one": "[1, 2}",
    "closed twice": "{}}",
    "two documents": "{} {}",
    "two lines": "1\n2",
    "comment": '{"type": "join"} // a comment',
    "leading zero": "0123",
    "leading plus": "+1",
    "no digits": "-",
    "no fraction": "1.",
    "only a fraction": ".5",
    "no exponent": "1e",
    "hexadecimal": "0x10",
    "unknown escape": '"\\x41"',
    "control character": '"\x01"',
    "newline in a string": '"a\nb"',
    "BOM": '\ufeff{"type": "join"}',
    "BOM binary": b'\xef\xbb\xbf{"type": "join"}',
    "UTF-16": '{"type": "join"}'.encode("utf-16"),
    "UTF-32": '{"type": "join"}'.encode("utf-32-le"),
    "Latin-1": '{"type": "jöin"}'.encode("latin-1"),
    "truncated UTF-8": b'{"type": "\xe2\x82"}',
    "overlong UTF-8": b'"\xc0\xaf"',
    "surrogate in UTF-8": b'"\xed\xa0\x80"',
    "beyond Unicode": b'"\xf4\x90\x80\x80"',
    "bytes that are not text": b"\xff\xfe\xfd",
    "lone surrogate in the text": '"\ud800"',
    "lone surrogate in a key": '{"\udfff": 1}',
    "lone leading surrogate": '"\\ud800"',
    "surrogates in the wrong order": '"\\udc00\\ud800"',
    "half a pair": '"\\ud83dx"',
    "compressed": b"\x78\x9c\xabV*\xa9,HU\xb2R\xca\xca\xcf\xccS\xaa\x05\x00",
    "MessagePack": b"\x81\xa4type\xa4join",
    "deep and open": "[" * 100_000,
    "deep objects and open": '{"a":' * 100_000,
    "alternately deep and open": '[{"a":' * 50_000,
}
"""What is no JSON."""

NOT_FINITE: dict[str, str | bytes] = {
    "NaN": "NaN",
    "Infinity": "Infinity",
    "minus Infinity": "-Infinity",
    "NaN in a field": '{"type": "join", "name": NaN}',
    "Infinity in an array": "[1, Infinity]",
}
"""What is no JSON either, but is read as such by some."""

HOSTILE: dict[str, str | bytes] = {
    "duplicate keys": '{"type": "join", "type": "move"}',
    "duplicate tag of another type": '{"type": "join", "type": {"type": "join"}}',
    "escaped key": '{"\\u0074ype": "join", "name": "x"}',
    "empty key": '{"": 1}',
    "NUL in a key": '{"\\u0000": 1}',
    "prototype": '{"__proto__": {"type": "join"}, "constructor": 1, "__class__": "join"}',
    "nothing of its own": "{}",
    "null": "null",
    "string": '"join"',
    "number": "-0.0",
    "boolean": "true",
    "arrays": '[["type", "join"]]',
    "tag is null": '{"type": null}',
    "tag is a number": '{"type": 1}',
    "tag is true": '{"type": true}',
    "tag is a fraction": '{"type": 1.5}',
    "tag is an array": '{"type": ["join"]}',
    "tag is an object": '{"type": {"type": "join"}}',
    "tag is unknown": '{"type": "x"}',
    "tag with a NUL": '{"type": "join\\u0000"}',
    "tag in capitals": '{"type": "JOIN", "name": "x"}',
    "2 to the 53rd and one": "9007199254740993",
    "2 to the 64th": "18446744073709551616",
    "2 to the 63rd": '{"type": "move", "x": 9223372036854775808, "y": -9223372036854775809}',
    "4300 digits": "1" * 4300,
    "4301 digits": "1" * 4301,
    "100,000 digits": '{"type": "move", "x": ' + "9" * 100_000 + "}",
    "100,000 digits behind the point": "0." + "1" * 100_000,
    "large exponent": "1e400",
    "very large exponent": '{"type": "move", "x": 1e999999999, "y": 1}',
    "very small": "1e-999999999",
    "exponent of 5000 digits": "1e" + "9" * 5000,
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "deep in an unknown field": '{"type": "join", "name": "x", "other": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep in a known field": '{"type": "join", "name": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep before the tag": '{"other": ' + "[" * 50_000 + "]" * 50_000 + ', "type": "join"}',
    "rather deep": "[" * 500 + "]" * 500,
    "many keys": "{" + ",".join(f'"{number}":0' for number in range(20_000)) + "}",
    "many empty arrays": "[" + "[]," * 20_000 + "[]]",
    "long key": '{"' + "x" * 100_000 + '": 1}',
    "long string": '"' + "x" * 100_000 + '"',
    "many escapes": '"' + "\\u0000" * 20_000 + '"',
    "all of Unicode's planes": '"aß€🎈\U0010ffff\\ud83c\\udf88"',
    "noncharacters": '"\uffff\ufffe\ufdd0"',
    "right to left": '{"type": "join", "name": "\u202e\u2066"}',
}
"""What is JSON."""

ALL: dict[str, str | bytes] = {**MALFORMED, **NOT_FINITE, **HOSTILE}

_words = st.sampled_from(["type", "join", "move", "name", "x", "y", ""])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | _words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_words | st.text(max_size=5), inner, max_size=4),
    max_leaves=15,
)


def _damaged(text: str, place: int, insert: str) -> str:
    place %= len(text) + 1
    return text[:place] + insert + text[place + 1 :]


documents = st.one_of(
    st.text(max_size=60),
    st.binary(max_size=60),
    values.map(json.dumps),
    values.map(lambda value: json.dumps(value, ensure_ascii=False)),
    st.builds(_damaged, values.map(json.dumps), st.integers(0, 1000), st.text(max_size=2)),
    values.map(lambda value: json.dumps(value).encode()),
)
"""Text and bytes, JSON and nearly JSON."""
