"""References that give away a text a model is to be tested on, found by the paper's measure of overlap.

    references -> **references that overlap a test text too much** -> near-duplicate removal of the rest

Which test texts a reference is compared with is an exact filter: a match of more than a share s of a reference's m
tokens must use one of its ``m - floor(s m)`` rarest, so only texts that have one of these are looked at.
"""

import dataclasses
import math
from collections.abc import Sequence

import numba
import numpy as np
import pyarrow as pa

from schemas.errors import InputError
from schemas.overlap import find_longest_match
from schemas.protocols import IntArray, LongArray, TextTokenizer
from schemas.tables import CONTAMINATED


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecontaminationConfig:
    """Which texts a bank must not give away.

    Attributes:
        paths: files and folders of such texts, read like a corpus; none leaves every reference in.
        threshold: the overlap above which a reference is left out, at least 0 and below 1; 0.9 is the leak rule of the
            paper's training, 2/3 that of its evaluation.
    """

    paths: tuple[str, ...] = ()
    threshold: float = 0.9

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: the threshold is out of bounds.
        """
        if not 0 <= self.threshold < 1:
            raise InputError(f"decontamination: threshold is {self.threshold}, must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles:
    """The texts to look for, M of them, and where each token stands.

    Attributes:
        doc_ids: their ids.
        token_ids: their tokens one after the other, int32 (T,).
        offsets: text i has ``token_ids[offsets[i]:offsets[i + 1]]``, int64 (M+1,).
        vocabulary: the distinct tokens, ascending, int32 (V,).
        text_offsets: token v stands in ``text_rows[text_offsets[v]:text_offsets[v + 1]]``, int64 (V+1,).
        text_rows: rows of texts, int64.
    """

    doc_ids: tuple[str, ...]
    token_ids: IntArray
    offsets: LongArray
    vocabulary: IntArray
    text_offsets: LongArray
    text_rows: LongArray


def make_needles(doc_ids: Sequence[str], texts: pa.Array, tokenizer: TextTokenizer) -> Needles:
    """Tokenizes the texts to look for, and lists for each token the texts that have it."""
    encoded = tokenizer.encode_texts(texts)
    rows = np.repeat(np.arange(len(texts)), np.diff(encoded.offsets))
    pairs = np.unique(np.stack([encoded.token_ids.astype(np.int64), rows], axis=1), axis=0)
    vocabulary, starts = np.unique(pairs[:, 0], return_index=True)
    return Needles(
        doc_ids=tuple(doc_ids),
        token_ids=encoded.token_ids,
        offsets=encoded.offsets,
        vocabulary=vocabulary.astype(np.int32),
        text_offsets=np.append(starts, len(pairs)).astype(np.int64),
        text_rows=np.ascontiguousarray(pairs[:, 1]),
    )


def find_contaminated(references: pa.Table, needles: Needles, config: DecontaminationConfig) -> pa.Table:
    """Finds the references that overlap a text by more than the threshold.

    Args:
        references: with columns ``ref_id`` and ``token_ids``.
        needles: the texts.
        config: gives the threshold.

    Returns:
        A table of :data:`schemas.tables.CONTAMINATED` in the order of the references, with the text that overlaps most,
        the first of several.
    """
    lists = references["token_ids"].combine_chunks()
    offsets = np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy())]).astype(np.int64)
    lengths, matched = _find_best_texts(
        lists.flatten().to_numpy(),
        offsets,
        np.array([math.floor(config.threshold * size) + 1 for size in np.diff(offsets).tolist()], np.int64),
        needles.token_ids,
        needles.offsets,
        needles.vocabulary,
        needles.text_offsets,
        needles.text_rows,
    )
    found = np.flatnonzero(matched >= 0)
    columns = [
        references["ref_id"].take(pa.array(found)),
        pa.array(lengths[found] / np.diff(offsets)[found]),
        pa.array([needles.doc_ids[row] for row in matched[found].tolist()], pa.string()),
    ]
    return pa.table(columns, schema=CONTAMINATED)


@numba.njit(cache=True, nogil=True)
def _find_best_texts(
    token_ids: IntArray,
    offsets: LongArray,
    least: LongArray,
    needle_ids: IntArray,
    needle_offsets: LongArray,
    vocabulary: IntArray,
    text_offsets: LongArray,
    text_rows: LongArray,
) -> tuple[LongArray, LongArray]:
    """Returns for each reference its longest match of at least ``least`` tokens and the text of it, -1 if none."""
    num_references = len(offsets) - 1
    lengths = np.zeros(num_references, np.int64)
    matched = np.full(num_references, -1, np.int64)
    seen = np.full(len(needle_offsets) - 1, -1, np.int64)
    for row in range(num_references):
        reference = token_ids[offsets[row] : offsets[row + 1]]
        entries = np.full(len(reference), -1, np.int64)
        counts = np.zeros(len(reference), np.int64)
        for place in range(len(reference)):
            entry = np.searchsorted(vocabulary, reference[place])
            if entry < len(vocabulary) and vocabulary[entry] == reference[place]:
                entries[place] = entry
                counts[place] = text_offsets[entry + 1] - text_offsets[entry]
        rarest = np.argsort(counts, kind="mergesort")[: len(reference) - least[row] + 1]
        for place in rarest:
            if entries[place] < 0:
                continue
            for text in text_rows[text_offsets[entries[place]] : text_offsets[entries[place] + 1]]:
                if seen[text] == row:
                    continue
                seen[text] = row
                needle = needle_ids[needle_offsets[text] : needle_offsets[text + 1]]
                if len(needle) < max(least[row], lengths[row]):
                    continue
                length = find_longest_match(needle, reference)
                is_longer = length > lengths[row] or (length == lengths[row] and text < matched[row])
                if length >= least[row] and is_longer:
                    lengths[row] = length
                    matched[row] = text
    return lengths, matched
