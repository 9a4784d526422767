"""How well a memory answers a text by the model's own attention (method section 9, Remark 2).

Where it stands: queries of a text (:mod:`model.attention_queries`) and stored keys, both before RoPE, become one score a
memory; :mod:`model.attention_retrieving` looks through a bank with it.

Raw attention ranks poorly: keys of all memories share a direction, and long ones win. So, for every pair of memory layer
and KV head, queries and keys are taken as directions from their mean over the bank. A query's match with a memory is the
greatest cosine with the keys that the memory kept, and every query of the text deals out one unit of attention over all
references by a softmax of these matches. The score is the mean of what a memory gets, over queries and pairs. A query
that matches everything, such as that of a comma, thereby counts for little, as a common word does in BM25.

The denominators of the softmax are means over a sample of the bank, so that one pass is enough and that a few candidates
get the scores that they would get in a search of all.

Shape letters: P pairs of memory layer and KV head, layer by layer, N memories, M memories of the sample, S slots, Q
queries, D head dimension.
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
"""Factor on cosines in the softmax. With the shipped model 8 to 32 rank alike, 32 a little worse by words."""

SAMPLE_REFERENCES = 1024
"""References that means and denominators are taken from."""

QUERY_REFERENCES = 64
"""References of the sample whose tokens the mean query is taken from."""

REFERENCES_AT_ONCE = 256
"""Memories that are fetched together; cold ones are written so."""

PRODUCTS_AT_ONCE = 1 << 22
"""Products of queries and keys that are held at a time, 16 MiB."""

SMALLEST_LENGTH = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryKeys:
    """The keys of memories as directions from their mean.

    Attributes:
        keys_PNSD: unit vectors, float16; zeros in empty slots.
        kept_PNS: whether a slot holds a token.
    """

    keys_PNSD: torch.Tensor
    kept_PNS: torch.Tensor


def point_from(vectors: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Returns the directions of vectors (..., D) from their mean, as unit vectors."""
    centred = vectors.float() - mean
    return centred / centred.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_LENGTH)


def point_keys(keys_PNSD: torch.Tensor, kept_PNS: torch.Tensor, means_P11D: torch.Tensor) -> MemoryKeys:
    """Returns keys as directions from the means of their pairs."""
    pointed = point_from(keys_PNSD, means_P11D) * kept_PNS[..., None]
    return MemoryKeys(keys_PNSD=pointed.half(), kept_PNS=kept_PNS)


def match_keys(queries_QD: torch.Tensor, keys_NSD: torch.Tensor, kept_NS: torch.Tensor) -> torch.Tensor:
    """Returns the greatest cosine of each query with the keys of each memory, (Q, N) float32; -1 if it has none.

    Args:
        queries_QD: unit vectors, float32.
        keys_NSD: unit vectors.
        kept_NS: whether a slot holds a token.
    """
    floor_1K = torch.zeros(kept_NS.shape, device=kept_NS.device).masked_fill_(~kept_NS, -torch.inf).view(1, -1)
    products_QK = torch.addmm(floor_1K, queries_QD, keys_NSD.reshape(-1, keys_NSD.shape[-1]).float().T)
    return products_QK.view(len(queries_QD), *kept_NS.shape).amax(-1).clamp_min_(-1.0)


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
        sample: keys of a sample of the bank.
    """

    memories: BankMemories
    pairs: tuple[int, ...]
    sharpness: float
    key_means_P11D: torch.Tensor
    query_means_P1D: torch.Tensor
    sample: MemoryKeys

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
            sample=MemoryKeys(keys_PNSD=self.sample.keys_PNSD[places], kept_PNS=self.sample.kept_PNS[places]),
        )

    def fetch_keys(self, ref_ids: Sequence[str]) -> MemoryKeys:
        """Returns the keys of memories, at least one, in the order asked for.

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

    def share_out(self, place: int, queries_QD: torch.Tensor, keys: MemoryKeys) -> torch.Tensor:
        """Returns the attention that memories get from each query of one pair, (Q, N); its mean over the bank is 1.

        Args:
            place: the place of the pair among :attr:`pairs`.
            queries_QD: queries of the pair, as :meth:`ask` returns them.
            keys: of the memories.
        """
        sums_Q1 = self._match(place, queries_QD, self.sample).mean(1, keepdim=True)
        return self._match(place, queries_QD, keys) / sums_Q1

    def _match(self, place: int, queries_QD: torch.Tensor, keys: MemoryKeys) -> torch.Tensor:
        """Returns the numerators of the softmax, (Q, N), a part of the memories at a time."""
        keys_NSD, kept_NS = keys.keys_PNSD[place], keys.kept_PNS[place]
        queries_QD = queries_QD.to(keys_NSD.device)
        step = max(1, PRODUCTS_AT_ONCE // max(1, len(queries_QD) * kept_NS.shape[1]))
        found_QN = torch.empty(len(queries_QD), len(kept_NS), device=keys_NSD.device)
        for start in range(0, len(kept_NS), step):
            some = slice(start, start + step)
            found_QN[:, some] = match_keys(queries_QD, keys_NSD[some], kept_NS[some])
        return found_QN.mul_(self.sharpness).exp_()

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
                keys = self.fetch_keys(ref_ids)
                for place, queries_QD in enumerate(queries_PQD):
                    scores_PN[place] = self.share_out(place, queries_QD, keys).mean(0).cpu()
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
        sample=point_keys(keys_PNSD, kept_PNS, means_P11D),
    )
