"""The rotation of each architecture, applied and undone; and architectures whose rotation cannot be undone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3TextConfig, GPT2Config, Llama4TextConfig, LlamaConfig

from model.attention import LastMemoryLayerReached, WritingTap
from model.checkpoint import Checkpoint, wrap_model
from model.rotary import Rotary, find_rotaries
from schemas.errors import InputError
from tests.models import CONFIGS, SHAPE, make_checkpoint, train_tokenizer

TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return make_checkpoint(request.param)


@pytest.fixture(params=[0, 1])
def rotary(checkpoint: Checkpoint, request: pytest.FixtureRequest) -> Rotary:
    """The rotation of the first and of the second layer, which differ in some models."""
    return checkpoint.rotaries[request.param]


def make_vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_positions(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2048, (count,), generator=torch.Generator().manual_seed(seed))


def rotate_slowly(vector: np.ndarray, position: float, theta: float) -> np.ndarray:
    """RoPE of one vector in float64: coordinates i and i + D/2 are one complex number that is turned."""
    half = len(vector) // 2
    turned = np.empty(len(vector))
    for place in range(half):
        angle = position * theta ** (-2 * place / len(vector))
        number = complex(vector[place], vector[place + half]) * complex(np.cos(angle), np.sin(angle))
        turned[place], turned[place + half] = number.real, number.imag
    return turned


def test_undoing_a_rotation_gives_the_vectors_back(checkpoint: Checkpoint, rotary: Rotary) -> None:
    vectors, positions = make_vectors(3, 2, 40, checkpoint.head_dim), make_positions(40)
    rotated = rotary.rotate(vectors, positions)
    assert rotated.shape == vectors.shape
    assert (rotated - vectors).abs().max() > 0.5
    torch.testing.assert_close(rotary.unrotate(rotated, positions), vectors, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(
        rotary.rotate(rotary.unrotate(vectors, positions), positions), vectors, rtol=TOLERANCE, atol=TOLERANCE
    )


def test_queries_and_keys_undone_together_equal_each_alone(checkpoint: Checkpoint, rotary: Rotary) -> None:
    queries, keys = make_vectors(3, 8, 40, checkpoint.head_dim), make_vectors(3, 2, 40, checkpoint.head_dim, seed=1)
    positions = make_positions(40)
    rotated = rotary.rotate(queries, positions), rotary.rotate(keys, positions)
    undone = rotary.unrotate_pair(*rotated, rotary.reverse_angles(keys, positions))
    for found, expected in zip(undone, (queries, keys), strict=True):
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_each_vector_rotated_at_once_equals_one_by_one(checkpoint: Checkpoint, rotary: Rotary) -> None:
    vectors, positions = make_vectors(25, checkpoint.head_dim), make_positions(25)
    together = rotary.rotate_each(vectors, positions)
    assert together.shape == vectors.shape
    for row in range(25):
        alone = rotary.rotate(vectors[row].view(1, 1, 1, -1), positions[row : row + 1])
        torch.testing.assert_close(together[row], alone.flatten(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("place", [0, 1])
def test_keys_of_the_model_unrotated_are_its_projections(checkpoint: Checkpoint, place: int) -> None:
    """What attention is handed in a layer, turned back, is what that layer projected, norms included."""
    tokens = torch.randint(3, 512, (2, 30), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(30) + 7
    tap = WritingTap(memory_layers=(place,))
    rotary, layer = checkpoint.rotaries[place], checkpoint.decoder.get_submodule(f"layers.{place}")
    normed: list[torch.Tensor] = []
    layer.input_layernorm.register_forward_hook(lambda _module, _inputs, output: normed.append(output))
    with torch.inference_mode():
        with pytest.raises(LastMemoryLayerReached):
            checkpoint.decoder(
                input_ids=tokens,
                position_ids=positions[None],
                attention_mask=torch.ones_like(tokens),
                use_cache=False,
                memory3=tap,
            )
        hidden = normed[0]
        ((query, key, _),) = tap.kept
        for name, rotated in (("q", query), ("k", key)):
            projected = getattr(layer.self_attn, f"{name}_proj")(hidden).unflatten(-1, (-1, checkpoint.head_dim))
            norm = getattr(layer.self_attn, f"{name}_norm", torch.nn.Identity())
            expected = norm(projected).transpose(1, 2)
            torch.testing.assert_close(rotary.unrotate(rotated, positions), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(rotary.rotate(expected, positions), rotated, rtol=1e-4, atol=1e-4)
            assert (rotated - expected).abs().max() > 0.5


@given(seed=st.integers(0, 999), head_dim=st.sampled_from([8, 16, 80]), theta=st.sampled_from([1e4, 5e5]))
def test_plain_rope_equals_turning_complex_numbers(seed: int, head_dim: int, theta: float) -> None:
    rotary = make_llama_rotary(head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta})
    vectors, positions = make_vectors(6, head_dim, seed=seed), make_positions(6, seed)
    expected = [
        rotate_slowly(vector, int(position), theta)
        for vector, position in zip(vectors.numpy().astype(np.float64), positions, strict=True)
    ]
    # Angles are float32 in the model: at position 2048 they are off by up to 1e-4.
    np.testing.assert_allclose(rotary.rotate_each(vectors, positions).numpy(), np.stack(expected), atol=2e-3)


def make_llama_rotary(**changes: Any) -> Rotary:
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": 1, **changes})
    return Rotary(AutoModelForCausalLM.from_config(config).get_submodule("model"))


def test_the_place_of_a_yarn_rotation_and_its_scaling_are_both_undone() -> None:
    """YaRN makes vectors longer as well; a plain rotation does not."""
    vectors, positions = make_vectors(1, 1, 9, 8), make_positions(9)
    lengths = vectors.norm(dim=-1)
    yarn, plain = make_checkpoint("llama-rope-scaled").rotaries[0], make_llama_rotary(head_dim=8)
    factor = 0.1 * float(np.log(4.0)) + 1.0
    torch.testing.assert_close(yarn.rotate(vectors, positions).norm(dim=-1), lengths * factor, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(yarn.unrotate(vectors, positions).norm(dim=-1), lengths / factor, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain.rotate(vectors, positions).norm(dim=-1), lengths, rtol=1e-4, atol=1e-4)


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 512,
}


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3])
def test_scalings_of_fixed_angles_are_taken(rope: dict[str, Any]) -> None:
    rotary, plain = make_llama_rotary(head_dim=8, rope_parameters=rope), make_llama_rotary(head_dim=8)
    vectors, positions = make_vectors(1, 1, 9, 8), make_positions(9)
    rotated = rotary.rotate(vectors, positions)
    assert (rotated - plain.rotate(vectors, positions)).abs().max() > 0.1
    torch.testing.assert_close(rotary.unrotate(rotated, positions), vectors, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE])
def test_angles_that_depend_on_the_length_are_refused(rope: dict[str, Any]) -> None:
    message = f"LlamaModel uses {rope['rope_type']} RoPE, whose angles depend on the length of the input"
    with pytest.raises(InputError, match=message):
        make_llama_rotary(head_dim=8, rope_parameters=rope)


def make_gpt2() -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    )
    return model


def make_gemma3(**changes: Any) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_config(Gemma3TextConfig(**SHAPE, head_dim=8, **changes))
    return model


def make_llama4() -> torch.nn.Module:
    config = Llama4TextConfig(**SHAPE, head_dim=8, bos_token_id=1, eos_token_id=2)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def test_a_model_without_rope_is_refused() -> None:
    with pytest.raises(InputError, match="GPT2Model is not a RoPE decoder of transformers; use Llama"):
        Rotary(make_gpt2().get_submodule("transformer"))


def test_a_model_with_a_rotation_of_its_own_is_refused() -> None:
    with pytest.raises(InputError, match="Llama4TextModel has no apply_rotary_pos_emb"):
        Rotary(make_llama4().get_submodule("model"))


def test_a_model_with_two_rotations_has_one_for_each_kind_of_layer() -> None:
    checkpoint = make_checkpoint("gemma3")
    windowed, full, *others = checkpoint.rotaries
    assert others == [windowed, full]
    vectors, positions = make_vectors(6, checkpoint.head_dim), make_positions(6)
    for rotary, theta, factor in ((windowed, 100.0, 1.0), (full, 10000.0, 4.0)):
        expected = [
            rotate_slowly(vector, int(position) / factor, theta)
            for vector, position in zip(vectors.numpy().astype(np.float64), positions, strict=True)
        ]
        np.testing.assert_allclose(rotary.rotate_each(vectors, positions).numpy(), np.stack(expected), atol=2e-3)


def test_a_model_with_two_rotations_has_no_single_one() -> None:
    with pytest.raises(InputError, match="Gemma3TextModel has no rotation for layers of type None"):
        Rotary(make_gemma3().get_submodule("model"))


def test_angles_of_one_kind_of_layer_that_depend_on_the_length_are_refused() -> None:
    plain = {"rope_type": "default", "rope_theta": 1e4}
    rope = {"sliding_attention": plain, "full_attention": DYNAMIC}
    model = make_gemma3(rope_parameters=rope, layer_types=["sliding_attention", "full_attention"] * 2)
    with pytest.raises(InputError, match="Gemma3TextModel uses dynamic RoPE"):
        find_rotaries(model.get_submodule("model"))


@pytest.mark.parametrize(
    ("changes", "effect"),
    [
        ({"attn_logit_softcapping": 50.0}, "caps its attention scores"),
        ({"final_logit_softcapping": 30.0}, "caps its logits"),
        ({"use_bidirectional_attention": True}, "lets tokens see those after them"),
    ],
)
def test_a_model_that_computes_otherwise_is_refused(changes: dict[str, Any], effect: str) -> None:
    with pytest.raises(InputError, match=f"Gemma3ForCausalLM {effect}"):
        wrap_model(make_gemma3(**changes), train_tokenizer(), bos_token_id=1)


def test_a_model_of_text_and_images_is_refused() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config={**SHAPE, "head_dim": 8}, vision_config={**vision, "image_size": 56})
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="Gemma3ForConditionalGeneration is more than a language model; save its text"):
        wrap_model(model, train_tokenizer(), bos_token_id=1)


@pytest.mark.parametrize(
    "make_model",
    [
        make_gpt2,
        make_llama4,
    ],
)
def test_such_a_model_becomes_no_checkpoint(make_model: Callable[[], torch.nn.Module]) -> None:
    with pytest.raises(InputError, match="use Llama|not supported"):
        wrap_model(make_model(), train_tokenizer(), bos_token_id=1)
