"""``memory3 migrate``: the references of a bank encoded by another model, or with another codec, as a new version.

The old version serves until the new one is committed, and after. With the same tokenizer only memories are made, the
most used references first; a share of them may be committed early, and the rest is encoded when first retrieved or by
a later run. With another tokenizer the documents are put together from their references and cut anew.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flows import stages
from flows.coding import resolve_codec
from flows.compacting import copy_tables
from flows.config import BuildConfig, apply_changes
from flows.drafting import (
    Draft,
    ModelIdentity,
    commit_again,
    commit_draft,
    derive_references,
    encode_references,
    load_models,
    read_settings,
    summarize,
)
from flows.progress import show_stage
from flows.steps import Steps
from flows.workplace import lock_bank, make_work_id, open_workspace
from pipelines import encoding, referencing, restoring
from pipelines.reusing import Base
from pipelines.workspace import Workspace
from schemas.bank import PARTED_KINDS, Bank
from schemas.errors import InputError, WrongModelError
from schemas.identifiers import hash_bytes
from schemas.manifest import FileEntry, Manifest
from schemas.stores import BankStore

USES = pa.schema([("ref_id", pa.string()), ("count", pa.int64())])


def read_uses(path: Path) -> pa.Table:
    """Reads how often references were used, from Parquet or CSV with the columns ``ref_id`` and ``count``.

    Returns:
        A table of :data:`USES`, a row a reference: where a file has several, they are added up.

    Raises:
        InputError: the file cannot be read, or has other columns.
    """
    from pyarrow import csv

    types = csv.ConvertOptions(column_types=USES)  # an id of digits alone would be read as a number
    try:
        table = csv.read_csv(path, convert_options=types) if path.suffix == ".csv" else pq.read_table(path)
        uses = table.select(USES.names).cast(USES).group_by("ref_id").aggregate([("count", "sum")])
        return uses.rename_columns({"count_sum": "count"}).select(USES.names).sort_by("ref_id")
    except (pa.ArrowException, KeyError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as Parquet or CSV with the columns ref_id and count: {str(error).splitlines()[0]}"
        ) from error


def count_occurrences(bank: Bank) -> pa.Table:
    """Returns in how many places each reference stands: what is used more often, where nothing else is known."""
    counts = bank.read_table("occurrences", ["ref_id"]).group_by("ref_id").aggregate([("ref_id", "count")])
    return counts.rename_columns({"ref_id_count": "count"}).select(USES.names).cast(USES)


OLD_RULE = (8, "softmax", False)
"""What banks have in their settings that were built before a model could say which tokens to keep: nobody chose it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Migration:
    """What is asked for.

    Attributes:
        model: the model that is to read the bank; None for the one that reads it now.
        codec: how vectors are to be stored, a name or the file of a trained codec; None for as they are stored now.
        limit: memories that are made at most before the version is committed; None for all.
        uses: how often each reference was used; None to go by how often it stands in documents.
    """

    model: str | None = None
    codec: str | None = None
    limit: int | None = None
    uses: pa.Table | None = None

    def __post_init__(self) -> None:
        """Checks what is asked for.

        Raises:
            InputError: nothing is, or the limit is negative.
        """
        if self.model is None and self.codec is None:
            raise InputError("migration: give a model, a codec or both")
        if self.limit is not None and self.limit < 0:
            raise InputError(f"migration: limit is {self.limit}, must be at least 0")

    @property
    def uses_hash(self) -> str:
        """A hash of the uses, on which the order of the memories depends."""
        if self.uses is None:
            return ""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, USES) as writer:
            writer.write_table(self.uses.combine_chunks())
        return hash_bytes(sink.getvalue().to_pybytes())


def _migrate_memories(draft: Draft, bank: Bank, models: ModelIdentity, wanted: Migration) -> Manifest:
    """Makes the memories of references that stay as they are."""
    work, steps = draft.work, draft.steps
    steps.run("tables", copy_tables, work, bank)
    steps.run("gather", stages.gather, work, draft.base, draft.config)
    referencing.take_contaminated(work, bank)
    size = draft.config.memory.references_per_shard
    uses = wanted.uses if wanted.uses is not None else count_occurrences(bank)
    num_new, num_missing = encoding.split_by_use(work, draft.base, uses, size, wanted.limit)
    with show_stage("write", num_new, "references", lambda: min(num_new, len(work.list_files("shards")) * size)):
        factory = draft.config.make_writer_factory()
        steps.run("write", encoding.write_memories, work, factory, draft.config.engine)
    config = apply_changes(draft.config, {"memory": {"cold": num_missing > 0}})
    return commit_draft(
        dataclasses.replace(draft, config=config),
        operation="migrate",
        corpus=bank.manifest.config["corpus"],
        build_id=make_work_id("migrated", bank, config.memory.model, num_missing),
        models=models,
        counts={
            "documents": bank.manifest.counts["documents"],
            "changes": {"references": {"encoded": num_new, "not_encoded": num_missing}},
            "pairs_not_compared": bank.manifest.counts["pairs_not_compared"],
        },
        kept_files=_list_kept(bank, with_memories=bool(draft.base.memories)),
    )


