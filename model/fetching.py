"""From reference to memory: a cache in RAM, then the bank's shards, then - in a cold bank - the encoder itself.

Where it stands: retrieval names references, this turns them into tensors, reading attends to them. Nothing is handed
out unless the model at hand is the one that wrote it, and unless the version still has the reference.
"""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
import torch

from model.checkpoint import Checkpoint
from model.cold import ColdStore
from model.retrieving import IdArray, list_segments, pack_ids, read_part
from model.writing import Memories, ReferenceWriter
from schemas.bank import DROPPING_KINDS, Bank
from schemas.errors import BankFormatError, InputError, WrongModelError
from schemas.identifiers import ID_LENGTH
from schemas.manifest import FileEntry
from schemas.protocols import IntArray, LongArray
from schemas.records import Bytes, RecordLayout
from schemas.shards import ShardReader

DEFAULT_CACHE_BYTES = 256 << 20

MAX_OPEN_SHARDS = 256
"""Shards kept open: well below what a process may open, and enough that a shard is seldom opened twice."""


@dataclasses.dataclass(kw_only=True)
class FetchStatistics:
    """Where memories came from, in numbers of memories.

    Attributes:
        num_cached: from the cache in RAM, those read ahead included.
        num_read: from the bank, or the store of memories encoded earlier, while someone waited.
        num_encoded: encoded while someone waited.
        num_read_ahead: brought into the cache before anyone asked for them.
    """

    num_cached: int = 0
    num_read: int = 0
    num_encoded: int = 0
    num_read_ahead: int = 0


class RecordCache:
    """The most recently used records, up to a number of bytes."""

    def __init__(self, capacity_bytes: int) -> None:
        """Makes an empty cache; a capacity of 0 keeps nothing."""
        self.capacity_bytes = capacity_bytes
        self.size_bytes = 0
        self._records: OrderedDict[str, Bytes] = OrderedDict()

    def get(self, ref_id: str) -> Bytes | None:
        """Returns a record and marks it as just used, or None."""
        record = self._records.get(ref_id)
        if record is not None:
            self._records.move_to_end(ref_id)
        return record

    def put(self, ref_id: str, record: Bytes) -> None:
        """Keeps a record, dropping the least recently used ones if there is no room."""
        if ref_id in self._records or record.nbytes > self.capacity_bytes:
            return
        kept = record.copy()  # a row of a batch would keep the whole batch
        kept.flags.writeable = False
        self._records[ref_id] = kept
        self.size_bytes += record.nbytes
        while self.size_bytes > self.capacity_bytes:
            _, dropped = self._records.popitem(last=False)
            self.size_bytes -= dropped.nbytes


def check_fingerprint(bank: Bank, writer: ReferenceWriter) -> None:
    """Makes sure that a bank's memories are those this model would write.

    Raises:
        WrongModelError: they are not; the error says in what the two differ.
    """
    found, expected = bank.manifest.fingerprint, writer.fingerprint
    differences = found.list_differences(expected)
    if differences:
        raise WrongModelError(
            f"bank {bank.url} was written by another model: {', '.join(differences)} differ; "
            "use the model it was built with, or build a bank with this one"
        )


def _encode_ids(ref_ids: Sequence[str]) -> IdArray:
    # NumPy would cut a longer id to the length of the column, and find what was not asked for.
    return np.array([ref_id if len(ref_id) == ID_LENGTH else "" for ref_id in ref_ids], dtype=f"S{ID_LENGTH}")


def _find_ids(sorted_ids: IdArray, wanted: IdArray) -> LongArray:
    """Returns the row of each id, -1 if it is not there."""
    if not len(sorted_ids):
        return np.full(len(wanted), -1, np.int64)
    rows = np.searchsorted(sorted_ids, wanted)
    return np.where(sorted_ids[np.minimum(rows, len(sorted_ids) - 1)] == wanted, rows, -1)


