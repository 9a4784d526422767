"""A sentence that stands nowhere else: added, found, read, deleted, and after a purge in no byte of the bank."""

import contextlib
import dataclasses
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows import purging
from flows.building import build, update
from flows.compacting import is_compact
from flows.deleting import delete_documents
from flows.drafting import read_settings
from flows.purging import NotForgottenError, PurgeResult, purge_bank
from flows.steps import Steps
from flows.verifying import verify_bank
from model.embedding import load_embedder
from model.fetching import BankMemories
from model.generating import GenerationConfig, Generator
from model.loading import load_writer
from model.retrieving import Retriever
from schemas.bank import Bank
from schemas.codec_names import DEFAULT_CODEC
from schemas.errors import InputError
from schemas.manifest import list_versions
from schemas.stores import LocalStore
from schemas.tags import list_tags, set_tag
from tests.bank_contents import assert_equal_banks, list_live, read_memories
from tests.test_equality import make_config, write_corpus

RARE_WORDS = ("Zyxquilla", "ombrothaw", "quandaryfish", "wexborough", "gramophone")

SENTENCE = (
    "Zyxquilla murmured to the ombrothaw that every quandaryfish of wexborough keeps a velvet gramophone under the "
    "staircase, wound up on Thursdays."
)

OTHERS = {"assert": topics["assert"], "pass": topics["pass"], "global": topics["global"]}
SECRET = "mail-17-of-the-keeper"
WITH_SECRET = {**OTHERS, SECRET: SENTENCE}

Found = dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class Secret:
    """The sentence's reference, and every kind of bytes that only it has."""

    ref_id: str
    needles: dict[str, list[bytes]]


def list_contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yields every file's bytes, and those of every column of every table as it is when it is decoded."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        yield name, path.read_bytes()
        if path.suffix == ".parquet":
            for column in pq.read_table(path).columns:
                for chunk in column.chunks:
                    yield name, decode(chunk)


def decode(values: pa.Array) -> bytes:
    if pa.types.is_string(values.type):
        return "\0".join(value or "" for value in values.to_pylist()).encode()
    if pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    return values.drop_null().to_numpy(zero_copy_only=False).tobytes()  # type: ignore[no-any-return]


def find_traces(folder: Path, secret: Secret) -> Found:
    """Returns the kinds of needles that some file holds, and which files."""
    found: Found = {}
    for name, content in list_contents(folder):
        for kind, needles in secret.needles.items():
            if any(needle in content for needle in needles):
                found.setdefault(kind, []).append(name)
    return found


def describe_secret(bank: Bank) -> Secret:
    """Collects what a version that has the sentence holds of it, by the plainest means."""
    (occurrence,) = [row for row in bank.read_table("occurrences").to_pylist() if row["doc_id"] == SECRET]
    ref_id = occurrence["ref_id"]
    document = next(row for row in bank.read_table("documents").to_pylist() if row["doc_id"] == SECRET)

    def read_row(kind: str) -> dict[str, Any]:
        row: dict[str, Any] = next(row for row in bank.read_table(kind).to_pylist() if row["ref_id"] == ref_id)
        return row

    reference = read_row("references")
    assert reference["text"] == SENTENCE
    needles = {
        "text": [SENTENCE.encode(), *(word.encode() for word in RARE_WORDS)],
        "tokens": [np.array(reference["token_ids"], np.int32).tobytes()],
        "embedding": [np.array(read_row("embeddings")["vector"], np.float32).tobytes()],
        "signature": [np.array(read_row("signatures")["signature"], np.uint32).tobytes()],
        "id": [ref_id.encode(), bytes.fromhex(ref_id)],
        "document": [SECRET.encode(), document["content_hash"].encode()],
    }
    return Secret(ref_id=ref_id, needles=needles)


def cut_memory(bank: Bank, ref_id: str, record: np.ndarray, others: bytes) -> list[bytes]:
    """Returns the vectors of a memory that no other memory has: those of its first layers may depend on one token."""
    layout = bank.manifest.layout
    vectors = record[: layout.payload_bytes].reshape(-1, layout.payload_bytes // np.prod(layout.payload_shape[:-1]))
    own = [vector.tobytes() for vector in vectors if vector.any() and vector.tobytes() not in others]
    assert len(own) > len(vectors) / 2
    return own


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Secret]:
    """A bank that the sentence came to with an update, with tags and checks."""
    folder = tmp_path_factory.mktemp("told")
    store = LocalStore(folder / "bank")
    build(store, [str(write_corpus(folder, OTHERS))], make_config({}), Steps())
    set_tag(store, "before", 1)
    write_corpus(folder, WITH_SECRET)
    update(store, None, {}, Steps())
    set_tag(store, "told", 2)
    bank = Bank.open(store)
    verify_bank(bank, deep=False)
    secret = describe_secret(bank)
    records = read_memories(bank, list_live(bank))
    record = records.pop(secret.ref_id)
    others = b"".join(other.tobytes() for other in records.values())
    secret.needles["memory"] = cut_memory(bank, secret.ref_id, record, others)
    return store.path, secret


