"""What is linked into a package beside the compiled graph: elementary functions, and the runner's functions by name."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kiln.exporter.compiler import package
from kiln.exporter.errors import KilnError

WRAPPER = """
    constants_info_[0].dtype = cached_torch_dtype_float32;
    constants_info_[0].shape = {61, 8};
    constants_info_[0].stride = {8, 1};
    constants_info_[0].original_fqn = "embed.weight";
    constants_info_[1].dtype = cached_torch_dtype_int16;
    constants_info_[1].shape = {};
    constants_info_[1].stride = {};
    constants_info_[1].original_fqn = "scale";
"""
FUNCTIONS = ("exp", "tanh", "log", "sin", "cos", "log1p", "erf")


def build(tmp_path: Path, code: str) -> Path:
    """An object file of C++ that stands for a compiled graph."""
    source = tmp_path / "graph.cpp"
    source.write_text(code)
    subprocess.run(["g++", "-O1", "-fPIC", f"-march={package.MARCH}", "-c", source, "-o", tmp_path / "graph.o"], check=True)
    return tmp_path / "graph.o"


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """The elementary functions of a linked package over arrays whose length is a multiple of 8."""
    tmp_path = tmp_path_factory.mktemp("package")
    loops = "".join(
        f'extern "C" __m256 Sleef_{name}f8_{ulp}(__m256);\n'
        f'extern "C" void AOTInductorModelContainer_{name}(float* x, long n) {{\n'
        f"  for (long i = 0; i < n; i += 8) _mm256_storeu_ps(x + i, Sleef_{name}f8_{ulp}(_mm256_loadu_ps(x + i)));\n}}\n"
        for name, ulp in ((name, "u35" if name in ("sin", "cos") else "u10") for name in FUNCTIONS)
    )
    power = (
        'extern "C" __m256 Sleef_powf8_u10(__m256, __m256);\n'
        'extern "C" void AOTInductorModelContainer_pow(float* x, const float* y, long n) {\n'
        "  for (long i = 0; i < n; i += 8) _mm256_storeu_ps(x + i, Sleef_powf8_u10(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));\n}\n"
    )
    objects = [str(build(tmp_path, "#include <immintrin.h>\n" + loops + power))]
    package.link(objects, WRAPPER, tmp_path / "graph.so")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["graph.cpp", "graph.o", "graph.so"]
    return ctypes.CDLL(str(tmp_path / "graph.so"))


def call(functions, name: str, *values: np.ndarray) -> np.ndarray:
    padded = [np.concatenate([v, np.ones(-len(v) % 8, np.float32)]).astype(np.float32) for v in values]
    pointers = [v.ctypes.data_as(ctypes.c_void_p) for v in padded]
    getattr(functions, f"AOTInductorModelContainer_{name}")(*pointers, ctypes.c_long(len(padded[0])))
    return padded[0][: len(values[0])]


def units(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest error, in units in the last place of float32."""
    spacing = np.maximum(np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64), 2.0**-149)
    return float(np.max(np.abs(found.astype(np.float64) - exact) / spacing))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_rounded_once(functions, name):
    from math import erf

    rng = np.random.default_rng(7)
    reach = {"exp": 88, "tanh": 12, "log": 1, "sin": 140_000, "cos": 140_000, "log1p": 1, "erf": 5}[name]
    x = np.concatenate([rng.uniform(-reach, reach, 40_000), rng.normal(size=40_000) * 1e-3, rng.normal(size=2000) * 1e-30])
    x = x.astype(np.float32)
    if name == "log":
        x = np.exp2(rng.uniform(-148, 127.9, 80_000)).astype(np.float32)
        x = np.concatenate([x, (1 + rng.normal(size=20_000) * 1e-3).astype(np.float32)])
    if name == "log1p":
        x = np.abs(x)
    wide = x.astype(np.float64)
    exact = np.array([erf(v) for v in wide]) if name == "erf" else getattr(np, name)(wide)
    assert units(call(functions, name, x), exact) <= (1.0 if name in ("log1p", "erf") else 0.51), name


