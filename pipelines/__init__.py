"""The pipelines: corpus files to references, embeddings, memories and an index, as linear Beam jobs; SQL over them."""
