"""A report as one HTML file: no script, no font, no picture, and nothing that is fetched from anywhere.

The charts are SVG drawn by template macros, not by matplotlib: a bar is a rectangle with its own title, which follows
the colours of the page in the dark, and text that a screen reader and a search find. One of sixteen bars takes 2.4 kB;
matplotlib's takes 23 kB with its letters as outlines, 16 kB without.

All that comes from a bank is untrusted. Jinja escapes it, :mod:`flows.reporting.marking` makes it readable, and the
page forbids the browser everything but its own style sheet, by a content security policy with that sheet's digest.
"""

import base64
import hashlib
import math
from pathlib import Path
from typing import Any

import jinja2

from flows.console import format_bytes
from flows.reporting.contents import Report, Skipped
from flows.reporting.marking import clean_text, mark_differences, shorten_text
from schemas.atomic import write_bytes_atomically
from schemas.stores import explain_write_errors

TEMPLATES = Path(__file__).parent / "templates"

STYLE_SHEET = "report.css"

REASONS = {
    "exact_duplicate": "the same text stands elsewhere in the corpus, and is stored once",
    "near_duplicate": "nearly the same text is kept; see the clusters below",
    "contaminated": "the text gives away a test text",
    "deleted": "its document was taken out by name",
}
"""What the reasons mean that no reject of the corpus explains."""


def render_page(report: Report) -> str:
    """Returns the report as an HTML document."""
    style = (TEMPLATES / STYLE_SHEET).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": format_number,
        "size": format_bytes,
        "percent": format_percent,
        "shorten": shorten_text,
        "words": _space_words,
        "moment": _format_moment,
    }
    environment.tests["skipped"] = _is_skipped
    page = environment.get_template("report.html").render(
        report=report,
        style=style,
        style_digest=digest,
        reasons=REASONS,
        mark_differences=mark_differences,
    )
    return page + "\n"


def write_page(report: Report, path: Path) -> None:
    """Writes the report as one HTML file, whole or not at all.

    Raises:
        StorageFullError: there is no space left.
        StoreError: the file may not be written.
    """
    content = render_page(report).encode()
    with explain_write_errors(path):
        write_bytes_atomically(path, content)


def _finalize(value: Any) -> Any:
    return clean_text(value) if type(value) is str else value


def _is_skipped(section: object) -> bool:
    return isinstance(section, Skipped)


def _space_words(name: str) -> str:
    return name.replace("_", " ")


def _format_moment(moment: str) -> str:
    return moment[:19].replace("T", " ") + " UTC"


def format_number(value: float | None) -> str:
    """Returns a number with separators of thousands: whole ones as they are, others with three significant digits."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:,.3g}"


def format_percent(share: float) -> str:
    """Returns a share of 1 as percent with a digit behind the point, and never 0 or 100 for what is not."""
    if 0 < share < 0.0005:
        return "<0.1 %"
    if 0.9995 <= share < 1:
        return ">99.9 %"
    return f"{share:.1%}".replace("%", " %")