@pytest.fixture
def store(told: tuple[Path, Secret], tmp_path: Path) -> LocalStore:
    shutil.copytree(told[0], tmp_path / "bank")
    return LocalStore(tmp_path / "bank")


@pytest.fixture
def secret(told: tuple[Path, Secret]) -> Secret:
    return told[1]


def assert_sound(bank: Bank) -> None:
    assert [check for check in verify_bank(bank, deep=True) if not check.passed] == []


def list_names(store: LocalStore) -> set[str]:
    return {path.relative_to(store.path).as_posix() for path in store.path.rglob("*") if path.is_file()}


def assert_forgotten(store: LocalStore, secret: Secret, result: PurgeResult) -> None:
    """Checks that nothing is left but one version, whole, and none of the needles."""
    assert find_traces(store.path, secret) == {}
    assert list_versions(store) == [result.version]
    bank = Bank.open(store)
    expected = {f"manifests/{result.version:08d}.json", "work/LOCK", *(file.path for file in bank.manifest.files)}
    assert expected <= list_names(store) <= expected | {f"checks/{result.version:08d}.json"}
    assert result.num_files >= len(list_names(store))
    assert result.searched_bytes >= sum(len(content) for content in map(store.read, list_names(store)))
    assert is_compact(bank)


def test_a_sentence_is_found_read_deleted_and_forgotten(store: LocalStore, secret: Secret, tmp_path: Path) -> None:
    embedder, writer = load_embedder("static"), load_writer(codec=DEFAULT_CODEC)
    bank = Bank.open(store)
    assert Retriever(bank, embedder).search([SENTENCE], 1)[0][0].ref_id == secret.ref_id

    def generate(version: Bank) -> dict[str, float]:
        """Returns the attention that each memory got from the chunk of a prompt about the sentence."""
        generator = Generator(writer.checkpoint, Retriever(version, embedder), BankMemories(version, writer))
        assert list(generator.generate(SENTENCE[:70], GenerationConfig(max_new_tokens=4)))
        trace = generator.traces[0]
        return {hit.ref_id: share for hit, share in zip(trace.hits, trace.attention, strict=True)}

    attention = generate(bank)
    assert next(iter(attention)) == secret.ref_id
    assert attention[secret.ref_id] > 0

    delete_documents(store, [SECRET])
    deleted = Bank.open(store)
    assert secret.ref_id not in generate(deleted)
    assert {hit.ref_id for hit in Retriever(deleted, embedder).search([SENTENCE], 100)[0]} == list_live(deleted)
    # The files still hold all of it: the search below can find what is there.
    assert set(find_traces(store.path, secret)) == set(secret.needles)

    result = purge_bank(store, [])
    assert (result.version, result.removed_versions, result.removed_tags) == (4, [1, 2, 3], ["before", "told"])
    assert (result.num_forgotten, result.num_standing) == (1, 0)
    assert result.freed_bytes > 0
    assert_forgotten(store, secret, result)
    assert list_tags(store) == {}

    left = Bank.open(store)
    assert_sound(left)
    assert left.manifest.operation == "purge"
    assert secret.ref_id not in generate(left)
    (path,) = map(Path, left.manifest.config["corpus"])
    content = path.read_bytes()
    try:
        write_corpus(path.parent, OTHERS)
        build(LocalStore(tmp_path / "fresh"), [str(path)], read_settings(left), Steps())
    finally:
        path.write_bytes(content)
    assert_equal_banks(left, Bank.open(tmp_path / "fresh"), same_corpus=False)


