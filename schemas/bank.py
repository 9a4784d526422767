"""A bank opened for reading: one version, fixed when it is opened.

bank/
  manifests/00000001.json    one a version, committed last
  segments/<id>/             Parquet tables, payload shards, index; never changed once committed
  cold/<fingerprint>.sqlite  memories encoded when first retrieved; a cache that may be deleted
  work/                      unfinished builds; not part of any version
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from schemas.errors import BankFormatError
from schemas.manifest import MANIFESTS_FOLDER, FileEntry, Manifest, list_versions, read_manifest

SEGMENTS_FOLDER = "segments"
COLD_FOLDER = "cold"
WORK_FOLDER = "work"

BANK_FOLDERS = frozenset({MANIFESTS_FOLDER, SEGMENTS_FOLDER, COLD_FOLDER, WORK_FOLDER})


class Bank:
    """One version of a bank.

    Attributes:
        path: the bank's folder.
        manifest: the version's manifest.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Joins a folder and one of its manifests; use :meth:`open`."""
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path, version: int | None = None) -> "Bank":
        """Opens a version, by default the newest.

        Raises:
            BankFormatError: no bank is there, the version does not exist, or its manifest is damaged.
        """
        folder = Path(path)
        versions = list_versions(folder)
        if not versions:
            what = "holds no committed version of a bank" if folder.is_dir() else "does not exist"
            raise BankFormatError(f"{folder} {what}; make one with: memory3 build --corpus PATH --bank {folder}")
        return cls(folder, read_manifest(folder, versions[-1] if version is None else version))

    def locate(self, file: FileEntry) -> Path:
        """Returns the path of a file of this version.

        Raises:
            BankFormatError: the file is missing.
        """
        path = self.path / file.path
        if not path.is_file():
            raise BankFormatError(f"{path} is missing from the bank; restore it or build the bank again")
        return path

    def is_complete(self) -> bool:
        """Tells whether every file of this version is there with its size; ``verify`` tells more."""
        paths = [(self.path / file.path, file.size_bytes) for file in self.manifest.files]
        return all(path.is_file() and path.stat().st_size == size_bytes for path, size_bytes in paths)

    def locate_all(self, kind: str) -> list[Path]:
        """Returns the paths of all files of one kind, in order."""
        return [self.locate(file) for file in self.manifest.list_files(kind)]

    def read_table(self, kind: str, columns: list[str] | None = None) -> pa.Table:
        """Reads a table of the bank into memory.

        Raises:
            BankFormatError: a file is missing or is not readable Parquet.
        """
        paths = self.locate_all(kind)
        if not paths:
            raise BankFormatError(f"version {self.manifest.version} of bank {self.path} has no table {kind!r}")
        try:
            return pa.concat_tables([pq.read_table(path, columns=columns) for path in paths])
        except (pa.ArrowInvalid, OSError) as error:
            raise BankFormatError(
                f"table {kind!r} of bank {self.path} is damaged: {str(error).splitlines()[0]}; run memory3 verify"
            ) from error

    def read_references(self, ref_ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Reads rows of the table ``references`` by id, in the order asked for, with ``ref_id`` and ``columns``.

        Raises:
            BankFormatError: an id is not in the bank.
        """
        paths = [str(path) for path in self.locate_all("references")]
        if not paths:
            raise BankFormatError(f"version {self.manifest.version} of bank {self.path} has no table 'references'")
        wanted = pa.array(ref_ids, pa.string())
        names = list(dict.fromkeys(["ref_id", *columns]))
        try:
            dataset = ds.dataset(paths, format="parquet")
            table = dataset.to_table(columns=names, filter=ds.field("ref_id").isin(wanted.unique()))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise BankFormatError(f"table 'references' of bank {self.path} is damaged: {error}") from error
        rows = pc.index_in(wanted, value_set=table["ref_id"].combine_chunks())
        if rows.null_count:
            raise BankFormatError(f"bank {self.path} has no reference {wanted.filter(rows.is_null())[0].as_py()}")
        return table.take(rows)
