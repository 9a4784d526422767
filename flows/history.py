"""``memory3 log``, ``diff`` and ``rollback``: what the versions of a bank are, how two differ, and the way back.

Reads manifests and columns of tables, never memories. A rollback writes one manifest and no other file: the new version
names the files of an old one.
"""

import dataclasses
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from flows.workplace import lock_bank
from schemas.bank import Bank
from schemas.errors import BankFormatError, InputError
from schemas.manifest import FileEntry, Manifest, commit_manifest, list_versions, read_manifest
from schemas.stores import BankStore
from schemas.tables import DOCUMENTS, REFERENCES
from schemas.tags import list_tags

ROLLBACK = "rollback"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VersionSummary:
    """A version as one line of a log.

    Attributes:
        version: its number.
        parent: the version it was made from, which may be gone, or None.
        operation: what made it.
        created_at: UTC time in ISO format.
        tags: its names, sorted.
        num_documents: documents in it, None if its operation did not count them.
        num_references: live references in it, or None.
        size_bytes: bytes of its files.
        new_size_bytes: bytes of those of its files that no listed version before it has.
        changes: what its operation says it changed, empty if nothing.
    """

    version: int
    parent: int | None
    operation: str
    created_at: str
    tags: list[str]
    num_documents: int | None
    num_references: int | None
    size_bytes: int
    new_size_bytes: int
    changes: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class VersionDifference:
    """How a version differs from another. Ids are arrays of strings, ascending.

    Attributes:
        before: number of the one version.
        after: number of the other.
        documents_added: documents that only ``after`` has.
        documents_removed: documents that only ``before`` has.
        documents_changed: documents of both whose text differs.
        references_added: references that are live in ``after`` only.
        references_removed: references that are live in ``before`` only.
        files_added: files that only ``after`` names.
        files_removed: files that only ``before`` names.
        config: settings that differ, by dotted name: their values before and after, None where there was none.
        fingerprint: the parts of the writer's fingerprint that differ, and ``embedder``.
    """

    before: int
    after: int
    documents_added: pa.Array
    documents_removed: pa.Array
    documents_changed: pa.Array
    references_added: pa.Array
    references_removed: pa.Array
    files_added: list[FileEntry]
    files_removed: list[FileEntry]
    config: dict[str, tuple[Any, Any]]
    fingerprint: list[str]

    @property
    def added_size_bytes(self) -> int:
        """Bytes of the files added."""
        return sum(file.size_bytes for file in self.files_added)

    @property
    def removed_size_bytes(self) -> int:
        """Bytes of the files that are not in use any more."""
        return sum(file.size_bytes for file in self.files_removed)

    def to_json(self) -> dict[str, Any]:
        """Returns the difference as a JSON value: documents by id, references and files as numbers."""
        return {
            "before": self.before,
            "after": self.after,
            "documents": {
                "added": self.documents_added.to_pylist(),
                "changed": self.documents_changed.to_pylist(),
                "removed": self.documents_removed.to_pylist(),
            },
            "references": {"added": len(self.references_added), "removed": len(self.references_removed)},
            "files": {"added": len(self.files_added), "removed": len(self.files_removed)},
            "added_size_bytes": self.added_size_bytes,
            "removed_size_bytes": self.removed_size_bytes,
            "config": {name: list(values) for name, values in self.config.items()},
            "fingerprint": self.fingerprint,
        }


def describe_versions(store: BankStore) -> list[VersionSummary]:
    """Returns the versions of a bank, oldest first.

    Raises:
        BankFormatError: there is none, or a manifest or tag is damaged.
    """
    versions = list_versions(store)
    if not versions:
        Bank.open(store)  # says why there is none
    tags = list_tags(store)
    known: set[str] = set()
    summaries = []
    for version in versions:
        manifest = read_manifest(store, version)
        new = [file for file in manifest.files if file.path not in known]
        known.update(file.path for file in new)
        summaries.append(
            VersionSummary(
                version=version,
                parent=manifest.parent,
                operation=manifest.operation,
                created_at=manifest.created_at,
                tags=[name for name, tagged in tags.items() if tagged == version],
                num_documents=manifest.counts.get("documents", {}).get("kept"),
                num_references=manifest.counts.get("references", {}).get("kept"),
                size_bytes=sum(file.size_bytes for file in manifest.files),
                new_size_bytes=sum(file.size_bytes for file in new),
                changes=manifest.counts.get("changes", {}),
            )
        )
    return summaries


