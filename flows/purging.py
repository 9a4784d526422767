"""``memory3 purge``: what was deleted is forgotten, in all files and all versions, and that is proven.

The newest version is rewritten without the rows that no document needs. Then every file that is to stay is searched for
what was to be forgotten, and only when nothing is found all other versions are removed with their files: they say what
there is to look for. So a purge that was cut short, or that has found something, is begun again by the same command.
"""

import contextlib
import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flows.collecting import Collection, plan_collection, remove_collected
from flows.compacting import commit_compacted, is_compact
from flows.deleting import delete_documents
from flows.progress import show_stage
from flows.steps import Steps
from flows.workplace import BUILD_ID, lock_bank
from model.cold import ColdStore, keep_only
from pipelines import forgetting
from pipelines.forgetting import Traces
from pipelines.reusing import read_ids
from schemas.atomic import write_bytes_atomically
from schemas.bank import CHECKS_FOLDER, COLD_FOLDER, WORK_FOLDER, Bank
from schemas.errors import BankError, InputError
from schemas.manifest import CODEC_KIND, list_versions, make_manifest_name
from schemas.records import Bytes
from schemas.stores import BankStore, LocalStore
from schemas.tags import list_tags, remove_tag

BEGUN_NAME = "PURGE"
"""File beside the lock with the ids of documents that no version may have any more: a purge of them is not ended."""


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
        trained_codec: name of the codec whose parameters were learnt from memories and stay; empty if there is none.
    """

    version: int
    removed_versions: list[int]
    removed_tags: list[str]
    freed_bytes: int
    num_forgotten: int
    num_standing: int
    num_files: int
    searched_bytes: int
    trained_codec: str = ""


def _delete_what_is_there(store: BankStore, doc_ids: list[str]) -> None:
    """Deletes documents, of which a purge that was cut short may have deleted some.

    Raises:
        InputError: no version of the bank has ever had such a document.
    """

    def list_ids(bank: Bank) -> set[str]:
        kinds = ("documents", "rejects")
        return {doc_id for kind in kinds for doc_id in bank.read_table(kind, ["doc_id"])["doc_id"].to_pylist()}

    present = list_ids(Bank.open(store))
    missing = set(doc_ids) - present - _read_begun(store)
    for version in list_versions(store) if missing else []:
        missing -= list_ids(Bank.open(store, version))
    if missing:
        raise InputError(
            f"no version of bank {store.url} has a document {min(missing)!r}; if an earlier purge was cut short, "
            "run it again without --document"
        )
    if wanted := [doc_id for doc_id in doc_ids if doc_id in present]:
        delete_documents(store, wanted)


def _read_begun(store: BankStore) -> set[str]:
    """Returns the documents of a purge that was cut short when it removed the versions that had them."""
    path = store.scratch / WORK_FOLDER / BEGUN_NAME
    return set(json.loads(path.read_bytes())) if path.exists() else set()


def _list_live(bank: Bank) -> pa.Array:
    ids = pc.unique(read_ids(bank.locate_all("references")))
    return ids.filter(pc.invert(pc.is_in(ids, value_set=bank.read_dropped_ids())))


def _remove_scratch(store: BankStore) -> None:
    folder = store.scratch / WORK_FOLDER
    for path in folder.iterdir() if folder.is_dir() else []:
        if path.is_dir() and BUILD_ID.fullmatch(path.name):
            shutil.rmtree(path)


def _load_cold(bank: Bank, ref_ids: list[str]) -> dict[str, Bytes]:
    """Returns the records of references that were made when they were first retrieved."""
    digest = bank.manifest.fingerprint.digest
    if not (bank.store.scratch / COLD_FOLDER / f"{digest}.sqlite").exists():
        return {}
    with contextlib.closing(ColdStore(bank.store.scratch, digest)) as cold:
        return cold.load(ref_ids)


def _list_staying(store: BankStore, plan: Collection) -> list[str]:
    """Returns the files that are left when a collection is done."""
    going = {*plan.files, *map(make_manifest_name, plan.versions)}
    return [name for name in store.list_files() if name not in going and str(store.scratch / name) not in plan.caches]


def _search(store: BankStore, bank: Bank, names: list[str], traces: Traces) -> int:
    """Searches files of the bank; returns their bytes.

    Raises:
        NotForgottenError: a trace is found.
    """
    hashes = {file.path: file.sha256 for file in bank.manifest.files}
    shards = {file.path for file in bank.manifest.list_files("shard")}
    num_done = num_bytes = 0
    with show_stage("search", len(names), "files", lambda: num_done):
        for name in names:
            if name in hashes or isinstance(store, LocalStore):
                path = store.localize(name, hashes.get(name, ""))
                found = forgetting.search_file(path, traces)
                if name in shards:
                    found = [what for what in found if not what.startswith(forgetting.KEY_VALUES)]
                if name.endswith(".parquet"):
                    found += forgetting.search_table(path, traces)
                num_bytes += path.stat().st_size
            else:  # small: manifests, tags, checks
                content = np.frombuffer(store.read(name), np.uint8)
                found = forgetting.search_bytes(content, traces)
                num_bytes += len(content)
            if found:
                advice = "report it" if name in hashes else "if it is no part of the bank, move it away"
                raise NotForgottenError(
                    f"{store.url}/{name} still holds {len(found)} traces of what was to be purged, for instance "
                    f"{found[0]}; older versions were not removed: {advice}, and run memory3 purge again"
                )
            num_done += 1
    return num_bytes


def purge_bank(store: BankStore, doc_ids: list[str]) -> PurgeResult:
    """Removes all of a bank but the newest version's documents.

    Args:
        store: the bank.
        doc_ids: documents that are deleted first.

    Raises:
        InputError: an id is not known.
        NotForgottenError: something is still there; older versions are too.
        BankError: see its other subclasses.
    """
    Bank.open(store)  # the lock would make a folder where there is no bank
    if doc_ids:
        _delete_what_is_there(store, doc_ids)
    with lock_bank(store):
        newest = Bank.open(store)
        versions = [Bank.open(store, version) for version in list_versions(store)]
        with show_stage("collect"):
            traces = forgetting.collect_traces(newest, versions, _load_cold)
        # Where there is no lock, a version of its own makes another machine that is just committing one notice.
        if not is_compact(newest) or not isinstance(store, LocalStore):
            commit_compacted(store, newest, "purge", Steps())
        left = Bank.open(store)
        gone = {name: version for name, version in list_tags(store).items() if version != left.manifest.version}
        for name in gone:
            remove_tag(store, name)
        _remove_scratch(store)
        checks = f"{CHECKS_FOLDER}/{left.manifest.version:08d}.json"
        store.remove(name for name in store.list_files(CHECKS_FOLDER) if name != checks)
        keep_only(store.scratch / COLD_FOLDER, _list_live(left))
        begun = store.scratch / WORK_FOLDER / BEGUN_NAME
        write_bytes_atomically(begun, json.dumps(sorted(doc_ids)).encode())
        plan = plan_collection(store, keep=1, min_age_hours=0)
        names = _list_staying(store, plan)
        searched_bytes = _search(store, left, names, traces)
        removed = remove_collected(store, plan)
        if strangers := sorted(set(store.list_files()) - set(names)):
            raise NotForgottenError(
                f"{store.url}/{strangers[0]} has come while the bank was searched; run memory3 purge again"
            )
        begun.unlink()
        return PurgeResult(
            version=left.manifest.version,
            removed_versions=removed.versions,
            removed_tags=sorted(gone),
            freed_bytes=removed.size_bytes,
            num_forgotten=len(traces.references),
            num_standing=traces.num_standing,
            num_files=len(names),
            searched_bytes=searched_bytes,
            trained_codec=left.manifest.layout.codec if left.manifest.list_files(CODEC_KIND) else "",
        )
