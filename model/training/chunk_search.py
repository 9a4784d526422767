"""What a chunk of a training sequence retrieves: its own text is the question (method section 7).

Where it stands: flows hand a factory of this to the job that prepares sequences (:mod:`pipelines.sequencing`).
"""

from collections.abc import Sequence

from model.embedding import load_embedder
from model.retrieving import Retriever
from model.tokenizing import CheckpointTokenizer, load_tokenizer
from schemas.bank import Bank
from schemas.errors import WrongModelError
from schemas.protocols import IntArray


class BankChunkSearch:
    """Searches the live references of a bank with the text of chunks; a :class:`schemas.protocols.ChunkSearch`."""

    def __init__(self, tokenizer: CheckpointTokenizer, retriever: Retriever) -> None:
        """Joins the tokenizer of the sequences with the index of a bank."""
        self._tokenizer, self._retriever = tokenizer, retriever

    @property
    def tokenizer_id(self) -> str:
        """Id of the tokenizer whose tokens chunks are made of."""
        return self._tokenizer.tokenizer_id

    def search(self, chunks: Sequence[IntArray], num_candidates: int) -> list[list[tuple[str, float]]]:
        """Returns for each chunk the ids of the nearest references and their similarities, best first."""
        texts = [self._tokenizer.decode(chunk) for chunk in chunks]
        return [[(hit.ref_id, hit.score) for hit in hits] for hits in self._retriever.search(texts, num_candidates)]


def open_chunk_search(bank: str, version: int, model: str, embedder: str, device: str = "cpu") -> BankChunkSearch:
    """Opens the search of a version of a bank.

    Args:
        bank: the bank's folder or URL.
        version: number of the version.
        model: ``memory3-tiny`` or the folder of a checkpoint, for its tokenizer.
        embedder: the embedding model that the bank was built with, see :func:`model.embedding.load_embedder`.
        device: where to embed.

    Raises:
        WrongModelError: the bank's references were cut by another tokenizer, or embedded by another model.
    """
    opened = Bank.open(bank, version)
    tokenizer = load_tokenizer(model)
    if tokenizer.tokenizer_id != opened.manifest.fingerprint.tokenizer:
        raise WrongModelError(
            f"bank {opened.url} was cut by another tokenizer than that of {model}; give the model it was built for, or "
            "build a bank with this one"
        )
    return BankChunkSearch(tokenizer, Retriever(opened, load_embedder(embedder, device=device)))
