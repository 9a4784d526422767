"""What updates and deletions do to a search: ``python -m benchmarks.bench_index``.

Banks of the same embeddings of real text are searched through the project's own retriever: one exact index; one
inverted file; an inverted file with what five updates brought beside it, each in a segment of its own; and each of them
with 0, 10 and 50 % of the references deleted. Recall is the share of the five nearest live references, by comparing all
in numpy, that are found. Times are CPU time of one thread; ratios are to the exact index with nothing deleted.

    python -m benchmarks.bench_index [--corpus FILE.jsonl[.zst]] [--embeddings 300000] [--queries 300] [--seed 0]
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import zstandard
from rich import box
from rich.console import Console
from rich.table import Table

from model.embedding import load_embedder
from model.retrieving import Retriever
from pipelines.assembling import hash_file
from pipelines.indexing import choose_factory, explain_merge, write_index
from pipelines.python_docs import iterate_python_docs
from schemas.bank import Bank
from schemas.identifiers import hash_bytes
from schemas.manifest import FileEntry, Manifest
from schemas.protocols import Embedder, Fingerprint, FloatArray, MaskArray
from schemas.records import RecordLayout
from schemas.tables import TOMBSTONES, embeddings_schema, write_table

NUM_HITS = 5
NUM_UPDATES = 5
UPDATE_SHARE = 0.02
"""References that each update brings, of all."""

DELETED_SHARES = (0.0, 0.1, 0.5)
SPAN_CHARS = (80, 600)
"""Shortest and longest stretch of text that is a reference."""

BATCH = 32
"""Queries at once: the chunks of a prompt of 2048 tokens."""


def iterate_texts(corpus: Path | None) -> Iterator[str]:
    """Yields the texts of a corpus of JSON lines with the key ``text``; by default the documentation of Python."""
    if corpus is None:
        yield from (document["text"] for document in iterate_python_docs())
        return
    with corpus.open("rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        content = (stream if corpus.suffix == ".zst" else file).read()
    for line in content.splitlines():
        if line.strip():
            yield orjson.loads(line)["text"]


def draw_spans(texts: Sequence[str], num_spans: int, draw: np.random.Generator) -> list[str]:
    """Returns different stretches of texts, cut at random places, longer texts giving more of them."""
    lengths = np.array([len(text) for text in texts], dtype=np.float64)
    spans: dict[str, None] = {}
    while len(spans) < num_spans:
        owners = draw.choice(len(texts), num_spans, p=lengths / lengths.sum())
        sizes = draw.integers(*SPAN_CHARS, num_spans)
        for owner, size, place in zip(owners.tolist(), sizes.tolist(), draw.random(num_spans).tolist(), strict=True):
            start = int(place * max(1, lengths[owner] - size))
            spans[texts[owner][start : start + size]] = None
            if len(spans) == num_spans:
                break
    return list(spans)


class IndexBench:
    """Banks that differ in their indexes only, and what they are compared with."""

    def __init__(self, folder: Path, embedder: Embedder, spans: Sequence[str], queries: FloatArray) -> None:
        """Embeds the spans."""
        self._folder = folder
        self._embedder = embedder
        self._queries = queries
        self._ref_ids = np.array([hash_bytes(span.encode()) for span in spans])
        self._vectors = embedder.embed(spans)
        self._versions = 0

    def _describe(self, kind: str, path: Path, num_rows: int) -> FileEntry:
        name = path.relative_to(self._folder).as_posix()
        return FileEntry(
            kind=kind, path=name, size_bytes=path.stat().st_size, sha256=hash_file(path), num_rows=num_rows
        )

    def write_segment(self, name: str, members: np.ndarray, factory: str) -> list[FileEntry]:
        """Writes embeddings and index of some of the spans as a segment."""
        folder = self._folder / "segments" / name
        folder.mkdir(parents=True)
        rows = members[np.argsort(self._ref_ids[members])]
        vectors = self._vectors[rows]
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        schema = embeddings_schema(vectors.shape[1])
        write_table(pa.table([pa.array(self._ref_ids[rows]), column], schema=schema), folder / "embeddings.parquet")
        write_index(vectors, folder / "index.faiss", factory)
        kinds = {"embeddings": folder / "embeddings.parquet", "index": folder / "index.faiss"}
        return [self._describe(kind, path, len(rows)) for kind, path in kinds.items()]

    def open(self, files: list[FileEntry], live: MaskArray) -> Retriever:
        """Opens a version with some of the spans deleted."""
        self._versions += 1
        if not live.all():
            path = self._folder / "segments" / f"deleted-{self._versions}" / "tombstones.parquet"
            path.parent.mkdir()
            write_table(pa.table([np.sort(self._ref_ids[~live])], schema=TOMBSTONES), path)
            files = [*files, self._describe("tombstones", path, int((~live).sum()))]
        nothing: dict[str, object] = {}
        manifest = Manifest(
            version=self._versions,
            parent=None,
            operation="build",
            created_at="",
            config={},
            build_id="",
            files=files,
            counts={},
            seconds={},
            fingerprint=Fingerprint(
                weights="",
                tokenizer="",
                architecture=nothing,
                rope=nothing,
                prefix_token_ids=[],
                memory_layers=[],
                selection=nothing,
                compute_dtype="",
                storage=nothing,
            ),
            embedder_id=self._embedder.embedder_id,
            layout=RecordLayout(num_layers=1, num_kv_heads=1, num_slots=1, head_dim=1),
            cold=True,
        )
        return Retriever(Bank(self._folder, manifest), self._embedder)

    def find_slowly(self, live: MaskArray) -> list[set[str]]:
        """Returns the nearest live references to each query, by comparing all."""
        rows = np.flatnonzero(live)
        found = []
        for query in self._queries:
            similarities = self._vectors[rows] @ query
            best = np.argpartition(-similarities, NUM_HITS)[:NUM_HITS]
            found.append(set(self._ref_ids[rows[best]]))
        return found

    def measure(self, retriever: Retriever, expected: list[set[str]]) -> tuple[float, float, float]:
        """Returns the recall, and the CPU milliseconds a query, alone and in a batch."""
        retriever.search_vectors(self._queries[:BATCH], NUM_HITS)
        num_found = 0
        start = time.process_time()
        single = [retriever.search_vectors(query[None], NUM_HITS)[0][0] for query in self._queries]
        alone = (time.process_time() - start) / len(self._queries)
        for rows, wanted in zip(single, expected, strict=True):
            num_found += len(wanted & {retriever.get_ref_id(row) for row in rows.tolist() if row >= 0})
        batches = range(0, len(self._queries) - BATCH + 1, BATCH)
        start = time.process_time()
        for first in batches:
            retriever.search_vectors(self._queries[first : first + BATCH], NUM_HITS)
        together = (time.process_time() - start) / (len(batches) * BATCH)
        return num_found / (NUM_HITS * len(expected)), alone * 1e3, together * 1e3

    def run(self, draw: np.random.Generator) -> Table:
        """Writes and searches the banks; returns the figures."""
        num = len(self._ref_ids)
        order = draw.permutation(num)
        size = int(UPDATE_SHARE * num)
        old = order[: num - NUM_UPDATES * size]
        inverted = choose_factory(max(num, 200_001))
        updates = [
            self.write_segment(f"update-{part}", order[start : start + size], "Flat")
            for part, start in enumerate(range(len(old), num, size))
        ]
        layouts = {
            "Flat": [self.write_segment("flat", order, "Flat")],
            inverted: [self.write_segment("inverted", order, inverted)],
            f"{inverted} + {NUM_UPDATES} Flat": [self.write_segment("old", old, inverted), *updates],
        }
        table = Table(box=box.MARKDOWN, title=f"{num} embeddings, {len(self._queries)} queries, {NUM_HITS} hits")
        for name in (
            "index",
            "deleted",
            "recall@5",
            "ms alone",
            "ratio",
            f"ms of {BATCH}",
            "ratio",
            "ms to open",
            "merge",
        ):
            table.add_column(name, justify="left" if name in ("index", "merge") else "right")
        base: tuple[float, float] | None = None
        deleted = draw.random(num)
        for share in DELETED_SHARES:
            live = deleted >= share
            expected = self.find_slowly(live)
            for name, files in layouts.items():
                listed = [file for segment in files for file in segment]
                start = time.process_time()
                retriever = self.open(listed, live)
                opening = (time.process_time() - start) * 1e3
                recall, alone, together = self.measure(retriever, expected)
                base = base or (alone, together)
                sizes = [segment[0].num_rows for segment in files]
                table.add_row(
                    name,
                    f"{share:.0%}",
                    f"{recall:.3f}",
                    f"{alone:.2f}",
                    f"{alone / base[0]:.3f}",
                    f"{together:.2f}",
                    f"{together / base[1]:.3f}",
                    f"{opening:.0f}",
                    "yes" if explain_merge(sizes, int(live.sum())) else "no",
                )
        return table


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="JSON lines with the key text, also compressed with zstd")
    parser.add_argument("--embeddings", type=int, default=300_000)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import faiss

    faiss.omp_set_num_threads(1)
    draw = np.random.default_rng(options.seed)
    texts = [text for text in iterate_texts(options.corpus) if len(text) > SPAN_CHARS[0]]
    embedder = load_embedder("static")
    spans = draw_spans(texts, options.embeddings + options.queries, draw)
    queries = embedder.embed(spans[options.embeddings :])
    with tempfile.TemporaryDirectory() as folder:
        bench = IndexBench(Path(folder), embedder, spans[: options.embeddings], queries)
        Console(width=160).print(bench.run(draw))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
