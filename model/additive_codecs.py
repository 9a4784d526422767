"""Trained codecs that add up rows of codebooks: product-residual ones, and the paper's.

A code is a row number for each of several codebooks, packed the lowest bits first. In ``PRQ2x7x8`` each half of a
vector is the sum of 7 rows, from codebooks of 2^8 rows. In ``OPQ20x80-Residual2x14-PQ8x10`` a rotated vector is the
sum of 2 rows of codebooks of 2^14 and of 8 parts side by side, each a row of a codebook of 2^10. FAISS trains
(:mod:`model.codec_training`) and encodes; decoding is a lookup that sums and, for the paper's codec, a rotation.

Shape letters: as in :mod:`model.coding`; P parts of a vector, K stages, R rows of a codebook, E size of a part.
"""

import dataclasses
from typing import Any

import numpy as np
import torch

from model.bit_packing import count_packed_bytes, pack_bits, unpack_bits

BEAM_SIZE = 5
"""Sums that the encoder follows from stage to stage; more of them are slower and come a little nearer."""


VECTORS_AT_ONCE = 8192
"""Vectors that FAISS encodes at a time."""

MOST_BYTES = 1 << 28
"""Memory that FAISS may take for the distances to the rows of large codebooks; by default it takes 5 GB."""


def make_residual_quantizer(codebooks_KRE: torch.Tensor) -> Any:
    """Returns FAISS's residual quantizer with these codebooks."""
    import faiss

    num_stages, num_rows, size = codebooks_KRE.shape
    quantizer = faiss.ResidualQuantizer(size, num_stages, num_rows.bit_length() - 1)
    faiss.copy_array_to_vector(codebooks_KRE.cpu().numpy().ravel(), quantizer.codebooks)
    quantizer.is_trained = True
    quantizer.max_beam_size = BEAM_SIZE
    quantizer.max_mem_distances = MOST_BYTES
    return quantizer


def encode_stages(codebooks_KRE: torch.Tensor, vectors: np.ndarray) -> torch.Tensor:
    """Returns for vectors (rows, E) float32 the row of each stage whose sum comes near, int64 (rows, K)."""
    num_stages, num_rows, _ = codebooks_KRE.shape
    quantizer = make_residual_quantizer(codebooks_KRE)
    # FAISS keeps the products of all vectors it is given with all rows.
    parts = [
        quantizer.compute_codes(np.ascontiguousarray(vectors[start : start + VECTORS_AT_ONCE]))
        for start in range(0, max(1, len(vectors)), VECTORS_AT_ONCE)
    ]
    packed = torch.from_numpy(np.concatenate(parts))
    return unpack_bits(packed, [num_rows.bit_length() - 1] * num_stages).long()


