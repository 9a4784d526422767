"""Build and update: a corpus becomes a version of a bank.

A build makes everything anew. An update makes the bank equal to the corpus and takes over what the newest version has
already; its result is that of a build. Nothing is part of the bank before the manifest is committed.
:mod:`flows.build` runs them as Prefect flows.
"""

import os
from pathlib import Path
from typing import Any

from flows.coding import resolve_codec
from flows.config import BuildConfig, apply_changes
from flows.drafting import (
    Draft,
    ModelIdentity,
    check_models,
    commit_again,
    commit_draft,
    derive_references,
    describe_changes,
    encode_references,
    is_unchanged,
    list_kept_files,
    load_models,
    preview_changes,
    read_documents,
    read_settings,
    summarize,
)
from flows.stages import make_test_reading
from flows.steps import Steps
from flows.workplace import check_target, lock_bank, make_work_id, open_workspace
from model.embedding import find_embedder
from model.locating import find_checkpoint
from pipelines.checking import check_corpus
from pipelines.formats import CorpusFile, list_corpus_files
from pipelines.reusing import Base
from pipelines.running import check_runner
from pipelines.workspace import WORKSPACE_FORMAT
from schemas.bank import Bank
from schemas.identifiers import hash_json
from schemas.manifest import BANK_FORMAT, list_versions
from schemas.stores import BankStore


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


def make_absolute(corpus: list[str]) -> list[str]:
    """Returns the places of a corpus so that they mean the same in another working folder."""
    return [place if "://" in place else os.path.abspath(place) for place in corpus]


def check_input(corpus: list[str], config: BuildConfig) -> list[CorpusFile]:
    """Lists the files of a corpus after looking at everything that can be wrong with it at once.

    Raises:
        BankError: something is.
    """
    files = list_corpus_files(corpus)
    check_corpus(files, config.reading)
    if config.decontamination.paths:
        check_corpus(list_corpus_files(config.decontamination.paths), make_test_reading(config))
    check_runner(config.engine)
    return files


def find_unchanged(store: BankStore, files: list[CorpusFile], config: BuildConfig) -> dict[str, Any] | None:
    """Returns the summary of the newest version if it was made of these very files with this configuration."""
    if not list_versions(store):
        return None
    newest = Bank.open(store)
    if newest.manifest.build_id != make_build_id(files, config) or not newest.is_complete():
        return None
    return summarize(newest.manifest, unchanged=True)


def find_update(store: BankStore, corpus: list[str] | None) -> dict[str, Any] | None:
    """Returns the summary of the newest version if an update with a corpus, see :func:`update`, would do nothing."""
    newest = Bank.open(store)
    config, known = read_settings(newest), newest.manifest.config["corpus"]
    if corpus is not None and make_absolute(corpus) != known:
        return None
    return find_unchanged(store, list_corpus_files(known), config)


def _make_version(
    draft: Draft, files: list[CorpusFile], corpus: list[str], operation: str, models: ModelIdentity
) -> dict[str, Any]:
    read = read_documents(draft, files)
    if operation == "update" and draft.parent and is_unchanged(draft):
        return summarize(draft.parent.manifest, unchanged=True)
    derived = derive_references(draft)
    changes = describe_changes(draft)
    changes["references"] |= encode_references(draft)
    counts = {
        "documents": read["documents"],
        "changes": changes,
        "pairs_not_compared": read["pairs_not_compared"] + derived["pairs_not_compared"],
    }
    manifest = commit_draft(
        draft,
        operation=operation,
        corpus=corpus,
        build_id=make_build_id(files, draft.config),
        models=models,
        counts=counts,
        kept_files=list_kept_files(draft),
    )
    return summarize(manifest, unchanged=False)


def build(store: BankStore, corpus: list[str], config: BuildConfig, steps: Steps) -> dict[str, Any]:
    """Builds a version of a bank from a corpus; a corpus and configuration that are built already change nothing.

    Args:
        store: the bank.
        corpus: files and folders.
        config: everything else that determines the version.
        steps: runs the stages.

    Returns:
        ``version``, ``unchanged`` and the version's ``counts``, ``seconds``, ``size_bytes`` and ``bytes_a_reference``.

    Raises:
        BankError: see its subclasses; nothing is committed then, and finished work is kept.
    """
    check_target(store)
    config = resolve_codec(config, store)
    corpus = make_absolute(corpus)
    files = check_input(corpus, config)
    unchanged = find_unchanged(store, files, config)
    if unchanged:
        return unchanged
    models = steps.run("models", load_models, config)
    with lock_bank(store), open_workspace(store, make_build_id(files, config)) as work:
        parent = Bank.open(store) if list_versions(store) else None
        draft = Draft(store=store, work=work, config=config, parent=parent, base=Base(), steps=steps)
        return _make_version(draft, files, corpus, "build", models)


def update(
    store: BankStore, corpus: list[str] | None, engine: dict[str, Any], steps: Steps, *, dry_run: bool = False
) -> dict[str, Any]:
    """Makes a bank equal to a corpus: documents added, changed and gone, with the configuration it was built with.

    Only documents of new content are cut, and only references never seen are embedded and encoded.

    Args:
        store: the bank.
        corpus: files and folders, all of the corpus and not only what is new; None: those of the newest version.
        engine: changes to the engine that runs the jobs.
        steps: runs the stages.
        dry_run: stop before anything is encoded, and only say what would change; what was done is kept for the run
            that does it.

    Returns:
        As :func:`build`, ``counts`` with ``changes``; for a dry run ``dry_run``, ``version`` and ``changes``.

    Raises:
        BankError: see its subclasses; nothing is committed then, and finished work is kept.
    """
    Bank.open(store)  # the lock would make a folder where there is no bank
    with lock_bank(store):
        parent = Bank.open(store)
        config = apply_changes(read_settings(parent), {"engine": engine})
        known: list[str] = parent.manifest.config["corpus"]
        places = known if corpus is None else make_absolute(corpus)
        files = check_input(places, config)
        unchanged = find_unchanged(store, files, config)
        if unchanged and dry_run:
            return {"dry_run": True, "version": parent.manifest.version, "changes": {}}
        if unchanged and places != known:
            changed = {"corpus": places, **config.to_json()}
            return summarize(commit_again(store, parent, "update", config=changed), unchanged=False)
        if unchanged:
            return unchanged
        models = ModelIdentity.of(parent)
        if not dry_run:
            models = steps.run("models", load_models, config)
            check_models(parent, models)
        work_id = make_work_id("update", parent, make_build_id(files, config))
        with open_workspace(store, work_id, keep=dry_run) as work:
            draft = Draft(store=store, work=work, config=config, parent=parent, base=Base.of(parent), steps=steps)
            if not dry_run:
                return _make_version(draft, files, places, "update", models)
            read_documents(draft, files)
            derive_references(draft)
            return {"dry_run": True, "version": parent.manifest.version, "changes": preview_changes(draft)}
