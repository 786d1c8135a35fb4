"""Contents that must fit a JSON schema: by the clients' own `.parse()`, with thoughts before them, and over schemas of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
import pytest

import kiln
from kiln.exporter.serve.problem import Problem
from kiln.exporter.serve.steps.engine import Sampling
from kiln.exporter.serve.steps.grammar import Grammars
from kiln.exporter.serve.steps.rows import sample
from tests.serve.conftest import KEY, Running, Script

openai = pytest.importorskip("openai", reason="pip install 'kiln-export[dev]'")

HI: list = [{"role": "user", "content": "h"}]


class Kiln(pydantic.BaseModel):
    hot: bool
    kind: Literal["gas", "wood"]


@pytest.fixture
def client(real: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("seed", range(4))
def test_parse(client: openai.OpenAI, seed: int) -> None:
    """A random model writes what the schema says, whole, streamed, in both interfaces."""
    free: dict = {"temperature": 1.0, "top_p": 1.0, "extra_body": {"top_k": 0}}
    found = client.chat.completions.parse(model="small", messages=HI, response_format=Kiln, seed=seed, **free)
    assert isinstance(found.choices[0].message.parsed, Kiln) and found.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(model="small", messages=HI, response_format=Kiln, seed=seed, **free) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == found.choices[0].message.parsed
    given: dict = {"temperature": 1.0, "top_p": 1.0, "extra_body": {"top_k": 0, "seed": seed}}
    assert client.responses.parse(model="small", input=HI, text_format=Kiln, **given).output_parsed == found.choices[0].message.parsed


def test_wishes_beside_a_schema(client: openai.OpenAI) -> None:
    """llama.cpp's schema of a json_object; a least length and a bias give way to the schema."""
    form: dict = {"type": "json_object", "schema": {"const": 1}}
    for more in ({}, {"extra_body": {"min_tokens": 9}}, {"logit_bias": {str(i): -100 for i in range(8, 400)}}):
        found = client.chat.completions.create(model="small", messages=HI, response_format=form, max_tokens=9, temperature=0, **more)
        assert json.loads(found.choices[0].message.content) == 1 and found.choices[0].finish_reason == "stop", more


def test_an_object_of_any_kind(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="small", messages=HI, response_format={"type": "json_object"}, temperature=0, max_tokens=8)
    assert found.choices[0].message.content.startswith("{") and found.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize("schema, named", [
    ({"type": "array", "uniqueItems": True}, "uniqueItems"), ({"not": {"type": "string"}}, "not"), ({"type": "string", "format": "zip"},
    "zip"),
    ({"if": {}, "then": {}}, "if"), ({"type": "striing"}, "striing"), ({"$ref": "#/nowhere"},
    "nowhere"), ({"type": "string", "pattern": "("}, "unclosed"), ({"$ref": "#"}, "grammar failed"),
])  # fmt: skip
def test_refused(client: openai.OpenAI, schema: dict, named: str) -> None:
    format_: dict = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="small", messages=HI, response_format=format_)  # type: ignore[call-overload]
    assert named in error.value.message and (error.value.param, error.value.code) == ("response_format", "unsupported_schema")


def test_a_grammar_that_fails_on_its_way(client: openai.OpenAI, caplog: pytest.LogCaptureFixture) -> None:
    """The client is told, in a line that has neither the schema nor what was written, and the log has no more."""
    secret = {"type": "object", "properties": {"secret": {"anyOf": [{"type": "object", "properties": {"a": {"type": "integer"}}}] * 300}}}
    form: dict = {"type": "json_schema", "json_schema": {"schema": secret | {"required": ["secret"]}}}
    with pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(model="small", messages=HI, response_format=form, temperature=0)  # type: ignore[call-overload]
    assert "items; max is" in error.value.message and "secret" not in error.value.message + caplog.text


