"""What an evaluation measures, item by item, and how sure it is.

A figure is a sum over items divided by a sum of their weights: nats by tokens, right answers by questions. Because the
items stay with it, its interval is a bootstrap over them, the difference of two ways of reading is one over pairs, and
runs of another day are compared item by item (:mod:`flows.evaluating.comparison`). An item is what is independent of
the others: a document and neither its tokens nor the questions that are made of it, a question and not its memories.

Shape letters: N items, R rounds.
"""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

DoubleArray = NDArray[np.float64]

SHARE, CHANGE = "share", "change of share"
"""Units: of a share, and of the difference of two, which is none."""

ROUNDS = 2_000
"""Rounds of the bootstrap: the ends of an interval then vary by about a fiftieth of its width with the seed."""

CONFIDENCE = 0.95

ROUNDS_AT_ONCE = 500

MIN_ITEMS = 5
"""With fewer, no bootstrap is to be believed: of two items the interval holds the truth in half of all cases."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with its interval.

    Attributes:
        value: the figure over all items.
        low: lower end of the interval.
        high: upper end of it.
        num_items: items it was made of; 1 where there is but one in each stratum.
    """

    value: float
    low: float
    high: float
    num_items: int

    @property
    def is_above_zero(self) -> bool:
        """Whether all of the interval is above 0; of fewer than five items nothing is said."""
        return self.num_items >= MIN_ITEMS and self.low > 0

    def format(self, digits: int = 4, *, signed: bool = False) -> str:
        """Returns it as a table shows it: the figure, and the ends of the interval in brackets."""
        sign = "+" if signed else ""
        return f"{self.value:{sign}.{digits}f} [{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"

    def format_share(self) -> str:
        """Returns a share as a table shows it, in percent."""
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """A figure and the items it is made of.

    Attributes:
        name: what was measured: ``loss``, ``recall@5``.
        way: what was measured so: ``retrieved``, ``bm25``.
        group: which part of the items these are, a source or a kind; empty for all.
        unit: ``nats a token``, ``share`` or ``change of share``, which may be negative.
        better: ``lower``, ``higher``, or empty where neither is.
        keys: name of each item; the same item has the same name in every run.
        totals: what each item adds, (N,) float64.
        weights: what it is divided by, (N,) float64, none negative and not all 0.
        strata: for each item the stratum it is in; the figure is then the mean of the strata, each of equal weight, and
            items are drawn anew within theirs. Empty for a single one.
    """

    name: str
    way: str
    group: str = ""
    unit: str
    better: str
    keys: tuple[str, ...]
    totals: DoubleArray
    weights: DoubleArray
    strata: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks that the parts fit.

        Raises:
            ValueError: they do not, or there is nothing to divide by.
        """
        lengths = {len(self.keys), len(self.totals), len(self.weights), len(self.strata or self.keys)}
        if len(lengths) != 1:
            raise ValueError(f"measurement {self.name} of {self.way}: its columns have {sorted(lengths)} items")
        if len(set(self.keys)) != len(self.keys):
            raise ValueError(f"measurement {self.name} of {self.way}: two items have the same key")
        if any(self.weights[rows].sum() <= 0 for rows in self._list_strata()) or not self.keys:
            raise ValueError(f"measurement {self.name} of {self.way}: nothing was measured")

    @property
    def label(self) -> tuple[str, str, str]:
        """What it is compared by: name, way and group."""
        return self.name, self.way, self.group

    @property
    def value(self) -> float:
        """The figure over all items."""
        shares = [self.totals[rows].sum() / self.weights[rows].sum() for rows in self._list_strata()]
        return float(np.mean(shares))

    @functools.cached_property
    def interval(self) -> Interval:
        """:meth:`measure_interval` as all reports have it; made once."""
        return self.measure_interval()

    @property
    def num_free(self) -> int:
        """Degrees of freedom: the items less one for each stratum."""
        return len(self.keys) - len(self._list_strata())

    @property
    def _is_proportion(self) -> bool:
        """Whether it is a share of items for each of which something holds or not, or for all or none of them."""
        if self.unit != SHARE or self.strata:
            return False
        is_plain = np.isin(self.totals, (0, 1)).all() and (self.weights == 1).all()
        return bool(is_plain or (self.totals == 0).all() or (self.totals == self.weights).all())

    def measure_interval(self, *, rounds: int = ROUNDS, confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
        """Returns the figure with its interval.

        A proportion has Wilson's, which is not empty where all or none of the items hold; so has a share of which that
        is so, whatever the items weigh. Of all else it is a bootstrap's: items are drawn with replacement, as many as
        there are, and the percentiles are taken further out the fewer items there are, as a t distribution is wider
        than a normal one (expanded percentiles: Hesterberg 2015, arXiv 1411.5279). Of a single item, or one in each
        stratum, nothing is known: both ends are the figure. A share of nearly all or nearly none of the cases, where a
        few items differ from all others, has an interval that is too narrow, since many rounds miss these few.

        Args:
            rounds: how often.
            confidence: share of the rounds that the interval holds.
            seed: of the draws; equal items, seed and rounds give an equal interval.
        """
        num_items, value = len(self.keys), self.value
        if self.num_free < 1:
            return Interval(value=value, low=value, high=value, num_items=1)
        if self._is_proportion:
            low, high = find_wilson_interval(value, num_items, confidence)
        else:
            tail = find_tail(num_items, self.num_free, confidence)
            low, high = np.quantile(self.draw_values(rounds=rounds, seed=seed), [tail, 1 - tail])
        return Interval(value=value, low=min(float(low), value), high=max(float(high), value), num_items=num_items)

    def draw_values(self, *, rounds: int = ROUNDS, seed: int = 0) -> DoubleArray:
        """Returns the figure of each round of the bootstrap, (R,)."""
        generator = np.random.default_rng(seed)
        values_R: DoubleArray = np.zeros(rounds)
        strata = self._list_strata()
        for rows in strata:
            num_items = len(rows)
            chances = np.full(num_items, 1 / num_items)
            for start in range(0, rounds, ROUNDS_AT_ONCE):
                some = slice(start, min(start + ROUNDS_AT_ONCE, rounds))
                counts_RN = generator.multinomial(num_items, chances, size=some.stop - some.start)
                weights_R = counts_RN @ self.weights[rows]
                totals_R = counts_RN @ self.totals[rows]
                # A round that drew only items without weight says nothing; it counts as the figure itself.
                whole = self.totals[rows].sum() / self.weights[rows].sum()
                shares_R = np.divide(totals_R, weights_R, out=np.full(len(totals_R), whole), where=weights_R > 0)
                values_R[some] += shares_R / len(strata)
        return values_R

    def select(self, group: str, keys: Sequence[str]) -> "Measurement":
        """Returns the part of it that consists of some items, in their order here, without strata."""
        wanted = set(keys)
        rows = [row for row, key in enumerate(self.keys) if key in wanted]
        return dataclasses.replace(
            self,
            group=group,
            keys=tuple(self.keys[row] for row in rows),
            totals=self.totals[rows],
            weights=self.weights[rows],
            strata=(),
        )

    def _list_strata(self) -> list[np.ndarray]:
        if not self.strata:
            return [np.arange(len(self.keys))]
        names = np.array(self.strata)
        return [np.flatnonzero(names == name) for name in dict.fromkeys(self.strata)]


def find_wilson_interval(share: float, num_items: int, confidence: float) -> tuple[float, float]:
    """Returns the interval of a proportion (Wilson 1927)."""
    score = float(norm.ppf((1 + confidence) / 2)) ** 2 / num_items
    middle = (share + score / 2) / (1 + score)
    half = math.sqrt(score * (share * (1 - share) + score / 4)) / (1 + score)
    return middle - half, middle + half


def find_tail(num_items: int, num_free: int, confidence: float) -> float:
    """Returns the share of the rounds that is left out at each end of an interval.

    Args:
        num_items: items.
        num_free: degrees of freedom, at least 1.
        confidence: of the interval.
    """
    widened = math.sqrt(num_items / num_free) * float(t.ppf((1 + confidence) / 2, num_free))
    return float(norm.cdf(-widened))


def subtract(name: str, way: str, first: Measurement, second: Measurement, *, better: str = "higher") -> Measurement:
    """Returns by how much one figure exceeds another, item by item: what a paired test takes.

    Args:
        name: what the difference is called.
        way: what it is of.
        first: measured on the same items with the same weights as ``second``.
        second: what is taken away.
        better: ``lower`` or ``higher``.

    Raises:
        ValueError: the items or their weights differ.
    """
    if first.keys != second.keys or first.strata != second.strata or not np.array_equal(first.weights, second.weights):
        raise ValueError(f"{first.label} and {second.label} are of different items; they cannot be subtracted")
    unit = CHANGE if first.unit == SHARE else first.unit
    return dataclasses.replace(first, name=name, way=way, unit=unit, better=better, totals=first.totals - second.totals)


def measure_share(
    name: str,
    way: str,
    keys: Sequence[str],
    flags: Sequence[bool | float],
    *,
    group: str = "",
    unit: str = SHARE,
    better: str = "higher",
    strata: Sequence[str] = (),
) -> Measurement:
    """Returns the share of items for which something holds, or the mean of a number between 0 and 1.

    Args:
        name: what holds.
        way: of what.
        keys: name of each item.
        flags: whether it holds.
        group: which part of the items these are.
        unit: ``share``, or ``change of share`` where the number may be negative.
        better: ``lower``, ``higher`` or empty.
        strata: as in :class:`Measurement`.
    """
    totals = np.array(flags, dtype=np.float64)
    return Measurement(
        name=name,
        way=way,
        group=group,
        unit=unit,
        better=better,
        keys=tuple(keys),
        totals=totals,
        weights=np.ones(len(totals)),
        strata=tuple(strata),
    )


def measure_by_item(
    name: str,
    way: str,
    items: Sequence[str],
    values: Sequence[float | None],
    *,
    group: str = "",
    unit: str = SHARE,
    better: str = "higher",
) -> Measurement:
    """Returns the mean of something over cases, several of which may be of the same item.

    Args:
        name: what it is.
        way: of what.
        items: for each case what it is of, and not independent of: at least one.
        values: for each case, None where it cannot be said, which leaves the case out, and an item of no other case.
        group: which part of the items these are.
        unit: of the figure.
        better: ``lower``, ``higher`` or empty.

    Raises:
        ValueError: it can be said of no case.
    """
    totals: defaultdict[str, float] = defaultdict(float)
    weights: defaultdict[str, float] = defaultdict(float)
    for item, value in zip(items, values, strict=True):
        if value is not None:
            totals[item] += value
            weights[item] += 1
    keys = sorted(totals)
    return Measurement(
        name=name,
        way=way,
        group=group,
        unit=unit,
        better=better,
        keys=tuple(keys),
        totals=np.array([totals[key] for key in keys]),
        weights=np.array([weights[key] for key in keys]),
    )
