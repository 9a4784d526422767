"""Versions of a bank: manifests and their exact text, exclusive commits, files that are whole, opening for reading."""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.atomic import replace_atomically, write_bytes_atomically
from schemas.bank import Bank
from schemas.errors import BankFormatError, ConflictError
from schemas.identifiers import hash_json
from schemas.manifest import (
    FileEntry,
    Manifest,
    commit_manifest,
    list_versions,
    make_manifest_name,
    read_manifest,
)
from schemas.protocols import Fingerprint
from schemas.records import RecordLayout
from schemas.tables import REFERENCES, write_table

MANIFEST = Manifest(
    version=2,
    parent=1,
    operation="build",
    created_at="2024-07-01T00:00:00+00:00",
    config={"corpus": ["bücher.jsonl"], "chunking": {"max_tokens": 128}},
    build_id="b" * 32,
    files=[
        FileEntry(kind="shard", path="segments/s1/shard-1.safetensors", size_bytes=440, sha256="e" * 64, num_rows=2),
        FileEntry(kind="shard", path="segments/s1/shard-0.safetensors", size_bytes=440, sha256="d" * 64, num_rows=2),
        FileEntry(kind="references", path="segments/s1/references.parquet", size_bytes=9, sha256="c" * 64, num_rows=4),
    ],
    counts={"references": {"read": 5, "kept": 4, "dropped": {"near_duplicate": 1}}},
    seconds={"read": 0.25},
    fingerprint=Fingerprint(
        weights="w" * 64,
        tokenizer="t" * 32,
        architecture={"model_type": "llama", "head_dim": 4},
        rope={"rope_type": "default", "rope_theta": 10000.0},
        prefix_token_ids=[1, 7],
        memory_layers=[0],
        selection={"num_slots": 2, "score": "softmax"},
        compute_dtype="float32",
        storage={"dtype": "bfloat16"},
    ),
    embedder_id="static:0",
    layout=RecordLayout(num_layers=1, num_kv_heads=1, num_slots=2, head_dim=4),
)

GOLDEN = """{
 "build_id": "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
 "cold": false,
 "config": {
  "chunking": {
   "max_tokens": 128
  },
  "corpus": [
   "bücher.jsonl"
  ]
 },
 "counts": {
  "references": {
   "dropped": {
    "near_duplicate": 1
   },
   "kept": 4,
   "read": 5
  }
 },
 "created_at": "2024-07-01T00:00:00+00:00",
 "digest": "d4a3299a846a313f2e4dcc14934509c5",
 "embedder_id": "static:0",
 "files": [
  {
   "kind": "shard",
   "num_rows": 2,
   "path": "segments/s1/shard-1.safetensors",
   "sha256": "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee",
   "size_bytes": 440
  },
  {
   "kind": "shard",
   "num_rows": 2,
   "path": "segments/s1/shard-0.safetensors",
   "sha256": "dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd",
   "size_bytes": 440
  },
  {
   "kind": "references",
   "num_rows": 4,
   "path": "segments/s1/references.parquet",
   "sha256": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
   "size_bytes": 9
  }
 ],
 "fingerprint": {
  "architecture": {
   "head_dim": 4,
   "model_type": "llama"
  },
  "compute_dtype": "float32",
  "memory_layers": [
   0
  ],
  "prefix_token_ids": [
   1,
   7
  ],
  "rope": {
   "rope_theta": 10000.0,
   "rope_type": "default"
  },
  "selection": {
   "num_slots": 2,
   "score": "softmax"
  },
  "storage": {
   "dtype": "bfloat16"
  },
  "tokenizer": "tttttttttttttttttttttttttttttttt",
  "weights": "wwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwww"
 },
 "format": 3,
 "layout": {
  "codec": "none",
  "dtype": "bfloat16",
  "head_dim": 4,
  "num_kv_heads": 1,
  "num_layers": 1,
  "num_slots": 2
 },
 "operation": "build",
 "parent": 1,
 "seconds": {
  "read": 0.25
 },
 "version": 2
}
"""


def seal(value: dict[str, Any]) -> str:
    """Returns a changed manifest as who wants to be believed would write it: with the digest that fits."""
    value.pop("digest", None)
    return json.dumps({**value, "digest": hash_json(value)})


# The text of a manifest -----------------------------------------------------------------------------------------------


def test_a_manifest_has_exactly_the_golden_text() -> None:
    assert MANIFEST.to_json() == GOLDEN


