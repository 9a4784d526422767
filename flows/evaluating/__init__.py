"""Measuring a model with and without memory, as the field measures: ``memory3 eval``."""
