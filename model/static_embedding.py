"""The static embedder: a text's vector is the mean of its word pieces' vectors, by numpy alone.

Reads the files of a sentence-transformers model made of ``StaticEmbedding`` and ``Normalize`` and gives the same
vectors (a test compares them), without the seconds that importing torch and sentence-transformers takes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from schemas.errors import InputError
from schemas.identifiers import hash_bytes
from schemas.protocols import FloatArray

TEXTS_PER_TILE = 256


class StaticEmbedder:
    """A table of word-piece vectors; a :class:`schemas.protocols.Embedder`."""

    def __init__(self, folder: Path) -> None:
        """Loads the tokenizer and the table.

        Raises:
            InputError: the folder does not hold such a model.
        """
        try:
            table = load_file(folder / "model.safetensors")["embedding.weight"]
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(f"{folder} holds no static embedding model: {error}") from error
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more specific
            raise InputError(f"{folder} holds no static embedding model: its tokenizer is damaged: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._table = table.astype(np.float32)
        self._id = f"static:{hash_bytes(table.tobytes() + self._tokenizer.to_str().encode())}"

    @property
    def embedder_id(self) -> str:
        """Digest of the table and the tokenizer."""
        return self._id

    @property
    def dimension(self) -> int:
        """Size of a vector."""
        return int(self._table.shape[1])

    def embed(self, texts: Sequence[str]) -> FloatArray:
        """Returns unit vectors, (texts, dimension) float32; a text without any known piece gets the zero vector."""
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for start in range(0, len(texts), TEXTS_PER_TILE):
            encodings = self._tokenizer.encode_batch_fast(
                list(texts[start : start + TEXTS_PER_TILE]), add_special_tokens=False
            )
            lengths = np.array([len(encoding.ids) for encoding in encodings])
            filled = np.flatnonzero(lengths)
            if len(filled):
                pieces = np.concatenate([encodings[row].ids for row in filled]).astype(np.int64)
                firsts = np.cumsum(lengths[filled]) - lengths[filled]
                sums = np.add.reduceat(self._table[pieces], firsts, axis=0)
                norms = np.linalg.norm(sums, axis=1, keepdims=True)
                vectors[start + filled] = sums / np.maximum(norms, 1e-12)
        return vectors
