"""A version in the making: the stages in their order, and the commit that makes it exist.

Build, update, delete and migrate differ in where documents come from and in what they take over from a version before;
what follows is the same for all.
"""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flows import stages
from flows.config import BuildConfig, apply_changes
from flows.progress import show_stage
from flows.steps import Steps
from pipelines import encoding
from pipelines.assembling import copy_codec, hash_file, publish_codec, publish_segment
from pipelines.documenting import DOCUMENT_TABLES
from pipelines.formats import CorpusFile
from pipelines.indexing import explain_merge
from pipelines.referencing import take_contaminated
from pipelines.reusing import Base, read_reused
from pipelines.running import load_once
from pipelines.workspace import Workspace
from schemas.bank import PARTED_KINDS, Bank
from schemas.errors import InputError, WrongModelError
from schemas.manifest import FileEntry, Manifest, commit_manifest
from schemas.protocols import Fingerprint
from schemas.records import RecordLayout
from schemas.stores import BankStore


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """What an operation works with.

    Attributes:
        store: the bank.
        work: its files.
        config: how the version is made.
        parent: the newest version when the operation began, None for the first.
        base: what is taken over from the parent.
        steps: runs the stages.
    """

    store: BankStore
    work: Workspace
    config: BuildConfig
    parent: Bank | None
    base: Base
    steps: Steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """What a version says of the models it was made with."""

    fingerprint: Fingerprint
    layout: RecordLayout
    embedder_id: str

    @classmethod
    def of(cls, bank: Bank) -> "ModelIdentity":
        """Returns the identity of a version's models."""
        manifest = bank.manifest
        return cls(fingerprint=manifest.fingerprint, layout=manifest.layout, embedder_id=manifest.embedder_id)


def read_settings(bank: Bank) -> BuildConfig:
    """Returns the configuration that a version was made with; its codec is the one that stands in the bank.

    Raises:
        BankFormatError: the codec is missing or damaged.
    """
    settings = {key: value for key, value in bank.manifest.config.items() if key != "corpus"}
    config = apply_changes(apply_changes(BuildConfig(), settings), {"memory": {"codec": bank.manifest.layout.codec}})
    return dataclasses.replace(config, codec_file=bank.locate_codec())


def load_models(config: BuildConfig) -> ModelIdentity:
    """Loads the models of a configuration, once a process."""
    with show_stage("models"):
        writer = load_once(config.make_writer_factory())
        embedder = load_once(config.make_embedder_factory())
        if config.quality.model:
            load_once(config.make_scorer_factory())
    return ModelIdentity(fingerprint=writer.fingerprint, layout=writer.layout, embedder_id=embedder.embedder_id)


def check_models(bank: Bank, models: ModelIdentity) -> None:
    """Makes sure that what is added to a bank is made by the models that made what it has.

    Raises:
        WrongModelError: they are others; the error says in what they differ.
    """
    differences = bank.manifest.fingerprint.list_differences(models.fingerprint)
    if bank.manifest.embedder_id != models.embedder_id:
        differences.append("embedder")
    if differences:
        raise WrongModelError(
            f"bank {bank.url} was made with other models: {', '.join(differences)} differ; restore them, "
            f"or move the bank to the new one with: memory3 migrate --bank {bank.url} --model MODEL"
        )


def read_documents(draft: Draft, files: list[CorpusFile]) -> dict[str, Any]:
    """Runs the stages from corpus files to the tables of documents; returns counts."""
    work, config, steps = draft.work, draft.config, draft.steps
    steps.run("read", stages.read, files, work, config)
    if config.quality.model:
        steps.run("score", stages.score, work, config)
    num_left_out = 0
    if config.document_deduplication.enabled:
        num_left_out = steps.run("deduplicate documents", stages.deduplicate_documents, work, config)
    documents = steps.run("chunk", stages.chunk, work, draft.base, config)
    return {"documents": documents, "pairs_not_compared": num_left_out}


def derive_references(draft: Draft, *, from_corpus: bool = True) -> dict[str, Any]:
    """Runs the stages from the tables of documents to the live references; returns counts.

    Args:
        draft: has the tables of documents.
        from_corpus: whether there may be documents the parent does not have.
    """
    work, config, steps = draft.work, draft.config, draft.steps
    steps.run("gather", stages.gather, work, draft.base, config)
    if draft.parent and not from_corpus:
        take_contaminated(work, draft.parent)
    elif config.decontamination.paths:
        steps.run("decontaminate", stages.decontaminate, work, config)
    num_live, num_left_out = steps.run("deduplicate", stages.deduplicate, work, draft.base, config)
    return {"live": num_live, "pairs_not_compared": num_left_out}


def is_unchanged(draft: Draft) -> bool:
    """Tells whether the tables of documents are those of the parent, byte for byte; then all the rest is too."""
    if draft.parent is None or draft.config.decontamination.paths:
        return False
    found = {path.stem: hash_file(path) for path in draft.work.list_files("tables")}
    manifest = draft.parent.manifest
    known = {kind: entry.sha256 for kind in DOCUMENT_TABLES for entry in manifest.list_files(kind)}
    return found == known and draft.parent.is_complete()


