"""A stored dataset of sequences whose content tells where it comes from, for the tests of drawing and streaming."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from model.training.batches import IGNORED, TrainingBatch
from model.training.drawing import DrawingConfig
from model.training.streaming import SequenceDataset, SequenceSource, StreamConfig
from pipelines.assembling import hash_file
from schemas.reference_tokens import write_reference_tokens
from schemas.sequences import (
    SEQUENCES,
    DatasetFile,
    DatasetManifest,
    count_chunks,
    write_manifest,
    write_sequences,
)

SHARD_SIZES = (300, 70, 513)
NUM_SEQUENCES = sum(SHARD_SIZES)
NUM_REFERENCES = 50
BOS, EOS = 1, 2


def make_tokens(number: int) -> list[int]:
    """Tokens that name their sequence in the second place; every fifth is shorter than the others."""
    generator = np.random.default_rng(number)
    size = 257 if number % 5 else int(generator.integers(2, 257))
    return [3, 10_000 + number, *generator.integers(3, 5000, 255).tolist()][:size]


def make_reference(row: int) -> list[int]:
    return np.random.default_rng((7, row)).integers(5000, 9000, 20 + 2 * row).tolist()  # type: ignore[no-any-return]


def describe(path: Path, num_rows: int, folder: Path) -> DatasetFile:
    name = path.relative_to(folder).as_posix()
    return DatasetFile(path=name, num_rows=num_rows, size_bytes=path.stat().st_size, sha256=hash_file(path))


def write_dataset(folder: Path) -> SequenceDataset:
    """Writes three shards of 883 sequences whose chunks have none to three of fifty references as candidates."""
    (folder / "sequences").mkdir()
    ref_ids = [f"{row:032x}" for row in range(NUM_REFERENCES)]
    tokens = [make_reference(row) for row in range(NUM_REFERENCES)]
    write_reference_tokens([pa.table({"ref_id": ref_ids, "token_ids": tokens})], folder / "references.arrow")
    shards, first = [], 0
    for part, size in enumerate(SHARD_SIZES):
        rows: list[dict[str, Any]] = []
        for number in range(first, first + size):
            sequence = make_tokens(number)
            generator = np.random.default_rng((1, number))
            found = [
                [ref_ids[row] for row in generator.integers(0, NUM_REFERENCES, generator.integers(0, 4))]
                for _ in range(count_chunks(len(sequence)))
            ]
            rows.append(
                {
                    "sequence": number,
                    "tokens": sequence,
                    "num_tokens": len(sequence),
                    "documents": [],
                    "ref_ids": found,
                    "overlaps": [[0.0] * len(of_chunk) for of_chunk in found],
                    "similarities": [[1.0] * len(of_chunk) for of_chunk in found],
                    "num_leaking": 0,
                    "num_own_place": 0,
                }
            )
        path = folder / "sequences" / f"{part}.parquet"
        write_sequences([pa.Table.from_pylist(rows, SEQUENCES)], SEQUENCES, path)
        shards.append(describe(path, size, folder))
        first += size
    manifest = DatasetManifest(
        prepare_id="",
        tokenizer_id="",
        bos_token_id=BOS,
        eos_token_id=EOS,
        sequence_tokens=256,
        max_overlap=0.9,
        bank=None,
        settings={},
        counts={},
        shards=tuple(shards),
        references=describe(folder / "references.arrow", NUM_REFERENCES, folder),
    )
    write_manifest(folder, manifest)
    return SequenceDataset.open(folder)


def open_source(
    dataset: SequenceDataset, size: int = 8, batch: int = 2, seed: int = 0, **drawing: Any
) -> SequenceSource:
    stream = StreamConfig(sequences_per_step=size, sequences_per_batch=batch, seed=seed, blocks_per_window=2)
    return SequenceSource(dataset, DrawingConfig(**drawing), stream)


def list_sequences(batches: list[TrainingBatch]) -> list[list[int]]:
    """Returns the sequences of batches without padding, the first token, which may be replaced, left out."""
    return [targets[targets != IGNORED].tolist() for batch in batches for targets in batch.targets_BT]


def list_numbers(batches: list[TrainingBatch]) -> list[int]:
    """Returns which sequences are in batches."""
    return [tokens[0] - 10_000 for tokens in list_sequences(batches)]
