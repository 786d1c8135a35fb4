"""The documents: links lead somewhere, files they name exist, README's tree is the tree and its figures are those of the table."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"build", "__pycache__"}  # and what begins with a dot
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCE = r"[\w.-]+(?:/[\w.-]+)*\.(?:py|cpp|h|def|toml)"
PLACEHOLDER = re.compile(r"[A-Z]{4,}|sm_NN")  # NAME.py and the like
WIDTH = 140


def names(path: Path) -> set[str]:
    """Source files that a document names in backticks."""
    found = set(re.findall(rf"`(?:[^`\n]* )?({SOURCE})`", path.read_text()))
    return {name for name in found if not PLACEHOLDER.search(name)}


def tree() -> list[str]:
    """Every file of the tree, from its root."""
    found = []
    for folder, inside, files in os.walk(ROOT):
        inside[:] = [name for name in inside if name not in ELSEWHERE and not name.startswith(".") and not name.endswith(".egg-info")]
        found += [Path(folder, name).relative_to(ROOT).as_posix() for name in files]
    return found


@pytest.fixture(scope="module")
def files() -> list[str]:
    return tree()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", path.read_text())
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if "://" in link:
            continue
        target = path.parent / link if link else path
        assert target.exists(), f"{path.name} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{path.name} links to #{anchor}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_named_exist(path: Path, files: list[str]) -> None:
    """By their path from the root, or from any folder on the way to them."""
    missing = [name for name in names(path) if not any(f == name or f.endswith(f"/{name}") for f in files)]
    assert not missing, f"{path.name} names {', '.join(missing)}"


def test_a_missing_file_is_seen(tmp_path: Path, files: list[str]) -> None:
    document = tmp_path / "x.md"
    document.write_text("`custom_ops/gpu/early.py`, `early.py`, `python -m x tests/no_such.py`, `NAME.py`, `nowhere.cpp`\n")
    assert names(document) == {"custom_ops/gpu/early.py", "early.py", "tests/no_such.py", "nowhere.cpp"}
    with pytest.raises(AssertionError, match="no_such"):
        test_files_named_exist(document, files)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/DESIGN.md", "docs/RUNTIME.md"])
def test_lines_are_short(name: str) -> None:
    long = [i for i, line in enumerate((ROOT / name).read_text().splitlines(), 1) if len(line) > WIDTH]
    assert not long, f"{name}: lines {long} are longer than {WIDTH}"


def test_the_tree_of_readme(files: list[str]) -> None:
    """Two levels of it: every folder with files of ours is named, and no other."""
    text = (ROOT / "README.md").read_text().split("## What is where")[1].split("```")[1]
    told, top = set(), ""
    for line in text.strip("\n").splitlines():
        folders = [word.rstrip("/") for word in re.split(r"\s{2,}", line.strip())[0].split()]
        if not line.startswith(" "):
            top = folders[0]
        told |= {f"{top}/{folder}" if line.startswith(" ") else folder for folder in folders}
    there = {"/".join(f.split("/")[:n]) for f in files for n in (1, 2) if f.count("/") >= n}
    assert told == there, f"README names {sorted(told - there)}, which are not there, and lacks {sorted(there - told)}"


def test_figures_of_readme_are_the_tables() -> None:
    readme, table = (ROOT / "README.md").read_text(), (ROOT / "docs/measurements/h200.md").read_text()
    rows = re.findall(r"^\| (?:decode|prefill)[^|]*\| ([\d,.]+) tok/s \| ([\d.]+ %)", readme, re.MULTILINE)
    assert len(rows) == 3
    for speed, share in rows:
        assert re.search(rf"\| {re.escape(speed)}(?: \([^)]*\))?, {share}", table), f"README has {speed} tok/s, {share}; h200.md has not"
