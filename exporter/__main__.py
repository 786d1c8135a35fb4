"""`python -m exporter` is `kiln`."""

from exporter.cli import main

if __name__ == "__main__":
    main()
