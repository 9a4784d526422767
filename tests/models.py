"""Small random models of several architectures, as checkpoints, for the tests of model/."""

from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from model.checkpoint import Checkpoint, wrap_model
from model.tokenizing import CheckpointTokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}

CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE, head_dim=16),
    "llama-rope-scaled": lambda: LlamaConfig(
        **SHAPE,
        head_dim=8,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    ),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**SHAPE, sliding_window=160),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=160,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
}


def train_tokenizer(vocab_size: int = 512) -> CheckpointTokenizer:
    """Returns a byte-level BPE tokenizer trained on the language reference topics; token 1 is ``<s>``."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([topics[name] for name in sorted(topics)[:20]], trainer)
    return CheckpointTokenizer(bpe)


def make_checkpoint(name: str, *, seed: int = 0, **changes: Any) -> Checkpoint:
    """Returns a random checkpoint of an architecture, float32 and ready to infer, with larger weights than usual.

    The usual initialisation is so small that attention is almost uniform, which would hide errors in positions.
    """
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(6.0)
    return wrap_model(model, train_tokenizer(), bos_token_id=1)
