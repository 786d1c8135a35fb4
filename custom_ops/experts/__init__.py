"""Mixtures of experts: the choice of experts for each token, and matmuls with only the chosen ones."""
