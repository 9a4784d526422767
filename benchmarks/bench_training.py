"""make bench-training: what training has brought, on whole documents that no training has seen.

    python -m benchmarks.bench_training --work runs/recipe --model runs/recipe/strict/model
    python -m benchmarks.bench_training --only losses --sequences 40

Needs the folder that ``python -m flows.train_tiny`` works in: banks and held-out sequences are made from its corpora
when they are first needed. Losses are in nats a token; all ways of reading see the same tokens, and each source of text
has the same weight in the mean; the column "by tokens" weighs each by the tokens it has in all held-out documents.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import torch
import typer

from benchmarks.held_out import (
    WAYS,
    HeldOutSequence,
    LossTable,
    count_tokens,
    list_ref_ids,
    make_fetch,
    measure_table,
    read_held_out,
)
from flows.benching import describe_machine, time_in_turn
from flows.building import build
from flows.config import BuildConfig, MemoryConfig
from flows.console import print_rows
from flows.options import show_work
from flows.preparing import PrepareConfig, prepare_sequences
from flows.steps import Steps
from flows.training import make_continual_config, make_warmup_config
from model.checkpoint import Checkpoint, load_checkpoint
from model.coding import load_codec
from model.locating import SHIPPED_MODEL
from model.selecting import find_selection
from model.training.objective import LanguageObjective
from model.training.streaming import SequenceDataset, SequenceSource, StreamConfig
from schemas.protocols import IntArray
from schemas.stores import open_store

CASES = {"held-out-train": ("banked",), "held-out-all": ("banked", "held_out")}
"""Folders of held-out sequences by the parts of the corpus that their bank holds."""

TITLES = {"held-out-train": "bank of the training documents", "held-out-all": "bank that also holds the documents read"}

NUM_REFERENCES = (1, 3, 5, 7)
NUM_SLOTS = (2, 4, 8, 16, 32, 128)
CODECS = ("none", "int8", "turbo4", "turbo3")

app = typer.Typer(add_completion=False)


def prepare_held_out(work: Path) -> None:
    """Makes the banks and the held-out sequences that are not there yet."""
    for name, parts in CASES.items():
        if (work / name / "dataset.json").is_file():
            continue
        bank = work / ("bank" if parts == ("banked",) else "bank-all")
        if not bank.is_dir():
            corpus = [str(work / "corpus" / part) for part in parts]
            build(open_store(str(bank)), corpus, BuildConfig(memory=MemoryConfig(cold=True)), Steps())
        prepare_sequences([str(work / "corpus" / "held_out")], work / name, str(bank), config=PrepareConfig())


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model and held-out sequences of one bank.

    Attributes:
        checkpoint: the model.
        dataset: the sequences' dataset.
        sequences: those that are read.
        ref_ids: ids that random memories are drawn from.
        tokens: tokens of each source in all held-out documents.
    """

    checkpoint: Checkpoint
    dataset: SequenceDataset
    sequences: list[HeldOutSequence]
    ref_ids: list[str]
    tokens: dict[str, int]

    def get_tokens(self, ref_id: str) -> IntArray:
        """Returns the tokens of a reference."""
        references = self.dataset.references
        assert references is not None
        return references.get_tokens(int(references.find_rows(pa.array([ref_id]))[0]))

    def measure(
        self, ways: tuple[str, ...], *, num_memories: int = 5, num_slots: int | None = None, codec: str | None = None
    ) -> LossTable:
        """Returns the losses of some ways of reading; memories keep as many tokens as the model was trained with."""
        selection = find_selection(self.checkpoint.config, num_slots=num_slots)
        shape = {
            "num_layers": len(self.checkpoint.memory_layers),
            "num_kv_heads": self.checkpoint.num_kv_heads,
            "num_slots": selection.num_slots,
            "head_dim": self.checkpoint.head_dim,
        }
        coder = None if codec is None else load_codec(codec, **shape, dtype="bfloat16")  # type: ignore[arg-type]
        fetch = make_fetch(self.checkpoint, self.dataset, selection, coder)
        return measure_table(
            self.checkpoint,
            self.sequences,
            fetch,
            self.ref_ids,
            self.get_tokens,
            ways=ways,
            num_memories=num_memories,
        )


def open_bench(checkpoint: Checkpoint, folder: Path, num_each: int) -> Bench:
    """Opens held-out sequences, as many of each source."""
    dataset = SequenceDataset.open(folder)
    return Bench(checkpoint, dataset, read_held_out(folder, num_each), list_ref_ids(folder), count_tokens(folder))


