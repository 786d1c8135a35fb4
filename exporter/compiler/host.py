"""The host tools of a compilation: found and tried before any work. No torch here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from kiln.exporter.errors import KilnError
from kiln.exporter.temporary import lasting

CUDA_HEADERS = ("cuda.h", "cuda_runtime_api.h", "crt/host_config.h")
TRIAL = "#include <omp.h>\n#include <cmath>\nextern \"C\" int trial() { return omp_get_max_threads(); }\n"
MARCH = "x86-64-v3"  # the host code of every package
FLAGS = ("-std=c++17", "-shared", "-fPIC", "-fopenmp", f"-march={MARCH}")


def check_compiler(folder: Path) -> None:
    """Compile and link a few lines in `folder` with CXX, else g++, as the compilation will. Raises KilnError."""
    name = os.environ.get("CXX") or "g++"
    os.environ["CXX"] = name  # an empty one would be taken at its word
    said = f"the C++ compiler CXX={name}" if name != "g++" else "the C++ compiler g++"
    if not shutil.which(name):
        raise KilnError(f"{said} was not found; install g++ (Debian: apt-get install g++), or set CXX to one program without arguments")
    source, library = folder / "trial.cpp", folder / "trial.so"
    try:
        source.write_text(TRIAL)
        command = [name, *FLAGS, str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, cwd=folder)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise KilnError(f"{said} could not be started: {e}") from e
    if done.returncode:
        raise KilnError(f"{said} cannot compile with OpenMP for {MARCH}: {reason(done.stderr)}")
    source.unlink()
    library.unlink()


def check_gpu_tools() -> None:
    """What an artifact for a GPU needs beside the compiler. Raises KilnError."""
    cuda_home()
    for tool in ("ld", "objcopy"):
        if not shutil.which(tool):
            raise KilnError(f"{tool} was not found, which puts GPU code into a library; install binutils")


def cuda_home() -> str:
    """The folder with CUDA's headers: of CUDA_HOME, of the wheels or of an installed toolkit. Raises KilnError."""
    named = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc")
    toolkits = [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    homes = [named] if named else [os.path.join(sysconfig.get_paths()["purelib"], "nvidia", "cu13"), *toolkits, "/usr/local/cuda"]
    home = next((h for h in homes if all(Path(h, "include", f).is_file() for f in CUDA_HEADERS)), None)
    if home is None:
        raise KilnError(
            f"no CUDA headers in {' or '.join(homes)}; install the package's dependencies, or set CUDA_HOME to a CUDA 13 toolkit"
        )
    return home


def reason(output: str) -> str:
    """The line of a compiler's output that says why: its first error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower() or "ld: " in line), lines[-1] if lines else "it says nothing")


def compile_failure(error: Exception) -> str:
    """One line for what a compilation raised. The output of a C++ compiler is kept in a file that the line names."""
    failed: BaseException | None = error  # Inductor wraps what happens within it
    while failed is not None and not isinstance(getattr(failed, "output", None), str | bytes):
        failed = getattr(failed, "inner_exception", None) or failed.__cause__ or failed.__context__
    output = getattr(failed, "output", None)
    if isinstance(output, bytes):
        output = output.decode(errors="replace")
    if not isinstance(output, str):
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"{type(error).__name__}: {text} (KILN_DEBUG=1 shows where)"
    command = getattr(failed, "cmd", ())
    words = command if isinstance(command, str) else " ".join(map(str, command))
    with tempfile.NamedTemporaryFile("w", prefix="kiln-compiler-", suffix=".log", dir=lasting(), delete=False, errors="replace") as f:
        f.write(f"{words}\n\n{output}")
    return f"the C++ compiler failed: {reason(output)}; all it said is in {f.name}"

