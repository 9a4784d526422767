"""The flows ``verify_bank``, ``compact_bank`` and ``migrate_bank``: what keeps a bank in order, as Prefect flows.

The commands ``memory3 verify``, ``compact`` and ``migrate`` call the same functions without an engine. Parameters and
results are plain JSON.
"""

import dataclasses
from pathlib import Path
from typing import Any

from prefect import flow

from flows import compacting, migrating
from flows.flow_runs import end_run, refuse_damage, run_on_bank, run_work, verify_version
from flows.run_records import get_place_name, make_run_name, publish_table, rename_run
from flows.steps import Steps
from schemas.bank import Bank
from schemas.stores import BankStore, open_store
from schemas.tags import find_version


@flow(name="verify_bank", flow_run_name=make_run_name, persist_result=False)
def verify_bank(bank: str, deep: bool = False, at: str | None = None) -> dict[str, Any]:
    """Checks a version of a bank, see :func:`flows.verifying.verify_bank`; the run fails if it is damaged.

    Args:
        bank: the bank's folder or URL.
        deep: read every byte, and encode a sample again.
        at: a version's number or tag; None for the newest.

    Returns:
        ``version``, ``deep`` and ``checks``.
    """

    def check() -> tuple[dict[str, Any], str]:
        store = open_store(bank)
        opened = Bank.open(store, find_version(store, at))
        version = opened.manifest.version
        rename_run(f"verify {get_place_name(bank)} v{version}")
        checks = run_work(lambda steps: verify_version(opened, steps, deep=deep))
        rows = [dataclasses.asdict(check) for check in checks]
        shown = [{**row, "passed": "ok" if row["passed"] else "FAILED"} for row in rows]
        publish_table(opened.url, "checks", shown, f"{opened.url} version {version}")
        refuse_damage(opened, checks)
        result = {"version": version, "deep": deep, "checks": rows}
        return result, f"version {version} is sound: {len(checks)} checks{', deep' if deep else ''}"

    return end_run(check)


@flow(name="compact_bank", flow_run_name=make_run_name, persist_result=False)
def compact_bank(bank: str, verify: str = "none", wait_minutes: float = 0.0) -> dict[str, Any]:
    """Rewrites the newest version as one segment, see :func:`flows.compacting.compact_bank`.

    Args:
        bank: the bank's folder or URL.
        verify: whether a new version is verified at once: none, quick or deep.
        wait_minutes: how long to wait while somebody else writes to the bank.

    Returns:
        The summary of the version, a JSON object.
    """
    return run_on_bank(
        "compact",
        bank,
        lambda store, steps: compacting.compact_bank(store, steps),
        verify=verify,
        wait_minutes=wait_minutes,
    )


@flow(name="migrate_bank", flow_run_name=make_run_name, persist_result=False)
def migrate_bank(
    bank: str,
    model: str | None = None,
    codec: str | None = None,
    first: int | None = None,
    uses: str | None = None,
    verify: str = "none",
    wait_minutes: float = 0.0,
) -> dict[str, Any]:
    """Encodes a bank for another model or codec, see :func:`flows.migrating.migrate_bank`.

    Args:
        bank: the bank's folder or URL.
        model: memory3-tiny, or the folder of a transformers model; None for that of the bank.
        codec: a codec's name, or the file of a trained one; None for that of the bank.
        first: memories that are made at most before the version is committed; None for all.
        uses: Parquet or CSV file with ref_id and count: how often references were used.
        verify: whether a new version is verified at once: none, quick or deep.
        wait_minutes: how long to wait while somebody else writes to the bank.

    Returns:
        The summary of the version, a JSON object.
    """

    def migrate(store: BankStore, steps: Steps) -> dict[str, Any]:
        used = migrating.read_uses(Path(uses)) if uses else None
        wanted = migrating.Migration(model=model, codec=codec, limit=first, uses=used)
        return migrating.migrate_bank(store, wanted, steps)

    return run_on_bank("migrate", bank, migrate, verify=verify, wait_minutes=wait_minutes)
