"""The runner's parallel reading of a file, which otherwise only a GPU's loading does, in a program of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.builds

RUNTIME = Path(__file__).parents[3] / "runtime_cpp"
PROGRAM = r"""
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "artifact/file.h"

int main(int, char** a) try {  // PATH OFFSET BYTES THREADS [LENGTH TO CUT THE FILE TO, once it is mapped]
  kiln::MappedFile file(a[1]);
  if (a[5] && truncate(a[1], std::atol(a[5])) != 0) return 3;
  std::vector<char> to(std::atol(a[3]) + 2, 'x');
  file.read(std::atol(a[2]), std::atol(a[3]), to.data() + 1, std::atoi(a[4]));
  bool same = std::memcmp(to.data() + 1, file.data() + std::atol(a[2]), std::atol(a[3])) == 0;
  return same && to.front() == 'x' && to.back() == 'x' ? 0 : 2;
} catch (const std::exception& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("file")
    (folder / "main.cpp").write_text(PROGRAM)
    includes = [f"-I{RUNTIME / 'src'}", f"-I{RUNTIME / 'include'}"]
    sources = [RUNTIME / "src" / name for name in ("error.cpp", "artifact/file.cpp")]
    command = ["c++", "-std=c++17", "-pthread", *includes, folder / "main.cpp", *sources, "-o", folder / "main"]
    subprocess.run(command, check=True)
    return folder / "main"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(bytes(i * 151 % 251 for i in range(200_003)))
    return path


@pytest.mark.parametrize("threads", [1, 3, 4, 16])
@pytest.mark.parametrize("offset, size", [(0, 200_003), (17, 99_999), (4096, 8192), (5, 3), (7, 0), (200_002, 1)])
def test_threads_read_what_is_there(program: Path, file: Path, offset: int, size: int, threads: int) -> None:
    subprocess.run([program, file, str(offset), str(size), str(threads)], check=True)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_that_ended_is_named_with_the_byte(program: Path, file: Path, threads: int) -> None:
    result = subprocess.run([program, file, "100", "200000", str(threads), "150000"], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == f"{file}: cannot read byte 150000: the file ended\n"
