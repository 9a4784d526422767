"""One training sequence and the references its chunks read, with what makes training robust.

    stored sequence, candidates of each chunk -> **tokens, a reference or none for each chunk** -> batches

Retrieval is not always right, so training must not be either: a chunk's reference may be missing, a poorer one, or one
that has nothing to do with it. Copying is what reading a memory needs most, and a small model hardly learns it from
retrieved text alone: some sequences repeat a span of themselves, and some read damaged copies of their own text.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from schemas.errors import InputError
from schemas.overlap import exceeds_overlap
from schemas.protocols import IntArray, LongArray
from schemas.reference_tokens import ReferenceTokens
from schemas.sequences import CHUNK_TOKENS, count_chunks

STAGES = ("warmup", "continual")

MIN_REPEAT_TOKENS = 32
"""The shortest span that is written again; the longest is a third of the sequence."""

MAX_LEAD_TOKENS = 32
"""Tokens by which a copy of a chunk begins before it, at most."""

MIN_ECHO_TOKENS, MAX_ECHO_TOKENS = 64, 128
MIN_KEPT_SHARE, MAX_KEPT_SHARE = 0.5, 0.85
"""The part of a copy that stays as it was is drawn between these."""

MAX_DAMAGE_TOKENS = 8
"""The longest span that is replaced at once in a copy that is damaged here and there."""

NUM_TRIES = 8
"""Random references that are tried before a chunk is left without one, because each would give the sequence away."""

SHARES = (
    "repeat_share",
    "distractor_share",
    "dropout_share",
    "pick_share",
    "echo_share",
    "unread_share",
    "plain_share",
    "lag_share",
    "misled_share",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawingConfig:
    """How sequences are drawn. Shares are between 0 and 1.

    Attributes:
        stage: ``warmup`` has ordinary sequences only; in ``continual`` chunks read references.
        num_memories: references a chunk reads: its own and those of the chunks before it.
        begins_with_bos: the first token, which is no target, is replaced by ``<s>``, as every context begins.
        repeat_share: of the sequences, a span is written again further on.
        pick_share: of the chunks, one of the candidates is taken at random instead of the best.
        distractor_share: of the references, a random one stands in their place.
        dropout_share: of the references, none stands in their place.
        echo_share: of the sequences, chunks read damaged copies of their own text instead of candidates.
        unread_share: of the sequences, no memory is read.
        plain_share: of the steps, all sequences are those of the ordinary model, without prefix and memories.
        lag_share: of the sequences that read candidates, each chunk reads those of the chunk before as its own, as in
            generation, which cannot ask with what is still to be written.
        misled_share: of the sequences that read candidates, random references stand in the place of all: retrieval
            fails for whole texts, too, and not only here and there.
        shuffle: the memories of a chunk stand in a random order. All share the same positions, so that it changes
            nothing but rounding for a model that treats them as a set.
    """

    stage: str = "continual"
    num_memories: int = 5
    begins_with_bos: bool = True
    repeat_share: float = 0.0
    pick_share: float = 0.0
    distractor_share: float = 0.0
    dropout_share: float = 0.0
    echo_share: float = 0.0
    unread_share: float = 0.0
    plain_share: float = 0.0
    lag_share: float = 0.0
    misled_share: float = 0.0
    shuffle: bool = False

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: an unknown stage, a share that is not between 0 and 1, or no memory to read.
        """
        if self.stage not in STAGES:
            raise InputError(f"drawing: stage is {self.stage!r}, must be one of {', '.join(STAGES)}")
        if self.num_memories < 1:
            raise InputError(f"drawing: num_memories is {self.num_memories}, must be at least 1")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"drawing: {name} is {getattr(self, name)}, must be between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnSequence:
    """A sequence as it is trained on.

    Attributes:
        tokens: int32, one more than are read.
        references: the tokens of each chunk's reference; None for none.
    """

    tokens: IntArray
    references: list[IntArray | None]


