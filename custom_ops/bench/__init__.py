"""Measuring and tuning of every op on a GPU."""
