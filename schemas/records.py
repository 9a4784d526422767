"""The layout of one memory as bytes.

A record is the payload followed by the kept token offsets and zero padding up to a multiple of 64 bytes::

    payload   (layers, 2, KV heads, slots, head dim)   keys before RoPE, then values, little endian
    offsets   (layers, KV heads, slots) uint8          place of each kept token in its reference; 255 = empty slot
    padding

Shape letters: L memory layers, H KV heads, S slots (the paper's sparse tokens), D head dimension, N records.
Source: method section 4; the offsets are this project's addition, needed because keys are stored before RoPE.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from schemas.errors import BankFormatError, InputError

EMPTY_SLOT = 255
"""The offset of a slot that holds no token (a reference with fewer tokens than slots); its key and value are zero."""

ALIGNMENT_BYTES = 64

ITEM_SIZES_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordLayout:
    """The shape and type of every memory in a bank.

    Attributes:
        num_layers: memory layers (22 in the paper's model).
        num_kv_heads: key-value heads a layer (8).
        num_slots: tokens kept a head (8).
        head_dim: size of a key or value vector (80).
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        codec: how vectors are stored; ``none`` stores them as they are.
    """

    num_layers: int
    num_kv_heads: int
    num_slots: int
    head_dim: int
    dtype: str = "bfloat16"
    codec: str = "none"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a size below 1, or an unknown dtype or codec.
        """
        for name in ("num_layers", "num_kv_heads", "num_slots", "head_dim"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise InputError(f"record layout: {name} is {getattr(self, name)}, must be at least 1")
        if self.dtype not in ITEM_SIZES_BYTES:
            raise InputError(f"record layout: dtype is {self.dtype!r}, must be one of {sorted(ITEM_SIZES_BYTES)}")
        if self.codec != "none":
            raise InputError(f"record layout: codec is {self.codec!r}; this release knows only 'none'")

    @property
    def payload_shape(self) -> tuple[int, int, int, int, int]:
        """The paper's shape of a memory: (L, 2, H, S, D)."""
        return (self.num_layers, 2, self.num_kv_heads, self.num_slots, self.head_dim)

    @property
    def payload_bytes(self) -> int:
        """Bytes of the key-values of one memory."""
        return math.prod(self.payload_shape) * ITEM_SIZES_BYTES[self.dtype]

    @property
    def offsets_shape(self) -> tuple[int, int, int]:
        """Shape of the kept offsets: (L, H, S)."""
        return (self.num_layers, self.num_kv_heads, self.num_slots)

    @property
    def num_offsets(self) -> int:
        """Kept offsets in one memory."""
        return math.prod(self.offsets_shape)

    @property
    def stride_bytes(self) -> int:
        """Bytes from one record to the next."""
        return -(-(self.payload_bytes + self.num_offsets) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    def pack(self, payload: Bytes, offsets: Bytes) -> Bytes:
        """Joins payloads (N, payload_bytes) and offsets (N, L, H, S), both uint8, to records (N, stride_bytes)."""
        records = np.zeros((len(payload), self.stride_bytes), dtype=np.uint8)
        records[:, : self.payload_bytes] = payload
        records[:, self.payload_bytes : self.payload_bytes + self.num_offsets] = offsets.reshape(
            len(offsets), self.num_offsets
        )
        return records

    def unpack(self, records: Bytes) -> tuple[Bytes, Bytes]:
        """Splits records (N, stride_bytes) into payloads (N, payload_bytes) and offsets (N, L, H, S), as views."""
        end = self.payload_bytes + self.num_offsets
        offsets = records[:, self.payload_bytes : end].reshape(len(records), *self.offsets_shape)
        return records[:, : self.payload_bytes], offsets

    def to_json(self) -> dict[str, Any]:
        """Returns the layout as it is written into headers and manifests."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "RecordLayout":
        """Reads a layout back.

        Raises:
            BankFormatError: a key is missing or unknown, or a value is out of bounds.
        """
        try:
            return cls(**value)
        except (TypeError, InputError) as error:
            raise BankFormatError(f"record layout not understood: {error}") from error
