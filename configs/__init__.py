"""TOML tables shipped with the package: GPUs and model families."""
