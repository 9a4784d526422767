"""What all flows have in common: how their work is run, tried again, and how its end is told.

The work itself is a plain function of :mod:`flows`; a flow adds tasks, retries, a state with one line, and what people
look at (:mod:`flows.run_records`, :mod:`flows.run_progress`, :mod:`flows.run_reports`).
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from prefect.runtime import deployment
from prefect.states import Completed, Failed

from flows.console import format_bytes
from flows.progress import wrap_display
from flows.run_progress import PublishedDisplay
from flows.run_records import (
    COMMITTED,
    VERIFY_FAILED,
    get_flow_run_id,
    get_place_name,
    get_run_log,
    publish_markdown,
    publish_table,
    rename_run,
    tell_event,
)
from flows.run_reports import compare_with_parent, join_lines, list_bytes, list_counts, list_stages, write_report
from flows.steps import DEPLOYED_RETRY_SECONDS, RETRY_SECONDS, Steps, may_pass
from flows.verifying import Check, verify_bank
from pipelines.running import check_stop
from schemas.bank import Bank
from schemas.errors import BankError, BankFormatError, ConflictError, InputError
from schemas.stores import BankStore, open_store

T = TypeVar("T")

Work = Callable[[Steps], T]
"""The work of a flow; may be called again, and then goes on where it was."""

WAIT_SECONDS = 5.0
"""From one look at a bank that somebody else writes to, to the next."""

VERIFY_CHOICES = ("none", "quick", "deep")


def run_work(work: Work[T], *, wait_minutes: float = 0.0) -> T:
    """Runs the work of a flow with progress.

    A run of a deployment, which nobody watches, is begun again after a fault that may pass and that struck between two
    tasks, which have retries of their own.

    Args:
        work: the work.
        wait_minutes: how long to wait while somebody else writes to the same bank.
    """
    is_deployed = deployment.id is not None
    seconds = DEPLOYED_RETRY_SECONDS if is_deployed else RETRY_SECONDS
    pauses = iter(seconds if is_deployed else ())
    deadline = time.monotonic() + 60.0 * wait_minutes
    run_id = get_flow_run_id()
    assert run_id is not None
    with wrap_display(functools.partial(PublishedDisplay, flow_run_id=run_id)):
        while True:
            try:
                return work(Steps(as_tasks=True, retry_seconds=seconds))
            except Exception as error:  # whatever it is, it is raised again unless it may pass
                pause = _choose_pause(error, pauses, deadline)
                if pause is None:
                    raise
                get_run_log().warning("%s; begun again in %.0f seconds", join_lines(error), pause)
            _sleep(pause)


def _choose_pause(error: Exception, pauses: Iterator[float], deadline: float) -> float | None:
    """Returns the seconds to wait before another try, None if there is to be none."""
    if isinstance(error, ConflictError):
        left = deadline - time.monotonic()
        return min(WAIT_SECONDS, left) if left > 0 else None
    return next(pauses, None) if may_pass(error) else None


def _sleep(seconds: float) -> None:
    """Waits, unless a stop is asked for."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check_stop()
        time.sleep(min(0.25, left))


def end_run(work: Callable[[], tuple[T, str]]) -> T:
    """Calls what is all of a flow, and returns its end as a state: its message is one line, good or bad.

    Prefect takes a state that a flow returns as the end of the run, and hands what is in it to whoever called the flow.

    Args:
        work: returns the result of the flow and the line. A known error becomes a failed state with the error's own
            sentence; whoever called the flow as a function gets the error itself.
    """
    try:
        result, line = work()
    except BankError as error:
        return cast(T, Failed(message=join_lines(error), data=error))
    return cast(T, Completed(message=line, data=result))


def check_choice(verify: str) -> None:
    """Makes sure that what is asked of a verification is one of :data:`VERIFY_CHOICES`.

    Raises:
        InputError: it is not.
    """
    if verify not in VERIFY_CHOICES:
        raise InputError(f"verify is {verify!r}, must be one of {', '.join(VERIFY_CHOICES)}")


def run_on_bank(
    verb: str,
    bank: str,
    work: Callable[[BankStore, Steps], dict[str, Any]],
    *,
    verify: str = "none",
    wait_minutes: float = 0.0,
) -> dict[str, Any]:
    """Runs an operation that makes a version, verifies that version if asked to, and tells all of it to Prefect.

    Args:
        verb: what is done, for the name of the run.
        bank: the bank's folder or URL.
        work: returns a summary, see :func:`flows.drafting.summarize`.
        verify: ``none``, ``quick`` or ``deep``.
        wait_minutes: see :func:`run_work`.
    """

    def make_version() -> tuple[dict[str, Any], str]:
        check_choice(verify)
        store = open_store(bank)
        summary = run_work(lambda steps: work(store, steps), wait_minutes=wait_minutes)
        name = f"{verb} {get_place_name(store.url)} v{summary['version']}"
        if summary.get("dry_run"):
            rename_run(f"{name} (dry run)")
            return summary, f"version {summary['version']} would change: {summary['changes'] or 'nothing'}"
        if summary["unchanged"]:
            rename_run(f"{name} (unchanged)")
        else:
            rename_run(name)
            payload = {name: summary[name] for name in ("version", "operation", "size_bytes")}
            tell_event(COMMITTED, store.url, {**payload, "changes": summary["counts"].get("changes", {})})
        made = Bank.open(store, summary["version"])
        is_checked = verify != "none" and not summary["unchanged"]
        checks = run_work(lambda steps: verify_version(made, steps, deep=verify == "deep")) if is_checked else []
        publish_version(made, summary, checks)
        refuse_damage(made, checks)
        return summary, describe_summary(summary)

    return end_run(make_version)


def verify_version(bank: Bank, steps: Steps, *, deep: bool) -> list[Check]:
    """Checks a version as one task; an event tells if it is damaged."""
    checks = steps.run("verify", verify_bank, bank, deep=deep)
    failed = [check for check in checks if not check.passed]
    if failed:
        findings = {check.name: check.detail for check in failed}
        tell_event(VERIFY_FAILED, bank.url, {"version": bank.manifest.version, "deep": deep, "failed": findings})
    return checks


def refuse_damage(bank: Bank, checks: list[Check]) -> None:
    """Ends the run if a check has failed.

    Raises:
        BankFormatError: one has.
    """
    failed = [check for check in checks if not check.passed]
    if failed:
        raise BankFormatError(
            f"{bank.url} version {bank.manifest.version} is damaged: {', '.join(check.name for check in failed)}; "
            f"{failed[0].detail}"
        )


def publish_version(bank: Bank, summary: dict[str, Any], checks: list[Check]) -> None:
    """Leaves the tables and the report of a version with the run."""
    if not summary["unchanged"]:
        title = f"{bank.url} version {summary['version']}"
        publish_table(bank.url, "counts", list_counts(summary), f"{title}: read = kept + dropped")
        publish_table(bank.url, "bytes", list_bytes(bank.manifest), f"{title}: bytes by part")
        publish_table(bank.url, "stages", list_stages(summary), f"{title}: time and rate of the stages")
    difference = None if summary["unchanged"] else compare_with_parent(bank)
    report = write_report(bank, summary, checks, difference)
    publish_markdown(bank.url, "report", report, f"{bank.url} version {summary['version']}")


def describe_summary(summary: dict[str, Any]) -> str:
    """Returns a line on a version."""
    kept = summary["counts"]["references"]["kept"]
    state = "has all of it already" if summary["unchanged"] else f"made by {summary['operation']}"
    return f"version {summary['version']} {state}: {kept:,} references, {format_bytes(summary['size_bytes'])}"
