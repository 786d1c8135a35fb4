"""Kiln's operators: each file holds the reference, the op and its Triton kernels."""
