"""How much the layers and heads of a model use distant text: what to choose memory layers of an existing model by.

A memory is read like text that stands far back, so layers that make use of such text are those that will make use of
memories (method section 9, Remark 4). Two measures, on text that the model has not seen, read as by the ordinary model:

* of each head, the share of attention that goes to tokens more than ``distance`` tokens back. The first token is left
  out: it draws attention that is meant for nothing;
* of each layer, by how much the loss increases when its attention is confined to the last ``distance`` tokens and the
  first: what the layer does with distant text is worth, not how much it looks at.

The second costs a forward pass for each layer.

Shape letters: B sequences (one), N query heads, H KV heads, G query heads a KV head, Q query tokens, K and T tokens,
D head dimension, L layers.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from model.attention import LayerAttention
from model.checkpoint import Checkpoint
from schemas.errors import InputError
from schemas.protocols import IntArray

DISTANCE = 128
"""Tokens back from which a token is distant: the length of a reference."""

QUERIES_AT_ONCE = 256
"""Queries whose attention weights are in memory at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerUse:
    """How a layer uses distant text.

    Attributes:
        layer: its index.
        loss_increase: increase of the loss without it, in nats a token.
        distant_shares: of each query head, the mean share of its attention that goes to distant tokens.
        first_shares: of each query head, the mean share that goes to the first token.
    """

    layer: int
    loss_increase: float
    distant_shares: tuple[float, ...]
    first_shares: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistanceReport:
    """How a model uses distant text.

    Attributes:
        distance: tokens back from which a token is distant.
        loss: loss of the model as it is, in nats a token, of the tokens whose prediction has distant text.
        num_tokens: how many these are.
        layers: what was measured of each layer.
    """

    distance: int
    loss: float
    num_tokens: int
    layers: tuple[LayerUse, ...]


