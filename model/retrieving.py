"""Retrieval: the references whose embeddings are nearest to that of a text, by FAISS.

Where it stands: a version's segments each have an index of their own; this searches all of them, live references only,
and hands ids to fetching. The indexes are mapped into memory, not read: opening one costs nothing, and several
processes share what is in use.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.bank import HASHED_BYTES, Bank
from schemas.errors import BankFormatError, InputError, WrongModelError
from schemas.identifiers import ID_LENGTH
from schemas.manifest import FileEntry
from schemas.protocols import Embedder, FloatArray, LongArray, MaskArray

IdArray = np.ndarray[tuple[int, ...], np.dtype[np.bytes_]]
"""Ids as they are stored, 32 bytes each: a million of them are one array and not a million strings."""

SPARE_HITS = 3
"""Hits asked of an index beyond those wanted, to see whether others are as near as the last."""

MAX_TIED_HITS = 256
"""Equally near references among which the first by id are found for certain."""

SCORE_ERROR = 1e-5
"""FAISS adds up in float32, and in an order that depends on the batch: its scores are only this good."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hit:
    """A retrieved reference.

    Attributes:
        ref_id: its id.
        score: cosine similarity with the query.
    """

    ref_id: str
    score: float


class MemorySearch(Protocol):
    """What finds references: a :class:`Retriever`, or something in front of one."""

    def search(self, texts: Sequence[str], num_hits: int) -> list[list[Hit]]:
        """Returns for each text the nearest references, best first."""
        ...


def read_part(bank: Bank, file: FileEntry, columns: list[str]) -> pa.Table:
    """Reads columns of one segment's file of a parted table.

    Raises:
        BankFormatError: the file is missing or damaged.
    """
    batches = list(bank.iterate_table(file, columns))
    if not batches:
        with bank.open_table(file) as table:
            return table.schema_arrow.empty_table().select(columns)
    return pa.Table.from_batches(batches)


def pack_ids(column: pa.ChunkedArray, origin: str) -> IdArray:
    """Returns a column of ids as an array, from Arrow's own buffers.

    Raises:
        BankFormatError: a value is no id; the error names ``origin``.
    """
    parts: list[IdArray] = [np.empty(0, f"S{ID_LENGTH}")]
    for chunk in column.chunks if len(column) else []:
        is_text = chunk.type == pa.string() and not chunk.null_count
        places = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset :][: len(chunk) + 1] if is_text else None
        if places is None or (np.diff(places) != ID_LENGTH).any():
            raise BankFormatError(f"{origin} has values that are no ids; run memory3 verify")
        parts.append(np.frombuffer(chunk.buffers()[2], f"S{ID_LENGTH}", count=len(chunk), offset=int(places[0])))
    return np.concatenate(parts)


def list_segments(bank: Bank, kind: str) -> dict[str, list[FileEntry]]:
    """Returns the files of a parted kind by the segment's folder, in the order of the folders."""
    segments: dict[str, list[FileEntry]] = {}
    for file in bank.manifest.list_files(kind):
        segments.setdefault(file.path.rpartition("/")[0], []).append(file)
    return segments


def _locate_index(bank: Bank, file: FileEntry) -> Path:
    """Returns the path of an index; a small one is checked as a whole, of a large one only the size.

    Raises:
        BankFormatError: the index is missing or damaged.
    """
    if file.size_bytes <= HASHED_BYTES or bank.store.get_size(file.path) != file.size_bytes:
        return bank.check(file)
    return bank.locate(file)