def sum_rows(codebooks_KRE: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Returns the sums of rows of K codebooks, (..., E); ``numbers`` are int32 (..., K)."""
    num_stages, num_rows, size = codebooks_KRE.shape
    first = torch.arange(num_stages, dtype=torch.int32, device=numbers.device) * num_rows
    table = codebooks_KRE.to(numbers.device).view(-1, size)
    rows = (numbers + first).view(-1, num_stages)
    return torch.nn.functional.embedding_bag(rows, table, mode="sum").view(*numbers.shape[:-1], size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductResidualCodec:
    """The codec ``PRQ<parts>x<stages>x<bits>`` of keys or values.

    Attributes:
        name: the codec's name.
        stages_PKRE: codebooks, float32.
    """

    name: str
    stages_PKRE: torch.Tensor
    basis_DD: None = None

    @property
    def _num_bits(self) -> list[int]:
        num_parts, num_stages, num_rows, _ = self.stages_PKRE.shape
        return [num_rows.bit_length() - 1] * (num_parts * num_stages)

    @property
    def code_bytes(self) -> int:
        """Bytes of a coded vector."""
        return count_packed_bytes(self._num_bits)

    def encode(self, vectors_NLHSD: torch.Tensor) -> torch.Tensor:
        """Returns the codes of vectors, uint8 (N, L, H, S, C)."""
        size = self.stages_PKRE.shape[-1]
        flat = vectors_NLHSD.float().cpu().flatten(0, -2).numpy()
        parts = np.split(flat, flat.shape[1] // size, axis=1)
        numbers = [encode_stages(stages, part) for stages, part in zip(self.stages_PKRE, parts, strict=True)]
        codes = pack_bits(torch.cat(numbers, -1), self._num_bits)
        return codes.view(*vectors_NLHSD.shape[:-1], self.code_bytes).to(vectors_NLHSD.device)

    def look_up(self, codes_NLHSC: torch.Tensor) -> torch.Tensor:
        """Returns what codes stand for, float32 (N, L, H, S, D)."""
        num_parts, num_stages, num_rows, _ = self.stages_PKRE.shape
        numbers = unpack_bits(codes_NLHSC, self._num_bits).unflatten(-1, (num_parts, num_stages))
        # All parts in one lookup: a part's codebooks stand after those of the part before.
        first = torch.arange(num_parts, dtype=torch.int32, device=numbers.device) * (num_stages * num_rows)
        stages = torch.arange(num_stages, dtype=torch.int32, device=numbers.device) * num_rows
        table = self.stages_PKRE.to(numbers.device).flatten(0, 2)
        rows = (numbers + first[:, None] + stages).view(-1, num_stages)
        sums = torch.nn.functional.embedding_bag(rows, table, mode="sum")
        return sums.view(*codes_NLHSC.shape[:-1], num_parts * self.stages_PKRE.shape[-1])

    def decode(self, codes_NLHSC: torch.Tensor) -> torch.Tensor:
        """Returns what codes stand for, float32 (N, L, H, S, D)."""
        return self.look_up(codes_NLHSC)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotatedResidualCodec:
    """The paper's codec ``OPQ...-Residual...-PQ...`` of keys or values.

    Attributes:
        name: the codec's name.
        basis_DD: the inverse of the rotation, applied on the right.
        stages_KRD: codebooks of the stages, float32.
        parts_PRE: codebooks of the parts of what the stages leave, float32.
    """

    name: str
    basis_DD: torch.Tensor
    stages_KRD: torch.Tensor
    parts_PRE: torch.Tensor

    @property
    def _num_bits(self) -> list[int]:
        stages = [self.stages_KRD.shape[1].bit_length() - 1] * len(self.stages_KRD)
        return stages + [self.parts_PRE.shape[1].bit_length() - 1] * len(self.parts_PRE)

    @property
    def code_bytes(self) -> int:
        """Bytes of a coded vector."""
        return count_packed_bytes(self._num_bits)

    def encode(self, vectors_NLHSD: torch.Tensor) -> torch.Tensor:
        """Returns the codes of vectors, uint8 (N, L, H, S, C)."""
        import faiss

        rotated = vectors_NLHSD.float().cpu().flatten(0, -2) @ self.basis_DD.cpu().mT
        stages = encode_stages(self.stages_KRD, rotated.numpy())
        num_parts, num_rows, size = self.parts_PRE.shape
        num_bits = num_rows.bit_length() - 1
        quantizer = faiss.ProductQuantizer(num_parts * size, num_parts, num_bits)
        faiss.copy_array_to_vector(self.parts_PRE.cpu().numpy().ravel(), quantizer.centroids)
        packed = quantizer.compute_codes((rotated - sum_rows(self.stages_KRD.cpu(), stages.int())).numpy())
        parts = unpack_bits(torch.from_numpy(packed), [num_bits] * num_parts)
        codes = pack_bits(torch.cat((stages, parts), -1), self._num_bits)
        return codes.view(*vectors_NLHSD.shape[:-1], self.code_bytes).to(vectors_NLHSD.device)

    def look_up(self, codes_NLHSC: torch.Tensor) -> torch.Tensor:
        """Returns what codes stand for in the rotated frame, float32 (N, L, H, S, D)."""
        numbers = unpack_bits(codes_NLHSC, self._num_bits)
        num_parts, num_rows, size = self.parts_PRE.shape
        stages = sum_rows(self.stages_KRD, numbers[..., : len(self.stages_KRD)])
        first = torch.arange(num_parts, dtype=torch.int32, device=numbers.device) * num_rows
        table = self.parts_PRE.to(numbers.device).view(-1, size)
        return stages + torch.nn.functional.embedding(numbers[..., len(self.stages_KRD) :] + first, table).flatten(-2)

    def decode(self, codes_NLHSC: torch.Tensor) -> torch.Tensor:
        """Returns what codes stand for, float32 (N, L, H, S, D)."""
        return self.look_up(codes_NLHSC) @ self.basis_DD.to(codes_NLHSC.device)
