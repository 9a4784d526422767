"""A bank made by somebody who means harm: every manifest, header, table, index and query that lies is refused clearly.

The digests are always right: who makes a bank can compute them. A refusal is an error of the bank, on one line, before
anything outside of the bank is touched and before memory is taken for what is not there.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.generation import open_writer
from flows.verifying import verify_bank
from model.embedding import load_embedder
from model.fetching import BankMemories
from model.retrieving import Retriever
from model.writing import ReferenceWriter
from pipelines.inspecting import open_views, run_query
from schemas.bank import Bank
from schemas.errors import BankError, BankFormatError, InputError
from schemas.identifiers import hash_json
from schemas.manifest import make_manifest_name
from schemas.protocols import Embedder
from tests.test_verifying import believe, build_history, list_failed, rewrite_manifest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return build_history(tmp_path_factory.mktemp("history"))


@pytest.fixture(scope="module")
def writer(original: Bank) -> ReferenceWriter:
    return open_writer(original, "memory3-tiny")


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return load_embedder("static")


@pytest.fixture
def bank(original: Bank, tmp_path: Path) -> Bank:
    """A copy of the bank that may be changed."""
    shutil.copytree(original.url, tmp_path / "bank")
    return Bank.open(tmp_path / "bank")


# Manifests ------------------------------------------------------------------------------------------------------------


def forge(bank: Bank, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest as JSON, and its digest with it."""
    path = Path(bank.url) / make_manifest_name(2)
    value = json.loads(path.read_text())
    change(value)
    del value["digest"]
    path.write_text(json.dumps({**value, "digest": hash_json(value)}))


def set_in_file(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["files"][0].update({key: value})


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "climbing": (set_in_file("path", "segments/../../secret"), "outside the bank"),
    "absolute": (set_in_file("path", "/etc/passwd"), "outside the bank"),
    "backslash": (set_in_file("path", "segments\\..\\..\\secret"), "outside the bank"),
    "zero byte": (set_in_file("path", "segments/s/x\0.parquet"), "outside the bank"),
    "the manifest itself": (set_in_file("path", "manifests/00000001.json"), "in no segment"),
    "a kind that is a path": (set_in_file("kind", "../../x"), "no name"),
    "a kind that is SQL": (set_in_file("kind", 'x"; DROP TABLE y'), "no name"),
    "a negative size": (set_in_file("size_bytes", -1), "size_bytes -1"),
    "an absurd size": (set_in_file("size_bytes", 1 << 70), "size_bytes"),
    "negative rows": (set_in_file("num_rows", -5), "num_rows -5"),
    "rows of another type": (set_in_file("num_rows", "many"), "num_rows 'many'"),
    "no digest": (set_in_file("sha256", ""), "SHA-256 ''"),
    "a file twice": (lambda value: value["files"].append(value["files"][0]), "2 times"),
    "negative counts": (lambda value: value["counts"]["documents"].update(kept=-1), "counts.documents.kept is -1"),
    "a parent to come": (lambda value: value.update(parent=2), "parent is 2"),
    "a newer format": (lambda value: value.update(format=4), "has format 4, this release reads 3; update memory3"),
    "an old format": (lambda value: value.update(format=2), "build the bank again in another folder"),
    "a novelty": (lambda value: value.update(hooks=["rm"]), "hooks"),
    "a layout of nothing": (lambda value: value["layout"].update(num_layers=0), "num_layers is 0"),
    "an unknown codec": (lambda value: value["layout"].update(codec="exec"), "codec"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_manifest_is_refused(bank: Bank, name: str) -> None:
    change, message = FORGERIES[name]
    forge(bank, change)
    with pytest.raises(BankFormatError, match=re.escape(message)) as caught:
        Bank.open(bank.url)
    assert "00000002.json" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert Bank.open(bank.url, 1).manifest.version == 1


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"[" * 1_000_000, id="nested lists"),
        pytest.param(b'{"a":' * 200_000, id="nested objects"),
        pytest.param(b'{"format": 3, "version": ' + b"9" * 100_000 + b"}", id="a long number"),
        pytest.param(b'{"format": 3, "version": NaN}', id="no JSON"),
        pytest.param(b"\x80\x04\x95", id="a pickle"),
    ],
)
def test_text_that_is_hard_to_parse_is_refused(bank: Bank, content: bytes) -> None:
    (Path(bank.url) / make_manifest_name(3)).write_bytes(content)
    with pytest.raises(BankFormatError, match=r"00000003\.json"):
        Bank.open(bank.url)


