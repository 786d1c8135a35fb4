"""The gated delta rule: a state that each token replaces, one token at a time or in blocks."""
