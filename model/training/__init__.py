"""Training a model to read memories, in the paper's two stages."""
