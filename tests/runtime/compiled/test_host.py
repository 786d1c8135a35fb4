"""The machine is checked before compiled code is loaded, each time in one line: CPU, glibc, driver, a folder that allows execution."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.runtime.toy import KILN_RUN, PROMPT, change, ids

pytestmark = pytest.mark.builds

RUNTIME = Path(__file__).parents[3] / "runtime_cpp"
PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <string>

#include "compiled/host.h"
#include "kiln/error.h"

using namespace kiln;

int main(int n, char** a) try {
  if (n == 6) {  // EBX(7) ECX(1) ECX(80000001) XCR0 -: what is missing
    auto number = [&](int i) { return static_cast<uint32_t>(std::strtoul(a[i], nullptr, 16)); };
    auto ask = [&](uint32_t leaf, uint32_t) {
      CpuId r;
      if (leaf == 7) r.ebx = number(1);
      if (leaf == 1) r.ecx = number(2);
      if (leaf == 0x80000001) r.ecx = number(3);
      return r;
    };
    std::printf("%s\n", missing_features(ask, number(4)).c_str());
  } else if (n == 3) {  // STRINGS HAS
    std::string library = a[1];
    for (char& c : library)
      if (c == ',') c = '\0';
    check_glibc(library, "model.pt2", a[2]);
  } else {
    check_cpu();
  }
  return 0;
} catch (const Error& e) {
  std::printf("%s\n", e.what());
  return 1;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("host")
    (folder / "main.cpp").write_text(PROGRAM)
    sources = [folder / "main.cpp", RUNTIME / "src" / "compiled" / "host.cpp", RUNTIME / "src" / "error.cpp"]
    command = ["c++", "-std=c++17", f"-I{RUNTIME / 'src'}", f"-I{RUNTIME / 'include'}", *sources, "-o", folder / "main"]
    subprocess.run(command, check=True)
    return folder / "main"


def says(program: Path, *arguments: str) -> str:
    return subprocess.run([program, *arguments], capture_output=True, text=True).stdout.strip()


def test_cpu(program):
    assert subprocess.run([program]).returncode == 0  # this machine has run compiled models
    haswell = {"ebx": 0x128, "ecx": 0x38D81000 | 1 << 20 | 1 << 22 | 1 << 23, "lzcnt": 0x20, "xcr0": 7}

    def missing(**other: int) -> str:
        cpu = haswell | other
        return says(program, *(f"{cpu[k]:x}" for k in ("ebx", "ecx", "lzcnt", "xcr0")), "-")

    assert missing() == ""
    assert missing(ebx=0x108) == "AVX2"
    assert missing(ecx=haswell["ecx"] & ~(1 << 12)) == "FMA"
    assert missing(ecx=haswell["ecx"] & ~(1 << 22) & ~(1 << 29), lzcnt=0) == "MOVBE, F16C, LZCNT"
    assert missing(xcr0=1) == "AVX"  # the operating system does not keep the registers
    assert missing(ebx=0, ecx=0, lzcnt=0, xcr0=0).count(",") == 9


def test_glibc(program):
    assert says(program, "GLIBC_2.2.5,x,GLIBC_2.34,GLIBC_2.14", "2.34") == ""
    assert says(program, "GLIBC_PRIVATE,GLIBC_2.34", "2.36") == ""
    assert "needs glibc 2.38, this machine has 2.36" in says(program, "GLIBC_2.2.5,GLIBC_2.38,GLIBC_2.4", "2.36")
    assert "needs glibc 2.100, this machine has 2.99" in says(program, "GLIBC_2.100", "2.99")


DRIVER = """
int version(int* v) { *v = %d; return 0; }
int other() { return 999; }
int cuGetProcAddress_v2(const char* name, void** f, int cuda, unsigned long long flags, int* found) {
  *f = __builtin_strcmp(name, "cuDriverGetVersion") ? (void*)other : (void*)version;
  *found = 0;
  return 0;
}
"""


def test_driver(copy, device, tmp_path):
    """A driver of CUDA 12 in place of the machine's."""
    change(copy, lambda m: m["targets"][0].update(target="sm_90", device="cuda", compute_capability=[9, 0]))
    command = [KILN_RUN, copy, "--tokens", ids(PROMPT), "--device", "cuda"]
    for version, message in ((12080, "is for CUDA 12.8, compiled models need 13.0; update it to 580 or newer"), (13000, "does not start")):
        (tmp_path / "driver.c").write_text(DRIVER % version)
        subprocess.run(["cc", "-w", "-shared", "-fPIC", tmp_path / "driver.c", "-o", tmp_path / "libcuda.so.1"], check=True)
        result = subprocess.run(command, env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True)
        assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
