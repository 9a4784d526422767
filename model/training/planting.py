"""First weights with which a small model can copy: heads that look one token back, and heads that look for a match.

Reading a memory is copying: a head finds the place that follows what was just said, and repeats what stands there. Two
kinds of heads do it together (induction heads: Olsson et al. 2022, arXiv 2209.11895). Training finds them by itself,
but late: after five million tokens a model of this size had none, and read no memory. Like other first weights that
imitate what training would find (Trockman and Kolter 2023, arXiv 2305.09828), these only say where training starts:
every one of them is trained on, and nothing else of the model is touched.

The residual stream begins in three parts: the embeddings, one constant, and room for what stood one token before.

- In layer 0 some heads attend to the token before, by its distance alone: query and key are the constant, in the fast
  frequencies of RoPE, turned by one token against each other. Their value is a random projection of its embedding, put
  into the room kept for it.
- In the other memory layers every head compares that projection of each token with the same projection of the current
  embedding, in the slow frequencies, which hardly turn over a context. Its value is a part of the embedding of the
  token it finds, added to the prediction.

Shape letters: E width of the embeddings' part, Z width of the room, D head dimension.
"""

import dataclasses
from typing import Any

import torch

from model.checkpoint import Checkpoint
from schemas.errors import InputError

NUM_LOOKING_BACK = 2
"""Heads of layer 0 that attend to the token before."""

EMBEDDING_STD = 0.15
"""Spread of the embeddings: wide enough for a copied token to stand out among thousands of others."""

FAST_FREQUENCIES = 7
"""Frequencies of RoPE, the fastest first, by which a head sees the distance of one token."""

SLOWEST_TURN = 0.02
"""Frequencies below this, in radians a token, are slow: a match is looked for in them."""

DISTANCE_SCORE = 11.0
"""Score of the token before over one that is not, in each fast frequency, before what the others take off."""

MATCH_SCORE = 27.0
"""Score of a token that follows the current one's twin."""

COPY_SHARE = 4.0
"""What all matching heads together add to the prediction, as a multiple of the embedding they found."""


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Where the parts of the residual stream lie, and how long they are.

    Attributes:
        num_embedding: E.
        num_room: Z.
        length: length of an embedding, and of the constant.
        scale: the factor of the norm on a token's vector in layer 0.
        scale_later: the same after layer 0, when the room is filled.
    """

    num_embedding: int
    num_room: int
    length: float
    scale: float
    scale_later: float


def plant_copying(checkpoint: Checkpoint, *, seed: int = 0) -> None:
    """Gives a model with random weights the heads that copy, in place.

    Args:
        checkpoint: a Llama model with at least two memory layers, of which the first is layer 0.
        seed: seed of the embeddings and projections.

    Raises:
        InputError: the model is too small for it, or its memory layers do not begin with the first.
    """
    config: Any = checkpoint.config
    width, dim = int(config.hidden_size), checkpoint.head_dim
    num_room = NUM_LOOKING_BACK * dim
    frequencies = checkpoint.decoder.get_submodule("rotary_emb").get_buffer("inv_freq").float().cpu()
    slow = torch.nonzero(frequencies < SLOWEST_TURN).flatten()
    enough = checkpoint.num_kv_heads >= NUM_LOOKING_BACK and 2 * num_room < width and len(slow) >= dim // 4
    if not enough or checkpoint.memory_layers[:1] != (0,) or len(checkpoint.memory_layers) < 2:
        raise InputError(
            f"copying heads cannot be planted: hidden size {width}, head dimension {dim}, {checkpoint.num_kv_heads} "
            f"KV heads, {len(slow)} slow frequencies, memory layers {list(checkpoint.memory_layers)}; start without"
        )
    random = torch.Generator().manual_seed(seed)
    num_embedding = width - 1 - num_room
    length = EMBEDDING_STD * num_embedding**0.5
    room_length = length * (num_room / num_embedding) ** 0.5
    parts = _Parts(
        num_embedding=num_embedding,
        num_room=num_room,
        length=length,
        scale=(width / (2 * length**2)) ** 0.5,
        scale_later=(width / (2 * length**2 + room_length**2)) ** 0.5,
    )
    with torch.no_grad():
        embeddings = checkpoint.decoder.get_submodule("embed_tokens").get_parameter("weight")
        drawn = torch.randn(len(embeddings), num_embedding, generator=random) * EMBEDDING_STD
        embeddings.zero_()
        embeddings[:, :num_embedding] = drawn.to(embeddings.device)
        embeddings[:, num_embedding] = length
        projection_ZE = torch.linalg.qr(torch.randn(num_embedding, num_room, generator=random))[0].T
        _plant_looking_back(checkpoint, parts, projection_ZE, frequencies)
        for layer in checkpoint.memory_layers[1:]:
            _plant_matching(checkpoint, layer, parts, projection_ZE, slow, random)


def _get_weights(checkpoint: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
    """Returns the four matrices of a layer's attention."""
    attention = checkpoint.decoder.get_submodule(f"layers.{layer}.self_attn")
    return {name: attention.get_parameter(f"{name}_proj.weight") for name in "qkvo"}


