"""Values of a memory fitted so that its few slots answer as all tokens of the reference would: an option of ours.

The paper stores the values of the kept tokens as they are. But a query that meets eight slots pays them the attention
that it would have paid to 128 tokens, so what it reads is not what it would have read. Here each KV head's values are
fitted by ridge regression: over the reference's own queries, without RoPE, attention to the slots gives as nearly as
possible what attention to all tokens gives. Keys, offsets and bytes stay what they are.

With A the attention of the queries to the slots and P that to all tokens, the fit is

    V' = argmin |A V' - P V|^2 + ridge |V' - V_S|^2,

pulled towards the kept values V_S. It is linear in V, so it is found as a matrix W with V' = W V. Gradients flow
through V only: queries and keys choose the weights, as they choose the tokens.

Shape letters: B references, H KV heads, G query heads a KV head, T tokens of the reference, Q = G x T queries, S slots,
D head dimension.
"""

import torch

from model.selecting import weigh_tokens
from schemas.records import EMPTY_SLOT

RIDGE = 0.3
"""Pull towards the kept values, as a share of the mean attention a slot gets. Less fits the reference's own queries
better and those of a reader, which are rotated and have other keys beside them, worse."""


@torch.no_grad()
def fit_weights(
    queries_BHGTD: torch.Tensor,
    keys_BHTD: torch.Tensor,
    valid_BT: torch.Tensor,
    offsets_BHS: torch.Tensor,
    *,
    scaling: float,
    ridge: float = RIDGE,
) -> torch.Tensor:
    """Returns W, (B, H, S, T) float32: fitted values are W times the values of all tokens; zero rows in empty slots.

    Args:
        queries_BHGTD: queries before RoPE.
        keys_BHTD: keys before RoPE.
        valid_BT: True for tokens of the reference; BOS and padding are False and take no part.
        offsets_BHS: the kept tokens; ``EMPTY_SLOT`` where there is none.
        scaling: factor on the products of queries and keys.
        ridge: above 0; see :data:`RIDGE`.
    """
    of_all_BHQT = weigh_tokens(queries_BHGTD, keys_BHTD, valid_BT, scaling=scaling)
    is_kept = torch.nn.functional.one_hot(offsets_BHS, EMPTY_SLOT + 1)
    kept_BHST = is_kept[..., : keys_BHTD.shape[2]].float()
    # Attention to the kept tokens alone is their part of the attention to all, made to sum to one.
    of_kept_BHQS = of_all_BHQT @ kept_BHST.mT
    of_kept_BHQS /= of_kept_BHQS.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    gram_BHSS = (of_kept_BHQS.mT @ of_kept_BHQS).double()
    wanted_BHST = (of_kept_BHQS.mT @ of_all_BHQT).double()
    pull = ridge * gram_BHSS.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(gram_BHSS.shape[-1], dtype=torch.float64, device=gram_BHSS.device)
    change = torch.linalg.solve(gram_BHSS + pull * identity, wanted_BHST - gram_BHSS @ kept_BHST.double())
    weights_BHST: torch.Tensor = (kept_BHST + change).float()
    return weights_BHST.masked_fill((offsets_BHS == EMPTY_SLOT)[..., None], 0.0)


def refit_values(
    queries_BHGTD: torch.Tensor,
    keys_BHTD: torch.Tensor,
    values_BHTD: torch.Tensor,
    valid_BT: torch.Tensor,
    offsets_BHS: torch.Tensor,
    *,
    scaling: float,
) -> torch.Tensor:
    """Returns the fitted values of the slots, (B, H, S, D) in the type of the values; zeros in empty slots.

    A reference of no more tokens than slots keeps its values: attention to the slots is attention to all.
    Arguments as in :func:`fit_weights`.
    """
    weights = fit_weights(queries_BHGTD, keys_BHTD, valid_BT, offsets_BHS, scaling=scaling)
    return (weights @ values_BHTD.float()).to(values_BHTD.dtype)