def test_powers_are_rounded_once(functions):
    rng = np.random.default_rng(8)
    x, y = rng.uniform(0, 30, 50_000).astype(np.float32), rng.uniform(-20, 20, 50_000).astype(np.float32)
    exact = np.power(x.astype(np.float64), y.astype(np.float64))
    good = (exact > 1e-37) & (exact < 3e38)
    assert units(call(functions, "pow", x, y)[good], exact[good]) <= 0.51


def test_values_at_the_edges(functions):
    edges = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e30, -1e30, 3.4e38, 1e-45, 89, -104, 2e6], np.float32)
    with np.errstate(all="ignore"):
        for name in ("exp", "tanh", "log", "sin", "cos"):
            exact = getattr(np, name)(edges.astype(np.float64)).astype(np.float32)
            np.testing.assert_allclose(call(functions, name, edges), exact, rtol=1e-6, err_msg=name)
        for base, exponent in ((0, 0), (0, -1), (-2, 3), (-2, 0.5), (np.inf, -1), (np.nan, 0), (2, np.nan), (1, np.inf), (-0.0, 3)):
            exact = np.power(np.float32(base), np.float32(exponent))
            np.testing.assert_array_equal(call(functions, "pow", np.array([base], np.float32), np.array([exponent], np.float32)), [exact])
    zeros = call(functions, "tanh", np.array([0.0, -0.0], np.float32))
    assert not np.signbit(zeros[0]) and np.signbit(zeros[1])


def test_a_function_that_the_runner_lacks_is_named(tmp_path):
    names = ("aoti_torch_cpu_fft", "aoti_torch_cpu_addmm_out")
    code = "".join(f'extern "C" void {name}();\n' for name in names)
    code += 'extern "C" void AOTInductorModelContainerF() { ' + "".join(f"{name}(); " for name in names) + "}\n"
    with pytest.raises(KilnError, match="calls aoti_torch_cpu_addmm_out, aoti_torch_cpu_fft, which the runner does not have"):
        package.link([str(build(tmp_path, code))], WRAPPER, tmp_path / "graph.so")


def test_nothing_of_a_package_is_visible_but_its_interface(tmp_path):
    code = 'extern "C" int aoti_torch_get_numel(void*, long*);\n'
    code += 'extern "C" int AOTInductorModelContainerF() { return aoti_torch_get_numel(0, 0); }\n'
    package.link([str(build(tmp_path, code))], WRAPPER, tmp_path / "graph.so")
    listed = subprocess.run(["nm", "-D", tmp_path / "graph.so"], capture_output=True, text=True, check=True).stdout
    defined = {line.split()[-1] for line in listed.splitlines() if line.split()[-2] in "TDRBW"}
    undefined = [line.split()[-1] for line in listed.splitlines() if line.split()[-2] == "U"]
    assert defined == {"kiln_shims", "kiln_constants", "AOTInductorModelContainerF"}
    assert not [name for name in undefined if name.startswith(("aoti", "cu", "Sleef", "kiln"))]
    library = ctypes.CDLL(str(tmp_path / "graph.so"))
    text = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "kiln_constants")))
    assert text == b"embed.weight float32 61,8\nscale int16 \n"


def test_constants_with_gaps_are_refused():
    with pytest.raises(KilnError, match=r"'embed.weight' as \[61, 8\] with strides \[1, 61\]"):
        package.declared_constants(WRAPPER.replace("stride = {8, 1}", "stride = {1, 61}"))


def test_packages_are_the_same_bytes_every_time(tmp_path):
    (tmp_path / "x").write_bytes(b"code")
    for name in ("a", "b"):
        package.write_package(tmp_path / name, {"prefill": tmp_path / "x", "decode": tmp_path / "x"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
