"""``memory3 bench read``: what reading memories costs a model that generates, against no memory and against text.

The worst case is that of the paper: every memory is read from the drive, by nobody before, with no cache in RAM and
nothing read ahead. The usual case retrieves, caches and reads ahead as ``memory3 generate`` does.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from flows.benching import BenchReport, BenchRow, describe_machine, profile_operations, time_in_turn
from flows.generation import open_writer
from flows.searching import open_retriever
from model.fetching import BankMemories
from model.generating import GenerationConfig, Generator
from model.retrieving import Hit, Retriever
from model.text_references import ReferenceTexts
from model.writing import Memories
from schemas.bank import Bank
from schemas.errors import InputError

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
    num_long_tokens: int = 1024
    num_rounds: int = 2
    with_text: bool = True


class UniqueHits:
    """A real search whose hits are exchanged for references that nobody has asked for: no two queries share one."""

    def __init__(self, retriever: Retriever) -> None:
        """Begins with the first reference."""
        self._retriever = retriever
        self._order = np.random.default_rng(0).permutation(retriever.num_references)
        self._next = 0
        self.seconds = 0.0

    def search(self, texts: Sequence[str], num_hits: int) -> list[list[Hit]]:
        """See :meth:`model.retrieving.Retriever.search`."""
        started = time.perf_counter()
        found = self._retriever.search(texts, num_hits)
        exchanged = [[Hit(ref_id=self._take(), score=hit.score) for hit in hits] for hits in found]
        self.seconds += time.perf_counter() - started
        return exchanged

    def _take(self) -> str:
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
    """Yields prompts of so many tokens, real text of the bank's references, without end."""
    ids = np.concatenate(
        [batch["token_ids"].flatten().to_numpy() for file in bank.manifest.list_files("references")
         for batch in bank.iterate_table(file, ["token_ids"])]
    )  # fmt: skip
    size = num_tokens - len(bos)
    starts = np.random.default_rng(1).integers(0, max(1, len(ids) - size), 10_000)
    while True:
        for start in starts:
            yield [*bos, *np.resize(ids[start : start + size], size).tolist()]


def bench_reading(bank: Bank, model: str, wanted: ReadingBench) -> BenchReport:
    """Measures generation with memory, without, and with references as text, and the wait for the first token.

    Raises:
        InputError: the model has no room for so many tokens.
        WrongModelError: the bank was written by another model.
    """
    writer = open_writer(bank, model)
    checkpoint = writer.checkpoint
    retriever = open_retriever(bank)
    unique = UniqueHits(retriever)
    cold = TimedMemories(bank, writer, cache_bytes=0)
    usual = BankMemories(bank, writer)
    room = int(checkpoint.config.max_position_embeddings) - checkpoint.context_start
    if wanted.num_long_tokens + 1 > room or wanted.num_prompt_tokens + wanted.num_new_tokens > room:
        raise InputError(
            f"{model} has room for {room} tokens, {max(wanted.num_long_tokens + 1, wanted.num_prompt_tokens)} and "
            f"{wanted.num_new_tokens} are asked for; give smaller numbers or another model"
        )
    generators = {
        "worst": Generator(checkpoint, unique, cold),
        "usual": Generator(checkpoint, retriever, usual),
        "none": Generator(checkpoint),
        "text": Generator(checkpoint, texts=ReferenceTexts(checkpoint, bank, retriever)),
    }
    rows: list[BenchRow] = []
    for batch_size in wanted.batch_sizes:
        rows += _bench_batch(bank, generators, unique, cold, batch_size, wanted)
    rows += _bench_first_token(bank, generators, wanted)
    rows += _profile_reading(bank, generators, wanted)
    counted = usual.statistics
    total = counted.num_cached + counted.num_read + counted.num_encoded
    share = 100 * counted.num_cached / max(1, total)
    rows.append(
        BenchRow(name="hits of the RAM cache, usual case", value=share, unit="%", note=f"of {total:,} memories")
    )
    parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters()) / 1e6
    title = f"reading: {Path(model).name}, {parameters:.0f}M parameters, {str(checkpoint.dtype).removeprefix('torch.')}"
    return BenchReport(title=title, machine=describe_machine(str(checkpoint.device)), rows=rows)


