"""The codecs that learn nothing and look at one vector alone: none at all, and 8 bits a number.

A coded vector of ``int8`` is its scale, a float16, followed by its numbers divided by the scale, as signed bytes.

Shape letters: as in :mod:`model.coding`.
"""

import dataclasses

import torch

from schemas.codec_names import NONE, SCALE_BYTES
from schemas.records import ITEM_SIZES_BYTES

LARGEST_STEP = 127


def join_scales(scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Puts scales (...), stored as float16, before codes, uint8 (..., any)."""
    return torch.cat((scales.to(torch.float16)[..., None].view(torch.uint8), codes), -1)


def read_scales(codes: torch.Tensor) -> torch.Tensor:
    """Returns the scales (...) of what :func:`join_scales` made, float32; 0 for what is no finite number."""
    stored = codes[..., :SCALE_BYTES].clone(memory_format=torch.contiguous_format)
    return stored.view(torch.float16)[..., 0].float().nan_to_num(0.0, 0.0, 0.0)


def limit_scales(scales: torch.Tensor) -> torch.Tensor:
    """Rounds scales to what float16 can hold, returned as float32."""
    return scales.clamp(max=torch.finfo(torch.float16).max).to(torch.float16).float()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainCodec:
    """Vectors as they are: the codec ``none``.

    Attributes:
        head_dim: size of a vector.
        dtype: the type they are stored in.
    """

    head_dim: int
    dtype: str
    name: str = NONE

    @property
    def code_bytes(self) -> int:
        """Bytes of a coded vector."""
        return self.head_dim * ITEM_SIZES_BYTES[self.dtype]

    def encode(self, vectors_NLHSD: torch.Tensor) -> torch.Tensor:
        """Returns the bytes of the vectors in the type of the codec, uint8 (N, L, H, S, C)."""
        return vectors_NLHSD.to(getattr(torch, self.dtype)).contiguous().view(torch.uint8)

    def decode(self, codes_NLHSC: torch.Tensor) -> torch.Tensor:
        """Returns the vectors, float32 (N, L, H, S, D), as they were stored: infinite where they were."""
        # A copy, since a view of wider numbers must begin where such a number may stand.
        stored = codes_NLHSC.clone(memory_format=torch.contiguous_format)
        return stored.view(getattr(torch, self.dtype)).float()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteCodec:
    """A scale a vector and 8 bits a number: the codec ``int8``.

    Attributes:
        head_dim: size of a vector.
    """

    head_dim: int
    name: str = "int8"
    basis_DD: None = None

    @property
    def code_bytes(self) -> int:
        """Bytes of a coded vector."""
        return SCALE_BYTES + self.head_dim

    def encode(self, vectors_NLHSD: torch.Tensor) -> torch.Tensor:
        """Returns the codes, uint8 (N, L, H, S, C); numbers beyond 8 million are cut there."""
        vectors = vectors_NLHSD.float()
        scales = limit_scales(vectors.abs().amax(-1) / LARGEST_STEP)
        steps = torch.where(scales[..., None] > 0, vectors / scales[..., None], 0.0).round()
        return join_scales(scales, steps.clamp(-LARGEST_STEP, LARGEST_STEP).to(torch.int8).view(torch.uint8))

    def decode(self, codes_NLHSC: torch.Tensor) -> torch.Tensor:
        """Returns what codes stand for, float32 (N, L, H, S, D)."""
        return self.look_up(codes_NLHSC)

    def look_up(self, codes_NLHSC: torch.Tensor) -> torch.Tensor:
        """Does the same as :meth:`decode`; by this name a map asks for it."""
        steps = codes_NLHSC[..., SCALE_BYTES:].view(torch.int8)
        return steps * read_scales(codes_NLHSC)[..., None]
