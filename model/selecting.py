"""Which tokens of a reference a memory keeps: the paper's sparsification.

At each memory layer and KV head the tokens that receive most attention are kept, attention being computed without RoPE
and without the causal mask, so that no token is favoured for its place (method section 4).

Shape letters: B references, H KV heads, G query heads a KV head, T tokens of the reference, S slots, D head dimension.
"""

import dataclasses
from typing import Any

import torch

from schemas.errors import InputError
from schemas.records import EMPTY_SLOT

SCORES = ("softmax", "exp")

STEPS_PER_E = 1024
"""Steps in which scores are compared: a step is a factor of e ** (1 / 1024), about a thousandth."""

SMALLEST_SCORE = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """How tokens are selected.

    Attributes:
        num_slots: tokens kept a KV head; the paper keeps 8 of 128.
        score: ``softmax`` sums normalised attention; ``exp`` sums its numerators, the speed-up of the paper's own run.
    """

    num_slots: int = 8
    score: str = "softmax"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: fewer than 1 or more than 128 slots, or an unknown score.
        """
        if not 1 <= self.num_slots <= 128:
            raise InputError(f"selection: num_slots is {self.num_slots}, must be 1..128")
        if self.score not in SCORES:
            raise InputError(f"selection: score is {self.score!r}, must be one of {', '.join(SCORES)}")

    def to_json(self) -> dict[str, Any]:
        """Returns the rule as it enters the writer's fingerprint."""
        return dataclasses.asdict(self)


def score_tokens(
    queries_BHGTD: torch.Tensor, keys_BHTD: torch.Tensor, valid_BT: torch.Tensor, *, scaling: float, score: str
) -> torch.Tensor:
    """Returns the attention each token receives, (B, H, T) float32; -inf where ``valid_BT`` is False.

    Args:
        queries_BHGTD: queries before RoPE.
        keys_BHTD: keys before RoPE.
        valid_BT: True for tokens of the reference; BOS and padding are False and take no part, as query or as key.
        scaling: factor on the products, 1 / sqrt(D) in the paper.
        score: see :class:`SelectionConfig`.
    """
    products = torch.einsum("bhgid,bhjd->bhgij", queries_BHGTD.float(), keys_BHTD.float()) * scaling
    products = products.masked_fill(~valid_BT[:, None, None, None, :], -torch.inf)
    # For "exp", one common shift for all queries of a head keeps the sums finite and their order what it was.
    shift = products.masked_fill(~valid_BT[:, None, None, :, None], -torch.inf).amax((2, 3, 4), keepdim=True)
    received = products.softmax(-1) if score == "softmax" else (products - shift).exp()
    received = received.masked_fill(~valid_BT[:, None, None, :, None], 0.0)
    return received.sum((2, 3)).masked_fill(~valid_BT[:, None, :], -torch.inf)


def select_offsets(scores_BHT: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Returns the offsets of the best tokens, (B, H, S) int64, ascending; ``EMPTY_SLOT`` where there are too few.

    Of equal scores the earlier token wins. In the first layer equal tokens have equal scores up to rounding, so scores
    that differ by less than a thousandth count as equal: which of them is kept must not depend on their batch.
    """
    steps = scores_BHT.clamp(min=SMALLEST_SCORE).log().mul(STEPS_PER_E).round()
    scores_BHT = steps.masked_fill(scores_BHT == -torch.inf, -torch.inf)
    missing = num_slots - scores_BHT.shape[-1]
    if missing > 0:
        scores_BHT = torch.nn.functional.pad(scores_BHT, (0, missing), value=-torch.inf)
    best, offsets = scores_BHT.sort(dim=-1, descending=True, stable=True)
    best, offsets = best[..., :num_slots], offsets[..., :num_slots]
    return offsets.masked_fill(best == -torch.inf, EMPTY_SLOT).sort(dim=-1).values


def gather_slots(vectors_BHTD: torch.Tensor, offsets_BHS: torch.Tensor) -> torch.Tensor:
    """Returns the vectors at the kept offsets, (B, H, S, D); zeros in empty slots."""
    empty = offsets_BHS == EMPTY_SLOT
    index = offsets_BHS.masked_fill(empty, 0)[..., None].expand(-1, -1, -1, vectors_BHTD.shape[-1])
    return vectors_BHTD.gather(2, index).masked_fill(empty[..., None], 0.0)