def _bench_batch(
    bank: Bank,
    generators: dict[str, Generator],
    unique: UniqueHits,
    cold: TimedMemories,
    batch_size: int,
    wanted: ReadingBench,
) -> list[BenchRow]:
    bos = cold.checkpoint.bos_token_ids
    prompts = cut_prompts(bank, bos, wanted.num_prompt_tokens)
    contexts = [next(prompts) for _ in range(batch_size)]
    settings = GenerationConfig(max_new_tokens=wanted.num_new_tokens, stop_at_end=False)
    at_once = dataclasses.replace(settings, prefetch_tokens=0)

    def run_worst() -> None:
        forget_pages(bank)
        unique.seconds = cold.seconds = 0.0
        started = time.perf_counter()
        generators["worst"].generate_tokens(contexts, at_once)
        shares.append((unique.seconds, cold.seconds, time.perf_counter() - started))

    shares: list[tuple[float, float, float]] = []
    works: dict[str, Callable[[], object]] = {
        "worst": run_worst,
        "none": lambda: generators["none"].generate_tokens(contexts, settings),
        "usual": lambda: generators["usual"].generate_tokens(contexts, settings),
    }
    if wanted.with_text:
        works["text"] = lambda: generators["text"].generate_tokens(contexts, settings)
    seconds = time_in_turn(works, wanted.num_rounds)
    rates = {name: batch_size * wanted.num_new_tokens / value for name, value in seconds.items()}
    what = f"batch {batch_size}, {wanted.num_prompt_tokens} in + {wanted.num_new_tokens} out"
    searching, fetching, whole = min(shares, key=lambda share: share[2])
    rows = [
        BenchRow(name=f"no memory, {what}", value=rates["none"], unit="tokens/s"),
        BenchRow(
            name="with memory, worst case", value=rates["worst"], unit="tokens/s", ratio=rates["worst"] / rates["none"],
            against="no memory", note=f"search {searching / whole:.1%}, reading from the drive {fetching / whole:.1%}",
        ),
        BenchRow(
            name="with memory, usual case", value=rates["usual"], unit="tokens/s", ratio=rates["usual"] / rates["none"],
            against="no memory", note="cache, read ahead",
        ),
    ]  # fmt: skip
    if wanted.with_text:
        rows += [
            BenchRow(name="5 references as text", value=rates["text"], unit="tokens/s",
                     ratio=rates["text"] / rates["none"], against="no memory"),
            BenchRow(name="with memory, worst case", value=rates["worst"], unit="tokens/s",
                     ratio=rates["worst"] / rates["text"], against="5 references as text"),
        ]  # fmt: skip
    return rows


def _bench_first_token(bank: Bank, generators: dict[str, Generator], wanted: ReadingBench) -> list[BenchRow]:
    prompts = cut_prompts(bank, generators["none"].checkpoint.bos_token_ids, wanted.num_long_tokens)
    settings = GenerationConfig(max_new_tokens=1, prefetch_tokens=0, stop_at_end=False)
    contexts = [next(prompts)]

    def run_worst() -> None:
        forget_pages(bank)
        generators["worst"].generate_tokens(contexts, settings)

    seconds = time_in_turn(
        {"worst": run_worst, "none": lambda: generators["none"].generate_tokens(contexts, settings)},
        max(5, wanted.num_rounds),
    )
    milliseconds = {name: 1000 * value for name, value in seconds.items()}
    return [
        BenchRow(name=f"first token, {wanted.num_long_tokens} in, no memory", value=milliseconds["none"], unit="ms"),
        BenchRow(
            name=f"first token, {wanted.num_long_tokens} in, worst case", value=milliseconds["worst"], unit="ms",
            ratio=milliseconds["none"] / milliseconds["worst"], against="no memory",
            note=f"takes {milliseconds['worst'] / milliseconds['none']:.2f} times as long",
        ),
    ]  # fmt: skip


def _profile_reading(bank: Bank, generators: dict[str, Generator], wanted: ReadingBench) -> list[BenchRow]:
    """Shares of the operations of a generation with memory, worst case, and of one without."""
    prompts = cut_prompts(bank, generators["none"].checkpoint.bos_token_ids, wanted.num_prompt_tokens)
    contexts = [next(prompts) for _ in range(wanted.batch_sizes[0])]
    num_new = min(PROFILED_TOKENS, wanted.num_new_tokens)
    settings = GenerationConfig(max_new_tokens=num_new, prefetch_tokens=0, stop_at_end=False)
    rows = []
    for name, title in (("none", "no memory"), ("worst", "with memory, worst case")):
        rows.append(BenchRow(name=f"profile, {title}", value=100.0, unit="%", note=f"{num_new} tokens out"))
        rows += profile_operations(functools.partial(generators[name].generate_tokens, contexts, settings))
    return rows
