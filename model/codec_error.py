"""What a codec costs where it matters: the error of what real contexts read from memories, not that of vectors.

Contexts read memories that are as they were written, and the queries they do it with are kept. With these, the
attention over a chunk's memories alone is computed again from vectors that were coded and decoded. The squared error
of an output, to first order in the errors of the keys, is a quadratic form of each key's error;
:func:`measure_key_metric` returns its mean, which codecs are trained by.

Shape letters: L memory layers, C chunks, M memories a chunk, R distinct references, H KV heads, G query heads a KV
head, W tokens a chunk, Q queries of a chunk and KV head (W x G), S slots, D head dimension, N records.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from model.checkpoint import Checkpoint
from model.chunked_reading import MemoryContext
from model.reading import CHUNK_TOKENS, place_memories, rotate_memories
from model.rotary import Rotary
from model.writing import Memories
from schemas.errors import InputError
from schemas.protocols import IntArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readings:
    """Chunks of contexts, what they read, and what with.

    Attributes:
        queries_LCHQD: queries at their positions in the context, times the scale of attention, float32.
        index_CM: which of the memories each chunk reads; -1 for none.
        memories: the R memories, as they were written.
    """

    queries_LCHQD: torch.Tensor
    index_CM: torch.Tensor
    memories: Memories


@dataclasses.dataclass
class _ListeningContext(MemoryContext):
    """Keeps the queries of each memory layer, (B, N, T, D), as attention gets them."""

    queries: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def attend(
        self,
        place: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        self.queries.append(query * scaling)
        return super().attend(place, query, key, value, mask, scaling)


@torch.inference_mode()
def collect_readings(
    checkpoint: Checkpoint, passages: Sequence[IntArray], memories: Memories, indexes_CM: Sequence[torch.Tensor]
) -> Readings:
    """Reads contexts chunk by chunk, each chunk with its memories, and keeps the queries.

    Args:
        checkpoint: the model that reads.
        passages: token ids of contexts, each with what it begins with (``<s>``), in whole chunks of 64.
        memories: the memories there are.
        indexes_CM: for each context, which of them its chunks read; -1 for none.

    Raises:
        InputError: a context is not made of whole chunks.
    """
    prefix = checkpoint.prefix_token_ids.to(checkpoint.device)
    kept = []
    for passage, index_CM in zip(passages, indexes_CM, strict=True):
        if len(passage) != CHUNK_TOKENS * len(index_CM):
            raise InputError(f"a context has {len(passage)} tokens, must be {CHUNK_TOKENS} for each of {len(index_CM)}")
        tokens = torch.from_numpy(passage).to(checkpoint.device)
        places = torch.arange(len(tokens), device=checkpoint.device)
        chunk_of_token = torch.cat((torch.full_like(prefix, -1), places // CHUNK_TOKENS))
        placed = place_memories(checkpoint, memories, index_CM[None].to(checkpoint.device), chunk_of_token[None])
        context = _ListeningContext(**{field.name: getattr(placed, field.name) for field in dataclasses.fields(placed)})
        input_ids = torch.cat((prefix, tokens))[None]
        checkpoint.decoder(
            input_ids=input_ids,
            position_ids=torch.cat((torch.arange(len(prefix)).to(places), checkpoint.context_start + places))[None],
            attention_mask=torch.ones_like(input_ids),
            use_cache=False,
            memory3=context,
        )
        queries_LNTD = torch.stack([query[0, :, len(prefix) :] for query in context.queries]).float()
        queries_LHGCWD = queries_LNTD.unflatten(2, (-1, CHUNK_TOKENS)).unflatten(1, (checkpoint.num_kv_heads, -1))
        kept.append(queries_LHGCWD.permute(0, 3, 1, 2, 4, 5).flatten(3, 4))
    return Readings(
        queries_LCHQD=torch.cat(kept, 1), index_CM=torch.cat(list(indexes_CM)).to(checkpoint.device), memories=memories
    )


def _iterate_attention(
    checkpoint: Checkpoint, readings: Readings, memories: Memories
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields for each memory layer the weights (C, H, Q, S), the outputs (C, H, Q, D) and the values (C, H, S, D).

    The slots are those of all memories of a chunk, one memory after the other.
    """
    keys_LRHSD, filled_LRHS = rotate_memories(checkpoint, memories)
    index_CM = readings.index_CM
    rows_CM, present_CM = index_CM.clamp(min=0), index_CM >= 0
    for layer, queries_CHQD in enumerate(readings.queries_LCHQD):
        keys_CHSD = keys_LRHSD[layer, rows_CM].transpose(1, 2).flatten(2, 3).float()
        values_CHSD = memories.values_LBHSD[layer, rows_CM].transpose(1, 2).flatten(2, 3).float()
        valid_CMHS = filled_LRHS[layer, rows_CM] & present_CM[..., None, None]
        valid_CHS = valid_CMHS.transpose(1, 2).flatten(2, 3)
        scores = (queries_CHQD @ keys_CHSD.mT).masked_fill(~valid_CHS[:, :, None], -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)  # a chunk without any memory
        yield weights, weights @ values_CHSD, values_CHSD


