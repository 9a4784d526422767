"""From cited chunks to the figures of ``memory3 eval attribution``: is the citation with most attention the true one?

The items are prompts, not chunks: those of a text, and the texts of a document, are not independent. Where the top
citation of a chunk is held against a random memory of the same chunk, what is taken is the mean over its memories,
which is what drawing one gives in the long run.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import rankdata

from flows.evaluating.measurements import Measurement, measure_by_item
from model.citing import CONFIRMED, Citation, CitedChunk
from schemas.protocols import FloatArray

TOP, NEAREST, LEAST, RANDOM = "top citation", "nearest memory", "least attended", "random memory"
"""Which memory of a chunk: of the most attention, of the greatest similarity, of the least attention, any."""

LARGEST, POSITIVE, TRUE, SUPPORT, CORRELATION = (
    "largest support",
    "positive support",
    "confirmed",
    "support",
    "rank correlation",
)
"""What is said of it. ``confirmed`` is both of the first two at once."""

LOOP_TOKENS = 4
"""Tokens in a row that are compared with what stands before."""

LEAST_NEW = 0.5
"""A chunk of which less is new is a loop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedChunk:
    """A chunk whose citations were checked.

    Attributes:
        item: what it is counted for.
        name: the text it is of.
        way: how the text came about.
        chunk: the chunk.
        share_new: the part of its tokens with the three before them that were not there before, prompt included.
    """

    item: str
    name: str
    way: str
    chunk: CitedChunk
    share_new: float

    @property
    def is_loop(self) -> bool:
        """Whether it says mostly what was said before."""
        return self.share_new < LEAST_NEW


def measure_new(before: Sequence[int], tokens: Sequence[int]) -> float:
    """Returns the share of the runs of four tokens that end in a chunk and stand nowhere before."""
    text = [*before, *tokens]
    seen = {tuple(text[end - LOOP_TOKENS : end]) for end in range(LOOP_TOKENS, len(before) + 1)}
    num_runs = num_new = 0
    for end in range(max(LOOP_TOKENS, len(before) + 1), len(text) + 1):
        run = tuple(text[end - LOOP_TOKENS : end])
        num_runs += 1
        num_new += run not in seen
        seen.add(run)
    return num_new / num_runs if num_runs else 1.0


def rate_memories(chunk: CitedChunk, name: str) -> FloatArray:
    """Returns one of the figures for each citation of a chunk, in their order."""
    supports = np.array([citation.support for citation in chunk.citations])
    if name == SUPPORT:
        return supports
    if name == POSITIVE:
        return np.asarray(supports > chunk.noise, dtype=np.float64)
    if name == LARGEST:
        best = np.asarray(supports == supports.max(), dtype=np.float64)
        return np.asarray(best / best.sum())
    return np.array([float(citation.verdict == CONFIRMED) for citation in chunk.citations])


def rate_chunk(chunk: CitedChunk, name: str, which: str) -> float:
    """Returns one of the figures for one of the memories of a chunk."""
    rated = rate_memories(chunk, name)
    if which == RANDOM:
        return float(rated.mean())
    places = {TOP: 0, LEAST: len(rated) - 1, NEAREST: _find_nearest(chunk.citations)}
    return float(rated[places[which]])


def get_support(chunk: CitedChunk, place: int) -> float:
    """Returns the support of the citation at a place in the order of attention."""
    return chunk.citations[place].support


def _find_nearest(citations: Sequence[Citation]) -> int:
    return max(range(len(citations)), key=lambda place: citations[place].score)


def correlate_ranks(chunk: CitedChunk) -> float | None:
    """Returns Spearman's correlation of attention and support in a chunk; None where all of one are equal."""
    ranks = [rankdata([getattr(citation, name) for citation in chunk.citations]) for name in ("attention", "support")]
    if any(len(set(of_one.tolist())) == 1 for of_one in ranks):
        return None
    return float(np.corrcoef(ranks)[0, 1])


def measure_chunks(
    name: str,
    way: str,
    chunks: Sequence[JudgedChunk],
    rate: Callable[[CitedChunk], float | None],
    *,
    group: str = "",
    unit: str = "share",
    better: str = "higher",
) -> Measurement:
    """Returns the mean of something over chunks, prompt by prompt; chunks of which it cannot be said are left out.

    Args:
        name: what it is.
        way: of what.
        chunks: at least one.
        rate: says it of a chunk.
        group: which part of the chunks these are.
        unit: of the figure.
        better: ``lower``, ``higher`` or empty.
    """
    values = [rate(judged.chunk) for judged in chunks]
    items = [judged.item for judged in chunks]
    return measure_by_item(name, way, items, values, group=group, unit=unit, better=better)