def compare_versions(before: Bank, after: Bank) -> VersionDifference:
    """Returns how a version differs from another, of the same bank or not.

    Raises:
        BankFormatError: a table is missing or damaged.
    """
    documents = [_read(bank, "documents", ["doc_id", "content_hash"], DOCUMENTS) for bank in (before, after)]
    live = [_read_live_ids(bank) for bank in (before, after)]
    files = [{file.path: file for file in bank.manifest.files} for bank in (before, after)]
    fingerprint = before.manifest.fingerprint.list_differences(after.manifest.fingerprint)
    if before.manifest.embedder_id != after.manifest.embedder_id:
        fingerprint.append("embedder")
    return VersionDifference(
        before=before.manifest.version,
        after=after.manifest.version,
        documents_added=_subtract(documents[1]["doc_id"], documents[0]["doc_id"]),
        documents_removed=_subtract(documents[0]["doc_id"], documents[1]["doc_id"]),
        documents_changed=_find_changed(*documents),
        references_added=_subtract(live[1], live[0]),
        references_removed=_subtract(live[0], live[1]),
        files_added=[file for path, file in files[1].items() if path not in files[0]],
        files_removed=[file for path, file in files[0].items() if path not in files[1]],
        config=_compare_settings(before.manifest.config, after.manifest.config),
        fingerprint=fingerprint,
    )


def roll_back(store: BankStore, version: int) -> Manifest:
    """Commits a new version that has the files of an old one; returns its manifest.

    Versions between the two stay, so that a rollback can be taken back by another.

    Args:
        store: the bank.
        version: an older version.

    Raises:
        InputError: it is the newest version already.
        BankFormatError: there is no such version, or a file of it is missing.
        ConflictError: somebody else works on the bank.
    """
    Bank.open(store)  # the lock would make a folder where there is no bank
    with lock_bank(store):
        newest = Bank.open(store).manifest.version
        old = read_manifest(store, version)
        if version == newest:
            raise InputError(f"version {version} is the newest of bank {store.url} already; name an older one")
        for file in old.files:
            found = store.get_size(file.path)
            if found != file.size_bytes:
                state = "is missing" if found is None else f"has {found} bytes instead of {file.size_bytes}"
                raise BankFormatError(
                    f"version {version} cannot come back: {store.url}/{file.path} {state}; roll back to another version"
                )
        manifest = dataclasses.replace(
            old,
            version=newest + 1,
            parent=newest,
            operation=ROLLBACK,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            counts={**old.counts, "changes": {"restored_version": version}},
            seconds={},
        )
        commit_manifest(store, manifest)
    return manifest


def _read(bank: Bank, kind: str, columns: list[str], schema: pa.Schema) -> pa.Table:
    """Returns columns of a table, empty if the version has no such table."""
    if not bank.manifest.list_files(kind):
        return pa.schema([schema.field(name) for name in columns]).empty_table()
    return bank.read_table(kind, columns)


def _read_live_ids(bank: Bank) -> pa.ChunkedArray:
    """Returns the ids of the live references of a version."""
    return _exclude(_read(bank, "references", ["ref_id"], REFERENCES)["ref_id"], bank.read_dropped_ids())


def _exclude(ids: pa.ChunkedArray, others: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns ids that are not among others, in their order."""
    return ids.filter(pc.invert(pc.is_in(ids, value_set=others)))


def _subtract(ids: pa.ChunkedArray, others: pa.ChunkedArray) -> pa.Array:
    """Returns ids that are not among others, ascending."""
    found = _exclude(ids, others)
    return found.take(pc.array_sort_indices(found)).combine_chunks()


def _find_changed(before: pa.Table, after: pa.Table) -> pa.Array:
    """Returns the ids of documents of both tables whose content hashes differ, ascending."""
    rows = pc.index_in(after["doc_id"], value_set=before["doc_id"])
    common = after.filter(pc.is_valid(rows))
    hashes = before["content_hash"].take(rows.drop_null())
    changed = common["doc_id"].filter(pc.not_equal(common["content_hash"], hashes))
    return changed.take(pc.array_sort_indices(changed)).combine_chunks()


def flatten_settings(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields nested settings by dotted names."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flatten_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _compare_settings(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the settings that differ, by dotted name."""
    old, new = dict(flatten_settings(before)), dict(flatten_settings(after))
    names = sorted(old.keys() | new.keys())
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}