def describe_changes(draft: Draft) -> dict[str, Any]:
    """Returns by what the draft differs from its parent; needs the tables of documents and the gathered references."""
    columns = ["doc_id", "content_hash"]
    after = pq.read_table(draft.work.get_folder("tables") / "documents.parquet", columns=columns)
    before = draft.parent.read_table("documents", columns) if draft.parent else after.slice(0, 0)
    rows = pc.index_in(after["doc_id"], value_set=before["doc_id"].combine_chunks())
    old = before["content_hash"].take(rows.filter(pc.is_valid(rows)))
    new = after["content_hash"].filter(pc.is_valid(rows))
    num_common, num_changed = len(new), pc.sum(pc.not_equal(old, new)).as_py() or 0
    gathered = [pq.read_table(path, columns=["is_stored"]) for path in draft.work.list_files("references")]
    is_stored = pa.concat_tables(gathered)["is_stored"]
    return {
        "documents": {
            "added": len(after) - num_common,
            "changed": num_changed,
            "removed": len(before) - num_common,
            "unchanged": num_common - num_changed,
            "chunked": len(after) - len(read_reused(draft.work)),
        },
        "references": {"new": pc.sum(pc.invert(is_stored)).as_py() or 0},
    }


def preview_changes(draft: Draft) -> dict[str, Any]:
    """Returns what :func:`describe_changes` does, with the references that would be embedded and encoded."""
    changes = describe_changes(draft)
    size = draft.config.memory.references_per_shard
    num_written = 0 if draft.config.memory.cold else encoding.split_unwritten(draft.work, draft.base, size)
    num_embedded = encoding.split_unembedded(draft.work, draft.base, size)
    changes["references"] |= {"embedded": num_embedded, "encoded": num_written}
    return changes


def encode_references(draft: Draft) -> dict[str, int]:
    """Embeds and writes the live references that the base has not; returns how many."""
    work, base, config, steps = draft.work, draft.base, draft.config, draft.steps
    num_embedded = steps.run("embed", stages.embed, work, base, config)
    num_written = 0 if config.memory.cold else steps.run("write", stages.write, work, base, config)
    return {"embedded": num_embedded, "encoded": num_written}


def list_kept_files(draft: Draft) -> list[FileEntry]:
    """Returns the files of the parent that the new version goes on using."""
    if draft.parent is None or not draft.base.references:
        return []
    return [file for file in draft.parent.manifest.files if file.kind in PARTED_KINDS]


def _publish_codec(draft: Draft, codec_file: Path) -> list[FileEntry]:
    """Puts the parameters of the codec into the bank.

    Raises:
        InputError: the file has become another since the operation began.
    """
    from model.codec_files import read_codec_name

    if read_codec_name(copy_codec(draft.work, codec_file)) != draft.config.memory.codec:
        raise InputError(f"{codec_file} has changed since it was first read; nothing was committed: run again")
    return publish_codec(draft.work, draft.store)


def _publish_segment(draft: Draft) -> list[FileEntry]:
    with show_stage("publish"):
        return publish_segment(draft.work, draft.store)


def commit_draft(
    draft: Draft,
    *,
    operation: str,
    corpus: list[str],
    build_id: str,
    models: ModelIdentity,
    counts: dict[str, Any],
    kept_files: list[FileEntry],
) -> Manifest:
    """Assembles the segment, moves it into the bank and commits the manifest: the moment the version begins to exist.

    Raises:
        ConflictError: somebody else has committed a version meanwhile; the work is kept.
    """
    assembled = draft.steps.run("assemble", stages.assemble, draft.work, draft.base)
    published = draft.steps.run("publish", _publish_segment, draft)
    if draft.config.codec_file is not None:
        published += draft.steps.run("publish codec", _publish_codec, draft, draft.config.codec_file)
    number = draft.parent.manifest.version if draft.parent else None
    manifest = Manifest(
        version=(number or 0) + 1,
        parent=number,
        operation=operation,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        config={"corpus": corpus, **draft.config.to_json()},
        build_id=build_id,
        files=[*kept_files, *published],
        counts={**assembled, **counts},
        seconds=dict(draft.steps.seconds),
        fingerprint=models.fingerprint,
        embedder_id=models.embedder_id,
        layout=models.layout,
        cold=draft.config.memory.cold,
    )
    draft.steps.run("commit", commit_manifest, draft.store, manifest)
    return manifest


def commit_again(store: BankStore, parent: Bank, operation: str, **changes: Any) -> Manifest:
    """Commits a version with the files of another, in which only what the manifest says is changed.

    Raises:
        ConflictError: somebody else has committed a version meanwhile.
    """
    manifest = dataclasses.replace(
        parent.manifest,
        version=parent.manifest.version + 1,
        parent=parent.manifest.version,
        operation=operation,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds={},
        counts={**parent.manifest.counts, "changes": {}},
        **changes,
    )
    commit_manifest(store, manifest)
    return manifest


def summarize(manifest: Manifest, *, unchanged: bool) -> dict[str, Any]:
    """Returns what a user wants to know about a version."""
    size_bytes = sum(file.size_bytes for file in manifest.files)
    kept = manifest.counts["references"]["kept"]
    reason = explain_merge([file.num_rows for file in manifest.list_files("index")], kept)
    return {
        "version": manifest.version,
        "operation": manifest.operation,
        "unchanged": unchanged,
        "counts": manifest.counts,
        "seconds": manifest.seconds,
        "size_bytes": size_bytes,
        "bytes_a_reference": round(size_bytes / max(1, kept)),
        "layout": dataclasses.asdict(manifest.layout),
        "advice": f"run memory3 compact: {reason}" if reason else "",
    }
