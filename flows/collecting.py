"""``memory3 gc``: versions that are no longer wanted, and files that no version names.

First a plan, which may be shown to a person, then its execution. Manifests go first: a version without some of its
files would be a damaged one, files without a version are only garbage, which the next collection finds. So a collection
may be killed at any moment.
"""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, runtime_checkable

from flows.workplace import list_abandoned, lock_bank
from schemas.atomic import TEMPORARY_SUFFIX
from schemas.bank import CHECKS_FOLDER, COLD_FOLDER, SEGMENTS_FOLDER, WORK_FOLDER
from schemas.errors import BankFormatError, InputError
from schemas.manifest import MANIFESTS_FOLDER, Manifest, list_versions, make_manifest_name, read_manifest
from schemas.stores import BankStore, LocalStore
from schemas.tags import list_tags, make_tag_name

DEFAULT_MIN_AGE_HOURS = 24.0

SHORT_WRITE_SECONDS = 60.0
"""Time after which a temporary file of a tag or a check, which are written without the lock, is surely abandoned."""

COPIES_FOLDER = "files"
"""Where the scratch folder of a remote bank has copies of its files, each named by its SHA-256."""


@runtime_checkable
class DatedStore(Protocol):
    """A store that other machines write to at the same time, and that knows when."""

    def list_ages(self, folder: str) -> dict[str, float]:
        """Returns the seconds since each file below a folder was written, by name."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collection:
    """What a collection removes, or has removed.

    Attributes:
        versions: numbers of versions, ascending.
        tags: names of versions that are gone.
        files: files of the bank, with their bytes: of the versions above, or of none, and temporary ones.
        caches: files of this machine, with their bytes: memories and copies that belong to no version, and what killed
            operations have left that nobody will go on with.
    """

    versions: list[int]
    tags: list[str]
    files: dict[str, int]
    caches: dict[str, int]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values()) + sum(self.caches.values())


def plan_collection(
    store: BankStore,
    *,
    keep: int | None = None,
    older_than_days: float | None = None,
    min_age_hours: float = DEFAULT_MIN_AGE_HOURS,
) -> Collection:
    """Returns what could go from a bank; removes nothing.

    The newest version and tagged ones always stay.

    Args:
        store: the bank.
        keep: number of newest versions that stay. None means all, or, with ``older_than_days``, one.
        older_than_days: versions younger than this stay too.
        min_age_hours: age from which a file that no version names goes. It matters in an object store only, where a
            build on another machine may just be writing it; in a folder, a collection and a build lock each other out.

    Raises:
        InputError: a number is out of range.
        BankFormatError: there is no bank, or a manifest or tag is damaged, so that nobody knows what it needs.
    """
    for name, value, least in (("keep", keep, 1), ("older_than_days", older_than_days, 0)):
        if value is not None and not value >= least:
            raise InputError(f"{name} is {value}, must be at least {least}")
    if not min_age_hours >= 0:
        raise InputError(f"min_age_hours is {min_age_hours}, must be at least 0")
    manifests = _read_manifests(store)
    tags = list_tags(store)
    unwanted: list[int] = []
    if keep is not None or older_than_days is not None:
        limit = time.time() - (older_than_days or 0) * 86_400
        unwanted = [
            manifest.version
            for manifest in manifests[: -(keep or 1)]
            if manifest.version not in tags.values() and (not older_than_days or _get_time(store, manifest) <= limit)
        ]
    kept = [manifest for manifest in manifests if manifest.version not in unwanted]
    checks = {f"{CHECKS_FOLDER}/{manifest.version:08d}.json" for manifest in kept}
    names = [*_list_garbage(store, kept, min_age_hours), *_list_temporary(store)]
    names += [name for name in store.list_files(CHECKS_FOLDER) if name not in checks and name not in names]
    sizes = {name: store.get_size(name) for name in names}
    return Collection(
        versions=unwanted,
        tags=[name for name, version in tags.items() if all(manifest.version != version for manifest in manifests)],
        files={name: size for name, size in sizes.items() if size is not None},
        caches=_measure(_list_caches(store, kept)),
    )


def collect(store: BankStore, plan: Collection) -> Collection:
    """Removes what was planned, as far as it may still go; returns what is gone.

    What has become the newest version, tagged, or named by a version since the plan was made stays.

    Raises:
        ConflictError: somebody else works on the bank.
        BankFormatError: a manifest or tag is damaged; nothing more is removed then.
    """
    with lock_bank(store):
        return remove_collected(store, plan)


def remove_collected(store: BankStore, plan: Collection) -> Collection:
    """Does the work of :func:`collect` for an operation that holds the lock of the bank already."""
    tags = list_tags(store)
    wanted = {*tags.values(), *list_versions(store)[-1:]}
    versions = [version for version in plan.versions if version not in wanted]
    for version in versions:
        store.remove([make_manifest_name(version)])
    kept = _read_manifests(store)
    named = {file.path for manifest in kept for file in manifest.files}
    files = {name: size for name, size in plan.files.items() if name not in named}
    store.remove(files)
    if isinstance(store, LocalStore):
        _remove_empty_folders(store.path / SEGMENTS_FOLDER)
    known = {manifest.version for manifest in kept}
    dangling = [name for name in plan.tags if name in tags and tags[name] not in known]
    store.remove(make_tag_name(name) for name in dangling)
    unused = {str(path) for path in _list_caches(store, kept)}
    caches = {path: size for path, size in plan.caches.items() if path in unused}
    for path in caches:
        Path(path).unlink(missing_ok=True)
    _remove_empty_folders(store.scratch / WORK_FOLDER)
    return Collection(versions=versions, tags=dangling, files=files, caches=caches)


def _read_manifests(store: BankStore) -> list[Manifest]:
    """Returns all manifests of a bank, oldest first."""
    versions = list_versions(store)
    if not versions:
        raise BankFormatError(f"{store.url} holds no committed version of a bank; nothing was removed")
    return [read_manifest(store, version) for version in versions]


def _get_time(store: BankStore, manifest: Manifest) -> float:
    """Returns when a version was made, in seconds since 1970."""
    try:
        made = datetime.fromisoformat(manifest.created_at)
    except ValueError as error:
        raise BankFormatError(
            f"{store.url}/{make_manifest_name(manifest.version)} is damaged: created_at is {manifest.created_at!r}; "
            "restore it or roll back to another version"
        ) from error
    return (made if made.tzinfo else made.replace(tzinfo=UTC)).timestamp()


def _list_garbage(store: BankStore, kept: Iterable[Manifest], min_age_hours: float) -> list[str]:
    """Returns the files of segments that no kept version names."""
    named = {file.path for manifest in kept for file in manifest.files}
    found = [name for name in store.list_files(SEGMENTS_FOLDER) if name not in named]
    if isinstance(store, LocalStore):
        return found
    ages = store.list_ages(SEGMENTS_FOLDER) if isinstance(store, DatedStore) else {}
    # Also what is released now: another machine may just be going back to it.
    return [name for name in found if ages.get(name, -math.inf) >= min_age_hours * 3600]


def _list_temporary(store: BankStore) -> list[str]:
    """Returns the files beside segments that somebody began to write and left; only folders have such."""
    if not isinstance(store, LocalStore):
        return []
    latest = time.time() - SHORT_WRITE_SECONDS
    found = []
    for folder in sorted(path for path in store.path.iterdir() if path.is_dir()):
        if folder.name not in (SEGMENTS_FOLDER, WORK_FOLDER):
            names = [name for name in store.list_files(folder.name) if name.endswith(TEMPORARY_SUFFIX)]
            # Only who holds the lock writes manifests.
            is_locked = folder.name == MANIFESTS_FOLDER
            found += [name for name in names if is_locked or (store.path / name).stat().st_mtime <= latest]
    return found


def _list_caches(store: BankStore, kept: Iterable[Manifest]) -> list[Path]:
    """Returns the files of this machine that no kept version needs: memories of writers, copies, abandoned work."""
    manifests = list(kept)
    digests = {manifest.fingerprint.digest for manifest in manifests}
    found = [path for path in _list_folder(store.scratch / COLD_FOLDER) if path.name.partition(".")[0] not in digests]
    if not isinstance(store, LocalStore):
        copied = {file.sha256 for manifest in manifests for file in manifest.files}
        found += [path for path in _list_folder(store.scratch / COPIES_FOLDER) if path.name[:64] not in copied]
    for folder in list_abandoned(store):
        found += [Path(path, name) for path, _, names in os.walk(folder) for name in sorted(names)]
    return found


def _measure(paths: Iterable[Path]) -> dict[str, int]:
    """Returns the bytes of files by path; an operation that just ends may be removing some."""
    sizes = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            sizes[str(path)] = path.stat().st_size
    return sizes


def _list_folder(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_file())


def _remove_empty_folders(folder: Path) -> None:
    """Removes empty folders below a folder: what a collection killed between a file and its folder has left."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
