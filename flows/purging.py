"""``memory3 purge``: what was deleted is forgotten, in all files and all versions, and that is proven.

The newest version is rewritten without the rows that no document needs, every other version is removed with its files,
and then every file that is left is searched for what was to be forgotten. A purge that was cut short is begun again by
the same command.
"""

import dataclasses
import shutil

import pyarrow as pa
import pyarrow.compute as pc

from flows.collecting import plan_collection, remove_collected
from flows.compacting import commit_compacted, is_compact
from flows.deleting import delete_documents
from flows.progress import show_stage
from flows.workplace import BUILD_ID, lock_bank
from model.cold import keep_only
from pipelines import forgetting
from pipelines.forgetting import Traces
from pipelines.reusing import read_ids
from schemas.bank import CHECKS_FOLDER, COLD_FOLDER, WORK_FOLDER, Bank
from schemas.errors import BankError, InputError
from schemas.manifest import list_versions
from schemas.stores import BankStore
from schemas.tags import list_tags, remove_tag


class NotForgottenError(BankError):
    """Something that was to be forgotten is still there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PurgeResult:
    """What a purge did.

    Attributes:
        version: the only version that is left.
        removed_versions: the versions that are gone.
        removed_tags: the tags that named them.
        freed_bytes: bytes of the files that are gone.
        num_forgotten: references that are gone.
        num_standing: of these, texts that are part of a reference of another document, which stays.
        num_files: files searched.
        searched_bytes: their bytes.
    """

    version: int
    removed_versions: list[int]
    removed_tags: list[str]
    freed_bytes: int
    num_forgotten: int
    num_standing: int
    num_files: int
    searched_bytes: int


def _delete_what_is_there(store: BankStore, doc_ids: list[str]) -> None:
    """Deletes documents, of which a purge that was cut short may have deleted some.

    Raises:
        InputError: no version of the bank has ever had such a document.
    """

    def list_ids(bank: Bank) -> set[str]:
        kinds = ("documents", "rejects")
        return {doc_id for kind in kinds for doc_id in bank.read_table(kind, ["doc_id"])["doc_id"].to_pylist()}

    present = list_ids(Bank.open(store))
    missing = set(doc_ids) - present
    for version in list_versions(store) if missing else []:
        missing -= list_ids(Bank.open(store, version))
    if missing:
        raise InputError(
            f"no version of bank {store.url} has a document {min(missing)!r}; if an earlier purge was cut short, "
            "run it again without --document"
        )
    if wanted := [doc_id for doc_id in doc_ids if doc_id in present]:
        delete_documents(store, wanted)


def _list_live(bank: Bank) -> pa.Array:
    ids = pc.unique(read_ids(bank.locate_all("references")))
    return ids.filter(pc.invert(pc.is_in(ids, value_set=bank.read_dropped_ids())))


def _remove_scratch(store: BankStore) -> None:
    folder = store.scratch / WORK_FOLDER
    for path in folder.iterdir() if folder.is_dir() else []:
        if path.is_dir() and BUILD_ID.fullmatch(path.name):
            shutil.rmtree(path)


def _search(store: BankStore, bank: Bank, traces: Traces) -> tuple[int, int]:
    """Searches every file of the bank; returns their number and bytes.

    Raises:
        NotForgottenError: a trace is found.
    """
    names = store.list_files()
    hashes = {file.path: file.sha256 for file in bank.manifest.files}
    num_done = num_bytes = 0
    with show_stage("search", len(names), "files", lambda: num_done):
        for name in names:
            # What no manifest names is small: manifests, tags, checks, the lock.
            path = store.localize(name, hashes.get(name, ""))
            found = forgetting.search_file(path, traces)
            if name.endswith(".parquet"):
                found += forgetting.search_table(path, traces)
            if found:
                raise NotForgottenError(
                    f"{store.url}/{name} still holds {len(found)} traces of what was purged, for instance "
                    f"{found[0]}; run memory3 purge again, and report it if that does not help"
                )
            num_bytes += path.stat().st_size
            num_done += 1
    return len(names), num_bytes


def purge_bank(store: BankStore, doc_ids: list[str]) -> PurgeResult:
    """Removes all of a bank but the newest version's documents.

    Args:
        store: the bank.
        doc_ids: documents that are deleted first.

    Raises:
        InputError: an id is not known.
        NotForgottenError: something is still there.
        BankError: see its other subclasses.
    """
    if doc_ids:
        _delete_what_is_there(store, doc_ids)
    with lock_bank(store):
        newest = Bank.open(store)
        versions = [Bank.open(store, version) for version in list_versions(store)]
        with show_stage("collect"):
            traces = forgetting.collect_traces(newest, versions)
        if not is_compact(newest):
            commit_compacted(store, newest, "purge")
        left = Bank.open(store)
        gone = {name: version for name, version in list_tags(store).items() if version != left.manifest.version}
        for name in gone:
            remove_tag(store, name)
        _remove_scratch(store)
        removed = remove_collected(store, plan_collection(store, keep=1, min_age_hours=0))
        checks = f"{CHECKS_FOLDER}/{left.manifest.version:08d}.json"
        store.remove(name for name in store.list_files(CHECKS_FOLDER) if name != checks)
        keep_only(store.scratch / COLD_FOLDER, _list_live(left))
        num_files, searched_bytes = _search(store, left, traces)
        return PurgeResult(
            version=left.manifest.version,
            removed_versions=removed.versions,
            removed_tags=sorted(gone),
            freed_bytes=removed.size_bytes,
            num_forgotten=len(traces.references),
            num_standing=traces.num_standing,
            num_files=num_files,
            searched_bytes=searched_bytes,
        )
