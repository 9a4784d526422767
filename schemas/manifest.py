"""One JSON manifest a version: what the bank is, committed last.

A version exists when its manifest exists. The manifest is created under its final name exclusively (a hard link that
fails if the name is taken), so a crash leaves the previous version, and of two writers only one wins. Everything that
depends on the time of a build stands in the manifest alone.
"""

import dataclasses
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from schemas.atomic import make_temporary_path, sync_folder
from schemas.errors import BankFormatError, ConflictError
from schemas.protocols import Fingerprint
from schemas.records import RecordLayout

BANK_FORMAT = 2
OLD_FORMATS = (1,)
"""The format version this release writes, and the only one it reads."""

MANIFESTS_FOLDER = "manifests"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a version.

    Attributes:
        kind: the table or part it belongs to, for instance ``references`` or ``shard``.
        path: where it stands below the bank's folder, with forward slashes.
        size_bytes: its size.
        sha256: hexadecimal digest of its bytes.
        num_rows: rows or records in it.
    """

    kind: str
    path: str
    size_bytes: int
    sha256: str
    num_rows: int

    def __post_init__(self) -> None:
        """Refuses a path that leaves the bank.

        Raises:
            BankFormatError: the path is absolute or climbs out of the bank's folder.
        """
        path = PurePosixPath(self.path)
        if path.is_absolute() or ".." in path.parts or "\\" in self.path or not path.parts:
            raise BankFormatError(
                f"the manifest names the file {self.path!r}, which is outside the bank; do not use it"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A version of a bank.

    Attributes:
        version: 1 for the first, one more for each next.
        parent: the version it was made from, or None.
        operation: what made it, for instance ``build``.
        created_at: UTC time in ISO format.
        config: the whole configuration of the build, as JSON.
        build_id: hash of the configuration and of the corpus; an equal build changes nothing.
        files: every file of the version.
        counts: records by name; ``read = kept + dropped`` holds in them.
        seconds: wall time a stage.
        fingerprint: what determines the stored memories.
        embedder_id: the embedding model of the references.
        layout: shape and type of the memories.
        cold: True if memories are not precomputed but encoded when first retrieved.
        tombstones: ids deleted since the files were written.
    """

    version: int
    parent: int | None
    operation: str
    created_at: str
    config: dict[str, Any]
    build_id: str
    files: list[FileEntry]
    counts: dict[str, Any]
    seconds: dict[str, float]
    fingerprint: Fingerprint
    embedder_id: str
    layout: RecordLayout
    cold: bool = False
    tombstones: list[str] = dataclasses.field(default_factory=list)

    def list_files(self, kind: str) -> list[FileEntry]:
        """Returns the files of one kind, in the order of their paths."""
        return sorted((file for file in self.files if file.kind == kind), key=lambda file: file.path)

    def to_json(self) -> str:
        """Returns the manifest as JSON text."""
        value = {"format": BANK_FORMAT, **dataclasses.asdict(self)}
        return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, origin: str) -> "Manifest":
        """Reads a manifest.

        Args:
            text: the JSON.
            origin: where the text is from, for errors.

        Raises:
            BankFormatError: not a manifest, of another format version, or with keys this release does not know.
        """
        try:
            value = json.loads(text)
            version = value.pop("format")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BankFormatError(f"{origin} is not a manifest of a bank; give the folder of a bank") from error
        if version != BANK_FORMAT:
            advice = "build the bank again in another folder" if version in OLD_FORMATS else "update memory3"
            raise BankFormatError(f"{origin} has format {version}, this release reads {BANK_FORMAT}; {advice}")
        try:
            value["files"] = [FileEntry(**file) for file in value["files"]]
            value["fingerprint"] = Fingerprint(**value["fingerprint"])
            value["layout"] = RecordLayout.from_json(value["layout"])
            manifest = cls(**value)
            for name, kinds in VALUE_TYPES.items():
                if type(getattr(manifest, name)) not in kinds:
                    raise TypeError(f"{name} is {getattr(manifest, name)!r}")
            return manifest
        except (KeyError, TypeError, BankFormatError) as error:
            raise BankFormatError(
                f"{origin} is damaged: {error}; restore it or roll back to another version"
            ) from error


VALUE_TYPES: dict[str, tuple[type, ...]] = {
    "version": (int,),
    "parent": (int, type(None)),
    "operation": (str,),
    "created_at": (str,),
    "config": (dict,),
    "build_id": (str,),
    "counts": (dict,),
    "seconds": (dict,),
    "embedder_id": (str,),
    "cold": (bool,),
    "tombstones": (list,),
}
"""The JSON types of the plain values of a manifest."""


def make_manifest_path(bank: Path, version: int) -> Path:
    """Returns the path of a version's manifest."""
    return bank / MANIFESTS_FOLDER / f"{version:08d}.json"


def list_versions(bank: Path) -> list[int]:
    """Returns the committed versions of a bank, ascending; empty if the folder is no bank yet."""
    folder = bank / MANIFESTS_FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(path.stem) for path in folder.glob("*.json") if re.fullmatch("[0-9]{8,}", path.stem))


def read_manifest(bank: Path, version: int) -> Manifest:
    """Reads one version's manifest.

    Raises:
        BankFormatError: there is no such version, or its manifest is not valid.
    """
    path = make_manifest_path(bank, version)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        known = ", ".join(map(str, list_versions(bank))) or "none"
        raise BankFormatError(f"bank {bank} has no version {version}; its versions are: {known}") from error
    except UnicodeDecodeError as error:
        raise BankFormatError(f"{path} is not a manifest of a bank; give the folder of a bank") from error
    manifest = Manifest.from_json(text, origin=str(path))
    if manifest.version != version:
        raise BankFormatError(f"{path} says it is version {manifest.version}; restore it from a copy")
    return manifest


def commit_manifest(bank: Path, manifest: Manifest) -> None:
    """Makes a version exist, exclusively and durably.

    Raises:
        ConflictError: another writer has committed that version first.
    """
    path = make_manifest_path(bank, manifest.version)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = make_temporary_path(path)
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError as error:
            raise ConflictError(
                f"version {manifest.version} of bank {bank} was committed by somebody else meanwhile; run again"
            ) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
