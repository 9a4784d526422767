"""The stages from corpus to memories, in the order data flows; each is a linear job over files of a workspace.

    corpus files -> records -> chunks -> references -> signed -> pairs -> duplicates
                                              live <-----------------------'
                                              live -> embeddings -> index
                                              live -> shards

The functions that do the work are in the modules named after it; here they are wired to files. What needs to see all
files at once (ids, clusters) is a plain function over a few columns, between two jobs.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.chunking import ChunkingConfig, chunk_documents
from pipelines.clustering import DeduplicationConfig, cluster_duplicates
from pipelines.formats import CorpusFile
from pipelines.minhashing import sign
from pipelines.pairing import (
    find_equal_sets,
    hash_bands,
    hash_sets,
    list_candidate_pairs,
    partition_keys,
    unpack_keys,
    verify_pairs,
)
from pipelines.reading import RECORDS, ReadingConfig, find_id_conflicts, read_records
from pipelines.running import NUM_PARTITIONS, EngineConfig, Unit, load_once, run_grouping, run_units
from pipelines.shingling import Hashes, Indices, shingle_texts
from pipelines.workspace import Workspace
from schemas.atomic import replace_atomically
from schemas.protocols import EmbedderFactory, TokenizerFactory, WriterFactory
from schemas.shards import write_shard
from schemas.tables import REFERENCES, embeddings_schema, write_table

UNIT_BYTES = 16 << 20
UNIT_FILES = 256

PAIRS = pa.schema([pa.field("left", pa.int64(), nullable=False), pa.field("right", pa.int64(), nullable=False)])


def read_tables(paths: Sequence[Path], columns: list[str], schema: pa.Schema) -> pa.Table:
    """Reads columns of several files of one schema as one table, empty if there is no file."""
    tables = [pq.read_table(path, columns=columns) for path in paths]
    fields = pa.schema([schema.field(name) for name in columns])
    return pa.concat_tables([fields.empty_table(), *(table.select(columns).cast(fields) for table in tables)])


# Corpus files -> records ----------------------------------------------------------------------------------------------


def group_files(files: Sequence[CorpusFile]) -> list[list[CorpusFile]]:
    """Groups corpus files, in their order, to units of at most 16 MB or 256 files; a large file is one of its own."""
    groups: list[list[CorpusFile]] = []
    size_bytes = 0
    for file in files:
        if not groups or len(groups[-1]) == UNIT_FILES or size_bytes + file.size_bytes > UNIT_BYTES:
            groups.append([])
            size_bytes = 0
        groups[-1].append(file)
        size_bytes += file.size_bytes
    return groups


def _iterate_row_groups(files: Sequence[CorpusFile], config: ReadingConfig) -> Iterator[pa.Table]:
    """Joins the batches of many small files: a row group is the unit of chunking and should be worth its while."""
    batches: list[pa.RecordBatch] = []
    for batch in itertools.chain.from_iterable(read_records(file, config) for file in files):
        if batches and sum(part.nbytes for part in batches) + batch.nbytes > config.batch_text_bytes:
            yield pa.Table.from_batches(batches)
            batches = []
        batches.append(batch)
    if batches:
        yield pa.Table.from_batches(batches)


def _read_group(unit: Unit, groups: Sequence[Sequence[CorpusFile]], config: ReadingConfig) -> None:
    with replace_atomically(unit.target) as temporary, pq.ParquetWriter(temporary, RECORDS, compression="zstd") as sink:
        for table in _iterate_row_groups(groups[unit.part], config):
            sink.write_table(table, row_group_size=len(table))


def read_corpus(files: Sequence[CorpusFile], work: Workspace, config: ReadingConfig, engine: EngineConfig) -> None:
    """Reads every corpus file into records, kept and rejected ones alike."""
    groups = group_files(files)
    folder = work.get_folder("records")
    units = [
        Unit(source=Path(group[0].path), part=part, target=folder / f"{part:06d}.parquet")
        for part, group in enumerate(groups)
    ]
    run_units("read", units, functools.partial(_read_group, groups=groups, config=config), engine)


def drop_conflicts(work: Workspace) -> None:
    """Finds the records whose document id another record has, and writes them as rejects."""
    columns = ["path", "position", "doc_id", "content_hash", "reason"]
    records = read_tables(work.list_files("records"), columns, RECORDS)
    kept = records.filter(pc.is_null(records["reason"]))
    write_table(find_id_conflicts(kept), work.drops_path)


# Records -> chunks ----------------------------------------------------------------------------------------------------


def select_kept(records: pa.Table, drops: pa.Table) -> pa.Table:
    """Returns the records that have no reason to be dropped and are not among ``drops``."""
    kept = records.filter(pc.is_null(records["reason"]))
    dropped = set(zip(drops["path"].to_pylist(), drops["position"].to_pylist(), strict=True))
    if not dropped:
        return kept
    places = zip(kept["path"].to_pylist(), kept["position"].to_pylist(), strict=True)
    return kept.filter(pa.array([place not in dropped for place in places], pa.bool_()))


def _chunk_row_group(unit: Unit, factory: TokenizerFactory, config: ChunkingConfig, drops_path: Path) -> None:
    records = pq.ParquetFile(unit.source).read_row_group(
        unit.part, columns=["path", "position", "doc_id", "text", "reason"]
    )
    kept = select_kept(records, pq.read_table(drops_path))
    chunks = chunk_documents(kept["doc_id"].to_pylist(), kept["text"].to_pylist(), load_once(factory), config)
    write_table(chunks, unit.target)


def chunk_corpus(work: Workspace, factory: TokenizerFactory, config: ChunkingConfig, engine: EngineConfig) -> None:
    """Splits the kept documents into references, one unit a row group of records."""
    folder = work.get_folder("chunks")
    units = [
        Unit(source=path, part=part, target=folder / f"{path.stem}-{part:05d}.parquet")
        for path in work.list_files("records")
        for part in range(pq.read_metadata(path).num_row_groups)
    ]
    process = functools.partial(_chunk_row_group, factory=factory, config=config, drops_path=work.drops_path)
    run_units("chunk", units, process, engine)


# Chunks -> distinct references ----------------------------------------------------------------------------------------


def _pack(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def _keep_first(table: pa.Table) -> pa.Table:
    """Sorts by ref_id and keeps one row of each: equal ids have equal tokens, but their texts may differ.

    Tokenizers may map several texts to the same tokens; the least text is kept, so that the order of input does not
    matter.
    """
    ordered = table.sort_by([("ref_id", "ascending"), ("text", "ascending")]).combine_chunks()
    ids = ordered["ref_id"].combine_chunks()
    first = np.ones(len(ids), dtype=np.bool_)
    first[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    return ordered.filter(pa.array(first))


def _emit_references(unit: Unit) -> Iterable[tuple[int, bytes]]:
    references = _keep_first(pq.read_table(unit.source, columns=REFERENCES.names))
    digits = pc.utf8_slice_codeunits(references["ref_id"], 0, 1)
    for partition in range(NUM_PARTITIONS):
        part = references.filter(pc.equal(digits, f"{partition:x}"))
        if len(part):
            yield partition, _pack(part)


def _write_references(parts: Iterable[bytes], target: Path) -> None:
    tables = [pa.ipc.open_stream(part).read_all() for part in parts]
    write_table(_keep_first(pa.concat_tables(tables)).cast(REFERENCES), target)


def gather_references(work: Workspace, engine: EngineConfig) -> None:
    """Gathers the distinct references, sorted by id, in one file for each first digit of the id."""
    units = [Unit(source=path, target=path) for path in work.list_files("chunks")]
    targets = [work.get_folder("references") / f"{partition:x}.parquet" for partition in range(NUM_PARTITIONS)]
    run_grouping("gather", units, _emit_references, targets, _write_references, engine)


# References -> near-duplicates ----------------------------------------------------------------------------------------


def _sign_references(unit: Unit, config: DeduplicationConfig) -> None:
    references = pq.read_table(unit.source, columns=["ref_id", "text"])
    hashes, offsets = shingle_texts(references["text"].to_pylist(), config.num_words)
    signatures = sign(hashes, offsets, config.num_permutations, config.seed)
    columns = {
        "ref_id": references["ref_id"],
        "signature": pa.FixedSizeListArray.from_arrays(pa.array(signatures.ravel()), config.num_permutations),
        "shingles": pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(hashes)),
    }
    write_table(pa.table(columns), unit.target)


def sign_references(work: Workspace, config: DeduplicationConfig, engine: EngineConfig) -> None:
    """Computes shingles and MinHash signatures of every distinct reference."""
    folder = work.get_folder("signed")
    units = [Unit(source=path, target=folder / path.name) for path in work.list_files("references")]
    run_units("sign", units, functools.partial(_sign_references, config=config), engine)


def _read_shingles(work: Workspace) -> tuple[pa.ChunkedArray, Hashes, Indices]:
    tables = [pq.read_table(path, columns=["ref_id", "shingles"]) for path in work.list_files("signed")]
    signed = pa.concat_tables(tables).combine_chunks()
    lists = signed["shingles"].combine_chunks()
    return signed["ref_id"], lists.flatten().to_numpy(), np.concatenate(([0], np.cumsum(lists.value_lengths())))


def _emit_bands(unit: Unit, num_bands: int, compared_path: Path) -> Iterable[tuple[int, bytes]]:
    signatures = pq.read_table(unit.source, columns=["signature"])["signature"].combine_chunks()
    values = signatures.flatten().to_numpy().reshape(len(signatures), -1)
    compared = np.load(compared_path)
    first, last = np.searchsorted(compared, (unit.first_row, unit.first_row + len(values)))
    rows = compared[first:last]
    keys = hash_bands(values[rows - unit.first_row], num_bands)
    for partition, packed in enumerate(partition_keys(keys, rows, NUM_PARTITIONS)):
        if packed:
            yield partition, packed


def _write_pairs(parts: Iterable[bytes], target: Path, max_bucket: int) -> None:
    keys, rows = unpack_keys(b"".join(parts))
    pairs, num_skipped = list_candidate_pairs(keys, rows, max_bucket)
    table = pa.table({"left": pairs[:, 0], "right": pairs[:, 1]}, schema=PAIRS)
    write_table(table.replace_schema_metadata({"num_skipped": str(num_skipped)}), target)


def pair_references(work: Workspace, config: DeduplicationConfig, engine: EngineConfig) -> None:
    """Finds the pairs of references that share a band of their signatures."""
    _, hashes, offsets = _read_shingles(work)
    firsts = find_equal_sets(hash_sets(hashes, offsets))
    compared = np.flatnonzero((firsts == np.arange(len(firsts))) & (np.diff(offsets) > 0))
    with replace_atomically(work.compared_path) as temporary, temporary.open("wb") as file:
        np.save(file, compared)
    units, first_row = [], 0
    for path in work.list_files("signed"):
        units.append(Unit(source=path, target=path, first_row=first_row))
        first_row += pq.read_metadata(path).num_rows
    run_grouping(
        "pair",
        units,
        functools.partial(_emit_bands, num_bands=config.num_bands, compared_path=work.compared_path),
        [work.get_folder("pairs") / f"{partition:x}.parquet" for partition in range(NUM_PARTITIONS)],
        functools.partial(_write_pairs, max_bucket=config.max_bucket),
        engine,
    )


def resolve_duplicates(work: Workspace, config: DeduplicationConfig) -> int:
    """Measures all pairs exactly, clusters those above the threshold, and writes the near-duplicates.

    Returns the number of pairs that were not compared because a band was shared by very many references.
    """
    ref_ids, hashes, offsets = _read_shingles(work)
    firsts = find_equal_sets(hash_sets(hashes, offsets))
    copies = np.flatnonzero(firsts != np.arange(len(firsts)))
    files = work.list_files("pairs")
    found = read_tables(files, PAIRS.names, PAIRS)
    candidates = np.unique(np.stack([found["left"].to_numpy(), found["right"].to_numpy()], axis=1), axis=0)
    pairs = np.concatenate([np.stack([firsts[copies], copies], axis=1), candidates])
    lengths = read_tables(work.list_files("references"), ["num_tokens"], REFERENCES)["num_tokens"].to_numpy()
    jaccards = verify_pairs(pairs, hashes, offsets)
    table = cluster_duplicates(
        ref_ids.combine_chunks(), lengths.astype(np.int64), pairs, jaccards, hashes, offsets, config
    )
    write_table(table, work.duplicates_path)
    return sum(int(pq.read_schema(path).metadata[b"num_skipped"]) for path in files)


# Live references -> embeddings, memories ------------------------------------------------------------------------------


def split_live(work: Workspace, references_per_shard: int) -> int:
    """Writes the references that are no near-duplicates in files of one shard each, and returns their number."""
    references = read_tables(work.list_files("references"), REFERENCES.names, REFERENCES)
    dropped = pq.read_table(work.duplicates_path, columns=["ref_id"])["ref_id"].combine_chunks()
    live = references.filter(pc.invert(pc.is_in(references["ref_id"], value_set=dropped)))
    for part, start in enumerate(range(0, len(live), references_per_shard)):
        target = work.get_folder("live") / f"{part:06d}.parquet"
        if not target.exists():
            write_table(live.slice(start, references_per_shard), target)
    return len(live)


def _embed_references(unit: Unit, factory: EmbedderFactory) -> None:
    references = pq.read_table(unit.source, columns=["ref_id", "text"])
    embedder = load_once(factory)
    vectors = embedder.embed(references["text"].to_pylist())
    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), embedder.dimension)
    schema = embeddings_schema(embedder.dimension)
    write_table(pa.table({"ref_id": references["ref_id"], "vector": values}).cast(schema), unit.target)


def embed_references(work: Workspace, factory: EmbedderFactory, engine: EngineConfig) -> None:
    """Embeds the live references."""
    folder = work.get_folder("embeddings")
    units = [Unit(source=path, target=folder / path.name) for path in work.list_files("live")]
    run_units("embed", units, functools.partial(_embed_references, factory=factory), engine)


def _write_memories(unit: Unit, factory: WriterFactory) -> None:
    tokens = pq.read_table(unit.source, columns=["token_ids"])["token_ids"].combine_chunks()
    values, ends = tokens.flatten().to_numpy(), np.cumsum(tokens.value_lengths())
    writer = load_once(factory)
    written = writer.write(np.split(values, ends[:-1]))
    records = writer.layout.pack(written.payload, written.offsets)
    write_shard(unit.target, records, writer.layout, writer.fingerprint.digest)


def write_memories(work: Workspace, factory: WriterFactory, engine: EngineConfig) -> None:
    """Encodes the live references into explicit memories, one payload shard a file."""
    folder = work.get_folder("shards")
    units = [Unit(source=path, target=folder / f"shard-{path.stem}.safetensors") for path in work.list_files("live")]
    run_units("write", units, functools.partial(_write_memories, factory=factory), engine)
