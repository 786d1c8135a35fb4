"""The house: imports go one way and in no circle, an installed copy finds every room, and reading an artifact needs no PyTorch."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from kiln.custom_ops.geometry import MEASURED

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "custom_ops", "passes", "exporter")  # each imports those before it, and none after it


def modules(*rooms: str) -> dict[str, Path]:
    """Name -> file of every module of the product."""
    found = {}
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = ("kiln", *path.relative_to(ROOT).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, source: str, known: dict[str, Path], top: bool = False) -> set[str]:
    """The known modules that a module imports; top: only those it imports when it is loaded itself."""
    tree = ast.parse(source)
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)} if top else set()
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)] if top else []
    inside |= {n for block in typing for n in ast.walk(block)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in inside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import"
            found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in known else str(node.module) for alias in node.names}
    return {module for module in found if module in known} - {name}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names along one circle of the graph, the first again at the end; empty where there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        for other in sorted(graph.get(name, ())):
            if found := visit(other):
                return found
        path.pop()
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name))), [])


def graph(top: bool) -> dict[str, set[str]]:
    known = modules(*ROOMS)
    return {name: imports(name, path.read_text(), known, top) for name, path in known.items()}


def test_rooms_import_one_way() -> None:
    """custom_ops <- passes <- exporter, functions' own imports included."""
    for name, used in graph(top=False).items():
        room = ROOMS.index(name.split(".")[1])
        late = [other for other in used if ROOMS.index(other.split(".")[1]) > room]
        assert not late, f"{name} imports {', '.join(late)}"


def test_no_circles() -> None:
    assert len(graph(top=True)) > 60
    assert circle(graph(top=True)) == [], "of modules, as they are loaded"
    assert circle(graph(top=False)) == [], "of modules, with what functions import"


def test_a_circle_is_seen() -> None:
    sources = {"a": "import b", "b": "def f():\n    from c import x", "c": "import a\nimport os", "d": "import a"}
    known = {name: Path() for name in sources}
    assert circle({n: imports(n, s, known) for n, s in sources.items()}) == ["a", "b", "c", "a"]
    assert circle({n: imports(n, s, known, top=True) for n, s in sources.items()}) == []


def loaded_after(code: str) -> set[str]:
    """Names of the modules that a fresh Python holds after the code."""
    code += "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("command", ["inspect ARTIFACT", "inspect ARTIFACT --verify", "inspect GGUF", "bench ARTIFACT"])
def test_reading_loads_no_torch(command: str, tmp_path: Path) -> None:
    """Seconds for the user; `bench` fails here at the manifest, which is the first thing it needs."""
    given = {"ARTIFACT": str(tmp_path), "GGUF": str(ROOT / "tests/fixtures/gemma4-tiny-dense.gguf")}
    arguments = [given.get(word, word) for word in command.split()]
    run = f"print(CliRunner().invoke(main, {arguments}).output)"
    found = loaded_after(f"from click.testing import CliRunner; from kiln.exporter.cli import main; {run}")
    assert not {"torch", "triton"} & found and "kiln.exporter.cli" in found


def test_an_installed_copy_finds_its_rooms(tmp_path: Path) -> None:
    """What `pip install .` takes: every module and every table, loaded from there and not from here; nothing that is kiln-runtime's."""
    source, target = tmp_path / "source", tmp_path / "site"
    (source / "runtime_cpp").mkdir(parents=True)  # pip builds in the folder that it is given
    for name in (*ROOMS, "pyproject.toml", "README.md", "LICENSE", "NOTICE", "runtime_cpp/CMakeLists.txt"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    kernel = source / "custom_ops" / "gpu" / "planted.cu"  # kernels of CUDA C++ lie beside their modules
    kernel.write_text('#include "planted.cuh"\n')
    kernel.with_suffix(".cuh").write_text("")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target, source]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert not done.returncode, done.stderr
    missing = [name for name in modules(*ROOMS) if not (target / Path(*name.split("."))).with_suffix(".py").is_file() and not
               (target / Path(*name.split(".")) / "__init__.py").is_file()]  # fmt: skip
    assert not missing
    assert {path.name for path in (target / "kiln").iterdir()} == set(ROOMS)
    code = f"""
import sys
sys.path.insert(0, {str(target)!r})
from kiln.custom_ops.gpu.cuda_source import _texts
from kiln.custom_ops.gpu.target import gpu_targets
from kiln.exporter.source import config
assert list(_texts("gpu/planted.cu")) == ["planted.cu", "planted.cuh"]
print(config.__file__, sorted(config.families()), sorted(gpu_targets()))
"""
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(str(target)) and "gemma4" in run.stdout and "sm_90" in run.stdout


def test_no_module_has_two_names() -> None:
    """A room is imported below `kiln` and nowhere else: a module that is loaded under two names has two of every class and every table."""
    old = re.compile(rf"(?:{'|'.join(ROOMS)})(?:\.|$)")
    for path in [*ROOT.glob("*/**/*.py")]:
        if any(part in ("build", "node_modules") or part.startswith(".") for part in path.relative_to(ROOT).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in named if old.match(name)], f"{path.relative_to(ROOT)}: imports {named}; import it from kiln"


@pytest.mark.parametrize("start", ["exporter", "kiln.exporter"])
def test_the_command_starts_below_kiln(start: str) -> None:
    """`python -m exporter` in a checkout is `python -m kiln.exporter`: of the top, nothing is loaded but the package that was named."""
    run = f"runpy.run_module({start!r}, run_name='__main__')"
    code = f"import runpy, sys\nsys.argv = ['x', '--version']\ntry: {run}\nexcept SystemExit: pass"
    found = loaded_after(code)
    assert "kiln.exporter.cli" in found
    assert {name for name in found if name.split(".")[0] in ROOMS} == ({"exporter"} if start == "exporter" else set())
    assert "kiln._runtime" not in found and "numpy" not in found


def test_shapes_of_models_stand_in_one_place() -> None:
    """`configs/geometries.toml`: no module of the product repeats a size of the 31B or the 12B."""
    sizes = {str(size) for model in MEASURED for size in (model.hidden, model.ffn, 2 * model.ffn, model.vocab)}
    for name, path in modules("custom_ops", "passes", "exporter").items():
        numbers = {token.string for token in tokenize.generate_tokens(path.open().readline) if token.type == tokenize.NUMBER}
        assert not sizes & numbers, f"{name}: {sizes & numbers}"
