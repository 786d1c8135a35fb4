"""A request -> the prompt: text, ids, and the positions at which later prompts can share what was computed for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from kiln.exporter.conversation.markup import Thoughts, without_thoughts
from kiln.exporter.conversation.request import Request, RequestError
from kiln.exporter.conversation.template import Marks, Template, texts_of
from kiln.exporter.conversation.vocabulary import Vocabulary
from kiln.exporter.errors import one_line
from kiln.exporter.source.renderer import TemplateError

BLOCK = 512  # ids that are compared at once


@dataclass(frozen=True)
class Prompt:
    """cuts: position -> why a later prompt may part from this one there, ascending; the end is one of them.

    turn: a user's next message. call: a tool's result. edit: another last user message. system: another first message. tool: one
    more tool. thinking: it is switched.
    """

    text: str
    ids: tuple[int, ...]
    cuts: Mapping[int, tuple[str, ...]]


def render_prompt(template: Template, request: Request, thoughts: Thoughts | None = None, cuts: bool | Collection[str] = True) -> Prompt:
    """Raises RequestError where the template refuses the conversation or loses a part of it.

    cuts: look for them, or for some, each of which takes a rendering more; without, the end is the only one.
    """
    marks, texts = template.marks(request)
    messages = [_shaped(template, message, thoughts, marks) for message in request.messages]
    variants = _variants(template, request, marks, messages) if cuts else []
    wanted = {why: turn for why, turn in variants if isinstance(cuts, bool) or why in cuts}
    turns = {"": _turn(template, request, marks, messages)} | wanted
    rendered = dict(zip(turns, template.render(list(turns.values())), strict=True))
    plain = _cut(template, request, marks, rendered.pop(""))
    marks.check(plain, texts)
    _check_written(template, request, marks, messages, plain)
    pieces = template.vocabulary.split(plain)
    ids = [template.vocabulary.ids(marks.restore(p) if isinstance(p, str) else p) for p in pieces]
    bos = template.vocabulary.pieces.bos
    start = int(bos is not None and pieces[:1] != [bos])  # a prompt begins with one BOS, whether its template writes it or not
    flat = tuple(chain([bos] if start and bos is not None else [], *ids))
    found: dict[int, tuple[str, ...]] = {len(flat): ("turn",) if request.generate or request.continue_final else ()}
    for why, other in rendered.items():
        if isinstance(other, str):
            at = start + _shared(template.vocabulary, marks, pieces, ids, template.vocabulary.split(other))
            if 0 < at <= len(flat):
                found[at] = tuple(dict.fromkeys((*found.get(at, ()), why)))
    return Prompt(marks.restore(plain), flat, dict(sorted(found.items())))


def _shaped(template: Template, message: dict[str, Any], thoughts: Thoughts | None, marks: Marks) -> dict[str, Any]:
    """The message as the template takes it, marked. A thought that a client left in an assistant's text is taken out first."""
    shaped = template.shaped(message)
    if message["role"] == "assistant":
        content = shaped["content"]
        found = ""
        if isinstance(content, str):
            found, shaped["content"] = without_thoughts(thoughts, content)
        elif content:
            shaped["content"] = [{**item, "text": without_thoughts(thoughts, item["text"])[1]} for item in content]
        if found and not shaped.get("reasoning_content"):
            shaped["reasoning"] = shaped["reasoning_content"] = found
    return marks.put(shaped)


