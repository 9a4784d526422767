"""The versions of a bank that a bank server has open: its indexes and its records, without any model.

A client reads the version it began with to its end, whatever is committed meanwhile; so the last few that were asked
for stay open, as long as the bank has them.
"""

import dataclasses
import math
import threading
import time
from collections import OrderedDict

from flows.remote.wire import BankDescription, CodecFile
from flows.serving.errors import ApiError
from model.bank_records import BankRecords
from model.retrieving import IndexSearch
from schemas.bank import Bank
from schemas.errors import BankFormatError
from schemas.manifest import CODEC_KIND, list_versions
from schemas.stores import BankStore, open_store
from schemas.tags import find_version

MAX_OPEN_VERSIONS = 4

MAX_OPEN_SHARDS = 64
"""Of each version: all together well below what a process may open."""

LOOK_SECONDS = 5.0
"""Between two looks for versions that were removed."""

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
    records = BankRecords(bank, max_open_shards=MAX_OPEN_SHARDS)
    records.hold_shards()
    return OpenVersion(bank=bank, search=IndexSearch(bank), records=records)


@dataclasses.dataclass(kw_only=True)
class _Place:
    """Where a version is kept; whoever comes first opens it, others wait for that one alone."""

    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    opened: OpenVersion | None = None


class Holdings:
    """Opens versions of a bank as they are asked for; safe to use from several threads."""

    def __init__(self, store: str, at: str | None = None) -> None:
        """Opens the version that will be asked for first.

        Args:
            store: folder or URL of the bank.
            at: the version for clients that name none, see :func:`schemas.tags.find_version`.

        Raises:
            BankError: it cannot be opened, or is cold.
        """
        self._store: BankStore = open_store(store)
        self._at = at
        self._lock = threading.Lock()  # for what stands below, never while something is opened
        self._places: OrderedDict[int, _Place] = OrderedDict()
        self._known: frozenset[int] = frozenset()
        self._looked_at = -math.inf
        self.find(None)

    def find(self, at: str | None) -> OpenVersion:
        """Opens the version that a client names, or the one of the moment.

        Raises:
            BankError: there is no such version, or it cannot be opened.
        """
        self._look()
        return self._open(Bank.open(self._store, find_version(self._store, at or self._at)))

    def get(self, version: int) -> OpenVersion:
        """Returns a version by its number.

        Raises:
            ApiError: there is no such version, or not any more.
            BankError: it cannot be opened.
        """
        if time.monotonic() - self._looked_at > LOOK_SECONDS or version not in self._known:
            self._look()
        with self._lock:
            place = self._places.get(version)
            if place is not None:
                self._places.move_to_end(version)
            is_known = version in self._known
        if not is_known:
            raise ApiError(404, f"the bank has no version {version}, or not any more; open it again", param="version")
        if place is not None and place.opened is not None:
            return place.opened
        return self._open(Bank.open(self._store, version))

    def _look(self) -> None:
        """Looks which versions there are, and lets go of those that were removed: a purge is one for clients too."""
        known = frozenset(list_versions(self._store))
        with self._lock:
            self._known, self._looked_at = known, time.monotonic()
            for version in self._places.keys() - known:
                del self._places[version]

    def _open(self, bank: Bank) -> OpenVersion:
        version = bank.manifest.version
        with self._lock:
            place = self._places.setdefault(version, _Place())
            self._places.move_to_end(version)
            while len(self._places) > MAX_OPEN_VERSIONS:
                self._places.popitem(last=False)
        with place.lock:
            if place.opened is None:
                if not bank.is_complete():
                    raise BankFormatError(
                        f"version {version} of bank {bank.url} lacks files, or has some of another size; "
                        f"run memory3 verify --bank {bank.url}"
                    )
                place.opened = _open_version(bank)
            return place.opened
