"""What a step does beside matmuls and attention: norms and sampling."""
