"""``memory3 bench read``: what reading memories costs a model that generates, against no memory and against text.

The worst case is that of the paper: every memory is read from the drive, by nobody before, with no cache in RAM and
nothing read ahead. The usual case retrieves, caches and reads ahead as ``memory3 generate`` does.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from flows.bench_encoding import list_references
from flows.benching import BenchReport, BenchRow, describe_machine, profile_operations, time_in_turn
from flows.generation import open_writer
from flows.searching import open_retriever
from model.fetching import BankMemories
from model.generating import PREFETCH_TOKENS, GenerationConfig, Generator
from model.retrieving import Hit, Retriever
from model.text_references import ReferenceTexts
from model.writing import Memories
from schemas.bank import Bank
from schemas.errors import InputError

AS_TEXT = "5 references as text"

NUM_PROMPT_REFERENCES = 2000
"""References of the bank whose text prompts are cut from."""

FIRST_TOKEN_ROUNDS = 3
"""Times that the rounds are repeated for the first token, which is soon there."""

PROFILED_TOKENS = 16
"""Tokens generated under the profiler, which notes every operation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingBench:
    """What to measure.

    Attributes:
        batch_sizes: sequences generated together.
        num_prompt_tokens: tokens of each prompt.
        num_new_tokens: tokens generated for each.
        num_long_tokens: tokens of the prompt whose first token is waited for.
        num_rounds: rounds, of which the best counts.
        with_text: measure references as text too.
    """

    batch_sizes: tuple[int, ...] = (8, 32)
    num_prompt_tokens: int = 128
    num_new_tokens: int = 128
    num_long_tokens: int = 512
    num_rounds: int = 2
    with_text: bool = True


class UniqueHits:
    """A real search whose hits are exchanged for references that nobody has asked for: no two queries share one.

    Attributes:
        seconds: spent searching.
        num_repeated: hits for which a small bank had no reference left that was new.
    """

    def __init__(self, retriever: Retriever) -> None:
        """Begins with the first reference."""
        self._retriever = retriever
        self._order = np.random.default_rng(0).permutation(retriever.num_references)
        self._next = 0
        self.seconds = 0.0
        self.num_repeated = 0

    def begin(self) -> None:
        """Makes all references new again, as the drive does that forgets them."""
        self._next, self.seconds = 0, 0.0

    def search(self, texts: Sequence[str], num_hits: int) -> list[list[Hit]]:
        """See :meth:`model.retrieving.Retriever.search`."""
        started = time.perf_counter()
        found = self._retriever.search(texts, num_hits)
        exchanged = [[Hit(ref_id=self._take(), score=hit.score) for hit in hits] for hits in found]
        self.seconds += time.perf_counter() - started
        return exchanged

    def _take(self) -> str:
        self.num_repeated += self._next >= len(self._order)
        row = int(self._order[self._next % len(self._order)])
        self._next += 1
        return self._retriever.get_ref_id(row)


class TimedMemories(BankMemories):
    """Memories of a bank, with the seconds that fetching them took."""

    seconds = 0.0

    def fetch(self, ref_ids: Sequence[str]) -> Memories:
        """See :meth:`model.fetching.BankMemories.fetch`."""
        started = time.perf_counter()
        memories = super().fetch(ref_ids)
        self.seconds += time.perf_counter() - started
        return memories


