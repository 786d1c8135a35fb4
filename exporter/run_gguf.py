"""`kiln run MODEL.gguf`: the code package is found in the user's cache, or made and kept there, and played with the file's weights."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from dataclasses import dataclass, field
from pathlib import Path

import click

from kiln.exporter.cache import CodeOptions, Wanted, find, find_code, making, wanted
from kiln.exporter.errors import KilnError
from kiln.exporter.interrupt import held
from kiln.exporter.parameters import is_model_file
from kiln.exporter.progress import say
from kiln.exporter.temporary import working_folder

OWN = ("--code", "--target", "--max-seq-len", "--kv-cache")
CACHES = ("f16", "bf16", "tq4")


@dataclass
class Request:
    """The command line: options of this module, and what goes to kiln-run."""

    model: Path
    own: dict[str, str] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        return next((self.rest[i + 1] if a == "--device" else a.partition("=")[2] for i, a in enumerate(self.rest)
                     if a.startswith("--device=") or (a == "--device" and i + 1 < len(self.rest))), "auto")  # fmt: skip


def parse(arguments: tuple[str, ...]) -> Request:
    """Raises click.UsageError."""
    request = Request(Path(arguments[0]))
    words = iter(arguments[1:])
    for word in words:
        if word == "--":
            request.rest += [word, *words]
            break
        name, equals, value = word.partition("=")
        if name not in OWN:
            request.rest.append(word)
            continue
        if not equals and (value := next(words, "")) == "":
            raise click.UsageError(f"{name} needs a value")
        request.own[name] = value
    if "--code" in request.own and len(request.own) > 1:
        other = next(name for name in request.own if name != "--code")
        raise click.UsageError(f"--code names what was compiled already; {other} does not go with it")
    if (cache := request.own.get("--kv-cache", "f16")) not in CACHES:
        raise click.UsageError(f"--kv-cache {cache}: choose from {', '.join(CACHES)}")
    length = request.own.get("--max-seq-len", "16")
    if not length.isascii() or not length.isdigit() or int(length) < 16:
        raise click.UsageError(f"--max-seq-len {length}: a number of tokens, 16 or more")
    return request


def compute_capability(index: int) -> tuple[int, int] | None:
    """Of a GPU, asked of the driver; None where there is none."""
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        if not driver.cuInit(0) and not driver.cuDeviceGet(ctypes.byref(device), index):
            for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
                driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            return major.value, minor.value
    return None


def target(request: Request) -> str:
    """What is compiled for: as asked, else what --device names, else the GPU here, else the CPU."""
    if named := request.own.get("--target"):
        return named
    device = request.device
    number = device.removeprefix("cuda").removeprefix(":") or "0"
    found = compute_capability(int(number)) if device != "cpu" and number.isascii() and number.isdigit() else None
    found = found or (compute_capability(0) if device == "auto" else None)
    if found is None and device not in ("auto", "cpu"):
        raise KilnError(f"--device {device}: there is no such GPU here; use cpu, cuda or cuda:N")
    return f"sm_{found[0]}{found[1]}" if found else "cpu"


def code_for(request: Request) -> Path:
    """The artifact of code that plays the model; made where it is not there."""
    if code := request.own.get("--code"):
        return Path(code)
    length = request.own.get("--max-seq-len")
    options = CodeOptions(target(request), int(length) if length else None, request.own.get("--kv-cache", "f16"))
    entry = wanted(request.model, options)
    if entry is None:
        from kiln.exporter.source.plan import read_plan

        read_plan(request.model)  # tells what is wrong
        raise AssertionError("a file that cannot be played has no problem")
    if found := find(entry):
        return found
    with making(entry) as place:
        if found := find(entry):  # made while this process waited
            return found
        _make(request.model, options, entry, place)
    return place


def _make(model: Path, options: CodeOptions, entry: Wanted, place: Path) -> None:
    from kiln.exporter.compiler.host import check_compiler
    from kiln.exporter.compiler.workers import none_left, prepare
    from kiln.exporter.source.plan import read_plan

    with contextlib.redirect_stdout(sys.stderr), working_folder() as folder, none_left():
        code = find_code(entry)
        if code is None:
            check_compiler(folder)
        plan = read_plan(model)
        if code is not None:
            from kiln.exporter.artifact.rebind import rebind

            say(f"{model}: its code is there, {place.name} gets its tokenizer")
            rebind(code, plan, place)
            return
        say(f"{model}: compiling for {options.target}, once, into {place}")
        prepare()
        from kiln.exporter.build import ExportOptions, export_artifact

        cache = "bfloat16" if options.kv_cache == "bf16" else "float16"
        export_artifact(
            ExportOptions(gguf_path=model, out=place, shared=True, max_seq_len=options.max_seq_len, targets=(options.target,),
                          cache=cache, turboquant=options.kv_cache == "tq4"), plan)  # fmt: skip


def played(path: Path, device: str, weights: Path | None, max_seq_len: int | None, kv_cache: str | None) -> tuple[Path, Path | None]:
    """The artifact and the file of its weights: those given, or of a model file the code that is kept for it, made where it is not there.

    Raises KilnError, click.UsageError for options that do not go together.
    """
    if not is_model_file(path):
        if max_seq_len is not None or kv_cache is not None:
            raise click.UsageError(f"--{'max-seq-len' if max_seq_len is not None else 'kv-cache'} is of a model file; {path} is compiled")
        return path, weights
    if weights is not None:
        raise click.UsageError(f"--weights is of an artifact; {path} holds its own")
    own = {"--max-seq-len": str(max_seq_len)} if max_seq_len is not None else {}
    return code_for(Request(path, own | ({"--kv-cache": kv_cache} if kv_cache else {}), ["--device", device])), path


def command(arguments: tuple[str, ...]) -> list[str]:
    """What kiln-run is to be given for `kiln run MODEL.gguf ...`."""
    request = parse(arguments)
    code = code_for(request)
    with held():
        return [str(code), "--weights", str(request.model), *request.rest]
