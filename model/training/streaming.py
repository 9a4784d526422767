"""Batches drawn from a prepared dataset: a function of the step, whatever the number of processes.

    dataset on disk (:mod:`schemas.sequences`) -> blocks -> order (:mod:`model.training.ordering`)
    -> sequences (:mod:`model.training.drawing`) -> **batches** -> the loop

A step takes the next positions of the order, and each process its part of them. So resuming, with any number of
processes, neither repeats nor skips a sequence; each process reads what a step needs of the dataset, and holds a window
of blocks. What is random is drawn by the position of a sequence, or by the number of the step.

Shape letters: B sequences, T tokens, C chunks, M memories a chunk.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model.training.batches import IGNORED, TrainingBatch, index_memories
from model.training.drawing import DrawingConfig, DrawnSequence, SequenceDrawer
from model.training.ordering import SequenceOrder
from schemas.errors import DatasetFormatError, InputError
from schemas.identifiers import hash_json
from schemas.protocols import IntArray, LongArray
from schemas.reference_tokens import ReferenceTokens
from schemas.sequences import CHUNK_TOKENS, SEQUENCES, SEQUENCES_PER_BLOCK, DatasetFile, DatasetManifest, read_manifest

_SEQUENCE, _STEP, _SHUFFLE = 3, 4, 5
"""What a random number is for, so that no two uses share one; the order has the numbers before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceBlock:
    """Some hundred sequences that were read together.

    Attributes:
        tokens: the tokens of each sequence, int32, read-only.
        candidates: for each sequence and chunk the rows of the references it may read, best first.
    """

    tokens: list[IntArray]
    candidates: list[list[LongArray]]


