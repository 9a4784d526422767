"""How ``memory3 eval attribution`` tells what it found: figures of each kind of text, tables, verdicts, failures.

cited chunks, way by way -> figures (:mod:`flows.evaluating.attribution.figures`) -> parts of a report
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from flows.evaluating.attribution.figures import (
    CORRELATION,
    LARGEST,
    LEAST,
    NEAREST,
    POSITIVE,
    RANDOM,
    SUPPORT,
    TOP,
    TRUE,
    JudgedChunk,
    correlate_ranks,
    get_support,
    measure_chunks,
    rate_chunk,
)
from flows.evaluating.measurements import Measurement, subtract
from flows.evaluating.suite_reports import Chart, Point, Series, Table, Verdict
from model.citing import REFUTED

NO_LOOPS = "no loops"
"""The chunks at least half of which is new."""


def measure_all(judged: dict[str, list[JudgedChunk]]) -> list[Measurement]:
    """Returns the figures of all ways, and those of the chunks that are no loops where there are others."""
    measurements: list[Measurement] = []
    for way, chunks in judged.items():
        measurements += measure_way(way, chunks)
        fresh = [one for one in chunks if not one.is_loop]
        if fresh and len(fresh) < len(chunks):
            measurements += measure_way(way, fresh, group=NO_LOOPS)
    return measurements


def measure_way(way: str, chunks: Sequence[JudgedChunk], *, group: str = "") -> list[Measurement]:
    """Returns the figures of one way of making texts, each of several memories of a chunk."""
    found: list[Measurement] = []
    for name in (LARGEST, POSITIVE, TRUE, SUPPORT):
        unit = "nats a chunk" if name == SUPPORT else "share"
        by_which = {
            which: measure_chunks(
                name,
                f"{way}, {which}",
                chunks,
                functools.partial(rate_chunk, name=name, which=which),
                group=group,
                unit=unit,
            )
            for which in (TOP, RANDOM, NEAREST, LEAST)
        }
        found += by_which.values()
        found.append(subtract(f"{name}, more", f"{way}, {TOP} over {RANDOM}", by_which[TOP], by_which[RANDOM]))
    found.append(
        measure_chunks(
            SUPPORT, f"{way}, all memories", chunks, lambda chunk: chunk.support, group=group, unit="nats a chunk"
        )
    )
    if any(correlate_ranks(judged.chunk) is not None for judged in chunks):
        found.append(measure_chunks(CORRELATION, way, chunks, correlate_ranks, group=group, unit="Spearman's rho"))
    return found


def count_chunks(chunks: Sequence[JudgedChunk]) -> dict[str, Any]:
    """Returns how many chunks there are of a way, and of what kind."""
    return {
        "chunks": len(chunks),
        "items": len({one.item for one in chunks}),
        "share_distinct": len({one.chunk.tokens for one in chunks}) / len(chunks),
        "share_loops": sum(one.is_loop for one in chunks) / len(chunks),
        "share_refuted": sum(one.chunk.citations[0].verdict == REFUTED for one in chunks) / len(chunks),
        "mean_top_attention": sum(one.chunk.citations[0].attention for one in chunks) / len(chunks),
    }


def _format(measurement: Measurement | None) -> str:
    if measurement is None:
        return ""
    interval = measurement.interval
    if measurement.name.endswith(", more"):
        return interval.format(3, signed=True)
    return interval.format_share() if measurement.unit == "share" else interval.format(3, signed=True)


def make_tables(measurements: Sequence[Measurement], counts: dict[str, dict[str, Any]]) -> list[Table]:
    """Returns the figures as people read them."""
    rows = [
        [
            way,
            f"{count['chunks']:,}",
            f"{count['items']:,}",
            f"{count['share_distinct']:.1%}",
            f"{count['share_loops']:.1%}",
            f"{count['mean_top_attention']:.1%}",
        ]
        for way, count in counts.items()
    ]
    columns = ["text", "chunks", "items", "distinct", "loops", "attention of the top citation"]
    tables = [Table(title="What was read", columns=columns, rows=rows, numeric=frozenset(range(1, 6)))]
    found = {measurement.label: measurement for measurement in measurements}
    for group in dict.fromkeys(measurement.group for measurement in measurements):
        rows = []
        for way in counts:
            for name in (LARGEST, POSITIVE, TRUE, SUPPORT):
                ways = [(name, f"{way}, {which}") for which in (TOP, RANDOM)]
                ways += [(f"{name}, more", f"{way}, {TOP} over {RANDOM}")]
                ways += [(name, f"{way}, {which}") for which in (NEAREST, LEAST)]
                rows.append([way, name, *(_format(found.get((*label, group))) for label in ways)])
            rows.append([way, f"{SUPPORT}, all memories", _format(found.get((SUPPORT, f"{way}, all memories", group)))])
            rows[-1] += [""] * 4
            rows.append([way, CORRELATION, _format(found.get((CORRELATION, way, group))), *[""] * 4])
        columns = ["text", "figure", TOP, RANDOM, "more", NEAREST, LEAST]
        title = f"Citations{f', {group}' if group else ''}; nats a chunk where no share is meant"
        tables.append(Table(title=title, columns=columns, rows=rows, numeric=frozenset(range(2, 7))))
    return tables


def make_charts(judged: dict[str, list[JudgedChunk]]) -> list[Chart]:
    """Returns the support of memories by their place in the order of attention."""
    series = []
    for way, chunks in judged.items():
        most = max(len(one.chunk.citations) for one in chunks)
        points = []
        for place in range(most):
            some = [one for one in chunks if len(one.chunk.citations) > place]
            measured = measure_chunks(SUPPORT, way, some, functools.partial(get_support, place=place))
            points.append(Point(x=place + 1, interval=measured.interval))
        series.append(Series(label=way, points=points))
    return [
        Chart(
            name="support-by-attention",
            title="Support of memories by their place in the order of attention",
            x_label="place, 1 for the top citation",
            y_label="nats a chunk",
            series=series,
        )
    ]


def make_verdicts(measurements: Sequence[Measurement], judged: dict[str, list[JudgedChunk]]) -> list[Verdict]:
    """Returns whether the top citation is true more often than a random memory, in each way and sense."""
    found = {measurement.label: measurement for measurement in measurements}
    questions = {
        LARGEST: "is the top citation the memory of the largest support more often than a random one?",
        POSITIVE: "does the top citation support its chunk more often than a random memory?",
        TRUE: "is the top citation confirmed more often than a random memory?",
    }
    verdicts = []
    for way in judged:
        for name, question in questions.items():
            more = found[f"{name}, more", f"{way}, {TOP} over {RANDOM}", ""].interval
            top, random = (found[name, f"{way}, {which}", ""].interval for which in (TOP, RANDOM))
            evidence = f"{top.format_share()} against {random.format_share()}, {more.format(3, signed=True)} more"
            verdicts.append(Verdict(question=f"{way}: {question}", holds=more.is_above_zero, evidence=evidence))
    return verdicts


def list_failures(decode: Callable[[Sequence[int]], str], judged: dict[str, list[JudgedChunk]]) -> list[dict[str, Any]]:
    """Returns the chunks whose top citation was refuted, those of the most negative support first."""
    refuted = [one for chunks in judged.values() for one in chunks if one.chunk.citations[0].verdict == REFUTED]
    refuted.sort(key=lambda one: one.chunk.citations[0].support)
    failures = []
    for one in refuted:
        top = one.chunk.citations[0]
        best = max(one.chunk.citations, key=lambda citation: citation.support)
        failures.append(
            {
                "item": one.item,
                "text": one.name,
                "way": one.way,
                "first_token": one.chunk.first_token,
                "chunk": decode(one.chunk.tokens),
                "is_loop": one.is_loop,
                "cited": top.ref_id,
                "attention": round(top.attention, 4),
                "support": round(top.support, 4),
                "best": best.ref_id,
                "best_attention": round(best.attention, 4),
                "best_support": round(best.support, 4),
            }
        )
    return failures
