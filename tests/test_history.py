"""Versions by number and name, their log, how two differ, and the way back to one."""

import dataclasses
import hashlib
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.building import build, update
from flows.config import BuildConfig, apply_changes
from flows.deleting import delete_documents
from flows.history import compare_versions, describe_versions, roll_back
from flows.steps import Steps
from flows.workplace import lock_bank
from pipelines.running import LOOP_RUNNER
from schemas.bank import Bank
from schemas.errors import BankFormatError, ConflictError, InputError
from schemas.manifest import FileEntry, list_versions
from schemas.stores import LocalStore
from schemas.tables import DOCUMENTS, DUPLICATES, REFERENCES, TOMBSTONES, write_table
from schemas.tags import find_version, list_tags, remove_tag, set_tag
from tests.corpora import make_documents, write_lines

ENGINE = {"runner": LOOP_RUNNER}


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank that was built, updated (a document changed, one gone, one new), and had a document deleted."""
    folder = tmp_path_factory.mktemp("history")
    documents = make_documents()
    corpus = write_lines(folder / "corpus.jsonl", documents)
    store = LocalStore(folder / "bank")
    changes = {"engine": ENGINE, "embedding": {"embedder": "static"}}
    build(store, [str(corpus)], apply_changes(BuildConfig(), changes), Steps())
    documents[0]["text"] += "\nA sentence that nobody has written before."
    documents[1]["id"] = "renamed"
    write_lines(corpus, [*documents[:4], *documents[5:]])
    update(store, None, ENGINE, Steps())
    delete_documents(store, ["topic/import"])
    return store.path


@pytest.fixture
def store(history: Path, tmp_path: Path) -> LocalStore:
    """A copy that a test may change."""
    shutil.copytree(history, tmp_path / "bank")
    return LocalStore(tmp_path / "bank")


def hash_files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and "work" not in path.parts
    }


# Tags.


def test_tags_are_set_moved_and_removed(store: LocalStore) -> None:
    assert list_tags(store) == {}
    set_tag(store, "stable", 2)
    set_tag(store, "2024-07", 1)
    set_tag(store, "stable", 2)
    assert list_tags(store) == {"2024-07": 1, "stable": 2}
    with pytest.raises(InputError, match="'stable' names version 2; give --move"):
        set_tag(store, "stable", 3)
    assert list_tags(store)["stable"] == 2
    set_tag(store, "stable", 3, move=True)
    assert list_tags(store) == {"2024-07": 1, "stable": 3}
    remove_tag(store, "stable")
    assert list_tags(store) == {"2024-07": 1}
    with pytest.raises(InputError, match="no tag 'stable'.*its tags are: 2024-07"):
        remove_tag(store, "stable")


@pytest.mark.parametrize(
    "name", ["", "12", "v12", ".", "..", ".hidden", "-1", "a/b", "../x", "a b", "é", "x\n", "a\0", "x" * 101, "_x"]
)
def test_other_texts_are_no_tags(store: LocalStore, name: str) -> None:
    before = hash_files(store.path)
    for change in (lambda: set_tag(store, name, 1), lambda: remove_tag(store, name)):
        with pytest.raises(InputError, match="tag is"):
            change()
    assert hash_files(store.path) == before


@given(
    names=st.sets(
        st.from_regex(r"[A-Za-z][A-Za-z0-9._-]{0,20}", fullmatch=True).filter(lambda n: n[1:].strip("0123456789")),
        max_size=5,
    )
)
@settings(max_examples=20)
def test_every_tag_finds_its_version(history: Path, tmp_path_factory: pytest.TempPathFactory, names: set[str]) -> None:
    folder = tmp_path_factory.mktemp("tags")
    shutil.copytree(history / "manifests", folder / "manifests")
    store = LocalStore(folder)
    expected = {name: place % 3 + 1 for place, name in enumerate(sorted(names))}
    for name, version in expected.items():
        set_tag(store, name, version)
    assert list_tags(store) == expected
    assert {name: find_version(store, name) for name in names} == expected


def test_only_a_committed_version_is_tagged(store: LocalStore) -> None:
    with pytest.raises(InputError, match="no version 4; its versions are: 1, 2, 3; its tags are: none"):
        set_tag(store, "next", 4)
    assert list_tags(store) == {}


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b'{"version": "1"}', b'{"version": true}', b"\xff", b"[" * 100_000]
)
def test_a_damaged_tag_is_named(store: LocalStore, content: bytes) -> None:
    set_tag(store, "good", 1)
    store.replace("tags/bad.json", content)
    for read in (lambda: list_tags(store), lambda: find_version(store, "bad"), lambda: set_tag(store, "bad", 1)):
        with pytest.raises(BankFormatError, match=r"tags/bad\.json is damaged"):
            read()
    assert find_version(store, "good") == 1
    set_tag(store, "bad", 2, move=True)
    assert list_tags(store) == {"bad": 2, "good": 1}


def test_versions_are_found_as_they_are_written(store: LocalStore) -> None:
    set_tag(store, "stable", 2)
    cases = {None: None, 2: 2, "2": 2, "v3": 3, "0003": 3, "stable": 2, "-0": 3, "-1": 2, -2: 1}
    assert {text: find_version(store, text) for text in cases} == cases
    store.remove(["manifests/00000002.json"])
    assert find_version(store, "-1") == 1
    for text in ("2", "v2", "stable", "-2", "4", "0", "unknown", "", "9" * 50, "-" + "9" * 50, "../x", "--1", "1.0"):
        with pytest.raises(InputError, match="its versions are: 1, 3; its tags are: stable"):
            find_version(store, text)


# The log.


def test_the_log_says_what_each_version_did(store: LocalStore) -> None:
    set_tag(store, "stable", 2)
    first, second, third = describe_versions(store)
    assert [(row.version, row.parent, row.operation, row.tags) for row in (first, second, third)] == [
        (1, None, "build", []),
        (2, 1, "update", ["stable"]),
        (3, 2, "delete", []),
    ]
    assert second.changes["documents"] == {"added": 1, "changed": 1, "removed": 2, "unchanged": 10, "chunked": 1}
    seen: set[str] = set()
    for row in (first, second, third):
        bank = Bank.open(store, row.version)
        paths = {file.path for file in bank.manifest.files}
        assert row.size_bytes == sum((store.path / path).stat().st_size for path in paths)
        assert row.new_size_bytes == sum((store.path / path).stat().st_size for path in paths - seen)
        assert row.num_documents == len(bank.read_table("documents"))
        assert row.num_references == len(list_live(bank))
        seen |= paths
    assert first.size_bytes == first.new_size_bytes > second.new_size_bytes > 0


def test_a_log_needs_a_bank(tmp_path: Path) -> None:
    with pytest.raises(BankFormatError, match="does not exist"):
        describe_versions(LocalStore(tmp_path / "none"))


# Differences.


def list_live(bank: Bank) -> set[str]:
    dropped = set(bank.read_dropped_ids().to_pylist())
    return set(bank.read_table("references", ["ref_id"])["ref_id"].to_pylist()) - dropped


def check_difference(before: Bank, after: Bank) -> None:
    """Compares a difference with one computed row by row."""
    found = compare_versions(before, after)
    old, new = (
        {row["doc_id"]: row["content_hash"] for row in bank.read_table("documents").to_pylist()}
        for bank in (before, after)
    )
    assert found.documents_added.to_pylist() == sorted(new.keys() - old.keys())
    assert found.documents_removed.to_pylist() == sorted(old.keys() - new.keys())
    assert found.documents_changed.to_pylist() == sorted(key for key in old.keys() & new.keys() if old[key] != new[key])
    assert found.references_added.to_pylist() == sorted(list_live(after) - list_live(before))
    assert found.references_removed.to_pylist() == sorted(list_live(before) - list_live(after))
    paths = [{file.path for file in bank.manifest.files} for bank in (before, after)]
    assert {file.path for file in found.files_added} == paths[1] - paths[0]
    assert {file.path for file in found.files_removed} == paths[0] - paths[1]
    assert found.added_size_bytes == sum(file.size_bytes for file in after.manifest.files if file.path not in paths[0])


def test_real_versions_differ_as_their_rows_do(history: Path) -> None:
    banks = [Bank.open(history, version) for version in (1, 2, 3)]
    for before in banks:
        for after in banks:
            check_difference(before, after)
    found = compare_versions(banks[0], banks[1])
    assert found.documents_added.to_pylist() == ["renamed"]
    assert found.documents_changed.to_pylist() == ["topic/assert"]
    assert found.documents_removed.to_pylist() == ["topic/global", "topic/with"]
    assert len(found.references_added) > 0
    assert len(found.references_removed) > 0
    assert found.config == {}
    assert found.to_json()["documents"]["added"] == ["renamed"]
    assert compare_versions(banks[2], banks[2]).to_json() == {
        "before": 3,
        "after": 3,
        "documents": {"added": [], "changed": [], "removed": []},
        "references": {"added": 0, "removed": 0},
        "files": {"added": 0, "removed": 0},
        "added_size_bytes": 0,
        "removed_size_bytes": 0,
        "config": {},
        "fingerprint": [],
    }


def write_version(
    bank: Bank, number: int, documents: dict[int, int], dropped: list[set[int]], stored: list[set[int]]
) -> Bank:
    """Returns a version of a bank with tables of numbered documents and references in two segments."""
    tables = {f"r{part}/references": sorted(rows) for part, rows in enumerate(stored)}
    tables |= {"w/duplicates": sorted(dropped[0]), "w/tombstones": sorted(dropped[1])}
    columns = {"references": REFERENCES, "duplicates": DUPLICATES, "tombstones": TOMBSTONES}
    fillers = {pa.string(): "x", pa.int32(): 1, pa.float64(): 0.5, pa.int64(): 1}
    made = {}
    for name, rows in tables.items():
        schema = columns[name.split("/")[1]]
        values = [[f"{row:032x}" for row in rows], *([fillers.get(t, [1]) for _ in rows] for t in schema.types[1:])]
        made[name] = pa.table(values, schema=schema)
    texts = [
        [f"d{key}" for key in documents],
        ["s" for _ in documents],
        ["p" for _ in documents],
        [1 for _ in documents],
    ]
    texts += [[f"h{value}" for value in documents.values()], *([1 for _ in documents] for _ in range(3))]
    made["w/documents"] = pa.table([*texts, *(["" for _ in documents] for _ in range(2))], schema=DOCUMENTS)
    files = []
    for name, table in made.items():
        path = bank.store.scratch / "segments" / f"{number}{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(table, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        place = path.relative_to(bank.store.scratch).as_posix()
        files.append(
            FileEntry(kind=path.stem, path=place, size_bytes=path.stat().st_size, sha256=digest, num_rows=len(table))
        )
    return Bank(bank.store, dataclasses.replace(bank.manifest, version=number, files=files))


VERSION = st.tuples(
    st.dictionaries(st.integers(0, 9), st.integers(0, 2)),
    st.lists(st.sets(st.integers(0, 15)), min_size=2, max_size=2),
    st.lists(st.sets(st.integers(0, 15)), min_size=2, max_size=2).map(lambda sets: [sets[0], sets[1] - sets[0]]),
)


@given(first=VERSION, second=VERSION)
@settings(max_examples=20)
def test_any_versions_differ_as_their_rows_do(
    history: Path,
    tmp_path_factory: pytest.TempPathFactory,
    first: tuple[dict[int, int], list[set[int]], list[set[int]]],
    second: tuple[dict[int, int], list[set[int]], list[set[int]]],
) -> None:
    bank = Bank(tmp_path_factory.mktemp("random"), Bank.open(history).manifest)
    before, after = (write_version(bank, number, *made) for number, made in ((1, first), (2, second)))
    check_difference(before, after)
    check_difference(after, before)


def test_settings_and_models_that_differ_are_named(history: Path) -> None:
    bank = Bank.open(history)
    config = {**bank.manifest.config, "corpus": ["elsewhere"], "extra": {"deep": {"value": 1}}}
    config["chunking"] = {**config["chunking"], "max_tokens": 77}
    fingerprint = dataclasses.replace(bank.manifest.fingerprint, weights="other")
    changed = dataclasses.replace(bank.manifest, config=config, fingerprint=fingerprint, embedder_id="other")
    found = compare_versions(bank, Bank(bank.store, changed))
    assert found.config == {
        "chunking.max_tokens": (bank.manifest.config["chunking"]["max_tokens"], 77),
        "corpus": (bank.manifest.config["corpus"], ["elsewhere"]),
        "extra.deep.value": (None, 1),
    }
    assert found.fingerprint == ["weights", "embedder"]


# The way back.


def test_a_rollback_is_a_version_with_old_files(store: LocalStore) -> None:
    before = hash_files(store.path)
    manifest = roll_back(store, 1)
    old, new = Bank.open(store, 1), Bank.open(store)
    assert new.manifest == manifest
    assert (manifest.version, manifest.parent, manifest.operation) == (4, 3, "rollback")
    assert manifest.counts == {**old.manifest.counts, "changes": {"restored_version": 1}}
    for name in ("files", "config", "build_id", "fingerprint", "layout", "cold"):
        assert getattr(manifest, name) == getattr(old.manifest, name)
    difference = compare_versions(old, new).to_json()
    assert difference["documents"] == {"added": [], "changed": [], "removed": []}
    assert difference["files"] == {"added": 0, "removed": 0}
    assert difference["references"] == {"added": 0, "removed": 0}
    after = hash_files(store.path)
    assert after.keys() - before.keys() == {"manifests/00000004.json"}
    assert before.items() <= after.items()
    roll_back(store, 3)
    assert Bank.open(store).manifest.files == Bank.open(store, 3).manifest.files


def test_an_update_goes_on_from_a_rollback(store: LocalStore) -> None:
    roll_back(store, 1)
    updated = update(store, None, ENGINE, Steps())
    assert updated["counts"]["changes"]["documents"]["changed"] == 1
    difference = compare_versions(Bank.open(store, 2), Bank.open(store)).to_json()
    assert difference["documents"] == {"added": [], "changed": [], "removed": []}
    assert difference["references"] == {"added": 0, "removed": 0}


def test_a_rollback_that_cannot_be_is_refused(store: LocalStore) -> None:
    with pytest.raises(InputError, match="version 3 is the newest"):
        roll_back(store, 3)
    with pytest.raises(BankFormatError, match="no version 9"):
        roll_back(store, 9)
    with lock_bank(store), pytest.raises(ConflictError):
        roll_back(store, 1)
    gone = Bank.open(store, 1).manifest.list_files("occurrences")[0]
    content = store.read(gone.path)
    store.replace(gone.path, content[:-1])
    with pytest.raises(BankFormatError, match=rf"{gone.path} has {len(content) - 1} bytes instead of {len(content)}"):
        roll_back(store, 1)
    store.remove([gone.path])
    with pytest.raises(BankFormatError, match=rf"{gone.path} is missing"):
        roll_back(store, 1)
    assert list_versions(store) == [1, 2, 3]
    roll_back(store, 2)
    missing = store.path.parent / "none"
    with pytest.raises(BankFormatError, match="does not exist"):
        roll_back(LocalStore(missing), 1)
    assert not missing.exists()
