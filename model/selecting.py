"""Which tokens of a reference a memory keeps: the paper's sparsification.

At each memory layer and KV head the tokens that receive most attention are kept, attention being computed without RoPE
and without the causal mask, so that no token is favoured for its place (method section 4).

The rule ``residual`` goes beyond the paper: there the attention a token receives counts only as far as the tokens kept
so far do not receive it from the same queries, so that one word does not fill several slots. It is a pivoted Cholesky
factorisation of the products of the columns of the attention matrix (column subset selection).

Shape letters: B references, H KV heads, G query heads a KV head, T tokens of the reference, S slots, D head dimension.
"""

import dataclasses
from typing import Any

import torch

from schemas.errors import InputError
from schemas.records import EMPTY_SLOT

SCORES = ("softmax", "exp", "residual")

CONFIG_FIELD = "memory_selection"
"""Where a model's configuration names the rule that it was trained with."""

STEPS_PER_E = 1024
"""Steps in which scores are compared: a step is a factor of e ** (1 / 1024), about a thousandth."""

SMALLEST_SCORE = 1e-30

SMALLEST_RESIDUAL = 1e-6
"""Residuals below this share of the greatest column are rounding, and count as equal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """How tokens are selected.

    Attributes:
        num_slots: tokens kept a KV head; the paper keeps 8 of 128.
        score: ``softmax`` sums normalised attention; ``exp`` sums its numerators, the speed-up of the paper's own run;
            ``residual`` takes token by token what adds most to the attention of those kept so far.
        refit: True fits the kept values so that the slots answer as all tokens would, see :mod:`model.refitting`.
    """

    num_slots: int = 8
    score: str = "softmax"
    refit: bool = False

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
        rule: dict[str, Any] = {"num_slots": self.num_slots, "score": self.score}
        # Banks know their writer by this: what is newer than they are is named only where it is used.
        return {**rule, "refit": True} if self.refit else rule


def find_selection(
    config: Any, *, num_slots: int | None = None, score: str | None = None, refit: bool | None = None
) -> SelectionConfig:
    """Returns the rule that a model was trained with, the paper's if its configuration names none.

    Args:
        config: the model's transformers configuration.
        num_slots: another number of tokens; None for the model's own, as for the others.
        score: another score.
        refit: another choice.

    Raises:
        InputError: a value is out of bounds, or the configuration names a rule that there is not.
    """
    wanted = {"num_slots": num_slots, "score": score, "refit": refit}
    own = getattr(config, CONFIG_FIELD, None) or {}
    if not isinstance(own, dict) or not own.keys() <= wanted.keys():
        raise InputError(f"the model's configuration: {CONFIG_FIELD} is {own!r}, must be of {', '.join(wanted)}")
    rule = {**own, **{name: value for name, value in wanted.items() if value is not None}}
    if type(rule.get("num_slots", 0)) is not int or type(rule.get("refit", False)) is not bool:
        raise InputError(f"the model's configuration: {CONFIG_FIELD} is {own!r}, must have a number of slots")
    return SelectionConfig(**rule)


def record_selection(config: Any, selection: SelectionConfig) -> None:
    """Writes a rule into a model's configuration, where :func:`find_selection` finds it."""
    setattr(config, CONFIG_FIELD, selection.to_json())


@torch.no_grad()
def choose_tokens(
    queries_BHGTD: torch.Tensor,
    keys_BHTD: torch.Tensor,
    valid_BT: torch.Tensor,
    *,
    scaling: float,
    selection: SelectionConfig,
) -> torch.Tensor:
    """Returns the offsets of the tokens that a rule keeps, (B, H, S) int64, ascending; ``EMPTY_SLOT`` past the last.

    Args:
        queries_BHGTD: queries before RoPE.
        keys_BHTD: keys before RoPE.
        valid_BT: True for tokens of the reference; BOS and padding are False and take no part, as query or as key.
        scaling: factor on the products, 1 / sqrt(D) in the paper.
        selection: the rule.
    """
    if selection.score == "residual":
        weights_BHQT = weigh_tokens(queries_BHGTD, keys_BHTD, valid_BT, scaling=scaling)
        return select_residual(weights_BHQT, valid_BT, selection.num_slots)
    scores = score_tokens(queries_BHGTD, keys_BHTD, valid_BT, scaling=scaling, score=selection.score)
    return select_offsets(scores, selection.num_slots)


@torch.no_grad()
def score_tokens(
    queries_BHGTD: torch.Tensor, keys_BHTD: torch.Tensor, valid_BT: torch.Tensor, *, scaling: float, score: str
) -> torch.Tensor:
    """Returns the attention each token receives, (B, H, T) float32; -inf where ``valid_BT`` is False.

    Scores choose tokens and are no part of any gradient.

    Args:
        queries_BHGTD: queries before RoPE.
        keys_BHTD: keys before RoPE.
        valid_BT: see :func:`choose_tokens`.
        scaling: see :func:`choose_tokens`.
        score: ``softmax`` or ``exp``.
    """
    num_heads, num_groups, length = queries_BHGTD.shape[1:4]
    of_query = _list_queries(valid_BT, num_heads, num_groups)[:, None]
    products = _multiply(queries_BHGTD, keys_BHTD, valid_BT, scaling)
    if score == "softmax":
        weights = torch.softmax(products, -1, out=products)
    else:
        # One common shift for all queries of a head keeps the sums finite and their order what it was.
        shift = products.masked_fill(of_query.mT == 0, -torch.inf).amax((1, 2), keepdim=True)
        weights = products.sub_(shift).clamp_(max=0).exp_()
    received_BHT = torch.bmm(of_query, weights).view(-1, num_heads, length)
    return received_BHT.masked_fill(~valid_BT[:, None], -torch.inf)


