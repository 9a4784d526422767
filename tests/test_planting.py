"""The heads that copy, which a small model's first weights may have."""

import numpy as np
import pytest
import torch

from model.checkpoint import Checkpoint
from model.reading import read_sequences
from model.selecting import SelectionConfig
from model.training.planting import plant_copying
from model.training.starting import start_model
from model.writing import encode_references, pad_references
from schemas.errors import InputError
from tests.models import make_checkpoint


def start(*, planted: bool) -> Checkpoint:
    checkpoint = start_model("mini", tokenizer="memory3-tiny", seed=1)
    if planted:
        plant_copying(checkpoint, seed=2)
    checkpoint.model.eval()
    return checkpoint


@torch.no_grad()
def measure_copying(checkpoint: Checkpoint) -> tuple[float, float]:
    """Returns loss and share of right predictions of random tokens that are said again."""
    random = np.random.default_rng(0)
    losses, hits = [], []
    for _ in range(4):
        span = random.integers(6, 8192, 60)
        tokens = torch.from_numpy(np.concatenate(([1], np.tile(span, 3))))
        logits = checkpoint.model(tokens[None, :-1]).logits[0, 61:]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[62:]).item())
        hits.append((logits.argmax(-1) == tokens[62:]).float().mean().item())
    return float(np.mean(losses)), float(np.mean(hits))


def test_planted_heads_copy_random_tokens_before_any_training() -> None:
    loss, share = measure_copying(start(planted=False))
    assert loss > 8.9
    assert share < 0.01
    loss, share = measure_copying(start(planted=True))
    assert loss < 5.0
    assert share > 0.4


def test_planted_heads_read_memories_that_keep_all_tokens() -> None:
    """What copies from the context copies from a memory too: a text whose reference is read is less of a surprise."""
    checkpoint = start(planted=True)
    random = np.random.default_rng(1)
    text = random.integers(6, 8192, 64)
    reference = text.astype(np.int32)
    tokens = torch.from_numpy(np.concatenate(([1], text)))[None]
    with torch.no_grad():
        memories = encode_references(
            checkpoint, *pad_references([reference], checkpoint.device), SelectionConfig(num_slots=128)
        )
        chunk = torch.zeros_like(tokens[:, :-1])
        losses = []
        for index in (0, -1):
            hidden, _ = read_sequences(checkpoint, tokens[:, :-1], memories, torch.full((1, 1, 1), index), chunk)
            losses.append(torch.nn.functional.cross_entropy(checkpoint.head(hidden)[0, 2:], tokens[0, 3:]).item())
    assert losses[0] < losses[1] - 3.0


def test_what_is_not_planted_stays_as_it_was() -> None:
    plain, planted = start(planted=False), start(planted=True)
    changed = {
        name
        for (name, one), (_, other) in zip(
            plain.model.named_parameters(), planted.model.named_parameters(), strict=True
        )
        if not torch.equal(one, other)
    }
    attention = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(4) for name in "qkvo"]
    assert changed == {"model.embed_tokens.weight", *attention}
    of_layer_0 = planted.model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(of_layer_0[64:], plain.model.get_parameter("model.layers.0.self_attn.q_proj.weight")[64:])


def test_models_that_have_no_room_for_it_are_refused() -> None:
    with pytest.raises(InputError, match=r"cannot be planted"):
        plant_copying(make_checkpoint("llama", memory_layers=[1, 2]))
    with pytest.raises(InputError, match=r"cannot be planted"):
        plant_copying(make_checkpoint("llama", hidden_size=24, head_dim=16))
