"""The layout of one memory as bytes.

A record is the payload followed by what makes it usable and safe alone, and zero padding up to a multiple of 64 bytes::

    payload    (layers, 2, KV heads, slots, head dim)   keys before RoPE, then values, little endian, or their codes
    offsets    (layers, KV heads, slots) uint8          place of each kept token in its reference; 255 = empty slot
    ref_id     16 bytes                                 the reference whose memory this is
    checksum   4 bytes                                  CRC-32 of all before, little endian
    padding

Shape letters: L memory layers, H KV heads, S slots (the paper's sparse tokens), D head dimension, N records.
Source: method section 4. The rest is this project's addition: offsets are needed because keys are stored before RoPE;
by the id and the checksum a record that is damaged, or stands in the place of another, is told from the right one.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from schemas.codec_names import count_code_bytes, is_trained, parse_codec
from schemas.errors import BankFormatError, InputError
from schemas.identifiers import ID_LENGTH

EMPTY_SLOT = 255
"""The offset of a slot that holds no token (a reference with fewer tokens than slots); its key and value are zero."""

ALIGNMENT_BYTES = 64

ID_BYTES = ID_LENGTH // 2

CHECKSUM_BYTES = 4

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
        codec: how vectors are stored, a name of :mod:`schemas.codec_names`; ``none`` stores them as they are.
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
        codec = parse_codec(self.codec)
        if (is_trained(codec.keys) or is_trained(codec.values)) and not codec.digest:
            raise InputError(f"record layout: codec is {self.codec!r}, which has to be trained; give its file")
        for name in (codec.keys, codec.values):
            count_code_bytes(name, self.head_dim, ITEM_SIZES_BYTES[self.dtype])

    @property
    def payload_shape(self) -> tuple[int, int, int, int, int]:
        """The paper's shape of a memory: (L, 2, H, S, D)."""
        return (self.num_layers, 2, self.num_kv_heads, self.num_slots, self.head_dim)

    @property
    def key_bytes(self) -> int:
        """Bytes of a stored key."""
        return count_code_bytes(parse_codec(self.codec).keys, self.head_dim, ITEM_SIZES_BYTES[self.dtype])

    @property
    def value_bytes(self) -> int:
        """Bytes of a stored value."""
        return count_code_bytes(parse_codec(self.codec).values, self.head_dim, ITEM_SIZES_BYTES[self.dtype])

    @property
    def payload_bytes(self) -> int:
        """Bytes of the key-values of one memory: layer by layer all keys (H, S), then all values (H, S)."""
        return self.num_offsets * (self.key_bytes + self.value_bytes)

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
        used = self._checked_bytes + CHECKSUM_BYTES
        return -(-used // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    @property
    def _checked_bytes(self) -> int:
        """Bytes of a record that its checksum covers."""
        return self.payload_bytes + self.num_offsets + ID_BYTES

    def pack(self, payload: Bytes, offsets: Bytes, ref_ids: Sequence[str]) -> Bytes:
        """Joins memories to records.

        Args:
            payload: key-values as bytes, uint8 (N, payload_bytes).
            offsets: places of the kept tokens, uint8 (N, L, H, S).
            ref_ids: the references they are of, N ids.

        Returns:
            The records, uint8 (N, stride_bytes).
        """
        records = np.zeros((len(payload), self.stride_bytes), dtype=np.uint8)
        records[:, : self.payload_bytes] = payload
        end = self.payload_bytes + self.num_offsets
        records[:, self.payload_bytes : end] = offsets.reshape(len(offsets), self.num_offsets)
        records[:, end : end + ID_BYTES] = _join_ids(ref_ids).reshape(-1, ID_BYTES)
        end = self._checked_bytes
        records[:, end : end + CHECKSUM_BYTES] = self._compute_checksums(records)
        return records

    def unpack(
        self, records: Bytes, ref_ids: Sequence[str] | None = None, *, origin: str = "memory"
    ) -> tuple[Bytes, Bytes]:
        """Splits records into payloads and offsets, after making sure that they are as they were written.

        Args:
            records: uint8 (N, stride_bytes).
            ref_ids: the references whose memories they must be, N ids; None for any.
            origin: where the records are from, for errors.

        Returns:
            Payloads (N, payload_bytes) and offsets (N, L, H, S), as views.

        Raises:
            BankFormatError: a record has other bytes than when it was written, or is of another reference; the error
                names the first.
        """
        self.check_records(records, ref_ids, origin=origin)
        end = self.payload_bytes + self.num_offsets
        offsets = records[:, self.payload_bytes : end].reshape(len(records), *self.offsets_shape)
        return records[:, : self.payload_bytes], offsets

    def read_ref_ids(self, records: Bytes) -> list[str]:
        """Returns the ids of the references that records (N, stride_bytes) say they are of."""
        end = self._checked_bytes
        text = np.ascontiguousarray(records[:, end - ID_BYTES : end]).tobytes().hex()
        return [text[start : start + ID_LENGTH] for start in range(0, len(text), ID_LENGTH)]

    def check_records(self, records: Bytes, ref_ids: Sequence[str] | None = None, *, origin: str = "memory") -> None:
        """Makes sure that records are as they were written; arguments and errors are those of :meth:`unpack`."""
        expected = len(records) if ref_ids is None else len(ref_ids)
        if records.shape != (expected, self.stride_bytes):
            raise BankFormatError(
                f"{origin} holds records of shape {records.shape}, expected {(expected, self.stride_bytes)}; "
                "run memory3 verify"
            )
        end = self._checked_bytes
        differs = (records[:, end : end + CHECKSUM_BYTES] != self._compute_checksums(records)).any(axis=1)
        if differs.any():
            row = int(np.argmax(differs))
            name = f"number {row}" if ref_ids is None else f"of reference {ref_ids[row]}"
            raise BankFormatError(
                f"{origin} is damaged: record {name} has changed since it was written; run memory3 verify"
            )
        if ref_ids is not None and not np.array_equal(records[:, end - ID_BYTES : end].ravel(), _join_ids(ref_ids)):
            found = self.read_ref_ids(records)
            row = next(row for row, ref_id in enumerate(ref_ids) if found[row] != ref_id)
            raise BankFormatError(
                f"{origin} is damaged: it holds the memory of reference {found[row]} in place of that of "
                f"{ref_ids[row]}; run memory3 verify"
            )

    def _compute_checksums(self, records: Bytes) -> Bytes:
        """Returns the checksum of each record, uint8 (N, CHECKSUM_BYTES)."""
        covered = np.ascontiguousarray(records)[:, : self._checked_bytes]
        checksums = np.fromiter((zlib.crc32(record) for record in covered), "<u4", len(covered))
        return checksums.view(np.uint8).reshape(-1, CHECKSUM_BYTES)

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


def _join_ids(ref_ids: Sequence[str]) -> Bytes:
    """Returns ids as bytes, one after the other.

    Raises:
        BankFormatError: a text that is no id.
    """
    wrong = [ref_id for ref_id in ref_ids if not re.fullmatch("[0-9a-f]{32}", ref_id)]
    if wrong:
        raise BankFormatError(f"{wrong[0]!r} is no id of a reference; run memory3 verify")
    return np.frombuffer(bytes.fromhex("".join(ref_ids)), dtype=np.uint8)