@torch.no_grad()
def weigh_tokens(
    queries_BHGTD: torch.Tensor, keys_BHTD: torch.Tensor, valid_BT: torch.Tensor, *, scaling: float
) -> torch.Tensor:
    """Returns the attention every query pays every token, (B, H, Q, T) float32 with Q = G x T.

    Rows and columns of what takes no part are zero. Arguments as in :func:`choose_tokens`.
    """
    num_heads, num_groups = queries_BHGTD.shape[1:3]
    products = _multiply(queries_BHGTD, keys_BHTD, valid_BT, scaling)
    weights = torch.softmax(products, -1, out=products)
    weights *= _list_queries(valid_BT, num_heads, num_groups)[..., None]
    weights_BHQT: torch.Tensor = weights.unflatten(0, (-1, num_heads))
    return weights_BHQT


def _list_queries(valid_BT: torch.Tensor, num_heads: int, num_groups: int) -> torch.Tensor:
    """Returns 1.0 for the queries that take part and 0.0 for the others, (B x H, G x T)."""
    return valid_BT.float().repeat(1, num_groups).repeat_interleave(num_heads, 0)


def _multiply(
    queries_BHGTD: torch.Tensor, keys_BHTD: torch.Tensor, valid_BT: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Returns scaled products of queries and keys, (B x H, G x T, T) float32; -inf for keys that take no part.

    They are the largest tensor of writing, made once; callers work on it in place.
    """
    num_heads = keys_BHTD.shape[1]
    queries, keys = queries_BHGTD.float().flatten(2, 3).flatten(0, 1), keys_BHTD.float().flatten(0, 1)
    masked = torch.zeros(valid_BT.shape, device=valid_BT.device).masked_fill(~valid_BT, -torch.inf)
    return torch.baddbmm(masked.repeat_interleave(num_heads, 0)[:, None], queries, keys.mT, alpha=scaling)


def _compare(scores: torch.Tensor) -> torch.Tensor:
    """Returns scores in steps of about a thousandth, so that what differs by rounding is equal; -inf stays."""
    steps = scores.clamp(min=SMALLEST_SCORE).log().mul(STEPS_PER_E).round()
    return steps.masked_fill(scores == -torch.inf, -torch.inf)


def select_offsets(scores_BHT: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Returns the offsets of the best tokens, (B, H, S) int64, ascending; ``EMPTY_SLOT`` where there are too few.

    Of equal scores the earlier token wins. In the first layer equal tokens have equal scores up to rounding, so scores
    that differ by less than a thousandth count as equal: which of them is kept must not depend on their batch.
    """
    scores_BHT = _compare(scores_BHT)
    missing = num_slots - scores_BHT.shape[-1]
    if missing > 0:
        scores_BHT = torch.nn.functional.pad(scores_BHT, (0, missing), value=-torch.inf)
    best, offsets = scores_BHT.sort(dim=-1, descending=True, stable=True)
    best, offsets = best[..., :num_slots], offsets[..., :num_slots]
    return offsets.masked_fill(best == -torch.inf, EMPTY_SLOT).sort(dim=-1).values


def select_residual(weights_BHQT: torch.Tensor, valid_BT: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Returns the offsets of tokens whose columns of attention span those of the others best, greedily one by one.

    Each step keeps the token whose column has the greatest part orthogonal to the columns kept so far. Form and ties
    are those of :func:`select_offsets`.

    Args:
        weights_BHQT: attention of every query to every token, see :func:`weigh_tokens`.
        valid_BT: True for tokens of the reference.
        num_slots: S, the tokens to keep.
    """
    num_tokens = weights_BHQT.shape[-1]
    columns_BHTT = weights_BHQT.mT @ weights_BHQT  # products of the columns of every two tokens
    residuals_BHT = columns_BHTT.diagonal(dim1=-2, dim2=-1).double()
    smallest = residuals_BHT.amax(-1, keepdim=True) * SMALLEST_RESIDUAL
    residuals_BHT = residuals_BHT.masked_fill(~valid_BT[:, None], -torch.inf)
    directions_BHST = columns_BHTT.new_empty((*columns_BHTT.shape[:2], num_slots, num_tokens), dtype=torch.float64)
    offsets = []
    for slot in range(num_slots):
        ranked = _compare(torch.where(residuals_BHT == -torch.inf, residuals_BHT, residuals_BHT.maximum(smallest)))
        best, offset_BH1 = ranked.max(-1, keepdim=True)
        place = offset_BH1[..., None]
        column = columns_BHTT.gather(2, place.expand(-1, -1, 1, num_tokens)).double()
        kept = directions_BHST[:, :, :slot]
        shared = kept.gather(3, place.expand(-1, -1, slot, 1))
        length = residuals_BHT.gather(2, offset_BH1).maximum(smallest).sqrt()[..., None]
        direction = (column - shared.mT @ kept) / length
        directions_BHST[:, :, slot : slot + 1] = direction
        residuals_BHT = (residuals_BHT - direction[:, :, 0].square()).scatter(2, offset_BH1, -torch.inf)
        offsets.append(offset_BH1.masked_fill(best == -torch.inf, EMPTY_SLOT))
    return torch.cat(offsets, -1).sort(-1).values


def gather_slots(vectors_BHTD: torch.Tensor, offsets_BHS: torch.Tensor) -> torch.Tensor:
    """Returns the vectors at the kept offsets, (B, H, S, D); zeros in empty slots."""
    empty = offsets_BHS == EMPTY_SLOT
    index = offsets_BHS.masked_fill(empty, 0)[..., None].expand(-1, -1, -1, vectors_BHTD.shape[-1])
    return vectors_BHTD.gather(2, index).masked_fill(empty[..., None], 0.0)
