"""What a model wrote between the markers of a call -> names and arguments as JSON text.

The text arrives as segments; QUOTE stands for the token around strings. Models make mistakes: what has one reading is read so, a
closing marker closes what is open, and all else is `Unreadable`, for the caller to show as it is. Numbers keep their digits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

QUOTE = None  # a segment
MAX_DEPTH = 64
MAX_NAME = 256
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?\Z", re.ASCII)
_LITERALS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_SPACE = " \t\r\n"

Segments = Sequence[str | None]
Schemas = Mapping[str, Any]  # function's name -> JSON schema of its arguments


class Unreadable(Exception):
    """No call can be made of it."""


@dataclass(frozen=True)
class Written:
    """One call. complete: its arguments were closed; else they are the beginning of the JSON that would have been."""

    name: str
    arguments: str
    complete: bool


@dataclass
class _Node:
    """A value as it was written. kind: "string", "bare", "object" or "array"; closed: nothing can be added to it."""

    kind: str
    closed: bool = False
    text: str = ""
    schema: Any = None
    fields: dict[str, _Node] | None = None
    items: list[_Node] | None = None


def opening(syntax: str, name: str) -> str:
    """What stands between a call's opening marker and its arguments, as templates write it."""
    return {"fields": f"call:{name}{{", "json": f'\n{{"name": {json.dumps(name)}, "arguments": ', "tags": f"\n<function={name}>\n"}[syntax]


def read_calls(syntax: str, segments: Segments, schemas: Schemas, closed: bool) -> list[Written]:
    """closed: a marker ended the call, and with it what is open; else the text ended. Raises Unreadable."""
    return _SYNTAXES[syntax](segments, schemas, closed)


class _Reader:
    """Values of Gemma's form and of JSON, which it contains but for its bare words."""

    def __init__(self, text: str, quote: str):
        self.text, self.quote, self.at = text, quote, 0

    def skip(self, more: str = "") -> str:
        """Over white space; the next character, "" at the end."""
        while self.at < len(self.text) and self.text[self.at] in _SPACE + more:
            self.at += 1
        return self.text[self.at : self.at + 1]

    def value(self, schema: Any, depth: int = 0) -> _Node:
        if depth > MAX_DEPTH:
            raise Unreadable("nested too deep")
        first = self.skip()
        if first == self.quote or first == '"':
            return self.string(schema)
        if first == "{":
            return self.object(schema, depth)
        if first == "[":
            return self.array(schema, depth)
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in ",}]" + self.quote:
            self.at += 1
        return _Node("bare", self.at < len(self.text), self.text[start : self.at].strip(), schema)

    def string(self, schema: Any = None) -> _Node:
        mark, start = self.text[self.at], self.at + 1
        if mark == self.quote:
            end = self.text.find(mark, start)
            self.at = len(self.text) if end < 0 else end + 1
            return _Node("string", end >= 0, self.text[start : end if end >= 0 else None], schema)
        end = start
        while end < len(self.text) and self.text[end] != '"':
            end += 2 if self.text[end] == "\\" else 1
        closed = end < len(self.text)
        self.at = min(end + 1, len(self.text))
        return _Node("string", closed, _unescaped(self.text[start : min(end, len(self.text))]), schema)

    def key(self) -> str | None:
        """None where it is not finished."""
        if self.skip() in (self.quote, '"'):
            node = self.string()
            if not node.closed or not self.skip():
                return None
            found = node.text
        else:
            start = self.at
            while self.at < len(self.text) and self.text[self.at] not in ":,{}[]" + self.quote:
                self.at += 1
            if self.at == len(self.text):
                return None
            found = self.text[start : self.at].strip()
        if self.text[self.at] != ":" or not found:
            raise Unreadable("a key without a value")
        self.at += 1
        return found

    def object(self, schema: Any, depth: int) -> _Node:
        fields: dict[str, _Node] = {}
        node = _Node("object", fields=fields, schema=schema)
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        self.at += 1
        while True:
            following = self.skip(",")
            if not following:
                return node
            if following == "}":
                self.at += 1
                node.closed = True
                return node
            key = self.key()
            if key is None:
                node.text = "cut"  # within a key, of which nothing is known
                return node
            fields.pop(key, None)  # the last one counts
            fields[key] = self.value(properties.get(key) if isinstance(properties, Mapping) else None, depth + 1)
            if (end := self.skip()) and end not in ",}":
                raise Unreadable("text behind a value")

    def array(self, schema: Any, depth: int) -> _Node:
        items: list[_Node] = []
        node = _Node("array", items=items, schema=schema)
        of = schema.get("items") if isinstance(schema, Mapping) else None
        self.at += 1
        while True:
            following = self.skip(",")
            if not following:
                return node
            if following == "]":
                self.at += 1
                node.closed = True
                return node
            items.append(self.value(of, depth + 1))
            if (end := self.skip()) and end not in ",]":
                raise Unreadable("text behind a value")


def _unescaped(text: str) -> str:
    """A JSON string's text; where its escapes are none, as it stands."""
    for cut in range(min(7, len(text) + 1)):  # an escape at the end may be unfinished
        try:
            found = json.loads(f'"{text[: len(text) - cut]}"', strict=False)
        except ValueError:
            continue
        return found if found.isascii() else found.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _types(schema: Any) -> set[str]:
    found = schema.get("type") if isinstance(schema, Mapping) else None
    return {str(t).lower() for t in (found if isinstance(found, list | tuple) else [found] if found else [])}


