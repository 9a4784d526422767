"""What a collection removes and what it keeps, wherever it is stopped."""

import dataclasses
import hashlib
import os
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.collecting import Collection, collect, plan_collection
from flows.history import roll_back
from flows.workplace import lock_bank
from schemas.bank import Bank
from schemas.errors import BankFormatError, ConflictError, InputError
from schemas.manifest import FileEntry, Manifest, commit_manifest, list_versions
from schemas.protocols import Fingerprint
from schemas.records import RecordLayout
from schemas.stores import LocalStore
from schemas.tags import list_tags, set_tag

FINGERPRINT = Fingerprint(
    weights="w",
    tokenizer="t",
    architecture={},
    rope={},
    prefix_token_ids=[1],
    memory_layers=[0],
    selection={},
    compute_dtype="float32",
    storage={},
)


def write_file(store: LocalStore, name: str) -> FileEntry:
    """Writes a file below segments, or finds it there; its bytes are made of its name."""
    path = f"segments/{name}"
    content = name.encode() * 7
    store.replace(path, content)
    digest = hashlib.sha256(content).hexdigest()
    return FileEntry(kind="documents", path=path, size_bytes=len(content), sha256=digest, num_rows=1)


def commit(store: LocalStore, names: Iterable[str], *, age_days: float = 0, weights: str = "w") -> Manifest:
    """Commits the next version, of files of some names."""
    version = (list_versions(store) or [0])[-1] + 1
    manifest = Manifest(
        version=version,
        parent=version - 1 or None,
        operation="build",
        created_at=(datetime.now(UTC) - timedelta(days=age_days)).isoformat(timespec="seconds"),
        config={},
        build_id=f"b{version}",
        files=[write_file(store, name) for name in sorted(names)],
        counts={},
        seconds={},
        fingerprint=dataclasses.replace(FINGERPRINT, weights=weights),
        embedder_id="e",
        layout=RecordLayout(num_layers=1, num_kv_heads=1, num_slots=1, head_dim=2),
    )
    commit_manifest(store, manifest)
    return manifest


def make_bank(folder: Path) -> LocalStore:
    """A bank of four versions, 40, 30, 20 and 10 days old, that share files, and one orphan."""
    store = LocalStore(folder)
    commit(store, ["a/1", "a/2", "a/3"], age_days=40, weights="old")
    commit(store, ["a/1", "a/2", "b/1"], age_days=30)
    commit(store, ["a/1", "b/1", "c/1"], age_days=20)
    commit(store, ["a/1", "c/1", "d/1"], age_days=10)
    write_file(store, "orphan/x")
    return store


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return make_bank(tmp_path / "bank")


def list_stored(store: LocalStore) -> set[str]:
    return {name.removeprefix("segments/") for name in store.list_files("segments")}


def check_complete(store: LocalStore) -> None:
    for version in list_versions(store):
        assert Bank.open(store, version).is_complete(), version


@pytest.mark.parametrize(
    ("options", "versions", "files"),
    [
        ({}, [1, 2, 3, 4], {"a/1", "a/2", "a/3", "b/1", "c/1", "d/1"}),
        ({"keep": 9}, [1, 2, 3, 4], {"a/1", "a/2", "a/3", "b/1", "c/1", "d/1"}),
        ({"keep": 3}, [2, 3, 4], {"a/1", "a/2", "b/1", "c/1", "d/1"}),
        ({"keep": 2}, [3, 4], {"a/1", "b/1", "c/1", "d/1"}),
        ({"keep": 1}, [4], {"a/1", "c/1", "d/1"}),
        ({"keep": 1, "older_than_days": 25}, [3, 4], {"a/1", "b/1", "c/1", "d/1"}),
        ({"older_than_days": 35}, [2, 3, 4], {"a/1", "a/2", "b/1", "c/1", "d/1"}),
        ({"older_than_days": 0}, [4], {"a/1", "c/1", "d/1"}),
        ({"older_than_days": 1}, [4], {"a/1", "c/1", "d/1"}),
        ({"keep": 3, "older_than_days": 1}, [2, 3, 4], {"a/1", "a/2", "b/1", "c/1", "d/1"}),
    ],
)
def test_versions_and_files_that_stay(
    store: LocalStore, options: dict[str, Any], versions: list[int], files: set[str]
) -> None:
    before = {name: len(store.read(f"segments/{name}")) for name in list_stored(store)}
    plan = plan_collection(store, **options)
    assert list_stored(store) == before.keys()
    done = collect(store, plan)
    assert done == plan
    assert (list_versions(store), list_stored(store)) == (versions, files)
    assert done.versions == sorted({1, 2, 3, 4} - set(versions))
    assert done.size_bytes == sum(before[name] for name in before.keys() - files)
    assert {path.name for path in (store.path / "segments").iterdir()} == {name.split("/")[0] for name in files}
    check_complete(store)
    assert plan_collection(store, **options) == Collection(versions=[], tags=[], files={}, caches={})


