"""Search over the segments of a bank: live references only, as brute force finds them, in indexes that are not read."""

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from model import retrieving
from model.checkpoint import Checkpoint
from model.embedding import SHIPPED_EMBEDDER
from model.retrieving import MAX_TIED_HITS, Hit, Retriever, SegmentIndex
from model.static_embedding import StaticEmbedder
from model.writing import ReferenceWriter
from pipelines.indexing import write_index
from pipelines.python_docs import iterate_topics
from schemas.bank import Bank
from schemas.errors import BankFormatError, InputError, WrongModelError
from schemas.protocols import Embedder, FloatArray
from tests.banks import (
    change_manifest,
    describe_file,
    extend_bank,
    get_embedder,
    make_bank,
    make_dropping_table,
    make_vector_segment,
    open_vector_bank,
)
from tests.models import make_checkpoint

NUM_REFERENCES = 40
DIMENSION = 128


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return make_checkpoint("llama")


@pytest.fixture(scope="module")
def writer(checkpoint: Checkpoint) -> ReferenceWriter:
    return ReferenceWriter(checkpoint)


@pytest.fixture(scope="module")
def warm(writer: ReferenceWriter, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = tmp_path_factory.mktemp("warm") / "bank"
    return make_bank(folder, writer, num_references=NUM_REFERENCES, cold=True)


@pytest.fixture(scope="module")
def ref_ids(warm: Bank) -> list[str]:
    ids: list[str] = warm.read_table("references", ["ref_id"])["ref_id"].to_pylist()
    return ids


@pytest.fixture
def copied(warm: Bank, tmp_path: Path) -> Bank:
    """The warm bank in a folder that a test may damage."""
    shutil.copytree(warm.url, tmp_path / "bank")
    return Bank.open(tmp_path / "bank")


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return get_embedder()


# One segment ----------------------------------------------------------------------------------------------------------


def read_texts(bank: Bank) -> list[str]:
    texts: list[str] = bank.read_table("references", ["text"])["text"].to_pylist()
    return texts


def test_every_reference_retrieves_itself(warm: Bank, embedder: Embedder, ref_ids: list[str]) -> None:
    retriever = Retriever(warm, embedder)
    assert retriever.num_references == NUM_REFERENCES
    assert [retriever.get_ref_id(row) for row in range(NUM_REFERENCES)] == ref_ids
    hits = retriever.search(read_texts(warm), 1)
    assert [hit.ref_id for (hit,) in hits] == ref_ids
    assert [hit.score for (hit,) in hits] == pytest.approx([1.0] * NUM_REFERENCES, abs=1e-5)


def test_retrieval_equals_brute_force(warm: Bank, embedder: Embedder, ref_ids: list[str]) -> None:
    queries = ["the assert statement", "a lambda makes a function", "truth values of objects", "import a module", "x"]
    references = embedder.embed(read_texts(warm)).astype(np.float64)
    found = Retriever(warm, embedder).search(queries, 7)
    for hits, query in zip(found, queries, strict=True):
        similarities = references @ embedder.embed([query])[0].astype(np.float64)
        best = sorted(range(NUM_REFERENCES), key=lambda row: -similarities[row])[:7]
        assert [hit.ref_id for hit in hits] == [ref_ids[row] for row in best]
        assert [hit.score for hit in hits] == pytest.approx([similarities[row] for row in best], abs=1e-5)


def test_rows_and_hits_agree(warm: Bank, embedder: Embedder) -> None:
    retriever = Retriever(warm, embedder)
    queries = ["generators", "slices of a list"]
    rows, similarities = retriever.search_rows(queries, 4)
    assert rows.shape == similarities.shape == (2, 4)
    for hits, row_of, score_of in zip(retriever.search(queries, 4), rows, similarities, strict=True):
        expected = [
            Hit(ref_id=retriever.get_ref_id(row), score=float(score))
            for row, score in zip(row_of, score_of, strict=True)
        ]
        assert hits == expected


def test_more_hits_than_references_are_all_references(warm: Bank, embedder: Embedder, ref_ids: list[str]) -> None:
    retriever = Retriever(warm, embedder)
    (hits,) = retriever.search(["with"], NUM_REFERENCES + 25)
    assert sorted(hit.ref_id for hit in hits) == ref_ids
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    rows, _ = retriever.search_rows(["with"], NUM_REFERENCES + 25)
    assert rows[0, NUM_REFERENCES:].tolist() == [-1] * 25
    assert retriever.search([], 5) == []


@pytest.mark.parametrize("num_hits", [0, -1])
def test_fewer_than_one_hit_is_refused(warm: Bank, embedder: Embedder, num_hits: int) -> None:
    with pytest.raises(InputError, match=f"asked for {num_hits} hits; ask for at least 1"):
        Retriever(warm, embedder).search(["with"], num_hits)


def test_another_embedder_is_refused(warm: Bank, embedder: Embedder, tmp_path: Path) -> None:
    """One number of the table is another, and so is the model's id."""
    table = load_file(SHIPPED_EMBEDDER / "model.safetensors")["embedding.weight"]
    table[1000, 0] += 1
    save_file({"embedding.weight": table}, tmp_path / "model.safetensors")
    shutil.copy(SHIPPED_EMBEDDER / "tokenizer.json", tmp_path / "tokenizer.json")
    other = StaticEmbedder(tmp_path)
    with pytest.raises(WrongModelError, match=f"embedded by {embedder.embedder_id}, .* is {other.embedder_id}"):
        Retriever(warm, other)


# Several segments -----------------------------------------------------------------------------------------------------


def make_ids(draw: np.random.Generator, num_ids: int) -> list[str]:
    return [draw.bytes(16).hex() for _ in range(num_ids)]


def search_slowly(
    vectors: dict[str, FloatArray], queries: FloatArray, num_hits: int
) -> list[list[tuple[str, np.float32]]]:
    found = []
    for query in queries.astype(np.float64):
        scores = {ref_id: np.float32((vector.astype(np.float64) * query).sum()) for ref_id, vector in vectors.items()}
        found.append(sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:num_hits])
    return found


