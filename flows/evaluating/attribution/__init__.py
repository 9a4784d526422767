"""Whether citations by attention are true: ``memory3 eval attribution``."""
