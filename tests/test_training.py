"""The training step: loss, batches, schedule, spike guard, and that gradients reach the writer."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.reading import CHUNK_TOKENS, MEMORIES_PER_CHUNK, read_sequences
from model.selecting import SelectionConfig
from model.training.batches import IGNORED, TrainingBatch, index_memories, make_plain_batch
from model.training.guarding import GuardConfig, SpikeGuard
from model.training.objective import ROWS_PER_SLICE, LanguageObjective, sum_cross_entropy
from model.training.optimizing import OptimizerConfig, make_optimizer
from model.training.schedule import LAST_FACTOR, ScheduleConfig
from model.writing import encode_references, pad_references
from schemas.errors import InputError
from tests.models import make_checkpoint


@pytest.mark.parametrize("has_bias", [False, True])
def test_sliced_loss_equals_the_ordinary_loss_and_gradient(has_bias: bool) -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, ROWS_PER_SLICE // 2, 8, generator=random, dtype=torch.float64)
    targets = torch.randint(0, 11, hidden.shape[:2], generator=random)
    targets[0, :7] = IGNORED
    head = torch.nn.Linear(8, 11, bias=has_bias, dtype=torch.float64)

    def measure(given_hidden: torch.Tensor, *, sliced: bool) -> tuple[float, torch.Tensor, list[torch.Tensor]]:
        leaf = given_hidden.clone().requires_grad_()
        head.zero_grad()
        if sliced:
            loss = sum_cross_entropy(leaf * 1.0, targets, head)
        else:
            loss = torch.nn.functional.cross_entropy(head(leaf).flatten(0, 1), targets.flatten(), reduction="sum")
        (loss * 0.25).backward()
        assert leaf.grad is not None
        return loss.item(), leaf.grad, [parameter.grad.clone() for parameter in head.parameters()]

    found, found_hidden, found_head = measure(hidden, sliced=True)
    expected, expected_hidden, expected_head = measure(hidden, sliced=False)
    assert found == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(found_hidden, expected_hidden, rtol=1e-5, atol=1e-7)
    for one, other in zip(found_head, expected_head, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_head_shared_with_the_embeddings_gets_both_gradients() -> None:
    checkpoint = make_checkpoint("llama", tie_word_embeddings=True)
    checkpoint.model.requires_grad_(True)
    assert checkpoint.head.weight is checkpoint.decoder.embed_tokens.weight
    batch = make_plain_batch(np.random.default_rng(0).integers(3, 512, (2, 40)))
    LanguageObjective(checkpoint)(batch).backward()
    found = checkpoint.head.weight.grad.clone()
    checkpoint.model.zero_grad()
    logits = checkpoint.model(batch.tokens_BT).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="sum").backward()
    torch.testing.assert_close(found, checkpoint.head.weight.grad, rtol=1e-4, atol=1e-4)


def test_stable_schedule_warms_up_stays_and_decays() -> None:
    schedule = ScheduleConfig()
    factors = [schedule.get_factor(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 20)
    assert factors[20:900] == [1.0] * 880
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[900:]))
    assert factors[-1] == pytest.approx(LAST_FACTOR)
    flat = ScheduleConfig(decay_share=0.0)
    assert [flat.get_factor(step, 1000) for step in range(20, 1000)] == [1.0] * 980


def test_cosine_schedule_is_half_a_cosine_after_the_warmup() -> None:
    schedule = ScheduleConfig(shape="cosine", warmup_share=0.1)
    factors = [schedule.get_factor(step, 200) for step in range(200)]
    assert max(factors) == factors[19] == 1.0
    assert factors[109] == pytest.approx(LAST_FACTOR + (1 - LAST_FACTOR) * 0.5, abs=1e-6)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[19:]))
    assert factors[-1] == pytest.approx(LAST_FACTOR)


@pytest.mark.parametrize("wrong", [{"shape": "linear"}, {"decay_share": 1.5}, {"warmup_share": -0.1}])
def test_wrong_schedules_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"schedule"):
        ScheduleConfig(**wrong)  # type: ignore[arg-type]


def test_a_chunk_reads_its_own_reference_and_those_of_the_four_before() -> None:
    index = index_memories(torch.tensor([[10, 11, -1, 13, 14, 15]]), MEMORIES_PER_CHUNK)
    assert index[0].tolist() == [
        [10, -1, -1, -1, -1],
        [11, 10, -1, -1, -1],
        [-1, 11, 10, -1, -1],
        [13, -1, 11, 10, -1],
        [14, 13, -1, 11, 10],
        [15, 14, 13, -1, 11],
    ]


@given(st.lists(st.integers(-1, 30), min_size=1, max_size=12), st.integers(1, 7))
def test_any_number_of_memories_is_indexed_as_one_would_by_hand(rows: list[int], num_memories: int) -> None:
    found = index_memories(torch.tensor([rows]), num_memories)[0].tolist()
    for chunk, of_chunk in enumerate(found):
        assert of_chunk == [rows[chunk - back] if chunk >= back else -1 for back in range(num_memories)]


def make_memory_batch() -> TrainingBatch:
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 512, (2, 2 * CHUNK_TOKENS + 1), generator=random)
    references = [torch.randint(3, 512, (30 + 10 * row,), generator=random).int().numpy() for row in range(4)]
    return TrainingBatch(
        tokens_BT=tokens[:, :-1],
        targets_BT=tokens[:, 1:],
        references=references,
        index_BCM=index_memories(torch.tensor([[0, 1], [2, 3]]), MEMORIES_PER_CHUNK),
        chunk_of_token_BT=(torch.arange(2 * CHUNK_TOKENS) // CHUNK_TOKENS).expand(2, -1),
    )


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_gradients_reach_the_writer_only_through_the_memories(name: str) -> None:
    """The continual step against the same loss written out, and the writer's part of the gradient is not zero."""
    checkpoint = make_checkpoint(name)
    checkpoint.model.requires_grad_(True)
    batch = make_memory_batch()
    loss = LanguageObjective(checkpoint)(batch)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in checkpoint.model.named_parameters()}

    checkpoint.model.zero_grad()
    padded, valid = pad_references(batch.references, checkpoint.device)
    memories = encode_references(checkpoint, padded, valid, SelectionConfig())
    index = torch.tensor([[[0, -1, -1, -1, -1], [1, 0, -1, -1, -1]], [[2, -1, -1, -1, -1], [3, 2, -1, -1, -1]]])
    hidden, context = read_sequences(checkpoint, batch.tokens_BT, memories, index, batch.chunk_of_token_BT)
    assert context is not None
    assert context.attention_LBCM is None
    logits = checkpoint.head(hidden)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="sum")
    through_memory = torch.autograd.grad(expected, memories.values_LBHSD, retain_graph=True)[0]
    assert through_memory.abs().sum() > 0
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for key, parameter in checkpoint.model.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-3, atol=1e-3)


