"""The fields that requests of OpenAI's kinds share -> a checked `Request` and `Wishes`.

What cannot be honoured is a Problem that names it. A field that nobody knows is passed over, as these interfaces do.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kiln.exporter.conversation.request import Request, RequestError, read_request
from kiln.exporter.serve.answer import Wishes
from kiln.exporter.serve.fields import INT64, Fields, shown
from kiln.exporter.serve.problem import Problem, unsupported, wrong
from kiln.exporter.serve.served import Served
from kiln.exporter.serve.steps.engine import Sampling
from kiln.exporter.serve.steps.steer import Calling

TEMPERATURE, TOP_K, TOP_P = 1.0, 64, 0.95  # where a request does not say
COLDEST = 1e-5  # a temperature below it is greedy: its reciprocal may be infinite in float32
STOPS, CHOICES, LOGPROBS, MOST = 16, 128, 20, (1 << 31) - 1
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# Fields of other servers that change an answer, and what of each is no wish.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("chat_template", "documents", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"), ()
    ),
    **dict.fromkeys(("repetition_detection", "truncate_prompt_tokens", "prompt_logprobs", "allowed_token_ids"), ()),
    **{"grammar": ("",), "json_schema": ({},), "bad_words": ([],), "logits_processors": ([],), "skip_special_tokens": (True,)},
    **{"use_beam_search": (False,), "include_stop_str_in_output": (False,)},
}


def sampling(fields: Fields, served: Served, top_temperature: float = 2.0) -> Sampling:
    temperature = fields.number("temperature", 0, top_temperature, TEMPERATURE if served.samples else 0.0)
    temperature = temperature if temperature >= COLDEST else 0.0
    if temperature and not served.samples:
        raise unsupported(fields.name("temperature"), "the artifact is greedy only; leave it out or give 0")
    top_k = fields.whole("top_k", -1, MOST, TOP_K) or 0
    top_p = fields.number("top_p", 0, 1, TOP_P)
    seed = fields.whole("seed", *INT64)
    return Sampling(temperature, max(top_k, 0), max(top_p, 1e-6), secrets.randbelow(1 << 62) if seed is None else seed)


def stops(fields: Fields, name: str = "stop") -> tuple[str, ...]:
    value = fields.body.get(name)
    if isinstance(value, str):
        return (fields.text(name) or "",) if value else ()
    found = fields.items(name, STOPS) or []
    return tuple(text for i, item in enumerate(found) if (text := Fields({"": item}, f"{fields.name(name)}[{i}]").text("")))


def ids(fields: Fields, name: str, served: Served, most: int = 64) -> tuple[int, ...]:
    found = fields.items(name, most) or []
    for i in found:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < served.lexicon.size:
            raise wrong(fields.name(name), f"{shown(i)} is no token of this model, which has {served.lexicon.size}")
    return tuple(found)


def bias(fields: Fields, served: Served) -> dict[int, float]:
    given = fields.object("logit_bias")
    found = {}
    for key in given.body if given else ():
        if not key.isascii() or not key.isdigit() or len(key) > 10 or int(key) >= served.lexicon.size:
            raise wrong("logit_bias", f"{key[:40]!r} is no token of this model, which has {served.lexicon.size}")
        assert given
        found[int(key)] = given.number(key, -100, 100, 0.0)
    return found


def wishes(fields: Fields, served: Served, **more: Any) -> Wishes:
    """The fields of chat and of plain completions."""
    for name, neutral in REFUSED.items():
        fields.refuse(name, "this server does not take it", *neutral)
    n = fields.whole("n", 1, CHOICES, 1) or 1
    return Wishes(
        sampling(fields, served),
        n,
        least=fields.whole("min_tokens", 0, MOST, 0) or 0,
        stop=stops(fields),
        stop_ids=frozenset(ids(fields, "stop_token_ids", served)),
        ignore_eos=fields.flag("ignore_eos"),
        bias=bias(fields, served),
        frequency=fields.number("frequency_penalty", -2, 2, 0),
        presence=fields.number("presence_penalty", -2, 2, 0),
        repetition=_above_zero(fields, "repetition_penalty", 10.0, 1.0),
        min_p=fields.number("min_p", 0, 1, 0),
        salt=fields.text("cache_salt") or "",
        **more,
    )


def _above_zero(fields: Fields, name: str, high: float, default: float) -> float:
    value = fields.number(name, 0, high, default)
    if value <= 0:
        raise wrong(fields.name(name), "must be above 0")
    return value


def conversation(
    served: Served, messages: Any, tools: Any, variables: Mapping[str, Any], generate: bool = True, continue_final: bool = False
) -> Request:
    """Raises Problem."""
    settings = served.settings
    for name, value, most in (("messages", messages, settings.messages), ("tools", tools, settings.tools)):
        if isinstance(value, Sequence) and len(value) > most:
            raise wrong(name, f"has {len(value)} entries, {most} are taken at most")
    try:
        return read_request(messages, tools or None, variables, generate, continue_final)
    except RequestError as e:
        raise Problem(400, str(e), e.part) from e


@contextlib.contextmanager
def numbered(field: str, origin: Sequence[int], first: str) -> Iterator[None]:
    """Problems of converted messages name the client's own: message i is of entry origin[i] of `field`, -1: of the field `first`."""

    def own(match: re.Match[str]) -> str:
        if not match.group(1):
            return field
        at = origin[int(match.group(1))] if int(match.group(1)) < len(origin) else -1
        return f"{field}[{at}]" if at >= 0 else first

    try:
        yield
    except Problem as problem:
        if not (problem.param or "").startswith("messages"):
            raise
        message, param = (re.sub(r"^messages(?:\[(\d+)\])?", own, text) for text in (problem.message, problem.param or ""))
        raise Problem(problem.status, message, param, problem.code, problem.headers) from None


