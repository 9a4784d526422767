"""The exact near-duplicates of a set of texts, found in a slow and plain way, and how well a tool's removals fit them.

Shares no code with the project: the words follow the rule that :mod:`pipelines.words` documents, in a regular
expression; the shingles are hashed by BLAKE2b; every pair that can reach the threshold is compared exactly. What is
left out is left out by the prefix filter of exact set-similarity joins: two sets of similarity t share one of the
``n - ceil(t n) + 1`` rarest elements of each, so nothing is missed.
"""

import dataclasses
import functools
import hashlib
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Rows = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Sets = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]

NUM_WORDS = 5
"""Words in a shingle."""

THRESHOLD = (4, 5)
"""Jaccard similarity from which two texts are near-duplicates, as a fraction, so that nothing is rounded."""

SPACELESS_BLOCKS = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF), (0x3005, 0x3007),
    (0x3021, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA9E0, 0xA9FF), (0xAA60, 0xAADF),
    (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFF),
)  # fmt: skip
"""Code points of the scripts written without spaces; a letter in them is a word."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """How a tool's removals fit the truth.

    A true cluster is a connected component, of more than one text, of the graph of pairs at or above the threshold.

    Attributes:
        num_removed: texts the tool removed.
        num_removable: texts that can go while one of each true cluster stays.
        precision: share of the removed texts whose true cluster keeps at least one text: such a text is joined to a
            kept one by true near-duplicates. A removed text of no true cluster counts as wrong, and so does all of a
            cluster that was removed as a whole. 1 if nothing was removed.
        recall: of every true cluster the texts removed, but at most all but one, by ``num_removable``. 1 if nothing is
            removable.
    """

    num_removed: int
    num_removable: int
    precision: float
    recall: float


def _describe_ranges(has: Callable[[str], bool]) -> str:
    """Returns the characters of a kind as the inside of a character class."""
    points = [point for point in range(sys.maxunicode + 1) if has(chr(point))]
    gaps = [place for place in range(1, len(points)) if points[place] != points[place - 1] + 1]
    starts, ends = [0, *gaps], [*gaps, len(points)]
    return "".join(f"\\U{points[start]:08x}-\\U{points[end - 1]:08x}" for start, end in zip(starts, ends, strict=True))


@functools.cache
def _compile_words() -> re.Pattern[str]:
    def is_alone(char: str) -> bool:
        category = unicodedata.category(char)
        return (category[0] == "L" or category == "Nl") and any(
            first <= ord(char) <= last for first, last in SPACELESS_BLOCKS
        )

    def is_letter(char: str) -> bool:
        return char == "_" or (unicodedata.category(char)[0] in "LN" and not is_alone(char))

    def is_mark(char: str) -> bool:
        return unicodedata.category(char)[0] == "M" or char in "\u200c\u200d"

    letters, marks, alone = map(_describe_ranges, (is_letter, is_mark, is_alone))
    return re.compile(f"[{letters}][{letters}{marks}]*|[{alone}][{marks}]*")


def list_words(text: str) -> list[str]:
    """Returns the words of a text; the non-space characters of a text that has none."""
    folded = unicodedata.normalize("NFC", text.casefold())
    return _compile_words().findall(folded) or [char for char in folded if not char.isspace()]


def make_shingles(text: str) -> Sets:
    """Returns the set of a text's shingles as ascending 64-bit hashes; a text of few words is one shingle."""
    words = list_words(text)
    if len(words) > NUM_WORDS:
        shingles: Iterable[str] = map(" ".join, zip(*(words[place:] for place in range(NUM_WORDS)), strict=False))
    else:
        shingles = [" ".join(words)] if words else []
    digests = b"".join([hashlib.blake2b(shingle.encode("utf-8", "surrogatepass"), digest_size=8).digest()
                        for shingle in set(shingles)])  # fmt: skip
    return np.sort(np.frombuffer(digests, "<u8"))


