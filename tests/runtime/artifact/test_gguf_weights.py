"""Weights in a GGUF file: every block type is packed bit for bit as `layouts.pack` does, on the CPU and, over a driver that plays the
kernels, on a GPU; what a file may not differ in."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

import kiln
from kiln.custom_ops.dtypes import FLOATS
from kiln.custom_ops.weights.layouts import LAYOUTS, pack
from kiln.custom_ops.weights.pack_kernel import ROWS, UNITS, WARPS
from kiln.custom_ops.weights.permutation import permutation
from tests.code_only import add_to_package
from tests.gguf_files import write
from tests.runtime.toy import change, fails

N = (130, 7)  # rows of the two tensors of a matrix: one more than a whole number of what is packed at a time, and fewer
VECTOR = np.array([0.0, -0.0, 1.0, -2.5, 65504.0, 2.0**-14, 2.0**-24, -(2.0**-20)], np.float32)  # float16 holds them all


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def float_bytes(kind: str, values: np.ndarray) -> np.ndarray:
    return {"F32": values, "F16": values.astype(np.float16), "BF16": bfloat16(values)}[kind]


class Case:
    """A GGUF file with a fused matrix of each block type, a matrix and a vector of each float type; the constants that it should become."""

    def __init__(self, path: Path, seed: int = 0):
        rng = np.random.default_rng(seed)
        tensors, self.constants, self.want = [], [], {}
        for block_type, layout in LAYOUTS.items():
            groups, parts = 3, []
            for i, n in enumerate(N):
                parts.append(rng.integers(0, 256, (n, groups, layout.block_bytes), dtype=np.uint8))
                tensors.append((f"{block_type}.{i}.weight", (n, groups * layout.block), block_type, parts[-1]))
            names = [f"{block_type}.{i}.weight" for i in range(len(N))]
            for plane, data in zip(("words", "halves"), pack(block_type, np.concatenate(parts)), strict=True):
                self.add(f"{block_type}.{plane}", str(data.dtype), data, plane, names)
        layout, stack = LAYOUTS["Q5_K"], rng.integers(0, 256, (4 * 9, 1, LAYOUTS["Q5_K"].block_bytes), dtype=np.uint8)
        tensors.append(("stack.weight", (2, 2, 9, layout.block), "Q5_K", stack))
        for plane, data in zip(("words", "halves"), pack("Q5_K", stack), strict=True):
            self.add(f"stack.{plane}", str(data.dtype), data, plane, ["stack.weight"])
        for kind, dtype in FLOATS.items():
            matrix = rng.standard_normal((5, 33)).astype(np.float32)
            tensors.append((f"{kind}.matrix", matrix.shape, kind, float_bytes(kind, matrix)))
            self.add(f"{kind}.matrix", dtype.name, float_bytes(kind, matrix), "values", [f"{kind}.matrix"])
            tensors.append((f"{kind}.vector", VECTOR.shape, kind, float_bytes(kind, VECTOR)))
            vector = VECTOR if kind != "BF16" else (bfloat16(VECTOR).astype(np.uint32) << 16).view(np.float32)
            self.add(f"{kind}.vector", "float32", vector, "values", [f"{kind}.vector"])
        self.path = write(path, [], tensors)
        self.map = {
            "file": path.name, "directory": "", "types": {t.name: int(t) for t in GGMLQuantizationType},
            "packings": {block_type: permutation(block_type).record() for block_type in LAYOUTS},
            "tensors": [{"name": name, "type": kind, "shape": list(shape)} for name, shape, kind, _ in tensors],
            "unused": ["v.*"], "metadata": {"checked": ["toy.*"], "equal": {}, "free": [], "noted": {}},
        }  # fmt: skip

    def add(self, name: str, dtype: str, data: np.ndarray, plane: str, tensors: list[str]) -> None:
        self.want[name] = data.tobytes()
        self.constants.append({"name": name, "dtype": dtype, "shape": list(data.shape), "bytes": data.nbytes,
                               "source": {"plane": plane, "tensors": tensors}})  # fmt: skip

    def make(self, toy: Path, out: Path) -> Path:
        shutil.copytree(toy, out)
        change(out, lambda m: (m["constants"].extend(self.constants), m["weights"].update(gguf=self.map)))
        return out


@pytest.fixture
def case(tmp_path) -> Case:
    return Case(tmp_path / "m.gguf")


@pytest.fixture
def cpu(toy, device):
    if device != "cpu":
        pytest.skip("the CPU's package; a GPU's is played by tests/exporter/artifact/test_gpu_artifact.py")
    return toy


COMPARE = """
import ctypes, json, pickle, sys
import kiln
want = pickle.load(open(sys.argv[3], "rb"))
done = []
given = {"weights": sys.argv[2]} if sys.argv[2] else {}
model = kiln.Model(sys.argv[1], device=sys.argv[4], progress=lambda *p: done.append(p), ple=sys.argv[5] or None, **given)
memory = model.weight_memory()
wrong = [name for name, data in want.items() if ctypes.string_at(*memory[name]) != data]
print(json.dumps({"wrong": wrong, "aligned": all(at % 64 == 0 for at, _ in memory.values()), "done": done[-1]}))
"""


def compare(artifact: Path, case: Case | dict[str, bytes], device: str, environment: dict[str, str], ple: str = "") -> dict:
    """What differs of the constants in a model's memory. case: or the constants of an artifact that holds them."""
    want = artifact / "want"
    want.write_bytes(pickle.dumps(case.want if isinstance(case, Case) else case))
    command = [sys.executable, "-c", COMPARE, artifact, case.path if isinstance(case, Case) else "", want, device, ple]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("threads", [1, 3])
