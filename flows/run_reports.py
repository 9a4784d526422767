"""Tables and the page that a run which made a version leaves behind: pure functions of what is known of the version."""

from typing import Any

import pyarrow as pa

from flows.console import MAX_LISTED_IDS, describe_counts, format_bytes
from flows.history import VersionDifference, compare_versions
from flows.verifying import Check
from schemas.bank import Bank
from schemas.errors import BankError
from schemas.manifest import Manifest, list_versions

MAX_COMPARED_ROWS = 500_000
"""Rows of documents and references up to which two versions are compared id by id, which takes about a second."""

RATED_STAGES = {
    "read": ("documents", "read"),
    "chunk": ("documents", "kept"),
    "deduplicate": ("references", "read"),
    "embed": ("references", "kept"),
    "write": ("references", "kept"),
}
"""Stages of a build with what they go through; an update goes through less, and what it did stands in its changes."""

CHANGED_STAGES = {"embed": "embedded", "write": "encoded"}
"""Stages with the number among the changes of references that says what they did."""


def join_lines(error: BaseException) -> str:
    """Returns an error as one line."""
    return " ".join(str(error).split())


def list_counts(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what was read and kept, a row for each of documents and references and one for each reason of a drop."""
    rows = []
    for name in ("documents", "references"):
        counts = summary["counts"].get(name)
        if not counts:
            continue
        dropped = counts["dropped"]
        rows.append({"what": name, "read": counts["read"], "kept": counts["kept"], "dropped": sum(dropped.values())})
        rows += [
            {"what": f"{name}: {reason}", "read": "", "kept": "", "dropped": number}
            for reason, number in sorted(dropped.items())
        ]
    return rows


def list_bytes(manifest: Manifest) -> list[dict[str, Any]]:
    """Returns the files of a version by kind, the largest first."""
    rows = []
    for kind in {file.kind for file in manifest.files}:
        files = manifest.list_files(kind)
        size_bytes = sum(file.size_bytes for file in files)
        rows.append(
            {"part": kind, "files": len(files), "rows": sum(file.num_rows for file in files), "bytes": size_bytes}
        )
    return sorted(rows, key=lambda row: (-row["bytes"], row["part"]))


def list_stages(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the time of each stage in its order, with a rate where one can be said."""
    changed = summary["counts"].get("changes", {}).get("references", {})
    rows = []
    for stage, seconds in summary["seconds"].items():
        number = changed.get(CHANGED_STAGES.get(stage, ""))
        if number is None and summary["operation"] == "build" and stage in RATED_STAGES:
            kind, count = RATED_STAGES[stage]
            number = summary["counts"][kind][count]
        rate = f"{number / seconds:,.0f}" if number and seconds else ""
        rows.append({"stage": stage, "seconds": seconds, "items": "" if number is None else number, "a second": rate})
    return rows


def compare_with_parent(bank: Bank) -> VersionDifference | None:
    """Returns how a version differs from the one it was made from; None if there is none, or both are too large."""
    parent = bank.manifest.parent
    if parent is None or parent not in list_versions(bank.store):
        return None
    kinds = ("documents", "references")
    try:
        before = Bank.open(bank.store, parent)
        sizes = [file.num_rows for one in (before, bank) for kind in kinds for file in one.manifest.list_files(kind)]
        return None if sum(sizes) > MAX_COMPARED_ROWS else compare_versions(before, bank)
    except BankError:  # the parent is damaged, which is no fault of this version
        return None


def _escape(text: str) -> str:
    """Returns text as it may stand in a cell of a table."""
    return " ".join(text.replace("|", "\\|").split())


def _list_ids(ids: pa.Array) -> str:
    shown = ", ".join(f"`{_escape(name)}`" for name in ids[:MAX_LISTED_IDS].to_pylist())
    return shown + (", ..." if len(ids) > MAX_LISTED_IDS else "")


def _write_difference(difference: VersionDifference) -> list[str]:
    lines = [f"## From version {difference.before}", "", "| | number | |", "|---|---:|---|"]
    for name in ("added", "changed", "removed"):
        ids = getattr(difference, f"documents_{name}")
        lines.append(f"| documents {name} | {len(ids):,} | {_list_ids(ids)} |")
    for name in ("added", "removed"):
        lines.append(f"| references {name} | {len(getattr(difference, f'references_{name}')):,} | |")
    for name, (before, after) in difference.config.items():
        lines.append(f"| setting `{name}` | | `{before}` to `{after}` |")
    if difference.fingerprint:
        lines.append(f"| model | | differs in {', '.join(difference.fingerprint)} |")
    return [*lines, ""]


def write_report(bank: Bank, summary: dict[str, Any], checks: list[Check], difference: VersionDifference | None) -> str:
    """Returns a page of Markdown on what a run has made.

    Args:
        bank: the version.
        summary: see :func:`flows.drafting.summarize`.
        checks: what was verified; empty if nothing was.
        difference: from the version before; None if it is not known.
    """
    version, url = summary["version"], bank.url
    lines = [f"# {url} version {version}", ""]
    if summary["unchanged"]:
        lines += ["The bank has this content and this configuration already; nothing was written.", ""]
    else:
        total = sum(summary["seconds"].values())
        lines += [f"Made by {summary['operation']} at {bank.manifest.created_at}, {total:,.1f} seconds of work.", ""]
    lines += ["| | read | kept | dropped | by reason |", "|---|---:|---:|---:|---|"]
    for name in ("documents", "references"):
        counts = summary["counts"].get(name)
        if counts:
            dropped = sum(counts["dropped"].values())
            reasons = describe_counts(counts["dropped"])
            lines.append(f"| {name} | {counts['read']:,} | {counts['kept']:,} | {dropped:,} | {reasons} |")
    lines += ["", f"{format_bytes(summary['size_bytes'])}, {summary['bytes_a_reference']:,} bytes a reference.", ""]
    if difference is not None:
        lines += _write_difference(difference)
    if checks:
        lines += ["## Verified", "", "| check | | |", "|---|---|---|"]
        lines += [
            f"| {check.name} | {'ok' if check.passed else '**failed**'} | {_escape(check.detail)} |" for check in checks
        ]
        lines.append("")
    if summary["advice"]:
        lines += [f"Advice: {summary['advice']}.", ""]
    parent = bank.manifest.parent
    lines += ["To look further:", "", f"    memory3 log --bank {url}"]
    lines += [f"    memory3 diff --bank {url} {parent} {version}"] if parent is not None else []
    return "\n".join(lines) + "\n"