def test_the_golden_text_is_read(tmp_path: Path) -> None:
    assert Manifest.from_json(GOLDEN, origin="golden") == MANIFEST
    path = tmp_path / make_manifest_name(2)
    path.parent.mkdir()
    path.write_text(GOLDEN, encoding="utf-8")
    assert read_manifest(tmp_path, 2) == MANIFEST


def test_every_field_survives_a_commit(tmp_path: Path) -> None:
    changed = dataclasses.replace(MANIFEST, cold=True, parent=None, files=[], version=12)
    commit_manifest(tmp_path, changed)
    assert read_manifest(tmp_path, 12) == changed
    assert [path.name for path in (tmp_path / "manifests").iterdir()] == ["00000012.json"]


def test_files_of_a_kind_are_listed_by_path() -> None:
    names = [file.path for file in MANIFEST.list_files("shard")]
    assert names == ["segments/s1/shard-0.safetensors", "segments/s1/shard-1.safetensors"]
    assert MANIFEST.list_files("index") == []


@pytest.mark.parametrize(
    "key",
    [field.name for field in dataclasses.fields(Manifest) if field.name != "cold"] + ["format", "digest"],
)
def test_a_missing_key_is_damage(key: str) -> None:
    value = json.loads(GOLDEN)
    del value[key]
    with pytest.raises(BankFormatError, match="some/manifest.json"):
        Manifest.from_json(json.dumps(value), origin="some/manifest.json")


@pytest.mark.parametrize("part", [[], ["fingerprint"], ["files", 0], ["layout"]])
def test_an_unknown_key_is_damage(part: list[Any]) -> None:
    value = json.loads(GOLDEN)
    place = value
    for step in part:
        place = place[step]
    place["novelty"] = 1
    with pytest.raises(BankFormatError, match="novelty"):
        Manifest.from_json(seal(value), origin="some/manifest.json")


@pytest.mark.parametrize("version", [4, 0, None, "1"])
def test_another_format_is_refused(version: Any) -> None:
    text = json.dumps({**json.loads(GOLDEN), "format": version})
    with pytest.raises(BankFormatError, match=f"some.json has format {version}, this release reads 3; update memory3"):
        Manifest.from_json(text, origin="some.json")


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_format_is_to_be_built_again(version: int) -> None:
    text = json.dumps({**json.loads(GOLDEN), "format": version})
    with pytest.raises(BankFormatError, match=f"has format {version}, this release reads 3; build the bank again"):
        Manifest.from_json(text, origin="some.json")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '"text"',
        "{}",
        pytest.param("[" * 100_000, id="nested"),
    ],
)
def test_text_that_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(BankFormatError, match="some.json is not a manifest"):
        Manifest.from_json(text, origin="some.json")


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("files", None),
        ("files", ["a path"]),
        ("files", [{"kind": "shard"}]),
        ("fingerprint", []),
        ("fingerprint", {"weights": "w"}),
        ("layout", None),
        ("layout", {"num_layers": 0}),
        ("version", "2"),
        ("version", True),
        ("version", 0),
        ("parent", 2),
        ("parent", 0),
        ("parent", -1),
        ("cold", "no"),
        ("counts", {"references": {"kept": -1}}),
        ("counts", {"references": {"dropped": {"near_duplicate": -3}}}),
        ("counts", {"references": {"kept": 10**30}}),
        ("seconds", {"read": -0.5}),
    ],
)
def test_values_of_the_wrong_kind_are_damage(key: str, bad: Any) -> None:
    text = seal({**json.loads(GOLDEN), key: bad})
    with pytest.raises(BankFormatError, match="some.json is damaged"):
        Manifest.from_json(text, origin="some.json")


def make_entry(**changes: Any) -> FileEntry:
    values = {"kind": "shard", "path": "segments/s1/x", "size_bytes": 1, "sha256": "a" * 64, "num_rows": 1}
    return FileEntry(**{**values, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "../x"},
        {"path": 3},
        {"path": "manifests/00000001.json"},
        {"path": "segments/x"},
        {"path": "segments/s1/s2/x"},
        {"size_bytes": -1},
        {"size_bytes": 1.0},
        {"size_bytes": True},
        {"size_bytes": 1 << 63},
        {"num_rows": -1},
        {"num_rows": "1"},
        {"num_rows": None},
        {"kind": ""},
        {"kind": "../references"},
        {"kind": "a b"},
        {"kind": "x" * 65},
        {"kind": 1},
        {"sha256": ""},
        {"sha256": "A" * 64},
        {"sha256": "a" * 63},
        {"sha256": None},
    ],
)
def test_a_file_that_cannot_be_is_damage(changes: dict[str, Any]) -> None:
    value = json.loads(GOLDEN)
    value["files"][0].update(changes)
    with pytest.raises(BankFormatError, match="some.json is damaged"):
        Manifest.from_json(seal(value), origin="some.json")