class SegmentPlaces:
    """Where the memories of one segment stand."""

    def __init__(self, bank: Bank, file: FileEntry, shards: Sequence[FileEntry]) -> None:
        """Reads the segment's table ``memories``.

        Raises:
            BankFormatError: the table is missing or damaged.
        """
        origin = f"{bank.url}/{file.path}"
        table = read_part(bank, file, ["ref_id", "shard", "row"])
        self._origin = origin
        self._ref_ids = pack_ids(table["ref_id"], origin)
        # Rows that follow each other stand in the same shard, so its name is kept once for all of them.
        runs = [pc.run_end_encode(chunk) for chunk in table["shard"].chunks]
        self._run_names = [name for run in runs for name in run.values.to_pylist()]
        starts = np.cumsum([0, *(len(run) for run in runs)])
        ends = [run.run_ends.to_numpy() + start for run, start in zip(runs, starts[:-1], strict=True)]
        self._run_ends: LongArray = np.concatenate([np.empty(0, np.int64), *ends])
        self._rows: IntArray = table["row"].to_numpy()
        self._shards = {shard.path.rpartition("/")[2]: shard for shard in shards}

    def find(self, wanted: IdArray) -> LongArray:
        """Returns the row of each id in the table, -1 if it is not there."""
        return _find_ids(self._ref_ids, wanted)

    def get_place(self, row: int) -> tuple[FileEntry, int]:
        """Returns the shard that holds a row's memory, and the row in the shard.

        Raises:
            BankFormatError: the table names a shard that the manifest does not have.
        """
        name = self._run_names[int(np.searchsorted(self._run_ends, row, side="right"))]
        if name not in self._shards:
            raise BankFormatError(f"{self._origin} names the shard {name!r}, which its manifest does not have")
        return self._shards[name], int(self._rows[row])


class DroppedReferences:
    """The references of a version that are stored but not live."""

    def __init__(self, bank: Bank) -> None:
        """Reads their ids.

        Raises:
            BankFormatError: a table is missing or damaged.
        """
        self._bank = bank
        self._ids: dict[str, IdArray] = {}
        for kind in reversed(DROPPING_KINDS):  # what is deleted is so whatever else it is
            if bank.manifest.list_files(kind):
                ids = pack_ids(bank.read_table(kind, ["ref_id"])["ref_id"], f"table {kind!r} of bank {bank.url}")
                self._ids[kind] = ids if (ids[1:] >= ids[:-1]).all() else np.sort(ids)

    def check(self, ref_ids: Sequence[str]) -> None:
        """Makes sure that references are live, or not stored at all.

        Raises:
            InputError: one is not; the error says why.
        """
        wanted = _encode_ids(ref_ids)
        for kind, ids in self._ids.items():
            rows = _find_ids(ids, wanted)
            if (rows >= 0).any():
                ref_id = ref_ids[int(np.argmax(rows >= 0))]
                version = f"version {self._bank.manifest.version} of bank {self._bank.url}"
                raise InputError(f"reference {ref_id} is not live in {version}: {self._explain(kind, ref_id)}")

    def _look_up(self, kind: str, column: str, ref_id: str) -> str:
        return str(self._bank.read_rows(kind, "ref_id", [ref_id], [column])[column][0].as_py())

    def _explain(self, kind: str, ref_id: str) -> str:
        if kind == "duplicates":
            return f"it is a near-duplicate of {self._look_up(kind, 'kept_ref_id', ref_id)}; ask for that one"
        if kind == "contaminated":
            return f"it overlaps with {self._look_up(kind, 'matched_doc_id', ref_id)}, a document of the test set"
        return "it stands in no document any more; open an earlier version to read it"


