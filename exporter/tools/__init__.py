"""Making of model files: synthetic weights, quantization."""
