"""Attention over caches of 16 and 32 bits, in prefill and decode."""
