"""What a model file says: GGUF container, configuration, tokenizer."""
