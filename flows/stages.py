"""The stages of which operations on a bank are made, each a function over the files of a workspace.

    read -> (score) -> (deduplicate documents) -> match, chunk -> tabulate -> gather -> (decontaminate) -> deduplicate
    -> embed -> write -> assemble

Here jobs are joined with models and with progress; what the jobs do is in ``pipelines``.
"""

import functools
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flows.config import BuildConfig
from flows.progress import show_stage
from pipelines import assembling, comparing, documenting, encoding, jobs, referencing
from pipelines.comparing import Comparison
from pipelines.decontaminating import make_needles
from pipelines.formats import CorpusFile, list_corpus_files
from pipelines.reading import read_records
from pipelines.records import RECORDS, ReadingConfig
from pipelines.reusing import Base
from pipelines.running import load_once
from pipelines.workspace import Workspace
from schemas.errors import InputError, NothingLeftError
from schemas.protocols import LongArray
from schemas.tables import DUPLICATES, write_table


def read(files: list[CorpusFile], work: Workspace, config: BuildConfig) -> None:
    """Corpus files to records, some of them filtered out; drops documents whose id is taken."""
    groups = jobs.group_files(files)
    with show_stage("read", len(groups), "parts", lambda: len(work.list_files("read"))):
        jobs.read_corpus(files, work, config.reading, config.filtering, config.engine)
        jobs.drop_conflicts(work)
    if not jobs.list_row_groups(work):
        raise NothingLeftError("nothing of the corpus is left: it has no record, its files are empty; name others")


def score(work: Workspace, config: BuildConfig) -> None:
    """Drops the documents of low quality."""
    with show_stage("score", len(jobs.list_row_groups(work)), "batches", lambda: len(work.list_files("scores"))):
        jobs.score_documents(work, config.make_scorer_factory(), config.engine)
        jobs.drop_low_scores(work, config.quality.threshold, config.quality.top_share)


def _compare(name: str, comparison: Comparison, prefer: Callable[[pa.Array], LongArray]) -> tuple[pa.Table, int]:
    """Finds near-duplicates; returns them and the number of pairs that were not compared."""
    with show_stage(f"sign {name}", len(comparison.units), "parts", lambda: len(comparison.list_files("signed"))):
        comparing.sign_all(comparison)
    with show_stage(
        f"compare {name}", comparison.config.num_bands, "bands", lambda: len(comparison.list_files("pairs"))
    ):
        return comparing.compare_all(comparison, prefer)


def deduplicate_documents(work: Workspace, config: BuildConfig) -> int:
    """Drops near-duplicate documents; returns the number of pairs not compared."""
    settings = config.document_deduplication
    comparison = jobs.plan_documents(work, settings, config.engine)
    duplicates, num_left_out = _compare("docs", comparison, functools.partial(jobs.prefer_documents, work, settings))
    jobs.drop_document_duplicates(work, duplicates, settings.threshold)
    return num_left_out


def chunk(work: Workspace, base: Base, config: BuildConfig) -> dict[str, Any]:
    """Records to chunks, but for documents the base has cut already; returns the counts of documents."""
    num_batches = len(jobs.list_row_groups(work))
    with show_stage("chunk", num_batches, "batches", lambda: len(work.list_files("chunks"))):
        if base.documents:
            referencing.match_corpus(work, base, by_title=config.chunking.title_prefix)
        referencing.chunk_corpus(work, config.make_tokenizer_factory(), config.chunking, config.engine)
    counts = documenting.write_document_tables(work, base)
    if not pq.read_metadata(work.get_folder("tables") / "occurrences.parquet").num_rows:
        drops = ", ".join(f"{number} {reason}" for reason, number in counts["dropped"].items()) or "it has no document"
        raise NothingLeftError(f"nothing of the corpus is left: {counts['read']} documents read, dropped: {drops}")
    return counts


def gather(work: Workspace, base: Base, config: BuildConfig) -> None:
    """Chunks and stored references to the distinct references of all documents."""
    with show_stage("gather"):
        referencing.gather_references(work, base, config.engine)


def make_test_reading(config: BuildConfig) -> ReadingConfig:
    """Returns how test texts are read: like the corpus, but they need have nothing but a text."""
    return ReadingConfig(text_column=config.reading.text_column, max_document_bytes=config.reading.max_document_bytes)


def decontaminate(work: Workspace, config: BuildConfig) -> None:
    """Finds the references that give away a test text."""
    parts = work.list_files("references")
    with show_stage("check", len(parts), "parts", lambda: len(work.list_files("contaminated"))):
        paths = config.decontamination.paths
        reading = make_test_reading(config)
        batches = [batch for file in list_corpus_files(paths) for batch in read_records(file, reading)]
        records = pa.Table.from_batches(batches, RECORDS)
        kept = records.filter(pc.is_null(records["reason"])).combine_chunks()
        if len(kept) < len(records) or not len(kept):
            raise InputError(
                f"{len(records) - len(kept)} of {len(records)} records of {', '.join(paths)} cannot be read as test "
                "texts; each needs a text in the column of the corpus's texts"
            )
        tokenizer = load_once(config.make_tokenizer_factory())
        needles = make_needles(kept["doc_id"].to_pylist(), kept["text"].combine_chunks(), tokenizer)
        referencing.decontaminate(work, needles, config.decontamination, config.engine)


def deduplicate(work: Workspace, base: Base, config: BuildConfig) -> tuple[int, int]:
    """Finds near-duplicates; returns the number of live references, and of pairs not compared."""
    settings = config.deduplication
    num_left_out = 0
    if settings.enabled:
        comparison = referencing.plan_references(work, base, settings, config.engine)
        prefer = functools.partial(referencing.prefer_references, work, settings)
        duplicates, num_left_out = _compare("refs", comparison, prefer)
    else:
        duplicates = DUPLICATES.empty_table()
    write_table(duplicates.rename_columns(DUPLICATES.names).cast(DUPLICATES), work.duplicates_path)
    num_live = encoding.count_live(work)
    if not num_live:
        raise NothingLeftError("every reference of the corpus is contaminated; see --decontaminate")
    return num_live, num_left_out


def embed(work: Workspace, base: Base, config: BuildConfig) -> int:
    """Live references without an embedding to embeddings; returns their number."""
    size = config.memory.references_per_shard
    num_new = encoding.split_unembedded(work, base, size)
    with show_stage("embed", num_new, "references", lambda: min(num_new, len(work.list_files("embeddings")) * size)):
        encoding.embed_references(work, config.make_embedder_factory(), config.engine)
    return num_new


def write(work: Workspace, base: Base, config: BuildConfig) -> int:
    """Live references without a memory to memories; returns their number."""
    size = config.memory.references_per_shard
    num_new = encoding.split_unwritten(work, base, size)
    with show_stage("write", num_new, "references", lambda: min(num_new, len(work.list_files("shards")) * size)):
        encoding.write_memories(work, config.make_writer_factory(), config.engine)
    return num_new


def assemble(work: Workspace, base: Base) -> dict[str, Any]:
    """All files to one segment; returns the counts of references and the description of the new index."""
    with show_stage("assemble"):
        assembling.begin_segment(work)
        references = assembling.write_reference_tables(work, base)
        index = assembling.write_embedding_tables(work)
        assembling.write_memory_table(work)
    return {"references": references, "index": index}
