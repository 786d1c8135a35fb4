"""The plain decoder."""
