"""The folder of an evaluation: a page for people, and for each suite its report, items, tables and charts.

    OUT/index.html                  every figure, its command, its data and its spread
    OUT/SUITE/report.json           :meth:`flows.evaluating.suite_reports.SuiteReport.to_json`
    OUT/SUITE/items.parquet         what each item added to each figure
    OUT/SUITE/table-1.csv ...       the tables
    OUT/SUITE/NAME.svg ...          the charts

A suite is replaced when it is measured again; others stay, so that a long evaluation can be made in parts.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flows.evaluating.charts import draw_chart
from flows.evaluating.measurements import Measurement
from flows.evaluating.page import render_page
from flows.evaluating.suite_reports import SuiteReport
from schemas.atomic import replace_folder, write_bytes_atomically
from schemas.errors import InputError

REPORT_FILE = "report.json"
ITEMS_FILE = "items.parquet"
PAGE_FILE = "index.html"

SUITES = ("perplexity", "knowledge", "attribution", "retrieval")
"""In the order of the page; others follow by name."""

REPORT_KEYS = (
    *("suite", "title", "explanation", "command", "data", "settings"),
    *("figures", "tables", "charts", "verdicts", "failures", "seconds"),
)
"""What every report has."""

ITEMS = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("way", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("unit", pa.string(), nullable=False),
        pa.field("better", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("stratum", pa.string(), nullable=False),
        pa.field("total", pa.float64(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
    ]
)
"""One row an item of a figure."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredSuite:
    """A suite as it was written.

    Attributes:
        report: what :meth:`SuiteReport.to_json` returned.
        measurements: the figures with their items.
    """

    report: dict[str, Any]
    measurements: list[Measurement]


def check_folder(folder: Path) -> None:
    """Checks before work begins that a folder can take an evaluation: it is new, empty, or holds one.

    Raises:
        InputError: it holds something else, or its parent is not there.
    """
    if not folder.absolute().parent.is_dir():
        raise InputError(f"{folder.parent} is no folder; make it, or name another with --out")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder with --out")
    is_known = (folder / PAGE_FILE).is_file() or any(folder.glob(f"*/{REPORT_FILE}"))
    if folder.is_dir() and any(folder.iterdir()) and not is_known:
        raise InputError(f"{folder} holds something else than an evaluation; name another folder with --out")


def write_evaluation(folder: Path, reports: Sequence[SuiteReport]) -> None:
    """Adds suites to an evaluation, or replaces them, and writes its page anew.

    Raises:
        InputError: the folder holds something else.
    """
    check_folder(folder)
    folder.mkdir(exist_ok=True)
    for report in reports:
        with replace_folder(folder / report.suite) as target:
            target.mkdir(exist_ok=True)
            text = json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
            (target / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
            pq.write_table(_list_items(report.measurements), target / ITEMS_FILE, compression="zstd")
            for number, table in enumerate(report.tables, 1):
                rows = io.StringIO()
                csv.writer(rows, lineterminator="\n").writerows([table.columns, *table.rows])
                (target / f"table-{number}.csv").write_text(rows.getvalue(), encoding="utf-8")
            for chart in report.charts:
                (target / f"{chart.name}.svg").write_bytes(draw_chart(chart))
    stored = read_evaluation(folder, skip_damaged=True)
    pictures = {
        (suite.report["suite"], chart["name"]): (folder / suite.report["suite"] / f"{chart['name']}.svg").read_bytes()
        for suite in stored
        for chart in suite.report["charts"]
    }
    write_bytes_atomically(folder / PAGE_FILE, render_page([suite.report for suite in stored], pictures).encode())


def read_evaluation(folder: Path, *, skip_damaged: bool = False) -> list[StoredSuite]:
    """Returns the suites of a folder, in the order of the page.

    Args:
        folder: the folder.
        skip_damaged: leave damaged suites out.

    Raises:
        InputError: the folder holds no suite, or one that is damaged.
    """
    names = sorted(path.parent.name for path in folder.glob(f"*/{REPORT_FILE}"))
    if not names:
        raise InputError(f"{folder} holds no evaluation; make one with memory3 eval all --out {folder}")
    ordered = [name for name in SUITES if name in names] + [name for name in names if name not in SUITES]
    stored = []
    for name in ordered:
        try:
            report = json.loads((folder / name / REPORT_FILE).read_bytes())
            missing = [key for key in REPORT_KEYS if key not in report]
            if missing:
                raise ValueError(f"{REPORT_FILE} has no {missing[0]}")
            items = pq.read_table(folder / name / ITEMS_FILE, schema=ITEMS)
            stored.append(StoredSuite(report=report, measurements=_read_items(items)))
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            if not skip_damaged:
                raise InputError(f"{folder / name} is damaged; measure this suite again ({error})") from error
    return stored


def _list_items(measurements: Sequence[Measurement]) -> pa.Table:
    parts = []
    for measurement in measurements:
        num_items = len(measurement.keys)
        fixed = {name: [getattr(measurement, name)] * num_items for name in ("name", "way", "group", "unit", "better")}
        columns = {
            **fixed,
            "key": list(measurement.keys),
            "stratum": list(measurement.strata or [""] * num_items),
            "total": measurement.totals,
            "weight": measurement.weights,
        }
        parts.append(pa.table(columns, schema=ITEMS))
    return pa.concat_tables(parts) if parts else ITEMS.empty_table()


def _read_items(items: pa.Table) -> list[Measurement]:
    """Returns the measurements of a table, whose rows stand together."""
    labels = list(zip(*(items[name].to_pylist() for name in ("name", "way", "group")), strict=True))
    starts = [row for row in range(len(labels)) if row == 0 or labels[row] != labels[row - 1]]
    measurements = []
    for start, end in zip(starts, [*starts[1:], len(labels)], strict=True):
        rows = items.slice(start, end - start)
        strata = tuple(rows["stratum"].to_pylist())
        measurements.append(
            Measurement(
                name=labels[start][0],
                way=labels[start][1],
                group=labels[start][2],
                unit=rows["unit"][0].as_py(),
                better=rows["better"][0].as_py(),
                keys=tuple(rows["key"].to_pylist()),
                totals=np.array(rows["total"]),
                weights=np.array(rows["weight"]),
                strata=strata if any(strata) else (),
            )
        )
    return measurements
