"""The tokens of many references as one Arrow file that is mapped into memory: any of them is there at once.

Used where sequences are prepared, for the references of a bank, and by the loader, for those that a training reads.
Several processes share what is in use.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from schemas.atomic import replace_atomically
from schemas.errors import DatasetFormatError
from schemas.identifiers import ID_LENGTH
from schemas.protocols import IntArray, LongArray
from schemas.tables import rebatch

REFERENCE_TOKENS = pa.schema(
    [
        pa.field("ref_id", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
    ]
)
"""The columns, a row a reference, sorted by ``ref_id``."""

ROWS_PER_BATCH = 65_536


def write_reference_tokens(tables: Iterable[pa.Table], path: Path) -> int:
    """Writes tables with the columns of :data:`REFERENCE_TOKENS`, together ascending by id; returns their rows."""
    num_rows = 0
    with (
        replace_atomically(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, REFERENCE_TOKENS) as writer,
    ):
        for table in rebatch((table.select(REFERENCE_TOKENS.names) for table in tables), ROWS_PER_BATCH):
            (batch,) = table.cast(REFERENCE_TOKENS).combine_chunks().to_batches()
            writer.write_batch(batch)
            num_rows += len(table)
    return num_rows


class ReferenceTokens:
    """A file of :func:`write_reference_tokens`, opened for reading."""

    def __init__(self, path: Path) -> None:
        """Maps the file.

        Raises:
            DatasetFormatError: it is missing or damaged.
        """
        self._path = path
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
            ids = [batch["ref_id"].cast(pa.binary()).cast(pa.binary(ID_LENGTH)) for batch in batches]
            lists = [batch["token_ids"] for batch in batches]
        except (pa.ArrowException, OSError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise DatasetFormatError(f"{path} cannot be read: {reason}; prepare the sequences again") from error
        packed = [np.frombuffer(column.buffers()[1], f"S{ID_LENGTH}", len(column), 0) for column in ids]
        self._ids = np.concatenate([np.empty(0, f"S{ID_LENGTH}"), *packed])
        self._values = [column.values.to_numpy() for column in lists]
        self._offsets = [column.offsets.to_numpy() for column in lists]

    def __len__(self) -> int:
        """Returns the number of references."""
        return len(self._ids)

    def find_rows(self, ref_ids: pa.Array) -> LongArray:
        """Returns the row of each id.

        Raises:
            DatasetFormatError: an id is not in the file.
        """
        wanted = np.array(ref_ids.to_pylist(), f"S{ID_LENGTH}")
        rows: LongArray = np.searchsorted(self._ids, wanted)
        is_found = rows < len(self)
        is_found[is_found] = self._ids[rows[is_found]] == wanted[is_found]
        if not is_found.all():
            missing = wanted[np.argmin(is_found)].decode()
            raise DatasetFormatError(f"{self._path} has no reference {missing}; prepare the sequences again")
        return rows

    def get_ref_id(self, row: int) -> str:
        """Returns the id of a row."""
        return str(self._ids[row].decode())

    def get_tokens(self, row: int) -> IntArray:
        """Returns the tokens of a row, int32, read-only."""
        batch, place = divmod(row, ROWS_PER_BATCH)
        offsets = self._offsets[batch]
        tokens: IntArray = self._values[batch][offsets[place] : offsets[place + 1]]
        return tokens

    def iterate_tables(self, rows: LongArray) -> Iterator[pa.Table]:
        """Yields rows as tables of :data:`REFERENCE_TOKENS`, some thousand at a time.

        Args:
            rows: ascending, each once.
        """
        for start in range(0, len(rows), ROWS_PER_BATCH):
            part = rows[start : start + ROWS_PER_BATCH].tolist()
            columns = [[self.get_ref_id(row) for row in part], [self.get_tokens(row) for row in part]]
            yield pa.table(columns, schema=REFERENCE_TOKENS)
