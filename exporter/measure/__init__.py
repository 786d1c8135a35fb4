"""Measuring of artifacts and models: speed, kernels, quality."""
