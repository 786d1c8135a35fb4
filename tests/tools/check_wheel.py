"""What a wheel of kiln-runtime needs, and that it plays where nothing else is: `python -m tests.tools.check_wheel WHEEL [ARTIFACT]`.

Prints the platform, seconds and bytes of an installation, and for each binary the libraries that it needs and the newest version of each
that it imports a symbol of; with --symbols the symbols, too. Fails where it needs more than manylinux_2_28 grants, or does not play.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from elftools.elf.elffile import ELFFile

GLIBC = (2, 28)
LIBRARIES = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2", "libgcc_s.so.1",
             "libstdc++.so.6", "libgomp.so.1"}  # fmt: skip
MOST = 30 << 20  # bytes of an installation
MODULE = """
import sys
import kiln
session = kiln.Session(kiln.Model(sys.argv[1], "cpu"))
session.prefill([2, 5, 6])
print(session.generate(4, stop_at_eog=False)[0])
"""


def imports(path: Path) -> tuple[list[str], dict[str, str]]:
    """The libraries that `path` names, and the symbols that it takes from others -> their version or ""."""
    with path.open("rb") as file:
        elf = ELFFile(file)
        needed = [tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")]
        versions, indices = elf.get_section_by_name(".gnu.version_r"), elf.get_section_by_name(".gnu.version")
        names = {aux["vna_other"]: aux.name for _, each in versions.iter_versions() for aux in each} if versions else {}
        found = {}
        for i, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
            if symbol["st_shndx"] == "SHN_UNDEF" and symbol.name:
                found[symbol.name] = names.get(indices.get_symbol(i)["ndx"], "") if indices else ""
    return needed, found


def newest(symbols: dict[str, str]) -> dict[str, tuple[int, ...]]:
    """The newest version of each library that a symbol asks for, as {"GLIBC": (2, 28)}."""
    found: dict[str, tuple[int, ...]] = {}
    for version in filter(None, symbols.values()):
        library, _, number = version.rpartition("_")
        if re.fullmatch(r"[\d.]+", number):
            found[library] = max(found.get(library, ()), tuple(map(int, number.split("."))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("artifact", type=Path, nargs="?", help="for the CPU; its plain text is continued")
    parser.add_argument("--python", default=sys.executable, help="that it is installed for  [this one]")
    parser.add_argument("--symbols", action="store_true")
    options = parser.parse_args()
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([options.python, "-m", "venv", "--without-pip", folder], check=True)
        python, around = Path(folder, "bin", "python"), {"PATH": "/usr/bin:/bin", "HOME": folder}
        start = time.monotonic()
        install = ["install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-cache-dir", options.wheel]
        subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
        seconds = time.monotonic() - start
        (site,) = Path(folder, "lib").glob("python*/site-packages")
        size = sum(f.stat().st_size for f in site.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
        packed = options.wheel.stat().st_size
        print(f"{options.wheel.name}: {packed / 1e6:.1f} MB, installed in {seconds:.1f} s, {size / 1e6:.1f} MB unpacked")
        if size > MOST:
            wrong.append(f"{size} bytes unpacked, more than {MOST}")
        for path in sorted(f for f in site.rglob("*") if f.is_file()):
            if path.open("rb").read(4) != b"\x7fELF":
                continue
            needed, symbols = imports(path)
            versions = newest(symbols)
            said = ", ".join(f"{library} {'.'.join(map(str, version))}" for library, version in sorted(versions.items()))
            print(f"  {path.relative_to(site)}: needs {', '.join(needed)}; {len(symbols)} symbols, at most {said or 'without versions'}")
            if options.symbols:
                print("    " + " ".join(sorted(symbols)))
            if unknown := [n for n in needed if n not in LIBRARIES and not n.startswith("libgomp-")]:
                wrong.append(f"{path.name} needs {', '.join(unknown)}")
            if versions.get("GLIBC", ()) > GLIBC:
                wrong.append(f"{path.name} needs glibc {'.'.join(map(str, versions['GLIBC']))}")
        if options.artifact:
            start = time.monotonic()
            ask = ["--device", "cpu", "--raw", "--prompt", "Once", "--max-new-tokens", "8"]
            play = [Path(folder, "bin", "kiln-run"), options.artifact.resolve(), *ask]
            done = subprocess.run(play, capture_output=True, text=True, env=around, cwd=folder)
            seconds = time.monotonic() - start
            print(f"  kiln-run {options.artifact}: exit code {done.returncode} after {seconds:.1f} s: {done.stdout.strip()!r}")
            if done.returncode or not done.stdout.strip():
                wrong.append(f"it does not play: {done.stderr.strip()}")
            module = [python, "-c", MODULE, options.artifact.resolve()]
            done = subprocess.run(module, capture_output=True, text=True, env=around, cwd=folder)
            print(f"  the module: exit code {done.returncode}: {done.stdout.strip()}")
            if done.returncode or not done.stdout.strip():
                wrong.append(f"the module does not play: {done.stderr.strip()}")
    for problem in wrong:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
