"""`python -m kiln.exporter`, in a checkout `python -m exporter` too, is `kiln`."""

from kiln.exporter.cli import main

if __name__ == "__main__":
    main()
