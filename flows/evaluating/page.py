"""An evaluation as one page that works offline: every figure with its interval, its command and its data.

No script, and nothing that is fetched: charts are pictures inside the page. All text is escaped, since failures quote
documents; the page forbids the browser everything but its own style sheet and these pictures.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from flows.reporting.marking import clean_text
from flows.reporting.page import STYLE_SHEET
from flows.reporting.page import TEMPLATES as REPORT_TEMPLATES

TEMPLATES = Path(__file__).parent / "templates"

MAX_FAILURES = 200
"""Failures of a suite on the page; its report has all of them."""


def render_page(reports: Sequence[Mapping[str, Any]], pictures: Mapping[tuple[str, str], bytes]) -> str:
    """Returns the page of some suites as HTML.

    Args:
        reports: what :meth:`flows.evaluating.suite_reports.SuiteReport.to_json` returned for each.
        pictures: the charts as SVG, by suite and name.
    """
    # The page looks like the report of a bank, with a few rules of its own.
    sheets = (REPORT_TEMPLATES / STYLE_SHEET, TEMPLATES / "evaluation.css")
    style = "".join(sheet.read_text(encoding="utf-8") for sheet in sheets)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader((TEMPLATES, REPORT_TEMPLATES)),
        autoescape=True,
        finalize=lambda value: clean_text(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = format_value
    page = environment.get_template("evaluation.html").render(
        reports=reports,
        pictures={key: base64.b64encode(picture).decode() for key, picture in pictures.items()},
        max_failures=MAX_FAILURES,
        style=style,
        style_digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    )
    return page + "\n"


def format_value(value: Any) -> str:
    """Returns a value of settings or data as people read it."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {format_value(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
