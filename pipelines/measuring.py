"""Measures: what the filters know of a text, each a number.

    records -> counts (:mod:`pipelines.scanning`, :mod:`pipelines.repetition`) -> **measures** -> filters
    (:mod:`pipelines.filtering`)

All measures are one table, :data:`MEASURES`. Each depends on its text alone; what several of them count is counted once
a batch, and what none of them asks for is not counted. They are those of method section 3, of Rae et al. 2021 (Gopher,
arXiv 2112.11446, table A1) and of Raffel et al. 2020 (C4, arXiv 1910.10683, section 2.2). What a word is says
:mod:`pipelines.words`.
"""

import math
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.repetition import DUPLICATE_SIZES, TOP_SIZES, Counts, Floats, WordCounts, count_words
from pipelines.scanning import TextCounts, count_text
from pipelines.words import find_words

Mask = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
"""The English words of which Gopher asks for two."""


class _Batch:
    """Texts with their counts, each counted when first asked for."""

    def __init__(self, texts: pa.Array, max_words: int) -> None:
        """Takes strings without nulls, and the words in the longest n-gram that is asked for."""
        self.texts = texts
        self._max_words = max_words

    @cached_property
    def text(self) -> TextCounts:
        """Characters, lines, paragraphs."""
        return count_text(self.texts)

    @property
    def has_spaces(self) -> Mask:
        """True for a text with at least as many words between spaces as letters of scripts without spaces."""
        return np.asarray(self.text.spaced_words >= self.text.spaceless_words)

    @cached_property
    def words(self) -> WordCounts:
        """Words and n-grams."""
        if self._max_words < 2:
            return count_words(self.texts, np.ones(len(self.texts), np.int64), self._max_words)
        # About two letters make a word in scripts without spaces.
        return count_words(self.texts, np.where(self.has_spaces, 1, 2), self._max_words)


class Measure(NamedTuple):
    """One measure.

    Attributes:
        what: what it is, in words.
        compute: returns it for every text of a batch, float64 (N,) or an integer type.
        num_words: words in the n-grams it looks at, 1 for single words, 0 for none.
    """

    what: str
    compute: Callable[[_Batch], Counts | Floats]
    num_words: int = 0


def _divide(counts: Counts | Floats, totals: Counts, of_nothing: float = 0.0) -> Floats:
    """Returns counts / totals, and ``of_nothing`` where the total is 0."""
    shares: Floats = np.full(len(totals), of_nothing)
    np.divide(counts, totals, out=shares, where=totals > 0)
    return shares


def _count_stop_words(batch: _Batch) -> Floats:
    words = find_words(batch.texts)
    found = np.zeros(len(batch.texts))
    for hash_value in find_words(pa.array(STOP_WORDS)).hashes:
        places = np.flatnonzero(words.hashes == hash_value)
        found += np.diff(np.searchsorted(places, words.offsets)) > 0
    return found


def _measure_javascript(batch: _Batch) -> Floats:
    lines = pc.split_pattern(pc.ascii_lower(batch.texts), "\n")
    naming = pc.match_substring(pc.list_flatten(lines), "javascript").to_numpy(zero_copy_only=False)
    rows = pc.list_parent_indices(lines).to_numpy()[naming]
    return _divide(np.bincount(rows, minlength=len(batch.texts)), batch.text.lines)


def _count_substring(batch: _Batch, pattern: str) -> Floats:
    return np.asarray(pc.count_substring(pc.ascii_lower(batch.texts), pattern), np.float64)


def _make_top_measure(column: int, num_words: int) -> Measure:
    what = f"share of characters in the most frequent run of {num_words} words"
    return Measure(what, lambda batch: batch.words.top_shares[:, column], num_words)


def _make_duplicate_measure(column: int, num_words: int) -> Measure:
    what = f"share of characters in repeated runs of {num_words} words"
    return Measure(what, lambda batch: batch.words.duplicate_shares[:, column], num_words)