def test_planes_equal_pack_on_the_cpu(cpu, case, tmp_path, threads):
    found = compare(case.make(cpu, tmp_path / "a"), case, "cpu", {"OMP_NUM_THREADS": str(threads)})
    assert not found["wrong"] and found["aligned"] and found["done"][0] == found["done"][1] > 0


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("fake")
    source = Path(__file__).parents[1] / "fake_cuda.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-w", "-DDRIVER", source, "-o", folder / "libcuda.so.1"], check=True)
    return {"LD_LIBRARY_PATH": str(folder), "FAKE_CUDA_REPORT": str(folder / "report")}


@pytest.mark.builds
def test_planes_equal_pack_through_the_staging_of_a_gpu(cpu, case, tmp_path, fake_driver):
    """What the kernels are given is right: addresses, sizes, tables. The driver of the test does what they do."""
    artifact = for_a_gpu(case.make(cpu, tmp_path / "a"))
    assert compare(artifact, case, "cuda", fake_driver)["wrong"] == []
    left = report(fake_driver)
    assert not any(left[what] for what in ("bytes", "streams", "events", "modules", "handles")), left
    assert left["most"] > 64 << 20  # staged
    change(artifact, lambda m: m["targets"][0].pop("packing"))
    with pytest.raises(AssertionError, match="pack_halves.cubin', which the manifest does not name|pack_words.cubin', which the manifest"):
        compare(artifact, case, "cuda", fake_driver)


def report(fake_driver: dict[str, str]) -> dict[str, int]:
    return json.loads(Path(fake_driver["FAKE_CUDA_REPORT"]).read_text())


def for_a_gpu(artifact: Path) -> Path:
    """The CPU's artifact as one of a GPU that the test's driver plays."""
    images = {f"pack_{plane}.cubin": b"\x7fELF pack %d\0" % bits for plane, bits in (("words", 32), ("halves", 16))}
    kernels = {plane: {"file": f"pack_{plane}.cubin", "kernel": "kiln_pack_plane", "threads": 32 * WARPS, "shared": 1, "rows": ROWS,
                       "units": UNITS} for plane in ("words", "halves")}  # fmt: skip

    def edit(manifest: dict) -> None:
        (target,) = manifest["targets"]
        target |= {"target": "sm_90", "device": "cuda", "compute_capability": [9, 0], "packing": kernels}
        add_to_package(artifact, target, images)

    change(artifact, edit)
    return artifact


