"""The artifact directory: manifest, weights, memory plan, inspection."""
