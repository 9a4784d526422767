"""The codecs ``turbo1`` to ``turbo4``: a norm, and a direction rotated so that every coordinate is alike.

In a rotated frame the coordinates of any unit vector are spread nearly like normal numbers of variance 1 / D, so that
one table of levels, known beforehand, serves all of them and nothing is trained. This is TurboQuant in its form for
the mean squared error (arXiv 2504.19874). The norm is not that of the vector but the factor by which what is decoded
comes nearest to it.

A coded vector is its norm, a float16, followed by a number of 1 to 4 bits a coordinate, the lowest bits first.

Shape letters: as in :mod:`model.coding`.
"""

import functools
import hashlib
import math

import numpy as np
import torch

from model.bit_packing import look_up_bits, pack_bits
from model.plain_codecs import join_scales, limit_scales, read_scales
from schemas.codec_names import SCALE_BYTES

POSITIVE_LEVELS = {
    1: (0.79788456,),
    2: (0.45278003, 1.51041761),
    3: (0.24509418, 0.75600528, 1.34390928, 2.15194570),
    4: (0.12839503, 0.38804830, 0.65675912, 0.94234046, 1.25623120, 1.61804639, 2.06901723, 2.73258957),
}
"""By bits, the levels above zero that have the least mean squared error for normal numbers (Lloyd 1957, Max 1960)."""

GRID_BITS = 20
"""The rotation is rounded to this many binary places: it is then the same whatever computes it."""


def make_rotation(head_dim: int) -> torch.Tensor:
    """Returns the rotation of vectors of a size, float32 (D, D), the same for ever and everywhere.

    SHAKE-256 of ``memory3 rotation <D>`` is read as 12 x D x D numbers of 32 bits, little endian. Twelve in a row make
    one number, nearly normal: their sum less 6 x 2^32, a whole number. The rows of this matrix are made orthogonal to
    those before, one after the other and twice, so that rounding does not add up, and then rounded.
    """
    stream = hashlib.shake_256(f"memory3 rotation {head_dim}".encode()).digest(4 * 12 * head_dim**2)
    sums = np.frombuffer(stream, "<u4").reshape(head_dim, head_dim, 12).astype(np.int64).sum(2)
    rows = (sums - 6 * 2**32) / 2**32
    for place, row in enumerate(rows):
        for _ in range(2):
            row -= rows[:place].T @ (rows[:place] @ row)
        row /= math.sqrt(row @ row)
    return torch.from_numpy(np.round(rows * 2**GRID_BITS) / 2**GRID_BITS).float()


def make_levels(num_bits: int, head_dim: int) -> torch.Tensor:
    """Returns the levels of a coordinate of a unit vector, ascending, float32 (2 ** bits,)."""
    positive = torch.tensor(POSITIVE_LEVELS[num_bits], dtype=torch.float64)
    return (torch.cat((-positive.flip(0), positive)) / math.sqrt(head_dim)).float()


class TurboCodec:
    """The codec ``turbo<bits>`` of keys or values.

    Attributes:
        name: the codec's name.
        code_bytes: bytes of a coded vector.
        basis_DD: the map from what :meth:`look_up` returns to vectors, applied on the right.
    """

    def __init__(self, num_bits: int, head_dim: int, *, device: torch.device | str = "cpu") -> None:
        """Makes the rotation and the levels.

        Args:
            num_bits: bits of a coordinate, 1 to 4.
            head_dim: size of a vector.
            device: where decoding will be done.
        """
        self.name = f"turbo{num_bits}"
        self.code_bytes = SCALE_BYTES + -(-head_dim * num_bits // 8)
        self.basis_DD = _make_rotation_once(head_dim).to(device)
        self._num_bits = num_bits
        self._head_dim = head_dim
        self._levels = make_levels(num_bits, head_dim).to(device)
        # Several coordinates are looked up at a time: 4 of 3 or 4 bits, whole bytes of fewer.
        at_once = 8 // num_bits if num_bits < 3 else 4
        groups = torch.arange(2 ** (at_once * num_bits), device=device)[:, None]
        shifts = num_bits * torch.arange(at_once, device=device)
        self._table = self._levels[(groups >> shifts) & (2**num_bits - 1)]
        self._group_bits = [at_once * num_bits] * -(-head_dim // at_once)
        self._first = torch.zeros(len(self._group_bits), dtype=torch.int32, device=device)

    def encode(self, vectors_NLHSD: torch.Tensor) -> torch.Tensor:
        """Returns the codes of vectors, uint8 (N, L, H, S, C)."""
        vectors = vectors_NLHSD.float()
        rotation, levels = self.basis_DD.to(vectors.device), self._levels.to(vectors.device)
        rotated = vectors @ rotation.mT
        norms = rotated.norm(dim=-1, keepdim=True)
        units = torch.where(norms > 0, rotated / norms, 0.0)
        numbers = torch.bucketize(units, (levels[1:] + levels[:-1]) / 2)
        nearest = levels[numbers]
        scales = limit_scales((rotated * nearest).sum(-1) / nearest.square().sum(-1))
        return join_scales(scales, pack_bits(numbers, [self._num_bits] * self._head_dim))

    def look_up(self, codes_NLHSC: torch.Tensor) -> torch.Tensor:
        """Returns what codes stand for in the rotated frame, float32 (N, L, H, S, D)."""
        device = codes_NLHSC.device
        packed = codes_NLHSC[..., SCALE_BYTES:]
        found = look_up_bits(packed, self._group_bits, self._first.to(device), self._table.to(device))
        return found[..., : self._head_dim] * read_scales(codes_NLHSC)[..., None]

    def decode(self, codes_NLHSC: torch.Tensor) -> torch.Tensor:
        """Returns what codes stand for, float32 (N, L, H, S, D)."""
        return self.look_up(codes_NLHSC) @ self.basis_DD.to(codes_NLHSC.device)


@functools.cache
def _make_rotation_once(head_dim: int) -> torch.Tensor:
    return make_rotation(head_dim)