def show_losses(bench: Bench, title: str) -> None:
    """Prints the losses of all ways of reading, by source."""
    table = bench.measure(WAYS)
    sources = list(table.counts)
    rows = []
    for way in WAYS:
        gains = [f"{table.gain(way, source):+.4f}" for source in sources]
        overall = (table.gain(way), table.gain_by_tokens(way, bench.tokens))
        rows.append([way, f"{table.mean(way):.4f}", *(f"{gain:+.4f}" for gain in overall), *gains])
    print(f"\n{title}: loss, and gain over reading nothing, {sum(table.counts.values()):,} tokens")
    shares = [f"{source} {bench.tokens[source] / sum(bench.tokens.values()):.0%}" for source in sources]
    print_rows(["read", "loss", "gain", "by tokens", *shares], rows, numeric=set(range(1, 4 + len(sources))))
    parts = [[way, *(f"{loss:.3f}" for loss in table.by_chunk[way])] for way in ("none", "retrieved")]
    print("loss by chunk of 64 tokens, from the second on")
    print_rows(["read", *(str(place + 2) for place in range(len(parts[0]) - 1))], parts)


def show_ablations(bench: Bench) -> None:
    """Prints the gain against the number of references, of kept tokens, and the codec."""
    none = bench.measure(("none",)).mean("none")
    variants = [
        *((f"{number} references", {"num_memories": number}) for number in NUM_REFERENCES),
        *((f"{number} kept tokens", {"num_slots": number}) for number in NUM_SLOTS),
        *((f"codec {name}", {"codec": name}) for name in CODECS),
    ]
    rows = []
    for name, options in variants:
        table = bench.measure(("random", "retrieved"), **options)  # type: ignore[arg-type]
        rows.append([name, *(f"{none - table.mean(way):+.4f}" for way in ("retrieved", "random"))])
    print(f"\nablations, {TITLES['held-out-all']}")
    print_rows(["", "gain", "of random"], rows, numeric={1, 2})


def show_step_cost(checkpoint: Checkpoint, data: Path) -> None:
    """Prints the cost of a continual step beside that of a warmup step, timed in turn."""
    dataset = SequenceDataset.open(data)
    stream = StreamConfig(sequences_per_step=4, sequences_per_batch=4)
    checkpoint.model.requires_grad_(True).train()
    objective = LanguageObjective(checkpoint, find_selection(checkpoint.config))
    plain = SequenceSource(dataset, make_warmup_config(1).drawing, stream)
    drawing = dataclasses.replace(make_continual_config(1).drawing, plain_share=0.0, unread_share=0.0)
    reading = SequenceSource(dataset, drawing, stream)

    def take_step(source: SequenceSource) -> Callable[[], None]:
        def step() -> None:
            for batch in source.draw(0, 0, 1):
                objective(batch).backward()
            checkpoint.model.zero_grad()

        return step

    seconds = time_in_turn({"warmup": take_step(plain), "continual": take_step(reading)}, 5)
    ratio = seconds["continual"] / seconds["warmup"]
    print(f"\na continual step costs {ratio:.2f} warmup steps (2048 tokens; {torch.get_num_threads()} threads)")


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Folder of the recipe, see flows/train_tiny.py.")] = Path("runs/recipe"),
    model: Annotated[str, typer.Option(help="The model to measure.")] = SHIPPED_MODEL,
    sequences: Annotated[int, typer.Option(help="Held-out sequences of each source; a third for ablations.")] = 20,
    only: Annotated[str, typer.Option(help="losses, ablations, steps, or several of them.")] = "losses,ablations,steps",
) -> None:
    """Measure a trained model on held-out documents."""
    if not (work / "corpus" / "held_out").is_dir():
        raise typer.BadParameter(f"{work} has no corpora; make them first: python -m flows.train_tiny corpus")
    started = time.monotonic()
    wanted = only.split(",")
    with show_work():
        prepare_held_out(work)
    checkpoint = load_checkpoint(model)
    print(f"{model}, memories of {find_selection(checkpoint.config)}; {describe_machine()}")
    for name in CASES:
        if "losses" in wanted:
            show_losses(open_bench(checkpoint, work / name, sequences), TITLES[name])
    if "ablations" in wanted:
        show_ablations(open_bench(checkpoint, work / "held-out-all", max(1, sequences // 3)))
    if "steps" in wanted:
        show_step_cost(checkpoint, work / "continual-data")
    print(f"\n{time.monotonic() - started:.0f} seconds")


if __name__ == "__main__":
    app()
