"""Numbers of a few bits as bytes: one after the other, the lowest bit first, as FAISS packs its codes.

Shape letters: K numbers of a code, C bytes of a code; ``...`` is any shape.
"""

from collections.abc import Sequence

import torch


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
    """Undoes :func:`pack_bits` for numbers of at most 16 bits: int32 (..., K)."""
    if all(number == 8 for number in num_bits):
        return codes.int()
    starts = [sum(num_bits[:place]) for place in range(len(num_bits))]
    first = torch.tensor([start // 8 for start in starts], device=codes.device)
    padded = torch.nn.functional.pad(codes, (0, 3)).int()  # a number may begin in the last byte, or end there with none
    joined = padded[..., first] | padded[..., first + 1] << 8 | padded[..., first + 2] << 16
    shifts = torch.tensor([start % 8 for start in starts], dtype=torch.int32, device=codes.device)
    masks = torch.tensor([(1 << number) - 1 for number in num_bits], dtype=torch.int32, device=codes.device)
    return (joined >> shifts) & masks
