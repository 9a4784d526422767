"""The index over embeddings of real text: exact up to a limit, good beyond it, and equal bytes for equal vectors."""

import re
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.embedding import load_embedder
from pipelines import indexing
from pipelines.indexing import MAX_INDEXES, NUM_PROBES, choose_factory, explain_merge, write_index
from pipelines.python_docs import iterate_topics
from schemas.errors import InputError
from schemas.protocols import FloatArray

NUM_QUERIES = 300


@pytest.fixture(scope="module")
def vectors() -> FloatArray:
    """Embeddings of overlapping stretches of the language reference topics, no two alike, in a mixed order."""
    pieces = [
        " ".join(words[start : start + 40])
        for words in (document["text"].split() for document in iterate_topics())
        for start in range(0, len(words), 20)
    ]
    found = np.unique(load_embedder("static").embed(pieces), axis=0)
    mixed: FloatArray = np.random.default_rng(0).permutation(found)
    return mixed


@pytest.fixture(scope="module")
def queries(vectors: FloatArray) -> FloatArray:
    """Unit vectors beside those of the table, as the embedding of a text about the same would be."""
    draw = np.random.default_rng(1)
    near = vectors[draw.choice(len(vectors), NUM_QUERIES, replace=False)]
    near = near + draw.normal(0, 0.5 / np.sqrt(vectors.shape[1]), near.shape).astype(np.float32)
    unit: FloatArray = near / np.linalg.norm(near, axis=1, keepdims=True)
    return unit


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "EXACT_LIMIT", 500)


def search_slowly(vectors: FloatArray, queries: FloatArray, num_hits: int) -> np.ndarray:
    similarities = queries.astype(np.float64) @ vectors.astype(np.float64).T
    return np.argsort(-similarities, axis=1, kind="stable")[:, :num_hits]


def measure_recall(found: np.ndarray, expected: np.ndarray) -> float:
    shared = [len(set(row) & set(wanted)) for row, wanted in zip(found.tolist(), expected.tolist(), strict=True)]
    return sum(shared) / expected.size


@pytest.mark.parametrize(
    ("num_vectors", "expected"),
    [
        (1, "Flat"),
        (200_000, "Flat"),
        (200_001, "IVF1024,SQ8"),
        (1_000_000, "IVF2048,SQ8"),
        (110_000_000, "IVF16384,SQ8"),
    ],
)
def test_the_kind_follows_from_the_number_of_vectors(num_vectors: int, expected: str) -> None:
    assert choose_factory(num_vectors) == expected


def test_a_small_index_is_exact(vectors: FloatArray, queries: FloatArray, tmp_path: Path) -> None:
    assert write_index(vectors, tmp_path / "index") == "Flat"
    index = faiss.read_index(str(tmp_path / "index"))
    assert (index.ntotal, index.d, index.metric_type) == (*vectors.shape, faiss.METRIC_INNER_PRODUCT)
    similarities, rows = index.search(queries, 5)
    assert np.array_equal(rows, search_slowly(vectors, queries, 5))
    np.testing.assert_allclose(similarities, (vectors[rows] * queries[:, None]).sum(-1), atol=1e-5)
    assert np.array_equal(index.reconstruct_n(0, index.ntotal), vectors)


@pytest.mark.usefixtures("low_limit")
def test_a_large_index_finds_nine_of_ten(vectors: FloatArray, queries: FloatArray, tmp_path: Path) -> None:
    assert len(vectors) > 2000
    factory = write_index(vectors, tmp_path / "index")
    assert re.fullmatch(r"IVF\d+,SQ8", factory)
    index = faiss.read_index(str(tmp_path / "index"))
    assert (index.ntotal, index.d, index.metric_type) == (*vectors.shape, faiss.METRIC_INNER_PRODUCT)
    inverted = faiss.extract_index_ivf(index)
    assert inverted.nlist == int(factory.removeprefix("IVF").removesuffix(",SQ8"))
    assert inverted.nprobe == 32 < inverted.nlist

    expected = search_slowly(vectors, queries, 5)
    similarities, rows = index.search(queries, 5)
    assert measure_recall(rows, expected) >= 0.9
    np.testing.assert_allclose(similarities, (vectors[rows] * queries[:, None]).sum(-1), atol=0.03)
    inverted.nprobe = 1
    assert measure_recall(index.search(queries, 5)[1], expected) < 0.9


@pytest.mark.usefixtures("low_limit")
def test_rows_of_a_large_index_are_rows_of_the_table(vectors: FloatArray, tmp_path: Path) -> None:
    write_index(vectors, tmp_path / "index")
    index = faiss.read_index(str(tmp_path / "index"))
    own = index.search(vectors, 1)[1][:, 0]
    assert np.mean(own == np.arange(len(vectors))) > 0.99


