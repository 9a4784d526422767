"""What writing memories costs beside the model's own forward pass, and how well the slots of each rule stand in.

Three tables. **Speed**: references written a second against the bare forward pass (embeddings and the memory layers,
the last one whole) over the same batches, for the shipped model and a larger random one, on references of 128 tokens
and of the lengths that documents have; processor seconds of one thread, timed in turn, best of several rounds.
**Profile**: where the time of writing goes. **Slots**: for each rule how far what the slots of a reference answer is
from what all its tokens would answer: to the reference's own queries, to those of the text that follows it in its
document, and to the latter as a reader asks them, rotated, with the prefix and the reader's own context in the same
softmax.

    python -m benchmarks.bench_writing [--references 96] [--pairs 40] [--rounds 4]
"""

import argparse
import contextlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from benchmarks.bench_memory import make_large_config
from flows.bench_encoding import make_bare_forward
from model.attention import LastMemoryLayerReached, WritingTap
from model.checkpoint import Checkpoint, load_checkpoint, wrap_model
from model.selecting import SelectionConfig
from model.writing import BATCH_TOKENS, Memories, ReferenceWriter, encode_references, pad_references
from pipelines.chunking import ChunkingConfig, chunk_documents
from schemas.protocols import IntArray

RULES = {
    "paper": SelectionConfig(),
    "paper, refit": SelectionConfig(refit=True),
    "residual": SelectionConfig(score="residual"),
    "residual, refit": SelectionConfig(score="residual", refit=True),
    "paper, 16 slots": SelectionConfig(num_slots=16),
}
"""What is compared; the last has twice the bytes, for scale."""

LONG_ENOUGH = 60
"""Tokens of a reference whose slots are judged."""


def make_large_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """Returns a random Llama of 107M parameters with the shipped model's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_large_config()).requires_grad_(False).eval()
    return wrap_model(model, checkpoint.tokenizer, bos_token_id=1)


def time_in_turn(works: Sequence[Callable[[], object]], num_rounds: int) -> list[float]:
    """Returns the best processor seconds of this thread for each work, run in turn."""
    best = [float("inf")] * len(works)
    for _ in range(num_rounds):
        for place, work in enumerate(works):
            started = time.thread_time()
            work()
            best[place] = min(best[place], time.thread_time() - started)
    return best


def make_table(title: str, *columns: str) -> Table:
    """Returns an empty table, its first column to the left and the others to the right."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left")
    return table


