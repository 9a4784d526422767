"""From reference to memory: a cache in RAM, then a source of records, a bank at hand or a server that has one.

Where it stands: retrieval names references, this turns them into tensors, reading attends to them. Nothing is handed
out unless the model at hand is the one that wrote it, and unless the version still has the reference.
"""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from model.bank_records import BankRecords
from model.checkpoint import Checkpoint
from model.writing import Memories, ReferenceWriter
from schemas.bank import Bank
from schemas.errors import WrongModelError
from schemas.protocols import Fingerprint, FoundRecords, RecordSource
from schemas.records import Bytes, RecordLayout

DEFAULT_CACHE_BYTES = 256 << 20


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


def check_fingerprint(url: str, found: Fingerprint, writer: ReferenceWriter) -> None:
    """Makes sure that a bank's memories are those this model would write.

    Args:
        url: where the bank is.
        found: what wrote its memories.
        writer: the model at hand.

    Raises:
        WrongModelError: it would write others; the error says in what the two differ.
    """
    differences = found.list_differences(writer.fingerprint)
    if differences:
        raise WrongModelError(
            f"bank {url} was written by another model: {', '.join(differences)} differ; "
            "use the model it was built with, or build a bank with this one"
        )


class FetchedMemories:
    """The memories of one version of a bank, by reference id; safe to use from several threads.

    Attributes:
        statistics: where the memories came from so far.
    """

    def __init__(
        self, source: RecordSource, writer: ReferenceWriter, *, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        """Opens the memories of a source for the model that wrote them.

        Args:
            source: has the records.
            writer: the model.
            cache_bytes: RAM for records; 0 keeps none.

        Raises:
            WrongModelError: they were written by another model.
        """
        check_fingerprint(source.url, source.fingerprint, writer)
        self.statistics = FetchStatistics()
        self._source, self._writer = source, writer
        self._fingerprint = writer.fingerprint
        self._layout: RecordLayout = source.layout
        self._cache = RecordCache(cache_bytes)
        self._lock = threading.Lock()

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
            check_fingerprint(self._source.url, self._source.fingerprint, self._writer)
            self._fingerprint = fingerprint

    def _read(self, ref_ids: Sequence[str]) -> FoundRecords:
        """Reads records into the cache too."""
        found = self._source.read(ref_ids)
        for ref_id, record in found.records.items():
            self._cache.put(ref_id, record)
        return found

    def _collect(self, ref_ids: Sequence[str]) -> Bytes:
        """Returns the records of references, (len(ref_ids), stride_bytes), as new memory."""
        self._check_model()
        with self._lock:
            records = {ref_id: record for ref_id in ref_ids if (record := self._cache.get(ref_id)) is not None}
            missing = list(dict.fromkeys(ref_id for ref_id in ref_ids if ref_id not in records))
            self.statistics.num_cached += len(records)
            if missing:
                found = self._read(missing)
                records.update(found.records)
                self.statistics.num_encoded += found.num_encoded
                self.statistics.num_read += len(missing) - found.num_encoded
        if not ref_ids:
            return np.empty((0, self._layout.stride_bytes), dtype=np.uint8)
        return np.stack([records[ref_id] for ref_id in ref_ids])

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
                self._read(missing)
                self.statistics.num_read_ahead += len(missing)  # nobody waited for these: they count as nothing else

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


class BankMemories(FetchedMemories):
    """The memories of one version of a bank that is at hand.

    Attributes:
        bank: the opened version.
    """

    def __init__(self, bank: Bank, writer: ReferenceWriter, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        """Opens the memories of a bank for the model that wrote them.

        Raises:
            WrongModelError: the bank was written by another model.
            BankFormatError: a file is missing or damaged.
        """
        check_fingerprint(bank.url, bank.manifest.fingerprint, writer)  # before anything of the bank is read
        records = BankRecords(bank, writer)
        super().__init__(records, writer, cache_bytes=cache_bytes)
        self.bank = bank
        self._records = records

    def hold_shards(self) -> None:
        """See :meth:`model.bank_records.BankRecords.hold_shards`."""
        self._records.hold_shards()