@pytest.mark.parametrize("spelling", ["", "./", "segments/../", "segments//../"])
def test_a_file_that_is_named_twice_is_damage(spelling: str) -> None:
    value = json.loads(GOLDEN)
    value["files"].append({**value["files"][0], "path": spelling + value["files"][0]["path"]})
    with pytest.raises(BankFormatError, match="2 times|outside the bank"):
        Manifest.from_json(seal(value), origin="some.json")


@given(place=st.integers(0, len(GOLDEN.encode()) - 1), bit=st.integers(0, 7))
def test_no_flipped_bit_of_a_manifest_is_read(place: int, bit: int) -> None:
    content = bytearray(GOLDEN.encode())
    content[place] ^= 1 << bit
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return
    with contextlib.suppress(BankFormatError):
        assert Manifest.from_json(text, origin="some.json") == MANIFEST  # white space


def test_every_flipped_digit_of_a_manifest_is_noticed() -> None:
    for place, letter in enumerate(GOLDEN):
        if letter.isdigit():
            text = GOLDEN[:place] + str((int(letter) + 1) % 10) + GOLDEN[place + 1 :]
            with pytest.raises(BankFormatError, match="some.json"):
                Manifest.from_json(text, origin="some.json")


def test_half_a_letter_is_damage() -> None:
    with pytest.raises(BankFormatError, match="some.json is damaged"):
        Manifest.from_json(json.dumps({**json.loads(GOLDEN), "operation": "\ud800"}), origin="some.json")


def test_a_manifest_may_be_laid_out_otherwise() -> None:
    text = json.dumps(dict(reversed(json.loads(GOLDEN).items())))
    assert Manifest.from_json(text, origin="some.json") == MANIFEST


def test_a_huge_file_is_no_manifest(tmp_path: Path) -> None:
    path = tmp_path / make_manifest_name(2)
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(BankFormatError, match=r"00000002\.json has more than 67108864 bytes"):
        Bank.open(tmp_path)


@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "/etc/passwd", "a/..", "..", "", ".", "a\\b", "..\\x", "C:\\x", "//x", "a\0", "a\nb"]
)
def test_paths_outside_the_bank_are_refused(path: str) -> None:
    with pytest.raises(BankFormatError, match="outside the bank"):
        make_entry(path=path)


@pytest.mark.parametrize("path", ["x", "a/b", "a/..b", "a b/ü", "./a"])
def test_paths_inside_the_bank_are_taken(path: str) -> None:
    assert make_entry(path=path).path == path


def test_fingerprints_say_in_what_they_differ() -> None:
    first = MANIFEST.fingerprint
    assert first.list_differences(dataclasses.replace(first)) == []
    second = dataclasses.replace(first, rope={"rope_theta": 5e5}, prefix_token_ids=[1])
    assert first.list_differences(second) == ["rope", "prefix_token_ids"]
    assert first.digest != second.digest
    assert first.digest == Manifest.from_json(GOLDEN, origin="").fingerprint.digest


# Commits --------------------------------------------------------------------------------------------------------------

NUM_ROUNDS = 20


def commit_rounds(bank: Path, name: str, barrier: Barrier, outcomes: Any) -> None:
    for version in range(1, NUM_ROUNDS + 1):
        manifest = dataclasses.replace(MANIFEST, version=version, parent=None, operation=name)
        barrier.wait(60)
        try:
            commit_manifest(bank, manifest)
        except ConflictError as error:
            outcomes.put((version, name, str(error)))
        else:
            outcomes.put((version, name, "won"))


