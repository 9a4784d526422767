"""The inference server: ``memory3 serve``."""
