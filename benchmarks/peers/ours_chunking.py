"""This project's chunking of one file in one process: documents read, cut into references with spans, and written.

    python -m benchmarks.peers.ours_chunking INPUT.jsonl FOLDER

Uses the tokenizer of the model that comes with the project. Writes ``chunks.parquet``.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.locating import SHIPPED_MODEL
from model.tokenizing import load_tokenizer
from pipelines.chunking import CHUNKS, ChunkingConfig, chunk_documents
from pipelines.formats import list_corpus_files
from pipelines.reading import read_records
from pipelines.records import ReadingConfig


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(SHIPPED_MODEL)
    with pq.ParquetWriter(arguments.folder / "chunks.parquet", CHUNKS) as sink:
        for batch in read_records(list_corpus_files([arguments.source])[0], ReadingConfig()):
            kept = pa.Table.from_batches([batch]).filter(pc.is_valid(batch["text"]))
            doc_ids, texts = (kept[name].combine_chunks() for name in ("doc_id", "text"))
            sink.write_table(chunk_documents(doc_ids, texts, None, tokenizer, ChunkingConfig()))


if __name__ == "__main__":
    main()