def gathered(artifact: Path, names: tuple[str, ...], where: str) -> None:
    change(artifact, lambda m: [c.update(gathered=where) for c in m["constants"] if c["name"].startswith(names)])


@pytest.mark.builds
def test_what_rows_are_read_of_may_lie_in_host_memory(cpu, case, tmp_path, fake_driver):
    """Of a GGUF file and of an artifact that holds its weights: the same constants, and the device's memory without those of the host."""
    names = ("Q6_K.", "F32.matrix", "F16.vector")
    artifact = for_a_gpu(case.make(cpu, tmp_path / "a"))
    gathered(artifact, names, "host")
    most = {}
    for ple in ("device", "host", ""):
        assert compare(artifact, case, "cuda", fake_driver, ple)["wrong"] == []
        left = report(fake_driver)
        most[ple] = left["most"]
        assert not any(left[what] for what in ("bytes", "handles")), left
    sizes = [-(-c["bytes"] // 256) * 256 for c in json.loads((artifact / "manifest.json").read_text())["constants"] if "gathered" in c]
    assert len(sizes) == 4 and most["device"] - most["host"] == sum(sizes) and most[""] == most["host"]
    alone = case.make(cpu, tmp_path / "cpu")
    gathered(alone, names, "device")
    assert compare(alone, case, "cpu", {}, "host")["wrong"] == []  # one memory

    holds = tmp_path / "holds"
    shutil.copytree(cpu, holds)
    constants = sorted(json.loads((holds / "manifest.json").read_text())["constants"], key=lambda c: c["offset"])
    data = (holds / "weights.safetensors").read_bytes()
    want = {c["name"]: data[c["offset"] : c["offset"] + c["bytes"]] for c in constants}
    first, second, *_ = (c["name"] for c in constants)
    for_a_gpu(holds)
    gathered(holds, (first,), "host")
    for ple in ("device", "host"):
        assert compare(holds, want, "cuda", fake_driver, ple)["wrong"] == []
        most[ple] = report(fake_driver)["most"]
    assert most["device"] > most["host"]
    change(holds, lambda m: [c.pop("gathered", None) for c in m["constants"]])
    gathered(holds, (second,), "host")
    with pytest.raises(AssertionError, match="constants of which only rows are read stand among others; export the model again"):
        compare(holds, want, "cuda", fake_driver)
    assert compare(holds, want, "cuda", fake_driver, "device")["wrong"] == []
    gathered(holds, (second,), "elsewhere")
    fails("'gathered' is 'elsewhere', neither 'device' nor 'host'", holds, "--tokens", 1)
    fails("has no per-layer embedding that could lie on the host; leave --ple away", cpu, "--tokens", 1, "--ple", "host")
    fails("--ple elsewhere: must be device or host", cpu, "--tokens", 1, "--ple", "elsewhere", code=2)


def test_another_file_of_the_same_tensors(cpu, case, tmp_path):
    artifact = case.make(cpu, tmp_path / "a")
    other = Case(tmp_path / "other.gguf", seed=1)
    assert other.want != case.want and compare(artifact, other, "cpu", {})["wrong"] == []


def test_the_file_that_lies_beside(cpu, case, tmp_path, monkeypatch):
    """Of the name that the manifest has, in the artifact's folder or beside it, however the folder is named; checked as any other."""
    artifact = case.make(cpu, tmp_path / "deep" / "a")
    monkeypatch.chdir(artifact)
    for place in (artifact, artifact.parent):
        fails("which is neither in this folder nor beside", artifact, "--tokens", 1)
        shutil.copy(case.path, place / "m.gguf")
        for name in (artifact, f"{artifact}/", ".", "../a"):
            assert kiln.Model(str(name), device="cpu").device == "cpu"
        (place / "m.gguf").unlink()
    (artifact / "m.gguf").write_bytes(case.path.read_bytes()[:200])
    fails("download", artifact, "--tokens", 1)
    change(artifact, lambda m: m["weights"]["gguf"].update(file=str(case.path)))
    fails("which is neither in this folder nor beside", artifact, "--tokens", 1)


def test_what_is_refused(cpu, case, tmp_path):
    artifact = case.make(cpu, tmp_path / "deep" / "a")
    fails("holds code only; give the GGUF file of the weights with --weights (it was made of m.gguf", artifact, "--tokens", 1)
    fails("holds its weights; give no other", cpu, "--tokens", 1, "--weights", case.path)
    fails("cannot open", artifact, "--tokens", 1, "--weights", tmp_path / "missing.gguf")
    fails("not a GGUF file", artifact, "--tokens", 1, "--weights", artifact / "manifest.json")
    raw = case.path.read_bytes()
    for cut in (2, 20, 200, len(raw) // 2, len(raw) - 40):
        (tmp_path / "cut.gguf").write_bytes(raw[:cut])
        fails("download" if cut > 4 else "not a GGUF file", artifact, "--tokens", 1, "--weights", tmp_path / "cut.gguf")
    bare = [("Q4_0.0.weight", (N[0], 96), "Q4_0", np.zeros((N[0], 3 * 18), np.uint8))]
    fails("tensor BF16.matrix is missing", artifact, "--tokens", 1, "--weights", write(tmp_path / "bare.gguf", [], bare))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m, c: m["weights"]["gguf"]["packings"]["Q4_0"].update(bytes=17), "is no part of a block of 17 bytes"),
        (
            lambda m, c: m["weights"]["gguf"]["packings"]["Q4_0"]["words"].__setitem__(0, "16&0f0f0f0f"),
            "'16&0f0f0f0f' is no part of a block of 18 bytes",
        ),
        (lambda m, c: m["weights"]["gguf"]["packings"]["Q4_0"]["words"].__setitem__(0, "2&0f0f0f0f<<32"), "is no part of a block"),
        (lambda m, c: m["weights"]["gguf"]["packings"]["Q4_0"]["words"].pop(), "they make int32 [3, 3, 137]"),
        (lambda m, c: m["weights"]["gguf"]["packings"].pop("Q4_0"), "which 'packings' does not have"),
        (lambda m, c: m["weights"].pop("gguf"), "'weights' has no 'gguf'"),
        (lambda m, c: c["source"].update(tensors=["nothing"]), "'tensors' does not have nothing"),
        (lambda m, c: c["source"].update(tensors=c["source"]["tensors"][:1]), "they make int32 [3, 4, 130]"),
        (lambda m, c: c["source"].update(tensors=["Q4_0.0.weight", "Q4_1.1.weight"]), "Q4_1.1.weight has another type"),
        (lambda m, c: c["source"].update(plane="bytes"), "there is no plane 'bytes'"),
        (lambda m, c: c["source"].update(tensors=["F32.matrix"]), "F32.matrix cannot be packed"),
    ],
)
def test_a_manifest_that_contradicts_itself(cpu, case, tmp_path, edit, message):
    artifact = case.make(cpu, tmp_path / "a")
    change(artifact, lambda m: edit(m, next(c for c in m["constants"] if c["name"] == "Q4_0.words")))
    fails(message, artifact, "--tokens", 1, "--weights", case.path)


def test_limits_of_values(cpu, case, tmp_path):
    artifact = case.make(cpu, tmp_path / "a")
    limit = lambda m, most: next(c for c in m["constants"] if c["name"] == "F32.vector")["source"].update(limit=most)  # noqa: E731
    change(artifact, lambda m: limit(m, 65504.0))
    kiln.Model(str(artifact), weights=str(case.path))
    change(artifact, lambda m: limit(m, 65503.0))
    with pytest.raises(kiln.Error, match=r"tensor F32.vector, element 4: 65504, the artifact's caches hold what at most 65503 makes"):
        kiln.Model(str(artifact), weights=str(case.path))


def test_a_file_that_is_cut_while_it_is_read_is_an_error(cpu, case, tmp_path):
    """Tensors are read, not mapped: the process lives."""
    artifact = case.make(cpu, tmp_path / "a")
    size = case.path.stat().st_size

    def cut(done: int, total: int) -> None:
        os.truncate(case.path, size // 2)

    with pytest.raises(kiln.Error, match="the file ended"):
        kiln.Model(str(artifact), weights=str(case.path), progress=cut)
