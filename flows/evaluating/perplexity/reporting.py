"""What losses in several ways of knowing say: gains over no memory with intervals, tables, charts and verdicts."""

from collections.abc import Mapping, Sequence
from typing import Any

from flows.evaluating.measurements import Interval, Measurement, subtract
from flows.evaluating.perplexity.passages import HeldOutSample
from flows.evaluating.perplexity.ways import SWEPT, WayOptions, name_variant
from flows.evaluating.suite_reports import Chart, Point, Series, SuiteReport, Table, Verdict


def make_report(
    sample: HeldOutSample,
    losses: dict[str, Measurement],
    ways: Sequence[str],
    options: WayOptions,
    *,
    data: dict[str, Any],
    settings: dict[str, Any],
    command: str,
    seconds: float,
) -> SuiteReport:
    """Makes tables, charts and verdicts of losses."""
    none = losses["none"]
    gains = {name: subtract("gain", name, none, loss) for name, loss in losses.items() if name != "none"}
    by_source = {
        name: {source: _take_source(gain, source) for source in sample.sources} for name, gain in gains.items()
    }
    intervals = {name: gain.interval for name, gain in gains.items()}
    first = options.num_references[0]
    shown = [name for way in ways if (name := _find_shown(way, options.num_references, gains))]
    rows = [[name, f"{losses[name].value:.4f}", _format_gain(intervals.get(name))] for name in ("none", *shown)]
    cells = [[name, *(part.interval.format(3, signed=True) for part in by_source[name].values())] for name in shown]
    tables = [
        Table(
            title=f"loss in nats a token, and gain over none: {data['num_documents']} documents, "
            f"{data['num_tokens']:,} tokens; 95% intervals over documents",
            columns=["read", "loss", "gain"],
            rows=rows,
            numeric=frozenset((1, 2)),
        ),
        Table(
            title="gain over none by corpus",
            columns=["read", *sample.sources],
            rows=cells,
            numeric=frozenset(range(1, 1 + len(sample.sources))),
        ),
    ]
    numbers = sorted(set(options.num_references))
    swept = [way for way in SWEPT if any(name_variant(way, number) in gains for number in numbers)]
    if len(numbers) > 1 and swept:
        cells = [
            [str(number), *(_format_gain(intervals.get(name_variant(way, number))) for way in swept)]
            for number in numbers
        ]
        tables.append(
            Table(
                title="gain over none by the number of references",
                columns=["references", *swept],
                rows=cells,
                numeric=frozenset(range(len(swept) + 1)),
            )
        )
    return SuiteReport(
        suite="perplexity",
        title="Perplexity: the loss of held-out text in every way of knowing",
        explanation=(
            "All ways score the same tokens of held-out documents; gains are over the same model given no memory, in "
            "nats a token, each corpus of equal weight. Intervals are bootstraps over documents. References that "
            f"overlap a passage by more than {options.max_overlap:.3g}"
            + (f", or share {options.shared_run} consecutive tokens with it," if options.shared_run else "")
            + " are not read"
            + ("." if options.own_document else ", and none of its own document in any version.")
        ),
        command=command,
        data=data,
        settings=settings,
        measurements=[
            *losses.values(),
            *gains.values(),
            *(part for of_way in by_source.values() for part in of_way.values()),
        ],
        tables=tables,
        charts=_draw(shown, by_source, intervals, numbers, swept),
        verdicts=_judge(intervals, by_source, gains, losses, first),
        seconds=seconds,
    )


def _find_shown(way: str, numbers: Sequence[int], gains: Mapping[str, Measurement]) -> str | None:
    """Returns the name of a way with the number all are compared with, or the next smaller one there was room for."""
    fitting = [number for number in sorted(numbers) if number <= numbers[0] and name_variant(way, number) in gains]
    return name_variant(way, fitting[-1]) if fitting else None


def _take_source(gain: Measurement, source: str) -> Measurement:
    keys = [key for key, stratum in zip(gain.keys, gain.strata, strict=True) if stratum == source]
    return gain.select(source, keys)