@given(
    versions=st.lists(st.sets(st.sampled_from([f"{s}/{f}" for s in "abc" for f in "123"])), min_size=1, max_size=6),
    orphans=st.sets(st.sampled_from([f"{s}/{f}" for s in "cd" for f in "123"])),
    tagged=st.sets(st.integers(1, 6)),
    keep=st.none() | st.integers(1, 7),
)
@settings(max_examples=30)
def test_exactly_what_is_needed_stays(
    tmp_path_factory: pytest.TempPathFactory,
    versions: list[set[str]],
    orphans: set[str],
    tagged: set[int],
    keep: int | None,
) -> None:
    store = LocalStore(tmp_path_factory.mktemp("random"))
    for names in versions:
        commit(store, names)
    for name in orphans:
        write_file(store, name)
    for version in tagged:
        if version <= len(versions):
            set_tag(store, f"t{version}x", version)
    collect(store, plan_collection(store, keep=keep))
    expected = [
        version
        for version in range(1, len(versions) + 1)
        if keep is None or version > len(versions) - keep or version in tagged
    ]
    assert list_versions(store) == expected
    assert list_stored(store) == set().union(*(versions[version - 1] for version in expected))
    check_complete(store)


class StoppedError(Exception):
    """Stands for the end of the process."""


class StoppingStore(LocalStore):
    """A store whose process ends before it has removed a number of files."""

    num_left = 0

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            if not self.num_left:
                raise StoppedError
            self.num_left -= 1
            super().remove([name])


def test_a_collection_may_be_stopped_anywhere(tmp_path: Path) -> None:
    for num_left in range(30):
        folder = tmp_path / str(num_left)
        make_bank(folder)
        stopping = StoppingStore(folder)
        stopping.num_left = num_left
        plan = plan_collection(stopping, keep=1)
        store = LocalStore(folder)
        try:
            collect(stopping, plan)
        except StoppedError:
            assert Bank.open(store).manifest.version == 4
            check_complete(store)
            collect(store, plan_collection(store, keep=1))
        else:
            break
        assert list_versions(store) == [4]
        assert list_stored(store) == {"a/1", "c/1", "d/1"}
    assert num_left == 3 + 4  # three manifests; a/2, a/3, b/1 and the orphan


def test_what_became_needed_since_the_plan_stays(store: LocalStore) -> None:
    plan = plan_collection(store, keep=1)
    set_tag(store, "wanted", 2)
    roll_back(store, 1)
    write_file(store, "orphan/y")
    done = collect(store, plan)
    assert done.versions == [1, 3]
    assert list_versions(store) == [2, 4, 5]
    assert list_stored(store) == {"a/1", "a/2", "a/3", "b/1", "c/1", "d/1", "orphan/y"}
    check_complete(store)


def test_a_writer_at_work_is_not_disturbed(store: LocalStore) -> None:
    plan = plan_collection(store, keep=1)
    with lock_bank(store), pytest.raises(ConflictError):
        collect(store, plan)
    assert list_versions(store) == [1, 2, 3, 4]
    assert "orphan/x" in list_stored(store)


