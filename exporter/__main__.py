"""`kiln` itself, `python -m kiln.exporter`, and in a checkout `python -m exporter`."""

import sys
from pathlib import Path

if __package__ == "exporter":  # the rooms beside this file, whatever else is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "runtime_cpp" / "python"))


def main() -> None:
    """The command. Signals are its own before it loads what takes time, and stay so to the end of the process."""
    from kiln.exporter.interrupt import end_cleanly, open_streams

    end_cleanly()
    open_streams()
    from kiln.exporter.cli import main as command

    command()


if __name__ == "__main__":
    main()
