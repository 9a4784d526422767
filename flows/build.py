"""The flows ``build_bank`` and ``update_bank``: :mod:`flows.building` with one Prefect task a stage.

What they take and return is plain JSON, so that a deployment can call them.
"""

from typing import Any

from prefect import flow

from flows.building import build, update
from flows.config import BuildConfig, apply_changes
from flows.steps import Steps
from schemas.stores import open_store


@flow(name="build_bank", flow_run_name="build {bank}", persist_result=False)
def build_bank(corpus: list[str], bank: str, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Builds a version of a bank from a corpus, see :func:`flows.building.build`.

    Args:
        corpus: files and folders.
        bank: the bank's folder or URL.
        config: changes to the preset ``tiny``, nested by section.
    """
    return build(open_store(bank), corpus, apply_changes(BuildConfig(), config or {}), Steps(as_tasks=True))


@flow(name="update_bank", flow_run_name="update {bank}", persist_result=False)
def update_bank(
    corpus: list[str] | None, bank: str, engine: dict[str, Any] | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Makes a bank equal to a corpus, see :func:`flows.building.update`.

    Args:
        corpus: files and folders; None: those of the newest version.
        bank: the bank's folder or URL.
        engine: changes to the engine that runs it.
        dry_run: only say what would change.
    """
    return update(open_store(bank), corpus, engine or {}, Steps(as_tasks=True), dry_run=dry_run)
