"""The paper's sparsification against a brute-force reference in float64, on random and on real text."""

import dataclasses
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from model.checkpoint import load_checkpoint
from model.selecting import (
    SCORES,
    SMALLEST_RESIDUAL,
    STEPS_PER_E,
    SelectionConfig,
    find_selection,
    gather_slots,
    record_selection,
    score_tokens,
    select_offsets,
    select_residual,
    weigh_tokens,
)
from model.writing import encode_references, pad_references
from schemas.errors import InputError
from schemas.records import EMPTY_SLOT
from tests.models import CONFIGS, make_checkpoint


def score_slowly(queries: np.ndarray, keys: np.ndarray, valid: np.ndarray, scaling: float) -> np.ndarray:
    """Received attention of one reference and KV head in float64, loop by loop; queries (groups, T, D), keys (T, D)."""
    groups, length, _ = queries.shape
    received = np.zeros(length)
    tokens = [place for place in range(length) if valid[place]]
    for group in range(groups):
        for i in tokens:
            products = np.array(
                [float(np.dot(queries[group, i].astype(np.float64), keys[j])) * scaling for j in tokens]
            )
            weights = np.exp(products - products.max())
            for j, weight in zip(tokens, weights / weights.sum(), strict=True):
                received[j] += weight
    return received


def select_slowly(received: np.ndarray, valid: np.ndarray, num_slots: int) -> list[int]:
    tokens = [place for place in range(len(received)) if valid[place]]
    ranked = sorted(tokens, key=lambda place: (-received[place], place))
    return sorted(ranked[:num_slots]) + [EMPTY_SLOT] * max(0, num_slots - len(tokens))


