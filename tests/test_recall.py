"""Recall of the indexes: held against comparing all pairs one by one, for exact and for approximate indexes."""

from pathlib import Path

import numpy as np
import pytest

from model.recall import NUM_HITS, measure_recall
from model.retrieving import Retriever
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.identifiers import hash_bytes
from schemas.protocols import FloatArray
from tests.banks import get_embedder, make_dropping_table, make_vector_segment, open_vector_bank

NUM_VECTORS = 600


def make_vectors(num_vectors: int, spread: float = 0.8) -> tuple[list[str], FloatArray]:
    """Unit vectors in groups that are the looser the larger ``spread``, one of them of a text without a known word."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(40, get_embedder().dimension))
    vectors = centres[draw.integers(40, size=num_vectors)] + spread * draw.normal(size=(num_vectors, centres.shape[1]))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[7] = 0
    return sorted(hash_bytes(b"%d" % row) for row in range(num_vectors)), vectors.astype(np.float32)


def open_bank(folder: Path, factory: str, num_deleted: int) -> tuple[Bank, list[str], FloatArray]:
    ref_ids, vectors = make_vectors(NUM_VECTORS)
    half = NUM_VECTORS // 2
    files = make_vector_segment(folder, "first", ref_ids[:half], vectors[:half], factory)
    files += make_vector_segment(folder, "second", ref_ids[half:], vectors[half:], "Flat")
    files += make_dropping_table(folder, "tombstones", ref_ids[100 : 100 + num_deleted])
    return open_vector_bank(folder, files), ref_ids, vectors


def count_slowly(bank: Bank, ref_ids: list[str], vectors: FloatArray, num_deleted: int) -> float:
    """The share of the nearest that a search for every live vector finds, each compared with all in float64."""
    live = [row for row in range(len(ref_ids)) if not 100 <= row < 100 + num_deleted]
    retriever = Retriever(bank, get_embedder())
    num_right = num_all = 0
    for row in live:
        if not vectors[row].any():
            continue
        others = [other for other in live if other != row]
        similarity = {
            ref_ids[other]: float(vectors[other].astype(float) @ vectors[row].astype(float)) for other in others
        }
        last = sorted(similarity.values())[-NUM_HITS]
        rows, _ = retriever.search_vectors(vectors[row : row + 1], NUM_HITS + 1)
        hits = [retriever.get_ref_id(int(hit)) for hit in rows[0]]
        hits = [hit for hit in hits if hit != ref_ids[row]][:NUM_HITS]
        num_right += sum(similarity[hit] >= last - 1e-5 for hit in hits)
        num_all += NUM_HITS
    return num_right / num_all


@pytest.mark.parametrize(("factory", "num_deleted"), [("Flat", 0), ("Flat", 90), ("IVF64,SQ8", 0), ("IVF64,SQ8", 90)])
def test_recall_is_that_of_comparing_all(tmp_path: Path, factory: str, num_deleted: int) -> None:
    bank, ref_ids, vectors = open_bank(tmp_path, factory, num_deleted)
    found = measure_recall(bank, Retriever(bank, get_embedder()), num_queries=NUM_VECTORS, seed=0)
    assert found.num_queries == NUM_VECTORS - num_deleted - 1
    assert (found.num_vectors, found.num_live) == (NUM_VECTORS, NUM_VECTORS - num_deleted)
    assert (found.num_indexes, found.num_exact) == (2, 2 if factory == "Flat" else 1)
    assert found.recall == pytest.approx(count_slowly(bank, ref_ids, vectors, num_deleted), abs=1e-9)
    assert found.recall == 1 if factory == "Flat" else 0.3 < found.recall < 1


def test_an_index_that_looks_into_few_lists_is_seen(tmp_path: Path) -> None:
    """What an index does not find lowers the figure: 32 of 64 lists find more than a search that is cut short."""
    ref_ids, vectors = make_vectors(NUM_VECTORS, spread=20.0)
    bank = open_vector_bank(tmp_path, make_vector_segment(tmp_path, "only", ref_ids, vectors, "IVF64,SQ8"))
    retriever = Retriever(bank, get_embedder())
    usual = measure_recall(bank, retriever, num_queries=200, seed=0).recall
    retriever._segments[0]._index.nprobe = 1
    assert measure_recall(bank, retriever, num_queries=200, seed=0).recall < usual - 0.2


def test_the_same_seed_draws_the_same_sample(tmp_path: Path) -> None:
    bank, _, _ = open_bank(tmp_path, "IVF64,SQ8", 0)
    retriever = Retriever(bank, get_embedder())
    first, again, other = (measure_recall(bank, retriever, num_queries=30, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.recall != other.recall


def test_a_bank_of_one_reference_has_no_neighbours(tmp_path: Path) -> None:
    ref_ids, vectors = make_vectors(8)
    bank = open_vector_bank(tmp_path, make_vector_segment(tmp_path, "only", ref_ids[:1], vectors[:1]))
    with pytest.raises(InputError, match="too few references"):
        measure_recall(bank, Retriever(bank, get_embedder()), num_queries=5, seed=0)
