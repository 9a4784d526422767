"""The attention queries that a text asks at the memory layers, before RoPE: what its tokens look for.

Where it stands: the question's side of retrieval by the model itself (method section 9, Remark 2); the answers' side
are the keys of memories, which are stored before RoPE too. So a product of both does not depend on any place.

Shape letters: P pairs of memory layer and KV head, layer by layer, G query heads a KV head, T tokens, Q = G x T queries
of a pair, D head dimension, B texts, N = query heads of a layer.
"""

from collections.abc import Sequence

import numpy as np
import torch

from model.attention import WritingTap
from model.checkpoint import Checkpoint
from model.writing import BATCH_TOKENS, BATCH_TOKENS_ELSEWHERE, pad_references, read_behind_prefix, split_batches
from schemas.errors import InputError
from schemas.protocols import IntArray


@torch.inference_mode()
def compute_queries(checkpoint: Checkpoint, token_ids: Sequence[IntArray]) -> list[torch.Tensor]:
    """Returns the queries of each text, (P, Q, D) float32 on the CPU.

    A text is encoded as a reference is, alone behind the prefix, so that questions and memories are made alike; layers
    past the last memory layer are not run. Padding stands on the right, where a causal model does not see it.

    Args:
        checkpoint: the model.
        token_ids: tokens of each text, at least one and at most as many as a reference may have.

    Raises:
        InputError: a text has none, or too many.
    """
    lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
    longest = checkpoint.max_reference_tokens
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= longest):
        raise InputError(f"a question has {lengths.min()}..{lengths.max()} tokens; it must have 1..{longest}")
    found: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
    device = checkpoint.device
    for rows in split_batches(lengths, BATCH_TOKENS.get(device.type, BATCH_TOKENS_ELSEWHERE)):
        padded, _ = pad_references([token_ids[row] for row in rows], device)
        queries_BPGTD = _run(checkpoint, padded)
        for row, queries_PGTD in zip(rows.tolist(), queries_BPGTD, strict=True):
            found[row] = queries_PGTD[:, :, : lengths[row]].flatten(1, 2).float().cpu()
    return found


def _run(checkpoint: Checkpoint, token_ids_BT: torch.Tensor) -> torch.Tensor:
    """Returns the queries of a padded batch, (B, P, G, T, D)."""
    first, device = len(checkpoint.prefix_token_ids), token_ids_BT.device
    positions_T = torch.arange(first, first + token_ids_BT.shape[1], device=device)
    tap = WritingTap(memory_layers=checkpoint.memory_layers)
    read_behind_prefix(checkpoint, token_ids_BT, tap)
    layers = [
        rotary.unrotate(query_BNTD[:, :, first:], positions_T).unflatten(1, (checkpoint.num_kv_heads, -1))
        for rotary, (query_BNTD, _, _) in zip(checkpoint.memory_rotaries, tap.kept, strict=True)
    ]
    return torch.cat(layers, 1)
