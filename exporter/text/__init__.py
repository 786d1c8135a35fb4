"""How text becomes token ids and comes back: the reference of what runtime_cpp/src/text does, over the same tokenizer.json."""