def _format_gain(interval: Interval | None) -> str:
    return "" if interval is None else interval.format(signed=True)


def _draw(
    shown: Sequence[str],
    by_source: dict[str, dict[str, Measurement]],
    intervals: dict[str, Interval],
    numbers: Sequence[int],
    swept: Sequence[str],
) -> list[Chart]:
    bars = [
        Series(
            label=name,
            points=[
                Point(x="all", interval=intervals[name]),
                *(Point(x=source, interval=part.interval) for source, part in by_source[name].items()),
            ],
        )
        for name in shown
    ]
    charts = [
        Chart(
            name="gain-by-corpus",
            title="Gain over no memory",
            x_label="held-out corpus",
            y_label="nats a token",
            series=bars,
        )
    ]
    if len(numbers) > 1 and swept:
        lines = [
            Series(
                label=way,
                points=[
                    Point(x=float(number), interval=intervals[name_variant(way, number)])
                    for number in numbers
                    if name_variant(way, number) in intervals
                ],
            )
            for way in swept
        ]
        charts.append(
            Chart(
                name="gain-by-references",
                title="Gain over no memory by the number of references",
                x_label="references a chunk",
                y_label="nats a token",
                series=lines,
            )
        )
    return charts


def _judge(
    intervals: dict[str, Interval],
    by_source: dict[str, dict[str, Measurement]],
    gains: dict[str, Measurement],
    losses: dict[str, Measurement],
    first: int,
) -> list[Verdict]:
    verdicts = []
    retrieved, random, context = (name_variant(way, first) for way in ("retrieved", "random", "in context"))
    if retrieved in intervals:
        found = intervals[retrieved]
        verdicts.append(
            Verdict(question="Does memory beat none?", holds=found.is_above_zero, evidence=f"gain {found.format()}")
        )
        above = {source: part.interval for source, part in by_source[retrieved].items()}
        evidence = ", ".join(f"{source} {interval.format(3, signed=True)}" for source, interval in above.items())
        verdicts.append(
            Verdict(
                question="Does it on every corpus?",
                holds=all(interval.is_above_zero for interval in above.values()),
                evidence=evidence,
            )
        )
    if retrieved in intervals and random in intervals:
        over = subtract("over random", retrieved, losses[random], losses[retrieved]).interval
        verdicts.append(
            Verdict(
                question="Is it what was retrieved, not memory as such?",
                holds=over.is_above_zero,
                evidence=f"over random references {over.format(signed=True)}",
            )
        )
    texts = [name for name in gains if name.startswith("text of ")]
    if retrieved in intervals and texts:
        best = min(texts, key=lambda name: losses[name].value)
        over = subtract("over text", retrieved, losses[best], losses[retrieved]).interval
        verdicts.append(
            Verdict(
                question="Does it beat the references as text, in as many positions?",
                holds=over.is_above_zero,
                evidence=f"over {best}, the best number of them, {over.format(signed=True)}",
            )
        )
    for compressed in (name for name in intervals if name.startswith("compressed") and retrieved in intervals):
        raw, stored = intervals[retrieved], intervals[compressed]
        lost = subtract("lost by the codec", compressed, losses[compressed], losses[retrieved]).interval
        verdicts.append(
            Verdict(
                question=f"Is {compressed} within the interval of raw?",
                holds=raw.low <= stored.value <= raw.high,
                evidence=f"gain {stored.value:+.4f} in [{raw.low:+.4f}, {raw.high:+.4f}]; "
                f"loss more by {lost.format(signed=True)}",
            )
        )
    if retrieved in intervals and context in intervals:
        more = subtract("over alone", context, losses[retrieved], losses[context]).interval
        verdicts.append(
            Verdict(
                question="Do memories cut from whole documents beat those written alone?",
                holds=more.is_above_zero,
                evidence=f"by {more.format(signed=True)}",
            )
        )
    return verdicts