class SequenceDataset:
    """A folder of training sequences, opened for reading.

    Attributes:
        folder: the folder.
        manifest: what it is.
        references: the references that chunks may read, and others; None where it was prepared without a bank.
        block_sizes: sequences in each block.
    """

    def __init__(self, folder: Path, manifest: DatasetManifest) -> None:
        """Joins a folder and its manifest; use :meth:`open`."""
        self.folder, self.manifest = folder, manifest
        self._blocks = [
            (shard, group) for shard in manifest.shards for group in range(-(-shard.num_rows // SEQUENCES_PER_BLOCK))
        ]
        self.block_sizes = [
            min(SEQUENCES_PER_BLOCK, shard.num_rows - group * SEQUENCES_PER_BLOCK) for shard, group in self._blocks
        ]
        self.references: ReferenceTokens | None = None
        self._checked: set[str] = set()
        for shard in manifest.shards:
            self._check_size(shard)
        if manifest.references is not None:
            self._check(manifest.references)
            self.references = ReferenceTokens(folder / manifest.references.path)

    @classmethod
    def open(cls, folder: Path) -> "SequenceDataset":
        """Opens a dataset; shards are checked when they are first read.

        Raises:
            DatasetFormatError: it is none, is of another format version, or a file is missing or damaged.
        """
        return cls(folder, read_manifest(folder))

    def _check_size(self, file: DatasetFile) -> None:
        path = self.folder / file.path
        found = path.stat().st_size if path.is_file() else None
        if found != file.size_bytes:
            finding = "is missing" if found is None else f"has {found} bytes, not {file.size_bytes}"
            raise DatasetFormatError(f"{path} {finding}; restore it or prepare the sequences again")

    def _check(self, file: DatasetFile) -> None:
        """Makes sure that a file has the bytes that were written, once in the life of this object."""
        if file.path in self._checked:
            return
        self._check_size(file)
        path = self.folder / file.path
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != file.sha256:
            raise DatasetFormatError(
                f"{path} has other bytes than when it was written; restore it or prepare the sequences again"
            )
        self._checked.add(file.path)

    def read_block(self, block: int) -> SequenceBlock:
        """Reads a block.

        Raises:
            DatasetFormatError: its shard is missing or damaged.
        """
        shard, group = self._blocks[block]
        self._check(shard)
        path = self.folder / shard.path
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                if not file.schema_arrow.remove_metadata().equals(SEQUENCES):
                    raise DatasetFormatError(f"{path} has other columns than sequences have; prepare them again")
                table = file.read_row_group(group, columns=["tokens", "ref_ids"])
        except (pa.ArrowException, OSError) as error:
            raise DatasetFormatError(f"{path} cannot be read: {error}; prepare the sequences again") from error
        tokens, ref_ids = (table[name].combine_chunks() for name in ("tokens", "ref_ids"))
        of_chunks = ref_ids.flatten()
        flat = of_chunks.flatten()
        rows = np.empty(0, np.int64) if self.references is None else self.references.find_rows(flat)
        of_chunk = _split(rows, of_chunks)
        ends = np.cumsum(ref_ids.value_lengths()).tolist()
        return SequenceBlock(
            tokens=_split(tokens.flatten().to_numpy(), tokens),
            candidates=[of_chunk[start:end] for start, end in itertools.pairwise([0, *ends])],
        )


def _split(values: np.ndarray, lists: pa.ListArray) -> list[np.ndarray]:
    """Returns a view of the values of each list, of which the values follow each other."""
    ends = np.cumsum(lists.value_lengths()).tolist()
    return [values[start:end] for start, end in itertools.pairwise([0, *ends])]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How many sequences a step takes, and in which order.

    Attributes:
        sequences_per_step: sequences of an optimizer step, of all processes together.
        sequences_per_batch: sequences of one forward pass of one process.
        seed: seed of the order and of everything that is drawn.
        blocks_per_window: blocks of 256 sequences that are held at a time and shuffled together. Neighbours are of one
            source, so that windows of few blocks leave whole sources out for long.
    """

    sequences_per_step: int
    sequences_per_batch: int
    seed: int = 0
    blocks_per_window: int = 64

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a number below 1, a negative seed, or a step of no whole number of batches.
        """
        for name in ("sequences_per_step", "sequences_per_batch", "blocks_per_window"):
            if getattr(self, name) < 1:
                raise InputError(f"stream: {name} is {getattr(self, name)}, must be at least 1")
        if self.seed < 0:
            raise InputError(f"stream: seed is {self.seed}, must be at least 0")
        self.count_batches(1)

    def count_batches(self, num_ranks: int) -> int:
        """Returns the number of batches of a step for each of some processes.

        Raises:
            InputError: it is not a whole number.
        """
        together = num_ranks * self.sequences_per_batch
        if self.sequences_per_step % together:
            raise InputError(
                f"stream: sequences_per_step is {self.sequences_per_step}, must be a multiple of {together}: "
                f"{num_ranks} processes of {self.sequences_per_batch} sequences a batch"
            )
        return self.sequences_per_step // together


class SequenceSource:
    """Batches of a dataset; a :class:`model.training.batches.BatchSource`."""

    def __init__(self, dataset: SequenceDataset, drawing: DrawingConfig, stream: StreamConfig) -> None:
        """Joins a dataset with how it is drawn.

        Raises:
            InputError: memories are to be read but the dataset has no references, or it has no sequences.
        """
        manifest = dataset.manifest
        self._drawing, self._stream = drawing, stream
        self._drawer = SequenceDrawer(
            drawing,
            dataset.references,
            special_ids=(manifest.bos_token_id, manifest.eos_token_id),
            max_overlap=manifest.max_overlap,
        )
        self._order = SequenceOrder(dataset.block_sizes, seed=stream.seed, blocks_per_window=stream.blocks_per_window)
        # The end of one window and the beginning of the next may belong to one step.
        self._read_block = functools.lru_cache(maxsize=2 * stream.blocks_per_window)(dataset.read_block)
        settings = [dataclasses.asdict(drawing), stream.sequences_per_step, stream.seed, stream.blocks_per_window]
        self._id = hash_json([dataset.manifest.dataset_id, settings])

    @property
    def source_id(self) -> str:
        """Id of the dataset and of all settings but the size of a batch, which changes no sequence."""
        return self._id

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every sequence is drawn once."""
        return self._order.num_sequences / self._stream.sequences_per_step

    def is_plain(self, step: int) -> bool:
        """Tells whether a step is one of the ordinary model."""
        if self._drawing.stage == "warmup":
            return True
        generator = np.random.default_rng((self._stream.seed, _STEP, step))
        return bool(generator.random() < self._drawing.plain_share)

    def draw_sequence(self, position: int, *, is_plain: bool) -> DrawnSequence:
        """Returns the sequence at a position of the order."""
        block, row = self._order.locate(position)
        stored = self._read_block(block)
        generator = np.random.default_rng((self._stream.seed, _SEQUENCE, position))
        return self._drawer.draw(stored.tokens[row], stored.candidates[row], generator, is_plain=is_plain)

    def draw(self, step: int, rank: int, num_ranks: int) -> list[TrainingBatch]:
        """Returns the micro-batches of one rank for one step.

        Raises:
            InputError: the sequences of a step cannot be dealt out to so many processes.
            DatasetFormatError: a shard is missing or damaged.
        """
        num_batches, size = self._stream.count_batches(num_ranks), self._stream.sequences_per_batch
        first = step * self._stream.sequences_per_step + rank * num_batches * size
        is_plain = self.is_plain(step)
        batches = []
        for start in range(first, first + num_batches * size, size):
            positions = range(start, start + size)
            drawn = [self.draw_sequence(position, is_plain=is_plain) for position in positions]
            batches.append(self._make_batch(drawn, positions, is_plain=is_plain))
        return batches

    def _make_batch(self, drawn: Sequence[DrawnSequence], positions: Sequence[int], *, is_plain: bool) -> TrainingBatch:
        batch = assemble_batch(drawn, num_memories=self._drawing.num_memories, with_prefix=not is_plain)
        if is_plain or not self._drawing.shuffle:
            return batch
        shuffled = [
            np.random.default_rng((self._stream.seed, _SHUFFLE, position)).permuted(index_CM, axis=1)
            for position, index_CM in zip(positions, batch.index_BCM.numpy(), strict=True)
        ]
        return dataclasses.replace(batch, index_BCM=torch.from_numpy(np.stack(shuffled)))


def assemble_batch(drawn: Sequence[DrawnSequence], *, num_memories: int, with_prefix: bool) -> TrainingBatch:
    """Returns a batch of sequences, padded to the longest; each distinct reference is in it once.

    A chunk reads its own reference and those of the chunks before it, each once: as in generation, where what is
    retrieved together is distinct.

    Args:
        drawn: the sequences.
        num_memories: references a chunk reads at most.
        with_prefix: False for sequences of the ordinary model.
    """
    num_tokens = max(len(sequence.tokens) for sequence in drawn) - 1
    num_chunks = max(len(sequence.references) for sequence in drawn)
    tokens = np.zeros((len(drawn), num_tokens), np.int64)
    targets = np.full((len(drawn), num_tokens), IGNORED, np.int64)
    chunks = np.full((len(drawn), num_tokens), -1, np.int64)
    rows = np.full((len(drawn), num_chunks), -1, np.int64)
    references: dict[bytes, IntArray] = {}
    places: dict[bytes, int] = {}
    for number, sequence in enumerate(drawn):
        size = len(sequence.tokens) - 1
        tokens[number, :size], targets[number, :size] = sequence.tokens[:-1], sequence.tokens[1:]
        chunks[number, :size] = np.arange(size) // CHUNK_TOKENS
        for chunk, reference in enumerate(sequence.references):
            if reference is not None:
                key = reference.tobytes()
                rows[number, chunk] = places.setdefault(key, len(places))
                references[key] = reference
    index_BCM = index_memories(torch.from_numpy(rows), num_memories)
    repeated = (index_BCM[..., :, None] == index_BCM[..., None, :]).tril(-1).any(-1)
    return TrainingBatch(
        tokens_BT=torch.from_numpy(tokens),
        targets_BT=torch.from_numpy(targets),
        references=tuple(references.values()),
        index_BCM=index_BCM.masked_fill(repeated, -1),
        chunk_of_token_BT=torch.from_numpy(chunks),
        with_prefix=with_prefix,
    )
