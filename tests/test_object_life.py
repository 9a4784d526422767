"""The life of a bank in an object store: built, updated, deleted from, compacted, purged, collected."""

import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from flows.building import build, update
from flows.collecting import collect, plan_collection
from flows.compacting import compact_bank
from flows.config import BuildConfig, apply_changes
from flows.deleting import delete_documents
from flows.history import roll_back
from flows.purging import purge_bank
from flows.searching import search_bank
from flows.steps import Steps
from flows.verifying import verify_bank
from pipelines.running import LOOP_RUNNER
from schemas.bank import Bank
from schemas.manifest import list_versions
from schemas.stores import BankStore, LocalStore, open_store
from tests.test_storage import endpoint  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("endpoint")]

NAMES = ("assert", "with", "lambda", "yield", "global")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield tmp_path / "cache"


def write_corpus(path: Path, names: tuple[str, ...]) -> None:
    path.write_text("".join(json.dumps({"id": name, "text": topics[name]}) + "\n" for name in names))


def live(store: BankStore, folder: Path, corpus: Path) -> list[tuple[int, str, dict[str, str]]]:
    """Leads a bank through its life; returns version, operation and files by hash after each step."""
    config = apply_changes(BuildConfig(), {"engine": {"runner": LOOP_RUNNER}})
    write_corpus(corpus, NAMES)
    build(store, [str(corpus)], config, Steps())
    states = []

    def note() -> None:
        manifest = Bank.open(store).manifest
        assert all(check.passed for check in verify_bank(Bank.open(store), deep=True))
        states.append((manifest.version, manifest.operation, {file.path: file.sha256 for file in manifest.files}))

    note()
    write_corpus(corpus, (*NAMES[1:], "import"))
    update(store, None, {}, Steps())
    note()
    delete_documents(store, ["with"])
    note()
    compact_bank(store)
    note()
    roll_back(store, 2)
    note()
    delete_documents(store, ["lambda"])
    collect(store, plan_collection(store, keep=2, min_age_hours=0))
    assert len(list_versions(store)) == 2
    result = purge_bank(store, ["yield"])
    assert result.num_forgotten > 5
    assert len(list_versions(store)) == 1
    note()
    return states


def test_a_bank_lives_the_same_life_in_a_store_as_in_a_folder(tmp_path: Path, cache: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    local = live(LocalStore(tmp_path / "bank"), tmp_path, corpus)
    store = open_store("s3://corpora/lives/bank")
    remote = live(store, tmp_path, corpus)
    assert remote == local
    named = {file.path for file in Bank.open(store).manifest.files}
    assert set(store.list_files("segments")) == named
    # What was purged is gone from the copies on this machine too.
    copies = {path.name[:64] for path in cache.rglob("files/*") if path.is_file()}
    assert copies <= {file.sha256 for file in Bank.open(store).manifest.files}
    assert search_bank(Bank.open(store), "import a module", 1)[0].doc_id == "import"
