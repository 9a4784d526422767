"""The loss of held-out text in every way of knowing: ``memory3 eval perplexity``."""
