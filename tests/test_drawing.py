"""Drawing what chunks read, with what makes training robust: each share does what it says, and nothing leaks."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.training.batches import IGNORED, TrainingBatch
from model.training.drawing import DrawingConfig, SequenceDrawer, make_echo, repeat_span
from model.training.streaming import SequenceDataset
from schemas.errors import InputError
from schemas.overlap import measure_overlap
from schemas.protocols import IntArray
from schemas.sequences import (
    count_chunks,
)
from tests.stored_sequences import (
    BOS,
    EOS,
    NUM_REFERENCES,
    list_numbers,
    list_sequences,
    make_reference,
    make_tokens,
    open_source,
    write_dataset,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


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


def test_misled_sequences_read_nothing_that_was_retrieved() -> None:
    """Random references stand in the place of all of a sequence's own, or of none."""
    tokens = np.arange(10, 522, dtype=np.int32)
    references: Any = FewReferences([[5, 6, 7], *([place] * 8 for place in range(1000, 1400))])
    config = DrawingConfig(misled_share=0.3, begins_with_bos=False)
    drawer = SequenceDrawer(config, references, special_ids=(BOS, EOS), max_overlap=0.9)
    generator = np.random.default_rng(0)
    num_misled = 0
    for _ in range(400):
        drawn = drawer.draw(tokens, [np.array([0])] * 8, generator, is_plain=False)
        found = [reference.tolist() for reference in drawn.references if reference is not None]
        assert len(found) == 8
        # One in four hundred references that are drawn at random is the retrieved one.
        num_own = found.count([5, 6, 7])
        assert num_own == 8 or num_own <= 2
        num_misled += num_own <= 2
    assert 80 < num_misled < 160


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