class BankMemories:
    """The memories of one version of a bank, by reference id; safe to use from several threads.

    Attributes:
        bank: the opened version.
        statistics: where the memories came from so far.
    """

    def __init__(self, bank: Bank, writer: ReferenceWriter, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        """Opens the memories of a bank for the model that wrote them.

        Raises:
            WrongModelError: the bank was written by another model.
            BankFormatError: a file is missing or damaged.
        """
        check_fingerprint(bank, writer)
        self.bank = bank
        self.statistics = FetchStatistics()
        self._writer = writer
        self._fingerprint = writer.fingerprint
        self._layout: RecordLayout = bank.manifest.layout
        self._cache = RecordCache(cache_bytes)
        self._lock = threading.Lock()
        self._dropped = DroppedReferences(bank)
        shards = list_segments(bank, "shard")
        self._segments = [
            SegmentPlaces(bank, file, shards.get(name, []))
            for name, (file, *_) in list_segments(bank, "memories").items()
        ]
        self._cold = ColdStore(bank.store.scratch, bank.manifest.fingerprint.digest) if bank.manifest.cold else None
        if self._cold is None and not self._segments and bank.manifest.list_files("references"):
            raise BankFormatError(
                f"version {bank.manifest.version} of bank {bank.url} has no table 'memories'; build the bank again"
            )
        self._shards: dict[str, ShardReader] = {}

    @property
    def checkpoint(self) -> Checkpoint:
        """The model that wrote the memories and reads them."""
        return self._writer.checkpoint

    @property
    def num_slots(self) -> int:
        """Kept tokens a KV head of each memory."""
        return self._layout.num_slots

    def _check_model(self) -> None:
        """Checks the model again if it may have changed since the last time."""
        fingerprint = self._writer.fingerprint
        if fingerprint is not self._fingerprint:
            check_fingerprint(self.bank, self._writer)
            self._fingerprint = fingerprint

    def _open_shard(self, file: FileEntry) -> ShardReader:
        shard = self._shards.get(file.path)
        if shard is None:
            shard = self._shards[file.path] = self.bank.open_shard(file)
            if len(self._shards) > MAX_OPEN_SHARDS:
                self._shards.pop(next(iter(self._shards))).close()
        return shard

    def _read_stored(self, ref_ids: Sequence[str]) -> dict[str, Bytes]:
        """Returns the records that stand in a shard of this version."""
        wanted = _encode_ids(ref_ids)
        by_shard: dict[str, tuple[FileEntry, list[tuple[str, int]]]] = {}
        for segment in self._segments:
            for ref_id, row in zip(ref_ids, segment.find(wanted).tolist(), strict=True):
                if row >= 0:
                    file, place = segment.get_place(row)
                    by_shard.setdefault(file.path, (file, []))[1].append((ref_id, place))
        records: dict[str, Bytes] = {}
        for file, members in by_shard.values():
            names = [ref_id for ref_id, _ in members]
            read = self._open_shard(file).read([place for _, place in members])
            self._layout.check_records(read, names, origin=f"{self.bank.url}/{file.path}")
            records.update(zip(names, read, strict=True))
        self.statistics.num_read += len(records)
        return records

    def _is_whole(self, ref_id: str, record: Bytes) -> bool:
        try:
            self._layout.check_records(record[None], [ref_id])
        except BankFormatError:
            return False  # the cache promises nothing: it is encoded again
        return True

    def _read_cold(self, cold: ColdStore, ref_ids: Sequence[str]) -> dict[str, Bytes]:
        records = {ref_id: record for ref_id, record in cold.load(ref_ids).items() if self._is_whole(ref_id, record)}
        missing = [ref_id for ref_id in ref_ids if ref_id not in records]
        if missing:
            table = self.bank.read_references(missing, ["token_ids"])
            tokens = [np.asarray(ids, dtype=np.int32) for ids in table["token_ids"].to_pylist()]
            written = self._writer.write(tokens)
            packed = self._layout.pack(written.payload, written.offsets, missing)
            cold.save(missing, packed)
            records.update(zip(missing, packed, strict=True))
            self.statistics.num_encoded += len(missing)
        self.statistics.num_read += len(ref_ids) - len(missing)
        return records

    def _read(self, ref_ids: Sequence[str]) -> dict[str, Bytes]:
        self._dropped.check(ref_ids)
        records = self._read_stored(ref_ids)
        missing = [ref_id for ref_id in ref_ids if ref_id not in records]
        if missing and self._cold is None:
            raise BankFormatError(f"bank {self.bank.url} has no memory for {missing[0]}")
        if missing and self._cold is not None:
            records.update(self._read_cold(self._cold, missing))
        return records

    def _collect(self, ref_ids: Sequence[str]) -> Bytes:
        """Returns the records of references, (len(ref_ids), stride_bytes), as new memory."""
        self._check_model()
        with self._lock:
            records = {ref_id: record for ref_id in ref_ids if (record := self._cache.get(ref_id)) is not None}
            missing = list(dict.fromkeys(ref_id for ref_id in ref_ids if ref_id not in records))
            self.statistics.num_cached += len(records)
            if missing:
                read = self._read(missing)
                for ref_id, record in read.items():
                    self._cache.put(ref_id, record)
                records.update(read)
        if not ref_ids:
            return np.empty((0, self._layout.stride_bytes), dtype=np.uint8)
        return np.stack([records[ref_id] for ref_id in ref_ids])

    def hold_shards(self) -> None:
        """Opens the first :data:`MAX_OPEN_SHARDS` shards now: what is open can be read though its file be removed.

        Raises:
            BankFormatError: a shard is missing or damaged, or belongs to another bank.
        """
        with self._lock:
            for file in self.bank.manifest.list_files("shard")[:MAX_OPEN_SHARDS]:
                self._open_shard(file)

    @property
    def cache_bytes(self) -> int:
        """Room for records in RAM."""
        return self._cache.capacity_bytes

    @property
    def stride_bytes(self) -> int:
        """Bytes of a record."""
        return self._layout.stride_bytes

    def read_ahead(self, ref_ids: Sequence[str]) -> None:
        """Brings memories that are stored into the cache, where they are not yet.

        Raises:
            BankError: as :meth:`fetch_records`.
        """
        self._check_model()
        with self._lock:
            missing = [ref_id for ref_id in dict.fromkeys(ref_ids) if self._cache.get(ref_id) is None]
            if missing:
                before = dataclasses.replace(self.statistics)
                for ref_id, record in self._read(missing).items():
                    self._cache.put(ref_id, record)
                # Nobody waited for these, so they count as nothing else.
                self.statistics.num_read, self.statistics.num_encoded = before.num_read, before.num_encoded
                self.statistics.num_read_ahead += len(missing)

    def fetch_records(self, ref_ids: Sequence[str]) -> Bytes:
        """Returns the records of references, (len(ref_ids), stride_bytes), read-only.

        Raises:
            WrongModelError: the model is no longer the one that wrote the memories.
            InputError: a reference is stored but not live in this version.
            BankFormatError: a reference has no memory here, or a file is missing or damaged.
        """
        records = self._collect(ref_ids)
        records.flags.writeable = False
        return records

    def fetch(self, ref_ids: Sequence[str]) -> Memories:
        """Returns the memories of references in the model's type and on its device, in the order asked for.

        The tensors are copies that belong to the caller: changing them changes neither the cache nor the bank.

        Raises:
            WrongModelError: the model is no longer the one that wrote the memories.
            InputError: a reference is stored but not live in this version.
            BankFormatError: a reference has no memory here, or a file is missing or damaged.
        """
        records, layout = self._collect(ref_ids), self._layout
        # Cut here, since unpacking would compute again the checksums that were checked when the records were read.
        # From a flat array, since NumPy's empty ones of two axes have strides that forbid to see them as another type.
        flat = torch.from_numpy(records.reshape(-1))
        payload = flat.view(len(ref_ids), layout.stride_bytes)[:, : layout.payload_bytes]
        offsets = records[:, layout.payload_bytes :][:, : layout.num_offsets].reshape(-1, *layout.offsets_shape)
        checkpoint = self.checkpoint
        keys, values = self._writer.codec.decode(payload.to(checkpoint.device), checkpoint.dtype)
        places = torch.from_numpy(offsets.astype(np.int64)).movedim(0, 1).to(checkpoint.device)
        return Memories(keys_LBHSD=keys.movedim(0, 1), values_LBHSD=values.movedim(0, 1), offsets_LBHS=places)
