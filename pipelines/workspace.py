"""Where an unfinished build keeps its files: one folder a stage, one file a unit.

A workspace belongs to one build of one corpus with one configuration, so whatever stands in it may be used again after
a stop or a crash.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.atomic import replace_atomically

WORKSPACE_FORMAT = 3
"""Raised with every change of what a stage writes: a workspace of another release is not gone on with."""

STAGES = (
    "records",
    "read",
    "drops",
    "scores",
    "documents",
    "reused",
    "chunks",
    "tables",
    "references",
    "contaminated",
    "compared",
    "unembedded",
    "embeddings",
    "unwritten",
    "shards",
    "segment",
)


@dataclasses.dataclass(frozen=True)
class Workspace:
    """The folders of one build.

    Attributes:
        root: the folder that holds them.
    """

    root: Path

    def create(self) -> None:
        """Makes the folders that are not there yet."""
        for stage in STAGES:
            (self.root / stage).mkdir(parents=True, exist_ok=True)

    def get_folder(self, stage: str) -> Path:
        """Returns the folder of a stage."""
        return self.root / stage

    def list_files(self, stage: str) -> list[Path]:
        """Returns the finished files of a stage, in the order of their names."""
        return list_finished(self.get_folder(stage))

    @property
    def document_duplicates_path(self) -> Path:
        """The near-duplicate documents, where documents are compared."""
        return self.root / "document_duplicates.parquet"

    @property
    def reused_path(self) -> Path:
        """The documents whose references are taken over from another version."""
        return self.root / "reused.parquet"

    @property
    def current_path(self) -> Path:
        """The ids of all references that stand in a document, ascending."""
        return self.root / "current.parquet"

    @property
    def duplicates_path(self) -> Path:
        """The near-duplicate references."""
        return self.root / "duplicates.parquet"


def list_finished(folder: Path) -> list[Path]:
    """Returns the files of a folder that are whole, in the order of their names; none if the folder is not there."""
    return sorted(path for path in folder.glob("*") if path.suffix != ".tmp")


def read_tables(paths: Sequence[Path], columns: list[str], schema: pa.Schema) -> pa.Table:
    """Reads columns of several Parquet files of one schema as one table, empty if there is no file."""
    tables = [pq.read_table(path, columns=columns) for path in paths]
    fields = pa.schema([schema.field(name) for name in columns])
    return pa.concat_tables([fields.empty_table(), *(table.select(columns).cast(fields) for table in tables)])


def write_columns(batches: Iterable[pa.Table], schema: pa.Schema, path: Path, *, compression: str | None) -> None:
    """Writes tables as the batches of one Arrow file: cheap to write, and each batch or column is read alone."""
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (
        replace_atomically(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema, options=options) as writer,
    ):
        for table in batches:
            batch = table.combine_chunks().to_batches()
            writer.write_batch(batch[0] if batch else pa.RecordBatch.from_pylist([], schema=schema))


def read_columns(path: Path, columns: Sequence[str], batch: int | None = None) -> pa.Table:
    """Reads columns of a file of :func:`write_columns`, of all its batches or of one, mapped where possible."""
    schema = pa.ipc.open_file(pa.memory_map(str(path))).schema
    options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in columns])
    reader = pa.ipc.open_file(pa.memory_map(str(path)), options=options)
    table = reader.read_all() if batch is None else pa.Table.from_batches([reader.get_batch(batch)])
    return table.select(list(columns))