def variables(fields: Fields, served: Served, think: bool | None, param: str) -> dict[str, Any]:
    """Of the template: chat_template_kwargs, which win, and the switch of thinking. think: what the field `param` says."""
    given = fields.object("chat_template_kwargs")
    own = dict(given.body) if given else {}
    switch = served.talks().template.manner.switch
    if think and switch is None:
        raise unsupported(param, "this model's chat template has no switch for thinking")
    if think is None:
        think = served.settings.think
    return ({switch: think} if switch and think is not None else {}) | own


def effort(fields: Fields, name: str, served: Served) -> bool | None:
    """reasoning_effort as the switch of thinking."""
    said = fields.choice(name, EFFORTS)
    return None if said is None else said != "none"


def calling(choice: Any, names: Sequence[str], field: str = "tool_choice") -> tuple[Calling | None, bool]:
    """tool_choice -> (what may be called, whether the model sees the tools)."""
    if choice is None or choice == "auto":
        return None, True
    if choice == "none":
        return None, False
    if choice == "required":
        if not names:
            raise wrong(field, "'required' needs tools")
        return Calling(True), True
    if not isinstance(choice, dict):
        raise wrong(field, f"{shown(choice)} is none of none, auto, required and an object that names a function")
    kind = choice.get("type")
    if kind == "function":
        inner = choice.get("function", choice)
        return Calling(True, (_named(inner, names, field),)), True
    if kind == "allowed_tools":
        inner = choice.get("allowed_tools", choice)
        listed, mode = (inner.get("tools"), inner.get("mode") or "auto") if isinstance(inner, dict) else (None, None)
        if not isinstance(listed, list) or not listed or mode not in ("auto", "required"):
            raise wrong(field, "allowed_tools needs a list of tools, and the mode auto or required")
        some = tuple(_named(t.get("function", t) if isinstance(t, dict) else t, names, f"{field}.tools[{i}]") for i, t in enumerate(listed))
        return Calling(mode == "required", some), True
    raise wrong(f"{field}.type", f"{shown(kind)} is none of function and allowed_tools")


def _named(inner: Any, names: Sequence[str], field: str) -> str:
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str) or name not in names:
        raise wrong(field, f"{shown(name)} is none of the tools: {', '.join(names)[:200] or 'there are none'}")
    return name


def schema(format_: Fields | None, tools: bool) -> Any:
    """response_format -> the JSON schema of the content, None: any text. tools: some may be called."""
    if format_ is None:
        return None
    kind = format_.choice("type", ("text", "json_object", "json_schema"))
    if kind is None:
        raise wrong(format_.name("type"), "is missing")
    if kind == "text":
        return None
    if tools:
        raise unsupported(format_.name("type"), f"{kind} does not go with tools; give tool_choice 'none', or leave one of them out")
    inner = format_.object("json_schema") or format_  # beside the type in responses and messages
    given = inner.object("schema")  # of llama.cpp's json_object, too
    if given is None and kind == "json_schema":
        raise wrong(inner.name("schema"), "is missing")
    return dict(given.body) if given and (given.body or kind == "json_schema") else {"type": "object"}
