"""From reference to memory: a cache in RAM, then the bank's shards, then - in a cold bank - the encoder itself.

Where it stands: retrieval names rows of the index, this turns them into tensors, reading attends to them.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from model.checkpoint import Checkpoint
from model.cold import ColdStore
from model.writing import Memories, ReferenceWriter
from schemas.bank import Bank
from schemas.errors import BankFormatError, WrongModelError
from schemas.identifiers import ID_LENGTH
from schemas.records import Bytes, RecordLayout
from schemas.shards import ShardReader

DEFAULT_CACHE_BYTES = 256 << 20

MAX_OPEN_SHARDS = 256
"""Shards kept open: well below what a process may open, and enough that a shard is seldom opened twice."""


@dataclasses.dataclass(kw_only=True)
class FetchStatistics:
    """Where memories came from, in numbers of memories."""

    num_cached: int = 0
    num_read: int = 0
    num_encoded: int = 0


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
        self._records[ref_id] = record.copy()  # a row of a batch would keep the whole batch
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
            f"bank {bank.path} was written by another model: {', '.join(differences)} differ; "
            "use the model it was built with, or build a bank with this one"
        )


class BankMemories:
    """The memories of one version of a bank, by reference id.

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
        self._layout: RecordLayout = bank.manifest.layout
        self._cache = RecordCache(cache_bytes)
        self._cold: ColdStore | None = None
        self._shards: dict[str, ShardReader] = {}
        if bank.manifest.cold:
            self._cold = ColdStore(bank.path, bank.manifest.fingerprint.digest)
        else:
            places = bank.read_table("memories", ["ref_id", "shard", "row"])
            self._ref_ids = np.asarray(places["ref_id"].to_numpy(zero_copy_only=False), dtype=f"S{ID_LENGTH}")
            self._place_shards = places["shard"].combine_chunks().dictionary_encode()
            self._place_rows = places["row"].to_numpy()
            self._shard_files = {file.path.rpartition("/")[2]: file for file in bank.manifest.list_files("shard")}

    @property
    def checkpoint(self) -> Checkpoint:
        """The model that wrote the memories and reads them."""
        return self._writer.checkpoint

    def _open_shard(self, name: str) -> ShardReader:
        shard = self._shards.get(name)
        if shard is None:
            if name not in self._shard_files:
                raise BankFormatError(
                    f"bank {self.bank.path} names the shard {name!r}, which its manifest does not have"
                )
            shard = ShardReader(self.bank.locate(self._shard_files[name]))
            if shard.layout != self._layout or shard.fingerprint != self.bank.manifest.fingerprint.digest:
                raise BankFormatError(f"shard {shard.path} belongs to another bank; restore it or build the bank again")
            self._shards[name] = shard
            if len(self._shards) > MAX_OPEN_SHARDS:
                self._shards.pop(next(iter(self._shards))).close()
        return shard

    def _read_warm(self, ref_ids: Sequence[str]) -> dict[str, Bytes]:
        # NumPy would cut a longer id to the length of the column, and find what was not asked for.
        wanted = np.array([ref_id if len(ref_id) == ID_LENGTH else "" for ref_id in ref_ids], dtype=f"S{ID_LENGTH}")
        rows = np.searchsorted(self._ref_ids, wanted)
        found = (rows < len(self._ref_ids)) & (self._ref_ids[np.minimum(rows, len(self._ref_ids) - 1)] == wanted)
        if not found.all():
            raise BankFormatError(f"bank {self.bank.path} has no memory for {ref_ids[int(np.argmin(found))]}")
        by_shard: dict[str, list[tuple[str, int]]] = {}
        for ref_id, row in zip(ref_ids, rows, strict=True):
            name = self._place_shards[int(row)].as_py()
            by_shard.setdefault(name, []).append((ref_id, int(self._place_rows[row])))
        records: dict[str, Bytes] = {}
        for name, members in by_shard.items():
            read = self._open_shard(name).read([row for _, row in members])
            records.update((ref_id, record) for (ref_id, _), record in zip(members, read, strict=True))
        self.statistics.num_read += len(ref_ids)
        return records

    def _read_cold(self, cold: ColdStore, ref_ids: Sequence[str]) -> dict[str, Bytes]:
        records = cold.load(ref_ids)
        missing = [ref_id for ref_id in ref_ids if ref_id not in records]
        if missing:
            table = self.bank.read_references(missing, ["token_ids"])
            tokens = [np.asarray(ids, dtype=np.int32) for ids in table["token_ids"].to_pylist()]
            written = self._writer.write(tokens)
            packed = self._layout.pack(written.payload, written.offsets)
            cold.save(missing, packed)
            records.update(zip(missing, packed, strict=True))
            self.statistics.num_encoded += len(missing)
        self.statistics.num_read += len(ref_ids) - len(missing)
        return records

    def fetch_records(self, ref_ids: Sequence[str]) -> Bytes:
        """Returns the records of references, (len(ref_ids), stride_bytes), a copy that belongs to the caller."""
        records = {ref_id: record for ref_id in ref_ids if (record := self._cache.get(ref_id)) is not None}
        missing = list(dict.fromkeys(ref_id for ref_id in ref_ids if ref_id not in records))
        self.statistics.num_cached += len(records)
        if missing:
            fetched = self._read_warm(missing) if self._cold is None else self._read_cold(self._cold, missing)
            for ref_id, record in fetched.items():
                self._cache.put(ref_id, record)
            records.update(fetched)
        if not ref_ids:
            return np.empty((0, self._layout.stride_bytes), dtype=np.uint8)
        return np.stack([records[ref_id] for ref_id in ref_ids])

    def fetch(self, ref_ids: Sequence[str]) -> Memories:
        """Returns the memories of references in the model's type and on its device, in the order asked for."""
        payload, offsets = self._layout.unpack(self.fetch_records(ref_ids))
        # From a flat array, since an empty one of two axes cannot be seen as another type.
        stored = torch.from_numpy(np.ascontiguousarray(payload).reshape(-1)).view(getattr(torch, self._layout.dtype))
        checkpoint = self.checkpoint
        key_values = stored.view(len(ref_ids), *self._layout.payload_shape).to(checkpoint.device, checkpoint.dtype)
        keys, values = key_values.movedim(0, 2).unbind(1)  # each (L, R, H, S, D)
        places = torch.from_numpy(offsets.astype(np.int64)).movedim(0, 1).to(checkpoint.device)
        return Memories(keys_LBHSD=keys, values_LBHSD=values, offsets_LBHS=places)
