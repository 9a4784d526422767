"""The ways of knowing that the perplexity suite compares, ready to score.

Each is a search and a source of memories, or the references as text in the prompt; the model is the same.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from flows.searching import open_retriever
from model.baseline_searches import EmptySearch, RandomSearch, RememberedSearch
from model.coding import KeyValueCodec, load_codec
from model.contextual_writing import ContextualWriter
from model.evaluating import SEQUENCE_TOKENS
from model.fresh_memories import CodedMemories, FreshMemories, MemorySource, write_alone
from model.loglikelihoods import ScoredSequence, SequenceScorer, TokenScores
from model.overlap_filter import MAX_OVERLAP, FilteredSearch, Questions, QuestionSearch
from model.reading import CHUNK_TOKENS, MEMORIES_PER_CHUNK
from model.text_references import ReferenceTexts
from model.text_scoring import TextScorer
from model.writing import ReferenceWriter
from schemas.bank import Bank
from schemas.codec_names import NONE
from schemas.errors import InputError
from schemas.overlap import SHARED_RUN

WAYS = ("plain", "none", "random", "retrieved", "compressed", "all tokens", "in context", "text")
"""The ways of knowing.

plain: the ordinary model. none: the model as it reads memories, given none. random: as many references as are
retrieved, drawn at random. retrieved: exact memories of the references found. compressed: the same through a codec.
all tokens: memories that keep every token. in context: memories cut from whole documents. text: the references in the
prompt.
"""

SWEPT = ("random", "retrieved", "text")
"""The ways that are measured with several numbers of references."""

CODECS = ("turbo4", "turbo3")
"""What memories are compressed with beside the bank's own codec: 3.5 and 4.6 times smaller, and need no training."""

