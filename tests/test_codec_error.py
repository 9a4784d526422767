"""The error of attention and the cost of key errors, against slow references in float64."""

from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoint import Checkpoint
from model.codec_error import Readings, collect_readings, measure_attention_error, measure_key_metric
from model.selecting import SelectionConfig
from model.writing import Memories, encode_references
from schemas.errors import InputError
from schemas.records import EMPTY_SLOT
from tests.models import make_checkpoint

NUM_SLOTS = 4


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return make_checkpoint("llama")


@pytest.fixture(scope="module")
def readings(checkpoint: Checkpoint) -> Readings:
    draw = np.random.default_rng(0)
    tokens = torch.from_numpy(draw.integers(3, 500, (5, 20)))
    valid = torch.arange(20) < torch.tensor([20, 20, 12, 3, 20])[:, None]  # one has fewer tokens than slots
    with torch.inference_mode():
        memories = encode_references(checkpoint, tokens, valid, SelectionConfig(num_slots=NUM_SLOTS))
    passages = [draw.integers(3, 500, 128), draw.integers(3, 500, 64)]
    indexes = [torch.tensor([[0, 1, 3], [4, 2, -1]]), torch.tensor([[3, -1, 0]])]
    return collect_readings(checkpoint, passages, memories, indexes)


def attend_slowly(
    checkpoint: Checkpoint, readings: Readings, memories: Memories, layer: int, chunk: int, head: int, query: int
) -> tuple[torch.Tensor, list[tuple[float, torch.Tensor, torch.Tensor, int]]]:
    """Returns the output of one query and, of each slot it sees: weight, value, key at its position, position."""
    slots = []
    vector = readings.queries_LCHQD[layer, chunk, head, query].double()
    for row in readings.index_CM[chunk].tolist():
        for slot in range(NUM_SLOTS if row >= 0 else 0):
            offset = int(memories.offsets_LBHS[layer, row, head, slot])
            if offset != EMPTY_SLOT:
                position = offset + len(checkpoint.prefix_token_ids)
                key = memories.keys_LBHSD[layer, row, head, slot]
                turned = (
                    checkpoint.rotaries[0].rotate(key[None, None, None], torch.tensor([position]))[0, 0, 0].double()
                )
                value = memories.values_LBHSD[layer, row, head, slot].double()
                slots.append((float(vector @ turned), value, turned, position))
    total = sum(np.exp(score) for score, *_ in slots)
    found = [(float(np.exp(score) / total), value, key, position) for score, value, key, position in slots]
    return sum((weight * value for weight, value, *_ in found), torch.zeros(16, dtype=torch.float64)), found


def change(memories: Memories) -> Memories:
    generator = torch.Generator().manual_seed(1)
    return Memories(
        keys_LBHSD=memories.keys_LBHSD + 0.1 * torch.randn(memories.keys_LBHSD.shape, generator=generator),
        values_LBHSD=memories.values_LBHSD * 1.1,
        offsets_LBHS=memories.offsets_LBHS,
    )


def test_the_queries_are_those_of_the_model(checkpoint: Checkpoint, readings: Readings) -> None:
    # In the first memory layer, the first of the model, a query depends on its token and its position only.
    draw = np.random.default_rng(0)
    draw.integers(3, 500, (5, 20))
    passage = torch.from_numpy(draw.integers(3, 500, 128))
    layer: Any = checkpoint.decoder.get_submodule("layers.0")
    hidden = layer.input_layernorm(checkpoint.decoder.embed_tokens(passage))
    query_NTD = layer.self_attn.q_proj(hidden).unflatten(-1, (8, 16)).transpose(0, 1)
    turned = checkpoint.rotaries[0].rotate(query_NTD[None], checkpoint.context_start + torch.arange(128))[0]
    right = (turned * checkpoint.attention_scaling).unflatten(0, (2, 4)).unflatten(2, (2, 64))
    assert torch.allclose(readings.queries_LCHQD[0, :2], right.permute(2, 0, 1, 3, 4).flatten(2, 3), atol=1e-4)
    assert readings.queries_LCHQD.shape == (2, 3, 2, 4 * 64, 16)


