"""A bank opened for reading: one version, fixed when it is opened.

bank/
  manifests/00000001.json    one a version, committed last
  segments/<id>/             Parquet tables, payload shards, index, codec; never changed once committed
  tags/<name>.json           names of versions
  checks/00000001.json       what verify found last
  cold/<fingerprint>.sqlite  memories encoded when first retrieved; a cache that may be deleted
  work/                      unfinished builds; not part of any version

A version may have files in several segments. Of a whole table there is one file; a parted table has one in each
segment that added rows, and an id stands in one of them only.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from schemas.errors import BankFormatError
from schemas.manifest import CODEC_KIND, MANIFESTS_FOLDER, FileEntry, Manifest, list_versions, read_manifest
from schemas.shards import ShardReader, StoredSource
from schemas.stores import BankStore, LocalStore, open_store
from schemas.tables import ROWS_PER_GROUP, find_schema

SEGMENTS_FOLDER = "segments"
TAGS_FOLDER = "tags"
CHECKS_FOLDER = "checks"
COLD_FOLDER = "cold"
WORK_FOLDER = "work"

BANK_FOLDERS = frozenset({MANIFESTS_FOLDER, SEGMENTS_FOLDER, TAGS_FOLDER, CHECKS_FOLDER, COLD_FOLDER, WORK_FOLDER})

PARTED_KINDS = frozenset({"references", "signatures", "embeddings", "memories", "shard", "index"})
"""Kinds of which each segment has its own; of every other kind a version has one file at most."""

DROPPING_KINDS = ("duplicates", "contaminated", "tombstones")
"""Tables of references that are stored but not live."""

HASHED_BYTES = 1 << 30
"""Tables up to this size are checked as a whole when first read, which takes 0.7 s; larger ones page by page."""


class Bank:
    """One version of a bank.

    Attributes:
        store: where the bank's files are.
        manifest: the version's manifest.
    """

    def __init__(self, place: str | Path | BankStore, manifest: Manifest) -> None:
        """Joins a bank's place and one of its manifests; use :meth:`open`."""
        self.store = open_store(place)
        self.manifest = manifest
        self._checked: set[tuple[str, int, int, int]] = set()

    @classmethod
    def open(cls, place: str | Path | BankStore, version: int | None = None) -> "Bank":
        """Opens a version, by default the newest.

        Raises:
            BankFormatError: no bank is there, the version does not exist, or its manifest is damaged.
        """
        store = open_store(place)
        versions = list_versions(store)
        if not versions:
            what = "holds no committed version of a bank" if store.list_files() else "does not exist"
            raise BankFormatError(f"{store.url} {what}; make one with: memory3 build --corpus PATH --bank {store.url}")
        return cls(store, read_manifest(store, versions[-1] if version is None else version))

    @property
    def url(self) -> str:
        """Where the bank is, as a user writes it."""
        return self.store.url

    def _explain_missing(self, file: FileEntry) -> BankFormatError:
        name = f"{self.url}/{file.path}"
        if self.manifest.version not in list_versions(self.store):
            return BankFormatError(
                f"{name} is gone: version {self.manifest.version} was removed while it was open; open another version"
            )
        return BankFormatError(f"{name} is missing from the bank; restore it or build the bank again")

    def locate(self, file: FileEntry) -> Path:
        """Returns a path of this machine with the bytes of a file of this version.

        Raises:
            BankFormatError: the file is missing.
        """
        try:
            return self.store.localize(file.path, file.sha256)
        except FileNotFoundError as error:
            raise self._explain_missing(file) from error

    def locate_codec(self) -> Path | None:
        """Returns a path of this machine with the parameters of the codec of this version, None if it has none.

        Raises:
            BankFormatError: the file is missing or damaged.
        """
        return next(map(self.check, self.manifest.list_files(CODEC_KIND)), None)

    def open_shard(self, file: FileEntry) -> ShardReader:
        """Opens a payload shard of this version: in an object store it stays there and is read by ranges.

        Raises:
            BankFormatError: the shard is missing, damaged, or belongs to another bank.
        """
        if isinstance(self.store, LocalStore):
            shard = ShardReader(self.locate(file))
        else:
            try:
                shard = ShardReader(StoredSource(self.store, file.path, file.size_bytes))
            except FileNotFoundError as error:
                raise self._explain_missing(file) from error
        if shard.layout != self.manifest.layout or shard.fingerprint != self.manifest.fingerprint.digest:
            shard.close()
            raise BankFormatError(f"shard {shard.name} belongs to another bank; restore it or build the bank again")
        if shard.num_records != file.num_rows:
            shard.close()
            raise BankFormatError(
                f"shard {shard.name} has {shard.num_records} records, the manifest says {file.num_rows}; "
                "restore it or build the bank again"
            )
        return shard

    def is_complete(self) -> bool:
        """Tells whether every file of this version is there with its size; ``verify`` tells more."""
        return all(self.store.get_size(file.path) == file.size_bytes for file in self.manifest.files)

    def locate_all(self, kind: str) -> list[Path]:
        """Returns the paths of all files of one kind, in order."""
        return [self.locate(file) for file in self.manifest.list_files(kind)]

    def check(self, file: FileEntry) -> Path:
        """Returns a path as :meth:`locate` does, of bytes that are those the manifest promises.

        The whole file is read for that, once in the life of this object unless the file changes.

        Raises:
            BankFormatError: the file is missing, cannot be read, or has other bytes than when it was written.
        """
        path = self.locate(file)
        try:
            status = path.stat()
            state = (file.path, status.st_ino, status.st_size, status.st_mtime_ns)
            if state in self._checked:
                return path
            if status.st_size != file.size_bytes:
                raise self._explain_damage(file, f"has {status.st_size} bytes, not {file.size_bytes}")
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise self._explain_damage(file, f"cannot be read: {error}") from error
        if digest != file.sha256:
            raise self._explain_damage(file, "has other bytes than when it was written")
        self._checked.add(state)
        return path

    def _explain_damage(self, file: FileEntry, finding: str) -> BankFormatError:
        noun = "table" if file.path.endswith(".parquet") else "file"
        reason = finding.splitlines()[0]
        return BankFormatError(
            f"{noun} {file.kind!r} of bank {self.url} is damaged: {file.path} {reason}; run memory3 verify"
        )

    def open_table(self, file: FileEntry) -> pq.ParquetFile:
        """Opens a Parquet file of this version; its pages are checked when they are read.

        A small file is checked as a whole, see :meth:`check`, because its size says little about whose it is.

        Raises:
            BankFormatError: the file is missing or damaged, or is not the table that the manifest promises.
        """
        path = self.check(file) if file.size_bytes <= HASHED_BYTES else self.locate(file)
        try:
            size_bytes = path.stat().st_size
            table = pq.ParquetFile(path, page_checksum_verification=True)
            found, num_rows = table.schema_arrow.remove_metadata(), table.metadata.num_rows
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._explain_damage(file, f"cannot be read: {error}") from error
        expected = find_schema(file.kind, found)
        if size_bytes != file.size_bytes:
            raise self._explain_damage(file, f"has {size_bytes} bytes, not {file.size_bytes}")
        if num_rows != file.num_rows:
            raise self._explain_damage(file, f"has {num_rows} rows, not {file.num_rows}")
        if expected is None or not found.equals(expected):
            raise self._explain_damage(
                file, f"has the columns {', '.join(found.names)}, or their types, of another table"
            )
        return table

    def iterate_table(
        self, file: FileEntry, columns: Sequence[str] | None = None, rows_per_batch: int = ROWS_PER_GROUP
    ) -> Iterator[pa.RecordBatch]:
        """Yields the rows of one Parquet file of this version, in order.

        Raises:
            BankFormatError: see :meth:`open_table`; or a page has other bytes than when it was written.
        """
        with self.open_table(file) as table:
            batches = table.iter_batches(rows_per_batch, columns=None if columns is None else list(columns))
            while True:
                try:
                    batch = next(batches, None)
                except (pa.ArrowException, OSError) as error:
                    raise self._explain_damage(file, f"cannot be read: {error}") from error
                if batch is None:
                    return
                yield batch

    def read_table(self, kind: str, columns: list[str] | None = None) -> pa.Table:
        """Reads a table of the bank into memory.

        Raises:
            BankFormatError: a file is missing or damaged.
        """
        files = self.manifest.list_files(kind)
        if not files:
            raise BankFormatError(f"version {self.manifest.version} of bank {self.url} has no table {kind!r}")
        tables = []
        for file in files:
            with self.open_table(file) as table:
                try:
                    tables.append(table.read(columns))
                except (pa.ArrowException, OSError) as error:
                    raise self._explain_damage(file, f"cannot be read: {error}") from error
        return pa.concat_tables(tables)

    def read_dropped_ids(self) -> pa.Array:
        """Returns the ids of stored references that are not live: near-duplicates, contaminated and deleted ones.

        Raises:
            BankFormatError: a table is missing or damaged.
        """
        kinds = [kind for kind in DROPPING_KINDS if self.manifest.list_files(kind)]
        tables = [self.read_table(kind, ["ref_id"]) for kind in kinds]
        ids = [chunk for table in tables for chunk in table["ref_id"].chunks]
        return pa.concat_arrays([pa.array([], pa.string()), *ids])

    def read_rows(self, kind: str, column: str, values: Iterable[str], columns: Sequence[str]) -> pa.Table:
        """Reads the rows of a table with certain values, in the order of the table; none if there is no such table.

        Only the parts of the files that may have such rows are read.

        Args:
            kind: the table.
            column: the column to look into.
            values: what must stand there.
            columns: the columns to return.

        Raises:
            BankFormatError: a file is missing or damaged.
        """
        wanted = pa.array(dict.fromkeys(values), pa.string())
        options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        file_format = ds.ParquetFileFormat(default_fragment_scan_options=options)
        tables = []
        for file in self.manifest.list_files(kind):
            with self.open_table(file) as table:
                schema = table.schema_arrow
            try:
                dataset = ds.dataset(self.locate(file), schema, format=file_format)
                tables.append(dataset.to_table(columns=list(columns), filter=ds.field(column).isin(wanted)))
            except (pa.ArrowException, OSError) as error:
                raise self._explain_damage(file, f"cannot be read: {error}") from error
        schema = find_schema(kind, pa.schema([]))
        if tables or schema is None:
            return pa.concat_tables(tables)
        return schema.empty_table().select(list(columns))

    def read_references(self, ref_ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Reads rows of the table ``references`` by id, in the order asked for, with ``ref_id`` and ``columns``.

        Raises:
            BankFormatError: an id is not in the bank, or a file is missing or damaged.
        """
        if not self.manifest.list_files("references"):
            raise BankFormatError(f"version {self.manifest.version} of bank {self.url} has no table 'references'")
        wanted = pa.array(ref_ids, pa.string())
        table = self.read_rows("references", "ref_id", ref_ids, list(dict.fromkeys(["ref_id", *columns])))
        rows = pc.index_in(wanted, value_set=table["ref_id"].combine_chunks())
        if rows.null_count:
            raise BankFormatError(f"bank {self.url} has no reference {wanted.filter(rows.is_null())[0].as_py()}")
        return table.take(rows)