def test_values_nested_within_a_manifest_are_refused(bank: Bank) -> None:
    path = Path(bank.url) / make_manifest_name(2)
    nested = "[" * 900 + "]" * 900
    path.write_text(path.read_text().replace('"counts": {', f'"counts": {{"deep": {nested},', 1))
    with pytest.raises(BankFormatError, match=r"00000002\.json is damaged"):
        Bank.open(bank.url)


def test_a_hundred_megabytes_are_not_read(bank: Bank) -> None:
    with (Path(bank.url) / make_manifest_name(3)).open("wb") as file:
        file.write(b'{"format": 3, "config": "')
        file.truncate(100_000_000)
    with pytest.raises(BankFormatError, match=r"00000003\.json has more than"):
        Bank.open(bank.url)


def test_counts_that_are_not_true_are_reported(bank: Bank) -> None:
    counts = json.loads(json.dumps(bank.manifest.counts))
    counts["references"]["kept"] *= 1000
    assert (
        "references read, but"
        in list_failed(verify_bank(rewrite_manifest(bank, counts=counts), deep=False))["manifest"]
    )


# Links ----------------------------------------------------------------------------------------------------------------


def read_everything(bank: Bank, writer: ReferenceWriter, embedder: Embedder) -> None:
    for kind in sorted({file.kind for file in bank.manifest.files} - {"shard", "index"}):
        bank.read_table(kind)
    with open_views(bank) as views:
        for kind in ("documents", "all_references", "occurrences", "memories", "embeddings"):
            run_query(views, f"SELECT * FROM {kind}")
    Retriever(bank, embedder).search(["text"], 3)
    memories = BankMemories(bank, writer, cache_bytes=0)
    live = set(bank.read_table("references", ["ref_id"])["ref_id"].to_pylist())
    memories.fetch(sorted(live - set(bank.read_dropped_ids().to_pylist())))


def test_the_bank_as_it_is_can_be_read(bank: Bank, writer: ReferenceWriter, embedder: Embedder) -> None:
    read_everything(bank, writer, embedder)


@pytest.mark.parametrize("kind", ["documents", "references", "memories", "embeddings", "index", "shard"])
def test_a_link_out_of_the_bank_is_not_followed(
    bank: Bank, tmp_path: Path, writer: ReferenceWriter, embedder: Embedder, kind: str
) -> None:
    """The very same bytes, but elsewhere: what a file outside of the bank holds is nobody's business."""
    path = Path(bank.url) / bank.manifest.list_files(kind)[0].path
    outside = tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(BankError, match="leads out of the bank|missing"):
        read_everything(bank, writer, embedder)
    failed = list_failed(verify_bank(bank))
    assert path.name in failed["files"]
    assert outside.exists()


def test_a_segment_that_is_a_link_out_of_the_bank_is_not_followed(
    bank: Bank, tmp_path: Path, writer: ReferenceWriter, embedder: Embedder
) -> None:
    segment = (Path(bank.url) / bank.manifest.files[0].path).parent
    segment.rename(tmp_path / "outside")
    segment.symlink_to(tmp_path / "outside")
    with pytest.raises(BankError, match="leads out of the bank"):
        read_everything(bank, writer, embedder)
    assert "files" in list_failed(verify_bank(bank))


