"""The model: writing and reading memories with any RoPE decoder of transformers, retrieval, generation, training."""
