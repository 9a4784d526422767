"""Facts that are edited, deleted and contradicted: ``memory3 eval knowledge``."""
