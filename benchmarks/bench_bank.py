"""A bank of a million references: opening it, counting in it, fetching memories from it.

    python -m benchmarks.bench_bank [--references 1000000] [--folder FOLDER]

The bank is written by the functions builds use, with the shapes of a small random model and random payloads, texts and
vectors: none of what is measured depends on what they say. The folder is kept if it is named, and used again.
"""

import argparse
import functools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from flows.console import print_rows
from model.embedding import load_embedder
from model.fetching import BankMemories
from model.retrieving import Retriever
from model.selecting import SelectionConfig
from model.writing import ReferenceWriter
from pipelines.assembling import publish_segment, write_embedding_tables, write_memory_table
from pipelines.inspecting import open_views, run_query
from pipelines.workspace import Workspace
from schemas.bank import Bank
from schemas.manifest import Manifest, commit_manifest, list_versions, make_manifest_name
from schemas.shards import write_shard
from schemas.stores import LocalStore
from schemas.tables import (
    DOCUMENTS,
    DUPLICATES,
    OCCURRENCES,
    REFERENCES,
    REJECTS,
    embeddings_schema,
    write_table,
    write_tables,
)
from tests.models import make_checkpoint

REFERENCES_PER_SHARD = 512
REFERENCES_PER_DOCUMENT = 20
NUM_SOURCES = 10
NUM_TRIALS = 200


def make_writer() -> ReferenceWriter:
    """Returns the smallest model that writes memories; always the same."""
    return ReferenceWriter(make_checkpoint("llama", num_hidden_layers=2), SelectionConfig(num_slots=2))


def _make_ids(number: int) -> list[str]:
    draw = np.random.default_rng(0)
    found = np.unique(draw.integers(0, 256, (number, 16), dtype=np.uint8).view("V16").ravel())
    assert len(found) == number
    return [bytes(one).hex() for one in found]


def _iterate_occurrences(ref_ids: list[str]) -> Iterator[pa.Table]:
    for start in range(0, len(ref_ids), REFERENCES_PER_DOCUMENT):
        mine = ref_ids[start : start + REFERENCES_PER_DOCUMENT]
        places = np.arange(len(mine), dtype=np.int64) * 100
        columns = {
            "doc_id": [f"doc-{start // REFERENCES_PER_DOCUMENT:07d}"] * len(mine),
            "ordinal": np.arange(len(mine), dtype=np.int32),
            **{name: places + (100 if name.startswith("end") else 0) for name in OCCURRENCES.names[2:6]},
            "prefix": [""] * len(mine),
            "ref_id": mine,
        }
        yield pa.table(columns, schema=OCCURRENCES)


