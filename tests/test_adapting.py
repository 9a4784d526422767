"""Adapting a model that exists: which layers write and read, adapters, and models with two rotations."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.checkpoint import Checkpoint, find_memory_layers, load_checkpoint
from model.memory_layers import choose_memory_layers, parse_memory_layers
from model.planning import shape_from_config
from model.selecting import SelectionConfig
from model.training.adapting import AdapterConfig, add_adapter, load_adapter, merge_adapter, save_adapter
from model.training.batches import TrainingBatch, index_memories
from model.training.objective import LanguageObjective
from model.writing import ReferenceWriter
from schemas.errors import InputError
from tests.models import make_checkpoint
from tests.test_exactness import make_tokens

ARCHITECTURES = ("llama", "qwen3", "gemma3")


def make_batch() -> TrainingBatch:
    """Two sequences of two chunks that read three references."""
    tokens = make_tokens(2, 129)
    return TrainingBatch(
        tokens_BT=tokens[:, :-1],
        targets_BT=tokens[:, 1:],
        references=[make_tokens(length, seed=length).numpy() for length in (40, 20, 30)],
        index_BCM=index_memories(torch.tensor([[0, 1], [2, 0]]), 2),
        chunk_of_token_BT=(torch.arange(128) // 64).expand(2, -1),
    )


def fingerprint(checkpoint: Checkpoint) -> Any:
    return ReferenceWriter(checkpoint).fingerprint


def save(checkpoint: Checkpoint, folder: Path) -> Path:
    checkpoint.config.bos_token_id = 1
    checkpoint.model.save_pretrained(folder)  # type: ignore[operator]
    checkpoint.tokenizer._tokenizer.save(str(folder / "tokenizer.json"))
    return folder


# Memory layers --------------------------------------------------------------------------------------------------------


@given(num_layers=st.integers(1, 100))
def test_named_choices_are_half_of_the_layers_from_the_start_and_from_a_quarter_of_the_depth(num_layers: int) -> None:
    first, middle = (parse_memory_layers(choice, num_layers) for choice in ("first-half", "middle"))
    assert first == tuple(range(max(1, num_layers // 2)))
    assert len(middle) == len(first)
    assert abs(middle[0] - num_layers / 4) < 1
    assert middle == tuple(range(middle[0], middle[0] + len(middle)))
    assert middle[-1] < num_layers


@given(layers=st.sets(st.integers(0, 43), min_size=1))
def test_a_list_names_layers_and_ranges(layers: set[int]) -> None:
    written, last = list[str](), -2
    for layer in sorted(layers):
        if layer == last + 1:
            written[-1] = f"{written[-1].split('-')[0]}-{layer}"
        else:
            written.append(str(layer))
        last = layer
    assert parse_memory_layers(",".join(written), 44) == tuple(sorted(layers))
    assert parse_memory_layers(" , ".join(reversed(written)), 44) == tuple(sorted(layers))


@pytest.mark.parametrize("choice", ["", "last-half", "1,", "1-", "-1", "1.5", "3-1", "0-8", "8", "٣", "1--2"])
def test_other_choices_are_refused(choice: str) -> None:
    with pytest.raises(InputError, match="memory layers are"):
        parse_memory_layers(choice, 8)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_choice_is_part_of_the_saved_model(name: str, tmp_path: Path) -> None:
    chosen = choose_memory_layers(make_checkpoint(name), "1,3")
    assert chosen.memory_layers == (1, 3)
    loaded = load_checkpoint(str(save(chosen, tmp_path)))
    assert loaded.memory_layers == find_memory_layers(loaded.config) == shape_from_config(loaded.config).memory_layers
    assert loaded.memory_layers == (1, 3)
    assert fingerprint(loaded) == fingerprint(chosen) != fingerprint(make_checkpoint(name))
    assert fingerprint(loaded).memory_layers == [1, 3]


def test_a_choice_replaces_a_number_of_layers(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", num_memory_layers=1)
    assert checkpoint.memory_layers == (0,)
    loaded = load_checkpoint(str(save(choose_memory_layers(checkpoint, "first-half"), tmp_path)))
    assert loaded.memory_layers == (0, 1)
    assert not hasattr(loaded.config, "num_memory_layers")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_reach_the_writer_in_chosen_layers_only(name: str) -> None:
    checkpoint = choose_memory_layers(make_checkpoint(name), "1,2")
    checkpoint.model.requires_grad_(True)
    objective = LanguageObjective(checkpoint)
    with_memory, without = make_batch(), make_batch()
    object.__setattr__(without, "index_BCM", torch.full_like(without.index_BCM, -1))
    gradients = []
    for batch in (with_memory, without):
        checkpoint.model.zero_grad()
        objective(batch).backward()
        gradients.append([layer.self_attn.k_proj.weight.grad.clone() for layer in checkpoint.decoder.layers])
    assert all((one - other).abs().max() > 1e-4 for one, other in zip(*gradients, strict=True))


# Adapters -------------------------------------------------------------------------------------------------------------


def train(checkpoint: Checkpoint, num_steps: int = 3) -> list[float]:
    objective = LanguageObjective(checkpoint).train()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = objective(make_batch()) / 256
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    objective.eval()
    return losses


def read_hidden(checkpoint: Checkpoint) -> torch.Tensor:
    with torch.no_grad():
        return LanguageObjective(checkpoint).read(make_batch())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_begins_as_nothing_and_is_all_that_is_trained(name: str) -> None:
    checkpoint = make_checkpoint(name)
    before, hidden = copy.deepcopy(checkpoint.model.state_dict()), read_hidden(checkpoint)
    add_adapter(checkpoint, AdapterConfig(rank=4))
    torch.testing.assert_close(read_hidden(checkpoint), hidden)

    losses = train(checkpoint)
    assert losses[-1] < losses[0] - 0.1
    trained = {name for name, parameter in checkpoint.model.named_parameters() if parameter.grad is not None}
    everywhere = [f"layers.{layer}.{part}_proj" for layer in range(4) for part in ("self_attn.q", "mlp.down")]
    assert all(any(f"{place}.lora_A" in name for name in trained) for place in everywhere)
    assert all(".lora_" in name for name in trained)
    after = checkpoint.model.state_dict()
    for key, value in before.items():
        parts = key.rsplit(".", 1)
        assert torch.equal(value, after.get(key, after.get(f"{parts[0]}.base_layer.{parts[1]}")))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_merged_adapter_is_a_plain_model_that_computes_the_same(name: str, tmp_path: Path) -> None:
    checkpoint, plain = make_checkpoint(name), make_checkpoint(name)
    adapter = add_adapter(checkpoint, AdapterConfig(rank=4))
    train(checkpoint)
    unmerged, beside = read_hidden(checkpoint), fingerprint(checkpoint)
    assert merge_adapter(adapter) is checkpoint.model
    torch.testing.assert_close(read_hidden(checkpoint), unmerged, rtol=1e-4, atol=1e-4)
    assert (unmerged - read_hidden(plain)).abs().max() > 0.05

    assert checkpoint.model.state_dict().keys() == plain.model.state_dict().keys()
    assert len({str(fingerprint(one).weights) for one in (checkpoint, plain)} | {beside.weights}) == 3
    loaded = load_checkpoint(str(save(checkpoint, tmp_path)))
    assert fingerprint(loaded) == fingerprint(checkpoint)
    torch.testing.assert_close(read_hidden(loaded), unmerged, rtol=1e-4, atol=1e-4)


def test_an_adapter_saved_alone_gives_the_merged_model_and_is_small(tmp_path: Path) -> None:
    checkpoint, other = make_checkpoint("llama"), make_checkpoint("llama")
    adapter = add_adapter(checkpoint, AdapterConfig(rank=1, modules=("q_proj", "v_proj")))
    train(checkpoint)
    save_adapter(adapter, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 10_000
    merge_adapter(adapter)
    load_adapter(other, tmp_path)
    torch.testing.assert_close(read_hidden(other), read_hidden(checkpoint))
    assert fingerprint(other) == fingerprint(checkpoint)
    with pytest.raises(InputError, match="no adapter for this model"):
        load_adapter(make_checkpoint("qwen3", seed=1, hidden_size=32), tmp_path)
    with pytest.raises(InputError, match="has no adapter_config.json"):
        load_adapter(other, tmp_path / "nowhere")


def test_the_seed_of_an_adapter_is_all_that_it_is_drawn_from() -> None:
    drawn = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        checkpoint = make_checkpoint("llama")
        torch.manual_seed(noise)
        add_adapter(checkpoint, AdapterConfig(seed=seed))
        drawn.append(checkpoint.decoder.get_parameter("layers.0.self_attn.q_proj.lora_A.default.weight"))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rank": 0}, "rank is 0"), ({"alpha": 0.0}, "alpha is 0.0"), ({"modules": ("c_attn",)}, "modules is")],
)
def test_settings_out_of_bounds_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        add_adapter(make_checkpoint("llama"), AdapterConfig(**changes))


# Two rotations --------------------------------------------------------------------------------------------------------


def scale_frequencies(checkpoint: Checkpoint) -> None:
    checkpoint.decoder.rotary_emb.full_attention_inv_freq.mul_(0.5)


def change_base(checkpoint: Checkpoint) -> None:
    checkpoint.config.rope_parameters["sliding_attention"]["rope_theta"] = 500.0


def swap_kinds(checkpoint: Checkpoint) -> None:
    checkpoint.config.layer_types = list(reversed(checkpoint.config.layer_types))


@pytest.mark.parametrize("change", [scale_frequencies, change_base, swap_kinds])
def test_each_rotation_is_part_of_the_fingerprint(change: Callable[[Checkpoint], None]) -> None:
    checkpoint = make_checkpoint("gemma3")
    writer = ReferenceWriter(checkpoint, SelectionConfig())
    before = writer.fingerprint
    assert before.rope == fingerprint(make_checkpoint("gemma3")).rope
    assert writer.fingerprint is before
    change(checkpoint)
    assert writer.fingerprint.rope != before.rope
    assert writer.fingerprint.weights == before.weights


def test_memories_of_a_model_with_two_rotations_survive_saving(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("gemma3")
    loaded = load_checkpoint(str(save(checkpoint, tmp_path)))
    assert fingerprint(loaded) == fingerprint(checkpoint)
    reference = make_tokens(60).numpy()
    written = [ReferenceWriter(one).write([reference]) for one in (checkpoint, loaded)]
    assert (written[0].payload == written[1].payload).all()
