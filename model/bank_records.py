"""The records of one version of a bank, by reference id: from its shards or, in a cold bank, from the encoder itself.

Where it stands: the source of :class:`model.fetching.BankMemories`, which keeps what is used often and makes tensors of
it; a bank server hands the same records to clients. Nothing is handed out unless the version still has the reference.
"""

import threading
from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc

from model.cold import ColdStore
from model.retrieving import IdArray, list_segments, pack_ids, read_part
from model.writing import ReferenceWriter
from schemas.bank import DROPPING_KINDS, Bank
from schemas.errors import BankFormatError, InputError
from schemas.identifiers import ID_LENGTH
from schemas.manifest import FileEntry
from schemas.protocols import Fingerprint, FoundRecords, IntArray, LongArray
from schemas.records import Bytes, RecordLayout
from schemas.shards import ShardReader

MAX_OPEN_SHARDS = 256
"""Shards kept open: well below what a process may open, and enough that a shard is seldom opened twice."""


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


class ColdRecords:
    """Records that are encoded when they are first wanted, and kept in the bank's cold store."""

    def __init__(self, bank: Bank, writer: ReferenceWriter) -> None:
        """Opens the cold store of a version for the model that writes into it.

        Raises:
            BankFormatError: the store is damaged, or cannot be written.
        """
        self._bank, self._writer = bank, writer
        self._lock = threading.Lock()
        self._layout: RecordLayout = bank.manifest.layout
        self._store = ColdStore(bank.store.scratch, bank.manifest.fingerprint.digest)

    def _is_whole(self, ref_id: str, record: Bytes) -> bool:
        try:
            self._layout.check_records(record[None], [ref_id])
        except BankFormatError:
            return False  # the store promises nothing: it is encoded again
        return True

    def read(self, ref_ids: Sequence[str]) -> FoundRecords:
        """Returns the records of references, encoding those that are not there yet.

        Raises:
            BankFormatError: a reference is not stored in this version, or the store is damaged.
        """
        with self._lock:
            return self._read(ref_ids)

    def _read(self, ref_ids: Sequence[str]) -> FoundRecords:
        loaded = self._store.load(ref_ids)
        records = {ref_id: record for ref_id, record in loaded.items() if self._is_whole(ref_id, record)}
        missing = [ref_id for ref_id in ref_ids if ref_id not in records]
        if missing:
            table = self._bank.read_references(missing, ["token_ids"])
            written = self._writer.write([np.asarray(ids, dtype=np.int32) for ids in table["token_ids"].to_pylist()])
            packed = self._layout.pack(written.payload, written.offsets, missing)
            self._store.save(missing, packed)
            records.update(zip(missing, packed, strict=True))
        return FoundRecords(records=records, num_encoded=len(missing))


class BankRecords:
    """The records of one version of a bank; safe to use from several threads.

    Attributes:
        bank: the opened version.
    """

    def __init__(
        self, bank: Bank, writer: ReferenceWriter | None = None, *, max_open_shards: int = MAX_OPEN_SHARDS
    ) -> None:
        """Opens the records of a version.

        Args:
            bank: the version.
            writer: the model that wrote it, which a cold bank needs.
            max_open_shards: shards kept open.

        Raises:
            InputError: the bank is cold, and there is no writer.
            BankFormatError: a file is missing or damaged.
        """
        self.bank = bank
        self._layout: RecordLayout = bank.manifest.layout
        self._lock = threading.Lock()  # for the open shards
        self._max_open_shards = max_open_shards
        self._dropped = DroppedReferences(bank)
        shards = list_segments(bank, "shard")
        self._segments = [
            SegmentPlaces(bank, file, shards.get(name, []))
            for name, (file, *_) in list_segments(bank, "memories").items()
        ]
        if bank.manifest.cold and writer is None:
            raise InputError(
                f"bank {bank.url} is cold: its memories are encoded by a model when they are first read; build it "
                "without --cold"
            )
        self._cold = ColdRecords(bank, writer) if bank.manifest.cold and writer is not None else None
        if self._cold is None and not self._segments and bank.manifest.list_files("references"):
            raise BankFormatError(
                f"version {bank.manifest.version} of bank {bank.url} has no table 'memories'; build the bank again"
            )
        self._shards: dict[str, ShardReader] = {}

    @property
    def url(self) -> str:
        """Where the bank is."""
        return self.bank.url

    @property
    def fingerprint(self) -> Fingerprint:
        """What wrote the records."""
        return self.bank.manifest.fingerprint

    @property
    def layout(self) -> RecordLayout:
        """Their shape and type."""
        return self._layout

    def _open_shard(self, file: FileEntry) -> ShardReader:
        with self._lock:
            shard = self._shards.get(file.path)
            if shard is None:
                shard = self._shards[file.path] = self.bank.open_shard(file)
                if len(self._shards) > self._max_open_shards:
                    # Another thread may be reading it; it is closed when nobody does any more.
                    self._shards.pop(next(iter(self._shards)))
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
        return records

    def read(self, ref_ids: Sequence[str]) -> FoundRecords:
        """Returns the records of distinct references, read-only and checked.

        Raises:
            InputError: a reference is stored but not live in this version.
            BankFormatError: a reference has no memory here, or a file is missing or damaged.
        """
        self._dropped.check(ref_ids)
        records = self._read_stored(ref_ids)
        missing = [ref_id for ref_id in ref_ids if ref_id not in records]
        if not missing:
            return FoundRecords(records=records)
        if self._cold is None:
            raise BankFormatError(f"bank {self.bank.url} has no memory for {missing[0]}")
        cold = self._cold.read(missing)
        return FoundRecords(records=records | cold.records, num_encoded=cold.num_encoded)

    def hold_shards(self) -> None:
        """Opens the first ``max_open_shards`` shards now: what is open can be read though its file be removed.

        Raises:
            BankFormatError: a shard is missing or damaged, or belongs to another bank.
        """
        for file in self.bank.manifest.list_files("shard")[: self._max_open_shards]:
            self._open_shard(file)
