"""The command `kiln-run` of an installed kiln-runtime: this process becomes the binary in the package."""

import os
import signal
import sys

import kiln


def binary() -> str | None:
    """Path of kiln-run; None where it is not built."""
    paths = (os.path.join(folder, "bin", "kiln-run") for folder in kiln.__path__)
    return next((path for path in paths if os.access(path, os.X_OK)), None)


def main() -> int:
    path = binary()
    if path is None:
        print("kiln-run: error: the package kiln has no bin/kiln-run; pip install --force-reinstall kiln-runtime", file=sys.stderr)
        return 1
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores them, and a program inherits that
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.execv(path, [path, *sys.argv[1:]])
