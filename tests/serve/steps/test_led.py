"""Answers by chance over Gemma 4's vocabulary, led: whatever the logits, a call has one of the names, a content its form."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kiln.exporter.serve.steps.engine import Job
from tests.serve.api.test_gemma import ASK, CALL, CALLED, END, PARAMETERS, THOUGHT, THOUGHT_OVER
from tests.serve.conftest import KEY, Script, Scripted

openai = pytest.importorskip("openai", reason="pip install 'kiln-export[dev]'")

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("weather", "time", "time_of_day")
]
SCHEMA = {"type": "object", "properties": {"hot": {"type": "boolean"}, "kind": {"enum": ["gas", "<turn|>"]}}, "additionalProperties": False}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA | {"required": ["hot", "kind"]}}}


class Chance(Scripted):
    """An engine whose logits are random, some ids likelier than the rest."""

    def __init__(self, likely: Sequence[int], size: int, seed: int):
        super().__init__()
        self.likely, self.size, self.random = list(likely), size, np.random.default_rng(seed)

    def _run(self, job: Job, ids: list[int]) -> None:
        job.started = job.read = time.monotonic()
        new, position = 0, len(job.ids)
        while new < job.most:
            row = self.random.standard_normal(self.size, np.float32)
            row[self.likely] += 6
            token = int(row.argmax())
            said = job.take(job.choose(row, position, token) if job.choose else token)
            if said is False:
                return self._end(job, "taken")
            new += 1 if said is True else len(said)
            position += 1
        self._end(job, "length")


def asked(script: Script, likely: Sequence[int], seed: int, **fields: Any) -> Any:
    """The first choice of an answer by chance."""
    engine, before = Chance(likely, script.served.lexicon.size, seed), script.served.engine
    engine.scripts.append(())
    script.served.engine = engine
    try:
        with openai.OpenAI(base_url=f"{script.url}/v1", api_key=KEY, max_retries=0) as client:
            fields = {"temperature": 0, "extra_body": {"return_token_ids": True}} | fields
            return client.chat.completions.create(model="gemma", messages=ASK, **fields).choices[0]
    finally:
        script.served.engine = before


@pytest.mark.parametrize("seed", range(4))
def test_a_call_of_some_tool(script: Script, seed: int) -> None:
    likely = [END, CALL, CALLED]
    found = asked(script, likely, seed, tools=TOOLS, tool_choice="required", max_tokens=12)
    assert found.token_ids[0] == CALL
    text = script.served.tokenizer.decode(found.token_ids[1:], False)
    assert any(text.startswith(f"call:{t['function']['name']}{{") for t in TOOLS)
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": TOOLS[1:2]}}
    free = asked(script, [CALL], seed, tools=TOOLS, tool_choice=allowed, max_tokens=12)
    assert free.token_ids[0] == CALL and script.served.tokenizer.decode(free.token_ids[1:], False).startswith("call:time{")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("thinks", [True, False])
def test_a_content_by_schema(script: Script, seed: int, thinks: bool) -> None:
    """Ends and calls are as likely as can be, and come nowhere but behind the content."""
    likely = [END, CALL, THOUGHT, THOUGHT_OVER, *script.served.vocabulary.ids("{")]
    found = asked(script, likely, seed, response_format=FORMAT, reasoning_effort="high" if thinks else "none", max_tokens=200)
    assert found.finish_reason == "stop" and found.token_ids[-1] in script.served.vocabulary.ends
    value = json.loads(found.message.content)
    assert value.keys() == {"hot", "kind"} and isinstance(value["hot"], bool) and value["kind"] in ("gas", "<turn|>")
    inside = set(found.token_ids[:-1]) & set(script.served.vocabulary.special.values())
    assert inside <= ({THOUGHT, THOUGHT_OVER} if thinks else set())