def test_a_document_is_deleted_and_purged_at_once(store: LocalStore, secret: Secret) -> None:
    # An unfinished update has left records with the text.
    (path,) = map(Path, Bank.open(store).manifest.config["corpus"])
    draft = store.path.parent / "draft"
    draft.mkdir()
    write_corpus(draft, {**WITH_SECRET, "more": SENTENCE + " And so on."})
    assert path.exists()
    update(store, [str(draft / "corpus.jsonl")], {}, Steps(), dry_run=True)
    assert any(name.startswith("work/") for name in find_traces(store.path, secret)["text"])
    result = purge_bank(store, [SECRET])
    assert_forgotten(store, secret, result)
    again = purge_bank(store, [])
    assert (again.version, again.removed_versions, again.freed_bytes, again.num_forgotten) == (4, [], 0, 0)


def test_an_unknown_document_is_refused(store: LocalStore) -> None:
    before = list_names(store)
    for ids in (["nobody"], [SECRET, "nobody"]):
        with pytest.raises(InputError, match="no version of bank .* has a document 'nobody'"):
            purge_bank(store, ids)
    assert list_names(store) == before
    purge_bank(store, [SECRET])
    with pytest.raises(InputError, match="if an earlier purge was cut short, run it again without --document"):
        purge_bank(store, [SECRET])


def plant(store: LocalStore, secret: Secret) -> Iterator[tuple[str, bytes]]:
    """Yields copies of what is to be forgotten, each with the name of a file that gc leaves alone."""
    bank = Bank.open(store, 2)
    file = next(file for file in bank.manifest.list_files("references") if is_newest(bank, file.path))
    yield "notes/old.parquet", store.read(file.path)
    for kind, name in (("embeddings", "vectors.parquet"), ("shard", "shard.safetensors"), ("index", "index.faiss")):
        copied = next(file for file in bank.manifest.list_files(kind) if is_newest(bank, file.path))
        yield f"notes/{name}", store.read(copied.path)
    record = read_memories(bank, {secret.ref_id})[secret.ref_id]
    yield "notes/record.bin", b"some bytes" + record.tobytes()
    yield "notes/payload.bin", record[: bank.manifest.layout.payload_bytes].tobytes()
    yield "letter.txt", b"As I said: " + SENTENCE.encode()
    yield "tags/ids.txt", b'["%s"]' % secret.ref_id.encode()
    yield "notes/signature.bin", secret.needles["signature"][0]


def is_newest(bank: Bank, path: str) -> bool:
    """Tells whether a file is in the segment that the update has brought."""
    return not any(path == file.path for file in Bank.open(bank.store, 1).manifest.files)


def test_a_copy_somewhere_in_the_bank_is_found(store: LocalStore, secret: Secret) -> None:
    """The proof can fail: and as long as it does, the versions stay by which it is made."""
    copies = dict(plant(store, secret))
    assert len(copies) == 9
    delete_documents(store, [SECRET])
    for name, content in copies.items():
        (store.path / name).parent.mkdir(exist_ok=True)
        (store.path / name).write_bytes(content)
        with pytest.raises(NotForgottenError, match=rf"/{name} still holds \d+ traces .* move it away"):
            purge_bank(store, [])
        assert list_versions(store)[:3] == [1, 2, 3]
        (store.path / name).unlink()
    result = purge_bank(store, [])
    (store.path / "notes").rmdir()
    assert_forgotten(store, secret, result)


def test_a_version_that_was_not_rewritten_is_found(
    store: LocalStore, secret: Secret, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purging, "is_compact", lambda _: True)
    with pytest.raises(NotForgottenError, match=r"/segments/\w+/\w+.\w+ still holds .*: report it"):
        purge_bank(store, [SECRET])
    monkeypatch.undo()
    assert_forgotten(store, secret, purge_bank(store, []))


BREAKS = (
    ("commit_compacted", True),
    ("remove_tag", False),
    ("keep_only", False),
    ("_search", True),
    ("remove_collected", False),
    ("remove_collected", True),
)
"""Parts of a purge, and whether the break is after it or before."""


