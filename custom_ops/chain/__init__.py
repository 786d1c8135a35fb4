"""The matmuls of a decode step between two attentions as one kernel."""