@torch.inference_mode()
def measure_attention_error(
    checkpoint: Checkpoint, readings: Readings, keys_NLHSD: torch.Tensor, values_NLHSD: torch.Tensor
) -> float:
    """Returns the relative error of what is read, sqrt(sum |o' - o|^2 / sum |o|^2) over layers, heads and queries.

    Attention is over the memories of a chunk alone, so that the context beside them hides nothing.

    Args:
        checkpoint: the model that reads.
        readings: the chunks, from :func:`collect_readings`.
        keys_NLHSD: keys of the same R memories before RoPE, coded and decoded.
        values_NLHSD: values, likewise.
    """
    coded = Memories(
        keys_LBHSD=keys_NLHSD.transpose(0, 1),
        values_LBHSD=values_NLHSD.transpose(0, 1),
        offsets_LBHS=readings.memories.offsets_LBHS,
    )
    exact = _iterate_attention(checkpoint, readings, readings.memories)
    changed = _iterate_attention(checkpoint, readings, coded)
    errors, total = 0.0, 0.0
    for (_, right_CHQD, _), (_, found_CHQD, _) in zip(exact, changed, strict=True):
        errors += float((found_CHQD - right_CHQD).double().square().sum())
        total += float(right_CHQD.double().square().sum())
    return float((errors / total) ** 0.5) if total else 0.0


@torch.inference_mode()
def measure_key_metric(checkpoint: Checkpoint, readings: Readings) -> torch.Tensor:
    """Returns the quadratic form by which an error of a key before RoPE costs, (L, H, D, D) float32, but for a factor.

    A key that is off by e moves the score of a query q by q'e and the output by that times w (v - o), w being the
    key's weight, v its value and o the output: a squared error of w^2 |v - o|^2 (q'e)^2. The query is taken as the
    key meets it, turned back by the key's own rotation.
    """
    # An empty slot has no weight, so its position does not matter.
    offsets_LRHS = readings.memories.offsets_LBHS.clamp(max=checkpoint.max_reference_tokens - 1)
    positions_LCMHS = offsets_LRHS[:, readings.index_CM.clamp(min=0)] + len(checkpoint.prefix_token_ids)
    positions_LCHS = positions_LCMHS.transpose(2, 3).flatten(3, 4)
    num_layers, num_chunks, num_heads, _, size = readings.queries_LCHQD.shape
    metric_LHDD = torch.zeros(num_layers, num_heads, size, size, device=readings.queries_LCHQD.device)
    rotaries = checkpoint.memory_rotaries
    layers = _iterate_attention(checkpoint, readings, readings.memories)
    for layer, (weights_CHQS, outputs_CHQD, values_CHSD) in enumerate(layers):
        influence_CHQS = (weights_CHQS * torch.cdist(outputs_CHQD, values_CHSD)).square()
        for chunk, queries_HQD in enumerate(readings.queries_LCHQD[layer]):
            weighed_HSQD = influence_CHQS[chunk].mT[..., None] * queries_HQD[:, None]
            forms_HSDD = weighed_HSQD.mT @ queries_HQD[:, None]
            metric_LHDD[layer] += _turn_back(rotaries[layer], forms_HSDD, positions_LCHS[layer, chunk]).sum(1)
    return metric_LHDD / num_chunks


def _turn_back(rotary: Rotary, forms_HSDD: torch.Tensor, positions_HS: torch.Tensor) -> torch.Tensor:
    """Returns R' A R, but for a factor, for symmetric forms A of rotated keys, R being a key's rotation."""
    size = forms_HSDD.shape[-1]
    places = positions_HS.flatten().repeat_interleave(size)
    for _ in range(2):
        rows = rotary.unrotate(forms_HSDD.reshape(1, 1, -1, size), places)
        forms_HSDD = rows.view(forms_HSDD.shape).mT
    return forms_HSDD
