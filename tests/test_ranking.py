"""The cut in a ranking of documents by score: by hand, against a sort, and in any order of the documents."""

import math
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.ranking import choose_score_cut
from schemas.errors import InputError

SCORES = np.array([3.0, 1.0, np.nan, 2.0, 2.0, 5.0, 2.0], np.float32)
IDS = pa.array(["g", "f", "e", "d", "b", "a", "c"])


@pytest.mark.parametrize(
    ("threshold", "top_share", "kept"),
    [
        (None, None, "abcdefg"),
        (2.0, None, "abcdg"),
        (2.1, None, "ag"),
        (None, 3 / 7, "abg"),
        (None, 0.43, "abcg"),
        (None, 1.0, "abcdefg"),
        (3.0, 4 / 7, "ag"),
        (1.0, 2 / 7, "ag"),
    ],
)
def test_score_cut(threshold: float | None, top_share: float | None, kept: str) -> None:
    dropped = choose_score_cut(SCORES, IDS, threshold, top_share)
    assert "".join(sorted(IDS.filter(pa.array(~dropped)).to_pylist())) == kept


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 20), st.randoms(use_true_random=False))
def test_score_cut_does_not_depend_on_order(grades: list[int], parts: int, random: Any) -> None:
    ids = [f"d{number}" for number in range(len(grades))]
    order = list(range(len(grades)))
    random.shuffle(order)
    share = parts / 20
    scores = np.array(grades, np.float64)
    dropped = choose_score_cut(scores, pa.array(ids), 1.0, share)
    again = choose_score_cut(scores[order], pa.array([ids[row] for row in order]), 1.0, share)
    assert np.array_equal(dropped[order], again)
    best = sorted(range(len(grades)), key=lambda row: (-grades[row], ids[row]))[: -(-parts * len(grades) // 20)]
    assert set(np.flatnonzero(~dropped)) == {row for row in best if grades[row] >= 1}


def test_a_threshold_means_the_number_that_scores_can_hold() -> None:
    scores = np.array([0.7, 0.6999], np.float32)
    assert choose_score_cut(scores, pa.array(["a", "b"]), 0.7).tolist() == [False, True]


def test_score_cut_of_nothing() -> None:
    assert choose_score_cut(np.empty(0, np.float32), pa.array([], pa.string()), 1.0, 0.5).tolist() == []


@pytest.mark.parametrize(
    ("threshold", "top_share", "message"),
    [
        (None, 0.0, "quality: top_share is 0.0, must be above 0 and at most 1"),
        (None, 1.1, "top_share is 1.1"),
        (math.nan, None, "quality: threshold is nan, must be a finite number"),
    ],
)
def test_score_cut_is_checked(threshold: float | None, top_share: float | None, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        choose_score_cut(SCORES, IDS, threshold, top_share)
