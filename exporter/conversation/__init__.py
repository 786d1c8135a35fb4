"""Conversations: messages -> the ids of a prompt, and generated ids -> a message. Nothing here knows HTTP, PyTorch or a model family."""
