"""Drawing: every sequence once an epoch whatever the processes and interruptions, and what makes training robust."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.training.batches import IGNORED, TrainingBatch
from model.training.drawing import DrawingConfig, DrawnSequence, SequenceDrawer, make_echo, repeat_span
from model.training.ordering import SequenceOrder
from model.training.streaming import SequenceDataset, SequenceSource, StreamConfig, assemble_batch
from pipelines.assembling import hash_file
from schemas.errors import InputError
from schemas.overlap import measure_overlap
from schemas.protocols import IntArray
from schemas.reference_tokens import write_reference_tokens
from schemas.sequences import (
    SEQUENCES,
    SEQUENCES_PER_BLOCK,
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


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    """Three shards of 883 sequences whose chunks have none to three of fifty references as candidates."""
    folder = tmp_path_factory.mktemp("dataset")
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


# What makes training robust -------------------------------------------------------------------------------------------


def draw_all(dataset: SequenceDataset, num_steps: int = 25, **drawing: Any) -> list[TrainingBatch]:
    source = open_source(dataset, **drawing)
    return [batch for step in range(num_steps) for batch in source.draw(step, 0, 1)]


def list_own(batch: TrainingBatch) -> list[list[int] | None]:
    """Returns the tokens of the reference of each chunk that has a token."""
    own: list[list[int] | None] = []
    for index_CM, chunks in zip(batch.index_BCM, batch.chunk_of_token_BT, strict=True):
        rows = index_CM[: int(chunks.max()) + 1, 0].tolist()
        own += [batch.references[row].tolist() if row >= 0 else None for row in rows]
    return own


def pick_row(batch: TrainingBatch, row: int) -> TrainingBatch:
    """Returns one sequence of a batch."""
    rows = slice(row, row + 1)
    return dataclasses.replace(batch, index_BCM=batch.index_BCM[rows], chunk_of_token_BT=batch.chunk_of_token_BT[rows])


@functools.cache
def find_candidates(number: int) -> list[list[list[int]]]:
    generator = np.random.default_rng((1, number))
    return [
        [make_reference(row) for row in generator.integers(0, NUM_REFERENCES, generator.integers(0, 4)).tolist()]
        for _ in range(count_chunks(len(make_tokens(number))))
    ]


def test_without_any_share_each_chunk_has_its_best_candidate(dataset: SequenceDataset) -> None:
    batches = draw_all(dataset)
    assert all(batch.with_prefix for batch in batches)
    for batch in batches:
        expected = [of_chunk for number in list_numbers([batch]) for of_chunk in find_candidates(number)]
        assert list_own(batch) == [of_chunk[0] if of_chunk else None for of_chunk in expected]
        assert (batch.tokens_BT[:, 0] == BOS).all()
    assert list_sequences(batches) == [make_tokens(number)[1:] for number in list_numbers(batches)]
    assert all(int(batch.tokens_BT[0, 0]) == 3 for batch in draw_all(dataset, 2, begins_with_bos=False))


def count_chunks_with(batches: list[TrainingBatch], wanted: str) -> float:
    """Returns the share of chunks with candidates that have: the best, another one, a foreign reference, or none."""
    counts = dict.fromkeys(("best", "other", "foreign", "none"), 0)
    for batch in batches:
        candidates = [of_chunk for number in list_numbers([batch]) for of_chunk in find_candidates(number)]
        for own, of_chunk in zip(list_own(batch), candidates, strict=True):
            if of_chunk:
                place = of_chunk.index(own) if own in of_chunk else -1
                counts["none" if own is None else "foreign" if place < 0 else "other" if place else "best"] += 1
    return counts[wanted] / sum(counts.values())


@pytest.mark.parametrize(
    ("option", "share", "kind", "expected"),
    [
        ("dropout_share", 0.3, "none", 0.3),
        ("dropout_share", 1.0, "none", 1.0),
        ("unread_share", 0.4, "none", 0.4),
        ("unread_share", 1.0, "none", 1.0),
        ("distractor_share", 0.5, "foreign", 0.5 * (1 - 2 / NUM_REFERENCES)),
        ("distractor_share", 1.0, "foreign", 1 - 2 / NUM_REFERENCES),
        # Of one to three candidates, another than the first is drawn (0 + 1/2 + 2/3) / 3 of the time.
        ("pick_share", 1.0, "other", 7 / 18),
        ("pick_share", 0.5, "other", 7 / 36),
    ],
)
def test_shares_are_kept(dataset: SequenceDataset, option: str, share: float, kind: str, expected: float) -> None:
    batches = draw_all(dataset, 80, **{option: share})
    assert count_chunks_with(batches, kind) == pytest.approx(expected, abs=0.0 if expected == 1 else 0.06)


def test_a_lag_gives_each_chunk_what_the_one_before_retrieved(dataset: SequenceDataset) -> None:
    num_lagging = num_sequences = 0
    for batch, lagging in zip(draw_all(dataset), draw_all(dataset, lag_share=0.5), strict=True):
        assert torch.equal(batch.targets_BT, lagging.targets_BT)
        for row in range(len(batch.tokens_BT)):
            own, lagged = (list_own(pick_row(each, row)) for each in (batch, lagging))
            num_sequences += 1
            if lagged != own:
                num_lagging += 1
                assert lagged == [None, *own[:-1]]
    assert 0.3 < num_lagging / num_sequences < 0.7


def test_unread_sequences_read_nothing_as_a_whole(dataset: SequenceDataset) -> None:
    found = set()
    for batch in draw_all(dataset, unread_share=0.5):
        assert batch.with_prefix
        numbers = list_numbers([batch])
        for number, index_CM in zip(numbers, batch.index_BCM, strict=True):
            has_candidates = any(find_candidates(number))
            found.add((has_candidates, bool((index_CM >= 0).any())))
    assert found == {(True, True), (True, False), (False, False)}


def test_a_step_is_plain_as_a_whole(dataset: SequenceDataset) -> None:
    source = open_source(dataset, plain_share=0.5)
    kinds = [{batch.with_prefix for batch in source.draw(step, rank, 2)} for step in range(40) for rank in range(2)]
    assert all(len(kind) == 1 for kind in kinds)
    assert kinds[0::2] == kinds[1::2]
    share = sum(kind == {False} for kind in kinds) / len(kinds)
    assert 0.25 < share < 0.75
    for step in range(40):
        (first, *_) = source.draw(step, 0, 1)
        assert first.with_prefix != source.is_plain(step)
        if source.is_plain(step):
            assert not first.references
            assert (first.index_BCM == -1).all()


@given(st.integers(2, 300), st.integers(0, 2**32))
def test_a_span_is_written_again_further_on(num_tokens: int, seed: int) -> None:
    before = np.arange(num_tokens, dtype=np.int32)
    after = before.copy()
    if not repeat_span(after, np.random.default_rng(seed)):
        assert num_tokens < 96
        assert (after == before).all()
        return
    (changed,) = np.nonzero(after != before)
    start, end = int(changed[0]), int(changed[-1]) + 1
    assert len(changed) == end - start
    assert 32 <= end - start <= num_tokens // 3
    source = int(after[start])
    assert after[start:end].tolist() == list(range(source, source + end - start))
    assert source >= 1
    assert source + end - start <= start


def test_repeats_are_drawn_in_their_share_of_the_sequences(dataset: SequenceDataset) -> None:
    for drawing in ({"stage": "warmup"}, {"stage": "continual"}):
        batches = draw_all(dataset, repeat_share=0.5, **drawing)
        pairs = zip(list_sequences(batches), list_numbers(batches), strict=True)
        long = [tokens != make_tokens(number)[1:] for tokens, number in pairs if len(make_tokens(number)) == 257]
        assert 0.4 < sum(long) / len(long) < 0.6


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    num_tokens=st.integers(2, 400),
    num_donor=st.integers(1, 128),
    num_words=st.integers(5, 900),
)
def test_an_echo_is_of_its_chunk_and_damaged(seed: int, num_tokens: int, num_donor: int, num_words: int) -> None:
    generator = np.random.default_rng(seed)
    tokens = np.arange(100, 100 + num_tokens, dtype=np.int32)
    tokens[generator.random(num_tokens) < 0.02] = EOS
    donor = generator.integers(10_000, 10_000 + num_words, num_donor).astype(np.int32)
    before = tokens.copy()
    for chunk in range(count_chunks(num_tokens)):
        echo = make_echo(tokens, chunk, donor, (BOS, EOS), generator)
        assert (tokens == before).all()
        if echo is None:
            assert (tokens[max(1, 64 * chunk) :] != EOS).sum() < 16
            continue
        assert not np.isin(echo, (BOS, EOS)).any()
        assert len(echo) <= 128
        kept = echo[echo < 10_000]
        assert 0.5 * len(echo) - 9 <= len(kept) <= 0.85 * len(echo)
        assert (np.diff(kept) > 0).all()
        assert kept.min() >= max(1, 64 * chunk - 32) + 100
        assert kept.max() < max(1, 64 * chunk) + 128 + 100
        assert measure_overlap(tokens, echo) == len(kept) / len(echo) <= 0.85


def test_half_of_the_echoes_are_damaged_in_one_place() -> None:
    generator = np.random.default_rng(0)
    tokens = np.arange(100, 500, dtype=np.int32)
    donor = np.arange(10_000, 10_128, dtype=np.int32)
    num_runs = []
    for _ in range(200):
        echo = make_echo(tokens, 2, donor, (BOS, EOS), generator)
        assert echo is not None
        is_foreign = echo >= 10_000
        num_runs.append(int(is_foreign[0]) + int((np.diff(is_foreign.astype(int)) == 1).sum()))
    assert 80 <= num_runs.count(1) <= 130
    assert sum(number >= 3 for number in num_runs) >= 60


def test_echoes_take_the_place_of_candidates_and_keep_the_leak_rule(dataset: SequenceDataset) -> None:
    stored = {tuple(make_reference(row)) for row in range(NUM_REFERENCES)}
    num_echoes = num_chunks = 0
    for batch in draw_all(dataset, 10, echo_share=0.5, repeat_share=0.5):
        for number, index_CM in enumerate(batch.index_BCM):
            targets = batch.targets_BT[number]
            sequence = np.array([BOS, *targets[targets != IGNORED].tolist()], np.int32)
            for row in {row for row in index_CM[:, 0].tolist() if row >= 0}:
                reference = batch.references[row]
                num_chunks += 1
                if tuple(reference.tolist()) not in stored:
                    num_echoes += 1
                    assert 0.3 < measure_overlap(sequence, reference) <= 0.9
    assert 0.3 < num_echoes / num_chunks < 0.7


class FewReferences:
    """References in memory."""

    def __init__(self, tokens: list[list[int]]) -> None:
        self._tokens = [np.array(of_one, np.int32) for of_one in tokens]

    def __len__(self) -> int:
        return len(self._tokens)

    def get_tokens(self, row: int) -> IntArray:
        return self._tokens[row]


def test_no_distractor_gives_its_sequence_away() -> None:
    tokens = np.arange(10, 267, dtype=np.int32)
    leaking = [tokens[start : start + 40].tolist() for start in (0, 50, 200)]
    config = DrawingConfig(distractor_share=1.0, begins_with_bos=False)
    for foreign, expected in (([list(range(900, 930))], True), ([], False)):
        references: Any = FewReferences([*leaking, *foreign])
        drawer = SequenceDrawer(config, references, special_ids=(BOS, EOS), max_overlap=0.9)
        candidates = [np.array([0]) for _ in range(4)]
        generator = np.random.default_rng(0)
        drawn = [drawer.draw(tokens, candidates, generator, is_plain=False) for _ in range(20)]
        found = [reference for sequence in drawn for reference in sequence.references if reference is not None]
        assert bool(found) == expected
        assert all(reference[0] == 900 for reference in found)


def test_a_candidate_that_leaks_after_a_repeat_is_passed_over() -> None:
    """The reference is two distant parts of the sequence: only where a repeat brings them together it leaks."""
    tokens = np.arange(10, 267, dtype=np.int32)
    config = DrawingConfig(repeat_share=1.0, begins_with_bos=False)
    generator = np.random.default_rng(0)
    num_passed = 0
    for _ in range(300):
        repeated = tokens.copy()
        state = np.random.default_rng(int(generator.integers(1 << 30)))
        seed_of_repeat = int(generator.integers(1 << 30))
        repeat_span(repeated, np.random.default_rng(seed_of_repeat))
        (changed,) = np.nonzero(repeated != tokens)
        seam = int(changed[0])
        reference = repeated[seam - 20 : seam + 20]
        references: Any = FewReferences([reference.tolist(), [7, 8, 9]])
        drawer = SequenceDrawer(config, references, special_ids=(BOS, EOS), max_overlap=0.9)
        drawn = drawer.draw(tokens, [np.array([0, 1])] * 4, state, is_plain=False)
        for found in drawn.references:
            assert found is not None
            assert measure_overlap(drawn.tokens, found) <= 0.9
            num_passed += len(found) == 3
    assert 0 < num_passed < 1200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "sft"}, "stage is 'sft', must be one of warmup, continual"),
        ({"num_memories": 0}, "num_memories is 0"),
        ({"echo_share": 1.5}, "echo_share is 1.5, must be between 0 and 1"),
        ({"plain_share": -0.1}, "plain_share is -0.1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DrawingConfig(**changes)


def test_the_id_of_a_dataset_is_that_of_its_content(dataset: SequenceDataset, tmp_path: Path) -> None:
    manifest = dataset.manifest
    write_manifest(tmp_path, manifest)
    values = json.loads((tmp_path / "dataset.json").read_bytes())
    assert values["shards"][0] == dataclasses.asdict(manifest.shards[0])
    moved = dataclasses.replace(manifest, settings={"corpus": ["elsewhere"]}, counts={"sequences": 1})
    other = dataclasses.replace(manifest, shards=manifest.shards[:2])
    assert moved.dataset_id == manifest.dataset_id != other.dataset_id