PASSAGES_AT_ONCE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class WayOptions:
    """What the ways read.

    Attributes:
        num_references: references of a chunk: the first is what all ways are compared with, the others are swept.
        ways: which of :data:`WAYS` are measured; ``none`` always is.
        codecs: what ``compressed`` goes through, each a way of its own; None for the bank's own and :data:`CODECS`.
        max_overlap: the greatest overlap of a reference with a passage at which it is read; 1 is off.
        max_prompt_tokens: the longest prompt of ``text``; None for the positions that the other ways take: those of
            memories and of a passage, which a model that was trained to read has seen.
        own_document: read references of the document that is scored too, where the bank holds it.
        shared_run: references that share so many consecutive tokens with a passage are not read; 0 is off.
    """

    num_references: tuple[int, ...] = (MEMORIES_PER_CHUNK, 1, 2, 3, 7)
    ways: tuple[str, ...] = WAYS
    codecs: tuple[str, ...] | None = None
    max_overlap: float = MAX_OVERLAP
    max_prompt_tokens: int | None = None
    own_document: bool = False
    shared_run: int = SHARED_RUN

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a value is out of its bounds.
        """
        unknown = [way for way in self.ways if way not in WAYS]
        if unknown:
            raise InputError(f"there is no way {unknown[0]!r}; give some of {', '.join(WAYS)}")
        if not self.num_references or min(self.num_references) < 1:
            raise InputError("evaluation: give numbers of references that are at least 1")
        if self.shared_run < 0:
            raise InputError(f"evaluation: shared_run is {self.shared_run}, must be at least 0, which is off")


class Scorer(Protocol):
    """What gives sequences their log-probabilities."""

    def score(self, sequences: Sequence[ScoredSequence]) -> list[TokenScores]:
        """Returns the scores of each sequence, in their order."""
        ...


class Contestants:
    """The ways of knowing, ready to score.

    Attributes:
        ways: their names, in order; those of codecs are ``compressed by NAME``.
        skipped: ways that cannot be measured, and why.
    """

    def __init__(
        self,
        bank: Bank,
        writer: ReferenceWriter,
        options: WayOptions,
        excluded: Mapping[Questions, Collection[str]] | None = None,
    ) -> None:
        """Makes what reads and what finds.

        Args:
            bank: the bank.
            writer: the model with the rule and codec of the bank.
            options: what is measured.
            excluded: for each passage references that are not read, see :class:`model.overlap_filter.FilteredSearch`.

        Raises:
            InputError: there is no such codec.
        """
        self._bank, self._writer, self._options = bank, writer, options
        self.skipped: dict[str, str] = {}
        most = max(options.num_references)
        retriever = open_retriever(bank)
        ref_ids = [retriever.get_ref_id(row) for row in range(retriever.num_references)]
        limits: dict[str, Any] = {"max_overlap": options.max_overlap, "shared_run": options.shared_run or None}
        self.filtered = FilteredSearch(bank, retriever, excluded=excluded, **limits)
        self._found = RememberedSearch(self.filtered, most)
        drawn = FilteredSearch(bank, RandomSearch(ref_ids), excluded=excluded, **limits)
        self._drawn = RememberedSearch(drawn, most)
        self._texts = ReferenceTexts(writer.checkpoint, bank, retriever)
        checkpoint, selection = writer.checkpoint, writer.selection
        whole = dataclasses.replace(selection, num_slots=checkpoint.max_reference_tokens, score="softmax", refit=False)
        exact = FreshMemories(lambda ids: write_alone(bank, checkpoint, selection, ids))
        stored = writer.layout.codec
        codecs = options.codecs or tuple(dict.fromkeys((*([] if stored == NONE else [stored]), *CODECS)))
        coded = {f"compressed by {name}": self._open_codec(name) for name in codecs}
        wanted = [way for way in WAYS if way in options.ways or way == "none"]
        self.ways = tuple(name for way in wanted for name in (coded if way == "compressed" else [way]))
        self._sources: dict[str, MemorySource] = {
            "none": exact,
            "random": exact,
            "retrieved": exact,
            **{name: CodedMemories(exact, codec) for name, codec in coded.items()},
            "all tokens": FreshMemories(lambda ids: write_alone(bank, checkpoint, whole, ids)),
        }
        if "in context" in options.ways:
            self._sources["in context"] = FreshMemories(ContextualWriter(bank, checkpoint, selection).write)

    def _open_codec(self, name: str) -> KeyValueCodec:
        layout = self._writer.layout
        if name == layout.codec:
            return self._writer.codec  # it may have been trained
        return load_codec(
            name,
            num_layers=layout.num_layers,
            num_kv_heads=layout.num_kv_heads,
            num_slots=layout.num_slots,
            head_dim=layout.head_dim,
            dtype=layout.dtype,
            device=self._writer.checkpoint.device,
        )

    def make_scorer(self, way: str, num_references: int) -> Scorer | None:
        """Returns what scores in a way, None where there is no room for so many references."""
        checkpoint = self._writer.checkpoint
        if way == "plain":
            return SequenceScorer(checkpoint, batch_size=PASSAGES_AT_ONCE)
        if way != "text":
            searches: dict[str, QuestionSearch] = {"none": EmptySearch(), "random": self._drawn}
            search = searches.get(way, self._found)
            return SequenceScorer(
                checkpoint,
                search,
                self._sources[way],
                num_memories=num_references,
                batch_size=PASSAGES_AT_ONCE,
            )
        plain = SequenceScorer(checkpoint, batch_size=PASSAGES_AT_ONCE)
        usual = min(checkpoint.context_start + SEQUENCE_TOKENS, plain.max_tokens)
        room = self._options.max_prompt_tokens or usual
        if room > plain.max_tokens:
            raise InputError(f"evaluation: prompts of {room} tokens; the model has room for {plain.max_tokens}")
        if self._texts.count_tokens(num_references) + 2 * CHUNK_TOKENS > room:
            self.skipped[f"text of {num_references}"] = f"prompts of {room} tokens have no room for them"
            return None
        return TextScorer(plain, self._found, self._texts, num_references=num_references, max_prompt_tokens=room)


def list_variants(ways: Sequence[str], numbers: Sequence[int]) -> list[tuple[str, int]]:
    """Returns what is measured: each way with the first number of references, the swept ones with all."""
    first, *others = dict.fromkeys(numbers)
    return [(way, first) for way in ways] + [(way, number) for way in SWEPT if way in ways for number in others]


def name_variant(way: str, num_references: int) -> str:
    """Returns the name of a way with a number of references, where it has one."""
    return way if way in ("plain", "none") else f"{way} of {num_references}"
