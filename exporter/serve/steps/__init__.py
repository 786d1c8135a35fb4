"""Jobs -> tokens: who takes which step, and what is done to logits and tokens on the way. Knows neither HTTP nor conversations."""
