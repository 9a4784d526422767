"""The loss of texts that a model has not seen: with no memory, with random and with retrieved memories of a bank.

    corpus files -> a fixed sample of texts -> passages -> losses (:mod:`model.evaluating`)

What retrieved memories gain over none is their worth only as far as random ones gain less; so all are reported.
"""

import dataclasses
from typing import Any

import pyarrow.compute as pc

from flows.generation import open_writer
from flows.progress import show_stage
from flows.searching import open_retriever
from model.evaluating import CHUNKS_OF_A_PASSAGE, LossReport, cut_passages, measure_losses
from model.fetching import BankMemories
from pipelines.checking import check_corpus
from pipelines.formats import list_corpus_files
from pipelines.reading import read_records
from pipelines.records import ReadingConfig
from schemas.bank import Bank
from schemas.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Which texts are scored, and how.

    Attributes:
        reading: how the corpus is read.
        max_chars: characters of text that are scored at least, if the corpus has them.
        num_memories: memories that each chunk reads.
    """

    reading: ReadingConfig = dataclasses.field(default_factory=ReadingConfig)
    max_chars: int = 100_000
    num_memories: int = 5

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: fewer than one.
        """
        for name in ("max_chars", "num_memories"):
            if getattr(self, name) < 1:
                raise InputError(f"evaluation: {name} is {getattr(self, name)}, must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossRow:
    """The loss of one way of reading, in nats a token, and what it differs from reading nothing."""

    way: str
    loss: float
    change: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(LossReport):
    """Losses, and what they were measured on.

    Attributes:
        model: the model that read.
        bank: URL of the bank.
        version: of the bank.
        num_documents: documents scored.
        num_in_bank: how many of them stand in the bank, whose memories then hold the very text that is predicted.
    """

    model: str
    bank: str
    version: int
    num_documents: int
    num_in_bank: int

    def list_rows(self) -> list[LossRow]:
        """Returns the losses as rows, beginning with no memory."""
        ways = {
            "no memory": self.none,
            "random memories": self.random,
            "retrieved memories": self.retrieved,
            "the ordinary model": self.plain,
        }
        return [LossRow(way=way, loss=round(loss, 5), change=round(loss - self.none, 5)) for way, loss in ways.items()]

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return dataclasses.asdict(self)


def choose_texts(corpus: list[str], config: EvaluationConfig) -> dict[str, str]:
    """Returns texts of a corpus by their content hash: the first by that hash, so the same whatever the files' order.

    Raises:
        CorpusError: the corpus cannot be read.
    """
    files = list_corpus_files(corpus)
    check_corpus(files, config.reading)
    chosen: dict[str, str] = {}
    num_read = 0
    with show_stage("texts", len(files), "files", lambda: num_read):
        for file in files:
            for batch in read_records(file, config.reading):
                kept = batch.filter(pc.is_null(batch["reason"]))
                chosen |= zip(kept["content_hash"].to_pylist(), kept["text"].to_pylist(), strict=True)
                if sum(map(len, chosen.values())) > 2 * config.max_chars:
                    chosen = _cut(chosen, config.max_chars)
            num_read += 1
    return _cut(chosen, config.max_chars)


def _cut(texts: dict[str, str], max_chars: int) -> dict[str, str]:
    """Returns texts in the order of their hashes, up to the one with which there are enough characters."""
    kept, num_chars = {}, 0
    for key in sorted(texts):
        if num_chars >= max_chars:
            break
        kept[key] = texts[key]
        num_chars += len(texts[key])
    return kept


def evaluate(bank: Bank, corpus: list[str], model: str | None, config: EvaluationConfig) -> Evaluation:
    """Scores texts in each way of reading.

    Args:
        bank: where memories come from.
        corpus: files and folders of texts.
        model: the model that reads; None for the one that wrote the bank.
        config: which texts.

    Raises:
        InputError: no text is long enough.
        WrongModelError: the model cannot read this bank.
        CorpusError: the corpus cannot be read.
    """
    texts = choose_texts(corpus, config)
    name = model or bank.manifest.config["memory"]["model"]
    with show_stage("models"):
        memories = BankMemories(bank, open_writer(bank, name))
        retriever = open_retriever(bank)
    passages = cut_passages(memories.checkpoint, list(texts.values()))
    if not passages:
        raise InputError(
            f"no text of {', '.join(corpus)} has {CHUNKS_OF_A_PASSAGE} chunks of 64 tokens, the least that can be "
            "scored; give longer texts"
        )
    num_scored = 0

    def count() -> None:
        nonlocal num_scored
        num_scored += 1

    with show_stage("score", len(passages), "passages", lambda: num_scored):
        report = measure_losses(
            memories.checkpoint,
            retriever,
            memories,
            list(texts.values()),
            num_memories=config.num_memories,
            scored=count,
        )
    known = bank.read_table("documents", ["content_hash"])["content_hash"]
    return Evaluation(
        **dataclasses.asdict(report),
        model=name,
        bank=bank.url,
        version=bank.manifest.version,
        num_documents=len(texts),
        num_in_bank=len(texts.keys() & set(known.to_pylist())),
    )