def repeat_span(tokens: IntArray, generator: np.random.Generator) -> bool:
    """Writes a random span of a sequence again further on, in place; False if it is too short for that.

    The span has 32 tokens to a third of the sequence, and lies wholly before its copy.
    """
    num_tokens = len(tokens)
    if num_tokens // 3 < MIN_REPEAT_TOKENS:
        return False
    span = int(generator.integers(MIN_REPEAT_TOKENS, num_tokens // 3, endpoint=True))
    source = int(generator.integers(1, num_tokens - 2 * span, endpoint=True))
    target = int(generator.integers(source + span, num_tokens - span, endpoint=True))
    tokens[target : target + span] = tokens[source : source + span]
    return True


def make_echo(
    tokens: IntArray, chunk: int, donor: IntArray, special_ids: Sequence[int], generator: np.random.Generator
) -> IntArray | None:
    """Returns a damaged copy of the text of a chunk, as a reference that is of use but does not give it away.

    The copy begins up to 32 tokens before the chunk and has 64 to 128 tokens, fewer at the end of the sequence. Half of
    the copies are damaged here and there, in spans of 1 to 8 tokens, half in one place, so that the rest can be copied
    at length; at most 85 %, down to a half, stay as they were.

    Args:
        tokens: the sequence.
        chunk: the chunk.
        donor: a random reference, whose spans take the place of others.
        special_ids: tokens that no reference has, left out.
        generator: draws everything.

    Returns:
        The tokens; None if too few are left to be worth reading.
    """
    start = max(1, chunk * CHUNK_TOKENS - int(generator.integers(0, MAX_LEAD_TOKENS, endpoint=True)))
    size = int(generator.integers(MIN_ECHO_TOKENS, MAX_ECHO_TOKENS, endpoint=True))
    copied = tokens[start : start + size]
    copied = copied[~np.isin(copied, special_ids)]
    if len(copied) < 2 * MAX_DAMAGE_TOKENS:
        return None
    num_kept = int(len(copied) * generator.uniform(MIN_KEPT_SHARE, MAX_KEPT_SHARE))
    is_kept = np.ones(len(copied), dtype=np.bool_)
    in_one_place = generator.random() < 0.5
    while (num_extra := int(is_kept.sum()) - num_kept) > 0:
        longest = num_extra if in_one_place else int(generator.integers(1, MAX_DAMAGE_TOKENS, endpoint=True))
        span = min(longest, len(donor))
        target = int(generator.integers(0, len(copied) - span, endpoint=True))
        source = int(generator.integers(0, len(donor) - span, endpoint=True))
        copied[target : target + span] = donor[source : source + span]
        is_kept[target : target + span] = False
    return copied


class SequenceDrawer:
    """Draws what chunks read, from stored candidates."""

    def __init__(
        self,
        config: DrawingConfig,
        references: ReferenceTokens | None,
        *,
        special_ids: Sequence[int],
        max_overlap: float,
    ) -> None:
        """Joins the settings with the references there are.

        Args:
            config: how to draw.
            references: all references of the dataset.
            special_ids: ``<s>`` and ``</s>``.
            max_overlap: the leak rule's bound.

        Raises:
            InputError: memories are to be read but there are no references.
        """
        if config.stage == "continual" and not references:
            raise InputError(
                "drawing: stage is 'continual' but the dataset has no references; prepare it with a bank: "
                "memory3 train prepare --bank BANK"
            )
        self._config, self._references = config, references
        self._special_ids, self._max_overlap = tuple(special_ids), max_overlap

    def draw(
        self, tokens: IntArray, candidates: Sequence[LongArray], generator: np.random.Generator, *, is_plain: bool
    ) -> DrawnSequence:
        """Draws a sequence.

        Args:
            tokens: as it is stored.
            candidates: the rows of the references that each chunk may read, best first.
            generator: draws everything.
            is_plain: True reads nothing.
        """
        config = self._config
        tokens = tokens.copy()
        if config.begins_with_bos:
            tokens[0] = self._special_ids[0]
        is_changed = generator.random() < config.repeat_share and repeat_span(tokens, generator)
        nothing: list[IntArray | None] = [None] * count_chunks(len(tokens))
        if is_plain or self._references is None or generator.random() < config.unread_share:
            return DrawnSequence(tokens=tokens, references=nothing)
        is_echo = generator.random() < config.echo_share
        # Without the share nothing is drawn for it: what other settings draw stays as it was before there was one.
        is_misled = not is_echo and config.misled_share > 0 and generator.random() < config.misled_share
        references: list[IntArray | None] = []
        for chunk in range(len(nothing)):
            if is_echo:
                found = self._echo(tokens, chunk, self._references, generator)
            else:
                found = self._choose(tokens, candidates[chunk], self._references, generator, is_changed=is_changed)
            if found is not None and (is_misled or generator.random() < config.distractor_share):
                found = self._distract(tokens, self._references, generator)
            if generator.random() < config.dropout_share:
                found = None
            references.append(found)
        if not is_echo and config.lag_share and generator.random() < config.lag_share:
            references = [None, *references[:-1]]
        return DrawnSequence(tokens=tokens, references=references)

    def _is_allowed(self, tokens: IntArray, reference: IntArray) -> bool:
        return not exceeds_overlap(tokens, reference, self._max_overlap)

    def _choose(
        self,
        tokens: IntArray,
        candidates: LongArray,
        references: ReferenceTokens,
        generator: np.random.Generator,
        *,
        is_changed: bool,
    ) -> IntArray | None:
        """Returns the best candidate, or a random one; the leak rule is checked again where the sequence changed."""
        if generator.random() < self._config.pick_share:
            candidates = generator.permutation(candidates)
        for row in candidates.tolist():
            reference = references.get_tokens(row)
            if not is_changed or self._is_allowed(tokens, reference):
                return reference
        return None

    def _distract(
        self, tokens: IntArray, references: ReferenceTokens, generator: np.random.Generator
    ) -> IntArray | None:
        for _ in range(NUM_TRIES):
            reference = references.get_tokens(int(generator.integers(len(references))))
            if self._is_allowed(tokens, reference):
                return reference
        return None

    def _echo(
        self, tokens: IntArray, chunk: int, references: ReferenceTokens, generator: np.random.Generator
    ) -> IntArray | None:
        donor = references.get_tokens(int(generator.integers(len(references))))
        echo = make_echo(tokens, chunk, donor, self._special_ids, generator)
        return echo if echo is not None and self._is_allowed(tokens, echo) else None
