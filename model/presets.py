"""The published model shapes as transformers configurations.

Explicit memory adds no parameters, so a Memory³ model is an ordinary Llama decoder and a preset is nothing but its
shape. The paper's two shapes are in its section 5.1 and table 10; ``memory3_mini`` is the shape of the checkpoint that
comes with this project.
"""

from collections.abc import Callable

from transformers import LlamaConfig


def memory3_2b() -> LlamaConfig:
    """The paper's model: 2.4B parameters outside the embeddings, 44 layers of which the first 22 use memory."""
    config = LlamaConfig(
        vocab_size=60416,
        hidden_size=3200,
        intermediate_size=3200,
        num_hidden_layers=44,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=80,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        dtype="bfloat16",
    )
    config.num_memory_layers = 22
    return config


def memory3_0_9b() -> LlamaConfig:
    """The paper's smaller shape: 0.92B parameters outside the embeddings, 40 layers, the first 20 with memory."""
    config = LlamaConfig(
        vocab_size=60416,
        hidden_size=2048,
        intermediate_size=2048,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        dtype="bfloat16",
    )
    config.num_memory_layers = 20
    return config


def memory3_tiny() -> LlamaConfig:
    """A small shape with the paper's proportions: 6.6M parameters, 8 layers of which the first 4 use memory."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        dtype="float32",
    )
    config.num_memory_layers = 4
    return config


def memory3_mini() -> LlamaConfig:
    """The shape of the shipped checkpoint, for training on a CPU: 5.1M parameters, 8 layers, the first 4 with memory.

    Every head has keys and values of its own: with few layers, heads are what makes different tokens be kept. Half of
    the frequencies of RoPE hardly turn over a context, for heads that look for a match wherever it stands.
    """
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        dtype="float32",
    )
    config.num_memory_layers = 4
    return config


PRESETS: dict[str, Callable[[], LlamaConfig]] = {
    "tiny": memory3_tiny,
    "mini": memory3_mini,
    "0.9b": memory3_0_9b,
    "2.4b": memory3_2b,
}
"""The shapes by the names that commands know them by."""
