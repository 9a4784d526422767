"""The presets: the published sizes, counted on models that are built without memory."""

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.checkpoint import load_checkpoint
from model.locating import SHIPPED_MODEL
from model.planning import compute_costs, count_parameters, make_record_layout, paper_shape, shape_from_config
from model.presets import memory3_0_9b, memory3_2b, memory3_mini, memory3_tiny
from model.selecting import find_selection
from schemas.records import RecordLayout


def count_outside_embeddings(config: LlamaConfig) -> int:
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    named = model.named_parameters()
    return sum(value.numel() for name, value in named if "embed_tokens" not in name and "lm_head" not in name)


@pytest.mark.parametrize("config", [memory3_2b(), memory3_0_9b(), memory3_tiny()], ids=["2b", "0.9b", "tiny"])
def test_planning_counts_the_parameters_of_the_model(config: LlamaConfig) -> None:
    assert count_parameters(shape_from_config(config)) == count_outside_embeddings(config)


def test_published_sizes() -> None:
    assert 2.35e9 <= count_outside_embeddings(memory3_2b()) <= 2.45e9
    assert round(count_outside_embeddings(memory3_0_9b()) / 1e9, 2) == 0.92


@pytest.mark.parametrize("preset", [memory3_tiny, memory3_mini])
def test_small_shapes_have_the_size_their_docstrings_say(preset: Callable[[], LlamaConfig]) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(preset())
    millions = sum(value.numel() for value in model.parameters()) / 1e6
    assert f"{millions:.1f}M parameters" in str(preset.__doc__)


def test_the_shipped_checkpoint_has_the_shape_of_mini_and_says_what_its_memories_keep() -> None:
    config = load_checkpoint(SHIPPED_MODEL).config
    preset = memory3_mini()
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size", "num_memory_layers"):
        assert getattr(config, name) == getattr(preset, name)
    assert find_selection(config).num_slots == config.memory_selection["num_slots"]


def test_the_2b_preset_is_the_papers_shape() -> None:
    shape = shape_from_config(memory3_2b())
    assert shape == paper_shape()
    assert compute_costs(shape) == compute_costs(paper_shape())
    layout = RecordLayout(num_layers=22, num_kv_heads=8, num_slots=8, head_dim=80)
    assert make_record_layout(shape) == layout
    assert layout.payload_shape == (22, 2, 8, 8, 80)
    assert layout.payload_bytes == 450_560


@pytest.mark.parametrize(
    ("config", "payload_shape"), [(memory3_0_9b(), (20, 2, 8, 8, 64)), (memory3_tiny(), (4, 2, 2, 8, 32))]
)
def test_memories_of_the_smaller_presets(config: LlamaConfig, payload_shape: tuple[int, ...]) -> None:
    assert make_record_layout(shape_from_config(config)).payload_shape == payload_shape
