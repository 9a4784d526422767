"""This project's near-duplicate removal of one file in one process, with verification.

    python -m benchmarks.peers.ours_duplicates INPUT.jsonl|INPUT.parquet FOLDER

Documents are read from JSON lines by the project's reader, references from Parquet, as the stage before hands them on.
The settings are the defaults; the longest of a cluster is kept. Writes ``removed.parquet``: the table of duplicates.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.clustering import DeduplicationConfig, find_duplicates
from pipelines.formats import list_corpus_files
from pipelines.reading import read_records
from pipelines.records import ReadingConfig


def read_texts(source: Path) -> pa.Table:
    """Returns the columns ``id`` and ``text`` of a file."""
    if source.suffix == ".parquet":
        return pq.read_table(source, columns=["id", "text"])
    batches = list(read_records(list_corpus_files([source])[0], ReadingConfig()))
    table = pa.Table.from_batches([batch.select(["doc_id", "text"]) for batch in batches])
    return table.rename_columns(["id", "text"]).filter(pc.is_valid(table["text"]))


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    table = read_texts(arguments.source)
    ids, texts = table["id"].combine_chunks(), table["text"].combine_chunks()
    del table
    preferences = pc.negate(pc.binary_length(texts).cast(pa.int64())).to_numpy()
    duplicates = find_duplicates(ids, texts, preferences, DeduplicationConfig())
    arguments.folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(duplicates, arguments.folder / "removed.parquet")


if __name__ == "__main__":
    main()