def test_the_error_is_that_of_slow_attention(checkpoint: Checkpoint, readings: Readings) -> None:
    part = Readings(
        queries_LCHQD=readings.queries_LCHQD[:, :, :, ::32], index_CM=readings.index_CM, memories=readings.memories
    )
    changed = change(part.memories)
    errors = total = 0.0
    for place in np.ndindex(*part.queries_LCHQD.shape[:-1]):
        right = attend_slowly(checkpoint, part, part.memories, *place)[0]
        found = attend_slowly(checkpoint, part, changed, *place)[0]
        errors += float((right - found).square().sum())
        total += float(right.square().sum())
    keys, values = changed.keys_LBHSD.transpose(0, 1), changed.values_LBHSD.transpose(0, 1)
    found_error = measure_attention_error(checkpoint, part, keys, values)
    assert found_error == pytest.approx((errors / total) ** 0.5, rel=1e-3)
    assert 0.01 < found_error < 1.0
    exact = part.memories
    same = measure_attention_error(
        checkpoint, part, exact.keys_LBHSD.transpose(0, 1), exact.values_LBHSD.transpose(0, 1)
    )
    assert same == 0.0


def test_the_metric_is_the_slow_sum(checkpoint: Checkpoint, readings: Readings) -> None:
    part = Readings(
        queries_LCHQD=readings.queries_LCHQD[:, :, :, ::64], index_CM=readings.index_CM, memories=readings.memories
    )
    _, num_chunks, _, _, size = part.queries_LCHQD.shape
    right = torch.zeros(2, 2, size, size, dtype=torch.float64)
    for layer, chunk, head, query in np.ndindex(*part.queries_LCHQD.shape[:-1]):
        output, slots = attend_slowly(checkpoint, part, part.memories, layer, chunk, head, query)
        vector = part.queries_LCHQD[layer, chunk, head, query]
        for weight, value, _, position in slots:
            back = checkpoint.rotaries[0].unrotate(vector[None, None, None], torch.tensor([position]))[0, 0, 0].double()
            cost = weight**2 * float((value - output).square().sum())
            right[layer, head] += cost * torch.outer(back, back) / num_chunks
    found = measure_key_metric(checkpoint, part).double()
    assert float((found - right).norm() / right.norm()) < 1e-3


def test_the_metric_foretells_the_error_of_small_changes_of_keys(checkpoint: Checkpoint, readings: Readings) -> None:
    one = Readings(
        queries_LCHQD=readings.queries_LCHQD[:, :1], index_CM=readings.index_CM[:1], memories=readings.memories
    )
    metric, memories = measure_key_metric(checkpoint, one).double(), one.memories
    generator = torch.Generator().manual_seed(0)
    measured = foretold = 0.0
    total = sum(
        float(attend_slowly(checkpoint, one, memories, *place)[0].square().sum())
        for place in np.ndindex(*one.queries_LCHQD.shape[:-1])
    )
    for _ in range(20):
        # Errors of a size, in every direction: their mean cost is that of the trace.
        errors = 1e-3 * torch.randn(memories.keys_LBHSD.shape, generator=generator)
        keys = (memories.keys_LBHSD + errors).transpose(0, 1)
        measured += measure_attention_error(checkpoint, one, keys, memories.values_LBHSD.transpose(0, 1)) ** 2 * total
        foretold += 1e-6 * float(metric.diagonal(dim1=-2, dim2=-1).sum())
    assert measured == pytest.approx(foretold, rel=0.3)


def test_a_context_is_made_of_whole_chunks(checkpoint: Checkpoint, readings: Readings) -> None:
    with pytest.raises(InputError, match="100 tokens, must be 64 for each of 2"):
        collect_readings(
            checkpoint, [np.arange(3, 103, dtype=np.int32)], readings.memories, [torch.zeros(2, 1, dtype=torch.int64)]
        )