def test_after_a_thought(script: Script) -> None:
    """The thought is free but for its end; the content begins at the token behind it, whatever the model would say."""
    client = openai.OpenAI(base_url=f"{script.url}/v1", api_key=KEY, max_retries=0)
    script.will_say(100, "thought\nLet me see.", 101, '{"hot":true,"kind":"gas"}', 106)
    found = client.chat.completions.parse(model="gemma", messages=HI, response_format=Kiln, reasoning_effort="high")
    assert found.choices[0].message.parsed == Kiln(hot=True, kind="gas") and script.engine.jobs[-1].choose
    script.will_say('{"hot":true,"kind":"gas"}', 106)
    client.chat.completions.parse(model="gemma", messages=HI, response_format=Kiln, reasoning_effort="none")


@pytest.fixture(scope="module")
def grammars(talking: Path, real: Running) -> Grammars:
    return Grammars(talking / "tokenizer.json", real.served.vocabulary, real.served.lexicon.size)


SCHEMAS: list[dict] = [
    {"type": "integer", "minimum": -5, "maximum": 12}, {"enum": ["a", 1, None, "<turn|>"]}, {"type": "boolean"}, {"const": {"a": [1]}},
    {"type": "array", "items": {"type": "null"}, "maxItems": 3}, {"type": "string", "maxLength": 4},
    {"type": "string", "pattern": "^[a-c]{2,3}$"},
    {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, 2]}}, "required": ["b"], "additionalProperties": False},
    {"anyOf": [{"type": "null"}, {"type": "array", "items": {"enum": [1]}, "minItems": 1, "maxItems": 2}]},
    {"$defs": {"n": {"type": "object", "properties": {"v": {"enum": [0]}}, "required": ["v"], "additionalProperties": False}},
    "$ref": "#/$defs/n"},
    {"type": "string", "format": "date"}, {"type": "number", "multipleOf": 5, "minimum": 0, "maximum": 20},
]  # fmt: skip


@pytest.mark.parametrize("at", range(len(SCHEMAS)))
def test_what_ends_fits(grammars: Grammars, real: Running, at: int) -> None:
    """Tokens by chance among those allowed: the text is JSON of the schema, and no control token but an end stands in it."""
    text, random = grammars.check(SCHEMAS[at], "x"), np.random.default_rng(at)
    for trial in range(10):
        grammar, ids = grammars.make(text), list[int]()
        while len(ids) < 80:
            mask = grammar.allowed()
            assert not mask[[0, 2, 3, 4, 5]].any() and mask.any()
            row = np.where(mask, random.standard_normal(grammars.size) + 3 * grammars.ends, -np.inf).astype(np.float32)
            token = sample(row, Sampling(1.0, 0, 1.0, trial), len(ids))
            grammar.take(token)
            ids.append(token)
            if grammars.ends[token]:
                break
        assert grammars.ends[ids[-1]], "no end within 80 tokens"
        value = json.loads(kiln.Tokenizer(str(grammars.path)).decode(ids[:-1]))
        assert fits(value, SCHEMAS[at]), value


def fits(value: object, schema: dict) -> bool:
    """Of the keywords above."""
    if "$ref" in schema:
        return fits(value, schema["$defs"]["n"])
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kinds: dict[str, type | tuple] = {"integer": int, "boolean": bool, "string": str, "array": list, "object": dict, "number": (int, float)}
    if schema["type"] == "null":
        return value is None
    if not isinstance(value, kinds[schema["type"]]):
        return False
    if isinstance(value, str):
        return len(value) <= schema.get("maxLength", 99) and ("pattern" not in schema or set(value) <= set("abc") and len(value) in (2, 3))
    if isinstance(value, list):
        kind = schema["items"]
        right = all(fits(x, kind) for x in value)
        return right and schema.get("minItems", 0) <= len(value) <= schema["maxItems"]
    if isinstance(value, dict):
        inside = all(name in schema["properties"] and fits(x, schema["properties"][name]) for name, x in value.items())
        return inside and set(schema["required"]) <= set(value)
    if isinstance(value, bool):
        return True
    assert isinstance(value, int | float)
    return schema["minimum"] <= value <= schema["maximum"] and value % schema.get("multipleOf", 1) == 0


def test_a_schema_that_is_too_large(grammars: Grammars) -> None:
    with pytest.raises(Problem, match="are taken at most"):
        grammars.check({"enum": ["x" * 300_000]}, "response_format")
