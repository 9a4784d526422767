"""The flow ``build_bank``: a corpus becomes a version of a bank, one Prefect task a stage.

Every stage leaves its result in files, so a task that is retried, or a build that is started again after a stop or a
crash, goes on from the files that are finished. Nothing is part of the bank before the manifest is committed.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from flows.config import BuildConfig, apply_changes
from flows.progress import show_stage
from flows.workplace import check_target, open_workspace
from model.embedding import find_embedder
from model.locating import find_checkpoint
from pipelines import assembling, comparing, encoding, jobs
from pipelines.checking import check_corpus
from pipelines.comparing import Comparison
from pipelines.decontaminating import make_needles
from pipelines.formats import CorpusFile, list_corpus_files
from pipelines.reading import read_records
from pipelines.records import RECORDS, ReadingConfig
from pipelines.running import check_runner, check_stop, load_once
from pipelines.workspace import WORKSPACE_FORMAT, Workspace
from schemas.bank import Bank
from schemas.errors import BankError, InputError, NothingLeftError
from schemas.identifiers import hash_json
from schemas.manifest import BANK_FORMAT, Manifest, commit_manifest, list_versions
from schemas.protocols import LongArray
from schemas.tables import DUPLICATES, write_table


def _list_model_files(name: Path) -> list[tuple[str, int, int]]:
    files = sorted(name.rglob("*")) if name.is_dir() else []
    return [(str(path.relative_to(name)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def make_build_id(files: list[CorpusFile], config: BuildConfig) -> str:
    """Returns the id of a build: equal for the same files, models and settings, whatever engine runs it."""
    settings = {key: value for key, value in config.to_json().items() if key != "engine"}
    tests = list_corpus_files(config.decontamination.paths) if config.decontamination.paths else []
    corpus = [[(file.path, file.fingerprint) for file in group] for group in (files, tests)]
    models = [find_checkpoint(config.memory.model), Path(find_embedder(config.embedding.embedder))]
    if config.quality.model:
        models.append(Path(config.quality.model))
    return hash_json([BANK_FORMAT, WORKSPACE_FORMAT, settings, corpus, [_list_model_files(path) for path in models]])


def _may_pass(_task: Task[Any, Any], _run: TaskRun, state: State[Any]) -> bool:
    """Tells whether a failure is worth a retry: a known error stays what it is."""
    try:
        state.result()
    except BankError:
        return False
    except Exception:  # any other failure may be of the moment: a worker that died, a busy disk
        return True
    return True


STAGE: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": [1, 5],
    "retry_condition_fn": _may_pass,
    "cache_policy": NO_CACHE,
    "persist_result": False,
}
"""How every stage is run as a task: its results are files, so it is tried again and goes on from them."""


@task(name="read", **STAGE)
def read_stage(files: list[CorpusFile], work: Workspace, config: BuildConfig) -> None:
    """Corpus files to records, some of them filtered out; drops documents whose id is taken."""
    groups = jobs.group_files(files)
    with show_stage("read", len(groups), "parts", lambda: len(work.list_files("read"))):
        jobs.read_corpus(files, work, config.reading, config.filtering, config.engine)
        jobs.drop_conflicts(work)
    if not jobs.list_row_groups(work):
        raise NothingLeftError("nothing of the corpus is left: it has no record, its files are empty; name others")


@task(name="score", **STAGE)
def score_stage(work: Workspace, config: BuildConfig) -> None:
    """Drops the documents of low quality."""
    with show_stage("score", len(jobs.list_row_groups(work)), "batches", lambda: len(work.list_files("scores"))):
        jobs.score_documents(work, config.make_scorer_factory(), config.engine)
        jobs.drop_low_scores(work, config.quality.threshold, config.quality.top_share)


def compare(name: str, comparison: Comparison, prefer: Callable[[pa.Array], LongArray]) -> tuple[pa.Table, int]:
    """Finds near-duplicates; returns them and the number of pairs that were not compared."""
    with show_stage(f"sign {name}", len(comparison.units), "parts", lambda: len(comparison.list_files("signed"))):
        comparing.sign_all(comparison)
    with show_stage(
        f"compare {name}", comparison.config.num_bands, "bands", lambda: len(comparison.list_files("pairs"))
    ):
        return comparing.compare_all(comparison, prefer)


@task(name="deduplicate documents", **STAGE)
def deduplicate_documents_stage(work: Workspace, config: BuildConfig) -> int:
    """Drops near-duplicate documents; returns the number of pairs not compared."""
    settings = config.document_deduplication
    comparison = jobs.plan_documents(work, settings, config.engine)
    duplicates, num_left_out = compare("docs", comparison, functools.partial(jobs.prefer_documents, work, settings))
    jobs.drop_document_duplicates(work, duplicates, settings.threshold)
    return num_left_out


@task(name="chunk", **STAGE)
def chunk_stage(work: Workspace, config: BuildConfig) -> None:
    """Records to chunks, chunks to distinct references."""
    num_batches = len(jobs.list_row_groups(work))
    with show_stage("chunk", num_batches, "batches", lambda: len(work.list_files("chunks"))):
        jobs.chunk_corpus(work, config.make_tokenizer_factory(), config.chunking, config.engine)
    with show_stage("gather"):
        jobs.gather_references(work, config.engine)
    if not any(pq.read_metadata(path).num_rows for path in work.list_files("references")):
        raise NothingLeftError(_explain_nothing_left(work))


def _explain_nothing_left(work: Workspace) -> str:
    counts = assembling.write_document_tables(work)
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts["dropped"].items()) or "it has no document"
    return f"nothing of the corpus is left: {counts['read']} documents read, dropped: {reasons}"


def _make_test_reading(config: BuildConfig) -> ReadingConfig:
    """Returns how test texts are read: like the corpus, but they need have nothing but a text."""
    return ReadingConfig(text_column=config.reading.text_column, max_document_bytes=config.reading.max_document_bytes)


@task(name="decontaminate", **STAGE)
def decontaminate_stage(work: Workspace, config: BuildConfig) -> None:
    """Finds the references that give away a test text."""
    parts = work.list_files("references")
    with show_stage("check", len(parts), "parts", lambda: len(work.list_files("contaminated"))):
        paths = config.decontamination.paths
        reading = _make_test_reading(config)
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
        jobs.decontaminate(work, needles, config.decontamination, config.engine)


@task(name="deduplicate", **STAGE)
def deduplicate_stage(work: Workspace, config: BuildConfig) -> tuple[int, int]:
    """Finds near-duplicates and splits off the live references; returns their number and the pairs not compared."""
    settings = config.deduplication
    num_left_out = 0
    if settings.enabled:
        comparison = jobs.plan_references(work, settings, config.engine)
        duplicates, num_left_out = compare(
            "refs", comparison, functools.partial(jobs.prefer_references, work, settings)
        )
    else:
        duplicates = DUPLICATES.empty_table()
    write_table(duplicates.rename_columns(DUPLICATES.names).cast(DUPLICATES), work.duplicates_path)
    num_live = encoding.split_live(work, config.memory.references_per_shard)
    if not num_live:
        raise NothingLeftError("every reference of the corpus is contaminated; see --decontaminate")
    return num_live, num_left_out


@task(name="embed", **STAGE)
def embed_stage(work: Workspace, config: BuildConfig, num_live: int) -> None:
    """Live references to embeddings."""

    def count() -> int:
        return min(num_live, len(work.list_files("embeddings")) * config.memory.references_per_shard)

    with show_stage("embed", num_live, "references", count):
        encoding.embed_references(work, config.make_embedder_factory(), config.engine)


@task(name="write", **STAGE)
def write_stage(work: Workspace, config: BuildConfig, num_live: int) -> None:
    """Live references to memories."""

    def count() -> int:
        return min(num_live, len(work.list_files("shards")) * config.memory.references_per_shard)

    with show_stage("write", num_live, "references", count):
        encoding.write_memories(work, config.make_writer_factory(), config.engine)


@task(name="assemble", **STAGE)
def assemble_stage(work: Workspace) -> dict[str, Any]:
    """All files to one segment; returns the counts."""
    with show_stage("assemble"):
        assembling.begin_segment(work)
        documents = assembling.write_document_tables(work)
        references = assembling.write_reference_tables(work)
        index = assembling.write_embedding_tables(work)
        assembling.write_memory_table(work)
    return {"documents": documents, "references": references, "index": index}


@task(name="commit", cache_policy=NO_CACHE, persist_result=False)
def commit_stage(work: Workspace, bank: Path, manifest: dict[str, Any]) -> Manifest:
    """Moves the segment into the bank and commits the manifest, the moment the version begins to exist."""
    with show_stage("commit"):
        files = assembling.publish_segment(work, bank)
        version = Manifest(**manifest, files=files)
        commit_manifest(bank, version)
    return version


@contextlib.contextmanager
def _measure(seconds: dict[str, float], name: str) -> Iterator[None]:
    check_stop()
    started = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - started, 2)


@flow(name="build_bank", flow_run_name="build {bank}", persist_result=False)
def build_bank(corpus: list[str], bank: str, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Builds a version of a bank from a corpus; a corpus and configuration that are built already change nothing.

    Args:
        corpus: files and folders.
        bank: the bank's folder.
        config: changes to the preset ``tiny``, nested by section.

    Returns:
        ``version``, ``unchanged`` and the version's ``counts``, ``seconds``, ``size_bytes`` and ``bytes_a_reference``.

    Raises:
        BankError: see its subclasses; nothing is committed then, and finished work is kept.
    """
    target = Path(bank)
    settings = apply_changes(BuildConfig(), config or {})
    check_target(target)
    files = list_corpus_files(corpus)
    check_corpus(files, settings.reading)
    if settings.decontamination.paths:
        check_corpus(list_corpus_files(settings.decontamination.paths), _make_test_reading(settings))
    check_runner(settings.engine)
    build_id = make_build_id(files, settings)
    if list_versions(target):
        newest = Bank.open(target)
        if newest.manifest.build_id == build_id and newest.is_complete():
            return summarize(newest.manifest, unchanged=True)

    seconds: dict[str, float] = {}
    with show_stage("models"), _measure(seconds, "models"):
        writer = load_once(settings.make_writer_factory())
        embedder = load_once(settings.make_embedder_factory())
        if settings.quality.model:
            load_once(settings.make_scorer_factory())
    with open_workspace(target, build_id) as work:
        versions = list_versions(target)
        with _measure(seconds, "read"):
            read_stage(files, work, settings)
        if settings.quality.model:
            with _measure(seconds, "score"):
                score_stage(work, settings)
        num_left_out = 0
        if settings.document_deduplication.enabled:
            with _measure(seconds, "documents"):
                num_left_out = deduplicate_documents_stage(work, settings)
        with _measure(seconds, "chunk"):
            chunk_stage(work, settings)
        if settings.decontamination.paths:
            with _measure(seconds, "decontaminate"):
                decontaminate_stage(work, settings)
        with _measure(seconds, "deduplicate"):
            num_live, num_skipped = deduplicate_stage(work, settings)
        with _measure(seconds, "embed"):
            embed_stage(work, settings, num_live)
        with _measure(seconds, "write"):
            if not settings.memory.cold:
                write_stage(work, settings, num_live)
        with _measure(seconds, "assemble"):
            counts = assemble_stage(work)
        manifest = {
            "version": versions[-1] + 1 if versions else 1,
            "parent": versions[-1] if versions else None,
            "operation": "build",
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": {"corpus": corpus, **settings.to_json()},
            "build_id": build_id,
            "counts": {**counts, "pairs_not_compared": num_skipped + num_left_out},
            "seconds": seconds,
            "fingerprint": writer.fingerprint,
            "embedder_id": embedder.embedder_id,
            "layout": writer.layout,
            "cold": settings.memory.cold,
        }
        return summarize(commit_stage(work, target, manifest), unchanged=False)


def summarize(manifest: Manifest, *, unchanged: bool) -> dict[str, Any]:
    """Returns what a user wants to know about a version."""
    size_bytes = sum(file.size_bytes for file in manifest.files)
    kept = manifest.counts["references"]["kept"]
    return {
        "version": manifest.version,
        "unchanged": unchanged,
        "counts": manifest.counts,
        "seconds": manifest.seconds,
        "size_bytes": size_bytes,
        "bytes_a_reference": round(size_bytes / kept),
        "layout": dataclasses.asdict(manifest.layout),
    }
