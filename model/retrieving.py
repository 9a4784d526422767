"""Retrieval: the references whose embeddings are nearest to that of a text, by FAISS."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from schemas.bank import Bank
from schemas.errors import BankFormatError, InputError, WrongModelError
from schemas.protocols import Embedder, FloatArray

RowArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hit:
    """A retrieved reference.

    Attributes:
        ref_id: its id.
        score: cosine similarity with the query.
    """

    ref_id: str
    score: float


class Retriever:
    """Searches the live references of one version of a bank."""

    def __init__(self, bank: Bank, embedder: Embedder) -> None:
        """Opens the index of a bank.

        Raises:
            WrongModelError: the bank's references were embedded by another model.
            BankFormatError: the index is missing, damaged, or does not fit the table of embeddings.
        """
        import faiss

        if embedder.embedder_id != bank.manifest.embedder_id:
            raise WrongModelError(
                f"bank {bank.path} was embedded by {bank.manifest.embedder_id}, the embedder at hand is "
                f"{embedder.embedder_id}; restore the embedding model it was built with, or build the bank again"
            )
        self._embedder = embedder
        paths = bank.locate_all("index")
        if not paths:
            raise BankFormatError(
                f"version {bank.manifest.version} of bank {bank.path} has no index; build the bank again"
            )
        path = paths[0]
        try:
            self._index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise BankFormatError(f"index {path} is damaged; build the bank again") from error
        self._ref_ids = bank.read_table("embeddings", ["ref_id"])["ref_id"].combine_chunks()
        if self._index.ntotal != len(self._ref_ids) or self._index.d != embedder.dimension:
            raise BankFormatError(
                f"index {path} has {self._index.ntotal} vectors of {self._index.d}, the table of embeddings "
                f"{len(self._ref_ids)} of {embedder.dimension}; build the bank again"
            )

    @property
    def num_references(self) -> int:
        """Live references that can be found."""
        return len(self._ref_ids)

    def get_ref_id(self, row: int) -> str:
        """Returns the id of a row of the index."""
        return str(self._ref_ids[row].as_py())

    def search_rows(self, texts: Sequence[str], num_hits: int) -> tuple[RowArray, FloatArray]:
        """Returns rows of the index (texts, num_hits), best first, -1 where there are too few, and their similarities.

        Raises:
            InputError: ``num_hits`` is below 1.
        """
        if num_hits < 1:
            raise InputError(f"asked for {num_hits} hits; ask for at least 1")
        similarities, rows = self._index.search(self._embedder.embed(texts), num_hits)
        return rows, similarities

    def search(self, texts: Sequence[str], num_hits: int) -> list[list[Hit]]:
        """Returns the best references for each text, best first."""
        rows, similarities = self.search_rows(texts, num_hits)
        return [
            [
                Hit(ref_id=self.get_ref_id(int(row)), score=float(score))
                for row, score in zip(row_of, score_of, strict=True)
                if row >= 0
            ]
            for row_of, score_of in zip(rows, similarities, strict=True)
        ]