def forget_pages(bank: Bank) -> None:
    """Asks the system to forget what it has kept in RAM of the payload shards, so that they are read from the drive."""
    for file in bank.manifest.list_files("shard"):
        path = Path(bank.url) / file.path
        if path.is_file():
            with path.open("rb") as shard:
                os.posix_fadvise(shard.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cut_prompts(bank: Bank, bos: Sequence[int], num_tokens: int) -> Iterator[list[int]]:
    """Yields prompts of so many tokens, real text of the bank's references, without end.

    Raises:
        InputError: the bank has no references.
    """
    ids = np.concatenate(list_references(bank, NUM_PROMPT_REFERENCES))
    size = num_tokens - len(bos)
    starts = np.random.default_rng(1).integers(0, max(1, len(ids) - size), 10_000)
    while True:
        for start in starts:
            yield [*bos, *np.resize(ids[start : start + size], size).tolist()]


class _Contestants:
    """The ways of generating that are compared, on prompts that are new in every round."""

    def __init__(self, bank: Bank, model: str, wanted: ReadingBench, device: str | None) -> None:
        self.bank, self.wanted = bank, wanted
        self.writer = open_writer(bank, model, device=device)
        self.checkpoint = self.writer.checkpoint
        self.retriever = open_retriever(bank)
        self.unique = UniqueHits(self.retriever)
        self.cold = TimedMemories(bank, self.writer, cache_bytes=0)
        self.usual = BankMemories(bank, self.writer)
        self.shares: list[tuple[float, float, float]] = []
        self.contexts: list[list[int]] = []
        self._prompts: dict[int, Iterator[list[int]]] = {}

    def draw(self, batch_size: int, num_tokens: int) -> None:
        """Takes new prompts for the next round."""
        if num_tokens not in self._prompts:
            self._prompts[num_tokens] = cut_prompts(self.bank, self.checkpoint.bos_token_ids, num_tokens)
        self.contexts = [next(self._prompts[num_tokens]) for _ in range(batch_size)]

    def configure(self, num_new_tokens: int, prefetch_tokens: int = PREFETCH_TOKENS) -> GenerationConfig:
        return GenerationConfig(max_new_tokens=num_new_tokens, prefetch_tokens=prefetch_tokens, stop_at_end=False)

    def run_worst(self, num_new_tokens: int) -> None:
        """Every memory from the drive when it is wanted, and none twice."""
        forget_pages(self.bank)
        self.unique.begin()
        self.cold.seconds = 0.0
        started = time.perf_counter()
        generator = Generator(self.checkpoint, self.unique, self.cold)
        generator.generate_tokens(self.contexts, self.configure(num_new_tokens, prefetch_tokens=0))
        self.shares.append((self.unique.seconds, self.cold.seconds, time.perf_counter() - started))

    def run_none(self, num_new_tokens: int) -> None:
        """The ordinary model."""
        Generator(self.checkpoint).generate_tokens(self.contexts, self.configure(num_new_tokens))

    def run_usual(self, num_new_tokens: int) -> None:
        """With the cache, reading ahead."""
        generator = Generator(self.checkpoint, self.retriever, self.usual)
        generator.generate_tokens(self.contexts, self.configure(num_new_tokens))

    def run_text(self, num_new_tokens: int) -> None:
        """With five references in each prompt."""
        texts = ReferenceTexts(self.checkpoint, self.bank, self.retriever)
        Generator(self.checkpoint, texts=texts).generate_tokens(self.contexts, self.configure(num_new_tokens))

    def time(self, batch_size: int, num_tokens: int, num_new_tokens: int, names: Sequence[str]) -> dict[str, float]:
        """Returns the best seconds of some of them."""
        runs = {"worst": self.run_worst, "none": self.run_none, "usual": self.run_usual, "text": self.run_text}
        self.shares = []
        works = {name: functools.partial(runs[name], num_new_tokens) for name in names}
        return time_in_turn(works, self.wanted.num_rounds, prepare=lambda: self.draw(batch_size, num_tokens))


def bench_reading(bank: Bank, model: str, wanted: ReadingBench, *, device: str | None = None) -> BenchReport:
    """Measures generation with memory, without, and with references as text, and the wait for the first token.

    Args:
        bank: the bank to read.
        model: the model that wrote it.
        wanted: what to measure.
        device: where to compute; None for where the bank was written.

    Raises:
        InputError: the model has no room for so many tokens, or the bank has no references.
        WrongModelError: the bank was written by another model.
    """
    contestants = _Contestants(bank, model, wanted, device)
    checkpoint = contestants.checkpoint
    room = int(checkpoint.config.max_position_embeddings) - checkpoint.context_start
    if wanted.num_long_tokens + 1 > room or wanted.num_prompt_tokens + wanted.num_new_tokens > room:
        raise InputError(
            f"{model} has room for {room} tokens, {max(wanted.num_long_tokens + 1, wanted.num_prompt_tokens)} and "
            f"{wanted.num_new_tokens} are asked for; give smaller numbers or another model"
        )
    contestants.draw(1, wanted.num_prompt_tokens)
    for warm_up in (contestants.run_none, contestants.run_worst, contestants.run_text):
        warm_up(2)
    rows: list[BenchRow] = []
    for batch_size in wanted.batch_sizes:
        rows += _bench_batch(contestants, batch_size)
    rows += _bench_first_token(contestants)
    rows += _profile_reading(contestants)
    parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters()) / 1e6
    title = f"reading: {Path(model).name}, {parameters:.0f}M parameters, {str(checkpoint.dtype).removeprefix('torch.')}"
    return BenchReport(title=title, machine=describe_machine(str(checkpoint.device)), rows=rows)


