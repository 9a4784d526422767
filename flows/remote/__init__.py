"""Split deployment: a server that has the bank, and clients that have the model."""
