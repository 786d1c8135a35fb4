"""Packed weights: layouts, dequantization, and the matmuls and embeddings that read them."""