class SegmentIndex:
    """The index of one segment, searched for its live references.

    Attributes:
        num_live: live references in it.
    """

    def __init__(self, path: Path, ref_ids: IdArray, live: MaskArray, dimension: int) -> None:
        """Maps an index into memory.

        Args:
            path: the index.
            ref_ids: the id of each row, ascending.
            live: whether it is live.
            dimension: size of the vectors.

        Raises:
            BankFormatError: the index is damaged, or does not fit.
        """
        import faiss

        try:
            self._index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise BankFormatError(f"index {path} is damaged; build the bank again") from error
        if self._index.ntotal != len(ref_ids) or self._index.d != dimension:
            raise BankFormatError(
                f"index {path} has {self._index.ntotal} vectors of {self._index.d}, the table of embeddings "
                f"{len(ref_ids)} of {dimension}; build the bank again"
            )
        self._is_exact = isinstance(self._index, faiss.IndexFlat)
        is_known = self._is_exact or isinstance(self._index, faiss.IndexIVF)
        if not is_known or self._index.metric_type != faiss.METRIC_INNER_PRODUCT:
            found = f"{type(self._index).__name__}, metric {self._index.metric_type}"
            raise BankFormatError(f"index {path} is of a kind that no bank has ({found}); build the bank again")
        self._ref_ids = ref_ids
        self.num_live = int(live.sum())
        self._live_rows: LongArray | None = None
        self._selector: Any = None
        if self.num_live < len(live):
            self._live_rows = np.flatnonzero(live)
            self._bitmap = np.packbits(live, bitorder="little")
            self._selector = faiss.IDSelectorBitmap(len(self._bitmap), faiss.swig_ptr(self._bitmap))

    def get_ids(self, places: LongArray) -> IdArray:
        """Returns the ids of live references by their places among the live ones of this segment."""
        rows = places if self._live_rows is None else self._live_rows[places]
        found: IdArray = self._ref_ids[rows]
        return found

    def search(self, queries: FloatArray, num_hits: int) -> tuple[LongArray, FloatArray]:
        """Returns the nearest live references to unit vectors, in no order, and their similarities.

        Those of an exact index are added up in float64, so that they do not depend on the segment or on the batch.

        Args:
            queries: float32 (queries, dimension).
            num_hits: hits wanted.

        Returns:
            Places among the live references, (queries, any), at least ``num_hits`` if there are as many, with all that
            tie with the last; and their similarities.
        """
        num_asked = min(num_hits + SPARE_HITS, self.num_live)
        while True:
            scores, rows = self._search_rows(queries, num_asked)
            last = scores.min(1)
            if self._is_exact:
                scores = self._measure(queries, rows)
            if num_asked == self.num_live or num_asked >= max(num_hits, MAX_TIED_HITS):
                break
            wanted = np.partition(scores, num_asked - num_hits, axis=1)[:, num_asked - num_hits]
            if (wanted > last + SCORE_ERROR).all():
                break
            num_asked = min(4 * num_asked, self.num_live)
        places = rows if self._live_rows is None else np.searchsorted(self._live_rows, rows)
        return places, scores

    def _search_rows(self, queries: FloatArray, num_hits: int) -> tuple[FloatArray, LongArray]:
        """Returns similarities and rows of live references, (queries, num_hits), no more than there are."""
        import faiss

        if self._is_exact:
            # Without a selector many queries at once are one product of matrices.
            chosen = None if self._selector is None else faiss.SearchParameters(sel=self._selector)  # type: ignore[call-arg]
            scores, rows = self._index.search(queries, num_hits, params=chosen)
            return scores, rows
        num_lists = self._index.nlist
        # Where few rows are live, the nearest live ones lie in lists further away.
        num_probes = min(num_lists, -(-self._index.nprobe * self._index.ntotal // self.num_live))
        while True:
            chosen = faiss.SearchParametersIVF(sel=self._selector, nprobe=num_probes)  # type: ignore[call-arg]
            scores, rows = self._index.search(queries, num_hits, params=chosen)
            if num_probes == num_lists or (rows >= 0).all():
                return scores, rows
            num_probes = min(num_lists, 4 * num_probes)

    def _measure(self, queries: FloatArray, rows: LongArray) -> FloatArray:
        vectors = self._index.reconstruct_batch(rows.ravel()).reshape(*rows.shape, -1)
        products = vectors.astype(np.float64) * queries.astype(np.float64)[:, None]
        similarities: FloatArray = products.sum(-1).astype(np.float32)
        return similarities


def _read_dimension(bank: Bank, file: FileEntry) -> int:
    with bank.open_table(file) as table:
        return int(table.schema_arrow.field("vector").type.list_size)


def check_embedder(url: str, embedder_id: str, embedder: Embedder) -> None:
    """Makes sure that a bank's references were embedded by the model at hand.

    Args:
        url: where the bank is.
        embedder_id: what embedded its references.
        embedder: the model at hand.

    Raises:
        WrongModelError: it is another one.
    """
    if embedder.embedder_id != embedder_id:
        raise WrongModelError(
            f"bank {url} was embedded by {embedder_id}, the embedder at hand is {embedder.embedder_id}; restore the "
            "embedding model it was built with, or build the bank again"
        )


class IndexSearch:
    """Searches the live references of one version of a bank by vectors; needs no embedding model.

    Attributes:
        dimension: size of the vectors; 0 in a bank without references.
    """

    def __init__(self, bank: Bank) -> None:
        """Opens the indexes of a bank.

        Raises:
            BankFormatError: an index is missing, damaged, or does not fit its table of embeddings.
        """
        embeddings = [file for files in list_segments(bank, "embeddings").values() for file in files]
        indexes = [file for files in list_segments(bank, "index").values() for file in files]
        folders = [[file.path.rpartition("/")[0] for file in files] for files in (embeddings, indexes)]
        if folders[0] != folders[1]:
            odd = sorted(set(folders[0]).symmetric_difference(folders[1]))
            raise BankFormatError(
                f"version {bank.manifest.version} of bank {bank.url} has an index or embeddings without the other in "
                f"{', '.join(odd)}; build the bank again"
            )
        columns = [read_part(bank, file, ["ref_id"])["ref_id"] for file in embeddings]
        chunks = [chunk for column in columns for chunk in column.chunks]
        # One look-up for all segments, since it begins with a table of all dropped ids.
        is_dropped = pc.is_in(pa.chunked_array(chunks, pa.string()), value_set=bank.read_dropped_ids()).to_numpy()
        ends = np.cumsum([len(column) for column in columns])
        self._segments: list[SegmentIndex] = []
        self.dimension = _read_dimension(bank, embeddings[0]) if embeddings else 0
        for file, index, column, end in zip(embeddings, indexes, columns, ends, strict=True):
            live = ~is_dropped[end - len(column) : end]
            ref_ids = pack_ids(column, f"{bank.url}/{file.path}")
            segment = SegmentIndex(_locate_index(bank, index), ref_ids, live, self.dimension)
            if segment.num_live:
                self._segments.append(segment)
        sizes = [segment.num_live for segment in self._segments]
        self._starts: list[int] = np.cumsum([0, *sizes]).tolist()

    @property
    def num_references(self) -> int:
        """Live references that can be found."""
        return self._starts[-1]

    def get_ref_id(self, row: int) -> str:
        """Returns the id of a row, 0 up to the number of live references, as :meth:`search_rows` numbers them."""
        if not 0 <= row < self.num_references:
            raise IndexError(f"row {row} of {self.num_references}")
        segment = bisect.bisect_right(self._starts, row) - 1
        return str(self._segments[segment].get_ids(np.array([row - self._starts[segment]]))[0].decode())

    def search_vectors(self, queries: FloatArray, num_hits: int) -> tuple[LongArray, FloatArray]:
        """Returns the nearest live references to unit vectors.

        Rows count the live references of all segments, one segment after the other. Of equally near references the
        first by id are taken.

        Args:
            queries: float32 (queries, dimension).
            num_hits: hits wanted.

        Returns:
            Rows (queries, num_hits), best first, -1 where there are too few, and their similarities, -inf there.

        Raises:
            InputError: ``num_hits`` is below 1.
        """
        if num_hits < 1:
            raise InputError(f"asked for {num_hits} hits; ask for at least 1")
        shape = (len(queries), num_hits)
        rows: list[LongArray] = [np.full(shape, -1, np.int64)]
        scores: list[FloatArray] = [np.full(shape, -np.inf, np.float32)]
        ref_ids: list[IdArray] = [np.full(shape, b"", f"S{ID_LENGTH}")]
        for segment, start in zip(self._segments, self._starts[:-1] if len(queries) else [], strict=False):
            places, similarities = segment.search(queries, num_hits)
            rows.append(places + start)
            scores.append(similarities)
            ref_ids.append(segment.get_ids(places))
        all_scores = np.concatenate(scores, axis=1)
        order = np.lexsort((np.concatenate(ref_ids, axis=1), -all_scores), axis=1)[:, :num_hits]
        found: LongArray = np.take_along_axis(np.concatenate(rows, axis=1), order, axis=1)
        return found, np.take_along_axis(all_scores, order, axis=1)

    def find(self, queries: FloatArray, num_hits: int) -> list[list[Hit]]:
        """Returns the best references for each unit vector, best first; see :meth:`search_vectors`."""
        rows, similarities = self.search_vectors(queries, num_hits)
        return [
            [
                Hit(ref_id=self.get_ref_id(int(row)), score=float(score))
                for row, score in zip(row_of, score_of, strict=True)
                if row >= 0
            ]
            for row_of, score_of in zip(rows, similarities, strict=True)
        ]


class Retriever(IndexSearch):
    """Searches the live references of one version of a bank by texts."""

    def __init__(self, bank: Bank, embedder: Embedder) -> None:
        """Opens the indexes of a bank for the model that embedded its references.

        Raises:
            WrongModelError: the bank's references were embedded by another model.
            BankFormatError: an index is missing, damaged, or does not fit its table of embeddings.
        """
        check_embedder(bank.url, bank.manifest.embedder_id, embedder)
        super().__init__(bank)
        self._embedder = embedder

    def search_rows(self, texts: Sequence[str], num_hits: int) -> tuple[LongArray, FloatArray]:
        """Returns rows (texts, num_hits) and similarities for texts, as :meth:`search_vectors` does for vectors.

        Raises:
            InputError: ``num_hits`` is below 1.
        """
        return self.search_vectors(self._embedder.embed(texts), num_hits)

    def search(self, texts: Sequence[str], num_hits: int) -> list[list[Hit]]:
        """Returns the best references for each text, best first."""
        return self.find(self._embedder.embed(texts), num_hits)