def measure_speed(checkpoints: dict[str, Checkpoint], references: list[IntArray], num_rounds: int) -> Table:
    """Times writing under every rule against the bare forward pass."""
    table = make_table("speed", "model", "references", "rule", "references/s", "of the bare forward")
    for name, checkpoint in checkpoints.items():
        count = len(references) if name == "memory3-tiny" else max(8, len(references) // 8)
        mixed = references[:: len(references) // count][:count]
        for kind, tokens in (("128 tokens", [np.resize(ids, 128) for ids in mixed]), ("of documents", mixed)):
            rules = ("paper", "paper, refit", "residual, refit")
            writers = [ReferenceWriter(checkpoint, RULES[rule]) for rule in rules]
            works = [make_bare_forward(writers[0], tokens), *(lambda w=w, t=tokens: w.write(t) for w in writers)]
            bare, *seconds = time_in_turn(works, num_rounds)
            for rule, spent in zip(rules, seconds, strict=True):
                table.add_row(name, kind, rule, f"{count / spent:,.1f}", f"{bare / spent:.2f}")
    return table


def profile_writing(checkpoint: Checkpoint, references: list[IntArray]) -> Table:
    """Shares of the operations that take most of the time of writing."""
    writer = ReferenceWriter(checkpoint)
    writer.write(references)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        writer.write(references)
    spent = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in spent)
    table = make_table("profile: memory3-tiny, references of documents", "operation", "% of the time", "calls")
    for event in spent[:12]:
        table.add_row(event.key, f"{100 * event.self_cpu_time_total / total:.1f}", f"{event.count:,}")
    return table


def capture(checkpoint: Checkpoint, token_ids: IntArray) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Returns queries (H, G, T, D), keys and values (H, T, D) of each memory layer before RoPE, the prefix first."""
    tokens = torch.cat((checkpoint.prefix_token_ids, torch.from_numpy(token_ids).long()))[None]
    positions = torch.arange(tokens.shape[1])
    tap = WritingTap(memory_layers=checkpoint.memory_layers)
    with contextlib.suppress(LastMemoryLayerReached):
        checkpoint.decoder(
            input_ids=tokens, position_ids=positions[None], attention_mask=torch.ones_like(tokens), memory3=tap
        )
    undo = checkpoint.rotaries[0].unrotate
    return [(undo(q, positions)[0].unflatten(0, (k.shape[1], -1)), undo(k, positions)[0], v[0]) for q, k, v in tap.kept]


class Reader:
    """The queries of a text that follows a reference, as one memory layer asks them."""

    def __init__(
        self, checkpoint: Checkpoint, layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor], num_tokens: int
    ) -> None:
        """Takes what :func:`capture` returned of the text for one layer; ``num_tokens`` without the prefix."""
        self._checkpoint, self._first = checkpoint, layer[0].shape[2] - num_tokens
        queries, self._keys, self._values = layer
        self.queries = queries[:, :, self._first :]
        self._scaling = checkpoint.attention_scaling
        positions = torch.arange(num_tokens) + checkpoint.context_start
        heads, groups = queries.shape[:2]
        rotated = checkpoint.rotaries[0].rotate(self.queries.flatten(0, 1)[None], positions)[0]
        self._rotated = rotated.unflatten(0, (heads, groups)).flatten(1, 2)
        prefix = checkpoint.rotaries[0].rotate(self._keys[None, :, : self._first], torch.arange(self._first))[0]
        own = checkpoint.rotaries[0].rotate(self._keys[None, :, self._first :], positions)[0]
        self._around = torch.cat((prefix, own), 1)
        later = torch.full((num_tokens, num_tokens), -torch.inf).triu(1)
        self._mask = torch.nn.functional.pad(later, (self._first, 0)).repeat(groups, 1)

    def read(self, keys_HSD: torch.Tensor, values_HSD: torch.Tensor, offsets_HS: torch.Tensor) -> torch.Tensor:
        """Returns what attention to the prefix, a memory and the context gives."""
        rotary, first = self._checkpoint.rotaries[0], self._first
        placed = rotary.rotate_each(keys_HSD.flatten(0, 1), offsets_HS.flatten() + first).view(keys_HSD.shape)
        around = self._rotated @ self._around.mT * self._scaling + self._mask
        scores = torch.cat((self._rotated @ placed.mT * self._scaling, around), -1)
        return scores.softmax(-1) @ torch.cat((values_HSD, self._values), 1)


def answer(queries_HGTD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """Returns attention without RoPE of queries to keys (H, S, D) alone."""
    return (queries_HGTD.flatten(1, 2) @ keys.mT * scaling).softmax(-1) @ values


def measure_slots(checkpoint: Checkpoint, pairs: list[tuple[IntArray, IntArray]]) -> Table:
    """Compares what slots answer with what all tokens would, relative error averaged over layers, heads, references."""
    scaling, first = checkpoint.attention_scaling, len(checkpoint.prefix_token_ids)
    errors: dict[str, list[list[float]]] = {rule: [] for rule in RULES}
    for reference, following in pairs:
        padded, valid = pad_references([reference], checkpoint.device)
        written: dict[str, Memories] = {
            rule: encode_references(checkpoint, padded, valid, config) for rule, config in RULES.items()
        }
        layers = zip(capture(checkpoint, reference), capture(checkpoint, following), strict=True)
        for layer, ((queries, keys, values), following_layer) in enumerate(layers):
            own, all_keys, all_values = queries[:, :, first:], keys[:, first:], values[:, first:]
            reader = Reader(checkpoint, following_layer, len(following))
            places = torch.arange(len(reference)).expand(len(all_keys), -1)

            def ask(
                slots: tuple[torch.Tensor, ...], own: torch.Tensor = own, reader: Reader = reader
            ) -> list[torch.Tensor]:
                keys, values, offsets = slots
                asked = [answer(queries, keys, values, scaling) for queries in (own, reader.queries)]
                return [*asked, reader.read(keys, values, offsets)]

            wanted = ask((all_keys, all_values, places))
            for rule, memories in written.items():
                kept = memories.keys_LBHSD, memories.values_LBHSD, memories.offsets_LBHS
                found = ask(tuple(tensor[layer, 0] for tensor in kept))
                relative = [
                    ((given - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)).mean().item()
                    for given, full in zip(found, wanted, strict=True)
                ]
                errors[rule].append(relative)
    table = make_table(
        f"slots: relative error of attention, memory3-tiny, {len(pairs)} references",
        "rule", "own queries", "queries of the next text", "the same, as they are read",
    )  # fmt: skip
    for rule, rows in errors.items():
        table.add_row(rule, *(f"{value:.3f}" for value in np.mean(rows, 0)))
    return table


def describe_run() -> str:
    """Returns processor, commit and command."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    processor = names[0].split(":")[1].strip() if names else platform.processor()
    git = subprocess.run(("git", "rev-parse", "--short", "HEAD"), capture_output=True, text=True, check=False)
    command = " ".join(("python -m benchmarks.bench_writing", *sys.argv[1:]))
    commit = git.stdout.strip() or "unknown"
    return f"{command}\n{processor}, {torch.get_num_threads()} thread, torch {torch.__version__}, commit {commit}"


@torch.inference_mode()
def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=96, help="references to write")
    parser.add_argument("--pairs", type=int, default=40, help="references whose slots are judged")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of which the best counts")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    tiny = load_checkpoint()
    names = sorted(topics)
    texts = [topics[name] for name in names]
    chunks = chunk_documents(pa.array(names), pa.array(texts), None, tiny.tokenizer, ChunkingConfig())
    tokens = [np.asarray(ids, dtype=np.int32) for ids in chunks["token_ids"].to_pylist()]
    documents = chunks["doc_id"].to_pylist()
    pairs = [
        (tokens[row], tokens[row + 1])
        for row in range(len(tokens) - 1)
        if documents[row] == documents[row + 1] and min(len(tokens[row]), len(tokens[row + 1])) >= LONG_ENOUGH
    ]
    references = tokens[:: max(1, len(tokens) // arguments.references)][: arguments.references]
    judged = pairs[:: max(1, len(pairs) // arguments.pairs)][: arguments.pairs]
    console = Console()
    console.print(f"{describe_run()}; {BATCH_TOKENS['cpu']} tokens a batch\n", highlight=False)
    checkpoints = {"memory3-tiny": tiny, "random, 107M": make_large_checkpoint(tiny)}
    console.print(measure_speed(checkpoints, references, arguments.rounds))
    console.print(profile_writing(tiny, references))
    console.print(measure_slots(tiny, judged))


if __name__ == "__main__":
    main()