def _list_kept(bank: Bank, *, with_memories: bool) -> list[FileEntry]:
    left_out = set() if with_memories else {"memories", "shard"}
    return [file for file in bank.manifest.files if file.kind in PARTED_KINDS - left_out]


def _copy_comparison(work: Workspace, bank: Bank) -> None:
    """Takes over which documents were found to be near-duplicates: that does not depend on the tokenizer."""
    for kind in ("document_duplicates", "document_signatures"):
        for path in map(bank.check, bank.manifest.list_files(kind)):
            shutil.copyfile(path, work.get_folder("tables") / f"{kind}.parquet")


def _migrate_documents(draft: Draft, bank: Bank, models: ModelIdentity, wanted: Migration) -> Manifest:
    """Cuts the documents anew, and makes everything that follows from that."""
    work, steps = draft.work, draft.steps
    steps.run("restore", restoring.restore_records, work, bank)
    documents = steps.run("chunk", stages.chunk, work, draft.base, draft.config)
    _copy_comparison(work, bank)
    derived = derive_references(draft)
    encoded = encode_references(draft)
    before = bank.manifest.counts["documents"]
    return commit_draft(
        draft,
        operation="migrate",
        corpus=bank.manifest.config["corpus"],
        build_id=make_work_id("migrated", bank, draft.config.memory.model),
        models=models,
        counts={
            "documents": {**before, "kept": documents["kept"]},
            "changes": {"documents": {"chunked": documents["kept"]}, "references": encoded},
            "pairs_not_compared": derived["pairs_not_compared"],
        },
        kept_files=[],
    )


def choose_config(settings: BuildConfig, wanted: Migration, store: BankStore) -> BuildConfig:
    """Returns the settings of a version, with the model and the codec that are asked for."""
    given = {"model": wanted.model, "codec": wanted.codec}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    memory = settings.memory
    if wanted.model is not None and (memory.num_slots, memory.score, memory.refit) == OLD_RULE:
        changes |= dict.fromkeys(("num_slots", "score", "refit"))
    config = apply_changes(settings, {"memory": {**changes, "cold": False}})
    return resolve_codec(dataclasses.replace(config, codec_file=None) if wanted.codec else config, store)


def migrate_bank(store: BankStore, wanted: Migration, steps: Steps | None = None) -> dict[str, Any]:
    """Commits a version of a bank for another model or codec; one that is complete for these already stays.

    Args:
        store: the bank.
        wanted: the model, the codec, and how far to go.
        steps: runs the stages; None for plain calls.

    Returns:
        As :func:`flows.building.build`.

    Raises:
        InputError: a limit where documents must be cut anew.
        BankError: see its other subclasses; nothing is committed then, and finished work is kept.
    """
    Bank.open(store)  # the lock would make a folder where there is no bank
    with lock_bank(store):
        parent = Bank.open(store)
        settings = read_settings(parent)
        config = choose_config(settings, wanted, store)
        steps = steps or Steps()
        models = steps.run("models", load_models, config)
        before = ModelIdentity.of(parent)
        is_same = models.fingerprint == before.fingerprint
        is_recut = models.fingerprint.tokenizer != before.fingerprint.tokenizer
        if not is_recut and models.embedder_id != before.embedder_id:
            raise WrongModelError(
                f"bank {store.url} was embedded by {before.embedder_id}, the embedder at hand is {models.embedder_id}; "
                "restore the one it was built with, or build the bank again"
            )
        if is_same and not parent.manifest.cold:
            if config.memory.model == settings.memory.model:
                return summarize(parent.manifest, unchanged=True)
            moved = {"corpus": parent.manifest.config["corpus"], **config.to_json()}
            return summarize(commit_again(store, parent, "migrate", config=moved), unchanged=False)
        digests = (models.fingerprint.digest, models.embedder_id)
        work_id = make_work_id("migrate", parent, digests, wanted.limit, wanted.uses_hash)
        with open_workspace(store, work_id) as work:
            if is_recut:
                if wanted.limit is not None:
                    raise InputError(
                        f"{config.memory.model} has another tokenizer than the bank: its documents are cut anew and "
                        "all memories made; leave out --first"
                    )
                draft = Draft(store=store, work=work, config=config, parent=parent, base=Base(), steps=steps)
                return summarize(_migrate_documents(draft, parent, models, wanted), unchanged=False)
            base = Base.of(parent) if is_same else dataclasses.replace(Base.of(parent), memories=())
            draft = Draft(store=store, work=work, config=config, parent=parent, base=base, steps=steps)
            return summarize(_migrate_memories(draft, parent, models, wanted), unchanged=False)
