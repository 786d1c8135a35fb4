"""A package: a stored zip archive with one shared library for each compiled graph, which needs libc, libm, libstdc++ and OpenMP alone.

A compiled graph calls torch's C functions and the CUDA driver by name. Here each of those names gets a definition inside the library: in
`in_package.cpp` where it is the same for every runner, else a jump through a table that the runner fills when it opens the library
(`shims.def` lists those, for the runner too). So the library has no undefined symbol that a process with another torch could take over, and
a graph that needs a function outside of the two lists fails at export.
"""

from __future__ import annotations

import os
import re
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

from kiln.exporter.compiler.host import MARCH
from kiln.exporter.errors import KilnError

ABI = 1  # of kiln_shims and kiln_constants; the runner refuses another one
SHIMS = Path(__file__).with_name("shims.def")
IN_PACKAGE = Path(__file__).with_name("in_package.cpp")
EXPORTED = ("kiln_shims", "kiln_constants", "AOTInductorModelContainer*")
EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Constant:
    """A constant of a compiled graph, as its code declares it; contiguous."""

    name: str  # fully qualified
    dtype: str  # as in the manifest
    shape: tuple[int, ...]


def shim_names() -> list[str]:
    """Functions that the runner implements."""
    return re.findall(r"^KILN(?:_CUDA)?_SHIM\((\w+)\)", SHIMS.read_text(), re.MULTILINE)


def declared_constants(wrapper: str) -> list[Constant]:
    """The constants in the generated source of a compiled graph, in its order. KilnError where one is not contiguous."""
    fields: dict[int, dict[str, str]] = {}
    for index, field, value in re.findall(r"constants_info_\[(\d+)\]\.(\w+) = (.*?);\n", wrapper):
        fields.setdefault(int(index), {})[field] = value
    found = []
    for _, info in sorted(fields.items()):
        name = info["original_fqn"].strip('"')
        shape, stride = (tuple(int(n.rstrip("L")) for n in re.findall(r"\d+L?", info[key])) for key in ("shape", "stride"))
        dense = [1]
        for size in reversed(shape[1:]):
            dense.insert(0, dense[0] * max(size, 1))
        if shape and stride != tuple(dense):
            raise KilnError(f"the compiled graph has '{name}' as {list(shape)} with strides {list(stride)}; this is a bug in Kiln")
        found.append(Constant(name, info["dtype"].removeprefix("cached_torch_dtype_"), shape))
    return found


def _source(constants: list[Constant]) -> str:
    """C++ and assembly of what is different in every package: the table of the runner's functions, and the constants."""
    names = shim_names()
    jumps = "".join(
        f".section .text.{name},\"ax\",@progbits\n.globl {name}\n.hidden {name}\n.type {name},@function\n{name}:\n"
        f"  endbr64\n  jmp *kiln_shim_slots+{8 * i}(%rip)\n.size {name},.-{name}\n"
        for i, name in enumerate(names)
    )
    lines = "".join(f"{c.name} {c.dtype} {','.join(map(str, c.shape))}\n" for c in constants)
    text = "\n".join(f'asm("{_escaped(line)}\\n");' for line in jumps.splitlines())
    return f"""#include "{IN_PACKAGE.name}"
extern "C" {{
extern __attribute__((visibility("hidden"))) void* kiln_shim_slots[{len(names)}];
__attribute__((used)) void* kiln_shim_slots[{len(names)}];
static const char* const names[] = {{{", ".join(f'"{name}"' for name in names)}}};
struct Shims {{ uint32_t version, count; const char* const* names; void** slots; }};
extern __attribute__((visibility("default"))) const Shims kiln_shims;
const Shims kiln_shims = {{{ABI}, {len(names)}, names, kiln_shim_slots}};
extern __attribute__((visibility("default"))) const char kiln_constants[];
const char kiln_constants[] = R"({lines})";
}}
{text}
"""


def _escaped(line: str) -> str:
    return line.replace("\\", "\\\\").replace('"', '\\"')


def link(objects: list[str], wrapper: str, output: Path) -> None:
    """The shared library `output` of a compiled graph's objects; `wrapper` is its generated source.

    Raises KilnError with the names of functions that the runner does not have.
    """
    source, script = output.with_suffix(".shims.cpp"), output.with_suffix(".map")
    source.write_text(_source(declared_constants(wrapper)))
    script.write_text(f"{{ global: {'; '.join(EXPORTED)}; local: *; }};\n")
    compiled, compiler = source.with_suffix(".o"), os.environ.get("CXX") or "g++"
    flags = ["-std=c++17", "-O2", f"-march={MARCH}", "-fPIC", "-fvisibility=hidden", "-ffunction-sections", "-w", f"-I{IN_PACKAGE.parent}"]
    flags += [f"-ffile-prefix-map={path}=kiln" for path in (IN_PACKAGE.parent, output.parent)]
    flags_of_ld = ("-z", "defs", "--gc-sections", "--as-needed", "--build-id=none", "-s", f"--version-script={script}")
    linker = [word for flag in flags_of_ld for word in ("-Xlinker", flag)]  # -Wl would split a path at its commas
    compile_it = [compiler, *flags, "-c", str(source), "-o", str(compiled)]
    link_it = [compiler, "-shared", *objects, str(compiled), *linker, "-lgomp", "-lm", "-o", str(output)]
    for command in (compile_it, link_it):
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if missing := sorted(set(re.findall(r"undefined reference to [`']([^']+)'", result.stderr))):
            raise KilnError(f"the compiled graph calls {', '.join(missing)}, which the runner does not have; this is a bug in Kiln")
        if result.returncode:
            raise subprocess.CalledProcessError(result.returncode, command, result.stderr)
    for path in (source, script, compiled):
        path.unlink()


def write_package(path: Path, libraries: dict[str, Path]) -> None:
    """`libraries` by entry point, as `ENTRY.so` in a zip archive whose bytes depend on nothing else."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for entry, library in libraries.items():
            archive.writestr(zipfile.ZipInfo(f"{entry}.so", EPOCH), library.read_bytes())
