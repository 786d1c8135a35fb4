"""`kiln serve`: an artifact behind HTTP. Conversations are `kiln.exporter.conversation`'s, tokens are the engine's."""
