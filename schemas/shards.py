"""Payload shards: fixed-stride records in a safetensors file, so that one memory is one read.

A shard holds one uint8 tensor ``records`` of shape (records, stride) and, under the metadata key ``memory3``, a JSON
text with the format version, the record layout and the writer's fingerprint digest. Any safetensors library opens it.
"""

import json
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from safetensors.numpy import save

from schemas.atomic import write_bytes_atomically
from schemas.errors import BankFormatError
from schemas.records import Bytes, RecordLayout

SHARD_FORMAT = 1
METADATA_KEY = "memory3"
MAX_HEADER_BYTES = 1 << 20


def write_shard(path: Path, records: Bytes, layout: RecordLayout, fingerprint: str) -> None:
    """Writes records (N, stride_bytes) as one shard, atomically; equal records give equal bytes."""
    if records.ndim != 2 or records.shape[1] != layout.stride_bytes:
        raise ValueError(f"records have shape {records.shape}, expected (any, {layout.stride_bytes})")
    if records.dtype != np.uint8:
        raise ValueError(f"records are {records.dtype}, expected uint8")
    header = {"format": SHARD_FORMAT, "layout": layout.to_json(), "fingerprint": fingerprint}
    metadata = {METADATA_KEY: json.dumps(header, sort_keys=True)}
    write_bytes_atomically(path, save({"records": np.ascontiguousarray(records)}, metadata))


class ShardReader:
    """Random access to one shard; safe to use from several threads.

    Attributes:
        layout: the record layout of the header.
        fingerprint: digest of the writer's fingerprint.
        num_records: records in the shard.
    """

    def __init__(self, path: Path) -> None:
        """Opens a shard and checks its header against its size.

        Raises:
            BankFormatError: missing, not a shard, of a newer format, or of another size than its header says.
        """
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise BankFormatError(f"shard {path} is missing; restore it or build the bank again") from error
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            os.close(self._descriptor)
            raise BankFormatError(f"shard {path} is not a file; restore it or build the bank again")
        try:
            self._read_header()
        except BankFormatError:
            self.close()
            raise

    def _read_header(self) -> None:
        size_bytes = os.fstat(self._descriptor).st_size
        prefix = os.pread(self._descriptor, 8, 0)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size_bytes):
            raise BankFormatError(f"shard {self.path} is not a shard: no safetensors header; build the bank again")
        try:
            header = json.loads(os.pread(self._descriptor, length, 8))
            described = json.loads(header["__metadata__"][METADATA_KEY])
            shape, dtype = tuple(header["records"]["shape"]), header["records"]["dtype"]
            start, end = header["records"]["data_offsets"]
            version, self.fingerprint = described["format"], str(described["fingerprint"])
            self.layout = RecordLayout.from_json(described["layout"])
            if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
                raise ValueError(f"sizes {shape} {start} {end}")
        except (KeyError, TypeError, ValueError, RecursionError, BankFormatError) as error:
            raise BankFormatError(f"shard {self.path} has a damaged header; build the bank again") from error
        if version != SHARD_FORMAT:
            raise BankFormatError(
                f"shard {self.path} has format {version}, this release reads {SHARD_FORMAT}; update memory3"
            )
        self._start = 8 + length + start
        if dtype != "U8" or len(shape) != 2 or shape[1] != self.layout.stride_bytes:
            raise BankFormatError(f"shard {self.path}: records are {dtype} {shape}, not what its layout says")
        self.num_records = int(shape[0])
        if start != 0 or end != shape[0] * shape[1] or 8 + length + end != size_bytes:
            raise BankFormatError(f"shard {self.path} has {size_bytes} bytes, its header says {8 + length + end}")

    def read(self, rows: Sequence[int]) -> Bytes:
        """Reads records by row, shape (len(rows), stride_bytes), one read call a record.

        Raises:
            BankFormatError: a row outside the shard, or the file ends early.
        """
        stride = self.layout.stride_bytes
        records = np.empty((len(rows), stride), dtype=np.uint8)
        for target, row in zip(records, rows, strict=True):
            if not 0 <= row < self.num_records:
                raise BankFormatError(f"shard {self.path} has {self.num_records} records, asked for row {row}")
            if os.preadv(self._descriptor, [target.data], self._start + row * stride) != stride:
                raise BankFormatError(f"shard {self.path} ends before row {row}; build the bank again")
        return records

    def close(self) -> None:
        """Closes the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "ShardReader":
        """Returns the reader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self.close()
