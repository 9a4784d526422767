"""The order of sequences: every one once an epoch whatever the processes and interruptions, and their batches."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.training.batches import IGNORED, TrainingBatch
from model.training.drawing import DrawnSequence
from model.training.ordering import SequenceOrder
from model.training.streaming import SequenceDataset, StreamConfig, assemble_batch
from schemas.errors import InputError
from schemas.sequences import (
    SEQUENCES_PER_BLOCK,
    count_chunks,
    write_manifest,
)
from tests.stored_sequences import (
    NUM_REFERENCES,
    NUM_SEQUENCES,
    list_numbers,
    make_tokens,
    open_source,
    write_dataset,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


# The order ------------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=9),
    blocks_per_window=st.integers(1, 5),
    seed=st.integers(0, 1000),
    shuffle=st.randoms(use_true_random=False),
)
def test_every_epoch_is_a_permutation_and_any_place_is_found_at_once(
    sizes: list[int], blocks_per_window: int, seed: int, shuffle: Any
) -> None:
    order = SequenceOrder(sizes, seed=seed, blocks_per_window=blocks_per_window)
    everything = sorted((block, row) for block, size in enumerate(sizes) for row in range(size))
    found = [order.locate(position) for position in range(3 * len(everything))]
    for epoch in range(3):
        assert sorted(found[epoch * len(everything) : (epoch + 1) * len(everything)]) == everything
    # No more than a window is in use at a time.
    places = [block for block, _ in found[: len(everything)]]
    for block in range(len(sizes)):
        seen = [place for place, other in enumerate(places) if other == block]
        assert len(set(places[seen[0] : seen[-1] + 1])) <= blocks_per_window
    positions = list(range(len(found)))
    shuffle.shuffle(positions)
    fresh = SequenceOrder(sizes, seed=seed, blocks_per_window=blocks_per_window)
    assert all(fresh.locate(position) == found[position] for position in positions)


@pytest.mark.parametrize("seed", range(6))
def test_a_source_of_few_blocks_is_met_from_the_start(seed: int) -> None:
    """Blocks hold neighbours, which are of one source: four of seventy blocks are a source of a seventeenth."""
    window = StreamConfig(sequences_per_step=1, sequences_per_batch=1).blocks_per_window
    order = SequenceOrder([256] * 70, seed=seed, blocks_per_window=window)
    quarter = [order.locate(position)[0] for position in range(order.num_sequences // 4)]
    assert 0.03 < sum(block < 4 for block in quarter) / len(quarter) < 0.1


def test_orders_differ_by_epoch_and_seed() -> None:
    orders = [
        tuple(SequenceOrder([20, 20, 20], seed=seed, blocks_per_window=2).locate(start + place) for place in range(60))
        for seed, start in ((0, 0), (0, 60), (1, 0))
    ]
    assert len(set(orders)) == 3
    with pytest.raises(InputError, match="no sequences"):
        SequenceOrder([], seed=0, blocks_per_window=1)


# Ranks and resume -----------------------------------------------------------------------------------------------------


def test_blocks_are_the_stored_sequences(dataset: SequenceDataset) -> None:
    assert dataset.block_sizes == [256, 44, 70, 256, 256, 1]
    assert max(dataset.block_sizes) == SEQUENCES_PER_BLOCK
    found = [tokens.tolist() for block in range(6) for tokens in dataset.read_block(block).tokens]
    assert found == [make_tokens(number) for number in range(NUM_SEQUENCES)]
    number = 0
    for block in range(6):
        for tokens, candidates in zip(
            dataset.read_block(block).tokens, dataset.read_block(block).candidates, strict=True
        ):
            generator = np.random.default_rng((1, number))
            expected = [
                generator.integers(0, NUM_REFERENCES, generator.integers(0, 4)).tolist()
                for _ in range(count_chunks(len(tokens)))
            ]
            assert [rows.tolist() for rows in candidates] == expected
            number += 1


@settings(max_examples=12)
@given(runs=st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 25)), min_size=2, max_size=3))
def test_no_sequence_is_repeated_or_skipped_whatever_the_ranks_and_the_interruptions(
    dataset: SequenceDataset, runs: list[tuple[int, int]]
) -> None:
    seen: list[int] = []
    first = 0
    for num_ranks, num_steps in runs:  # each run goes on where the last was stopped, in new processes
        ranks = [open_source(dataset, size=32, batch=8, stage="warmup") for _ in range(num_ranks)]
        for step in range(first, first + num_steps):
            parts = [source.draw(step, rank, num_ranks) for rank, source in enumerate(ranks)]
            assert len({len(part) for part in parts}) == 1
            assert all(len(batch.tokens_BT) == 8 for part in parts for batch in part)
            seen += [number for part in parts for number in list_numbers(part)]
        first += num_steps
    undisturbed = open_source(dataset, size=32, batch=8, stage="warmup")
    assert seen == [number for step in range(first) for number in list_numbers(undisturbed.draw(step, 0, 1))]
    for start in range(0, len(seen) - NUM_SEQUENCES + 1, NUM_SEQUENCES):
        assert sorted(seen[start : start + NUM_SEQUENCES]) == list(range(NUM_SEQUENCES))


EVERYTHING: dict[str, Any] = {
    "repeat_share": 0.3,
    "pick_share": 0.3,
    "distractor_share": 0.2,
    "dropout_share": 0.2,
    "echo_share": 0.3,
    "unread_share": 0.2,
    "plain_share": 0.2,
    "shuffle": True,
}


def describe_batch(batch: TrainingBatch) -> list[Any]:
    references = [reference.tolist() for reference in batch.references]
    tensors = (batch.tokens_BT, batch.targets_BT, batch.index_BCM, batch.chunk_of_token_BT)
    return [batch.with_prefix, references, *(tensor.tolist() for tensor in tensors)]


def test_what_is_drawn_is_a_function_of_the_step(dataset: SequenceDataset) -> None:
    one = open_source(dataset, **EVERYTHING)
    expected = [[describe_batch(batch) for batch in one.draw(step, 0, 1)] for step in range(12)]
    assert len({str(batch) for of_step in expected for batch in of_step}) == 12 * 4
    again = open_source(SequenceDataset.open(dataset.folder), **EVERYTHING)
    for step in (11, 3, 7, 0):
        assert [describe_batch(batch) for batch in again.draw(step, 0, 1)] == expected[step]
        parts = [again.draw(step, rank, 4) for rank in range(4)]
        assert [describe_batch(batch) for part in parts for batch in part] == expected[step]
    assert one.source_id == again.source_id
    others = [
        open_source(dataset, **{**EVERYTHING, "shuffle": False}),
        open_source(dataset, seed=1, **EVERYTHING),
        open_source(dataset, size=16, **EVERYTHING),
    ]
    assert len({source.source_id for source in (one, *others)}) == 4
    assert open_source(dataset, batch=4, **EVERYTHING).source_id == one.source_id
    assert [describe_batch(batch) for batch in others[1].draw(0, 0, 1)] != expected[0]


def test_steps_that_cannot_be_dealt_out_are_refused(dataset: SequenceDataset) -> None:
    with pytest.raises(InputError, match="sequences_per_step is 8, must be a multiple of 6: 3 processes of 2"):
        open_source(dataset).draw(0, 0, 3)
    with pytest.raises(InputError, match="must be a multiple of 3"):
        StreamConfig(sequences_per_step=8, sequences_per_batch=3)
    for name in ("sequences_per_step", "sequences_per_batch", "blocks_per_window"):
        with pytest.raises(InputError, match=f"{name} is 0"):
            StreamConfig(**{"sequences_per_step": 8, "sequences_per_batch": 8, name: 0})
    with pytest.raises(InputError, match="seed is -1"):
        StreamConfig(sequences_per_step=8, sequences_per_batch=8, seed=-1)


# Batches --------------------------------------------------------------------------------------------------------------

references_or_none = st.one_of(st.none(), st.lists(st.integers(0, 2), min_size=1, max_size=2))


@given(
    drawn=st.lists(st.lists(references_or_none, min_size=1, max_size=8), min_size=1, max_size=3),
    num_memories=st.integers(1, 6),
    last=st.integers(1, 64),
)
def test_a_batch_is_what_its_sequences_say(drawn: list[list[list[int] | None]], num_memories: int, last: int) -> None:
    sequences = [
        DrawnSequence(
            tokens=np.arange(number, number + (len(chunks) - 1) * 64 + last + 1, dtype=np.int32),
            references=[None if tokens is None else np.array(tokens, np.int32) for tokens in chunks],
        )
        for number, chunks in enumerate(drawn)
    ]
    batch = assemble_batch(sequences, num_memories=num_memories, with_prefix=True)
    written = [reference.tolist() for reference in batch.references]
    assert sorted(written) == sorted(
        [list(tokens) for tokens in {tuple(tokens) for chunks in drawn for tokens in chunks if tokens is not None}]
    )
    assert batch.num_targets == sum(len(sequence.tokens) - 1 for sequence in sequences)
    for number, (sequence, chunks) in enumerate(zip(sequences, drawn, strict=True)):
        size = len(sequence.tokens) - 1
        assert batch.tokens_BT[number, :size].tolist() == sequence.tokens[:-1].tolist()
        assert batch.targets_BT[number, :size].tolist() == sequence.tokens[1:].tolist()
        assert (batch.targets_BT[number, size:] == IGNORED).all()
        assert batch.chunk_of_token_BT[number, :size].tolist() == [place // 64 for place in range(size)]
        assert (batch.chunk_of_token_BT[number, size:] == -1).all()
        for chunk in range(len(chunks)):
            read: list[list[int]] = []
            for tokens in reversed(chunks[max(0, chunk - num_memories + 1) : chunk + 1]):
                if tokens is not None and tokens not in read:
                    read.append(tokens)
            assert [written[row] for row in batch.index_BCM[number, chunk].tolist() if row >= 0] == read


def test_memories_are_shuffled_within_each_chunk(dataset: SequenceDataset) -> None:
    plain, shuffled = open_source(dataset), open_source(dataset, shuffle=True)
    num_moved = 0
    for step in range(5):
        for left, right in zip(plain.draw(step, 0, 1), shuffled.draw(step, 0, 1), strict=True):
            assert torch.equal(left.index_BCM.sort(-1).values, right.index_BCM.sort(-1).values)
            assert torch.equal(left.tokens_BT, right.tokens_BT)
            num_moved += int((left.index_BCM != right.index_BCM).any(-1).sum())
    assert num_moved > 20


def test_the_id_of_a_dataset_is_that_of_its_content(dataset: SequenceDataset, tmp_path: Path) -> None:
    manifest = dataset.manifest
    write_manifest(tmp_path, manifest)
    values = json.loads((tmp_path / "dataset.json").read_bytes())
    assert values["shards"][0] == dataclasses.asdict(manifest.shards[0])
    moved = dataclasses.replace(manifest, settings={"corpus": ["elsewhere"]}, counts={"sequences": 1})
    other = dataclasses.replace(manifest, shards=manifest.shards[:2])
    assert moved.dataset_id == manifest.dataset_id != other.dataset_id