def make_distance_masks(
    num_queries: int, num_keys: int, distance: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns which tokens are seen and which of these are distant, each (Q, K), for queries that end with the keys.

    A distant token stands more than ``distance`` tokens before the query, and is not the first.
    """
    places_K = torch.arange(num_keys, device=device)
    back_QK = (places_K[num_keys - num_queries :, None]) - places_K
    return back_QK >= 0, (back_QK > distance) & (places_K > 0)


@dataclasses.dataclass
class AttentionMeter:
    """Plain attention in all layers, which sums up where it goes.

    Attributes:
        memory_layers: all layers.
        distance: tokens back from which a token is distant.
        distant_LN: the shares that distant tokens got, summed over queries that have any, float64.
        first_LN: the shares that the first token got from these queries.
        num_queries: how many these were.
    """

    memory_layers: tuple[int, ...]
    distance: int
    distant_LN: torch.Tensor
    first_LN: torch.Tensor
    num_queries: int = 0

    def attend(
        self,
        place: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """Attends to the context; see :class:`model.attention.LayerAttention`."""
        seen_QK, distant_QK = make_distance_masks(query.shape[2], key.shape[2], self.distance, query.device)
        query_BHGQD = query.unflatten(1, (key.shape[1], -1)) * scaling
        outs = []
        for start in range(0, query.shape[2], QUERIES_AT_ONCE):
            some = slice(start, start + QUERIES_AT_ONCE)
            allowed = seen_QK[some] if mask is None else seen_QK[some] & mask[:, :, None, some]
            scores = (query_BHGQD[..., some, :] @ key[:, :, None].mT).masked_fill(~allowed, -torch.inf)
            weights_BHGQK = scores.softmax(-1, dtype=torch.float32)
            outs.append(weights_BHGQK.to(value.dtype) @ value[:, :, None])
            distant = distant_QK[some]
            has_distant = distant.any(-1)
            received_BHGQ = (weights_BHGQK * distant).sum(-1)
            self.distant_LN[place] += received_BHGQ.sum((0, 3), dtype=torch.float64).flatten()
            first_BHGQ = weights_BHGQK[..., 0] * has_distant
            self.first_LN[place] += first_BHGQ.sum((0, 3), dtype=torch.float64).flatten()
            if place == 0:
                self.num_queries += len(query) * int(has_distant.sum())
        return torch.cat(outs, -2).flatten(1, 2)


@dataclasses.dataclass
class ConfinedAttention:
    """Attention to the last tokens and the first in one layer.

    Attributes:
        memory_layers: the layer.
        distance: tokens back from which a token is not seen.
    """

    memory_layers: tuple[int, ...]
    distance: int

    def attend(
        self,
        place: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """Attends to what is near; see :class:`model.attention.LayerAttention`."""
        seen_QK, distant_QK = make_distance_masks(query.shape[2], key.shape[2], self.distance, query.device)
        allowed = (seen_QK & ~distant_QK)[None, None]
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=allowed if mask is None else allowed & mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )


def cut_sequences(
    checkpoint: Checkpoint, texts: Sequence[str], *, num_tokens: int, distance: int = DISTANCE
) -> list[IntArray]:
    """Returns the first tokens of texts behind what a context begins with, without those too short to look far back.

    Args:
        checkpoint: the model.
        texts: the texts.
        num_tokens: tokens of a sequence, at most.
        distance: tokens back from which a token is distant.
    """
    first: IntArray = np.array(checkpoint.bos_token_ids, dtype=np.int64)
    sequences = [np.concatenate((first, ids))[:num_tokens] for ids in checkpoint.tokenizer.encode(list(texts))]
    return [sequence for sequence in sequences if len(sequence) >= distance + 4]


@torch.inference_mode()
def measure_distance_use(
    checkpoint: Checkpoint, sequences: Sequence[IntArray], *, distance: int = DISTANCE
) -> DistanceReport:
    """Measures how the layers and heads of a model use distant text.

    Args:
        checkpoint: the model.
        sequences: token ids of texts, as from :func:`cut_sequences`; each runs alone.
        distance: tokens back from which a token is distant.

    Raises:
        InputError: there is no sequence in which a prediction has distant text.
    """
    # The query at distance + 2 is the first with a distant token, and its prediction is the token after it.
    usable = [sequence for sequence in sequences if len(sequence) >= distance + 4]
    if distance < 1 or not usable:
        raise InputError(
            f"distance is {distance}, must be at least 1 and less than the length of a text; the longest of "
            f"{len(sequences)} texts has {max(map(len, sequences), default=0)} tokens"
        )
    layers = tuple(range(int(checkpoint.config.num_hidden_layers)))
    sums_LN = torch.zeros(2, len(layers), int(checkpoint.config.num_attention_heads), dtype=torch.float64)
    meter = AttentionMeter(layers, distance, *sums_LN.to(checkpoint.device))
    loss = sum(_sum_loss(checkpoint, sequence, distance, meter) for sequence in usable)
    num_tokens = sum(len(sequence) - distance - 3 for sequence in usable)
    measured = []
    for layer in layers:
        confined = ConfinedAttention((layer,), distance)
        increased = sum(_sum_loss(checkpoint, sequence, distance, confined) for sequence in usable)
        measured.append(
            LayerUse(
                layer=layer,
                loss_increase=(increased - loss) / num_tokens,
                distant_shares=tuple((meter.distant_LN[layer] / meter.num_queries).tolist()),
                first_shares=tuple((meter.first_LN[layer] / meter.num_queries).tolist()),
            )
        )
    return DistanceReport(distance=distance, loss=loss / num_tokens, num_tokens=num_tokens, layers=tuple(measured))


def _sum_loss(checkpoint: Checkpoint, sequence: IntArray, distance: int, attention: LayerAttention) -> float:
    """Returns the loss of the tokens whose prediction has distant text, summed, in nats."""
    tokens = torch.from_numpy(sequence).to(checkpoint.device)
    hidden = checkpoint.decoder(
        input_ids=tokens[None, :-1],
        attention_mask=torch.ones_like(tokens)[None, :-1],
        use_cache=False,
        memory3=attention,
    ).last_hidden_state
    first = distance + 2
    logits = checkpoint.head(hidden[0, first:])
    return float(torch.nn.functional.cross_entropy(logits.float(), tokens[first + 1 :], reduction="sum"))


def recommend_layers(report: DistanceReport, num_layers: int) -> tuple[int, ...]:
    """Returns the layers whose distant text is worth most to the loss, in ascending order.

    Args:
        report: what was measured.
        num_layers: how many memory layers to choose.

    Raises:
        InputError: the model has not as many layers.
    """
    if not 1 <= num_layers <= len(report.layers):
        raise InputError(f"memory layers: {num_layers} are wanted, must be 1..{len(report.layers)}")
    ranked = sorted(report.layers, key=lambda use: (-use.loss_increase, use.layer))
    return tuple(sorted(use.layer for use in ranked[:num_layers]))


def rank_heads(report: DistanceReport) -> list[tuple[int, int, float]]:
    """Returns (layer, query head, share of attention that goes to distant tokens) of all heads, the greatest first."""
    heads = [(use.layer, head, share) for use in report.layers for head, share in enumerate(use.distant_shares)]
    return sorted(heads, key=lambda head: (-head[2], head[:2]))
