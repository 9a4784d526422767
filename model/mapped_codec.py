"""Codecs ``mapped-...``: an affine map of each layer and head before another codec, undone after it.

The mean is taken off, and the rest is turned and stretched so that the plain squared error the inner codec keeps small
is the error that matters. If M is the form by which errors cost (:func:`model.codec_error.measure_key_metric`; for
values the identity) and C the covariance of the vectors:

* for codecs that learn (``lloyd``, ``PRQ``, ``OPQ``) vectors are multiplied by the root of M and turned to their
  principal axes, so that a squared error is a cost;
* for codecs whose error is alike in all directions (``turbo``, ``int8``) a map A has the cost tr(M P^-1) tr(C P) with
  P = A'A, which is least for P C P = M: the geometric mean of M and the inverse of C.

Shape letters: as in :mod:`model.coding`; E the numbers of a mapped vector, as many as D.
"""

from typing import Protocol

import torch

from schemas.codec_names import MAPPED

SHRINKAGE = 0.01
"""Share of a covariance, or form of costs, that is replaced by the same in all directions."""


class InnerCodec(Protocol):
    """A codec that looks numbers up and then multiplies them with a matrix, if any."""

    @property
    def name(self) -> str:
        """The codec's name without digest."""

    @property
    def basis_DD(self) -> torch.Tensor | None:  # noqa: N802 - the letters of its shape
        """The matrix, applied on the right; None for the identity."""

    @property
    def code_bytes(self) -> int:
        """Bytes of a coded vector."""

    def encode(self, vectors_NLHSD: torch.Tensor) -> torch.Tensor:
        """See :class:`model.coding.VectorCodec`."""

    def look_up(self, codes_NLHSC: torch.Tensor) -> torch.Tensor:
        """Returns what codes stand for before they are multiplied with ``basis_DD``."""


class MappedCodec:
    """A codec of keys or values behind a map of each layer and head.

    Attributes:
        name: the codec's name.
    """

    def __init__(
        self, inner: InnerCodec, mean_LHD: torch.Tensor, map_LHDE: torch.Tensor, inverse_LHED: torch.Tensor
    ) -> None:
        """Joins a codec with a map.

        Args:
            inner: the codec of mapped vectors.
            mean_LHD: is taken off before.
            map_LHDE: the map, applied on the right.
            inverse_LHED: its inverse.
        """
        self.name = MAPPED + inner.name
        self._inner = inner
        self._mean_LHD = mean_LHD
        self._map_LHDE = map_LHDE
        self._back_LHED = inverse_LHED if inner.basis_DD is None else inner.basis_DD @ inverse_LHED

    @property
    def code_bytes(self) -> int:
        """Bytes of a coded vector."""
        return self._inner.code_bytes

    def encode(self, vectors_NLHSD: torch.Tensor) -> torch.Tensor:
        """Returns the codes of vectors, uint8 (N, L, H, S, C)."""
        return self._inner.encode(apply_map(vectors_NLHSD.float(), self._mean_LHD, self._map_LHDE))

    def decode(self, codes_NLHSC: torch.Tensor) -> torch.Tensor:
        """Returns what codes stand for, float32 (N, L, H, S, D)."""
        found_NLHSE = self._inner.look_up(codes_NLHSC)
        num_records, num_layers, num_heads, num_slots, size = found_NLHSE.shape
        rows = found_NLHSE.permute(1, 2, 0, 3, 4).reshape(num_layers * num_heads, num_records * num_slots, size)
        back = self._back_LHED.to(rows.device).flatten(0, 1)
        mean = self._mean_LHD.to(rows.device).flatten(0, 1)[:, None]
        vectors = torch.baddbmm(mean, rows, back).view(num_layers, num_heads, num_records, num_slots, size)
        return vectors.permute(2, 0, 1, 3, 4)


def apply_map(vectors_NLHSD: torch.Tensor, mean_LHD: torch.Tensor, map_LHDE: torch.Tensor) -> torch.Tensor:
    """Takes the mean off and maps, (N, L, H, S, E)."""
    mean_LHD, map_LHDE = mean_LHD.to(vectors_NLHSD.device), map_LHDE.to(vectors_NLHSD.device)
    mapped: torch.Tensor = torch.einsum("nlhsd,lhde->nlhse", vectors_NLHSD - mean_LHD[:, :, None], map_LHDE)
    return mapped


def _shrink(forms: torch.Tensor) -> torch.Tensor:
    """Adds to symmetric forms (..., D, D) a little of the same in all directions."""
    size = forms.shape[-1]
    level = forms.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
    return (1 - SHRINKAGE) * forms + SHRINKAGE * level * torch.eye(size, dtype=forms.dtype, device=forms.device)


def _power(forms: torch.Tensor, exponent: float) -> torch.Tensor:
    """Raises symmetric positive forms (..., D, D) to a power."""
    values, vectors = torch.linalg.eigh(forms)
    raised: torch.Tensor = (vectors * values[..., None, :] ** exponent) @ vectors.mT
    return raised


def train_map(
    vectors_NLHSD: torch.Tensor, metric_LHDD: torch.Tensor | None, *, learns: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Finds the map for an inner codec.

    Args:
        vectors_NLHSD: vectors to learn from.
        metric_LHDD: what errors cost, up to a factor of each use; None for the plain squared error.
        learns: whether the inner codec is one that learns.

    Returns:
        ``mean`` (L, H, D), ``map`` (L, H, D, E) and ``inverse`` (L, H, E, D), float32, and the variances of mapped
        vectors in the units of the metric, (L, H, E), descending for a codec that learns.
    """
    vectors = vectors_NLHSD.double()
    mean_LHD = vectors.mean((0, 3))
    centred = (vectors - mean_LHD[:, :, None]).permute(1, 2, 0, 3, 4).flatten(2, 3)
    covariance = _shrink(centred.mT @ centred / centred.shape[2])
    identity = torch.eye(vectors.shape[-1], dtype=torch.float64)
    metric = identity.expand_as(covariance) if metric_LHDD is None else _shrink(metric_LHDD.double())
    if learns:
        root = _power(metric, 0.5)
        variances, axes = torch.linalg.eigh(root @ covariance @ root)
        variances, axes = variances.flip(-1), axes.flip(-1)
        map_LHDE, inverse_LHED = root @ axes, axes.mT @ _power(metric, -0.5)
    else:
        half, inverse_half = _power(covariance, 0.5), _power(covariance, -0.5)
        mean_form = inverse_half @ _power(half @ metric @ half, 0.5) @ inverse_half
        map_LHDE, inverse_LHED = _power(mean_form, 0.5), _power(mean_form, -0.5)
        variances = (map_LHDE.mT @ covariance @ map_LHDE).diagonal(dim1=-2, dim2=-1)
    found = {"mean": mean_LHD.float(), "map": map_LHDE.float(), "inverse": inverse_LHED.float()}
    return found, variances