def collect_hits(retriever: Retriever, queries: FloatArray, num_hits: int) -> list[list[tuple[str, np.float32]]]:
    rows, scores = retriever.search_vectors(queries, num_hits)
    assert rows.shape == scores.shape == (len(queries), num_hits)
    assert ((rows >= 0) == (scores > -np.inf)).all()
    return [
        [(retriever.get_ref_id(row), score) for row, score in zip(row_of, score_of, strict=True) if row >= 0]
        for row_of, score_of in zip(rows.tolist(), scores, strict=True)
    ]


@settings(max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 30), max_size=5),
    shares=st.tuples(*[st.sampled_from([0.0, 0.0, 0.2, 0.9, 1.0])] * 3),
    num_queries=st.sampled_from([0, 1, 2, 25]),
    num_hits=st.integers(1, 12),
    has_ties=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_search_over_segments_equals_brute_force_over_live_references(
    sizes: list[int], shares: tuple[float, ...], num_queries: int, num_hits: int, has_ties: bool, seed: int
) -> None:
    draw = np.random.default_rng(seed)

    def make_vectors(number: int) -> FloatArray:
        vectors = np.zeros((number, DIMENSION), np.float32)
        # Few different vectors, many of them as near to a query as each other; or none alike.
        used = draw.integers(-1, 2, (number, 3)) if has_ties else draw.normal(size=(number, DIMENSION))
        vectors[:, : used.shape[1]] = used
        unit: FloatArray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        return unit

    with tempfile.TemporaryDirectory() as name:
        folder, files = Path(name), []
        stored: dict[str, FloatArray] = {}
        for part, size in enumerate(sizes):
            ids, vectors = sorted(make_ids(draw, size)), make_vectors(size)
            files += make_vector_segment(folder, f"segment-{part}", ids, vectors)
            stored.update(zip(ids, vectors, strict=True))
        dropped = set()
        for kind, share in zip(("tombstones", "duplicates", "contaminated"), shares, strict=True):
            chosen = [ref_id for ref_id in stored if draw.random() < share]
            files += make_dropping_table(folder, kind, chosen)
            dropped |= set(chosen)
        live = {ref_id: vector for ref_id, vector in stored.items() if ref_id not in dropped}
        retriever = Retriever(open_vector_bank(folder, files), get_embedder())
        queries = make_vectors(num_queries)
        assert retriever.num_references == len(live)
        assert collect_hits(retriever, queries, num_hits) == search_slowly(live, queries, num_hits)
        listed = [retriever.get_ref_id(row) for row in range(len(live))]
        assert sorted(listed) == sorted(live)


