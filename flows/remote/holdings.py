"""The versions of a bank that a bank server has open: its indexes and its records, without any model.

A client reads the version it began with to its end, whatever is committed meanwhile; so the last few that were asked
for stay open.
"""

import dataclasses
import threading
from collections import OrderedDict

from flows.remote.wire import BankDescription, CodecFile
from model.bank_records import BankRecords
from model.retrieving import IndexSearch
from schemas.bank import Bank
from schemas.errors import BankFormatError
from schemas.manifest import CODEC_KIND
from schemas.stores import BankStore, open_store
from schemas.tags import find_version

MAX_OPEN_VERSIONS = 4

MEMORY_SETTINGS = ("device", "compute_dtype", "dtype")
"""The settings of a bank's memories that its readers need."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenVersion:
    """A version that is open.

    Attributes:
        bank: the version.
        search: finds its references.
        records: has its memories.
    """

    bank: Bank
    search: IndexSearch
    records: BankRecords

    def describe(self) -> BankDescription:
        """Returns what clients have to know."""
        manifest = self.bank.manifest
        memory = manifest.config["memory"]
        codec = next(iter(manifest.list_files(CODEC_KIND)), None)
        return BankDescription(
            version=manifest.version,
            num_references=self.search.num_references,
            fingerprint=dataclasses.asdict(manifest.fingerprint),
            layout=manifest.layout.to_json(),
            embedder=manifest.config["embedding"]["embedder"],
            embedder_id=manifest.embedder_id,
            memory={name: memory[name] for name in MEMORY_SETTINGS if name in memory},
            codec=None if codec is None else CodecFile(size_bytes=codec.size_bytes, sha256=codec.sha256),
        )


def _open_version(bank: Bank) -> OpenVersion:
    records = BankRecords(bank)
    records.hold_shards()
    return OpenVersion(bank=bank, search=IndexSearch(bank), records=records)


class Holdings:
    """Opens versions of a bank as they are asked for; safe to use from several threads."""

    def __init__(self, place: str, at: str | None = None) -> None:
        """Opens the version that will be asked for first.

        Args:
            place: folder or URL of the bank.
            at: the version for clients that name none, see :func:`schemas.tags.find_version`.

        Raises:
            BankError: it cannot be opened, or is cold.
        """
        self._store: BankStore = open_store(place)
        self._at = at
        self._lock = threading.Lock()
        self._versions: OrderedDict[int, OpenVersion] = OrderedDict()
        self.find(None)

    def find(self, at: str | None) -> OpenVersion:
        """Opens the version that a client names, or the one of the moment.

        Raises:
            BankError: there is no such version, or it cannot be opened.
        """
        with self._lock:
            return self._keep(Bank.open(self._store, find_version(self._store, at or self._at)))

    def get(self, version: int) -> OpenVersion:
        """Returns a version by its number, which need not exist any more if it is open.

        Raises:
            BankError: there is no such version, or it cannot be opened.
        """
        with self._lock:
            opened = self._versions.get(version)
            if opened is None:
                return self._keep(Bank.open(self._store, version))
            self._versions.move_to_end(version)
            return opened

    def _keep(self, bank: Bank) -> OpenVersion:
        version = bank.manifest.version
        if version not in self._versions:
            if not bank.is_complete():
                raise BankFormatError(
                    f"version {version} of bank {bank.url} lacks files, or has some of another size; "
                    f"run memory3 verify --bank {bank.url}"
                )
            self._versions[version] = _open_version(bank)
            if len(self._versions) > MAX_OPEN_VERSIONS:
                self._versions.popitem(last=False)
        self._versions.move_to_end(version)
        return self._versions[version]
