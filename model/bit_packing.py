"""Numbers of a few bits as bytes: one after the other, the lowest bit first, as FAISS packs its codes.

On a CPU numbers are unpacked, and looked up, by kernels: one pass over the codes in the place of a dozen.

Shape letters: R codes, K numbers of a code, C bytes of a code; ``...`` is any shape.
"""

from collections.abc import Sequence

import numba
import numpy as np
import torch

from schemas.protocols import FloatArray, IntArray
from schemas.records import Bytes


def count_packed_bytes(num_bits: Sequence[int]) -> int:
    """Returns the bytes of numbers of so many bits each."""
    return -(-sum(num_bits) // 8)


def pack_bits(numbers: torch.Tensor, num_bits: Sequence[int]) -> torch.Tensor:
    """Packs integers (..., K), each below two to the power of its bits, as uint8 (..., C)."""
    widths = torch.tensor(num_bits, device=numbers.device)
    owners = torch.repeat_interleave(torch.arange(len(num_bits), device=numbers.device), widths)
    first = torch.cumsum(widths, 0) - widths
    shifts = torch.arange(len(owners), device=numbers.device) - first[owners]
    bits = (numbers.long()[..., owners] >> shifts) & 1
    bits = torch.nn.functional.pad(bits, (0, -len(owners) % 8)).unflatten(-1, (-1, 8))
    packed: torch.Tensor = (bits << torch.arange(8, device=numbers.device)).sum(-1).to(torch.uint8)
    return packed


def unpack_bits(codes: torch.Tensor, num_bits: Sequence[int]) -> torch.Tensor:
    """Undoes :func:`pack_bits` for numbers of at most 16 bits: int32 (..., K), on the device of the codes."""
    if all(number == 8 for number in num_bits):
        return codes.int()
    if codes.device.type != "cpu":
        return unpack_bits_anywhere(codes, num_bits)
    rows = codes.reshape(-1, codes.shape[-1])
    numbers = np.empty((len(rows), len(num_bits)), dtype=np.int32)
    _unpack(_pad(rows).numpy(), *_locate(num_bits), numbers)
    return torch.from_numpy(numbers).view(*codes.shape[:-1], len(num_bits))


def unpack_bits_anywhere(codes: torch.Tensor, num_bits: Sequence[int]) -> torch.Tensor:
    """:func:`unpack_bits` in PyTorch alone: for accelerators, and what the kernel is compared with."""
    starts = torch.tensor([sum(num_bits[:place]) for place in range(len(num_bits))], device=codes.device)
    padded, first = _pad(codes).int(), starts // 8
    joined = padded[..., first] | padded[..., first + 1] << 8 | padded[..., first + 2] << 16
    masks = torch.tensor([(1 << number) - 1 for number in num_bits], dtype=torch.int32, device=codes.device)
    return (joined >> (starts % 8).int()) & masks


def look_up_bits(
    codes: torch.Tensor, num_bits: Sequence[int], first: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """Returns the rows of a table that the numbers of packed codes stand for, joined: float32 (..., K x width).

    Args:
        codes: uint8 (..., C).
        num_bits: bits of each number, at most 16.
        first: the row where the part of the table for each number begins, int32 (K,); it has two to the power of its
            bits.
        table: float32 (rows, width).
    """
    if codes.device.type != "cpu":
        found: torch.Tensor = table[unpack_bits_anywhere(codes, num_bits) + first].flatten(-2)
        return found
    rows = codes.reshape(-1, codes.shape[-1])
    out = np.empty((len(rows), len(num_bits), table.shape[1]), dtype=np.float32)
    _look_up(_pad(rows).numpy(), *_locate(num_bits), first.numpy(), table.numpy(), out)
    return torch.from_numpy(out).view(*codes.shape[:-1], len(num_bits) * table.shape[1])


def _pad(codes: torch.Tensor) -> torch.Tensor:
    """Adds bytes after the last: a number may begin in the last byte, or end there with none."""
    return torch.nn.functional.pad(codes, (0, 3))


def _locate(num_bits: Sequence[int]) -> tuple[IntArray, IntArray]:
    """Returns the first bit of each number, and what is left of it once it is shifted there."""
    widths = np.array(num_bits, dtype=np.int32)
    return (np.cumsum(widths) - widths).astype(np.int32), ((1 << widths) - 1).astype(np.int32)


@numba.njit(cache=True, nogil=True)
def _unpack(codes_RC: Bytes, starts_K: IntArray, masks_K: IntArray, numbers_RK: IntArray) -> None:
    for row in range(len(codes_RC)):
        for place in range(len(starts_K)):
            byte = starts_K[place] >> 3
            window = np.int32(codes_RC[row, byte])
            window |= np.int32(codes_RC[row, byte + 1]) << 8
            window |= np.int32(codes_RC[row, byte + 2]) << 16
            numbers_RK[row, place] = (window >> (starts_K[place] & 7)) & masks_K[place]


@numba.njit(cache=True, nogil=True)
def _look_up(
    codes_RC: Bytes, starts_K: IntArray, masks_K: IntArray, first_K: IntArray, table: FloatArray, out_RKW: FloatArray
) -> None:
    width = table.shape[1]
    for row in range(len(codes_RC)):
        for place in range(len(starts_K)):
            byte = starts_K[place] >> 3
            window = np.int32(codes_RC[row, byte])
            window |= np.int32(codes_RC[row, byte + 1]) << 8
            window |= np.int32(codes_RC[row, byte + 2]) << 16
            number = first_K[place] + ((window >> (starts_K[place] & 7)) & masks_K[place])
            for at in range(width):
                out_RKW[row, place, at] = table[number, at]
