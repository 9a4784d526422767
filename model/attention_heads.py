"""Which heads find memories: each pair of memory layer and KV head measured alone, on questions with a known answer.

Where it stands: before a search by attention is made, so that it holds the keys of few pairs. In the shipped model, the
heads of the second memory layer find nearly what all find together, each of them alone most of it; those of the third
less, and those of the first and last next to nothing. The second is the first whose heads were planted to copy
(:mod:`model.training.planting`): its keys carry the token before, and a copying query looks for it.

Shape letters: P pairs, N candidates.
"""

from collections.abc import Sequence

import numpy as np

from model.attention_scoring import AttentionScorer
from schemas.errors import InputError
from schemas.protocols import FloatArray

NUM_HEADS = 6


def measure_heads(
    scorer: AttentionScorer, texts: Sequence[str], candidates: Sequence[Sequence[str]], answers: Sequence[str]
) -> FloatArray:
    """Returns the reciprocal rank of the answer among the candidates of each question for each pair alone, (texts, P).

    Args:
        scorer: its pairs are measured.
        texts: the questions.
        candidates: for each of them some references, the answer among them.
        answers: the right one of each.
    """
    ranks = np.zeros((len(texts), len(scorer.pairs)), np.float32)
    for row, (scores_PN, ref_ids, answer) in enumerate(
        zip(scorer.score_candidates(texts, candidates), candidates, answers, strict=True)
    ):
        own = scores_PN[:, [list(ref_ids).index(answer)]]
        ranks[row] = (1 / (scores_PN >= own).sum(1)).numpy()
    return ranks


def choose_heads(values_P: FloatArray, pairs: Sequence[int], num_heads: int) -> list[int]:
    """Returns the pairs with the greatest values, ascending; of equally good ones the first.

    Raises:
        InputError: fewer than one is asked for.
    """
    if num_heads < 1:
        raise InputError(f"attention: asked for {num_heads} heads; ask for at least 1")
    order = np.argsort(-values_P, kind="stable")[:num_heads]
    return sorted(pairs[place] for place in order.tolist())