@pytest.mark.parametrize(("part", "is_done"), BREAKS)
def test_a_purge_that_was_cut_short_is_begun_again(
    part: str, is_done: bool, store: LocalStore, secret: Secret, monkeypatch: pytest.MonkeyPatch
) -> None:
    do: Callable[..., Any] = getattr(purging, part)

    def stop(*arguments: Any, **options: Any) -> None:
        if is_done:
            do(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(purging, part, stop)
    with pytest.raises(KeyboardInterrupt):
        purge_bank(store, [SECRET])
    monkeypatch.undo()
    bank = Bank.open(store)
    assert secret.ref_id not in list_live(bank)
    assert [check for check in verify_bank(bank, deep=False) if not check.passed] == []
    result = purge_bank(store, [SECRET])
    # What there is to look for is known until the older versions are gone.
    assert result.num_forgotten == (0 if (part, is_done) == ("remove_collected", True) else 1)
    assert result.version == 4
    assert_forgotten(store, secret, result)


# Banks of another kind ------------------------------------------------------------------------------------------------


def build_cold(folder: Path, documents: dict[str, str], changes: dict[str, Any]) -> LocalStore:
    store = LocalStore(folder / "bank")
    config = make_config({"memory": {"cold": True}, **changes})
    build(store, [str(write_corpus(folder, documents))], config, Steps())
    return store


def test_a_cold_bank_forgets_what_was_encoded_when_it_was_retrieved(tmp_path: Path) -> None:
    store = build_cold(tmp_path, WITH_SECRET, {})
    bank = Bank.open(store)
    secret = describe_secret(bank)
    memories = BankMemories(bank, load_writer(codec=DEFAULT_CODEC))
    other = min(list_live(bank) - {secret.ref_id})
    records = memories.fetch_records([secret.ref_id, other])
    secret.needles["memory"] = cut_memory(bank, secret.ref_id, records[0], records[1].tobytes())
    delete_documents(store, [SECRET])
    assert set(find_traces(store.path, secret)) == set(secret.needles)
    # The reader is open all the while.
    result = purge_bank(store, [])
    assert find_traces(store.path, secret) == {}
    assert result.num_forgotten == 1
    assert_sound(Bank.open(store))
    # What stays is still in the cache.
    reader = BankMemories(Bank.open(store), load_writer(codec=DEFAULT_CODEC))
    assert np.array_equal(reader.fetch_records([other]), records[1:])
    assert (reader.statistics.num_read, reader.statistics.num_encoded) == (1, 0)


def test_a_cold_store_that_keeps_a_memory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = build_cold(tmp_path, WITH_SECRET, {})
    bank = Bank.open(store)
    secret = describe_secret(bank)
    BankMemories(bank, load_writer(codec=DEFAULT_CODEC)).fetch_records([secret.ref_id])
    (path,) = (store.path / "cold").glob("*.sqlite")

    def rename(*_: Any) -> None:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("UPDATE records SET ref_id = 'x'")
            connection.commit()
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # Whether its name is there or nothing but the bytes of the record.
    for neglect, what in ((lambda *_: None, "id"), (rename, "memory")):
        monkeypatch.setattr(purging, "keep_only", neglect)
        with pytest.raises(NotForgottenError, match=rf"/cold/\w+.sqlite still holds .* {what}"):
            purge_bank(store, [SECRET])
    assert secret.ref_id.encode() not in path.read_bytes()
    monkeypatch.undo()
    purge_bank(store, [])
    assert find_traces(store.path, secret) == {}


def test_a_text_that_is_part_of_another_document_stays_there(tmp_path: Path) -> None:
    quote = "It is told in the village: " + SENTENCE + " Nobody knows why."
    store = build_cold(tmp_path, {**OTHERS, "quote": quote, SECRET: SENTENCE}, {"deduplication": {"enabled": False}})
    result = purge_bank(store, [SECRET])
    assert (result.num_forgotten, result.num_standing) == (1, 1)
    texts = Bank.open(store).read_table("references")["text"].to_pylist()
    assert SENTENCE not in texts
    assert any(SENTENCE in text for text in texts)
    assert_sound(Bank.open(store))


def test_a_purge_of_a_bank_that_has_nothing_to_forget_leaves_it_as_it_is(tmp_path: Path) -> None:
    store = build_cold(tmp_path, OTHERS, {})
    before = {name: store.read(name) for name in list_names(store)}
    result = purge_bank(store, [])
    assert (result.version, result.removed_versions, result.num_forgotten, result.freed_bytes) == (1, [], 0, 0)
    assert {name: store.read(name) for name in list_names(store)} == before


def test_what_documents_were_before_they_grew_is_told_from_what_they_are(tmp_path: Path) -> None:
    """A memory of a text that goes on has the same key-values, in other places."""
    names = ("async", "attribute-access", "augassign")
    path = write_corpus(tmp_path, {name: topics[name][:300] for name in names})
    store = LocalStore(tmp_path / "bank")
    build(store, [str(path)], make_config({}), Steps())
    write_corpus(tmp_path, {name: topics[name][:900] for name in names})
    update(store, None, {}, Steps())
    result = purge_bank(store, [])
    assert (result.version, result.num_forgotten) == (3, len(names))
    assert_sound(Bank.open(store))