@pytest.mark.parametrize("limit", [500, 100_000])
def test_equal_vectors_give_equal_bytes(
    vectors: FloatArray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(indexing, "EXACT_LIMIT", limit)
    factory = write_index(vectors, tmp_path / "first")
    assert factory.startswith("Flat" if limit > len(vectors) else "IVF")
    write_index(vectors.copy(), tmp_path / "again")
    write_index(np.asfortranarray(vectors), tmp_path / "other-layout")
    write_index(vectors[::-1], tmp_path / "reversed")
    first = (tmp_path / "first").read_bytes()
    for name in ("again", "other-layout"):
        assert (tmp_path / name).read_bytes() == first
    assert (tmp_path / "reversed").read_bytes() != first
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.usefixtures("low_limit")
@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_the_number_of_threads_changes_no_byte(vectors: FloatArray, tmp_path: Path, num_threads: int) -> None:
    before = faiss.omp_get_max_threads()
    write_index(vectors, tmp_path / "index")
    try:
        faiss.omp_set_num_threads(num_threads)
        write_index(vectors, tmp_path / "threads")
    finally:
        faiss.omp_set_num_threads(before)
    assert (tmp_path / "threads").read_bytes() == (tmp_path / "index").read_bytes()


def test_an_index_replaces_the_one_that_was_there(vectors: FloatArray, tmp_path: Path) -> None:
    path = tmp_path / "index"
    write_index(vectors[:10], path)
    write_index(vectors[:20], path)
    assert faiss.read_index(str(path)).ntotal == 20
    assert list(tmp_path.iterdir()) == [path]


def test_one_vector_makes_an_index(vectors: FloatArray, tmp_path: Path) -> None:
    write_index(vectors[:1], tmp_path / "index")
    similarities, rows = faiss.read_index(str(tmp_path / "index")).search(vectors[:1], 3)
    assert rows.tolist() == [[0, -1, -1]]
    assert similarities[0, 0] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.usefixtures("low_limit")
def test_the_kind_of_an_index_may_be_given(vectors: FloatArray, tmp_path: Path) -> None:
    assert write_index(vectors, tmp_path / "exact", "Flat") == "Flat"
    assert isinstance(faiss.read_index(str(tmp_path / "exact")), faiss.IndexFlat)
    assert write_index(vectors[:400], tmp_path / "lists", "IVF4,SQ8") == "IVF4,SQ8"
    assert faiss.extract_index_ivf(faiss.read_index(str(tmp_path / "lists"))).nprobe == NUM_PROBES


# When to merge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_vectors", "num_live", "reason"),
    [
        ([], 0, None),
        ([0], 0, None),
        ([200_000], 200_000, None),
        ([10_000_000], 10_000_000, None),
        ([100_000, 100_000], 200_000, None),
        ([100_000, 100_001], 200_001, "2 segments with 200001 references are searched by comparing each"),
        ([1_000_000, 200_000], 1_200_000, None),
        ([1_000_000, 150_000, 50_001], 1_200_001, "2 segments with 200001 references"),
        ([1_000_000, 300_000], 1_300_000, None),
        ([900], 600, None),
        ([900], 599, "301 of 900 rows of the index are no longer live"),
        ([600, 300], 0, "900 of 900 rows"),
        ([1] * 16, 16, None),
        ([1] * 17, 17, "17 segments are searched one after the other, more than 16"),
        ([1_000_000, *[1] * 16], 1_000_016, "17 segments"),
    ],
)
def test_a_merge_is_due_for_a_reason(num_vectors: list[int], num_live: int, reason: str | None) -> None:
    found = explain_merge(num_vectors, num_live)
    assert (found is None) == (reason is None)
    assert found is None or (reason or "") in found


@given(
    num_vectors=st.lists(st.integers(0, 300_000), max_size=20),
    live_share=st.floats(0, 1),
)
def test_after_a_merge_none_is_due(num_vectors: list[int], live_share: float) -> None:
    num_live = int(live_share * sum(num_vectors))
    assert explain_merge([num_live], num_live) is None
    if explain_merge(num_vectors, num_live) is None:
        assert explain_merge(num_vectors[::-1], num_live) is None
        assert len(num_vectors) <= MAX_INDEXES
        assert 3 * (sum(num_vectors) - num_live) <= sum(num_vectors)


@pytest.mark.parametrize("num_live", [-1, 11])
def test_more_live_rows_than_rows_are_refused(num_live: int) -> None:
    with pytest.raises(InputError, match=f"num_live is {num_live}, must be 0..10"):
        explain_merge([4, 6], num_live)
