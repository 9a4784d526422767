"""``memory3 verify``: a bank's files, tables, indexes and memories, checked against the manifest and each other.

Quick checks look at sizes and headers; deep ones read every byte, and have a sample tokenized, embedded and encoded
again. The checks themselves are in :mod:`pipelines.auditing` and :mod:`model.verifying`; here they are put in order,
and their result is kept in the bank as ``checks/<version>.json``.
"""

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable
from datetime import UTC, datetime

from flows.progress import show_stage
from pipelines import auditing
from pipelines.auditing import Audit
from schemas.bank import CHECKS_FOLDER, Bank
from schemas.errors import BankError

MAX_FINDINGS = 20
"""Findings of a check that are told; a bank that lost a disk has thousands."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        passed: whether all is well.
        detail: what was found, with names of files where something is wrong.
    """

    name: str
    passed: bool
    detail: str


def _make_check(name: str, audit: Audit) -> Check:
    findings = audit.wrong[:MAX_FINDINGS]
    if len(audit.wrong) > MAX_FINDINGS:
        findings.append(f"and {len(audit.wrong) - MAX_FINDINGS} more")
    return Check(name=name, passed=not audit.wrong, detail="; ".join(findings) or audit.detail)


def _check_hashes(bank: Bank) -> Audit:
    num_done = 0

    def count() -> None:
        nonlocal num_done
        num_done += 1

    with show_stage("hash", len(bank.manifest.files), "files", lambda: num_done):
        return auditing.audit_hashes(bank, count)


def _check_codec(bank: Bank) -> Audit:
    from model.loading import load_bank_codec

    codec = load_bank_codec(bank)
    return Audit([], f"{codec.name}, {bank.manifest.layout.payload_bytes:,} bytes a memory")


def _check_index_headers(bank: Bank) -> Audit:
    from model.verifying import check_index_headers

    return Audit(check_index_headers(bank), f"{len(bank.manifest.list_files('index'))} indexes")


def _check_indexes(bank: Bank) -> Audit:
    from model.verifying import check_indexes

    num_rows = sum(file.num_rows for file in bank.manifest.list_files("index"))
    return Audit(check_indexes(bank), f"{num_rows} vectors are those of the embeddings")


def _check_tokens(bank: Bank) -> Audit:
    from flows.generation import open_writer
    from model.verifying import check_tokens

    return Audit(*check_tokens(bank, open_writer(bank, bank.manifest.config["memory"]["model"])))


def _check_embeddings(bank: Bank) -> Audit:
    from model.embedding import load_embedder
    from model.verifying import check_embeddings

    config = bank.manifest.config
    return Audit(
        *check_embeddings(bank, load_embedder(config["embedding"]["embedder"], device=config["memory"]["device"]))
    )


def _check_memories(bank: Bank) -> Audit:
    from flows.generation import open_writer
    from model.verifying import check_memories

    return Audit(*check_memories(bank, open_writer(bank, bank.manifest.config["memory"]["model"])))


QUICK_CHECKS: dict[str, Callable[[Bank], Audit]] = {
    "manifest": auditing.audit_manifest,
    "files": auditing.audit_sizes,
    "headers": auditing.audit_headers,
    "codec": _check_codec,
    "indexes": _check_index_headers,
    "tags": auditing.audit_tags,
}

DEEP_CHECKS: dict[str, Callable[[Bank], Audit]] = {
    "manifest": auditing.audit_manifest,
    "files": _check_hashes,
    "headers": auditing.audit_headers,
    "codec": _check_codec,
    "tags": auditing.audit_tags,
    "tables": auditing.audit_tables,
    "references": auditing.audit_references,
    "embeddings": auditing.audit_embeddings,
    "memories": auditing.audit_memories,
    "indexes": _check_indexes,
    "cold store": auditing.audit_cold_store,
}
"""In the order in which they are run: what is damaged is known before it is read by others."""

REPEATED_WORK: dict[str, Callable[[Bank], Audit]] = {
    "tokens again": _check_tokens,
    "embedded again": _check_embeddings,
    "encoded again": _check_memories,
}
"""Deep checks that run models; a bank that is known to be damaged is not worth it."""


def _run_check(name: str, check: Callable[[Bank], Audit], bank: Bank) -> Check:
    try:
        if check is _check_hashes:  # has a bar of its own
            return _make_check(name, check(bank))
        with show_stage(name):
            return _make_check(name, check(bank))
    except BankError as error:
        return Check(name=name, passed=False, detail=str(error))


def verify_bank(bank: Bank, *, deep: bool = True, keep: bool = True) -> list[Check]:
    """Runs all checks and keeps their result in the bank; one that cannot run because of damage counts as failed.

    Args:
        bank: the version to check.
        deep: read every byte; False looks at sizes and headers, which takes seconds for a bank of any size.
        keep: whether the result takes the place of the one in the bank.

    Returns:
        The checks in the order they were run, and last a note: what harms no reader of this version.
    """
    checks = [_run_check(name, check, bank) for name, check in (DEEP_CHECKS if deep else QUICK_CHECKS).items()]
    is_sound = all(check.passed for check in checks)
    for name, check in REPEATED_WORK.items() if deep else ():
        skipped = Check(name=name, passed=False, detail="not done, because the bank is damaged")
        checks.append(_run_check(name, check, bank) if is_sound else skipped)
    notes = auditing.list_notes(bank)
    if keep:
        notes += _keep_result(bank, checks, deep)
    return [*checks, dataclasses.replace(_make_check("notes", Audit(notes, "none")), passed=True)]


def _keep_result(bank: Bank, checks: list[Check], deep: bool) -> list[str]:
    """Writes the result into the bank; returns a note if it cannot be written to."""
    version = bank.manifest.version
    result = {
        "version": version,
        "checked_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "release": get_release(),
        "deep": deep,
        "passed": all(check.passed for check in checks),
        "checks": [dataclasses.asdict(check) for check in checks],
    }
    name = f"{CHECKS_FOLDER}/{version:08d}.json"
    try:
        bank.store.replace(name, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
    except (BankError, OSError) as error:
        return [f"{name} cannot be written: {error}"]
    return []


def get_release() -> str:
    """Returns the release of this project, or that it runs from a folder of sources."""
    try:
        return importlib.metadata.version("memory3")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
