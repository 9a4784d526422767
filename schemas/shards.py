"""Payload shards: fixed-stride records in a safetensors file, so that one memory is one read.

A shard holds one uint8 tensor ``records`` of shape (records, stride) and, under the metadata key ``memory3``, a JSON
text with the format version, the record layout and the writer's fingerprint digest. Any safetensors library opens it.

A shard is read where it is: in a file of this machine by one system call a record, straight into the array that is
handed out; in an object store by ranges, of which neighbours are one request and others are asked for at a time.
"""

import json
import os
import stat
import struct
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from safetensors.numpy import save

from schemas.atomic import write_bytes_atomically
from schemas.errors import BankFormatError
from schemas.records import Bytes, RecordLayout
from schemas.stores import BankStore

SHARD_FORMAT = 2
"""The format this release writes and reads; records of format 1 have neither id nor checksum."""

METADATA_KEY = "memory3"
MAX_HEADER_BYTES = 1 << 20

FIRST_BYTES = 4 << 10
"""Bytes of the first request to an object store: more than any header, so that there is no second one for it."""

MAX_GAP_BYTES = 64 << 10
"""Records of an object with less than this between them are one request: it costs less than another."""

MAX_REQUEST_BYTES = 16 << 20
NUM_THREADS = 8


def write_shard(path: Path, records: Bytes, layout: RecordLayout, fingerprint: str) -> None:
    """Writes records (N, stride_bytes) as one shard, atomically; equal records give equal bytes."""
    if records.ndim != 2 or records.shape[1] != layout.stride_bytes:
        raise ValueError(f"records have shape {records.shape}, expected (any, {layout.stride_bytes})")
    if records.dtype != np.uint8:
        raise ValueError(f"records are {records.dtype}, expected uint8")
    header = {"format": SHARD_FORMAT, "layout": layout.to_json(), "fingerprint": fingerprint}
    metadata = {METADATA_KEY: json.dumps(header, sort_keys=True)}
    write_bytes_atomically(path, save({"records": np.ascontiguousarray(records)}, metadata))


class ShardSource(Protocol):
    """The bytes of a shard, wherever they are.

    Attributes:
        name: where they are, for errors.
        size_bytes: how many.
        num_requests: reads so far, of the file or the store; a lower bound if several threads read at once.
    """

    name: str
    size_bytes: int
    num_requests: int

    def read(self, start: int, size_bytes: int) -> bytes:
        """Returns bytes from ``start`` on, fewer if there are no more."""
        ...

    def fill(self, records: Bytes, starts: Sequence[int]) -> int | None:
        """Reads records into the rows of an array.

        Args:
            records: uint8, one row a record.
            starts: where each begins, in any order, also repeated.

        Returns:
            The least row whose record is not there in full, None if all are.
        """
        ...

    def close(self) -> None:
        """Ends reading; may be called again."""
        ...


class FileSource:
    """A shard in a file of this machine."""

    def __init__(self, path: Path) -> None:
        """Opens the file.

        Raises:
            BankFormatError: there is none.
        """
        self.name = str(path)
        self.num_requests = 0
        try:
            # Without waiting: what a hostile bank names may be a pipe.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise BankFormatError(f"shard {path} is missing; restore it or build the bank again") from error
        # Versions that nobody reads any more are dropped, not closed.
        self._closing = weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        self.size_bytes = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise BankFormatError(f"shard {path} is not a file; restore it or build the bank again")

    def read(self, start: int, size_bytes: int) -> bytes:
        """See :meth:`ShardSource.read`."""
        self.num_requests += 1
        return os.pread(self._descriptor, size_bytes, start)

    def fill(self, records: Bytes, starts: Sequence[int]) -> int | None:
        """See :meth:`ShardSource.fill`."""
        self.num_requests += len(starts)
        stride_bytes = records.shape[1]
        for row, (target, start) in enumerate(zip(records, starts, strict=True)):
            if os.preadv(self._descriptor, [target.data], start) != stride_bytes:
                return row
        return None

    def close(self) -> None:
        """See :meth:`ShardSource.close`."""
        self._descriptor = -1
        self._closing()


