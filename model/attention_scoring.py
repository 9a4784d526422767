"""How well a memory answers a text by the model's own attention (method section 9, Remark 2).

Where it stands: queries of a text (:mod:`model.attention_queries`) and stored keys, both before RoPE, become one score
a memory; :mod:`model.attention_retrieving` looks through a bank with it.

For every pair of memory layer and KV head, queries and keys are taken as directions from their means over the bank. A
query's match with a memory is the greatest cosine with the keys that the memory kept, and every query of the text deals
out one unit of attention over all references by a softmax of these matches. The score is the mean of what a memory
gets, over queries and pairs. A query that matches everything, such as that of a comma, thereby counts for little, as a
common word does in BM25.

That was chosen among twenty forms by 60 sentences and 60 chunks, asked over 3,300 references of real text with the
shipped model. Mean reciprocal rank of sentences, and of chunks for what follows them, with the heads of the second and
third memory layer: 0.90 and 0.46; without the softmax over references, which is the late interaction of ColBERT, 0.89
and 0.38; raw products of all heads, 0.89 and 0.30; raw products with a softmax over the keys of a memory, 0.85 and
0.29; one mean query and one mean key, 0.12 and 0.14. Weights for heads, fitted to half of the questions and tried on
the other, won nothing over sums. Memories with all 128 tokens would have 0.98 and 0.58, with 64 of them 0.96 and 0.55,
with 16 or 8 0.79 and 0.35, or 0.62 and 0.28, where BM25 had 0.96 and 0.53 and the static embedder 0.63 and 0.41: what
is not kept cannot be found.

The denominators of the softmax are means over a sample of the bank, so that one pass is enough and that a few
candidates get the scores that they would get in a search of all.

Shape letters: P pairs of memory layer and KV head, layer by layer, N memories, S slots, Q queries, D head dimension.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from model.attention_queries import compute_queries
from model.fetching import BankMemories
from model.live_references import read_live_references
from schemas.errors import InputError
from schemas.records import EMPTY_SLOT

SHARPNESS = 16.0
"""Factor on cosines in the softmax: 8 had 0.91 and 0.43 on the questions above, 32 had 0.86 and 0.48."""

SAMPLE_REFERENCES = 1024
"""References that means and denominators are taken from."""

QUERY_REFERENCES = 64
"""References of the sample whose tokens the mean query is taken from."""

REFERENCES_AT_ONCE = 256
"""Memories that are fetched together; cold ones are written so."""

PRODUCTS_AT_ONCE = 1 << 20
"""Products of queries and keys that are held at a time, 4 MiB: more would leave a processor's cache."""

SMALLEST_LENGTH = 1e-6


