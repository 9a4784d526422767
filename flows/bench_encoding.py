"""``memory3 bench encode``: how fast memories are written, against the bare forward pass of the same layers.

The bare pass is transformers' own, over the same batches: embeddings and the memory layers, the last one whole. Writing
leaves the end of that layer out and adds the choice of tokens, so a ratio near 1 says that choosing costs nothing.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from flows.benching import BenchReport, BenchRow, describe_machine, profile_operations, time_in_turn
from model.planning import compute_costs, shape_from_config
from model.writing import BATCH_TOKENS, BATCH_TOKENS_ELSEWHERE, ReferenceWriter, pad_references, split_batches
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.protocols import IntArray


def make_bare_forward(writer: ReferenceWriter, references: Sequence[IntArray]) -> Callable[[], None]:
    """Returns the plain forward pass of the memory layers over the batches that the writer makes of references."""
    checkpoint = writer.checkpoint
    num_layers = checkpoint.memory_layers[-1] + 1
    decoder = copy.deepcopy(checkpoint.decoder)
    decoder.layers = decoder.layers[:num_layers]  # type: ignore[index]
    decoder.config.num_hidden_layers = num_layers  # type: ignore[union-attr]
    decoder.set_attn_implementation("sdpa")  # type: ignore[operator]
    size = BATCH_TOKENS.get(checkpoint.device.type, BATCH_TOKENS_ELSEWHERE)
    prefix = checkpoint.prefix_token_ids.to(checkpoint.device)
    batches = []
    for rows in split_batches(np.array([len(ids) for ids in references]), size):
        padded, _ = pad_references([references[row] for row in rows], checkpoint.device)
        batches.append(torch.cat((prefix.expand(len(padded), -1), padded), 1))

    @torch.inference_mode()
    def forward() -> None:
        for batch in batches:
            decoder(input_ids=batch, use_cache=False)

    return forward


def bench_encoding(
    writer: ReferenceWriter, references: Sequence[IntArray], *, name: str, num_rounds: int
) -> BenchReport:
    """Measures writing references as they are and filled up to 128 tokens.

    Args:
        writer: the model with its rule and codec.
        references: token ids, of the lengths that documents have.
        name: the model, for the report.
        num_rounds: rounds, of which the best counts.
    """
    longest = writer.checkpoint.max_reference_tokens
    costs = compute_costs(shape_from_config(writer.checkpoint.config))
    rows = []
    for kind, tokens in (
        ("of documents", list(references)),
        (f"of {longest} tokens", [np.resize(ids, longest) for ids in references]),
    ):
        works: dict[str, Callable[[], object]] = {
            "write": functools.partial(writer.write, tokens),
            "bare": make_bare_forward(writer, tokens),
        }
        seconds = time_in_turn(works, num_rounds)
        rate = len(tokens) / seconds["write"]
        note = f"{rate * costs.write_memory / 1e9:,.0f} GFLOP/s" if kind != "of documents" else ""
        rows.append(
            BenchRow(
                name=f"references {kind}",
                value=rate,
                unit="references/s",
                ratio=seconds["bare"] / seconds["write"],
                against="bare forward of the same layers",
                note=note,
            )
        )
    rows += profile_operations(lambda: writer.write(references))
    parameters = sum(parameter.numel() for parameter in writer.checkpoint.model.parameters()) / 1e6
    dtype = str(writer.checkpoint.dtype).removeprefix("torch.")
    title = f"writing: {Path(name).name}, {parameters:.0f}M parameters, {dtype}, codec {writer.codec.name}"
    return BenchReport(title=title, machine=describe_machine(str(writer.checkpoint.device)), rows=rows)


def list_references(bank: Bank, num_references: int) -> list[IntArray]:
    """Returns the tokens of references of a bank, spread over all of them.

    Raises:
        InputError: the bank has none.
    """
    columns = [
        batch["token_ids"]
        for file in bank.manifest.list_files("references")
        for batch in bank.iterate_table(file, ["token_ids"])
    ]
    if not sum(map(len, columns)):
        raise InputError(f"bank {bank.url} has no references to write; name another")
    tokens = pa.concat_arrays(columns)
    rows = np.linspace(0, len(tokens) - 1, min(num_references, len(tokens))).astype(np.int64)
    return [np.asarray(ids, dtype=np.int32) for ids in tokens.take(pa.array(rows)).to_pylist()]
