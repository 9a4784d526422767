"""Charts of evaluations as SVG: bars or lines with their intervals, the same bytes for the same figures.

Letters stay letters, so that a chart can be searched and is small; the page that shows it says in words what it shows.
"""

import io
from typing import Any

import numpy as np

from flows.evaluating.suite_reports import Chart

WIDTH_INCHES = 8.0
HEIGHT_INCHES = 4.2

RULES: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "memory3",
    "font.family": "sans-serif",
    "text.parse_math": False,
}
"""Letters as letters, names as they are though they have a ``$``, and ids that do not change from run to run."""


def draw_chart(chart: Chart) -> bytes:
    """Returns a chart as an SVG file: lines where places are numbers, groups of bars where they are names."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(RULES):
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        names = list(dict.fromkeys(point.x for series in chart.series for point in series.points))
        has_names = any(isinstance(name, str) for name in names)
        for number, series in enumerate(chart.series):
            values = np.array([point.interval.value for point in series.points])
            below = values - np.array([point.interval.low for point in series.points])
            above = np.array([point.interval.high for point in series.points]) - values
            ends = np.maximum(np.stack((below, above)), 0)
            if has_names:
                width = 0.8 / len(chart.series)
                places = np.array([float(names.index(point.x)) for point in series.points])
                places += (number - (len(chart.series) - 1) / 2) * width
                axes.bar(places, values, width, label=series.label, yerr=ends, error_kw={"linewidth": 0.8})
            else:
                places = np.array([float(point.x) for point in series.points])
                axes.errorbar(places, values, yerr=ends, label=series.label, marker="o", markersize=4, capsize=3)
        if has_names:
            axes.set_xticks(range(len(names)), [str(name) for name in names])
        elif names:
            axes.set_xticks([float(name) for name in names])
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label)
        axes.set_title(chart.title)
        axes.grid(axis="y", alpha=0.3)
        if len(chart.series) > 1:
            axes.legend(fontsize="small")
        target = io.BytesIO()
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    return target.getvalue()