def test_how_references_are_spread_over_segments_changes_no_hit(tmp_path: Path) -> None:
    texts = [document["text"][start : start + 200] for document in iterate_topics() for start in range(0, 1600, 40)]
    texts = list(dict.fromkeys(text for text in texts if len(text) > 100))
    embedder, draw = get_embedder(), np.random.default_rng(0)
    vectors, ids = embedder.embed(texts), sorted(make_ids(draw, len(texts)))
    dead = draw.choice(len(ids), len(ids) // 3, replace=False)
    found = []
    for cuts in ([], [300, 310, 1000], [len(ids) // 2]):
        folder = tmp_path / str(len(cuts))
        spread = np.array_split(np.arange(len(ids)), cuts) if cuts != [300, 310, 1000] else None
        owner = draw.integers(0, 4, len(ids))
        parts = [np.flatnonzero(owner == part) for part in range(4)] if spread is None else spread
        files = []
        for part, rows in enumerate(parts):
            files += make_vector_segment(folder, f"part-{part}", [ids[row] for row in rows], vectors[rows])
        files += make_dropping_table(folder, "tombstones", [ids[row] for row in dead])
        retriever = Retriever(open_vector_bank(folder, files), embedder)
        # Alone and in a batch, which FAISS adds up in another order.
        alone = [retriever.search([text], 5)[0] for text in texts[:50]]
        assert retriever.search(texts[:50], 5) == alone
        found.append(alone)
    assert found[0] == found[1] == found[2]
    assert {hit.ref_id for hits in found[0] for hit in hits}.isdisjoint(ids[row] for row in dead)


def test_more_ties_than_are_looked_at_still_give_hits(tmp_path: Path) -> None:
    num_rows = 3 * MAX_TIED_HITS
    vectors = np.tile(np.eye(1, DIMENSION, dtype=np.float32), (num_rows, 1))
    ids = sorted(make_ids(np.random.default_rng(0), num_rows))
    files = make_vector_segment(tmp_path, "one", ids, vectors)
    retriever = Retriever(open_vector_bank(tmp_path, files), get_embedder())
    (hits,) = collect_hits(retriever, vectors[:1], 4)
    assert len({ref_id for ref_id, _ in hits}) == 4
    assert [score for _, score in hits] == [1.0] * 4


def test_a_version_after_an_update_finds_its_own_live_references(
    writer: ReferenceWriter, embedder: Embedder, tmp_path: Path
) -> None:
    first = make_bank(tmp_path / "bank", writer, num_references=20, cold=True)
    old = first.read_table("references", ["ref_id", "text"])
    ids = old["ref_id"].to_pylist()
    dropped = {"deleted": ids[3], "near-duplicate": ids[8]}
    second = extend_bank(
        first,
        writer,
        num_new=15,
        deleted=[dropped["deleted"]],
        duplicates={dropped["near-duplicate"]: ids[0]},
        with_memories=False,
        cold=True,
    )
    rows = second.read_table("references", ["ref_id", "text"])
    texts = dict(zip(rows["ref_id"].to_pylist(), rows["text"].to_pylist(), strict=True))
    retriever = Retriever(second, embedder)
    assert retriever.num_references == 33
    for (hit,), ref_id in zip(retriever.search(list(texts.values()), 1), texts, strict=True):
        assert (hit.ref_id == ref_id) == (ref_id not in dropped.values())
    before = Retriever(Bank.open(first.url, 1), embedder)
    assert [hit.ref_id for (hit,) in before.search(old["text"].to_pylist(), 1)] == ids


def test_a_bank_of_nothing_live_finds_nothing(copied: Bank, embedder: Embedder, ref_ids: list[str]) -> None:
    files = make_dropping_table(Path(copied.url), "tombstones", ref_ids)
    for bank in (change_manifest(copied, files=[*copied.manifest.files, *files]), change_manifest(copied, files=[])):
        retriever = Retriever(bank, embedder)
        assert retriever.num_references == 0
        assert retriever.search(["with", "lambda"], 3) == [[], []]
        with pytest.raises(IndexError, match="row 0 of 0"):
            retriever.get_ref_id(0)


# Inverted files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors() -> FloatArray:
    """Embeddings of overlapping stretches of the language reference topics, no two alike, in a mixed order."""
    pieces = [
        " ".join(words[start : start + 40])
        for words in (document["text"].split() for document in iterate_topics())
        for start in range(0, len(words), 20)
    ]
    mixed: FloatArray = np.random.default_rng(0).permutation(np.unique(get_embedder().embed(pieces), axis=0))
    return mixed


@pytest.mark.parametrize("dead_share", [0.0, 0.1, 0.5, 0.98])
def test_an_inverted_file_beside_small_segments_finds_nine_of_ten(
    vectors: FloatArray, tmp_path: Path, dead_share: float
) -> None:
    draw = np.random.default_rng(2)
    ids = make_ids(draw, len(vectors))
    files, start = [], 0
    for part, (end, factory) in enumerate([(2000, "IVF64,SQ8"), (2300, None), (2500, None), (len(vectors), None)]):
        order = sorted(range(start, end), key=ids.__getitem__)
        files += make_vector_segment(tmp_path, f"part-{part}", [ids[row] for row in order], vectors[order], factory)
        start = end
    dead = {ref_id for ref_id in ids if draw.random() < dead_share}
    files += make_dropping_table(tmp_path, "tombstones", dead)
    queries = vectors[:100] + draw.normal(0, 0.04, (100, DIMENSION)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    retriever = Retriever(open_vector_bank(tmp_path, files), get_embedder())
    found = collect_hits(retriever, queries, 5)
    live = {ref_id: vector for ref_id, vector in zip(ids, vectors, strict=True) if ref_id not in dead}
    num_found = 0
    for hits, expected, query in zip(found, search_slowly(live, queries, 5), queries, strict=True):
        assert len(hits) == 5
        assert {ref_id for ref_id, _ in hits} <= live.keys()
        assert [score for _, score in hits] == sorted((score for _, score in hits), reverse=True)
        np.testing.assert_allclose(
            [score for _, score in hits], [live[ref_id] @ query for ref_id, _ in hits], atol=0.03
        )
        num_found += len({ref_id for ref_id, _ in hits} & {ref_id for ref_id, _ in expected})
    assert num_found / 500 >= 0.9


@pytest.mark.parametrize("num_live", [0, 1, 4, 30])
def test_an_inverted_file_finds_all_that_is_live_where_little_is(
    vectors: FloatArray, tmp_path: Path, num_live: int
) -> None:
    ids = sorted(make_ids(np.random.default_rng(3), 1500))
    files = make_vector_segment(tmp_path, "one", ids, vectors[:1500], "IVF64,SQ8")
    live = ids[:: len(ids) // max(1, num_live)][:num_live]
    files += make_dropping_table(tmp_path, "tombstones", set(ids) - set(live))
    retriever = Retriever(open_vector_bank(tmp_path, files), get_embedder())
    for hits in collect_hits(retriever, vectors[1500:1510], 30):
        assert sorted(ref_id for ref_id, _ in hits) == live


# Mapped, not read -----------------------------------------------------------------------------------------------------


def count_read_bytes() -> int:
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


@pytest.mark.parametrize("factory", ["Flat", "IVF64,SQ8"])
def test_opening_an_index_does_not_read_it(tmp_path: Path, factory: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(20_000, DIMENSION)).astype(np.float32)
    write_index(vectors, tmp_path / "index.faiss", factory)
    ref_ids = np.array([f"{number:032x}" for number in range(len(vectors))], "S32")
    live = np.ones(len(vectors), np.bool_)
    before = count_read_bytes()
    segment = SegmentIndex(tmp_path / "index.faiss", ref_ids, live, DIMENSION)
    assert count_read_bytes() - before < 100_000 < (tmp_path / "index.faiss").stat().st_size / 20
    places, _ = segment.search(vectors[:3], 1)
    assert all(row in found for row, found in enumerate(places.tolist()))


def test_an_index_that_is_removed_while_open_is_searched_on(copied: Bank, embedder: Embedder, warm: Bank) -> None:
    retriever = Retriever(copied, embedder)
    shutil.rmtree(copied.url)
    assert retriever.search(["lambda"], 3) == Retriever(warm, embedder).search(["lambda"], 3)


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("how", ["empty", "cut", "longer", "foreign", "half"])
def test_a_damaged_index_is_named(
    copied: Bank, embedder: Embedder, monkeypatch: pytest.MonkeyPatch, how: str, is_large: bool
) -> None:
    if is_large:
        monkeypatch.setattr(retrieving, "HASHED_BYTES", 0)
    (path,) = copied.locate_all("index")
    content = path.read_bytes()
    ways = {"empty": b"", "cut": content[:-1], "longer": content + b"x", "foreign": b"PAR1" * 99, "half": content[:20]}
    path.write_bytes(ways[how])
    with pytest.raises(BankFormatError, match=r"'index' of bank .* is damaged: .*index\.faiss has \d+ bytes, not"):
        Retriever(copied, embedder)


@pytest.mark.parametrize("place", [3, 40, 1000, -1])
def test_a_flipped_bit_in_a_small_index_is_found(copied: Bank, embedder: Embedder, place: int) -> None:
    (path,) = copied.locate_all("index")
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(BankFormatError, match=r"index\.faiss has other bytes than when it was written"):
        Retriever(copied, embedder)


def replace_index(bank: Bank, content: Any) -> Bank:
    """Puts another index in its place, and in the manifest: a bank that says of itself that it is whole."""
    (file,) = bank.manifest.list_files("index")
    path = bank.locate(file)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        faiss.write_index(content, str(path))
    described = describe_file(Path(bank.url), "index", path, file.num_rows)
    return change_manifest(bank, files=[described if entry == file else entry for entry in bank.manifest.files])


@pytest.mark.parametrize("how", ["empty", "cut", "foreign", "half"])
def test_a_lying_index_is_named(copied: Bank, embedder: Embedder, how: str) -> None:
    content = copied.locate_all("index")[0].read_bytes()
    ways = {"empty": b"", "cut": content[:-1], "foreign": b"PAR1" * 99, "half": content[:20]}
    with pytest.raises(BankFormatError, match=r"index .*index\.faiss is damaged; build the bank again"):
        Retriever(replace_index(copied, ways[how]), embedder)


@pytest.mark.parametrize("change", ["fewer", "narrower"])
def test_an_index_that_does_not_fit_its_table_is_refused(copied: Bank, embedder: Embedder, change: str) -> None:
    stored = faiss.read_index(str(copied.locate_all("index")[0]))
    vectors = stored.reconstruct_n(0, stored.ntotal)
    vectors = vectors[:-1] if change == "fewer" else np.ascontiguousarray(vectors[:, :-8])
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    with pytest.raises(BankFormatError, match=r"index\.faiss has .* vectors of .*, the table of embeddings 40 of 128"):
        Retriever(replace_index(copied, index), embedder)


@pytest.mark.parametrize("kind", ["graph", "distance"])
def test_an_index_of_another_kind_is_refused(copied: Bank, embedder: Embedder, kind: str) -> None:
    stored = faiss.read_index(str(copied.locate_all("index")[0]))
    index = faiss.IndexHNSWFlat(128, 8, faiss.METRIC_INNER_PRODUCT) if kind == "graph" else faiss.IndexFlatL2(128)
    index.add(stored.reconstruct_n(0, stored.ntotal))
    with pytest.raises(BankFormatError, match=r"index\.faiss is of a kind that no bank has \(Index"):
        Retriever(replace_index(copied, index), embedder)


def test_a_missing_index_is_named(copied: Bank, embedder: Embedder) -> None:
    copied.locate_all("index")[0].unlink()
    with pytest.raises(BankFormatError, match=r"index\.faiss is missing"):
        Retriever(copied, embedder)


@pytest.mark.parametrize("kind", ["index", "embeddings"])
def test_a_version_with_one_of_index_and_embeddings_is_refused(warm: Bank, embedder: Embedder, kind: str) -> None:
    bank = change_manifest(warm, files=[file for file in warm.manifest.files if file.kind != kind])
    with pytest.raises(BankFormatError, match="has an index or embeddings without the other in segments/"):
        Retriever(bank, embedder)


def test_a_wrong_number_of_rows_in_the_manifest_is_refused(warm: Bank, embedder: Embedder) -> None:
    files = [
        dataclasses.replace(file, num_rows=file.num_rows - 1) if file.kind == "embeddings" else file
        for file in warm.manifest.files
    ]
    with pytest.raises(BankFormatError, match=r"embeddings\.parquet has 40 rows, not 39"):
        Retriever(change_manifest(warm, files=files), embedder)
