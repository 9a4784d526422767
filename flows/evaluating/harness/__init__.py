"""Tasks of the lm-evaluation-harness: ``memory3 eval lm``."""