def _bench_batch(contestants: _Contestants, batch_size: int) -> list[BenchRow]:
    wanted = contestants.wanted
    names = ["worst", "none", "usual", *(["text"] if wanted.with_text else [])]
    seconds = contestants.time(batch_size, wanted.num_prompt_tokens, wanted.num_new_tokens, names)
    rates = {name: batch_size * wanted.num_new_tokens / value for name, value in seconds.items()}
    searching, fetching, whole = min(contestants.shares, key=lambda share: share[2])
    note = f"search {searching / whole:.1%}, reading from the drive {fetching / whole:.1%}"
    if contestants.unique.num_repeated:
        note += f"; {contestants.unique.num_repeated} references read again: the bank is too small"
    counted = contestants.usual.statistics
    what = f"batch {batch_size}, {wanted.num_prompt_tokens} in + {wanted.num_new_tokens} out"
    rows = [
        BenchRow(name=f"no memory, {what}", value=rates["none"], unit="tokens/s"),
        _compare("with memory, worst case", rates, "worst", "none", note),
        _compare(
            "with memory, usual case", rates, "usual", "none",
            f"of {counted.num_cached + counted.num_read:,} memories {counted.num_read_ahead:,} read ahead, "
            f"{counted.num_read:,} waited for",
        ),
    ]  # fmt: skip
    if wanted.with_text:
        rows += [
            _compare(AS_TEXT, rates, "text", "none", ""),
            _compare("with memory, worst case", rates, "worst", "text", ""),
        ]
    return rows


def _compare(title: str, rates: dict[str, float], name: str, against: str, note: str) -> BenchRow:
    other = {"none": "no memory", "text": AS_TEXT}[against]
    ratio = rates[name] / rates[against]
    return BenchRow(name=title, value=rates[name], unit="tokens/s", ratio=ratio, against=other, note=note)


def _bench_first_token(contestants: _Contestants) -> list[BenchRow]:
    num_tokens = contestants.wanted.num_long_tokens
    best: dict[str, float] = {}
    for _ in range(FIRST_TOKEN_ROUNDS):
        found = contestants.time(1, num_tokens, 1, ("worst", "none"))
        best = {name: 1000 * min(value, best.get(name, 1e9) / 1000) for name, value in found.items()}
    return [
        BenchRow(name=f"first token, {num_tokens} in, no memory", value=best["none"], unit="ms"),
        BenchRow(
            name=f"first token, {num_tokens} in, worst case",
            value=best["worst"],
            unit="ms",
            ratio=best["none"] / best["worst"],
            against="no memory",
            note=f"takes {best['worst'] / best['none']:.2f} times as long",
        ),
    ]


def _profile_reading(contestants: _Contestants) -> list[BenchRow]:
    """Shares of the operations of a generation with memory, worst case, and of one without."""
    wanted = contestants.wanted
    contestants.draw(wanted.batch_sizes[0], wanted.num_prompt_tokens)
    num_new = min(PROFILED_TOKENS, wanted.num_new_tokens)
    rows = []
    for run, title in ((contestants.run_none, "no memory"), (contestants.run_worst, "with memory, worst case")):
        rows.append(BenchRow(name=f"profile, {title}", value=100.0, unit="%", note=f"{num_new} tokens out"))
        rows += profile_operations(functools.partial(run, num_new))
    return rows
