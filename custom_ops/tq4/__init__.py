"""TQ4, the 4-bit KV cache: codec and attention."""
