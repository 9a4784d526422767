"""The optimizer: AdamW with states in float32, weight decay on matrices only (method section 7)."""

import dataclasses

import torch
from torch import nn

from schemas.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of AdamW.

    Attributes:
        learning_rate: the greatest rate of the schedule.
        weight_decay: decay of matrices; scales of norms and biases do not decay.
        beta1: decay of the mean of gradients.
        beta2: decay of the mean of their squares.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a rate or decay below zero, or a beta outside of 0..1.
        """
        if not self.learning_rate > 0:
            raise InputError(f"optimizer: learning_rate is {self.learning_rate}, must be greater than 0")
        if self.weight_decay < 0:
            raise InputError(f"optimizer: weight_decay is {self.weight_decay}, must be at least 0")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise InputError(f"optimizer: beta1 is {self.beta1} and beta2 {self.beta2}, must be from 0 to below 1")


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Returns the optimizer of all parameters that are trained.

    Raises:
        InputError: no parameter is trained.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise InputError("the model has no parameter that is trained; load it without freezing, or add an adapter")
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
