"""From corpus to bank with every real part: Prefect engine, Beam runner, shipped model, DuckDB, files on disk."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.config import load_config
from flows.showing import describe_reference
from flows.verifying import verify_bank
from pipelines.inspecting import open_views, run_query
from schemas.bank import Bank
from schemas.errors import BankError, BankFormatError, ConflictError, CorpusError, InputError, WrongModelError
from schemas.stores import LocalStore
from tests.corpora import make_documents, write_lines

CLI = (sys.executable, "-m", "flows.cli")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("corpus") / "docs.jsonl", make_documents())


@pytest.fixture(scope="module")
def bank(engine: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    from flows.build import build_bank

    folder = tmp_path_factory.mktemp("banks") / "bank"
    summary = build_bank([str(corpus)], str(folder))
    assert summary["version"] == 1
    assert not summary["unchanged"]
    return Bank.open(folder)


def hash_files(bank: Path) -> dict[str, str]:
    """SHA-256 by path of everything but manifests, results of checks and scratch."""
    files = [path for path in sorted(bank.rglob("*")) if path.is_file()]
    names = {str(path.relative_to(bank)): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in names.items()
        if not name.startswith(("manifests/", "checks/", "work/"))
    }


def count(bank: Bank, sql: str) -> int:
    return int(run_query(open_views(bank), sql).column(0)[0].as_py())


def test_read_equals_kept_plus_dropped_and_sql_agrees(bank: Bank) -> None:
    counts = bank.manifest.counts
    assert counts["documents"] == {"read": 14, "kept": 13, "dropped": {"empty": 1}}
    references = counts["references"]
    assert references["read"] == references["kept"] + sum(references["dropped"].values())
    assert set(references["dropped"]) == {"exact_duplicate", "near_duplicate"}
    assert count(bank, "select count(*) from references") == references["kept"]
    assert count(bank, "select count(*) from occurrences") == references["read"]
    assert count(bank, "select count(*) from documents") == 13
    assert count(bank, "select count(*) from rejects where reason = 'empty'") == 1
    assert count(bank, "select count(*) from memories") == references["kept"]


def test_occurrences_reproduce_the_documents(bank: Bank) -> None:
    texts = {document["id"]: document["text"] for document in make_documents()}
    rows = run_query(
        open_views(bank),
        "select o.*, r.text from occurrences o join all_references r using (ref_id) order by doc_id, ordinal",
    ).to_pylist()
    rebuilt: dict[str, str] = {}
    for row in rows:
        assert texts[row["doc_id"]][row["start_char"] : row["end_char"]] == row["text"]
        assert texts[row["doc_id"]].encode()[row["start_byte"] : row["end_byte"]].decode() == row["text"]
        rebuilt[row["doc_id"]] = rebuilt.get(row["doc_id"], "") + row["text"]
    assert rebuilt == {doc_id: text for doc_id, text in texts.items() if text.strip()}


def test_a_copy_adds_occurrences_and_no_memory(bank: Bank) -> None:
    sql = "select count(distinct ref_id) from occurrences where doc_id = '{}'"
    shared = count(
        bank, "select count(*) from occurrences a join occurrences b using (ref_id, ordinal) "
        "where a.doc_id = 'copy' and b.doc_id = 'topic/lambda'"
    )  # fmt: skip
    assert shared == count(bank, sql.format("copy")) == count(bank, sql.format("topic/lambda"))


def test_verify_passes_and_finds_a_flipped_bit(bank: Bank, tmp_path: Path) -> None:
    import shutil

    assert all(check.passed for check in verify_bank(bank))
    copy = tmp_path / "bank"
    shutil.copytree(bank.url, copy)
    for kind, failing in (("shard", {"files", "memories"}), ("references", {"files"}), ("index", {"files"})):
        path = Bank.open(copy).locate_all(kind)[0]
        content = bytearray(path.read_bytes())
        original = bytes(content)
        content[len(content) // 2] ^= 0x40
        path.write_bytes(content)
        failed = {check.name: check.detail for check in verify_bank(Bank.open(copy)) if not check.passed}
        assert "files" in failed, kind
        assert path.name in failed["files"]
        assert failing & set(failed)
        path.write_bytes(original)
    path.unlink()
    failed = {check.name: check.detail for check in verify_bank(Bank.open(copy)) if not check.passed}
    assert "missing" in failed["files"]


def test_show_marks_the_kept_words(bank: Bank) -> None:
    ref_id = bank.read_table("memories", ["ref_id"])["ref_id"][0].as_py()
    shown = describe_reference(bank, ref_id[:8])
    assert shown.ref_id == ref_id
    text = bank.read_references([ref_id], ["text"])["text"][0].as_py()
    assert "".join(token.text for token in shown.tokens) == text
    kept = sum(token.num_heads for token in shown.tokens)
    assert kept == min(bank.manifest.layout.num_slots, shown.num_tokens) * shown.num_heads
    assert shown.occurrences
    dropped = bank.read_table("duplicates")["ref_id"][0].as_py()
    assert describe_reference(bank, dropped).kept_for is not None
    with pytest.raises(BankFormatError, match="no reference"):
        describe_reference(bank, "0" * 32)
    with pytest.raises(InputError, match="at least the first 4"):
        describe_reference(bank, "xyz")


def test_built_twice_gives_the_same_bytes(bank: Bank, corpus: Path, tmp_path: Path) -> None:
    from flows.build import build_bank

    build_bank([str(corpus)], str(tmp_path / "again"))
    assert hash_files(tmp_path / "again") == hash_files(Path(bank.url))


def test_order_and_cutting_of_the_corpus_do_not_matter(bank: Bank, tmp_path: Path) -> None:
    from flows.build import build_bank

    documents = make_documents()[::-1]
    for part in range(3):
        write_lines(tmp_path / "corpus" / f"part-{part}.jsonl", documents[part::3])
    build_bank([str(tmp_path / "corpus")], str(tmp_path / "bank"), {"engine": {"num_workers": 1}})
    other = Bank.open(tmp_path / "bank")
    for kind in ("references", "duplicates", "signatures", "embeddings", "occurrences", "memories", "shard", "index"):
        assert [file.sha256 for file in other.manifest.list_files(kind)] == [
            file.sha256 for file in bank.manifest.list_files(kind)
        ], kind


def test_the_same_build_again_changes_nothing_and_a_new_corpus_makes_a_version(
    bank: Bank, corpus: Path, tmp_path: Path
) -> None:
    import shutil

    from flows.build import build_bank

    folder = tmp_path / "bank"
    shutil.copytree(bank.url, folder)
    assert build_bank([str(corpus)], str(folder))["unchanged"]
    more = write_lines(tmp_path / "more.jsonl", make_documents()[:3])
    summary = build_bank([str(more)], str(folder))
    assert (summary["version"], summary["unchanged"]) == (2, False)
    assert Bank.open(folder).manifest.parent == 1
    assert Bank.open(folder, 1).manifest == bank.manifest
    assert all(check.passed for check in verify_bank(Bank.open(folder, 1)))


def test_a_bank_refuses_another_model(bank: Bank) -> None:
    from model.fetching import BankMemories
    from model.writing import ReferenceWriter
    from tests.models import make_checkpoint

    with pytest.raises(WrongModelError, match="weights, tokenizer"):
        BankMemories(bank, ReferenceWriter(make_checkpoint("llama")))


def make_bad_corpus(name: str, folder: Path) -> list[str]:
    path = folder / "corpus.jsonl"
    if name == "missing":
        return [str(folder / "nowhere.jsonl")]
    if name == "unknown-format":
        path = folder / "corpus.docx"
        path.write_text("x")
    elif name == "no-text-column":
        write_lines(path, [{"id": "a", "body": "text", "title": "t"}])
    elif name == "nothing-left":
        write_lines(path, [{"id": "a", "text": " "}, {"id": "b", "text": ""}])
    elif name == "empty-file":
        path.write_text("")
    return [str(path)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "nowhere.jsonl"),
        ("unknown-format", "jsonl"),
        ("no-text-column", "body.*id.*title"),
        ("nothing-left", "nothing of the corpus is left: 2 documents read, dropped: 2 empty"),
        ("empty-file", "nothing of the corpus is left"),
    ],
)
def test_a_bad_corpus_is_one_clear_error_and_leaves_no_version(
    engine: None, name: str, message: str, tmp_path: Path
) -> None:
    from flows.build import build_bank

    with pytest.raises(CorpusError, match=message):
        build_bank(make_bad_corpus(name, tmp_path), str(tmp_path / "bank"))
    with pytest.raises(BankFormatError, match=r"no committed version|does not exist"):
        Bank.open(tmp_path / "bank")


def test_bad_records_are_rejects_with_their_reason(engine: None, tmp_path: Path) -> None:
    from flows.build import build_bank

    good = make_documents()[0]
    lines = [
        json.dumps(good).encode(),
        b"{not json",
        b'{"id": "latin", "text": "caf\xe9 au lait"}',
        b'{"id": "no-text"}',
        b'{"id": "blank", "text": "  "}',
        json.dumps({**good, "text": "another text under a taken id"}).encode(),
        json.dumps(good).encode(),
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"\n".join(lines))
    counts = build_bank([str(path)], str(tmp_path / "bank"))["counts"]["documents"]
    assert counts == {
        "read": 7,
        "kept": 1,
        "dropped": {
            "conflicting_id": 1,
            "duplicate_document": 1,
            "empty": 1,
            "invalid_utf8": 1,
            "missing_text": 1,
            "not_json": 1,
        },
    }
    rejects = Bank.open(tmp_path / "bank").read_table("rejects").to_pylist()
    assert [reject["position"] for reject in rejects] == [2, 3, 4, 5, 6, 7]
    assert all(reject["path"] == str(path) for reject in rejects)


def test_a_folder_that_holds_something_else_is_left_alone(engine: None, corpus: Path, tmp_path: Path) -> None:
    from flows.build import build_bank

    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(BankFormatError, match=r"holds something else \(letter.txt\)"):
        build_bank([str(corpus)], str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    with pytest.raises(BankFormatError, match="is a file"):
        build_bank([str(corpus)], str(tmp_path / "letter.txt"))


def test_a_folder_that_is_only_called_work_is_left_alone(engine: None, corpus: Path, tmp_path: Path) -> None:
    from flows.build import build_bank

    letter = tmp_path / "work" / "letters" / "letter.txt"
    letter.parent.mkdir(parents=True)
    letter.write_text("dear")
    with pytest.raises(BankFormatError, match=r"holds something else \(work\)"):
        build_bank([str(corpus)], str(tmp_path))
    assert letter.read_text() == "dear"


def test_building_again_mends_a_damaged_bank(bank: Bank, corpus: Path, tmp_path: Path) -> None:
    import shutil

    from flows.build import build_bank

    shutil.copytree(bank.url, tmp_path / "bank")
    damaged = Bank.open(tmp_path / "bank")
    damaged.locate_all("shard")[0].unlink()
    index = damaged.locate_all("index")[0]
    index.write_bytes(b"x" + index.read_bytes()[1:])
    assert not build_bank([str(corpus)], str(tmp_path / "bank"))["unchanged"]
    assert hash_files(tmp_path / "bank") == hash_files(Path(bank.url))
    assert all(check.passed for check in verify_bank(Bank.open(tmp_path / "bank", 1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"runner": "Nonsense"}}, "no runner 'Nonsense'"),
        ({"memory": {"model": "nowhere"}}, "nowhere is not a checkpoint|nowhere has no tokenizer.json"),
        ({"memory": {"device": "cuda:99"}}, "cannot be put on the device|Invalid device"),
        ({"embedding": {"embedder": "/nowhere"}}, "embedder '/nowhere' cannot be loaded"),
        ({"chunking": {"max_tokens": 200}}, "max_tokens is 200, must be at most 128"),
    ],
)
def test_settings_that_cannot_work_fail_before_anything_is_written(
    engine: None, corpus: Path, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    from flows.build import build_bank

    with pytest.raises(InputError, match=message):
        build_bank([str(corpus)], str(tmp_path / "bank"), changes)
    assert not (tmp_path / "bank").exists()


def test_two_builds_in_one_bank_are_refused(engine: None, corpus: Path, tmp_path: Path) -> None:
    from flows.build import build_bank
    from flows.workplace import lock_bank

    with lock_bank(LocalStore(tmp_path)), pytest.raises(ConflictError, match="another process is writing"):
        build_bank([str(corpus)], str(tmp_path))


def run_cli(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=timeout, check=False)


def test_known_errors_are_one_line_and_exit_code_1(tmp_path: Path) -> None:
    failed = run_cli("sql", "--bank", str(tmp_path / "none"), "select 1")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
    assert "memory3 build" in failed.stderr


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several shards' worth of text: every language topic, cut to documents of their own."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    parts = [text[start : start + 9000] for start in range(0, len(text), 9000)]
    documents = [{"id": f"part-{number:03d}", "text": part} for number, part in enumerate(parts)]
    return write_lines(tmp_path_factory.mktemp("long") / "docs.jsonl", documents)


def wait_for_files(folder: Path, pattern: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 240
    while not list(folder.glob(pattern)):
        assert process.poll() is None, "the build ended before it was interrupted"
        assert time.monotonic() < deadline, f"no {pattern} appeared"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_stopped_build_goes_on_where_it_was(engine: None, long_corpus: Path, number: int, tmp_path: Path) -> None:
    from flows.build import build_bank

    config = tmp_path / "config.yaml"
    config.write_text("engine: {num_workers: 1}\nmemory: {references_per_shard: 128}\n")
    arguments = ["build", "--corpus", str(long_corpus), "--bank", str(tmp_path / "bank"), "--config", str(config)]
    log = tmp_path / "log.txt"
    # A group of its own, signalled as a whole: that is what Ctrl-C in a terminal does, Prefect's server included.
    with log.open("w") as sink, subprocess.Popen([*CLI, *arguments], stderr=sink, start_new_session=True) as process:
        wait_for_files(tmp_path / "bank" / "work", "*/shards/*.safetensors", process)
        os.killpg(process.pid, number)
        process.wait(timeout=120)
    errors = log.read_text()
    if number == signal.SIGINT:
        assert process.returncode == 1
        assert "finished work is kept" in errors.splitlines()[-1]
        assert "Traceback" not in errors
        assert len([line for line in errors.splitlines() if "finished work is kept" in line]) == 1
    with pytest.raises(BankError, match="no committed version"):
        Bank.open(tmp_path / "bank")
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "bank" / "work").rglob("shards/*.safetensors")}
    assert 1 <= len(finished) < 7
    inodes = {path.stat().st_ino for path in finished}

    settings = load_config("tiny", config, {})
    build_bank([str(long_corpus)], str(tmp_path / "bank"), settings.to_json())
    resumed = Bank.open(tmp_path / "bank")
    assert inodes <= {path.stat().st_ino for path in resumed.locate_all("shard")}
    build_bank([str(long_corpus)], str(tmp_path / "fresh"), settings.to_json())
    assert hash_files(tmp_path / "bank") == hash_files(tmp_path / "fresh")
    assert not list((tmp_path / "bank" / "work").rglob("*.parquet"))


def list_imported(*arguments: str) -> set[str]:
    """Top-level modules that a command imports, from the interpreter's own report."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *CLI[1:], *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    names = (line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:"))
    return {name.partition(".")[0] for name in names}


