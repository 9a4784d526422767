"""Memories encoded when first retrieved, kept for the next time: the paper's cold start.

One SQLite file a bank and writer, ``cold/<fingerprint digest>.sqlite``. It is a cache: deleting it loses nothing but
time. No manifest knows its digest; whoever loads a record makes sure that it is whole. Several processes and threads
may use it at once.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from schemas.bank import COLD_FOLDER
from schemas.errors import BankFormatError
from schemas.records import Bytes

CREATE_TABLE = "CREATE TABLE IF NOT EXISTS records (ref_id TEXT PRIMARY KEY, record BLOB) WITHOUT ROWID"

IDS_PER_QUERY = 500
"""Fewer than the parameters that any SQLite takes in one query."""


class ColdStore:
    """Records by reference id, each written in a transaction of its own batch."""

    def __init__(self, bank: Path, fingerprint: str) -> None:
        """Opens or makes the store of one writer's memories beside a bank.

        Raises:
            BankFormatError: the file is no database, or cannot be written.
        """
        self._path = bank / COLD_FOLDER / f"{fingerprint}.sqlite"
        self._lock = threading.Lock()
        with self._explain_errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self._path, timeout=30.0, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute(CREATE_TABLE)

    @contextlib.contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise BankFormatError(
                f"the cache {self._path} is damaged or cannot be written: {error}; deleting it loses nothing"
            ) from error

    def load(self, ref_ids: Sequence[str]) -> dict[str, Bytes]:
        """Returns the records that are there, by reference id, read-only and unchecked.

        Raises:
            BankFormatError: the file is damaged.
        """
        rows: list[tuple[str, object]] = []
        for start in range(0, len(ref_ids), IDS_PER_QUERY):
            wanted = list(ref_ids[start : start + IDS_PER_QUERY])
            query = f"SELECT ref_id, record FROM records WHERE ref_id IN ({','.join('?' * len(wanted))})"
            with self._explain_errors(), self._lock:
                rows += self._connection.execute(query, wanted).fetchall()
        return {ref_id: np.frombuffer(record, dtype=np.uint8) for ref_id, record in rows if isinstance(record, bytes)}

    def save(self, ref_ids: Sequence[str], records: Bytes) -> None:
        """Stores records (N, stride_bytes) in the place of what is there under their ids.

        Raises:
            BankFormatError: the file is damaged or cannot be written.
        """
        with self._explain_errors(), self._lock, self._connection:
            self._connection.executemany(
                "INSERT OR REPLACE INTO records VALUES (?, ?)",
                [(ref_id, record.tobytes()) for ref_id, record in zip(ref_ids, records, strict=True)],
            )

    def close(self) -> None:
        """Closes the store."""
        self._connection.close()


def keep_only(folder: Path, ref_ids: pa.Array) -> None:
    """Forgets in all cold stores of a folder the records of references that are not among some.

    The files are written anew, so that the bytes are gone too.

    Raises:
        BankFormatError: a file is damaged, or in use.
    """
    for path in sorted(folder.glob("*.sqlite")):
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=30.0)) as connection:
                connection.execute("PRAGMA secure_delete=ON")
                connection.execute("CREATE TEMP TABLE kept (ref_id TEXT PRIMARY KEY) WITHOUT ROWID")
                connection.executemany("INSERT INTO kept VALUES (?)", ((ref_id,) for ref_id in ref_ids.to_pylist()))
                connection.execute("DELETE FROM records WHERE ref_id NOT IN (SELECT ref_id FROM kept)")
                connection.commit()
                connection.execute("VACUUM")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:
            raise BankFormatError(f"the cache {path} cannot be cleaned: {error}; deleting it loses nothing") from error
