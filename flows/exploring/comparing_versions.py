"""Versions of the bank as the page lists them, and how two of them differ, with samples."""

import json
from typing import Any

import pyarrow as pa

from flows.exploring.answers import (
    ChangedSetting,
    ExploredDifference,
    ListedDocuments,
    ListedReferences,
    Snippet,
    VersionLine,
    VersionPage,
)
from flows.exploring.opened_versions import OpenedVersions
from flows.history import compare_versions, describe_versions
from flows.reporting.changes import MAX_LISTED_IDS, sample_references
from flows.reporting.marking import shorten_text
from flows.serving.editions import Edition
from schemas.bank import Bank

SAMPLE_SEED = 0

MAX_VALUE_CHARS = 300


def list_version_page(edition: Edition, start: int, limit: int) -> VersionPage:
    """Lists the versions of the bank, the newest first.

    Args:
        edition: the version that is served.
        start: versions to leave out.
        limit: versions to list at most.

    Raises:
        BankFormatError: a manifest or tag is damaged.
    """
    summaries = describe_versions(edition.bank.store)[::-1]
    names = list(VersionLine.model_fields)
    return VersionPage(
        served_version=edition.version,
        total=len(summaries),
        versions=[
            VersionLine(**{name: getattr(summary, name) for name in names})
            for summary in summaries[start : start + limit]
        ],
    )


def describe_difference(edition: Edition, opened: OpenedVersions, before: int, after: int) -> ExploredDifference:
    """Compares two versions.

    Args:
        edition: the version that is served.
        opened: other versions.
        before: number of the one.
        after: number of the other.

    Raises:
        ApiError: there is no such version.
        BankFormatError: a table is missing or damaged.
    """
    old, new = opened.get(edition, before), opened.get(edition, after)
    found = compare_versions(old, new)
    return ExploredDifference(
        before=before,
        after=after,
        documents_added=_list_documents(found.documents_added),
        documents_changed=_list_documents(found.documents_changed),
        documents_removed=_list_documents(found.documents_removed),
        references_added=_list_references(new, found.references_added),
        references_removed=_list_references(old, found.references_removed),
        added_size_bytes=found.added_size_bytes,
        removed_size_bytes=found.removed_size_bytes,
        settings=[
            ChangedSetting(name=name, before=_write_value(values[0]), after=_write_value(values[1]))
            for name, values in found.config.items()
        ],
        fingerprint=found.fingerprint,
    )


def _list_documents(doc_ids: pa.Array) -> ListedDocuments:
    return ListedDocuments(count=len(doc_ids), doc_ids=doc_ids[:MAX_LISTED_IDS].to_pylist())


def _list_references(bank: Bank, ref_ids: pa.Array) -> ListedReferences:
    samples = sample_references(bank, ref_ids, SAMPLE_SEED)
    return ListedReferences(
        count=len(ref_ids),
        samples=[Snippet(ref_id=sample.ref_id, doc_id=sample.doc_id, text=sample.text) for sample in samples],
    )


def _write_value(value: Any) -> str | None:
    return None if value is None else shorten_text(json.dumps(value, ensure_ascii=False), MAX_VALUE_CHARS)