def point_from(vectors: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Returns the directions of vectors (..., D) from their mean, as unit vectors."""
    centred = vectors.float() - mean
    directions: torch.Tensor = centred / centred.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_LENGTH)
    return directions


def point_keys(keys_PNSD: torch.Tensor, kept_PNS: torch.Tensor, means_P11D: torch.Tensor) -> torch.Tensor:
    """Returns keys as directions from the means of their pairs, float16 (P, S, N, D).

    An empty slot gets the first key of its memory, which changes no maximum. Slots stand before memories because a
    maximum over them is then one over rows, which is several times as fast.
    """
    filled_PNSD = torch.where(kept_PNS[..., None], keys_PNSD, keys_PNSD[:, :, :1])
    return point_from(filled_PNSD, means_P11D).half().transpose(1, 2).contiguous()


def match_keys(queries_QD: torch.Tensor, keys_SND: torch.Tensor) -> torch.Tensor:
    """Returns the greatest cosine of each query with the keys of each memory, (N, Q) float32.

    Args:
        queries_QD: unit vectors, float32.
        keys_SND: unit vectors.
    """
    num_slots, num_memories, dimension = keys_SND.shape
    products = keys_SND.reshape(-1, dimension).float() @ queries_QD.T
    return products.view(num_slots, num_memories, -1).amax(0)


def fetch_raw_keys(
    memories: BankMemories, pairs: Sequence[int], ref_ids: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the keys of memories as stored, (P, N, S, D), and which slots hold one, (P, N, S).

    Raises:
        BankError: as :meth:`model.fetching.FetchedMemories.fetch`.
    """
    parts, kept = [], []
    for start in range(0, len(ref_ids), REFERENCES_AT_ONCE):
        fetched = memories.fetch(ref_ids[start : start + REFERENCES_AT_ONCE])
        parts.append(fetched.keys_LBHSD.movedim(2, 1).flatten(0, 1)[list(pairs)])
        kept.append((fetched.offsets_LBHS != EMPTY_SLOT).movedim(2, 1).flatten(0, 1)[list(pairs)])
    return torch.cat(parts, 1), torch.cat(kept, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionScorer:
    """Scores memories of one version of a bank for texts; :func:`make_scorer` makes one for all pairs.

    Attributes:
        memories: where keys come from.
        pairs: the pairs of memory layer and KV head that count, as ``layer place x KV heads + head``.
        sharpness: factor on cosines in the softmax.
        key_means_P11D: mean kept key of each pair.
        query_means_P1D: mean query of each pair.
        sample_PSND: keys of a sample of the bank, as :func:`point_keys` returns them.
    """

    memories: BankMemories
    pairs: tuple[int, ...]
    sharpness: float
    key_means_P11D: torch.Tensor
    query_means_P1D: torch.Tensor
    sample_PSND: torch.Tensor

    def select(self, pairs: Sequence[int]) -> "AttentionScorer":
        """Returns a scorer for which only some of the pairs of this one count.

        Raises:
            InputError: a pair is not among them, or there is none.
        """
        if not pairs or not set(pairs) <= set(self.pairs):
            raise InputError(f"attention scores: pairs are {list(pairs)}, must be some of {list(self.pairs)}")
        places = [self.pairs.index(pair) for pair in pairs]
        return dataclasses.replace(
            self,
            pairs=tuple(pairs),
            key_means_P11D=self.key_means_P11D[places],
            query_means_P1D=self.query_means_P1D[places],
            sample_PSND=self.sample_PSND[places],
        )

    def fetch_keys(self, ref_ids: Sequence[str]) -> torch.Tensor:
        """Returns the keys of memories, at least one, in the order asked for, as :func:`point_keys`.

        Raises:
            BankError: as :meth:`model.fetching.FetchedMemories.fetch`.
        """
        return point_keys(*fetch_raw_keys(self.memories, self.pairs, ref_ids), self.key_means_P11D)

    def ask(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Returns the queries of texts as directions, (P, Q, D) each; of a long text those of its first tokens."""
        checkpoint = self.memories.checkpoint
        tokens = [ids[: checkpoint.max_reference_tokens] for ids in checkpoint.tokenizer.encode(texts)]
        places = [place for place, ids in enumerate(tokens) if len(ids)]
        nothing = self.query_means_P1D[:, :0]
        found = [nothing] * len(tokens)
        computed = compute_queries(checkpoint, [tokens[place] for place in places])
        for place, queries_PQD in zip(places, computed, strict=True):
            found[place] = point_from(queries_PQD[list(self.pairs)], self.query_means_P1D)
        return found

    def share_out(self, place: int, queries_QD: torch.Tensor, keys_SND: torch.Tensor) -> torch.Tensor:
        """Returns the attention that memories get from each query of one pair, (N, Q); its mean over the bank is 1.

        Args:
            place: the place of the pair among :attr:`pairs`.
            queries_QD: queries of the pair, as :meth:`ask` returns them.
            keys_SND: of the memories, for this pair.
        """
        sums_1Q = self._match(queries_QD, self.sample_PSND[place]).mean(0, keepdim=True)
        return self._match(queries_QD, keys_SND) / sums_1Q

    def _match(self, queries_QD: torch.Tensor, keys_SND: torch.Tensor) -> torch.Tensor:
        """Returns the numerators of the softmax, (N, Q), a part of the memories at a time."""
        num_slots, num_memories = keys_SND.shape[:2]
        queries_QD = queries_QD.to(keys_SND.device)
        step = max(1, PRODUCTS_AT_ONCE // max(1, len(queries_QD) * num_slots))
        found_NQ = torch.empty(num_memories, len(queries_QD), device=keys_SND.device)
        for start in range(0, num_memories, step):
            found_NQ[start : start + step] = match_keys(queries_QD, keys_SND[:, start : start + step])
        return found_NQ.mul_(self.sharpness).exp_()

    @torch.inference_mode()
    def score_candidates(self, texts: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[torch.Tensor]:
        """Returns for each text the scores of its candidates by pair, (P, N) on the CPU; zeros for an empty text.

        Raises:
            BankError: as :meth:`model.fetching.FetchedMemories.fetch`.
        """
        found = []
        for queries_PQD, ref_ids in zip(self.ask(texts), candidates, strict=True):
            scores_PN = torch.zeros(len(self.pairs), len(ref_ids))
            if ref_ids and queries_PQD.shape[1]:
                keys_PSND = self.fetch_keys(ref_ids)
                for place, queries_QD in enumerate(queries_PQD):
                    scores_PN[place] = self.share_out(place, queries_QD, keys_PSND[place]).mean(1).cpu()
            found.append(scores_PN)
        return found


def make_scorer(memories: BankMemories, *, sharpness: float = SHARPNESS) -> AttentionScorer:
    """Returns a scorer for which all pairs count, with means and a sample of a bank, whose cold memories are written.

    Args:
        memories: of the bank.
        sharpness: see :data:`SHARPNESS`.

    Raises:
        InputError: the bank has no live references, or the sharpness is not above 0.
        BankError: as :meth:`model.fetching.FetchedMemories.fetch`.
    """
    if sharpness <= 0:
        raise InputError(f"attention scores: sharpness is {sharpness}, must be above 0")
    checkpoint = memories.checkpoint
    pairs = tuple(range(len(checkpoint.memory_layers) * checkpoint.num_kv_heads))
    sample = read_live_references(memories.bank, ["token_ids"]).slice(0, SAMPLE_REFERENCES)
    keys_PNSD, kept_PNS = fetch_raw_keys(memories, pairs, sample["ref_id"].to_pylist())
    means_P11D = keys_PNSD.float().sum((1, 2), keepdim=True) / kept_PNS.sum((1, 2))[:, None, None, None]
    asked = [np.array(ids, np.int32) for ids in sample["token_ids"][:QUERY_REFERENCES].to_pylist()]
    return AttentionScorer(
        memories=memories,
        pairs=pairs,
        sharpness=sharpness,
        key_means_P11D=means_P11D,
        query_means_P1D=torch.cat(compute_queries(checkpoint, asked), 1).mean(1, keepdim=True),
        sample_PSND=point_keys(keys_PNSD, kept_PNS, means_P11D),
    )
