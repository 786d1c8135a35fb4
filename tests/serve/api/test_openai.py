"""OpenAI's own client against a real model: every text equals that of a session that has the model for itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import numpy as np
import pytest

import kiln
from kiln.exporter.conversation.prompt import common
from kiln.exporter.conversation.request import read_request
from kiln.exporter.serve.api import completions
from kiln.exporter.serve.served import Served
from kiln.exporter.serve.settings import Settings
from tests.conftest import WAIT
from tests.serve import solo
from tests.serve.conftest import Running, running

openai = pytest.importorskip("openai", reason="pip install 'kiln-export[dev]'")

FREE = {"temperature": 1.0, "top_p": 1.0, "extra_body": {"top_k": 0}}  # of a random model: every token is likely enough
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(real: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(talking: Path) -> kiln.Model:
    return kiln.Model(str(talking), "cpu")


def extra(**fields: object) -> dict:
    return {**FREE, "extra_body": {"top_k": 0, "return_token_ids": True, **fields}}


@pytest.mark.parametrize("seed", range(3))
def test_chat_equals_a_session_of_its_own(client: openai.OpenAI, real: Running, model: kiln.Model, seed: int) -> None:
    whole = client.chat.completions.create(model="small", messages=HI, seed=seed, max_tokens=20, **extra())
    choice = whole.choices[0]
    expected = solo.write(model, whole.prompt_token_ids, 20, real.served.settings.chunk, (1.0, 0, 1.0, seed))
    assert choice.token_ids == expected
    assert choice.finish_reason == ("stop" if expected[-1] in real.served.vocabulary.ends else "length")
    stream = list(client.chat.completions.create(
        model="small", messages=HI, seed=seed, max_tokens=20, stream=True, stream_options={"include_usage": True}, **extra()
    ))  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == choice.message.content
    assert [i for c in stream if c.choices for i in getattr(c.choices[0], "token_ids", None) or []] == expected
    assert {c.id for c in stream} == {stream[0].id} and stream[0].choices[0].delta.role == "assistant"
    assert stream[-2].choices[0].finish_reason == choice.finish_reason and not stream[-1].choices
    for usage in (whole.usage, stream[-1].usage):
        assert usage and usage.prompt_tokens == len(whole.prompt_token_ids) and usage.completion_tokens == len(expected)
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_choices_have_seeds_of_their_own(client: openai.OpenAI, real: Running, model: kiln.Model) -> None:
    found = client.chat.completions.create(model="small", messages=HI, seed=5, n=4, max_tokens=6, **extra())
    expected = [solo.write(model, found.prompt_token_ids, 6, 16, (1.0, 0, 1.0, 5 + i)) for i in range(4)]
    assert [c.token_ids for c in found.choices] == expected and [c.index for c in found.choices] == [0, 1, 2, 3]
    texts = [""] * 4
    for chunk in client.chat.completions.create(model="small", messages=HI, seed=5, n=4, max_tokens=6, stream=True, **extra()):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [c.message.content for c in found.choices]


def test_a_prompt_that_goes_on_is_not_read_again(client: openai.OpenAI, model: kiln.Model) -> None:
    ids = [2, *range(30, 60)]
    first = client.completions.create(
        model="small", prompt=ids, max_tokens=5, temperature=0, extra_body={"return_token_ids": True, "ignore_eos": True}
    )
    longer = [*ids, *first.choices[0].token_ids, 70, 71, 72]
    again = client.completions.create(model="small", prompt=longer, max_tokens=5, temperature=0, extra_body={"return_token_ids": True})
    assert again.usage.prompt_tokens_details.cached_tokens == len(ids) + 4  # the token written last was not fed
    assert again.choices[0].token_ids == solo.write(model, longer, 5, 16)
    salted = client.completions.create(model="small", prompt=[*longer, 5], max_tokens=1, temperature=0, extra_body={"cache_salt": "mine"})
    assert salted.usage.prompt_tokens_details.cached_tokens == 0
    parted = client.completions.create(
        model="small", prompt=[*longer[:10], 9, 9], max_tokens=3, temperature=0, extra_body={"return_token_ids": True}
    )
    assert parted.usage.prompt_tokens_details.cached_tokens == 0
    assert parted.choices[0].token_ids == solo.write(model, [*longer[:10], 9, 9], 3, 16)


def test_completions(client: openai.OpenAI, real: Running, model: kiln.Model) -> None:
    """Texts and ids, several at once, one BOS before each; echo."""
    tokenizer = real.served.tokenizer
    texts = ["hot kiln", "a b c"]
    found = client.completions.create(model="small", prompt=texts, n=2, seed=3, max_tokens=4, **extra())
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    for i, choice in enumerate(found.choices):
        ids = tokenizer.encode(texts[i // 2])
        assert ids[0] == 2 and choice.prompt_token_ids == ids
        assert choice.token_ids == solo.write(model, ids, 4, 16, (1.0, 0, 1.0, 3 + i % 2))
    plain = client.completions.create(model="small", prompt=tokenizer.encode("hot kiln", add_bos=False), seed=3, max_tokens=4, **extra())
    assert plain.choices[0].token_ids == found.choices[0].token_ids
    echoed = client.completions.create(model="small", prompt="hot kiln", seed=3, max_tokens=4, echo=True, **extra())
    assert echoed.choices[0].text == "hot kiln" + plain.choices[0].text
    streamed = client.completions.create(model="small", prompt="hot kiln", seed=3, max_tokens=4, echo=True, stream=True, **extra())
    assert "".join(c.choices[0].text for c in streamed) == echoed.choices[0].text
    assert client.completions.create(model="small", prompt="x").usage.completion_tokens <= 16


def test_log_probabilities(client: openai.OpenAI, real: Running, model: kiln.Model) -> None:
    """Those of the softmax, of the prompt too; asking for them changes no token."""
    without = client.chat.completions.create(model="small", messages=HI, seed=1, max_tokens=8, **extra())
    found = client.chat.completions.create(model="small", messages=HI, seed=1, max_tokens=8, logprobs=True, top_logprobs=3, **extra())
    assert found.choices[0].token_ids == without.choices[0].token_ids
    prompt, tokens = found.prompt_token_ids, found.choices[0].token_ids
    rows = solo.rows(model, [*prompt, *tokens])
    assert len(found.choices[0].logprobs.content) == len(tokens)
    for entry, token, row in zip(found.choices[0].logprobs.content, tokens, rows[len(prompt) - 1 :], strict=False):
        exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
        assert entry.logprob == pytest.approx(exact[token], abs=1e-4)
        assert [x.logprob for x in entry.top_logprobs] == pytest.approx(np.sort(exact)[::-1][:3].tolist(), abs=1e-4)
        assert bytes(entry.bytes) == real.served.tokenizer.piece(token, False)
    streamed = client.chat.completions.create(
        model="small", messages=HI, seed=1, max_tokens=8, logprobs=True, top_logprobs=3, stream=True, **extra()
    )
    assert [x for c in streamed if c.choices[0].logprobs for x in c.choices[0].logprobs.content] == found.choices[0].logprobs.content
    scored = client.completions.create(model="small", prompt=[2, 40, 41, 42], max_tokens=0, echo=True, logprobs=1)
    values = scored.choices[0].logprobs.token_logprobs
    rows = solo.rows(model, [2, 40, 41, 42])
    exact = [row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum()) for row in rows]
    assert values[0] is None and values[1:] == pytest.approx([exact[0][40], exact[1][41], exact[2][42]], abs=1e-4)


def test_log_probabilities_of_completions(client: openai.OpenAI, real: Running) -> None:
    """Each token among the most probable of its place; offsets are of the text, where special tokens stand for nothing and parts of
    characters for less than one; a stream has the same, piece by piece."""
    text = "a \u00e9\U0001f389 b"
    for echo in (True, False):
        asked = {"model": "small", "prompt": [text, "b"], "n": 2, "seed": 3, "max_tokens": 4, "logprobs": 0, "echo": echo, **extra()}
        whole = client.completions.create(**asked)
        for choice in whole.choices:
            told = choice.logprobs
            assert told.top_logprobs == [x if x is None else {t: x} for t, x in zip(told.tokens, told.token_logprobs, strict=True)]
            assert len(told.tokens) == len(choice.token_ids) + (len(choice.prompt_token_ids) if echo else 0)
            for token, at in zip(told.tokens, told.text_offset, strict=True):
                assert token.startswith(("bytes:", "<")) or choice.text[at:].startswith(token), (token, at, choice.text)
        assert whole.choices[0].logprobs.text_offset[:3] == [0, 0, 1] or not echo
        parts: dict[int, list] = {}
        for chunk in client.completions.create(**asked, stream=True):
            parts.setdefault(chunk.choices[0].index, []).append(chunk.choices[0])
        for choice in whole.choices:
            mine = parts[choice.index]
            assert "".join(c.text for c in mine) == choice.text and mine[-1].finish_reason == choice.finish_reason
            for name in ("tokens", "token_logprobs", "text_offset"):
                assert [x for c in mine if c.logprobs for x in getattr(c.logprobs, name)] == getattr(choice.logprobs, name)


def test_usage_of_every_chunk(client: openai.OpenAI) -> None:
    options: dict = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.completions.create(model="small", prompt="a", max_tokens=3, stream=True, stream_options=options, **extra()))
    assert [c.usage.completion_tokens for c in chunks][-1] == 3 and all(c.usage for c in chunks)


def test_temperatures_next_to_zero(client: openai.OpenAI) -> None:
    """Their reciprocal is infinite in float32."""
    greedy = client.completions.create(model="small", prompt="a b", max_tokens=5, temperature=0).choices[0].text
    for temperature in (5e-324, 1e-40, 1e-6):
        for more in ({}, {"min_p": 0.1}):
            found = client.completions.create(model="small", prompt="a b", max_tokens=5, temperature=temperature, extra_body=more)
            assert found.choices[0].text == greedy, (temperature, more)


def test_what_is_chosen_on_the_host(client: openai.OpenAI, model: kiln.Model) -> None:
    def tokens(**fields: object) -> list[int]:
        given = {"temperature": 0, "max_tokens": 12} | fields
        body = given.pop("extra_body", {})
        found = client.completions.create(model="small", prompt=[2, 40, 41], extra_body={"return_token_ids": True, **body}, **given)
        return found.choices[0].token_ids

    plain = tokens()
    assert plain == solo.write(model, [2, 40, 41], 12, 16)
    assert tokens(logit_bias={str(plain[0]): -100})[0] != plain[0] and set(tokens(logit_bias={"77": 100})) == {77}
    penalties = [{"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"extra_body": {"repetition_penalty": 1.7}}]
    expected = [solo.penalized(model, [2, 40, 41], 12, *values) for values in ((2.0, 0, 1), (0, 2.0, 1), (0, 0, 1.7))]
    assert [tokens(**fields) for fields in penalties] == expected
    assert plain not in (expected[0], expected[2])
    assert tokens(extra_body={"min_p": 1.0}, temperature=1, seed=4, top_p=1) == plain  # what is as likely as the best
    ends = tokens(logit_bias={"6": 100})
    assert ends == [6]
    assert (
        tokens(logit_bias={"6": 100}, extra_body={"min_tokens": 3})[-1] == 6
        and len(tokens(logit_bias={"6": 100}, extra_body={"min_tokens": 3})) == 4
    )
    assert tokens(logit_bias={"6": 100}, extra_body={"ignore_eos": True}) == [6] * 12
    assert tokens(extra_body={"stop_token_ids": [plain[0]]}) == plain[:1]


def test_stop_texts(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="small", messages=HI, seed=1, max_tokens=20, **extra()).choices[0].message.content
    stop = whole[5:7]
    found = client.chat.completions.create(
        model="small", messages=HI, seed=1, max_tokens=20, stop=["never there", stop], **extra()
    ).choices[0]
    assert found.message.content == whole[: whole.index(stop)] and (found.finish_reason, found.stop_reason) == ("stop", stop)


def test_responses(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="small", messages=[{"role": "system", "content": "s"}, *HI], temperature=0, max_tokens=8)
    found = client.responses.create(model="small", instructions="s", input="hi", temperature=0, max_output_tokens=8)
    assert found.output_text == chat.choices[0].message.content and found.status == "incomplete"
    assert found.incomplete_details.reason == "max_output_tokens" and found.usage.output_tokens == 8
    with client.responses.stream(model="small", instructions="s", input=HI, temperature=0, max_output_tokens=8) as stream:
        events = list(stream)
    assert events[-1].type == "response.incomplete" and events[-1].response.output_text == found.output_text
    assert [e.sequence_number for e in events] == list(range(len(events)))
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model="small", input="hi", previous_response_id="resp_1")
    assert error.value.param == "previous_response_id"


def test_models_and_tokens(client: openai.OpenAI, real: Running) -> None:
    assert [m.id for m in client.models.list()] == ["small", "other"] and client.models.retrieve("other").max_model_len == 96
    said = httpx.post(f"{real.url}/tokenize", json={"prompt": "hot kiln"}, timeout=WAIT).json()
    assert said == {"count": len(said["tokens"]), "max_model_len": 96, "tokens": real.served.tokenizer.encode("hot kiln")}
    assert httpx.post(f"{real.url}/tokenize", json={"content": "hot kiln"}, timeout=WAIT).json()["tokens"] == said["tokens"][1:]
    chat = httpx.post(f"{real.url}/tokenize", json={"messages": HI}, timeout=WAIT).json()["tokens"]
    assert chat == client.chat.completions.create(model="small", messages=HI, max_tokens=1, **extra()).prompt_token_ids
    begun = [*HI, {"role": "assistant", "content": "x"}]
    on = {"continue_final_message": True}
    going = client.chat.completions.create(model="small", messages=begun, max_tokens=1, **extra(**on)).prompt_token_ids
    assert httpx.post(f"{real.url}/tokenize", json={"messages": begun, **on}, timeout=WAIT).json()["tokens"] == going
    pieces = httpx.post(f"{real.url}/tokenize", json={"content": "a\u00e9<bos>", "with_pieces": True}, timeout=WAIT).json()["tokens"]
    assert [p["piece"] for p in pieces][0] == "a" and pieces[-1] == {"id": 2, "piece": "<bos>"}
    assert sum((p["piece"] for p in pieces[1:-1]), []) == list("\u00e9".encode())  # llama.cpp's form of parts of a character
    assert httpx.post(f"{real.url}/v1/detokenize", json={"tokens": said["tokens"][1:]}, timeout=WAIT).json()["prompt"] == "hot kiln"


def test_many_tokens_are_told_some_at_a_time(real: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "AT_ONCE", 3)
    ids = real.served.tokenizer.encode("hot kiln, cold kiln")
    said = httpx.post(f"{real.url}/tokenize", json={"prompt": "hot kiln, cold kiln"}, timeout=WAIT).json()
    assert len(ids) > 6 and said == {"count": len(ids), "max_model_len": 96, "tokens": ids}
    assert httpx.post(f"{real.url}/tokenize", json={"content": ""}, timeout=WAIT).json()["tokens"] == []


@pytest.mark.parametrize(
    "kind, fields, param, code",
    [
        (openai.NotFoundError, {"model": "gpt"}, "model", "model_not_found"),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "a b c d " * 60}]}, "messages", "context_length_exceeded"),
        (openai.BadRequestError, {"messages": []}, "messages", None),
        (openai.BadRequestError, {"temperature": 3}, "temperature", None),
        (openai.BadRequestError, {"response_format": {"type": "json_objekt"}}, "response_format.type", None),
        (openai.BadRequestError, {"logit_bias": {"512": 1}}, "logit_bias", None),
        (openai.BadRequestError, {"reasoning_effort": "extreme"}, "reasoning_effort", None),
        (openai.BadRequestError, {"extra_body": {"chat_template": "x"}}, "chat_template", "unsupported_parameter"),
        (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
    ],
)
def test_errors(client: openai.OpenAI, kind: type[openai.APIStatusError], fields: dict, param: str, code: str | None) -> None:
    with pytest.raises(kind) as error:
        client.chat.completions.create(**({"model": "small", "messages": HI} | fields))
    assert (error.value.param, error.value.code) == (param, code) and error.value.type == "invalid_request_error"
    assert json.loads(error.value.response.text)["error"]["message"]


def test_a_turn_that_parts_from_the_prompt(talking: Path, model: kiln.Model) -> None:
    """This template ends a prompt in what its history lacks: the next turn goes on from a snapshot at the cut, and equals a cold run."""
    settings = Settings(names=("small",), chunk=16, snapshots=(0, 64 << 20))
    with running(Served.load(talking, "cpu", 1, settings)) as found:
        client = openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0)
        first = client.chat.completions.create(model="small", messages=HI, max_tokens=4, seed=2, **extra())
        history = [*HI, {"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "b"}]
        again = client.chat.completions.create(model="small", messages=history, max_tokens=8, seed=3, **extra())
        ids, cached = again.prompt_token_ids, again.usage.prompt_tokens_details.cached_tokens
        cuts = found.served.talks().prompt(read_request(HI)).cuts
        cut = next(at for at, why in cuts.items() if "turn" in why)
        assert 0 < cached == cut <= common(first.prompt_token_ids, ids) < len(first.prompt_token_ids)
        assert again.choices[0].token_ids == solo.write(model, ids, 8, 16, (1.0, 0, 1.0, 3))
        other = client.chat.completions.create(
            model="small", messages=[{"role": "user", "content": "x y"}], max_tokens=4, seed=1, **extra()
        )
        assert other.choices[0].token_ids == solo.write(model, other.prompt_token_ids, 4, 16, (1.0, 0, 1.0, 1))
        assert re.search(r"kiln:snapshot_hits\S* [1-9]", httpx.get(f"{found.url}/metrics", timeout=WAIT).text)
