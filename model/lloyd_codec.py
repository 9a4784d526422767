"""The codec ``lloyd<bytes>``: each number of a vector to the nearest of its own levels, with bits where they help most.

Every number has levels of its own, learnt by Lloyd's algorithm, and so many bits as lower the error most: bits are
dealt out one by one, each to the number whose error it lowers most. Behind a map to principal axes
(:mod:`model.mapped_codec`) this is transform coding: most bits go to the few directions in which vectors differ.

Shape letters: as in :mod:`model.coding`.
"""

import heapq

import numpy as np
import torch

from model.bit_packing import look_up_bits, pack_bits
from schemas.codec_names import MOST_BITS
from schemas.protocols import FloatArray

MOST_ROUNDS = 100
"""Rounds of Lloyd's algorithm for one number and number of bits."""

SAMPLES_PER_NUMBER = 65536
"""Vectors that are looked at, at most; they are spread evenly over those given."""


class LloydCodec:
    """The codec ``lloyd<bytes>`` of keys or values.

    Attributes:
        name: the codec's name.
        code_bytes: bytes of a coded vector.
        basis_DD: None: numbers are looked up as they are.
    """

    basis_DD: None = None

    def __init__(self, num_bytes: int, num_bits_D: torch.Tensor, levels_DX: torch.Tensor) -> None:
        """Makes the tables for decoding.

        Args:
            num_bytes: bytes of a coded vector.
            num_bits_D: bits of each number, at most 8, together at most those of the code; D is even.
            levels_DX: levels of each number, ascending, float32 (D, 256); the first 2 ** bits are used.
        """
        self.name = f"lloyd{num_bytes}"
        self.code_bytes = num_bytes
        self._num_bits: list[int] = num_bits_D.tolist()
        self._levels_DX = levels_DX
        # Two numbers at a time: the table of a pair holds every combination of their levels.
        self._pair_bits = [sum(self._num_bits[place : place + 2]) for place in range(0, len(self._num_bits), 2)]
        tables = []
        for place in range(0, len(self._num_bits), 2):
            low, high = (levels_DX[at, : 2 ** self._num_bits[at]] for at in (place, place + 1))
            tables.append(torch.stack((low.repeat(len(high)), high.repeat_interleave(len(low))), -1))
        self._table = torch.cat(tables)
        sizes = torch.tensor([len(table) for table in tables], device=levels_DX.device)
        self._first = (sizes.cumsum(0) - sizes).int()

    def encode(self, vectors_NLHSD: torch.Tensor) -> torch.Tensor:
        """Returns the codes of vectors, uint8 (N, L, H, S, C)."""
        vectors = vectors_NLHSD.float()
        numbers = []
        for place, num_bits in enumerate(self._num_bits):
            levels = self._levels_DX[place, : 2**num_bits].to(vectors.device)
            numbers.append(torch.bucketize(vectors[..., place].contiguous(), (levels[1:] + levels[:-1]) / 2))
        codes = pack_bits(torch.stack(numbers, -1), self._num_bits)
        return torch.nn.functional.pad(codes, (0, self.code_bytes - codes.shape[-1]))

    def look_up(self, codes_NLHSC: torch.Tensor) -> torch.Tensor:
        """Returns what codes stand for, float32 (N, L, H, S, D)."""
        device = codes_NLHSC.device
        return look_up_bits(codes_NLHSC, self._pair_bits, self._first.to(device), self._table.to(device))

    def decode(self, codes_NLHSC: torch.Tensor) -> torch.Tensor:
        """Returns what codes stand for, float32 (N, L, H, S, D)."""
        return self.look_up(codes_NLHSC)


def find_levels(samples: FloatArray, num_levels: int) -> tuple[FloatArray, float]:
    """Finds levels with a small mean squared error by Lloyd's algorithm.

    Args:
        samples: numbers, ascending, float64.
        num_levels: how many levels.

    Returns:
        The levels, ascending, and the mean squared error.
    """
    sums = np.concatenate(([0.0], np.cumsum(samples)))
    squares = np.concatenate(([0.0], np.cumsum(samples**2)))
    # Levels begin as dense as is best for many of them: by the cube root of how dense the numbers are.
    edges = np.quantile(samples, np.linspace(0, 1, 1025))
    widths = np.cumsum(np.diff(edges) ** (2 / 3))
    levels = np.interp((np.arange(num_levels) + 0.5) / num_levels, widths / max(widths[-1], 1e-300), edges[1:])
    error = np.inf
    for _ in range(MOST_ROUNDS):
        ends = np.searchsorted(samples, (levels[1:] + levels[:-1]) / 2)
        bounds = np.concatenate(([0], ends, [len(samples)]))
        counts, totals = np.diff(bounds), np.diff(sums[bounds])
        levels = np.where(counts > 0, totals / np.maximum(counts, 1), levels)
        before, error = error, float((squares[-1] - (totals**2 / np.maximum(counts, 1)).sum()) / len(samples))
        if before - error <= 1e-4 * error:
            break
    return np.sort(levels), max(error, 0.0)


def train_lloyd(vectors_ND: torch.Tensor, weights_D: torch.Tensor, num_bytes: int) -> dict[str, torch.Tensor]:
    """Learns levels and deals bits out.

    Args:
        vectors_ND: vectors to learn from.
        weights_D: what a squared error of each number costs.
        num_bytes: bytes of a coded vector.

    Returns:
        ``bits``, uint8 (D,), and ``levels``, float32 (D, 256).
    """
    step = max(1, len(vectors_ND) // SAMPLES_PER_NUMBER)
    samples_DN = np.sort(vectors_ND[::step].double().numpy().T, axis=1)
    head_dim = len(samples_DN)
    found = [[find_levels(samples, 2**bits) for bits in range(MOST_BITS + 1)] for samples in samples_DN]
    costs = [[weight * error for _, error in column] for weight, column in zip(weights_D.tolist(), found, strict=True)]
    bits = [0] * head_dim
    gains = [(column[1] - column[0], place) for place, column in enumerate(costs)]
    heapq.heapify(gains)
    for _ in range(8 * num_bytes):
        place = heapq.heappop(gains)[1]
        bits[place] += 1
        if bits[place] < MOST_BITS:
            heapq.heappush(gains, (costs[place][bits[place] + 1] - costs[place][bits[place]], place))
    levels_DX = torch.zeros(head_dim, 2**MOST_BITS)
    for place, number in enumerate(bits):
        levels_DX[place, : 2**number] = torch.from_numpy(found[place][number][0])
    return {"bits": torch.tensor(bits, dtype=torch.uint8), "levels": levels_DX}