def _bare(text: str, schema: Any) -> str:
    """JSON of a value without quotes: what the schema says it is, else what it looks like."""
    types = _types(schema)
    literal = _LITERALS.get(text)
    if literal == "null":
        return literal
    textual = "string" in types
    if literal and not (textual and "boolean" not in types):
        return literal
    if _NUMBER.match(text) and not (textual and not types & {"number", "integer"}):
        return text
    return _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json(node: _Node, whole: bool) -> str:
    """JSON text. whole: all that is open is closed; else the text ends where what is known ends."""
    if node.kind == "string":
        quoted = _quoted(node.text)
        return quoted if node.closed or whole else quoted[:-1]
    if node.kind == "bare":
        return _bare(node.text, node.schema) if node.closed or whole else ""
    if node.kind == "object":
        if whole and node.text:
            raise Unreadable("a key without a value")
        inside = ",".join(f"{_quoted(key)}:{_json(value, whole)}" for key, value in (node.fields or {}).items())
        return "{" + inside + ("}" if node.closed or whole else "")
    parts = [_json(item, whole) for item in node.items or ()]
    if parts and not parts[-1]:  # a bare item that is not finished
        parts.pop()
    return "[" + ",".join(parts) + ("]" if node.closed or whole else "")


def _joined(segments: Segments) -> tuple[str, str]:
    """The text, with a character that it does not have where QUOTE stood, and that character."""
    text = "".join(s for s in segments if s is not None)
    quote = next(c for c in map(chr, range(0xE000, 0x10FFFE)) if c not in text)
    return "".join(quote if s is None else s for s in segments), quote


def _name(text: str) -> str:
    name = text.strip()
    if not 0 < len(name) <= MAX_NAME or any(c.isspace() or not c.isprintable() for c in name):
        raise Unreadable("no name of a function")
    return name


def _fields(segments: Segments, schemas: Schemas, closed: bool) -> list[Written]:
    """call:NAME{KEY:VALUE,...}: Gemma's. The word "call", the last brackets and quotes around keys may lack or be too many."""
    text, quote = _joined(segments)
    found: list[Written] = []
    reader = _Reader(text, quote)
    while True:
        if reader.skip() == ":":
            reader.at += 1
        elif text.startswith("call:", reader.at):
            reader.at += len("call:")
        brace = text.find("{", reader.at)
        if brace < 0 and not closed:
            if found:
                return found
            raise Unreadable("no arguments yet")
        name = _name(text[reader.at : brace if brace >= 0 else None])
        if brace < 0:
            return [*found, Written(name, "{}", True)]
        reader.at = brace
        node = reader.value(schemas.get(name))
        found.append(Written(name, _json(node, closed or node.closed), closed or node.closed))
        rest = reader.skip("}]")
        if not rest:
            return found
        if not text.startswith("call:", reader.at):
            raise Unreadable("text behind the arguments")


def _whole_json(segments: Segments, schemas: Schemas, closed: bool) -> list[Written]:
    """{"name": NAME, "arguments": {...}}, one or several: Hermes' and Qwen3's."""
    text, quote = _joined(segments)
    found: list[Written] = []
    reader = _Reader(text, quote)
    while reader.skip(",]" if found else "[") == "{":
        node = reader.value(None)
        fields = node.fields or {}
        name, arguments = fields.get("name"), fields.get("arguments") or fields.get("parameters")
        if name is None or name.kind != "string" or not (name.closed or closed):
            raise Unreadable("no name of a function")
        if arguments is not None and arguments.kind == "string":  # JSON within JSON
            inner = _Reader(arguments.text, quote)
            arguments = inner.value(None)
        if arguments is not None and arguments.kind != "object":
            raise Unreadable("its arguments are no object")
        whole = closed or node.closed
        found.append(Written(_name(name.text), _json(arguments, whole) if arguments else "{}" if whole else "", whole))
    if not found or reader.skip("]}"):
        raise Unreadable("no call, or text behind it")
    return found


_FUNCTION = re.compile(r"\s*<function=([^<>\n]*)>\n?")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]*)>\n?")


def _tags(segments: Segments, schemas: Schemas, closed: bool) -> list[Written]:
    """<function=NAME><parameter=KEY>VALUE</parameter>...</function>: Qwen3-Coder's and Qwen3.5's. A value is text unless the schema says
    otherwise."""
    text, _ = _joined(segments)
    found: list[Written] = []
    at = 0
    while head := _FUNCTION.match(text, at):
        name = _name(head.group(1))
        schema = schemas.get(name)
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        values: dict[str, str] = {}
        at = head.end()
        whole = True
        while parameter := _PARAMETER.match(text, at):
            key, start = parameter.group(1).strip(), parameter.end()
            end = text.find("</parameter>", start)
            if end < 0 and not closed:
                whole, at = False, len(text)
                break
            value = text[start : end if end >= 0 else None].removesuffix("\n")
            at = len(text) if end < 0 else end + len("</parameter>")
            values.pop(key, None)
            values[key] = _tagged(value, properties.get(key) if isinstance(properties, Mapping) else None)
        ending = re.compile(r"\s*</function>\s*").match(text, at)
        whole = whole and (closed or ending is not None)
        inside = ",".join(f"{_quoted(key)}:{value}" for key, value in values.items())
        found.append(Written(name, "{" + inside + ("}" if whole else ""), whole))
        at = ending.end() if ending else at
    if not found or text[at:].strip():
        raise Unreadable("no call, or text behind it")
    return found


def _tagged(value: str, schema: Any) -> str:
    types = _types(schema)
    if value in ("null", "None") and (not types or "null" in types):
        return "null"
    if "string" in types or not types:
        return _quoted(value)
    reader = _Reader(value, "\x00")
    try:
        node = reader.value(schema)
        return _json(node, True) if not reader.skip() else _quoted(value)
    except Unreadable:
        return _quoted(value)


_SYNTAXES: Mapping[str, Callable[[Segments, Schemas, bool], list[Written]]] = {"fields": _fields, "json": _whole_json, "tags": _tags}
