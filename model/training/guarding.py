"""A guard against loss spikes: a step whose loss leaps, or is no number, changes no weight.

One bad batch can undo hours of training. The guard compares every loss with the mean and the spread of those before,
both moving averages, so that it follows a loss that falls.
"""

import dataclasses
import math

from schemas.errors import InputError

MOMENTUM = 0.98
"""Weight of the past in the moving averages: about the last fifty steps count."""

SMALLEST_SPREAD = 0.05
"""The spread is taken to be at least this share of the mean: a quiet stretch must not make every loss a spike."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a step counts as a spike.

    Attributes:
        num_deviations: how many times the usual spread a loss may lie above the usual one.
        num_first: steps at the beginning in which only a loss that is no number is a spike.
        max_in_row: after so many spikes one after the other the run is stopped.
    """

    num_deviations: float = 8.0
    num_first: int = 50
    max_in_row: int = 20

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a number below its bound.
        """
        if not self.num_deviations > 0 or self.num_first < 1 or self.max_in_row < 1:
            raise InputError(
                f"guard: num_deviations {self.num_deviations}, num_first {self.num_first} and max_in_row "
                f"{self.max_in_row} must be greater than 0"
            )


@dataclasses.dataclass
class SpikeGuard:
    """What the guard remembers; its fields are the part of a run's state that is saved.

    Attributes:
        config: when a step counts as a spike.
        mean: moving average of the loss.
        variance: moving average of its squared distance from the mean.
        num_seen: losses that were no spikes.
        num_in_row: spikes since the last step that was none.
        num_skipped: all spikes.
    """

    config: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    mean: float = 0.0
    variance: float = 0.0
    num_seen: int = 0
    num_in_row: int = 0
    num_skipped: int = 0

    def accept(self, loss: float) -> bool:
        """Tells whether a step with this loss may change the weights, and remembers the loss if so."""
        is_spike = not math.isfinite(loss)
        if not is_spike and self.num_seen >= self.config.num_first:
            spread = max(math.sqrt(self.variance), SMALLEST_SPREAD * abs(self.mean))
            is_spike = loss > self.mean + self.config.num_deviations * spread
        if is_spike:
            self.num_in_row += 1
            self.num_skipped += 1
            return False
        self.num_in_row = 0
        # Early on an average of all losses so far, later one of the last about fifty.
        weight = max(1.0 - MOMENTUM, 1.0 / (self.num_seen + 1))
        distance = loss - self.mean
        self.mean += weight * distance
        self.variance = (1.0 - weight) * (self.variance + weight * distance * distance)
        self.num_seen += 1
        return True

    @property
    def is_lost(self) -> bool:
        """Whether there were so many spikes in a row that going on is of no use."""
        return self.num_in_row >= self.config.max_in_row

    def to_json(self) -> dict[str, float]:
        """Returns what is remembered."""
        state = dataclasses.asdict(self)
        del state["config"]
        return state

    def restore(self, state: dict[str, float]) -> None:
        """Takes over what another guard remembered."""
        for name, value in state.items():
            setattr(self, name, value)