class StoredSource:
    """A shard in an object store."""

    def __init__(self, store: BankStore, name: str, size_bytes: int) -> None:
        """Reads the beginning.

        Args:
            store: where the bank is.
            name: the shard below the bank.
            size_bytes: its size as the manifest says.

        Raises:
            FileNotFoundError: there is no such object.
        """
        self.name = f"{store.url}/{name}"
        self.size_bytes = size_bytes
        self.num_requests = 0
        self._store, self._name = store, name
        self._beginning = self._request(0, FIRST_BYTES)

    def _request(self, start: int, size_bytes: int) -> bytes:
        self.num_requests += 1
        return self._store.read_range(self._name, start, size_bytes)

    def read(self, start: int, size_bytes: int) -> bytes:
        """See :meth:`ShardSource.read`; the beginning is kept."""
        if start + size_bytes <= FIRST_BYTES:
            return self._beginning[start : start + size_bytes]
        return self._request(start, size_bytes)

    def fill(self, records: Bytes, starts: Sequence[int]) -> int | None:
        """See :meth:`ShardSource.fill`.

        Raises:
            BankFormatError: the object is gone.
        """
        stride_bytes = records.shape[1]

        def fetch(rows: list[int]) -> list[int]:
            begin = starts[rows[0]]
            content = self._request(begin, starts[rows[-1]] + stride_bytes - begin)
            missing = []
            for row in rows:
                record = content[starts[row] - begin :][:stride_bytes] if len(rows) > 1 else content
                if len(record) == stride_bytes:
                    records[row] = np.frombuffer(record, dtype=np.uint8)
                else:
                    missing.append(row)
            return missing

        runs = _join_neighbours(starts, stride_bytes)
        try:
            if len(runs) > 1:
                with ThreadPoolExecutor(min(NUM_THREADS, len(runs))) as pool:
                    missing = list(pool.map(fetch, runs))
            else:
                missing = [fetch(run) for run in runs]
        except FileNotFoundError as error:
            raise BankFormatError(f"shard {self.name} is gone since it was opened; open the bank again") from error
        return min((row for rows in missing for row in rows), default=None)

    def close(self) -> None:
        """See :meth:`ShardSource.close`: nothing is open."""


def _join_neighbours(starts: Sequence[int], stride_bytes: int) -> list[list[int]]:
    """Groups records that one request is to fetch; each group, and the groups, are in the order of the file."""
    runs: list[list[int]] = []
    for row in sorted(range(len(starts)), key=starts.__getitem__):
        if runs:
            first, last = starts[runs[-1][0]], starts[runs[-1][-1]] + stride_bytes
            if starts[row] - last < MAX_GAP_BYTES and starts[row] + stride_bytes - first <= MAX_REQUEST_BYTES:
                runs[-1].append(row)
                continue
        runs.append([row])
    return runs


class ShardReader:
    """Random access to one shard; safe to use from several threads.

    Attributes:
        name: where the shard is.
        layout: the record layout of the header.
        fingerprint: digest of the writer's fingerprint.
        num_records: records in the shard.
    """

    def __init__(self, source: Path | ShardSource) -> None:
        """Opens a shard and checks its header against its size.

        Args:
            source: a file of this machine, or what stands for one.

        Raises:
            BankFormatError: missing, not a shard, of a newer format, or of another size than its header says.
        """
        self._source: ShardSource = FileSource(source) if isinstance(source, Path) else source
        self.name = self._source.name
        try:
            self._read_header()
        except BankFormatError:
            self.close()
            raise

    def _read_header(self) -> None:
        size_bytes = self._source.size_bytes
        prefix = self._source.read(0, 8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size_bytes):
            raise BankFormatError(f"shard {self.name} is not a shard: no safetensors header; build the bank again")
        try:
            header = json.loads(self._source.read(8, length))
            described = json.loads(header["__metadata__"][METADATA_KEY])
            shape, dtype = tuple(header["records"]["shape"]), header["records"]["dtype"]
            start, end = header["records"]["data_offsets"]
            version, self.fingerprint = described["format"], str(described["fingerprint"])
            self.layout = RecordLayout.from_json(described["layout"])
            if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
                raise ValueError(f"sizes {shape} {start} {end}")
        except (KeyError, TypeError, ValueError, RecursionError, BankFormatError) as error:
            raise BankFormatError(f"shard {self.name} has a damaged header; build the bank again") from error
        if version != SHARD_FORMAT:
            advice = "build the bank again in another folder" if version == 1 else "update memory3"
            raise BankFormatError(
                f"shard {self.name} has format {version}, this release reads {SHARD_FORMAT}; {advice}"
            )
        self._start = 8 + length + start
        if dtype != "U8" or len(shape) != 2 or shape[1] != self.layout.stride_bytes:
            raise BankFormatError(f"shard {self.name}: records are {dtype} {shape}, not what its layout says")
        self.num_records = int(shape[0])
        if start != 0 or end != shape[0] * shape[1] or 8 + length + end != size_bytes:
            raise BankFormatError(f"shard {self.name} has {size_bytes} bytes, its header says {8 + length + end}")

    @property
    def num_requests(self) -> int:
        """Reads so far of the file or the object store, the header's among them."""
        return self._source.num_requests

    def read(self, rows: Sequence[int]) -> Bytes:
        """Reads records by row, shape (len(rows), stride_bytes).

        Raises:
            BankFormatError: a row outside the shard, or the shard ends early or is gone.
        """
        stride = self.layout.stride_bytes
        records = np.empty((len(rows), stride), dtype=np.uint8)
        for row in rows:
            if not 0 <= row < self.num_records:
                raise BankFormatError(f"shard {self.name} has {self.num_records} records, asked for row {row}")
        missing = self._source.fill(records, [self._start + row * stride for row in rows])
        if missing is not None:
            raise BankFormatError(f"shard {self.name} ends before row {rows[missing]}; build the bank again")
        return records

    def close(self) -> None:
        """Closes the file."""
        self._source.close()

    def __enter__(self) -> "ShardReader":
        """Returns the reader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self.close()
