"""Memories encoded when first retrieved, kept for the next time: the paper's cold start.

One SQLite file a bank and writer, ``cold/<fingerprint digest>.sqlite``. It is a cache: deleting it loses nothing but
time. Several processes and threads may use it at once.
"""

import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from schemas.bank import COLD_FOLDER
from schemas.errors import BankFormatError
from schemas.records import Bytes

CREATE_TABLE = "CREATE TABLE IF NOT EXISTS records (ref_id TEXT PRIMARY KEY, record BLOB) WITHOUT ROWID"


class ColdStore:
    """Records by reference id, each written in a transaction of its own batch."""

    def __init__(self, bank: Path, fingerprint: str) -> None:
        """Opens or makes the store of one writer's memories beside a bank."""
        path = bank / COLD_FOLDER / f"{fingerprint}.sqlite"
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=30.0, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute(CREATE_TABLE)
        except (sqlite3.Error, OSError) as error:
            raise BankFormatError(
                f"the cache {path} is damaged or cannot be written: {error}; deleting it loses nothing"
            ) from error

    def load(self, ref_ids: Sequence[str]) -> dict[str, Bytes]:
        """Returns the records that are there, by reference id."""
        marks = ",".join("?" * len(ref_ids))
        query = f"SELECT ref_id, record FROM records WHERE ref_id IN ({marks})"
        with self._lock:
            rows = self._connection.execute(query, list(ref_ids)).fetchall()
        return {ref_id: np.frombuffer(record, dtype=np.uint8) for ref_id, record in rows}

    def save(self, ref_ids: Sequence[str], records: Bytes) -> None:
        """Stores records (N, stride_bytes); one that is there already stays as it is."""
        with self._lock, self._connection:
            self._connection.executemany(
                "INSERT OR IGNORE INTO records VALUES (?, ?)",
                [(ref_id, record.tobytes()) for ref_id, record in zip(ref_ids, records, strict=True)],
            )

    def close(self) -> None:
        """Closes the store."""
        self._connection.close()
