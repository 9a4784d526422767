"""A model ready to be measured in one way of knowing: with memories, with references as text, or by itself.

    checkpoint, bank -> search with the paper's filter -> scorer of log-likelihoods, generator

What measures it stands in the modules beside this one.
"""

import dataclasses

from flows.generation import open_writer
from flows.searching import open_retriever
from model.checkpoint import Checkpoint, load_checkpoint
from model.fetching import BankMemories
from model.generating import Generator
from model.locating import SHIPPED_MODEL
from model.loglikelihoods import BATCH_SIZE, SequenceScorer
from model.overlap_filter import MAX_OVERLAP, FilteredSearch
from model.reading import MEMORIES_PER_CHUNK
from model.retrieving import Retriever
from model.text_references import ReferenceTexts
from model.text_scoring import TextScorer
from schemas.bank import Bank
from schemas.errors import InputError, WrongModelError

KNOWLEDGE = ("memory", "text", "none")
"""Memories; references in the prompt; or the ordinary model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How a model is measured.

    Attributes:
        knowledge: one of :data:`KNOWLEDGE`.
        num_memories: memories a chunk, or references in a prompt.
        max_overlap: the greatest overlap of a reference with a question at which it is read; 1 is off.
        batch_size: sequences that are read together.
        max_length: longest sequence in tokens; None for what the model has room for.
        with_bos: False leaves out the ``<s>`` that contexts begin with unless the tokenizer itself puts one.
    """

    knowledge: str = "memory"
    num_memories: int = MEMORIES_PER_CHUNK
    max_overlap: float = MAX_OVERLAP
    batch_size: int = BATCH_SIZE
    max_length: int | None = None
    with_bos: bool = True

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a value is out of its bounds.
        """
        if self.knowledge not in KNOWLEDGE:
            raise InputError(f"evaluation: knowledge is {self.knowledge!r}, must be one of {', '.join(KNOWLEDGE)}")
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"evaluation: max_length is {self.max_length}, must be at least 2")
        if not self.with_bos and self.knowledge != "none":
            raise InputError("contexts that read begin with <s>; leave out --no-bos, or give --no-memory")


class EvaluatedModel:
    """A model, what it reads, and how far it is.

    Attributes:
        name: the checkpoint, by name or folder.
        options: how it is measured.
        bank: what it reads; None for the ordinary model.
        generator: generates as it.
        search: finds what it reads; None for the ordinary model.
        scorer: scores as it.
        plain_scorer: counts what was read.
    """

    def __init__(
        self,
        model: str | None,
        bank: Bank | None,
        options: EvaluationOptions,
        *,
        device: str | None = None,
    ) -> None:
        """Loads a model, and a bank for it to read.

        Args:
            model: the checkpoint, by name or folder; None for the one that wrote the bank.
            bank: the bank; it may be None if the ordinary model is measured, which else computes as for this bank.
            options: how it is measured.
            device: where to compute; None for where the bank was written.

        Raises:
            InputError: a bank is needed but not given, or an option is out of its bounds.
            WrongModelError: the bank was written by another model.
        """
        self.name = model or (SHIPPED_MODEL if bank is None else str(bank.manifest.config["memory"]["model"]))
        self.options, self.bank = options, None if options.knowledge == "none" else bank
        self.search: FilteredSearch | None = None
        num_memories, batch_size = options.num_memories, options.batch_size
        if options.knowledge == "memory":
            if bank is None:
                raise InputError("give the bank to read with --bank, or --no-memory for the ordinary model")
            memories = BankMemories(bank, open_writer(bank, self.name, device=device))
            retriever = self._open_search(bank, options)
            self.plain_scorer = SequenceScorer(
                memories.checkpoint,
                self.search,
                memories,
                num_memories=num_memories,
                batch_size=batch_size,
            )
            self.scorer: SequenceScorer | TextScorer = self.plain_scorer
            self.generator = Generator(memories.checkpoint, retriever, memories)
            return
        memory = {"device": "cpu", "compute_dtype": "float32"} if bank is None else bank.manifest.config["memory"]
        checkpoint = load_checkpoint(self.name, device=device or memory["device"], dtype=memory["compute_dtype"])
        self.plain_scorer = SequenceScorer(checkpoint, batch_size=batch_size)
        self.scorer, self.generator = self.plain_scorer, Generator(checkpoint)
        if options.knowledge == "none":
            return
        if bank is None:
            raise InputError("give the bank to find references in with --bank, or --no-memory for the ordinary model")
        if checkpoint.tokenizer.tokenizer_id != bank.manifest.fingerprint.tokenizer:
            raise WrongModelError(f"bank {bank.url} was cut by another tokenizer than that of {self.name}")
        retriever = self._open_search(bank, options)
        texts = ReferenceTexts(checkpoint, bank, retriever)
        assert self.search is not None
        self.scorer = TextScorer(self.plain_scorer, self.search, texts, num_references=num_memories)
        self.generator = Generator(checkpoint, texts=texts)

    def _open_search(self, bank: Bank, options: EvaluationOptions) -> Retriever:
        retriever = open_retriever(bank)
        self.search = FilteredSearch(bank, retriever, max_overlap=options.max_overlap)
        return retriever

    @property
    def checkpoint(self) -> Checkpoint:
        """The model itself."""
        return self.plain_scorer.checkpoint

    @property
    def max_length(self) -> int:
        """The longest sequence that is read, in tokens.

        Raises:
            InputError: there is less room than was asked for.
        """
        room, wanted = self.scorer.max_tokens, self.options.max_length
        if wanted is not None and wanted > room:
            raise InputError(f"evaluation: max_length is {wanted}; the model has room for {room}")
        return room if wanted is None else wanted