def assert_same_choice(kept: list[int], expected: list[int], received: np.ndarray) -> None:
    """Equal, or different only between tokens whose scores are so close that the earlier one wins."""
    for left, right in zip(sorted(set(kept) - set(expected)), sorted(set(expected) - set(kept)), strict=True):
        assert abs(received[left] - received[right]) <= received[right] * 2 / STEPS_PER_E


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(1, 9), st.integers(0, 10_000))
def test_random_tensors_equal_brute_force(length: int, groups: int, num_slots: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    queries = torch.randn(2, 2, groups, length, 8, generator=random) * 2
    keys = torch.randn(2, 2, length, 8, generator=random) * 2
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, max(1, length // 2) :] = False
    scores = score_tokens(queries, keys, valid, scaling=8**-0.5, score="softmax")
    kept = select_offsets(scores, num_slots)
    for row in range(2):
        for head in range(2):
            received = score_slowly(queries[row, head].numpy(), keys[row, head].numpy(), valid[row].numpy(), 8**-0.5)
            tokens = valid[row].numpy()
            np.testing.assert_allclose(scores[row, head].numpy()[tokens], received[tokens], rtol=1e-4, atol=1e-5)
            expected = select_slowly(received, tokens, num_slots)
            assert_same_choice(kept[row, head].tolist(), expected, received)


def capture_unrotated(name: str, token_ids: list[int]) -> tuple[list[np.ndarray], list[np.ndarray], float]:
    """Returns queries and keys of one reference before RoPE, by hooks on the projections of the eager model."""
    checkpoint = make_checkpoint(name)
    tokens = torch.tensor([[*checkpoint.prefix_token_ids.tolist(), *token_ids]])
    num_prefix = len(checkpoint.prefix_token_ids)
    queries: list[np.ndarray] = []
    keys: list[np.ndarray] = []

    def keep(into: list[np.ndarray]) -> object:
        def hook(_module: object, _inputs: object, output: torch.Tensor) -> None:
            num_tokens = tokens.shape[1]
            # Most architectures have the tokens before the heads here, some after them.
            is_by_head = output.ndim == 4 and output.shape[2] == num_tokens
            heads = output[0] if is_by_head else output.reshape(num_tokens, -1, checkpoint.head_dim).transpose(0, 1)
            into.append(heads[:, num_prefix:].double().numpy())

        return hook

    checkpoint.model.set_attn_implementation("eager")  # type: ignore[operator]
    for layer in checkpoint.decoder.layers:  # type: ignore[union-attr]
        attention = layer.self_attn
        named = getattr(attention, "q_norm", attention.q_proj), getattr(attention, "k_norm", attention.k_proj)
        named[0].register_forward_hook(keep(queries))
        named[1].register_forward_hook(keep(keys))
    with torch.inference_mode():
        checkpoint.model(tokens)
    return queries, keys, checkpoint.attention_scaling


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_real_text_keeps_what_brute_force_keeps(name: str) -> None:
    checkpoint = make_checkpoint(name)
    token_ids = checkpoint.tokenizer.encode([topics["assert"]])[0][:40]
    padded, valid = pad_references([token_ids, token_ids[:7]], checkpoint.device)
    with torch.inference_mode():
        memories = encode_references(checkpoint, padded, valid, SelectionConfig())
    queries, keys, scaling = capture_unrotated(name, token_ids.tolist())
    for layer in range(len(checkpoint.memory_layers)):
        layer_queries = queries[layer].reshape(checkpoint.num_kv_heads, -1, *queries[layer].shape[1:])
        for head in range(checkpoint.num_kv_heads):
            everything = np.ones(len(token_ids), dtype=bool)
            received = score_slowly(layer_queries[head], keys[layer][head], everything, scaling)
            kept = memories.offsets_LBHS[layer, 0, head].tolist()
            assert_same_choice(kept, select_slowly(received, everything, 8), received)
            stored = memories.keys_LBHSD[layer, 0, head].numpy()
            np.testing.assert_allclose(stored, keys[layer][head][kept], rtol=1e-3, atol=1e-3)


def test_shipped_model_on_real_text_keeps_what_brute_force_keeps() -> None:
    checkpoint = load_checkpoint()
    token_ids = checkpoint.tokenizer.encode([topics["with"]])[0][:128]
    padded, valid = pad_references([token_ids], checkpoint.device)
    with torch.inference_mode():
        full = encode_references(checkpoint, padded, valid, SelectionConfig(num_slots=128))
        kept = encode_references(checkpoint, padded, valid, SelectionConfig())
    for layer in range(len(checkpoint.memory_layers)):
        assert full.offsets_LBHS[layer, 0, 0].tolist()[: len(token_ids)] == list(range(len(token_ids)))
        for head in range(checkpoint.num_kv_heads):
            offsets = kept.offsets_LBHS[layer, 0, head]
            assert torch.equal(kept.keys_LBHSD[layer, 0, head], full.keys_LBHSD[layer, 0, head][offsets])


def test_prefix_and_padding_take_no_part() -> None:
    checkpoint = make_checkpoint("llama")
    short = checkpoint.tokenizer.encode(["a b c"])[0][:5]
    padded, valid = pad_references([short, np.arange(3, 60, dtype=np.int32)], checkpoint.device)
    with torch.inference_mode():
        memories = encode_references(checkpoint, padded, valid, SelectionConfig())
    for offsets in memories.offsets_LBHS[:, 0].reshape(-1, 8).tolist():
        assert offsets == [*range(len(short)), *[EMPTY_SLOT] * (8 - len(short))]
    assert not memories.keys_LBHSD[:, 0, :, len(short) :].any()


def test_exp_score_sums_unnormalised_attention() -> None:
    random = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(1, 1, 2, 6, 4, generator=random), torch.randn(1, 1, 6, 4, generator=random)
    valid = torch.ones(1, 6, dtype=torch.bool)
    scores = score_tokens(queries, keys, valid, scaling=0.5, score="exp")[0, 0].double()
    products = torch.einsum("gid,jd->gij", queries[0, 0].double(), keys[0, 0].double()) * 0.5
    expected = products.exp().sum((0, 1))
    torch.testing.assert_close(scores / scores.sum(), expected / expected.sum(), rtol=1e-5, atol=1e-6)


def test_exp_selection_ranks_small_scores_and_ignores_padding() -> None:
    random = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(1, 1, 1, 40, 8, generator=random) * 4, torch.randn(1, 1, 40, 8, generator=random) * 4
    valid = torch.ones(1, 40, dtype=torch.bool)
    sums = torch.einsum("id,jd->ij", queries[0, 0, 0].double(), keys[0, 0].double()).mul(8**-0.5).exp().sum(0)
    expected = sorted(sums.argsort(descending=True)[:8].tolist())
    assert select_offsets(score_tokens(queries, keys, valid, scaling=8**-0.5, score="exp"), 8).tolist() == [[expected]]

    padded = (
        torch.nn.functional.pad(queries, (0, 0, 0, 9), value=50.0),
        torch.nn.functional.pad(keys, (0, 0, 0, 9), value=50.0),
    )
    longer = torch.nn.functional.pad(valid, (0, 9))
    assert select_offsets(score_tokens(*padded, longer, scaling=8**-0.5, score="exp"), 8).tolist() == [[expected]]


def test_ties_go_to_the_earlier_token_and_slots_ascend() -> None:
    scores = torch.tensor([[[1.0, 2.0, 2.0, 1.0, 2.0 + 1e-5]]])
    assert select_offsets(scores, 2).tolist() == [[[1, 2]]]
    vectors = torch.arange(5.0)[None, None, :, None].expand(1, 1, 5, 3)
    assert gather_slots(vectors, torch.tensor([[[1, 4, EMPTY_SLOT]]]))[0, 0, :, 0].tolist() == [1.0, 4.0, 0.0]


@pytest.mark.parametrize("changes", [{"num_slots": 0}, {"num_slots": 129}, {"score": "max"}])
def test_bad_rules_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        SelectionConfig(**changes)  # type: ignore[arg-type]


def select_residual_slowly(weights: np.ndarray, num_slots: int) -> list[int]:
    """Greedy choice of columns by projection in float64, scores compared in the same steps; weights (Q, T)."""
    floor = np.square(weights).sum(0).max() * SMALLEST_RESIDUAL
    chosen: list[int] = []
    for _ in range(min(num_slots, weights.shape[1])):
        left = weights
        if chosen:
            left = weights - weights[:, chosen] @ np.linalg.lstsq(weights[:, chosen], weights, rcond=None)[0]
        steps = np.round(np.log(np.maximum(np.square(left).sum(0), floor)) * STEPS_PER_E)
        steps[chosen] = -np.inf
        chosen.append(int(steps.argmax()))
    return sorted(chosen) + [EMPTY_SLOT] * max(0, num_slots - weights.shape[1])


@pytest.mark.parametrize("seed", range(8))
def test_residual_selection_equals_projecting_column_by_column(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    length = 5 + 3 * seed
    queries = torch.randn(2, 2, 2, length, 8, generator=random) * 2
    keys = torch.randn(2, 2, length, 8, generator=random) * 2
    keys[:, :, 2] = keys[:, :, 0]
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, 4:] = False
    weights = weigh_tokens(queries, keys, valid, scaling=8**-0.5)
    kept = select_residual(weights, valid, 6)
    for row in range(2):
        tokens = int(valid[row].sum())
        for head in range(2):
            products = torch.einsum("gid,jd->gij", queries[row, head, :, :tokens], keys[row, head, :tokens]).double()
            exact = (products * 8**-0.5).softmax(-1).flatten(0, 1).numpy()
            found = weights[row, head].unflatten(0, (2, length))[:, :tokens, :tokens].flatten(0, 1)
            np.testing.assert_allclose(found.numpy(), exact, rtol=1e-4, atol=1e-6)
            assert kept[row, head].tolist() == select_residual_slowly(exact, 6)
    assert not weights[1, :, :, 4:].any()
    assert not weights[1].unflatten(1, (2, length))[:, :, 4:].any()


def test_residual_selection_keeps_a_word_once_where_the_paper_keeps_it_often() -> None:
    """In the first layer equal tokens have equal keys: what the second would add is nothing."""
    checkpoint = load_checkpoint()
    token_ids = checkpoint.tokenizer.encode([topics["with"]])[0][:128]
    padded, valid = pad_references([token_ids], checkpoint.device)
    repeated = {}
    for score in ("softmax", "residual"):
        with torch.inference_mode():
            memories = encode_references(checkpoint, padded, valid, SelectionConfig(score=score))
        of_heads = [token_ids[offsets] for offsets in memories.offsets_LBHS[0, 0].numpy()]
        repeated[score] = sum(8 - len(set(tokens.tolist())) for tokens in of_heads)
    assert repeated["softmax"] > repeated["residual"] == 0


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"num_slots": 0}, "num_slots is 0"),
        ({"num_slots": "8"}, "a number"),
        ({"num_slots": None}, "a number"),
        ({"slots": 4}, "must be of num_slots"),
        ("residual", "must be of num_slots"),
    ],
)
def test_a_rule_that_a_model_cannot_mean_is_refused(named: object, words: str) -> None:
    config = LlamaConfig.from_dict({"memory_selection": named})
    with pytest.raises(InputError, match=words):
        find_selection(config)


@given(num_slots=st.integers(1, 128), score=st.sampled_from(SCORES), refit=st.booleans(), other=st.integers(1, 128))
def test_a_model_remembers_the_rule_it_was_trained_with(num_slots: int, score: str, refit: bool, other: int) -> None:
    config = LlamaConfig()
    assert find_selection(config) == SelectionConfig()
    rule = SelectionConfig(num_slots=num_slots, score=score, refit=refit)
    record_selection(config, rule)
    again = LlamaConfig.from_dict(config.to_dict())
    assert find_selection(again) == rule
    assert find_selection(again, num_slots=other) == dataclasses.replace(rule, num_slots=other)
