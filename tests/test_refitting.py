"""Fitted values against least squares in float64, on random tensors and on real text."""

import contextlib
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.config import load_config
from model.attention import LastMemoryLayerReached, WritingTap
from model.checkpoint import Checkpoint, load_checkpoint
from model.locating import SHIPPED_MODEL
from model.refitting import RIDGE, fit_weights, refit_values
from model.selecting import SelectionConfig, choose_tokens, find_selection, gather_slots
from model.writing import Memories, encode_references, pad_references
from schemas.errors import InputError
from schemas.protocols import IntArray
from schemas.records import EMPTY_SLOT
from tests.models import make_checkpoint


def attend_slowly(queries: np.ndarray, keys: np.ndarray, scaling: float) -> np.ndarray:
    products = queries.astype(np.float64) @ keys.astype(np.float64).T * scaling
    weights = np.exp(products - products.max(1, keepdims=True))
    attention: np.ndarray = weights / weights.sum(1, keepdims=True)
    return attention


def refit_slowly(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, kept: list[int], scaling: float
) -> np.ndarray:
    """Values of one head by least squares with the ridge as further rows; queries (Q, D), keys and values (T, D)."""
    wanted = attend_slowly(queries, keys, scaling) @ values
    attention = attend_slowly(queries, keys[kept], scaling)
    pull = RIDGE * np.square(attention).sum() / SLOTS
    rows = np.concatenate((attention, np.sqrt(pull) * np.eye(len(kept))))
    targets = np.concatenate((wanted, np.sqrt(pull) * values[kept]))
    fitted: np.ndarray = np.linalg.lstsq(rows, targets, rcond=None)[0]
    return fitted


