"""What is found, and by what: ``memory3 eval retrieval``."""
