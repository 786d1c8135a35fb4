"""The exporter: from a GGUF file to a compiled artifact."""
