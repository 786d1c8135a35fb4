"""What a change costs or gains in a whole step of one token: compiled artifacts of one model, played in turns on a GPU.

    kiln synth --preset gemma4-31b --mix q4_k_m --layers 12 --out 12.gguf --vocab-from tests/fixtures/gemma4-vocab.gguf
    kiln export --gguf 12.gguf --out A --target sm_90 --turboquant --max-seq-len 8192      # in each checkout, A, B, ...
    python -m tests.measure.compare_steps A B ... --gguf 12.gguf --work DIR

Of an artifact manifest.json and model.sm_NN.pt2 are enough. Kernels alone do not tell what a step takes: which of them start early, and
what they find in the caches, differs. Two compilations of nearly the same code differ by up to 10 us of 1,450, so less says nothing.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from kiln.exporter.measure.bench import measure
from tests.tools.rebuild import complete

Times = dict[str, dict[int, list[float]]]  # microseconds of a step in each window, by name and depth


def table(times: Times) -> list[str]:
    """A line for each artifact: at each depth the median, its tenth and ninetieth per cent, and the ratio to the first artifact's."""
    first = next(iter(times.values()))
    lines = []
    for name, depths in times.items():
        said = []
        for depth, found in depths.items():
            tenths = statistics.quantiles(found, n=10, method="inclusive")
            middle = statistics.median(found)
            said.append(f"{depth}: {middle:,.1f} us ({tenths[0]:,.1f} - {tenths[-1]:,.1f}), {middle / statistics.median(first[depth]):.4f}")
        lines.append(f"{name:24} {'   '.join(said)}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.compare_steps", description=__doc__.splitlines()[0])
    parser.add_argument("compiled", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--gguf", type=Path, required=True, help="the model that all were compiled for, or its like")
    parser.add_argument("--work", type=Path, required=True, help="for the completed artifacts")
    parser.add_argument("--depths", default="128,2048")
    parser.add_argument("--steps", type=int, default=256, help="at each depth and round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    if len({compiled.name for compiled in options.compiled}) < len(options.compiled):
        parser.error("two folders have one name; theirs are the names of the table and below --work")
    if there := [str(options.work / compiled.name) for compiled in options.compiled if (options.work / compiled.name).exists()]:
        parser.error(f"{', '.join(there)} exist already, of code that may be another; remove them or name another --work")
    for compiled in options.compiled:
        complete(compiled, options.gguf, options.work / compiled.name)
    times: Times = {}
    for _ in range(options.rounds):
        for compiled in options.compiled:
            record = measure(options.work / compiled.name, options.depths, None, options.steps, options.device, None, options.gguf)
            for row in record["depths"]:
                times.setdefault(compiled.name, {}).setdefault(row["depth"], []).extend(1e6 / rate for rate in row["decode"]["windows"])
    print("\n".join(table(times)))


if __name__ == "__main__":
    main()