MEASURES: Mapping[str, Measure] = {
    "words": Measure("number of words", lambda batch: batch.words.words),
    "mean_word_chars": Measure(
        "mean length of words in characters",
        # Where most words are letters of their own, the others are mostly numbers and say nothing of the text.
        lambda batch: np.where(
            batch.has_spaces, _divide(batch.text.spaced_word_chars, batch.text.spaced_words, math.nan), math.nan
        ),
    ),
    "non_alphabetic_share": Measure(
        "share of characters that are neither letters nor white space",
        lambda batch: _divide(batch.text.characters - batch.text.alphabetic, batch.text.characters),
    ),
    "alphabetic_piece_share": Measure(
        "share of pieces between white space that have a letter",
        lambda batch: _divide(batch.text.alphabetic_pieces, batch.text.pieces),
    ),
    "distinct_word_share": Measure(
        "share of distinct words", lambda batch: _divide(batch.words.distinct, batch.words.words), 1
    ),
    "entropy_bits": Measure("entropy of the words in bits", lambda batch: batch.words.entropy_bits, 1),
    "hashes_per_word": Measure(
        "number of hash signs a word", lambda batch: _divide(batch.text.hashes, batch.words.words)
    ),
    "ellipses_per_word": Measure(
        "number of ellipses a word", lambda batch: _divide(batch.text.ellipses, batch.words.words)
    ),
    "bullet_line_share": Measure(
        "share of lines that begin with a bullet",
        lambda batch: _divide(batch.text.bullet_lines, batch.text.lines),
    ),
    "ellipsis_line_share": Measure(
        "share of lines that end in an ellipsis",
        lambda batch: _divide(batch.text.ellipsis_lines, batch.text.lines),
    ),
    "stop_words": Measure("number of different English stop words", _count_stop_words),
    "sentences": Measure("number of sentences", lambda batch: batch.text.sentences),
    "lines": Measure("number of lines", lambda batch: batch.text.lines),
    "lorem_ipsum": Measure(
        'number of times "lorem ipsum" occurs', lambda batch: _count_substring(batch, "lorem ipsum")
    ),
    "curly_brackets": Measure("number of opening curly brackets", lambda batch: _count_substring(batch, "{")),
    "javascript_line_share": Measure("share of lines that name JavaScript", _measure_javascript),
    "duplicate_line_share": Measure(
        "share of lines that repeat an earlier one",
        lambda batch: _divide(batch.text.duplicate_lines, batch.text.lines),
    ),
    "duplicate_line_char_share": Measure(
        "share of characters in lines that repeat an earlier one",
        lambda batch: _divide(batch.text.duplicate_line_chars, batch.text.line_chars),
    ),
    "duplicate_paragraph_share": Measure(
        "share of paragraphs that repeat an earlier one",
        lambda batch: _divide(batch.text.duplicate_paragraphs, batch.text.paragraphs),
    ),
    "duplicate_paragraph_char_share": Measure(
        "share of characters in paragraphs that repeat an earlier one",
        lambda batch: _divide(batch.text.duplicate_paragraph_chars, batch.text.line_chars),
    ),
    **{f"top_{n}gram_char_share": _make_top_measure(column, n) for column, n in enumerate(TOP_SIZES)},
    **{f"duplicate_{n}gram_char_share": _make_duplicate_measure(column, n) for column, n in enumerate(DUPLICATE_SIZES)},
}
"""All measures by name.

Characters are Unicode code points, those of lines and paragraphs without the white space around each line. The mean
length of words is that of runs of letters in scripts with spaces; for a text with more letters of other scripts than
such words it is not a number, which passes every rule. Every other measure of nothing is 0.
"""


def compute_measures(texts: pa.Array, names: Collection[str]) -> dict[str, Floats]:
    """Measures texts.

    Args:
        texts: N strings; null counts as blank.
        names: keys of :data:`MEASURES`.

    Returns:
        Measures (N,) by their names, in the order of the names.
    """
    batch = _Batch(pc.fill_null(texts, ""), max((MEASURES[name].num_words for name in names), default=0))
    return {name: MEASURES[name].compute(batch).astype(np.float64) for name in names}