def test_results_are_not_written_through_a_link(bank: Bank, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (Path(bank.url) / "checks").symlink_to(tmp_path / "outside")
    assert "cannot be written" in verify_bank(bank, deep=False)[-1].detail
    assert list((tmp_path / "outside").iterdir()) == []


# Shards ---------------------------------------------------------------------------------------------------------------


def change_header(content: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """Returns a shard with another header: ``change`` gets the safetensors header and this project's part of it."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    described = json.loads(header["__metadata__"]["memory3"])
    change(header, described)
    header["__metadata__"]["memory3"] = json.dumps(described)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


SHARD_LIES: dict[str, Callable[[bytes], bytes]] = {
    "a huge header": lambda content: struct.pack("<Q", 1 << 62) + content[8:],
    "a header of the whole file": lambda content: struct.pack("<Q", len(content)) + content[8:],
    "more rows": lambda content: change_header(content, lambda header, _: header["records"]["shape"].insert(0, 9999)),
    "another number of rows": lambda content: change_header(
        content, lambda header, _: header["records"].update(shape=[1 << 40, header["records"]["shape"][1]])
    ),
    "negative rows": lambda content: change_header(
        content, lambda header, _: header["records"].update(shape=[-1, header["records"]["shape"][1]])
    ),
    "another type": lambda content: change_header(content, lambda header, _: header["records"].update(dtype="F64")),
    "other offsets": lambda content: change_header(
        content, lambda header, _: header["records"].update(data_offsets=[-64, 1 << 62])
    ),
    "another layout": lambda content: change_header(
        content, lambda _, described: described["layout"].update(num_layers=1, head_dim=128)
    ),
    "a layout of any size": lambda content: change_header(
        content, lambda _, described: described["layout"].update(num_layers=1 << 60)
    ),
    "another writer": lambda content: change_header(
        content, lambda _, described: described.update(fingerprint="0" * 32)
    ),
    "a newer format": lambda content: change_header(content, lambda _, described: described.update(format=99)),
    "no text": lambda content: content[:8] + b"\xff" * (len(content) - 8),
    "nothing": lambda content: b"",
}


@pytest.mark.parametrize("name", SHARD_LIES)
def test_a_shard_that_lies_is_refused(bank: Bank, writer: ReferenceWriter, embedder: Embedder, name: str) -> None:
    file = bank.manifest.list_files("shard")[0]
    path = Path(bank.url) / file.path
    path.write_bytes(SHARD_LIES[name](path.read_bytes()))
    liar = believe(bank, file)
    with pytest.raises(BankFormatError, match="shard") as caught:
        liar.open_shard(liar.manifest.list_files("shard")[0])
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(BankFormatError):
        read_everything(liar, writer, embedder)
    assert path.name in list_failed(verify_bank(liar, deep=False))["headers"]


# Tables ---------------------------------------------------------------------------------------------------------------


def drop_column(table: pa.Table) -> pa.Table:
    return table.drop_columns(table.column_names[-1])


def add_column(table: pa.Table) -> pa.Table:
    return table.append_column("novelty", pa.array([0] * len(table)))


def rename_column(table: pa.Table) -> pa.Table:
    return table.rename_columns(["id", *table.column_names[1:]])


def retype_column(table: pa.Table) -> pa.Table:
    return table.set_column(0, table.column_names[0], pa.array(range(len(table)), pa.int64()))


def allow_nulls(table: pa.Table) -> pa.Table:
    name = table.column_names[0]
    return table.set_column(0, name, pa.array([None, *table[name].to_pylist()[1:]], pa.string()))


@pytest.mark.parametrize("change", [drop_column, add_column, rename_column, retype_column, allow_nulls])
@pytest.mark.parametrize("kind", ["documents", "occurrences", "references", "embeddings", "memories", "tombstones"])
def test_a_table_of_another_schema_is_refused(bank: Bank, kind: str, change: Callable[[pa.Table], pa.Table]) -> None:
    file = bank.manifest.list_files(kind)[0]
    path = Path(bank.url) / file.path
    table = pq.read_table(path)
    pq.write_table(change(table), path)
    liar = believe(bank, file)
    lying = next(other for other in liar.manifest.files if other.path == file.path)
    for read in (
        lambda: liar.read_table(kind),
        lambda: liar.read_table(kind, table.column_names[-1:]),
        lambda: list(liar.iterate_table(lying)),
        lambda: liar.read_rows(kind, "ref_id", ["0"], ["ref_id"]),
    ):
        with pytest.raises(BankFormatError, match=f"{file.path}.*of another table"):
            read()
    assert path.name in list_failed(verify_bank(liar, deep=False))["headers"]


@pytest.mark.parametrize("kind", ["documents", "references", "embeddings", "memories"])
def test_a_table_of_more_rows_than_said_is_refused(bank: Bank, kind: str) -> None:
    file = bank.manifest.list_files(kind)[0]
    liar = rewrite_manifest(
        bank, files=[dataclasses.replace(one, num_rows=one.num_rows - (one == file)) for one in bank.manifest.files]
    )
    with pytest.raises(BankFormatError, match=f"{file.path} has {file.num_rows} rows, not {file.num_rows - 1}"):
        liar.read_table(kind)
    assert file.path in list_failed(verify_bank(liar, deep=False))["headers"]


def test_something_else_than_a_table_is_refused(bank: Bank, writer: ReferenceWriter, embedder: Embedder) -> None:
    for kind in ("documents", "references", "embeddings", "memories", "tombstones"):
        file = bank.manifest.list_files(kind)[0]
        path = Path(bank.url) / file.path
        content = path.read_bytes()
        for other in (b"PAR1" + b"\xff" * 64 + struct.pack("<I", 1 << 31) + b"PAR1", b"PAR1PAR1", b"{}"):
            path.write_bytes(other)
            digest = hashlib.sha256(other).hexdigest()
            lying = dataclasses.replace(file, size_bytes=len(other), sha256=digest)
            liar = Bank(
                bank.store,
                dataclasses.replace(
                    bank.manifest, files=[lying if one == file else one for one in bank.manifest.files]
                ),
            )
            with pytest.raises(BankFormatError):
                read_everything(liar, writer, embedder)
        path.write_bytes(content)


def test_a_place_outside_of_a_shard_is_refused(bank: Bank, writer: ReferenceWriter, embedder: Embedder) -> None:
    file = bank.manifest.list_files("memories")[0]
    path = Path(bank.url) / file.path
    table = pq.read_table(path)
    for column, values in (("row", [1 << 30] * len(table)), ("shard", ["../../../../etc/passwd"] * len(table))):
        index = table.schema.get_field_index(column)
        field = table.schema.field(column)
        pq.write_table(table.set_column(index, field, pa.array(values, field.type)), path)
        with pytest.raises(BankFormatError):
            read_everything(believe(bank, file), writer, embedder)


# Indexes --------------------------------------------------------------------------------------------------------------


def make_index(factory: str, dimension: int, num_vectors: int, metric: int | None = None) -> bytes:
    import faiss

    vectors = np.random.default_rng(0).normal(size=(max(num_vectors, 1), dimension)).astype(np.float32)
    index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT if metric is None else metric)
    if not index.is_trained:
        index.train(vectors)
    index.add(vectors[:num_vectors])
    return bytes(faiss.serialize_index(index).tobytes())


INDEX_LIES: dict[str, Callable[[int, int, bytes], bytes]] = {
    "another dimension": lambda dimension, rows, _: make_index("Flat", dimension // 2, rows),
    "fewer vectors": lambda dimension, rows, _: make_index("Flat", dimension, rows - 1),
    "no vectors": lambda dimension, rows, _: make_index("Flat", dimension, 0),
    "another metric": lambda dimension, rows, _: make_index("Flat", dimension, rows, 1),
    "another kind": lambda dimension, rows, _: make_index("HNSW8", dimension, rows),
    "more vectors than bytes": lambda dimension, _, content: content[:8] + struct.pack("<q", 1 << 40) + content[16:],
    "a huge dimension": lambda _, __, content: content[:4] + struct.pack("<i", (1 << 31) - 1) + content[8:],
    "an unknown kind": lambda _, __, content: b"IxXX" + content[4:],
    "half": lambda _, __, content: content[: len(content) // 2],
    "nothing": lambda _, __, content: b"",
}


@pytest.mark.parametrize("name", INDEX_LIES)
def test_an_index_that_lies_is_refused(bank: Bank, embedder: Embedder, name: str) -> None:
    file = bank.manifest.list_files("index")[0]
    path = Path(bank.url) / file.path
    path.write_bytes(INDEX_LIES[name](embedder.dimension, file.num_rows, path.read_bytes()))
    liar = believe(bank, file)
    with pytest.raises(BankFormatError) as caught:
        Retriever(liar, embedder)
    assert len(str(caught.value).splitlines()) == 1
    assert path.name in list_failed(verify_bank(liar))["indexes"]


# SQL ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM read_csv('{secret}')",
        "SELECT * FROM read_blob('/etc/passwd')",
        "SELECT * FROM glob('/*')",
        "COPY (SELECT 1) TO '{target}'",
        "WITH x AS (COPY (SELECT 1) TO '{target}') SELECT 1",
        "SELECT 1; COPY (SELECT 1) TO '{target}'",
        "EXPORT DATABASE '{target}'",
        "ATTACH '{target}'",
        "INSTALL httpfs",
        "LOAD '{secret}'",
        "SET enable_external_access = true",
        "PRAGMA database_list",
        "CREATE TABLE x AS SELECT 1",
        "DROP VIEW documents",
        "SELECT getenv('HOME')",
        "CALL pragma_version()",
    ],
)
def test_sql_reaches_no_file_and_changes_nothing(bank: Bank, tmp_path: Path, sql: str) -> None:
    secret, target = tmp_path / "secret.csv", tmp_path / "target"
    secret.write_text("secret\n1\n")
    with open_views(bank) as views:
        with pytest.raises(InputError) as caught:
            run_query(views, sql.format(secret=secret, target=target))
        assert len(str(caught.value).splitlines()) == 1
        assert run_query(views, "SELECT count(*) AS n FROM documents")["n"][0].as_py() > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank", "secret.csv"]
    assert secret.read_text() == "secret\n1\n"


# No pickles -----------------------------------------------------------------------------------------------------------

UNPICKLING = re.compile(
    r"\b(from pickle|import (cloudpickle|dill|marshal|shelve|joblib)|pickle\.(loads?|Unpickler)"
    r"|allow_pickle\s*=\s*True|torch\.load\((?!.*weights_only=True)|eval\(|exec\()"
)
"""What makes code of data."""


def test_no_source_makes_code_of_data() -> None:
    sources = [path for folder in ("schemas", "pipelines", "model", "flows") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 80
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sources
        for line in path.read_text(encoding="utf-8").splitlines()
        if UNPICKLING.search(line.replace(".eval()", ""))
    ]
    assert found == []


READING = """
import pickle, sys

def refuse(*arguments, **options):
    raise RuntimeError("something was unpickled")

class Refuse:
    def __init__(self, *arguments, **options):
        refuse()

pickle.loads = pickle.load = refuse
pickle.Unpickler = Refuse

from flows.generation import open_writer
from flows.showing import describe_reference
from flows.verifying import verify_bank
from model.embedding import load_embedder
from model.fetching import BankMemories
from model.retrieving import Retriever
from pipelines.inspecting import open_views, run_query
from schemas.bank import Bank

bank = Bank.open(sys.argv[1])
assert all(check.passed for check in verify_bank(bank, deep=False))
for kind in {file.kind for file in bank.manifest.files} - {"shard", "index"}:
    bank.read_table(kind)
hits = Retriever(bank, load_embedder("static")).search(["lambda"], 3)[0]
BankMemories(bank, open_writer(bank, "memory3-tiny")).fetch([hit.ref_id for hit in hits])
with open_views(bank) as views:
    assert len(run_query(views, "SELECT * FROM all_references"))
describe_reference(bank, hits[0].ref_id)
print("read")
"""


def test_a_bank_is_read_without_unpickling_anything(bank: Bank) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READING, bank.url],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "read\n"
