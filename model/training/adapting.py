"""Low-rank adapters (LoRA) beside the weights of a checkpoint: continual training where full training is too dear.

peft puts an adapter beside every matrix of attention and MLP, in place: the model stays of its class, so that writing,
reading and objectives find its parts as ever, and only the adapters are trained. Afterwards they are merged into the
weights, which leaves a plain checkpoint, or saved alone, some thousandth of its size.

A model with an adapter has another fingerprint than without (:mod:`model.checkpoint`): banks have to be migrated.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from model.checkpoint import Checkpoint
from schemas.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel

ALL_MATRICES = "all-linear"
"""peft's name for all matrices but the output head: those of attention and MLP, whatever an architecture calls them."""

ADAPTER_CONFIG = "adapter_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Settings of an adapter.

    Attributes:
        rank: columns of the two thin matrices whose product is added to a weight.
        alpha: the product is multiplied by alpha / rank.
        modules: names of the matrices that get an adapter, such as ``q_proj``; none for all of attention and MLP.
        seed: seed of the first of the two matrices; the second begins as zeros, so that training begins at the model.
    """

    rank: int = 16
    alpha: float = 32.0
    modules: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a rank below 1 or a factor that is not positive.
        """
        if self.rank < 1:
            raise InputError(f"adapter: rank is {self.rank}, must be at least 1")
        if not self.alpha > 0:
            raise InputError(f"adapter: alpha is {self.alpha}, must be greater than 0")


def add_adapter(checkpoint: Checkpoint, config: AdapterConfig | None = None) -> "PeftModel":
    """Puts an adapter into a checkpoint's model, in place, and freezes all else.

    Args:
        checkpoint: the model; it goes on being used through the same checkpoint.
        config: settings of the adapter.

    Returns:
        peft's handle on the adapter, for :func:`merge_adapter` and :func:`save_adapter`.

    Raises:
        InputError: the model has no matrices of these names.
    """
    from peft import LoraConfig, get_peft_model

    config = config or AdapterConfig()
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=list(config.modules) or ALL_MATRICES,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            return get_peft_model(checkpoint.model, settings, autocast_adapter_dtype=False)
        except ValueError as error:
            raise InputError(f"adapter: modules is {list(config.modules)}, which the model does not have") from error


def merge_adapter(adapter: "PeftModel") -> nn.Module:
    """Adds the adapter to the weights, in place, and takes it out; returns the model, which is a plain one again."""
    model: nn.Module = adapter.merge_and_unload()
    return model


def save_adapter(adapter: "PeftModel", folder: Path) -> None:
    """Saves an adapter alone, in the form of peft: ``adapter_config.json`` and safetensors."""
    adapter.save_pretrained(str(folder), save_embedding_layers=False)


def load_adapter(checkpoint: Checkpoint, folder: Path) -> None:
    """Merges a saved adapter into the model that it was trained for, in place.

    Raises:
        InputError: the folder has no adapter, or that of another model.
    """
    from peft import PeftModel

    if not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{folder} has no {ADAPTER_CONFIG}; give the folder that an adapter was saved to")
    try:
        adapter = PeftModel.from_pretrained(checkpoint.model, str(folder), autocast_adapter_dtype=False)
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder} is no adapter for this model: {reason:.200}") from error
    merge_adapter(adapter)
