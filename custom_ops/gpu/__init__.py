"""The card: which one, how kernels are launched on it, which tiles they take."""