def test_of_two_processes_exactly_one_commits_a_version(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier, outcomes = spawn.Barrier(2), spawn.Queue()
    processes = [
        spawn.Process(target=commit_rounds, args=(tmp_path, name, barrier, outcomes)) for name in ("build", "update")
    ]
    for process in processes:
        process.start()
    found = [outcomes.get(timeout=120) for _ in range(2 * NUM_ROUNDS)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert list_versions(tmp_path) == list(range(1, NUM_ROUNDS + 1))
    for version in range(1, NUM_ROUNDS + 1):
        of_version = {name: outcome for number, name, outcome in found if number == version}
        assert sorted(of_version) == ["build", "update"]
        winner = read_manifest(tmp_path, version).operation
        assert of_version.pop(winner) == "won"
        assert f"version {version} " in next(iter(of_version.values()))
    assert len(list((tmp_path / "manifests").iterdir())) == NUM_ROUNDS


def test_of_two_threads_exactly_one_commits_a_version(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)
    outcomes: list[tuple[int, str, str]] = []

    def commit_all(name: str) -> None:
        for version in range(1, NUM_ROUNDS + 1):
            manifest = dataclasses.replace(MANIFEST, version=version, parent=None, operation=name)
            barrier.wait(60)
            try:
                commit_manifest(tmp_path, manifest)
            except (ConflictError, OSError) as error:
                outcomes.append((version, name, type(error).__name__))
            else:
                outcomes.append((version, name, "won"))

    threads = [threading.Thread(target=commit_all, args=(name,)) for name in ("build", "update")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    expected = []
    for version in range(1, NUM_ROUNDS + 1):
        winner = read_manifest(tmp_path, version).operation
        loser = "update" if winner == "build" else "build"
        expected += [(version, winner, "won"), (version, loser, "ConflictError")]
    assert sorted(outcomes) == sorted(expected)


def test_a_version_is_never_written_over(tmp_path: Path) -> None:
    commit_manifest(tmp_path, MANIFEST)
    with pytest.raises(ConflictError, match="version 2 of bank .* run again"):
        commit_manifest(tmp_path, dataclasses.replace(MANIFEST, operation="update"))
    assert read_manifest(tmp_path, 2) == MANIFEST
    assert len(list((tmp_path / "manifests").iterdir())) == 1


CRASHING_COMMIT = """
import os, sys
from pathlib import Path
from schemas.manifest import Manifest, commit_manifest

manifest = Manifest.from_json(sys.stdin.read(), origin="stdin")
place = {"before": (os, "link"), "after": (Path, "unlink")}[sys.argv[2]]
setattr(*place, lambda *arguments, **options: os._exit(9))
commit_manifest(Path(sys.argv[1]), manifest)
"""


def crash_while_committing(bank: Path, moment: str) -> None:
    """Commits in a process that dies just before, or just after, the manifest gets its final name."""
    command = [sys.executable, "-c", CRASHING_COMMIT, str(bank), moment]
    died = subprocess.run(command, input=GOLDEN, text=True, encoding="utf-8", timeout=120, check=False)
    assert died.returncode == 9


def test_a_crash_before_the_link_leaves_no_version(tmp_path: Path) -> None:
    crash_while_committing(tmp_path, "before")
    assert len(list((tmp_path / "manifests").iterdir())) == 1
    assert list_versions(tmp_path) == []
    with pytest.raises(BankFormatError, match="holds no committed version"):
        Bank.open(tmp_path)
    commit_manifest(tmp_path, MANIFEST)
    assert Bank.open(tmp_path).manifest == MANIFEST


def test_a_crash_after_the_link_leaves_the_version(tmp_path: Path) -> None:
    crash_while_committing(tmp_path, "after")
    assert list_versions(tmp_path) == [2]
    assert Bank.open(tmp_path).manifest == MANIFEST
    with pytest.raises(ConflictError):
        commit_manifest(tmp_path, dataclasses.replace(MANIFEST, operation="update"))
    assert Bank.open(tmp_path).manifest == MANIFEST


def test_what_a_crashed_process_of_equal_id_left_is_not_written_to(tmp_path: Path) -> None:
    """Process ids come again, and in containers that share a folder they are often the same."""
    crash_while_committing(tmp_path, "after")
    (left,) = (path for path in (tmp_path / "manifests").iterdir() if path.suffix == ".tmp")
    parts = left.name.split(".")
    left.rename(left.with_name(".".join([*parts[:-2], str(os.getpid()), parts[-1]])))
    with pytest.raises(ConflictError):
        commit_manifest(tmp_path, dataclasses.replace(MANIFEST, operation="update"))
    assert read_manifest(tmp_path, 2) == MANIFEST


# Opening --------------------------------------------------------------------------------------------------------------


def test_the_newest_version_is_opened_unless_another_is_named(tmp_path: Path) -> None:
    for version in (1, 2, 10):
        commit_manifest(tmp_path, dataclasses.replace(MANIFEST, version=version))
    assert list_versions(tmp_path) == [1, 2, 10]
    assert Bank.open(tmp_path).manifest.version == 10
    assert Bank.open(str(tmp_path), 2).manifest.version == 2
    with pytest.raises(BankFormatError, match="no version 3; its versions are: 1, 2, 10"):
        Bank.open(tmp_path, 3)


def test_an_opened_bank_keeps_its_version(tmp_path: Path) -> None:
    commit_manifest(tmp_path, MANIFEST)
    bank = Bank.open(tmp_path)
    commit_manifest(tmp_path, dataclasses.replace(MANIFEST, version=3))
    assert bank.manifest == MANIFEST


@pytest.mark.parametrize(("name", "message"), [("nowhere", "does not exist"), ("folder", "holds no committed version")])
def test_what_is_no_bank_is_not_opened(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder" / "manifests").mkdir(parents=True)
    (tmp_path / "folder" / "manifests" / "notes.json").write_text("{}")
    with pytest.raises(BankFormatError, match=f"{name} {message}.*memory3 build --corpus PATH --bank"):
        Bank.open(tmp_path / name)


def test_a_file_is_no_bank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(BankFormatError, match="file does not exist|no bank|not a bank|is a file"):
        Bank.open(tmp_path / "file")


@pytest.mark.parametrize("content", [b"{}", b"\xff\xfe", b"", b'{"format": 9}', GOLDEN.encode()[:-20]])
def test_a_foreign_manifest_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / make_manifest_name(1)
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(BankFormatError, match=r"00000001\.json"):
        Bank.open(tmp_path)


def test_a_manifest_under_another_versions_name_is_refused(tmp_path: Path) -> None:
    commit_manifest(tmp_path, MANIFEST)
    (tmp_path / make_manifest_name(2)).rename(tmp_path / make_manifest_name(3))
    with pytest.raises(BankFormatError, match=r"00000003\.json says it is version 2"):
        Bank.open(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "2.json.7.tmp",
        "latest.json",
        "-1.json",
        pytest.param("².json", id="superscript"),
        pytest.param("7.json", id="short"),
    ],
)
def test_stray_files_among_the_manifests_are_no_versions(tmp_path: Path, name: str) -> None:
    commit_manifest(tmp_path, MANIFEST)
    (tmp_path / "manifests" / name).write_text("{}")
    assert list_versions(tmp_path) == [2]
    assert Bank.open(tmp_path).manifest == MANIFEST


# Tables ---------------------------------------------------------------------------------------------------------------


def make_rows(numbers: range) -> pa.Table:
    columns = [
        [f"{number:032x}" for number in numbers],
        [f"text {number}" for number in numbers],
        [[number, number + 1] for number in numbers],
        [2 for _ in numbers],
    ]
    return pa.table(dict(zip(REFERENCES.names, columns, strict=True)), schema=REFERENCES)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    """A bank whose references 0..99 stand in three files."""
    files = []
    for part, numbers in enumerate((range(40), range(40, 41), range(41, 100))):
        path = tmp_path / "segments" / f"s{part}" / "references.parquet"
        path.parent.mkdir(parents=True)
        write_table(make_rows(numbers), path)
        relative = path.relative_to(tmp_path).as_posix()
        size_bytes = path.stat().st_size
        files.append(
            FileEntry(
                kind="references",
                path=relative,
                size_bytes=size_bytes,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                num_rows=len(numbers),
            )
        )
    commit_manifest(tmp_path, dataclasses.replace(MANIFEST, files=files[::-1]))
    return Bank.open(tmp_path)


def test_a_table_of_several_files_is_read_in_order(bank: Bank) -> None:
    assert bank.read_table("references").equals(pa.concat_tables([make_rows(range(100))]))
    assert bank.read_table("references", ["text"]).column_names == ["text"]


def test_references_come_in_the_order_asked_for_with_repeats(bank: Bank) -> None:
    numbers = [70, 3, 40, 3, 99, 70, 0]
    found = bank.read_references([f"{number:032x}" for number in numbers], ["num_tokens", "text"])
    assert found.column_names == ["ref_id", "num_tokens", "text"]
    assert found["text"].to_pylist() == [f"text {number}" for number in numbers]
    assert found["ref_id"].to_pylist() == [f"{number:032x}" for number in numbers]


def test_every_reference_can_be_read_and_none_be_asked_for(bank: Bank) -> None:
    everything = [f"{number:032x}" for number in reversed(range(100))]
    found = bank.read_references(everything, ["ref_id", "token_ids"])
    assert found.column_names == ["ref_id", "token_ids"]
    assert found["token_ids"].to_pylist() == [[number, number + 1] for number in reversed(range(100))]
    assert len(bank.read_references([], ["text"])) == 0


def test_an_unknown_reference_is_named(bank: Bank) -> None:
    with pytest.raises(BankFormatError, match=f"has no reference {'f' * 32}"):
        bank.read_references([f"{1:032x}", "f" * 32], ["text"])


def test_a_missing_file_is_named(bank: Bank) -> None:
    file = bank.manifest.list_files("references")[1]
    assert bank.locate(file) == Path(bank.url) / "segments" / "s1" / "references.parquet"
    bank.locate(file).unlink()
    for read in (
        lambda: bank.locate(file),
        lambda: bank.locate_all("references"),
        lambda: bank.read_table("references"),
        lambda: bank.read_references(["0"], ["text"]),
    ):
        with pytest.raises(BankFormatError, match=r"s1/references.parquet is missing"):
            read()


def test_a_table_the_version_does_not_have_is_named(bank: Bank) -> None:
    with pytest.raises(BankFormatError, match="version 2 of bank .* has no table 'duplicates'"):
        bank.read_table("duplicates")


DAMAGES = ("cut", "empty", "foreign", "overwritten", "page", "footer")


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {
        "cut": content[:middle],
        "empty": b"",
        "foreign": b"text, not a table",
        "overwritten": content[: middle - 200] + bytes(200) + content[middle:],
        "page": content[:30] + bytes(60) + content[90:],
        "footer": content[:-60] + b"\xff" * 52 + content[-8:],
    }
    path.write_bytes(damaged[how])


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_table_is_named(bank: Bank, how: str) -> None:
    damage(bank.locate_all("references")[2], how)
    with pytest.raises(BankFormatError, match="(?s)table 'references' of bank .* is damaged.*memory3 verify"):
        bank.read_table("references")


@pytest.mark.parametrize(
    "how",
    [
        "cut",
        "page",
        pytest.param("overwritten"),
        pytest.param("footer"),
    ],
)
def test_the_error_of_a_damaged_table_is_one_line(bank: Bank, how: str) -> None:
    damage(bank.locate_all("references")[2], how)
    with pytest.raises(BankFormatError) as caught:
        bank.read_table("references")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("how", DAMAGES)
def test_references_of_a_damaged_table_are_named(bank: Bank, how: str) -> None:
    damage(bank.locate_all("references")[0], how)
    with pytest.raises(BankFormatError, match="damaged"):
        bank.read_references([f"{0:032x}"], ["text"])


def test_references_of_a_version_without_the_table_are_refused(bank: Bank) -> None:
    empty = Bank(bank.url, dataclasses.replace(bank.manifest, files=[]))
    with pytest.raises(BankFormatError, match="has no table 'references'"):
        empty.read_references([f"{0:032x}"], ["text"])


def test_equal_tables_give_equal_bytes(tmp_path: Path) -> None:
    whole, parts = make_rows(range(100)), pa.concat_tables([make_rows(range(30)), make_rows(range(30, 100))])
    write_table(whole, tmp_path / "whole")
    write_table(parts, tmp_path / "parts")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    assert pq.read_table(tmp_path / "parts").schema.equals(REFERENCES)


# Whole files ----------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes_atomically(path, b"old")
    with replace_atomically(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert temporary.parent == path.parent
        assert temporary.suffix == ".tmp"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_who_has_the_old_file_open_reads_it_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old and long")
    with path.open("rb") as file:
        assert file.read(3) == b"old"
        write_bytes_atomically(path, b"new")
        assert file.read() == b" and long"
    assert path.read_bytes() == b"new"


def write_half_and_fail(path: Path, error: BaseException) -> None:
    with replace_atomically(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [b"old", None])
def test_an_error_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, before: bytes | None, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(error):
        write_half_and_fail(path, error())
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([] if before is None else [before])


def test_a_body_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), replace_atomically(path):
        pass
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom schemas.atomic import replace_atomically\n"
        "with replace_atomically(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half')\n    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == 9
    assert path.read_bytes() == b"old"
    write_bytes_atomically(path, b"new")
    assert path.read_bytes() == b"new"