def _turn(template: Template, request: Request, marks: Marks, messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if request.continue_final:
        content = messages[-1]["content"] or ""
        text = content if isinstance(content, str) else "".join(item["text"] for item in content)
        text = text.strip() if template.manner.trims_assistant else text
        messages = [*messages[:-1], template.shaped({**messages[-1], "content": text + marks.end})]
    return template.variables(messages, marks.put(request.tools), marks.put(request.variables), request.generate)


def _cut(template: Template, request: Request, marks: Marks, rendered: str | TemplateError) -> str:
    """The rendering up to where the model goes on."""
    if isinstance(rendered, TemplateError):
        raise RequestError("messages", f"the chat template refuses them: {one_line(marks.restore(str(rendered)))}")
    if request.continue_final:
        if rendered.count(marks.end) != 1:
            raise RequestError("messages", "the chat template does not write the last message's text as it is: it cannot be continued")
        return rendered.partition(marks.end)[0]
    manner = template.manner
    if request.generate and manner.closing.strip() and manner.opening.strip() and rendered.endswith(manner.closing):
        return rendered + manner.opening  # the turn was closed, and nothing says that the model's begins
    return rendered


def _check_written(template: Template, request: Request, marks: Marks, messages: Sequence[dict[str, Any]], rendered: str) -> None:
    """RequestError where the template leaves a user's text, a system text or a tool out."""
    for i, message in enumerate(messages):
        if message["role"] in ("user", "system", "developer"):
            for text in texts_of(message["content"] if isinstance(message["content"], str) else [x["text"] for x in message["content"]]):
                if text.strip() not in rendered:
                    raise RequestError(f"messages[{i}].content", f"the chat template does not write it (role {message['role']})")
    for i, tool in enumerate(request.tools):
        if marks.put(tool["function"]["name"]) not in rendered:
            raise RequestError(f"tools[{i}]", "the chat template of this model does not write tools")


def _variants(template: Template, request: Request, marks: Marks, messages: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Conversations that may come next, or that share a beginning with this one: what they have in common with it is worth keeping."""
    if not request.generate and not request.continue_final:
        return []
    tools, variables = marks.put(request.tools), marks.put(request.variables)

    def turn(some: Sequence[dict[str, Any]], more: Sequence[Any] = (), switches: Mapping[str, Any] = variables) -> dict[str, Any]:
        return template.variables(some, [*tools, *more], switches)

    def says(role: str, text: str, **more: Any) -> dict[str, Any]:
        return template.shaped({"role": role, "content": text, **more})

    user, answer = says("user", marks.probe), says("assistant", marks.probe)
    history = list(messages)
    if request.continue_final:
        text = "".join(
            texts_of([x["text"] for x in history[-1]["content"]] if isinstance(history[-1]["content"], list) else history[-1]["content"])
        )
        history[-1] = template.shaped({**history[-1], "content": text + marks.probe})
        found = [("turn", turn([*history, user]))]
    else:
        found = [("turn", turn([*history, answer, user]))]
    if request.tools and not request.continue_final:
        function = {"name": marks.probe, "arguments": {}}
        calling = {**says("assistant", ""), "tool_calls": [{"id": marks.probe, "type": "function", "function": function}]}
        found.append(("call", turn([*history, calling, {**says("tool", marks.probe), "tool_call_id": marks.probe}])))
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    if last > 0:
        found.append(("edit", turn([*messages[:last], user])))
    found.append(("system", turn([*(m for m in messages[:1] if m["role"] in ("system", "developer")), user])))
    if request.tools:
        function = {"name": marks.probe, "description": "", "parameters": {"type": "object", "properties": {}}}
        found.append(("tool", turn(messages, [{"type": "function", "function": function}])))
    if switch := template.manner.switch:
        found.append(("thinking", turn(messages, (), {**variables, switch: not variables.get(switch, False)})))
    return found


def _shared(
    vocabulary: Vocabulary, marks: Marks, pieces: Sequence[str | int], ids: Sequence[Sequence[int]], other: Sequence[str | int]
) -> int:
    """Ids at the beginning that a prompt of `pieces`, which has `ids`, and one of `other` have in common."""
    count = 0
    for piece, mine, theirs in zip(pieces, ids, other, strict=False):
        if piece != theirs:
            return count + common(mine, vocabulary.ids(marks.restore(theirs) if isinstance(theirs, str) else theirs))
        count += len(mine)
    return count


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences have in common at their beginnings."""
    most = min(len(a), len(b))
    for at in range(0, most, BLOCK):  # lists of many ids are compared in a hundredth of the time that a loop takes
        x, y = list(a[at : min(at + BLOCK, most)]), list(b[at : min(at + BLOCK, most)])
        if x != y:
            return at + next(i for i, (mine, theirs) in enumerate(zip(x, y, strict=True)) if mine != theirs)
    return most
