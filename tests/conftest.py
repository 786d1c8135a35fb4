from __future__ import annotations

import fcntl
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kiln.custom_ops.weights import linear
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.tokenizer import read_tokenizer
from tests.once import READERS, once
from tests.timeline import FIXTURES

TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
{{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' + message['content'] | trim + '<turn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|turn>model\\n' + ('' if enable_thinking else '<|channel>thought\\n<channel|>') }}
{%- endif %}
"""

WAIT = 100  # seconds that a busy machine may take for what takes a moment

torch.set_num_threads(2)
# Of a run in the background, or behind nohup: commands would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# Files of minutes go first: one that came last would leave the other workers with nothing to do.
SLOW = (
    "exporter/compiler/test_export_cuda.py", "custom_ops/gpu/test_kernel_resources.py", "custom_ops/weights/test_gemv.py",
    "exporter/model/test_families.py", "passes/test_fuse_decode.py", "exporter/model/test_edge.py", "exporter/test_paths.py",
    "custom_ops/tq4/test_tq4_prefill.py", "custom_ops/step/test_sample.py", "custom_ops/attention/test_attention_kernels.py",
    "exporter/measure/test_eval.py",
)  # fmt: skip


# Artifacts of a GPU: each is compiled by one worker, for its tests, while the others do something else.
COMPILED_FOR_A_GPU = ("gpu", "played", "several")


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first = {Path(__file__).parent / name: i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: first.get(item.path, len(first)))
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        if item.get_closest_marker("gpu") and (of := next((name for name in COMPILED_FOR_A_GPU if name in item.fixturenames), None)):
            item.add_marker(pytest.mark.xdist_group(f"{of} {item.callspec.params.get(of, '')}" if hasattr(item, "callspec") else of))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


@pytest.fixture(autouse=True, scope="session")
def dequantized_once():
    remembered = once(linear.dequantize)
    with pytest.MonkeyPatch.context() as patch:
        for module in READERS:
            patch.setattr(module, "dequantize", remembered)
        yield


@pytest.fixture(autouse=True)
def gpu_memory_returned(request: pytest.FixtureRequest):
    """Workers share the GPU: what a test no longer uses, torch may not keep."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def one_thread():
    """For matmuls so small that they wait longer for a second thread than they take."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


def kiln(*arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    """The command as a user runs it."""
    result = subprocess.run([sys.executable, "-m", "exporter", *map(str, arguments)], capture_output=True, text=True)
    if check and result.returncode:
        raise AssertionError(f"kiln {' '.join(map(str, arguments))} gave {result.returncode}:\n{result.stderr}")
    return result


# A process of its own between this one and the command: a child's peak counts what its parent had in memory when it was started.
_MEASURED = """
import os, sys
pid = os.fork()
if not pid:
    os.execvp(sys.argv[2], sys.argv[2:])
_, status, used = os.wait4(pid, 0)
open(sys.argv[1], "w").write(str(used.ru_maxrss << 10))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def with_peak_memory(tmp_path: Path, *command: object) -> tuple[subprocess.CompletedProcess, int]:
    """A command that must succeed, and the bytes that its process had in memory at most; processes that it starts are not counted."""
    peak = tmp_path / "peak"
    result = subprocess.run([sys.executable, "-SEc", _MEASURED, peak, *map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result, int(peak.read_text())


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills, once for all workers of a run: it gets a path that does not exist yet."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    path = root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            stage = root / f"{name}.partial"
            shutil.rmtree(stage, ignore_errors=True)
            make(stage)
            stage.rename(path)
    return path


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory) -> dict[str, Path]:
    """CPU artifacts of the fixtures, exported by the command: `plain` (F32, no TurboQuant, weights in their file) and `tq4` (Q4_K_M,
    TurboQuant, with an exact window shorter than the context, weights copied).

    KILN_TEST_ARTIFACTS names a directory that keeps them from run to run.
    """
    kept = os.environ.get("KILN_TEST_ARTIFACTS")
    common = ("--target", "cpu", "--max-seq-len", 96, "--prefill-chunk", 96)
    tq4 = ("--turboquant", "--residual-length", 32, "--weights", "copy")
    models = {"plain": ("gemma4-tiny-dense.gguf",), "tq4": ("gemma4-tiny-dense-wide-Q4_K_M.gguf", *tq4)}

    def export(name: str) -> Callable[[Path], object]:
        gguf, *options = models[name]
        return lambda path: kiln("export", "--gguf", FIXTURES / gguf, "--out", path, *options, *common)

    found = {}
    for name in models:
        if kept:
            found[name] = Path(kept) / name
            if not found[name].exists():
                export(name)(found[name])
        else:
            found[name] = shared(tmp_path_factory, f"artifact-{name}", export(name))
    return found


@pytest.fixture(scope="session")
def three_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps of 1, 2 and 4 tokens over 3 timelines of 64 positions, on the CPU."""
    from tests.runtime.batches import batch_artifact

    return batch_artifact("cpu", tmp_path_factory)


@pytest.fixture(scope="session")
def talking(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain artifact with a chat template."""

    def make(path: Path) -> None:
        shutil.copytree(artifacts["plain"], path, symlinks=True)
        (path / "chat_template.jinja").write_text(TEMPLATE)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["chat"] = {"prefix": "<bos><|turn>user\n", "suffix": "<turn|>\n<|turn>model\n", "tokens": {"bos_token": "<bos>"}}
        (path / "manifest.json").write_text(json.dumps(manifest))

    return shared(tmp_path_factory, "artifact-that-talks", make)


def gemma4_vocabulary(factory: pytest.TempPathFactory) -> tuple[Path, tuple[int, ...]]:
    """The real vocabulary's tokenizer.json, and the ids that end a generation."""

    def write(path: Path) -> None:
        read = read_tokenizer(open_gguf(FIXTURES / "gemma4-vocab.gguf").metadata)
        assert read
        path.mkdir()
        read.write(path / "tokenizer.json")
        (path / "ends.json").write_text(json.dumps(list(read.ends)))

    folder = shared(factory, "gemma4-vocabulary", write)
    return folder / "tokenizer.json", tuple(json.loads((folder / "ends.json").read_text()))