def test_nothing_goes_if_a_manifest_or_tag_cannot_be_read(store: LocalStore) -> None:
    plan = plan_collection(store, keep=1)
    good = store.read("manifests/00000004.json")
    for name, content in (("manifests/00000004.json", good.replace(b'"b4"', b'"b5"')), ("tags/x.json", b"{")):
        store.replace(name, content)
        before = list_stored(store)
        with pytest.raises(BankFormatError, match="damaged"):
            plan_collection(store)
        with pytest.raises(BankFormatError, match="damaged"):
            collect(store, plan)
        assert list_stored(store) == before
        store.replace("manifests/00000004.json", good)


def test_unfinished_work_and_strangers_stay_and_leftovers_go(store: LocalStore) -> None:
    digest = Bank.open(store).manifest.fingerprint.digest
    gone = Bank.open(store, 1).manifest.fingerprint.digest
    kept = ["work/build/records/1.arrow", "work/x.tmp", "notes.tmp", "tags/new.json.1.tmp", "checks/00000004.json"]
    kept += [f"cold/{digest}.sqlite", f"cold/{digest}.sqlite-wal"]
    removed = ["manifests/00000005.json.1.tmp", "tags/old.json.1.tmp", "segments/z.1.tmp/x", "segments/a/1.2.tmp"]
    removed += ["checks/00000001.json", f"cold/{gone}.sqlite", f"cold/{gone}.sqlite-shm", f"cold/{'0' * 32}.sqlite"]
    for name in (*kept, *removed):
        store.replace(name, name.encode())
    os.utime(store.path / "tags/old.json.1.tmp", (0, time.time() - 3600))
    set_tag(store, "first", 2)
    store.replace("tags/lost.json", b'{"version": 77}')
    plan = plan_collection(store, keep=1)
    assert plan.tags == ["lost"]
    assert collect(store, plan) == plan
    left = set(store.list_files())
    assert left >= {*kept, "tags/first.json"}
    assert not left & {*removed, "tags/lost.json"}
    assert list_tags(store) == {"first": 2}
    assert list_versions(store) == [2, 4]


class DatedFolder:
    """A folder that behaves as a store shared with other machines; some of its files are young."""

    def __init__(self, path: Path, young: set[str], scratch: Path) -> None:
        self._inner = LocalStore(path)
        self._young = young
        self.scratch = scratch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def list_ages(self, folder: str) -> dict[str, float]:
        return {name: 60.0 if name in self._young else 90_000.0 for name in self._inner.list_files(folder)}


def test_a_shared_store_keeps_what_somebody_may_be_writing(store: LocalStore, tmp_path: Path) -> None:
    write_file(store, "orphan/young")
    bank = Bank.open(store)
    scratch = tmp_path / "scratch"
    copies = {file.sha256: scratch / "files" / f"{file.sha256}.parquet" for file in bank.manifest.files}
    lost = scratch / "files" / f"{'0' * 64}.parquet"
    for path in (*copies.values(), lost):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"copy")
    # Somebody may just be going back to the old version whose file is young.
    shared = DatedFolder(store.path, {"segments/orphan/young", "segments/a/2"}, scratch)
    plan = plan_collection(shared, keep=1)
    assert plan.caches == {str(lost): 4}
    collect(shared, plan)
    assert list_stored(store) == {"a/1", "a/2", "c/1", "d/1", "orphan/young"}
    assert sorted(scratch.glob("files/*")) == sorted(copies.values())
    collect(shared, plan_collection(shared, min_age_hours=0.01))
    assert list_stored(store) == {"a/1", "c/1", "d/1"}


@pytest.mark.parametrize(
    "options",
    [{"keep": 0}, {"keep": -1}, {"older_than_days": -1}, {"older_than_days": float("nan")}, {"min_age_hours": -1}],
)
def test_numbers_out_of_range_are_refused(store: LocalStore, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be at least"):
        plan_collection(store, **options)


def test_a_place_without_a_bank_is_refused(tmp_path: Path) -> None:
    (tmp_path / "segments" / "a").mkdir(parents=True)
    (tmp_path / "segments" / "a" / "precious").write_bytes(b"x")
    with pytest.raises(BankFormatError, match="nothing was removed"):
        plan_collection(LocalStore(tmp_path))
    assert (tmp_path / "segments" / "a" / "precious").exists()
