"""Held-out sequences with what their chunks retrieve, and their loss in each way of reading.

The sequences come from ``memory3 train prepare`` on held-out documents and a bank, so the leak rule and the place rule
hold for what is retrieved: no reference overlaps a sequence by more than 90 %, and none is from its own place in the
document. Random references are drawn from the whole bank. Every sequence begins with ``<s>``, as in training.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model.checkpoint import Checkpoint
from model.coding import KeyValueCodec
from model.evaluating import draw_random, score_with_memory, score_with_text, score_without_memory, shift_chosen
from model.reading import CHUNK_TOKENS
from model.selecting import SelectionConfig
from model.training.streaming import SequenceDataset
from model.writing import Memories, encode_references, pad_references
from schemas.protocols import IntArray
from schemas.sequences import read_manifest

MIN_TOKENS = 256
"""Shorter sequences, the ends of documents, are left out."""

FIT_TOKENS = 640
"""Longest prompt that a model trained on 512 tokens behind 128 positions of references has seen the positions of."""

WAYS = ("plain", "none", "random", "retrieved", "text", "text of 2")
"""The ways of reading that are measured; the last two have the references as text in the prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutSequence:
    """A sequence of a held-out document.

    Attributes:
        key: document and number, for naming and for seeds.
        source: the corpus it is from.
        tokens: int32.
        candidates: for each chunk the ids of the references it retrieved with its own text, best first.
    """

    key: str
    source: str
    tokens: IntArray
    candidates: list[list[str]]


