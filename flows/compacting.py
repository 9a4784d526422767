"""``memory3 compact``: a version rewritten as one segment, without the rows that nothing needs any more.

Its tables are those of a fresh build of the same documents; its memories and embeddings are copied, not made again.
"""

import shutil
from typing import Any

from flows.drafting import Draft, ModelIdentity, commit_draft, read_settings, summarize
from flows.progress import show_stage
from flows.stages import gather
from flows.steps import Steps
from flows.workplace import lock_bank, make_work_id, open_workspace
from pipelines import copying, referencing
from pipelines.comparing import sign_all
from pipelines.documenting import DOCUMENT_TABLES
from pipelines.reusing import Base, save_identity
from pipelines.workspace import Workspace
from schemas.atomic import replace_atomically
from schemas.bank import Bank
from schemas.manifest import CODEC_KIND, Manifest
from schemas.stores import BankStore


def is_compact(bank: Bank) -> bool:
    """Tells whether a version is one segment in which every row is needed."""
    manifest = bank.manifest
    segments = {file.path.rpartition("/")[0] for file in manifest.files if file.kind != CODEC_KIND}
    num_live = manifest.counts["references"]["kept"]
    rows = {kind: sum(file.num_rows for file in manifest.list_files(kind)) for kind in ("embeddings", "memories")}
    return (
        len(segments) == 1
        and not manifest.list_files("tombstones")
        and rows["embeddings"] == num_live
        and (manifest.cold or rows["memories"] == num_live)
    )


def copy_tables(work: Workspace, bank: Bank) -> None:
    """Takes the tables of documents and the near-duplicates of a version as they are."""
    targets = {kind: work.get_folder("tables") / f"{kind}.parquet" for kind in DOCUMENT_TABLES}
    for kind, target in {**targets, "duplicates": work.duplicates_path}.items():
        for path in map(bank.check, bank.manifest.list_files(kind)):
            # Not in place: a segment that an interrupted run has published may be the same file.
            with replace_atomically(target) as temporary:
                shutil.copyfile(path, temporary)
    save_identity(work)


def _copy_references(draft: Draft, bank: Bank) -> None:
    """Fills the stages up to payload shards with what the version has.

    Raises:
        BankFormatError: a file is missing or damaged, which nobody could see in a copy.
    """
    for file in bank.manifest.files:
        if file.kind not in ("shard", "index"):  # memories are checked one by one, the index is made anew
            bank.check(file)
    work, config, base = draft.work, draft.config, Base.of(bank)
    draft.steps.run("tables", copy_tables, work, bank)
    draft.steps.run("gather", gather, work, base, config)
    referencing.take_contaminated(work, bank)
    if base.signatures:
        comparison = referencing.plan_references(work, base, config.deduplication, config.engine)
        draft.steps.run("sign", sign_all, comparison)
    size = config.memory.references_per_shard
    copying.split_live(work, bank, size)
    with show_stage("copy", len(work.list_files("unwritten")), "shards", lambda: len(work.list_files("shards"))):
        draft.steps.run("embeddings", copying.copy_embeddings, work, bank, config.engine)
        draft.steps.run("memories", copying.copy_memories, work, bank, config.engine)


def commit_compacted(store: BankStore, parent: Bank, operation: str, steps: Steps) -> Manifest:
    """Commits a version with the content of another in one segment; the bank must be locked."""
    work_id = make_work_id(operation, parent)
    with open_workspace(store, work_id) as work:
        draft = Draft(store=store, work=work, config=read_settings(parent), parent=parent, base=Base(), steps=steps)
        _copy_references(draft, parent)
        names = ("documents", "pairs_not_compared")
        return commit_draft(
            draft,
            operation=operation,
            corpus=parent.manifest.config["corpus"],
            build_id=parent.manifest.build_id,
            models=ModelIdentity.of(parent),
            counts={name: parent.manifest.counts[name] for name in names},
            kept_files=[],
        )


def compact_bank(store: BankStore, steps: Steps | None = None) -> dict[str, Any]:
    """Commits a version with the content of the newest in one segment; one that is compact already stays.

    Args:
        store: the bank.
        steps: runs the stages; None for plain calls.

    Returns:
        As :func:`flows.building.build`.

    Raises:
        BankError: see its subclasses; nothing is committed then.
    """
    Bank.open(store)  # the lock would make a folder where there is no bank
    with lock_bank(store):
        parent = Bank.open(store)
        if is_compact(parent):
            return summarize(parent.manifest, unchanged=True)
        return summarize(commit_compacted(store, parent, "compact", steps or Steps()), unchanged=False)