def find_true_pairs(texts: Sequence[str]) -> Rows:
    """Finds the near-duplicates among texts.

    Returns:
        Pairs of rows (P, 2). Texts of equal shingles are joined to the first of them only, and so is what resembles
        them: the pairs have the connected components of all true pairs.
    """
    sets = [make_shingles(text) for text in texts]
    first_of: dict[bytes, int] = {}
    firsts = [first_of.setdefault(shingles.tobytes(), row) if len(shingles) else row
              for row, shingles in enumerate(sets)]  # fmt: skip
    equal = [(first, row) for row, first in enumerate(firsts) if first != row]
    rows = [row for row, first in enumerate(firsts) if first == row and len(sets[row])]
    pairs = [
        (int(left), int(right)) for left, right in _list_candidates(sets, rows) if _is_near(sets[left], sets[right])
    ]
    return np.array(equal + pairs, np.int64).reshape(-1, 2)


def _is_near(left: Sets, right: Sets) -> bool:
    shared = np.intersect1d(left, right, assume_unique=True).size
    numerator, denominator = THRESHOLD
    return bool(shared * denominator >= numerator * (left.size + right.size - shared))


def _list_candidates(sets: Sequence[Sets], rows: Sequence[int]) -> Rows:
    """Returns the pairs of rows that share an element of their prefixes and are of similar size (P, 2)."""
    numerator, denominator = THRESHOLD
    if not rows:
        return np.empty((0, 2), np.int64)
    elements, places, counts = np.unique(
        np.concatenate([sets[row] for row in rows]), return_inverse=True, return_counts=True
    )
    # Rarest first: the order in which prefixes share least.
    ranks = np.empty(len(elements), np.int64)
    ranks[np.argsort(counts, kind="stable")] = np.arange(len(elements))
    prefixes, owners, start = [], [], 0
    for row in rows:
        size = sets[row].size
        ordered = np.sort(ranks[places[start : start + size]])
        start += size
        prefix = ordered[: size - math.ceil(numerator * size / denominator) + 1]
        prefixes.append(prefix)
        owners.append(np.full(len(prefix), row, np.int64))
    tokens, owner = np.concatenate(prefixes), np.concatenate(owners)
    order = np.lexsort((owner, tokens))
    tokens, owner = tokens[order], owner[order]
    sizes = np.array([shingles.size for shingles in sets])
    codes = np.empty(0, np.int64)
    for distance in range(1, len(tokens)):
        equal = np.flatnonzero(tokens[distance:] == tokens[:-distance])
        if not len(equal):
            break
        left, right = owner[equal], owner[equal + distance]
        smaller, larger = np.minimum(sizes[left], sizes[right]), np.maximum(sizes[left], sizes[right])
        similar = smaller * denominator >= numerator * larger
        codes = np.union1d(codes, left[similar] * len(sets) + right[similar])
    return np.stack(np.divmod(codes, len(sets)), axis=1)


def score_removals(pairs: Rows, num_texts: int, removed: Iterable[int]) -> Quality:
    """Compares removed texts with the truth.

    Args:
        pairs: the true pairs (P, 2), see :func:`find_true_pairs`.
        num_texts: how many texts there are.
        removed: rows of the removed texts, each once.
    """
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(num_texts, num_texts))
    labels = connected_components(graph, directed=False)[1]
    sizes = np.bincount(labels, minlength=1)
    gone = np.bincount(labels[np.array(list(removed), np.int64)], minlength=len(sizes))
    num_removed, num_removable = int(gone.sum()), int((sizes - 1).sum())
    right = int(gone[(sizes > 1) & (gone < sizes)].sum())
    found = int(np.minimum(gone, sizes - 1).sum())
    return Quality(
        num_removed=num_removed,
        num_removable=num_removable,
        precision=right / num_removed if num_removed else 1.0,
        recall=found / num_removable if num_removable else 1.0,
    )