def _write_tables(ref_ids: list[str], segment: Path) -> None:
    number = len(ref_ids)
    num_documents = -(-number // REFERENCES_PER_DOCUMENT)
    constants = {"path": "corpus.jsonl", "content_hash": "0" * 32, "title": "", "metadata": "{}"}
    columns = {
        "doc_id": [f"doc-{row:07d}" for row in range(num_documents)],
        "source": [f"source-{row % NUM_SOURCES}" for row in range(num_documents)],
        "position": np.arange(1, num_documents + 1),
        "size_bytes": np.full(num_documents, 100 * REFERENCES_PER_DOCUMENT),
        "num_chars": np.full(num_documents, 100 * REFERENCES_PER_DOCUMENT),
        "num_references": np.full(num_documents, REFERENCES_PER_DOCUMENT, np.int32),
        **{name: [value] * num_documents for name, value in constants.items()},
    }
    write_table(pa.table(columns).select(DOCUMENTS.names).cast(DOCUMENTS), segment / "documents.parquet")
    write_tables(_iterate_occurrences(ref_ids), OCCURRENCES, segment / "occurrences.parquet")
    write_table(DUPLICATES.empty_table(), segment / "duplicates.parquet")
    write_table(REJECTS.empty_table(), segment / "rejects.parquet")
    tokens = np.arange(number * 8, dtype=np.int32) % 500
    references = {
        "ref_id": ref_ids,
        "text": [f"the text of reference {row} " * 4 for row in range(number)],
        "token_ids": pa.ListArray.from_arrays(np.arange(0, number * 8 + 1, 8, dtype=np.int32), tokens),
        "num_tokens": np.full(number, 8, np.int32),
    }
    write_table(pa.table(references).cast(REFERENCES), segment / "references.parquet")


def make_bank(folder: Path, num_references: int) -> None:
    """Writes the bank."""
    writer, embedder = make_writer(), load_embedder("static")
    store = LocalStore(folder)
    work = Workspace(folder / "work" / "bench")
    work.create()
    ref_ids = _make_ids(num_references)
    _write_tables(ref_ids, work.get_folder("segment"))
    draw = np.random.default_rng(1)
    for part, start in enumerate(range(0, num_references, REFERENCES_PER_SHARD)):
        mine = ref_ids[start : start + REFERENCES_PER_SHARD]
        write_table(pa.table({"ref_id": mine}), work.get_folder("unwritten") / f"{part:06d}.parquet")
        payload = draw.integers(0, 256, (len(mine), writer.layout.payload_bytes), dtype=np.uint8)
        offsets = np.tile(np.arange(writer.layout.num_slots, dtype=np.uint8), writer.layout.num_offsets)
        shape = (len(mine), *writer.layout.offsets_shape)
        kept = np.resize(offsets, int(np.prod(shape))).reshape(shape)
        target = work.get_folder("shards") / f"shard-{part:06d}.safetensors"
        write_shard(target, writer.layout.pack(payload, kept, mine), writer.layout, writer.fingerprint.digest)
    for part, start in enumerate(range(0, num_references, 1 << 16)):
        mine = ref_ids[start : start + (1 << 16)]
        vectors = draw.standard_normal((len(mine), embedder.dimension), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), embedder.dimension)
        table = pa.table({"ref_id": mine, "vector": values}).cast(embeddings_schema(embedder.dimension))
        write_table(table, work.get_folder("embeddings") / f"{part:06d}.parquet")
    write_embedding_tables(work)
    write_memory_table(work)
    num_documents = -(-num_references // REFERENCES_PER_DOCUMENT)
    manifest = Manifest(
        version=1,
        parent=None,
        operation="build",
        created_at="2026-01-01T00:00:00+00:00",
        config={},
        build_id="0" * 32,
        files=publish_segment(work, store),
        counts={
            "documents": {"read": num_documents, "kept": num_documents, "dropped": {}},
            "references": {"read": num_references, "kept": num_references, "dropped": {}},
        },
        seconds={},
        fingerprint=writer.fingerprint,
        embedder_id=embedder.embedder_id,
        layout=writer.layout,
    )
    commit_manifest(store, manifest)
    shutil.rmtree(folder / "work")


def _time(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(folder: Path) -> None:
    """Prints what is measured."""
    writer, embedder = make_writer(), load_embedder("static")
    opening = _time(lambda: Bank.open(folder))
    bank = Bank.open(folder)
    fetching = _time(lambda: BankMemories(bank, writer, cache_bytes=0))
    retrieving = _time(lambda: Retriever(Bank.open(folder), embedder))
    memories = BankMemories(Bank.open(folder), writer, cache_bytes=0)
    ref_ids = bank.read_table("memories", ["ref_id"])["ref_id"]
    draw = np.random.default_rng(2)

    def fetch() -> None:
        memories.fetch([ref_ids[row].as_py() for row in rows])

    times = []
    for _ in range(NUM_TRIALS):
        rows = draw.integers(0, len(ref_ids), 5).tolist()
        fetch()  # the pages are warm, the cache of records is off
        times.append(_time(fetch))
    with open_views(Bank.open(folder)) as views:
        by_document = "select source, count(*) from documents group by all"
        by_reference = "select source, count(*) from occurrences join documents using (doc_id) group by all"
        queries = {}
        for name, query in (("documents by source", by_document), ("references by source", by_reference)):
            count = functools.partial(run_query, views, query)
            queries[f"count(*) of {name}, first"] = _time(count)
            queries[f"count(*) of {name}, again"] = _time(count)
    opened = _time(lambda: open_views(Bank.open(folder)).close())
    size_bytes = (folder / make_manifest_name(1)).stat().st_size
    rows_shown = [
        ["Bank.open", f"{opening * 1e3:.1f} ms"],
        ["Bank.open and its memories", f"{(opening + fetching) * 1e3:.0f} ms"],
        ["Bank.open and its index", f"{retrieving * 1e3:.0f} ms"],
        ["open the views of SQL", f"{opened * 1e3:.0f} ms"],
        *([name, f"{seconds * 1e3:.0f} ms"] for name, seconds in queries.items()),
        ["5 memories by id, warm, p50", f"{np.median(times) * 1e3:.2f} ms"],
        ["5 memories by id, warm, p99", f"{np.quantile(times, 0.99) * 1e3:.2f} ms"],
        ["manifest", f"{size_bytes / 1e6:.2f} MB, {len(bank.manifest.files):,} files"],
    ]
    print_rows([f"{len(ref_ids):,} references", ""], rows_shown, numeric={1})


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the bank is or goes; a temporary folder if not given")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="memory3-bench-"))
    try:
        if not list_versions(folder):
            make_bank(folder, arguments.references)
        measure(folder)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