def test_references_stop_at_the_last_memory_layer() -> None:
    """Were the references run through all layers, those past the last memory layer would see more tokens."""
    checkpoint = make_checkpoint("llama")
    batch = make_memory_batch()
    seen: dict[int, list[int]] = {}
    handles = [
        layer.register_forward_hook(
            lambda _module, _given, out, place=place: seen.setdefault(place, []).append(
                (out[0] if isinstance(out, tuple) else out).shape[0]
            )
        )
        for place, layer in enumerate(checkpoint.decoder.layers)
    ]
    with torch.no_grad():
        LanguageObjective(checkpoint)(batch)
    for handle in handles:
        handle.remove()
    last = checkpoint.memory_layers[-1]
    # Two forward passes end a layer below the last memory layer: four references, two sequences. The last memory
    # layer is left before it ends, and above it nothing is run for references.
    assert [seen[place] for place in range(len(checkpoint.decoder.layers))] == [
        [4, 2] if place < last else [2] for place in range(len(checkpoint.decoder.layers))
    ]


def test_a_batch_without_references_reads_the_prefix_only_and_a_plain_one_not_even_that() -> None:
    checkpoint = make_checkpoint("llama")
    objective = LanguageObjective(checkpoint)
    batch = dataclasses.replace(
        make_memory_batch(), references=(), index_BCM=torch.full((2, 2, 5), -1), with_prefix=True
    )
    with torch.no_grad():
        with_prefix = objective.read(batch)
        plain = objective.read(dataclasses.replace(batch, with_prefix=False))
        expected_plain = checkpoint.decoder(input_ids=batch.tokens_BT).last_hidden_state
        expected, _ = read_sequences(checkpoint, batch.tokens_BT)
    torch.testing.assert_close(with_prefix, expected)
    torch.testing.assert_close(plain, expected_plain)
    assert (with_prefix - plain).abs().max() > 1e-2


def test_the_guard_follows_a_falling_loss_and_stops_leaps_and_what_is_no_number() -> None:
    guard = SpikeGuard(GuardConfig(num_deviations=8, num_first=20, max_in_row=3))
    noise = np.random.default_rng(0).normal(0, 0.1, 300)
    for step, wave in enumerate(noise):
        assert guard.accept(9.0 * math.exp(-step / 80) + 3 + wave)
    before = guard.to_json()
    assert not guard.accept(12.0)
    assert not guard.accept(math.inf)
    assert not guard.is_lost
    assert not guard.accept(math.nan)
    assert guard.is_lost
    assert guard.mean == before["mean"]
    assert guard.accept(3.1)
    assert not guard.is_lost
    assert guard.num_skipped == 3
    other = SpikeGuard(guard.config)
    other.restore(guard.to_json())
    assert other == guard


def test_early_losses_may_leap_but_must_be_numbers() -> None:
    guard = SpikeGuard(GuardConfig(num_first=10))
    assert guard.accept(2.0)
    assert guard.accept(50.0)
    assert not guard.accept(math.nan)


def test_weight_decay_is_for_matrices_and_frozen_parameters_are_left_out() -> None:
    checkpoint = make_checkpoint("llama")
    with pytest.raises(InputError, match=r"no parameter"):
        make_optimizer(checkpoint.model, OptimizerConfig())
    checkpoint.model.requires_grad_(True)
    checkpoint.head.requires_grad_(False)
    decayed, free = make_optimizer(checkpoint.model, OptimizerConfig(weight_decay=0.2)).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.2, 0.0)
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert all(parameter.ndim < 2 for parameter in free["params"])
    everything = [parameter for parameter in checkpoint.model.parameters() if parameter.requires_grad]
    assert len(decayed["params"]) + len(free["params"]) == len(everything)
