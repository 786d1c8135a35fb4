"""`python -m kiln.exporter`, in a checkout `python -m exporter` too, is `kiln`."""

import sys
from pathlib import Path

if __package__ == "exporter":  # the rooms beside this file, whatever else is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "runtime_cpp" / "python"))

from kiln.exporter.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
