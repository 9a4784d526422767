"""``memory3 delete``: documents taken out of a bank, without its corpus.

The references that stood only in them are no longer found; one that they shared with others stays. Where a dropped
near-duplicate is now the best of its cluster, it becomes live, and is encoded if it never was. The files still hold
what was deleted, and older versions still show it, until a purge.
"""

from typing import Any

import pyarrow.parquet as pq

from flows.drafting import (
    Draft,
    ModelIdentity,
    check_models,
    commit_draft,
    derive_references,
    describe_changes,
    encode_references,
    list_kept_files,
    load_models,
    preview_changes,
    read_settings,
    summarize,
)
from flows.steps import Steps
from flows.workplace import lock_bank, make_work_id, open_workspace
from pipelines.documenting import write_remaining_tables
from pipelines.reusing import Base, save_identity
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.stores import BankStore


def delete_documents(store: BankStore, doc_ids: list[str], *, dry_run: bool = False) -> dict[str, Any]:
    """Commits a version without some documents.

    Args:
        store: the bank.
        doc_ids: ids of documents of the newest version, or of documents it has dropped.
        dry_run: only say what would change.

    Returns:
        As :func:`flows.building.update`.

    Raises:
        InputError: an id is not known, or no document would be left.
        BankError: see its other subclasses; nothing is committed then.
    """
    Bank.open(store)  # the lock would make a folder where there is no bank
    with lock_bank(store):
        parent = Bank.open(store)
        config = read_settings(parent)
        work_id = make_work_id("delete", parent, sorted(set(doc_ids)))
        with open_workspace(store, work_id, keep=dry_run) as work:
            steps = Steps()
            draft = Draft(store=store, work=work, config=config, parent=parent, base=Base.of(parent), steps=steps)
            documents = steps.run("documents", write_remaining_tables, work, parent, doc_ids)
            if not pq.read_metadata(work.get_folder("tables") / "occurrences.parquet").num_rows:
                raise InputError(f"nothing would be left of bank {store.url}; to be rid of it, remove it as a whole")
            save_identity(work)
            derived = derive_references(draft, from_corpus=False)
            preview = preview_changes(draft)
            if dry_run:
                return {"dry_run": True, "version": parent.manifest.version, "changes": preview}
            models = ModelIdentity.of(parent)
            if preview["references"]["embedded"] or preview["references"]["encoded"]:
                check_models(parent, load_models(config))
            changes = describe_changes(draft)
            changes["references"] |= encode_references(draft)
            pairs_not_compared = derived["pairs_not_compared"]
            manifest = commit_draft(
                draft,
                operation="delete",
                corpus=parent.manifest.config["corpus"],
                build_id=work_id,
                models=models,
                counts={"documents": documents, "changes": changes, "pairs_not_compared": pairs_not_compared},
                kept_files=list_kept_files(draft),
            )
    return summarize(manifest, unchanged=False)
