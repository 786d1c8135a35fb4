"""Drafts by what occurred before, and the bookkeeping of those that were right; and the module's types as they are declared."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path
from random import Random

import pytest

import kiln


def expected(text: list[int], most: int, shortest: int, longest: int) -> list[int]:
    """The newest of the places with the longest suffix, by looking at all."""
    best, at = shortest - 1, -1
    for end in range(len(text) - 1, shortest - 1, -1):
        same = 0
        while same < min(longest, end) and text[end - 1 - same] == text[len(text) - 1 - same]:
            same += 1
        if same > best:
            best, at = same, end
    found: list[int] = []
    if at >= 0:
        whole = list(text)
        for i in range(at, at + most):
            found.append(whole[i])
            whole.append(whole[i])
    return found


@pytest.mark.parametrize("shortest, longest, alphabet", [(1, 1, 5), (2, 8, 4), (2, 8, 2), (3, 5, 3)])
def test_drafts(shortest: int, longest: int, alphabet: int) -> None:
    """Against a search of the whole text, while the text grows and is cut; ids beyond 32 bits are ids."""
    random, drafter, text = Random(shortest * 10 + alphabet), kiln.NgramDrafter(shortest, longest), []
    drafted = 0
    for _ in range(300):
        if text and random.random() < 0.2:
            text = text[: random.randrange(max(0, len(text) - 9), len(text) + 1)]
            drafter.cut(len(text))
        more = [random.randrange(alphabet) << 33 for _ in range(random.randrange(1, 4))]
        drafter.append(more)
        text += more
        assert len(drafter) == len(text)
        if len(text) > 60:  # no more earlier places than are looked at
            text = []
            drafter.cut(0)
        most = random.randrange(6)
        got = drafter.draft(most)
        assert got == expected(text, most, shortest, longest), (text, most)
        drafted += len(got)
    assert drafted > 100
    for bad in (-1, len(text) + 1):
        with pytest.raises(kiln.Error, match="cut at"):
            drafter.cut(bad)
    for bad in ((0, 3), (3, 2)):
        with pytest.raises(kiln.Error, match="suffixes of"):
            kiln.NgramDrafter(*bad)


def test_a_text_that_repeats() -> None:
    drafter = kiln.NgramDrafter()
    drafter.append([7, 1, 2, 3, 1, 2, 3, 1, 2])
    assert drafter.draft(7) == [3, 1, 2, 3, 1, 2, 3]
    drafter.append([9])
    assert drafter.draft(7) == []
    many = [i % 2 for i in range(100_000)]  # one suffix, everywhere: the search stays short
    drafter.append(many)
    assert drafter.draft(4) == [0, 1, 0, 1]


def play(chances_of_right: float, cost_of_more: float, tokens: int, seed: int = 0) -> tuple[float, kiln.Acceptance, int]:
    """Time of a text over that without drafts; `cost_of_more`: of each further token of a step, over a step of one."""
    acceptance, costs, random = kiln.Acceptance(7), kiln.StepCosts([1, 2, 4, 8]), Random(seed)
    written, time, steps = 0, 0.0, 0
    while written < tokens:
        chances = acceptance.chances()
        drafts = max(kiln.share_drafts([chances], costs)[0], int(acceptance.due))
        size = next(m for m in (1, 2, 4, 8) if m > drafts)
        seconds = 1 + cost_of_more * (size - 1)
        right = next((i for i in range(drafts) if random.random() >= chances_of_right), drafts)
        costs.took(size, seconds)
        acceptance.took(drafts, right)
        written, time, steps = written + right + 1, time + seconds, steps + 1
    return time / tokens, acceptance, steps


def test_acceptance() -> None:
    """What is drafted follows what was right and what it costs; where nothing is right, hardly any step pays for a draft."""
    assert kiln.Acceptance.agreed([1, 2, 3], [1, 2, 9, 4]) == 2 and kiln.Acceptance.agreed([], [5]) == 0
    for cost in (0.02, 0.08, 0.3, 1.0):
        time, never, _ = play(0, cost, 2000)
        assert time <= 1 / 0.97 and sum(never.right) == 0 < sum(never.tried), cost
    time, good, _ = play(0.95, 0.05, 2000)
    assert time < 0.3 and good.chances()[-1] > 0.3 and good.right[0] / good.tried[0] == pytest.approx(0.95, abs=0.03)
    assert good.tried == sorted(good.tried, reverse=True)
    time, half, steps = play(0.5, 0.05, 2000)
    assert time < 0.65 and 0.4 < half.right[0] / half.tried[0] < 0.6 and sum(half.tried[4:]) < 0.1 * steps
    assert play(0.9, 1.0, 2000)[0] <= 1 / 0.97  # right nearly always, and no more than another step

    late, costs = kiln.Acceptance(7), kiln.StepCosts([1, 2, 4, 8])
    costs.took(1, 1.0)
    for _ in range(600):
        late.took(1 if late.due else 0, 0)
    for _ in range(600):  # it finds out when that changes, all places of a draft
        n = max(kiln.share_drafts([late.chances()], costs)[0], int(late.due))
        late.took(n, n)
    assert kiln.share_drafts([late.chances()], costs) == [7]
    assert kiln.Acceptance(0).chances() == []
    for pair in ((8, 0), (2, 3), (-1, 0)):
        with pytest.raises(kiln.Error, match="accepted"):
            good.took(*pair)


def test_rows_share_a_step() -> None:
    """The likeliest drafts of all rows, as long as each token that may be hoped for is cheaper than in a step of its own."""
    costs = kiln.StepCosts([1, 2, 4, 8])
    for size, seconds in ((1, 1.0), (2, 1.05), (4, 1.1), (8, 1.3)):
        costs.took(size, seconds)
    assert costs.of(3) == costs.of(4) and costs.of(8) > costs.of(4) > costs.of(2) > costs.of(1)
    assert kiln.share_drafts([[0.9, 0.8, 0.2], [0.1, 0.05]], costs) == [2, 0]
    assert kiln.share_drafts([[0.9, 0.8, 0.7], [0.1, 0.05]], costs) == [3, 2]  # room that is there anyway is used
    assert kiln.share_drafts([[0.95, 0.9, 0.86, 0.8, 0.77], [0.9, 0.8]], costs) == [4, 2]
    assert kiln.share_drafts([[0.01] * 3, [0.01] * 3], costs) == [0, 0]
    assert kiln.share_drafts([[], [0.9]], costs) == [0, 1]
    assert kiln.share_drafts([[0.9]] * 8, costs) == [0] * 8  # no room
    assert kiln.share_drafts([[0.9]], kiln.StepCosts([1, 2])) == [0]  # nothing to compare with
    with pytest.raises(kiln.Error, match="no step takes 9"):
        costs.of(9)


def test_declared_types() -> None:
    """_runtime.pyi has the names of the module, its classes' members and their arguments with their defaults, and no others."""
    path = next(p for folder in kiln.__path__ if (p := Path(folder) / "_runtime.pyi").is_file())
    runtime = import_module(kiln.Session.__module__)
    assert set(kiln.__all__) == {n for n in dir(runtime) if not n.startswith("_")} | {"__version__"}
    tree = ast.parse(path.read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    named = set(classes) | {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    assert named | {"__version__"} == set(kiln.__all__)
    for name, node in classes.items():
        if name == "Error":
            continue
        members = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
        real = {n for n in vars(getattr(kiln, name)) if not n.startswith("_") or n in ("__init__", "__len__")}
        assert set(members) | {"__init__"} == real | {"__init__"}, name
        for member, function in members.items():
            said = getattr(getattr(kiln, name), member).__doc__ or ""
            declared = [a.arg for a in function.args.args if a.arg != "self"]
            if declared and not any(isinstance(d, ast.Name) and d.id in ("property", "overload") for d in function.decorator_list):
                signature = re.search(rf"{member}\((.*)\) ->", said)
                assert signature, (name, member, said)
                found = re.findall(r"(?:^|, )(\w+): ", signature.group(1))
                assert [a for a in found if a != "self"][-len(declared) :] == declared, (name, member, said)
