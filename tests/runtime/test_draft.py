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


def test_acceptance() -> None:
    """What is drafted follows what was right; where nothing is, hardly any step pays for a draft."""
    assert kiln.Acceptance.agreed([1, 2, 3], [1, 2, 9, 4]) == 2 and kiln.Acceptance.agreed([], [5]) == 0
    good, bad, random = kiln.Acceptance(7), kiln.Acceptance(7), Random(0)
    for _ in range(400):
        n = good.worth()
        right = next((i for i in range(n) if random.random() > 0.95), n)
        good.took(n, right)
        n = bad.worth()
        bad.took(n, 0)
    assert good.worth() >= 5 and good.steps == 400 and good.right[0] / good.tried[0] == pytest.approx(0.95, abs=0.03)
    assert good.tried == sorted(good.tried, reverse=True)
    assert sum(bad.tried) < 0.1 * 400 and sum(bad.right) == 0
    for _ in range(120):  # and it finds out when that changes
        bad.took(n := bad.worth(), n)
        for _ in range(0 if n else 16):
            bad.took(0, 0)
    assert bad.worth() == 7
    assert kiln.Acceptance(0).worth() == 0
    for pair in ((8, 0), (2, 3), (-1, 0)):
        with pytest.raises(kiln.Error, match="accepted"):
            good.took(*pair)


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