def _find_document(row: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Returns the document that most of a sequence is of, and its source."""
    longest = max(row["documents"], key=lambda span: span["end_token"] - span["start_token"])
    source = longest["doc_id"].split("/")[0]
    return longest, "python" if source in ("topic", "module") else source


def count_tokens(folder: Path) -> dict[str, int]:
    """Returns how many tokens each source has in a prepared dataset."""
    counts: dict[str, int] = {}
    for path in sorted((folder / "sequences").glob("*.parquet")):
        for row in pq.read_table(path, columns=["tokens", "documents"]).to_pylist():
            _, source = _find_document(row)
            counts[source] = counts.get(source, 0) + len(row["tokens"])
    return counts


def read_held_out(folder: Path, num_each: int, seed: int = 0) -> list[HeldOutSequence]:
    """Returns a random sample of the sequences of a prepared dataset, as many of each source, in a fixed order.

    The sample depends on the places of the sequences only, not on the bank, so that two banks are read with the same.
    """
    by_source: dict[str, list[HeldOutSequence]] = {}
    bos = read_manifest(folder).bos_token_id
    columns = ["sequence", "tokens", "documents", "ref_ids"]
    for path in sorted((folder / "sequences").glob("*.parquet")):
        for row in pq.read_table(path, columns=columns).to_pylist():
            if len(row["tokens"]) < MIN_TOKENS:
                continue
            longest, source = _find_document(row)
            sequence = HeldOutSequence(
                key=f"{longest['doc_id']}#{longest['start_char']}",
                source=source,
                tokens=np.asarray([bos, *row["tokens"][1:-1]], dtype=np.int32),
                candidates=row["ref_ids"],
            )
            by_source.setdefault(sequence.source, []).append(sequence)
    sample = []
    for source in sorted(by_source):
        found = sorted(by_source[source], key=lambda sequence: sequence.key)
        picked = np.random.default_rng(seed).permutation(len(found))[:num_each]
        sample += [found[place] for place in sorted(picked.tolist())]
    return sample


def make_fetch(
    checkpoint: Checkpoint,
    dataset: SequenceDataset,
    selection: SelectionConfig,
    codec: KeyValueCodec | None = None,
) -> Callable[[Sequence[str]], Memories]:
    """Returns what writes memories of a dataset's references, as a bank would hold them.

    Args:
        checkpoint: the model that writes.
        dataset: where the references' tokens are.
        selection: which tokens are kept.
        codec: how vectors would be stored; None for exactly.
    """
    references = dataset.references
    assert references is not None

    @torch.inference_mode()
    def fetch(ref_ids: Sequence[str]) -> Memories:
        rows = references.find_rows(pa.array(ref_ids, pa.string()))
        padded, valid = pad_references([references.get_tokens(int(row)) for row in rows], checkpoint.device)
        memories = encode_references(checkpoint, padded, valid, selection)
        if codec is None:
            return memories
        keys, values = memories.keys_LBHSD.movedim(1, 0), memories.values_LBHSD.movedim(1, 0)
        keys, values = codec.decode(codec.encode(keys, values), torch.float32)
        return dataclasses.replace(memories, keys_LBHSD=keys.movedim(0, 1), values_LBHSD=values.movedim(0, 1))

    return fetch


def list_ref_ids(folder: Path) -> list[str]:
    """Returns the ids of all references of a dataset, which random memories are drawn from."""
    with pa.ipc.open_file(pa.memory_map(str(folder / "references.arrow"))) as file:
        return [ref_id for batch in range(file.num_record_batches) for ref_id in file.get_batch(batch)[0].to_pylist()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossTable:
    """Losses of held-out sequences in several ways of reading.

    Attributes:
        sums: for each way and source the sum of the loss in nats.
        counts: tokens scored of each source.
        by_chunk: for each way the mean loss of each chunk but the first, over all sources.
    """

    sums: dict[str, dict[str, float]]
    counts: dict[str, int]
    by_chunk: dict[str, list[float]]

    def mean(self, way: str, source: str | None = None) -> float:
        """Returns the mean loss of a way: of one source, or the mean of all sources, each of equal weight."""
        if source is not None:
            return self.sums[way][source] / self.counts[source]
        return sum(self.mean(way, name) for name in self.counts) / len(self.counts)

    def gain(self, way: str, source: str | None = None) -> float:
        """Returns by how much a way is better than reading nothing, in nats a token."""
        return self.mean("none", source) - self.mean(way, source)

    def gain_by_tokens(self, way: str, tokens: Mapping[str, int]) -> float:
        """Returns the gain with each source weighted by the tokens it has."""
        return sum(self.gain(way, source) * tokens[source] for source in self.counts) / sum(
            tokens[source] for source in self.counts
        )


def measure_table(
    checkpoint: Checkpoint,
    sequences: Sequence[HeldOutSequence],
    fetch: Callable[[Sequence[str]], Memories],
    ref_ids: Sequence[str],
    tokens_of: Callable[[str], IntArray],
    *,
    ways: Sequence[str] = WAYS,
    num_memories: int = 5,
) -> LossTable:
    """Scores sequences in several ways of reading; the tokens of the first chunk are not scored.

    Args:
        checkpoint: the model.
        sequences: the sequences.
        fetch: returns memories, see :func:`make_fetch`.
        ref_ids: ids that random memories are drawn from.
        tokens_of: returns the tokens of a reference.
        ways: which of :data:`WAYS` to measure.
        num_memories: references a chunk reads.
    """
    sources = list(dict.fromkeys(sequence.source for sequence in sequences))
    sums = {way: dict.fromkeys(sources, 0.0) for way in ways}
    counts = dict.fromkeys(sources, 0)
    by_chunk: dict[str, dict[int, list[float]]] = {way: {} for way in ways}
    for sequence in sequences:
        chosen = shift_chosen(sequence.candidates, num_memories)
        random = draw_random(ref_ids, len(chosen), num_memories, sequence.key)
        texts = [[tokens_of(ref_id) for ref_id in of_chunk] for of_chunk in chosen]
        counts[sequence.source] += len(sequence.tokens) - CHUNK_TOKENS
        for way in ways:
            if way in ("plain", "none"):
                losses = score_without_memory(checkpoint, sequence.tokens, with_prefix=way == "none")
            elif way in ("random", "retrieved"):
                wanted = random if way == "random" else chosen
                losses = score_with_memory(checkpoint, sequence.tokens, wanted, fetch)
            else:
                fits = way == "text of 2"
                given = [of_chunk[:2] for of_chunk in texts] if fits else texts
                losses = score_with_text(checkpoint, sequence.tokens, given, max_tokens=FIT_TOKENS if fits else None)
            sums[way][sequence.source] += float(losses.sum())
            for place, part in enumerate(losses.split(CHUNK_TOKENS)):
                by_chunk[way].setdefault(place, []).extend(part.tolist())
    means = {way: [float(np.mean(found[place])) for place in sorted(found)] for way, found in by_chunk.items()}
    return LossTable(sums=sums, counts=counts, by_chunk=means)
