"""Writing, reading and storing memories: ``make bench-memory``.

Reading is measured on a Llama of 107M parameters with random weights (what it says does not matter, how long it takes
does), writing on that and on the shipped model, storage on the shape of the paper's 2.4B model, and what codecs cost
in loss on the shipped model and Python's documentation, the held-out part of which is scored. Models and banks are made
once, in a folder.

    python -m benchmarks.bench_memory [--folder runs/bench-memory] [--batch-size 8 --batch-size 32] [--rounds 2]
"""

import argparse
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flows.bench_commands import STORED_CODECS
from flows.bench_encoding import bench_encoding, list_references
from flows.bench_reading import ReadingBench, bench_reading
from flows.bench_storage import bench_storage
from flows.benching import BenchReport, BenchRow, describe_machine
from flows.building import build
from flows.config import load_config
from flows.console import print_bench
from flows.demo import choose_passages, write_corpus
from flows.generation import open_writer
from flows.searching import open_retriever
from flows.steps import Steps
from model.coding import KeyValueCodec, load_codec
from model.evaluating import measure_losses
from model.fetching import BankMemories
from model.locating import SHIPPED_MODEL, find_checkpoint
from model.planning import paper_shape
from model.writing import Memories, ReferenceWriter
from schemas.bank import Bank
from schemas.stores import LocalStore

NUM_DOCUMENTS = 60
"""Documents of the large model's bank: more than the 480 references that nobody reads twice at a batch of 32."""

LOSS_CODECS = ("none", "int8", "turbo4", "turbo3")


def make_large_config() -> Any:
    """Returns the shape of a Llama of 107M parameters, 16 layers of which 8 use memory."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def make_large_model(folder: Path) -> Path:
    """Saves a random model of that shape with the shipped model's tokenizer, once."""
    from transformers import AutoModelForCausalLM

    target = folder / "random-107m"
    if (target / "config.json").is_file():
        return target
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(make_large_config())
    model.save_pretrained(target)  # type: ignore[operator]
    shutil.copyfile(find_checkpoint(SHIPPED_MODEL) / "tokenizer.json", target / "tokenizer.json")
    return target


def make_bank(folder: Path, name: str, model: str, num_documents: int | None) -> Bank:
    """Builds a bank of Python's documentation, or opens it if it is there."""
    corpus, _ = write_corpus(folder)
    if num_documents is not None:
        lines = corpus.read_bytes().splitlines(keepends=True)
        corpus = folder / f"{name}.jsonl"
        corpus.write_bytes(b"".join(lines[:num_documents]))
    store = LocalStore(folder / name)
    if not (folder / name / "manifests").is_dir():
        build(store, [str(corpus)], load_config("tiny", None, {"memory": {"model": model, "codec": "none"}}), Steps())
    return Bank.open(store)


class CodedMemories(BankMemories):
    """Memories of a bank as they would come out of a codec."""

    def __init__(self, bank: Bank, writer: ReferenceWriter, coded_by: KeyValueCodec) -> None:
        """Joins a bank that has no codec with one."""
        super().__init__(bank, writer)
        self._coded_by = coded_by

    def fetch(self, ref_ids: Sequence[str]) -> Memories:
        """See :meth:`model.fetching.BankMemories.fetch`."""
        exact = super().fetch(ref_ids)
        payload = self._coded_by.encode(exact.keys_LBHSD.transpose(0, 1), exact.values_LBHSD.transpose(0, 1))
        keys, values = self._coded_by.decode(payload, exact.keys_LBHSD.dtype)
        return Memories(
            keys_LBHSD=keys.transpose(0, 1), values_LBHSD=values.transpose(0, 1), offsets_LBHS=exact.offsets_LBHS
        )


def bench_losses(bank: Bank, folder: Path) -> BenchReport:
    """Measures what codecs change in the loss of held-out documents."""
    passages = choose_passages(write_corpus(folder)[1])
    writer, retriever = open_writer(bank, SHIPPED_MODEL), open_retriever(bank)
    layout = bank.manifest.layout
    rows: list[BenchRow] = []
    gain = exact = 0.0
    for name in LOSS_CODECS:
        codec = load_codec(
            name,
            num_layers=layout.num_layers,
            num_kv_heads=layout.num_kv_heads,
            num_slots=layout.num_slots,
            head_dim=layout.head_dim,
        )
        found = measure_losses(writer.checkpoint, retriever, CodedMemories(bank, writer, codec), passages)
        if name == "none":
            exact, gain = found.retrieved, found.none - found.retrieved
            note = f"no memory {found.none:.5f}, random {found.random:.5f}: a gain of {gain:.5f}"
        else:
            note = f"{found.retrieved - exact:+.6f}, {100 * (found.retrieved - exact) / gain:+.1f} % of the gain"
        rows.append(BenchRow(name=f"loss with memories, {name}", value=found.retrieved, unit="nats", note=note))
    title = f"loss of held-out documents: {SHIPPED_MODEL}, {found.num_tokens:,} tokens"
    return BenchReport(title=title, machine=describe_machine(), rows=rows)


def describe_commit() -> str:
    """Returns the commit that is measured."""
    git = subprocess.run(("git", "describe", "--always", "--dirty"), capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/bench-memory"), help="where models and banks are kept"
    )
    parser.add_argument("--batch-size", type=int, action="append", help="8 and 32 if not given")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of which the best counts")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()

    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    large = str(make_large_model(folder))
    large_bank = make_bank(folder, "large-bank", large, NUM_DOCUMENTS)
    small_bank = make_bank(folder, "small-bank", SHIPPED_MODEL, None)
    sizes = tuple(arguments.batch_size or (8, 32))
    wanted = ReadingBench(batch_sizes=sizes, num_rounds=arguments.rounds, num_long_tokens=1024)
    measured: list[Callable[[], BenchReport]] = [
        lambda: bench_storage(paper_shape(), STORED_CODECS, title="the paper's 2.4B model"),
        lambda: bench_encoding(
            open_writer(small_bank, SHIPPED_MODEL), list_references(small_bank, 256), name=SHIPPED_MODEL, num_rounds=5
        ),
        lambda: bench_encoding(
            open_writer(large_bank, large), list_references(large_bank, 32), name=large, num_rounds=3
        ),
        lambda: bench_losses(small_bank, folder),
        lambda: bench_reading(large_bank, large, wanted),
    ]
    print(f"commit:    {describe_commit()}")
    reports = []
    for measure in measured:
        reports.append(measure())
        print_bench(reports[-1])
    if arguments.json:
        arguments.json.write_text(
            json.dumps([vars(report) | {"rows": list(map(vars, report.rows))} for report in reports])
        )


if __name__ == "__main__":
    main()
