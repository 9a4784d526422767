"""The flows ``build_bank`` and ``update_bank``: :mod:`flows.building` with one Prefect task a stage.

What they take and return is plain JSON, so that a deployment can call them. Credentials are no parameters: an object
store finds them in the environment of the process that runs the flow.
"""

from typing import Any

from prefect import flow

from flows.building import build, update
from flows.config import BuildConfig, apply_changes
from flows.flow_runs import run_on_bank
from flows.run_records import make_run_name


@flow(name="build_bank", flow_run_name=make_run_name, persist_result=False)
def build_bank(
    corpus: list[str],
    bank: str,
    config: dict[str, Any] | None = None,
    verify: str = "none",
    wait_minutes: float = 0.0,
) -> dict[str, Any]:
    """Builds a version of a bank from a corpus, see :func:`flows.building.build`.

    Args:
        corpus: files and folders.
        bank: the bank's folder or URL.
        config: changes to the preset ``tiny``, nested by section.
        verify: whether the version is verified at once: none, quick or deep.
        wait_minutes: how long to wait while somebody else writes to the bank.

    Returns:
        The summary of the version, a JSON object.
    """
    return run_on_bank(
        "build",
        bank,
        lambda store, steps: build(store, corpus, apply_changes(BuildConfig(), config or {}), steps),
        verify=verify,
        wait_minutes=wait_minutes,
    )


@flow(name="update_bank", flow_run_name=make_run_name, persist_result=False)
def update_bank(
    corpus: list[str] | None,
    bank: str,
    engine: dict[str, Any] | None = None,
    dry_run: bool = False,
    verify: str = "none",
    wait_minutes: float = 0.0,
) -> dict[str, Any]:
    """Makes a bank equal to a corpus, see :func:`flows.building.update`.

    Args:
        corpus: files and folders; None: those of the newest version.
        bank: the bank's folder or URL.
        engine: changes to the engine that runs it.
        dry_run: only say what would change.
        verify: whether a new version is verified at once: none, quick or deep.
        wait_minutes: how long to wait while somebody else writes to the bank.

    Returns:
        The summary of the version, a JSON object.
    """
    return run_on_bank(
        "update",
        bank,
        lambda store, steps: update(store, corpus, engine or {}, steps, dry_run=dry_run),
        verify=verify,
        wait_minutes=wait_minutes,
    )