def _list_query_heads(checkpoint: Checkpoint, head: int) -> range:
    """Returns the query heads that a KV head serves."""
    group = int(checkpoint.config.num_attention_heads) // checkpoint.num_kv_heads
    return range(head * group, (head + 1) * group)


def _plant_looking_back(
    checkpoint: Checkpoint, parts: _Parts, projection_ZE: torch.Tensor, frequencies: torch.Tensor
) -> None:
    """Makes heads of layer 0 attend to the token before and put a projection of it into the room."""
    weights, dim = _get_weights(checkpoint, 0), checkpoint.head_dim
    half = dim // 2
    constant = parts.num_embedding
    fast = torch.arange(min(FAST_FREQUENCIES, half))
    # The product of query and key of one frequency is the square of this, over the scaling's divisor.
    reach = (DISTANCE_SCORE / checkpoint.attention_scaling) ** 0.5 / (parts.length * parts.scale)
    for head in range(NUM_LOOKING_BACK):
        rows = slice(head * dim, (head + 1) * dim)
        key, query = torch.zeros(dim), torch.zeros(dim)
        key[fast] = reach
        query[fast] = reach * torch.cos(frequencies[fast])
        query[fast + half] = -reach * torch.sin(frequencies[fast])
        weights["k"][rows] = 0.0
        weights["k"][rows, constant] = key
        weights["v"][rows] = 0.0
        weights["v"][rows, : parts.num_embedding] = projection_ZE[rows]
        served = _list_query_heads(checkpoint, head)
        for place in served:
            columns = slice(place * dim, (place + 1) * dim)
            weights["q"][columns] = 0.0
            weights["q"][columns, constant] = query
            weights["o"][:, columns] = 0.0
            room = slice(constant + 1 + head * dim, constant + 1 + (head + 1) * dim)
            weights["o"][room, columns] = torch.eye(dim) / (parts.scale * len(served))


def _plant_matching(
    checkpoint: Checkpoint,
    layer: int,
    parts: _Parts,
    projection_ZE: torch.Tensor,
    slow: torch.Tensor,
    random: torch.Generator,
) -> None:
    """Makes the heads of a layer find what followed the current token before, and predict it."""
    weights, dim = _get_weights(checkpoint, layer), checkpoint.head_dim
    num_heads = checkpoint.num_kv_heads
    slots = torch.cat((slow, slow + dim // 2))
    # The projection of an embedding to some coordinates of the room has this length after the norm.
    projected = parts.length * parts.scale_later * (len(slots) / parts.num_embedding) ** 0.5
    reach = (MATCH_SCORE / checkpoint.attention_scaling) ** 0.5 / projected
    num_heads_in_all = (len(checkpoint.memory_layers) - 1) * int(checkpoint.config.num_attention_heads) / num_heads
    for head in range(num_heads):
        picked = torch.randperm(parts.num_room, generator=random)[: len(slots)]
        rows = slice(head * dim, (head + 1) * dim)
        weights["k"][rows] = 0.0
        weights["k"][head * dim + slots, parts.num_embedding + 1 + picked] = reach
        copied = torch.arange(head, parts.num_embedding, num_heads)[:dim]
        places = torch.arange(len(copied))
        weights["v"][rows] = 0.0
        weights["v"][head * dim + places, copied] = 1.0 / parts.scale_later
        for place in _list_query_heads(checkpoint, head):
            columns = slice(place * dim, (place + 1) * dim)
            weights["q"][columns] = 0.0
            weights["q"][place * dim + slots, : parts.num_embedding] = projection_ZE[picked] * reach
            weights["o"][:, columns] = 0.0
            weights["o"][copied, place * dim + places] = COPY_SHARE / num_heads_in_all
