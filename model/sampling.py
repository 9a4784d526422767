"""The choice of the next token: the likeliest, or one drawn from the likeliest; for all sequences of a batch at once.

Shape letters: B sequences, V words.
"""

import dataclasses
from collections.abc import Sequence

import torch

from schemas.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; otherwise the logits are divided by it and sampled.
        top_p: sample from the likeliest tokens that together have this probability.
        repetition_penalty: logits of tokens seen before are divided (multiplied if negative) by it; 1 is off.
        seed: seed of the sampling; sequence ``i`` of a batch uses ``seed + i``.
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
    """Chooses the tokens of a batch, knowing what each sequence has seen."""

    def __init__(self, config: SamplingConfig, contexts: Sequence[Sequence[int]], vocab_size: int) -> None:
        """Begins after the contexts, each the tokens of one sequence."""
        self._config = config
        self._seen_BV = torch.zeros(len(contexts), vocab_size, dtype=torch.bool)
        if config.repetition_penalty > 1:
            for row, tokens in enumerate(contexts):
                self._seen_BV[row, torch.tensor(list(tokens))] = True
        self._random = [torch.Generator().manual_seed(config.seed + row) for row in range(len(contexts))]

    def choose(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Returns the next token of each sequence, int64 (B,), on the device of the logits."""
        config = self._config
        if config.repetition_penalty > 1:
            self._seen_BV = self._seen_BV.to(logits_BV.device)
            lowered = torch.where(
                logits_BV > 0, logits_BV / config.repetition_penalty, logits_BV * config.repetition_penalty
            )
            logits_BV = torch.where(self._seen_BV, lowered, logits_BV)
        if config.temperature == 0:
            chosen = logits_BV.argmax(-1)
        else:
            rows = (logits_BV.float() / config.temperature).cpu()
            tokens = [_draw(row, config.top_p, random) for row, random in zip(rows, self._random, strict=True)]
            chosen = torch.tensor(tokens, device=logits_BV.device)
        if config.repetition_penalty > 1:
            self._seen_BV.scatter_(1, chosen[:, None], True)
        return chosen


def _draw(logits: torch.Tensor, top_p: float, random: torch.Generator) -> int:
    probabilities, order = logits.softmax(-1).sort(descending=True)
    # The likeliest token always stays; a later one stays if those before it have not yet reached top_p.
    probabilities[probabilities.cumsum(0) - probabilities >= top_p] = 0.0
    return int(order[int(torch.multinomial(probabilities, 1, generator=random))])
