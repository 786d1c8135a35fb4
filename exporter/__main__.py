"""`python -m exporter` is `kiln`."""

from kiln.exporter.cli import main

if __name__ == "__main__":
    main()
