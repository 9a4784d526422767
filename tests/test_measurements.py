"""Figures with their items: value and interval against slow ones, paired differences, and what is refused."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap

from flows.evaluating.measurements import Measurement, find_tail, measure_by_item, measure_share, subtract


def make_measurement(totals: list[float], weights: list[float], strata: tuple[str, ...] = ()) -> Measurement:
    return Measurement(
        name="loss",
        way="retrieved",
        unit="nats a token",
        better="lower",
        keys=tuple(f"document {row}" for row in range(len(totals))),
        totals=np.array(totals),
        weights=np.array(weights),
        strata=strata,
    )


def draw_items(num_items: int, seed: int = 0) -> tuple[list[float], list[float]]:
    generator = np.random.default_rng(seed)
    weights = generator.integers(50, 500, num_items).astype(float)
    return (weights * generator.normal(3, 0.4, num_items)).tolist(), weights.tolist()


def test_the_value_is_the_ratio_of_sums_and_strata_weigh_the_same() -> None:
    assert make_measurement([1, 5], [1, 2]).value == pytest.approx(2.0)
    of_two = make_measurement([1, 5, 12], [1, 2, 3], ("a", "b", "b"))
    assert of_two.value == pytest.approx((1 / 1 + 17 / 5) / 2)


def test_intervals_are_those_of_another_bootstrap() -> None:
    totals, weights = draw_items(60)
    found = make_measurement(totals, weights).measure_interval(rounds=20_000)
    tail = find_tail(60, 59, 0.95)
    assert 0.02 < tail < 0.025
    other = bootstrap(
        (np.array(totals), np.array(weights)),
        lambda sums, parts, axis: sums.sum(axis) / parts.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        confidence_level=1 - 2 * tail,
        random_state=np.random.default_rng(7),
    ).confidence_interval
    width = other.high - other.low
    assert found.low == pytest.approx(other.low, abs=0.03 * width)
    assert found.high == pytest.approx(other.high, abs=0.03 * width)
    assert found.low < found.value < found.high
    assert found.num_items == 60


def test_strata_are_drawn_each_by_itself() -> None:
    """Against a loop that draws rows by their numbers."""
    totals, weights = draw_items(30)
    strata = tuple("abc"[row % 3] for row in range(30))
    found = make_measurement(totals, weights, strata).measure_interval(rounds=8_000)
    generator = np.random.default_rng(5)
    values = []
    for _ in range(8_000):
        shares = []
        for name in "abc":
            rows = generator.choice([row for row in range(30) if strata[row] == name], 10)
            shares.append(sum(totals[row] for row in rows) / sum(weights[row] for row in rows))
        values.append(np.mean(shares))
    tail = find_tail(30, 27, 0.95)
    low, high = np.quantile(values, [tail, 1 - tail])
    assert found.low == pytest.approx(low, abs=0.05 * (high - low))
    assert found.high == pytest.approx(high, abs=0.05 * (high - low))


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_shares_stay_between_0_and_1_around_their_value(flags: list[bool]) -> None:
    share = measure_share("right", "memory", [str(row) for row in range(len(flags))], flags)
    found = share.measure_interval(rounds=200)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.value == pytest.approx(sum(flags) / len(flags))


def test_intervals_of_few_items_hold_the_truth_as_often_as_they_say() -> None:
    """Normal items of mean 0: plain percentiles would hold it in 84 % of all samples of five."""
    generator = np.random.default_rng(11)
    samples = [make_measurement(generator.normal(0, 1, 6).tolist(), [1.0] * 6) for _ in range(400)]
    intervals = [sample.measure_interval(rounds=500) for sample in samples]
    assert np.mean([part.low <= 0 <= part.high for part in intervals]) > 0.89
    assert np.mean([part.is_above_zero for part in intervals]) < 0.06


def test_proportions_have_wilsons_interval() -> None:
    for num_right, num_items in ((0, 8), (3, 8), (8, 8), (150, 200)):
        flags = [row < num_right for row in range(num_items)]
        found = measure_share("right", "memory", [str(row) for row in range(num_items)], flags).interval
        other = binomtest(num_right, num_items).proportion_ci(method="wilson")
        assert found.low == pytest.approx(other.low, abs=1e-9)
        assert found.high == pytest.approx(other.high, abs=1e-9)


def test_cases_of_an_item_count_as_one() -> None:
    """Ten questions of each document, all answered or none: as sure as one question of each."""
    generator = np.random.default_rng(2)
    items = [f"{row // 10}" for row in range(400)]
    values: list[float | None] = [float(right) for right in generator.random(40) < 0.5 for _ in range(10)]
    alone = measure_share("right", "memory", [str(row) for row in range(400)], [value or 0.0 for value in values])
    together = measure_by_item("right", "memory", items, values)
    assert together.value == alone.value
    assert len(together.keys) == 40
    width = together.interval.high - together.interval.low
    assert width == pytest.approx(10**0.5 * (alone.interval.high - alone.interval.low), rel=0.1)
    unsaid = measure_by_item("right", "memory", items, [None, *values[1:]])
    known = [value for value in values[1:] if value is not None]
    assert unsaid.value == pytest.approx(np.mean(known))
    rarely = measure_by_item("right", "memory", items, [1.0 if row < 30 else None for row in range(400)])
    assert (rarely.keys, rarely.interval.num_items) == (("0", "1", "2"), 3)
    with pytest.raises(ValueError, match="nothing was measured"):
        measure_by_item("right", "memory", items, [None] * 400)
    all_right = measure_by_item("right", "memory", items, [1.0] * 400).interval
    expected = binomtest(40, 40).proportion_ci(method="wilson")
    assert all_right.low == pytest.approx(expected.low)
    assert all_right.high == pytest.approx(1)


def test_a_difference_of_shares_is_no_share() -> None:
    """One answer of a hundred that has become right proves nothing; Wilson's interval of 1 % would be above 0."""
    keys = [str(row) for row in range(100)]
    before = measure_share("right", "memory", keys, [row < 50 for row in range(100)])
    after = measure_share("right", "memory", keys, [row < 51 for row in range(100)])
    gained, lost = subtract("gain", "", after, before), subtract("gain", "", before, after)
    assert gained.value == -lost.value == pytest.approx(0.01)
    assert not gained.interval.is_above_zero
    assert (gained.interval.low, gained.interval.high) == (-lost.interval.high, -lost.interval.low)
    nothing = subtract("gain", "", before, before).interval
    assert (nothing.low, nothing.value, nothing.high) == (0, 0, 0)


