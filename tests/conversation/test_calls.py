"""What stands between a call's markers: three syntaxes, models' mistakes, and calls that were cut."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest

from kiln.exporter.conversation.calls import Segments, Unreadable, read_calls

TEXT = {"type": "string"}
SCHEMAS = {
    "f": {
        "properties": {
            "zip": TEXT,
            "n": {"type": "integer"},
            "o": {"type": "object", "properties": {"zip": TEXT}},
            "l": {"type": "array", "items": TEXT},
            "b": {"type": "boolean"},
            "s": {"type": ["string", "null"]},
        }
    }
}


def segments(text: str) -> Segments:
    """With ~ for the quote."""
    found: list[str | None] = []
    for i, part in enumerate(text.split("~")):
        found += [None] * (i > 0) + [part]
    return found


def read(syntax: str, text: str, closed: bool = True) -> list[tuple[str, str, bool]]:
    return [(w.name, w.arguments, w.complete) for w in read_calls(syntax, segments(text), SCHEMAS, closed)]


@pytest.mark.parametrize(
    ("syntax", "text", "arguments"),
    [
        ("fields", "call:f{zip:007,o:{zip:1},l:[1,2],n:007}", '{"zip":"007","o":{"zip":"1"},"l":["1","2"],"n":"007"}'),
        ("fields", "call:f{n:-0.50e+3,b:True,s:None}", '{"n":-0.50e+3,"b":true,"s":null}'),
        ("fields", "call:f{a:~~,b: false , c:~x~ }", '{"a":"","b":false,"c":"x"}'),
        ("fields", "call:f{a:[],b:{},c:[[{d:[~,~]}]]}", '{"a":[],"b":{},"c":[[{"d":[","]}]]}'),
        ("fields", "call:f{a:New York,b:12:30}", '{"a":"New York","b":"12:30"}'),
        ("fields", 'call:f{"a":"x\\n\\u00e9\\"}","b":["\\ud83d\\ude00"]}', '{"a":"x\\né\\"}","b":["😀"]}'),
        ("fields", 'call:f{a:~say "hi" \\n~}', '{"a":"say \\"hi\\" \\\\n"}'),
        ("fields", "call:f{a:1", '{"a":1}'),
        ("fields", "call:f{a:[~x", '{"a":["x"]}'),
        ("fields", "call:f{a:1}}]} ", '{"a":1}'),
        ("fields", "call:f", "{}"),
        ("fields", " f {}", "{}"),
        ("fields", "call:f{a:1,a:2,b:3}", '{"a":2,"b":3}'),
        ("json", '{"name": "f", "arguments": {"n": 1.50, "t": "<x>"}}', '{"n":1.50,"t":"<x>"}'),
        ("json", '\n{"arguments": "{\\"n\\": 1}", "name": "f"}\n', '{"n":1}'),
        ("json", '{"name": "f"}', "{}"),
        ("json", '{"name": "f", "parameters": {"n": [1, {"a": null}]', '{"n":[1,{"a":null}]}'),
        ("tags", "\n<function=f>\n<parameter=zip>\n007\n</parameter>\n<parameter=n>\n7\n</parameter>\n</function>\n",
         '{"zip":"007","n":7}'),
        ("tags", "<function=f><parameter=t>\na\n\nb < c\n</parameter></function>", '{"t":"a\\n\\nb < c"}'),
        ("tags", "<function=f>\n<parameter=o>\n{\"x\": [1.0]}\n</parameter>\n</function>", '{"o":{"x":[1.0]}}'),
        ("tags", "<function=f>\n</function>", "{}"),
    ],
)  # fmt: skip
def test_arguments(syntax: str, text: str, arguments: str) -> None:
    json.loads(arguments)
    if syntax == "fields" and "b:3" in text:
        assert json.loads(read(syntax, text)[0][1]) == json.loads(arguments)
    else:
        assert read(syntax, text) == [("f", arguments, True)]


def test_several_in_one() -> None:
    assert read("fields", "call:f{a:1}call:g{b:2}") == [("f", '{"a":1}', True), ("g", '{"b":2}', True)]
    assert read("json", '[{"name": "f"}, {"name": "g"}]') == [("f", "{}", True), ("g", "{}", True)]
    assert [name for name, _, _ in read("tags", "<function=f></function><function=g></function>")] == ["f", "g"]


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        ("fields", ""), ("fields", "hello there"), ("fields", "call:{}"), ("fields", "call:f{a}"), ("fields", "call:f{a:1} and more"),
        ("fields", "call:f{:1}"), ("fields", "call:f{a:~x~y}"), ("fields", "call:f{" + "a:{" * 1000),
        ("fields", "call:" + "f" * 300 + "{}"),
        ("json", "f"), ("json", '{"arguments": {}}'), ("json", '{"name": "f", "arguments": [1]}'), ("json", '{"name": "f"} and'),
        ("json", "[" * 5000), ("tags", "f"), ("tags", "<function=f></function> and"), ("tags", "<function=a b></function>"),
    ],
)  # fmt: skip
def test_no_call(syntax: str, text: str) -> None:
    with pytest.raises(Unreadable):
        read(syntax, text)


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        ("fields", 'call:f{zip:75001,o:{zip:~a}b~,x:[1,~b~,{k:false}]},l:[],"q":"a\\n\\"b",n:12345678901234567890}'),
        ("json", '{"name": "f", "arguments": {"n": 1.50, "t": "a\\"b", "l": [1, [true]]}}'),
        ("tags", "<function=f>\n<parameter=zip>\n007\n</parameter>\n<parameter=n>\n7\n</parameter>\n</function>"),
    ],
)
def test_a_cut_call_is_a_prefix_of_the_whole(syntax: str, text: str) -> None:
    """Wherever it is cut: nothing yet, or a beginning of the JSON that the whole call gives."""
    ((_, whole, complete),) = read(syntax, text, closed=False)
    assert complete and json.loads(whole)
    lengths = set()
    for cut in range(len(text)):
        try:
            ((name, part, done),) = read(syntax, text[:cut], closed=False)
        except Unreadable:
            continue
        assert name == "f" and whole.startswith(part) and not done, (text[:cut], part)
        lengths.add(len(part))
    assert len(lengths) > (2 if syntax == "tags" else 15)


@pytest.mark.parametrize("syntax", ["fields", "json", "tags"])
def test_any_text(syntax: str) -> None:
    """A call or Unreadable, nothing else; and arguments that are JSON."""
    random = Random(syntax)
    words = ["call:", "f", "{", "}", "[", "]", ":", ",", "~", '"', "\\", "1", "null", " ", "\n", "é", '{"name": "f", "arguments": {',
             "<function=f>",
             "<parameter=n>", "</parameter>", "</function>", "\\u12", "-", "e9"]  # fmt: skip
    found = 0
    for _ in range(4000):
        text = "".join(random.choices(words, k=random.randrange(1, 16)))
        for start in ("", "call:f{", '{"name": "f", "arguments": {', "<function=f>"):
            for closed in (True, False):
                try:
                    calls: list[Any] = read(syntax, start + text, closed)
                except Unreadable:
                    continue
                for _, arguments, complete in calls:
                    found += complete
                    assert not complete or isinstance(json.loads(arguments), dict)
    assert found > 200