SLOTS = 4


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(0, 10_000))
def test_random_tensors_equal_least_squares(length: int, groups: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    queries = torch.randn(2, 2, groups, length, 8, generator=random) * 2
    keys, values = (torch.randn(2, 2, length, 8, generator=random) for _ in range(2))
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, max(1, length // 2) :] = False
    selection = SelectionConfig(num_slots=SLOTS)
    offsets = choose_tokens(queries, keys, valid, scaling=8**-0.5, selection=selection)
    found = refit_values(queries, keys, values, valid, offsets, scaling=8**-0.5)
    for row in range(2):
        tokens = int(valid[row].sum())
        for head in range(2):
            kept = [offset for offset in offsets[row, head].tolist() if offset != EMPTY_SLOT]
            expected = refit_slowly(
                queries[row, head, :, :tokens].reshape(-1, 8).numpy(),
                keys[row, head, :tokens].numpy(),
                values[row, head, :tokens].double().numpy(),
                kept,
                8**-0.5,
            )
            np.testing.assert_allclose(found[row, head, : len(kept)].numpy(), expected, rtol=1e-3, atol=1e-4)
            assert not found[row, head, len(kept) :].any()


def test_a_reference_that_fits_into_the_slots_keeps_its_values() -> None:
    checkpoint = make_checkpoint("llama")
    tokens = [checkpoint.tokenizer.encode(["a short text of few words"])[0][:count] for count in (1, 5, 8)]
    padded, valid = pad_references(tokens, checkpoint.device)
    with torch.inference_mode():
        kept = encode_references(checkpoint, padded, valid, SelectionConfig())
        fitted = encode_references(checkpoint, padded, valid, SelectionConfig(refit=True))
    torch.testing.assert_close(fitted.values_LBHSD, kept.values_LBHSD, rtol=1e-4, atol=1e-4)


def capture_queries(checkpoint: Checkpoint, token_ids: IntArray) -> list[torch.Tensor]:
    """Returns the queries of a reference's tokens before RoPE in each memory layer, (H, G x T, D) float64."""
    tokens = torch.cat((checkpoint.prefix_token_ids, torch.from_numpy(token_ids).long()))[None]
    positions = torch.arange(tokens.shape[1])
    tap = WritingTap(memory_layers=checkpoint.memory_layers)
    with contextlib.suppress(LastMemoryLayerReached), torch.inference_mode():
        checkpoint.decoder(
            input_ids=tokens, position_ids=positions[None], attention_mask=torch.ones_like(tokens), memory3=tap
        )
    first = len(checkpoint.prefix_token_ids)
    undo = checkpoint.rotaries[0].unrotate
    queries = [undo(query, positions)[0, :, first:] for query, _, _ in tap.kept]
    return [query.unflatten(0, (checkpoint.num_kv_heads, -1)).flatten(1, 2).double() for query in queries]


@pytest.mark.parametrize("score", ["softmax", "residual"])
def test_slots_answer_the_queries_of_the_text_that_follows_better_and_keys_stay(score: str) -> None:
    checkpoint = load_checkpoint()
    text = checkpoint.tokenizer.encode([topics["typesseq-mutable"]])[0]
    padded, valid = pad_references([text[:128]], checkpoint.device)
    with torch.inference_mode():
        everything = encode_references(checkpoint, padded, valid, SelectionConfig(num_slots=128))
        kept = encode_references(checkpoint, padded, valid, SelectionConfig(score=score))
        fitted = encode_references(checkpoint, padded, valid, SelectionConfig(score=score, refit=True))
    assert torch.equal(kept.offsets_LBHS, fitted.offsets_LBHS)
    assert torch.equal(kept.keys_LBHSD, fitted.keys_LBHSD)
    for layer, queries in enumerate(capture_queries(checkpoint, text[128:256])):

        def answer(memories: Memories, layer: int = layer, queries: torch.Tensor = queries) -> torch.Tensor:
            keys, values = memories.keys_LBHSD[layer, 0].double(), memories.values_LBHSD[layer, 0].double()
            return (queries @ keys.mT * checkpoint.attention_scaling).softmax(-1) @ values

        wanted = answer(everything)
        assert (answer(fitted) - wanted).norm() < 0.9 * (answer(kept) - wanted).norm()


def test_a_reference_is_fitted_alike_alone_and_in_a_batch() -> None:
    checkpoint = make_checkpoint("qwen3")
    tokens = [checkpoint.tokenizer.encode([topics[name]])[0][:count] for name, count in (("with", 30), ("if", 100))]
    selection = SelectionConfig(refit=True)
    with torch.inference_mode():
        together = encode_references(checkpoint, *pad_references(tokens, checkpoint.device), selection)
        for row, ids in enumerate(tokens):
            alone = encode_references(checkpoint, *pad_references([ids], checkpoint.device), selection)
            assert torch.equal(alone.offsets_LBHS[:, 0], together.offsets_LBHS[:, row])
            torch.testing.assert_close(alone.values_LBHSD[:, 0], together.values_LBHSD[:, row], rtol=1e-3, atol=1e-3)


def test_gradients_flow_through_the_values_of_all_tokens_and_nothing_else() -> None:
    random = torch.Generator().manual_seed(3)
    queries = torch.randn(1, 2, 2, 12, 8, generator=random, requires_grad=True)
    keys, values = (torch.randn(1, 2, 12, 8, generator=random, requires_grad=True) for _ in range(2))
    valid = torch.ones(1, 12, dtype=torch.bool)
    offsets = torch.tensor([[[0, 3, 7], [1, 2, 11]]])
    cotangent = torch.randn(1, 2, 3, 8, generator=random)
    fitted = refit_values(queries, keys, values, valid, offsets, scaling=0.3)
    fitted.backward(cotangent)
    weights = fit_weights(queries, keys, valid, offsets, scaling=0.3)
    torch.testing.assert_close(values.grad, weights.mT @ cotangent)
    assert (values.grad.abs().sum(-1) > 0).all()  # type: ignore[union-attr]
    assert queries.grad is None
    assert keys.grad is None


def test_an_immense_ridge_leaves_the_kept_values() -> None:
    random = torch.Generator().manual_seed(4)
    queries, keys = torch.randn(1, 1, 2, 9, 8, generator=random), torch.randn(1, 1, 9, 8, generator=random)
    values, valid = torch.randn(1, 1, 9, 8, generator=random), torch.ones(1, 9, dtype=torch.bool)
    offsets = torch.tensor([[[1, 4, EMPTY_SLOT]]])
    weights = fit_weights(queries, keys, valid, offsets, scaling=0.3, ridge=1e9)
    torch.testing.assert_close(weights @ values, gather_slots(values, offsets))


def test_the_rule_is_named_only_where_it_is_used() -> None:
    assert SelectionConfig().to_json() == {"num_slots": 8, "score": "softmax"}
    assert SelectionConfig(refit=True).to_json() == {"num_slots": 8, "score": "softmax", "refit": True}


def test_a_file_of_settings_reaches_the_writer(tmp_path: Path) -> None:
    file = tmp_path / "build.yaml"
    file.write_text("memory: {refit: true, score: residual, dtype: float32}\n", encoding="utf-8")
    writer = load_config("tiny", file, {}).make_writer_factory()()
    assert writer.fingerprint.selection == {"num_slots": 32, "score": "residual", "refit": True}
    own = find_selection(load_checkpoint(SHIPPED_MODEL).config).to_json()
    assert load_config("tiny", None, {}).make_writer_factory()().fingerprint.selection == own
    file.write_text("memory: {refit: 'yes'}\n", encoding="utf-8")
    with pytest.raises(InputError, match="refit"):
        load_config("tiny", file, {})