def test_of_too_few_items_nothing_is_said() -> None:
    assert not make_measurement([1.0, 1.1, 1.2, 1.3], [1.0] * 4).interval.is_above_zero
    single = make_measurement([1.0, 2.0, 3.0], [1.0] * 3, ("a", "b", "c")).interval
    assert (single.low, single.value, single.high, single.num_items) == (2.0, 2.0, 2.0, 1)


def test_equal_seeds_give_equal_intervals_and_others_do_not() -> None:
    measured = make_measurement(*draw_items(40))
    assert measured.measure_interval(rounds=500) == measured.measure_interval(rounds=500)
    assert measured.measure_interval(rounds=500) != measured.measure_interval(rounds=500, seed=1)


def test_a_paired_difference_is_sharper_than_two_figures() -> None:
    """Documents differ much, the two ways little: only the difference of pairs can tell."""
    totals, weights = draw_items(50)
    first = make_measurement(totals, weights)
    gained = np.random.default_rng(3).normal(0.02, 0.01, 50) * weights
    second = dataclasses.replace(first, way="none", totals=first.totals + gained)
    gain = subtract("gain", "retrieved", second, first)
    assert gain.value == pytest.approx(gained.sum() / np.sum(weights))
    assert gain.interval.is_above_zero
    assert first.interval.high > second.interval.low


def test_differences_of_other_items_are_refused() -> None:
    first = make_measurement([1, 2], [1, 1])
    with pytest.raises(ValueError, match="different items"):
        subtract("gain", "x", first, dataclasses.replace(first, keys=("a", "b")))
    with pytest.raises(ValueError, match="different items"):
        subtract("gain", "x", first, make_measurement([1, 2], [1, 2]))


@pytest.mark.parametrize(
    ("totals", "weights", "strata"),
    [([], [], ()), ([1.0], [0.0], ()), ([1.0, 2.0], [1.0], ()), ([1.0, 2.0], [1.0, 0.0], ("a", "b"))],
)
def test_what_measures_nothing_is_refused(totals: list[float], weights: list[float], strata: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="measurement loss"):
        make_measurement(totals, weights, strata)


def test_items_have_different_keys() -> None:
    with pytest.raises(ValueError, match="same key"):
        measure_share("right", "memory", ["a", "a"], [True, False])


def test_a_part_keeps_its_items() -> None:
    whole = make_measurement([1, 2, 3], [1, 1, 2], ("a", "b", "b"))
    part = whole.select("b", ["document 1", "document 2"])
    assert (part.group, part.strata) == ("b", ())
    assert part.value == pytest.approx(5 / 3)
