"""The choice of the next token: the likeliest, or one drawn from the likeliest; for all sequences of a batch at once.

Shape letters: B sequences, V words.
"""

import dataclasses
from collections.abc import Sequence

import torch

from schemas.errors import InputError

LEAST_TEMPERATURE = 1e-6
"""Below it logits would leave the range of float32, and there is nothing left to draw anyway."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; otherwise the logits are divided by it and sampled.
        top_p: sample from the likeliest tokens that together have this probability.
        repetition_penalty: logits of tokens seen before are divided (multiplied if negative) by it; 1 is off.
        seed: seed of the sampling; what a sequence draws depends on its own seed only, not on its batch.
    """

    temperature: float = 0.0
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a value is out of its bounds.
        """
        if self.temperature < 0:
            raise InputError(f"generation: temperature is {self.temperature}, must be at least 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"generation: top_p is {self.top_p}, must be in (0, 1]")
        if self.repetition_penalty < 1:
            raise InputError(f"generation: repetition_penalty is {self.repetition_penalty}, must be at least 1")


class TokenChooser:
    """Chooses the tokens of a batch, each sequence in its own way, knowing what it has seen."""

    def __init__(self, configs: Sequence[SamplingConfig], contexts: Sequence[Sequence[int]], vocab_size: int) -> None:
        """Begins after the contexts, each the tokens of one sequence, with a config each."""
        self._configs = configs
        self._penalizes = any(config.repetition_penalty > 1 for config in configs)
        self._penalties_B1 = torch.tensor([config.repetition_penalty for config in configs])[:, None]
        self._seen_BV = torch.zeros(len(contexts), vocab_size, dtype=torch.bool)
        for row, (config, tokens) in enumerate(zip(configs, contexts, strict=True)):
            if config.repetition_penalty > 1:
                self._seen_BV[row, torch.tensor(list(tokens))] = True
        self._random = {
            row: torch.Generator().manual_seed(config.seed) for row, config in enumerate(configs) if config.temperature
        }

    def choose(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Returns the next token of each sequence, int64 (B,), on the device of the logits."""
        if self._penalizes:
            self._seen_BV, penalties_B1 = self._seen_BV.to(logits_BV.device), self._penalties_B1.to(logits_BV)
            lowered = torch.where(logits_BV > 0, logits_BV / penalties_B1, logits_BV * penalties_B1)
            logits_BV = torch.where(self._seen_BV, lowered, logits_BV)
        chosen = logits_BV.argmax(-1)
        if self._random:
            rows = logits_BV.float().cpu()
            for row, random in self._random.items():
                config = self._configs[row]
                chosen[row] = _draw(rows[row] / max(config.temperature, LEAST_TEMPERATURE), config.top_p, random)
        if self._penalizes:
            self._seen_BV.scatter_(1, chosen[:, None], True)
        return chosen


def _draw(logits: torch.Tensor, top_p: float, random: torch.Generator) -> int:
    probabilities, order = logits.softmax(-1).sort(descending=True)
    # The likeliest token always stays; a later one stays if those before it have not yet reached top_p.
    before = probabilities.cumsum(0) - probabilities
    probabilities[1:][before[1:] >= top_p] = 0.0
    return int(order[int(torch.multinomial(probabilities, 1, generator=random))])
