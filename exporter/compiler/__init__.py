"""Tracing, passes and AOTInductor."""
