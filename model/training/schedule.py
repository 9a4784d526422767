"""Learning-rate schedules: the factor on the maximal rate at each step (method section 7)."""

import dataclasses
import math

from schemas.errors import InputError

SHAPES = ("stable", "cosine")

LAST_FACTOR = 0.01
"""Where a schedule ends: near zero, but still moving."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The shape of a schedule.

    Attributes:
        shape: ``stable`` is linear up, flat, linear down (warmup-stable-decay); ``cosine`` is linear up, then half a
            cosine down.
        warmup_share: part of the steps in which the rate rises.
        decay_share: part of the steps at the end in which a ``stable`` rate falls.
    """

    shape: str = "stable"
    warmup_share: float = 0.02
    decay_share: float = 0.1

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: an unknown shape, or shares that are not between 0 and 1.
        """
        if self.shape not in SHAPES:
            raise InputError(f"schedule: shape is {self.shape!r}, must be one of {', '.join(SHAPES)}")
        if not (0 <= self.warmup_share <= 1 and 0 <= self.decay_share <= 1):
            raise InputError(
                f"schedule: warmup_share is {self.warmup_share} and decay_share {self.decay_share}, must be 0..1"
            )

    def get_factor(self, step: int, num_steps: int) -> float:
        """Returns the factor on the maximal learning rate at ``step`` (0-based) of ``num_steps``."""
        num_warmup = max(1, round(num_steps * self.warmup_share))
        if step < num_warmup:
            return (step + 1) / num_warmup
        if self.shape == "cosine":
            done = (step + 1 - num_warmup) / max(1, num_steps - num_warmup)
            return LAST_FACTOR + (1 - LAST_FACTOR) * 0.5 * (1 + math.cos(math.pi * done))
        num_decay = max(1, round(num_steps * self.decay_share))
        if self.decay_share and step >= num_steps - num_decay:
            return max(LAST_FACTOR, (num_steps - step) / num_decay)
        return 1.0