def test_help_and_sql_import_no_engine(bank: Bank) -> None:
    heavy = {"torch", "apache_beam", "prefect", "transformers", "faiss", "sentence_transformers"}
    assert not heavy & list_imported("--help")
    assert not heavy & list_imported("build", "--help")
    assert not heavy & list_imported("sql", "--bank", bank.url, "select count(*) from references")
    assert not (heavy - {"faiss"}) & list_imported("search", "--bank", bank.url, "lambda")


def test_tables_on_disk_carry_the_schemas(bank: Bank) -> None:
    from schemas.tables import DOCUMENTS, DUPLICATES, OCCURRENCES, REFERENCES, REJECTS

    for kind, schema in (
        ("documents", DOCUMENTS),
        ("occurrences", OCCURRENCES),
        ("references", REFERENCES),
        ("duplicates", DUPLICATES),
        ("rejects", REJECTS),
    ):
        assert pq.read_schema(bank.locate_all(kind)[0]).equals(schema), kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chunking: {max_token: 64}", "has no key 'max_token'"),
        ("memory: {num_slots: many}", "must be of type int"),
        ("deduplication: {threshold: 1.5}", "threshold is 1.5"),
        ("memory: 3", "must be a table of settings"),
        ("memory: {codec: zip}", "there is no codec 'zip'"),
        ("memory: {codec: PRQ2x7x8}", "has to be trained; give the file"),
        ("codec_file: codec.safetensors", "has no key 'codec_file'"),
        ("a: [", "not valid YAML"),
        ("- 1", "holds no settings"),
    ],
)
def test_a_bad_configuration_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config("tiny", path, {})


def test_a_configuration_file_changes_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[chunking]\nmax_tokens = 64\n[deduplication]\nthreshold = 1\n")
    config: Any = load_config("tiny", path, {"memory": {"num_slots": 4}})
    assert (config.chunking.max_tokens, config.deduplication.threshold, config.memory.num_slots) == (64, 1.0, 4)
    with pytest.raises(InputError, match="no preset"):
        load_config("huge", None, {})
