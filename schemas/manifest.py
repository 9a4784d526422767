"""One JSON manifest a version: what the bank is, committed last.

A version exists when its manifest exists. The manifest is created under its final name exclusively, which fails if the
name is taken, so a crash leaves the previous version, and of two writers only one wins. Everything that depends on the
time of a build stands in the manifest alone.

Every other file is known by its digest in the manifest; the manifest carries its own, so that no changed number in it
is taken for the truth. That is against decay and mistakes: who can write a manifest can write its digest too, which is
why what it says is checked besides.
"""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from schemas.codec_names import parse_codec
from schemas.errors import BankFormatError, ConflictError
from schemas.identifiers import hash_json
from schemas.protocols import Fingerprint
from schemas.records import RecordLayout
from schemas.stores import BankStore, open_store

BANK_FORMAT = 3
OLD_FORMATS = (1, 2)
"""The format version this release writes, and the only one it reads."""

MANIFESTS_FOLDER = "manifests"

MAX_MANIFEST_BYTES = 64 << 20
"""A larger manifest is not read. One of a million references has less than one."""

MAX_NUMBER = (1 << 63) - 1

DIGEST_KEY = "digest"

CODEC_KIND = "codec"
"""The kind of the file with the parameters of a trained codec, of which a version has one if its layout names such."""

MAX_CODEC_BYTES = 1 << 30
"""A larger file of a codec is not read. That of the paper's codec has some twenty megabytes."""


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
        """Refuses a path that leaves the bank, and values that cannot be true.

        Raises:
            BankFormatError: the path is absolute or climbs out of the bank's folder, the kind is no name, a number is
                negative or no number, or the digest is none.
        """
        path = PurePosixPath(self.path)
        unprintable = not self.path.isprintable()
        if path.is_absolute() or ".." in path.parts or "\\" in self.path or not path.parts or unprintable:
            raise BankFormatError(
                f"the manifest names the file {self.path!r}, which is outside the bank; do not use it"
            )
        if not re.fullmatch("[a-z][a-z0-9_]{0,63}", self.kind):
            raise BankFormatError(f"the file {self.path} is of the kind {self.kind!r}, which is no name")
        for name in ("size_bytes", "num_rows"):
            number = getattr(self, name)
            if type(number) is not int or not 0 <= number <= MAX_NUMBER:
                raise BankFormatError(f"the file {self.path} has {name} {number!r}, which is no number of them")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise BankFormatError(f"the file {self.path} has the SHA-256 {self.sha256!r}, which is none")


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
        cold: True if memories that are not stored are encoded when first retrieved.
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

    def list_files(self, kind: str) -> list[FileEntry]:
        """Returns the files of one kind, in the order of their paths."""
        return sorted((file for file in self.files if file.kind == kind), key=lambda file: file.path)

    def to_json(self) -> str:
        """Returns the manifest as JSON text."""
        value = {"format": BANK_FORMAT, **dataclasses.asdict(self)}
        value[DIGEST_KEY] = hash_json(value)
        return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, origin: str) -> "Manifest":
        """Reads a manifest.

        Args:
            text: the JSON.
            origin: where the text is from, for errors.

        Raises:
            BankFormatError: not a manifest, of another format version, changed since it was written, or with keys this
                release does not know or values that cannot be.
        """
        try:
            value = json.loads(text, parse_constant=_refuse_constant)
            version = value["format"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BankFormatError(f"{origin} is not a manifest of a bank; give the folder of a bank") from error
        if version != BANK_FORMAT:
            advice = "build the bank again in another folder" if version in OLD_FORMATS else "update memory3"
            raise BankFormatError(f"{origin} has format {version}, this release reads {BANK_FORMAT}; {advice}")
        try:
            digest = value.pop(DIGEST_KEY)
            is_changed = digest != hash_json(value)
            del value["format"]
            value["files"] = [FileEntry(**file) for file in value["files"]]
            value["fingerprint"] = Fingerprint(**value["fingerprint"])
            value["layout"] = RecordLayout.from_json(value["layout"])
            manifest = cls(**value)
            manifest._check_values()
            if is_changed:
                raise BankFormatError("it has changed since it was written")
            return manifest
        except (KeyError, TypeError, ValueError, RecursionError, BankFormatError) as error:
            raise BankFormatError(
                f"{origin} is damaged: {error}; restore it or roll back to another version"
            ) from error

    def _check_values(self) -> None:
        """Refuses what no writer of manifests writes.

        Raises:
            TypeError: a value is of another type.
            BankFormatError: a number is out of bounds, a file is named twice or is not in a segment, or the codec lacks
                its file or is too large.
        """
        for name, kinds in VALUE_TYPES.items():
            if type(getattr(self, name)) not in kinds:
                raise TypeError(f"{name} is {getattr(self, name)!r}")
        if self.version < 1:
            raise BankFormatError(f"its version is {self.version}, must be at least 1")
        if self.parent is not None and not 1 <= self.parent < self.version:
            raise BankFormatError(f"its parent is {self.parent}, must be from 1 to {self.version - 1}")
        for name, number in [*_list_numbers(self.counts, "counts"), *_list_numbers(self.seconds, "seconds")]:
            if not 0 <= number <= MAX_NUMBER:  # false for nan too
                raise BankFormatError(f"{name} is {number}, must be at least 0")
        paths = Counter(PurePosixPath(file.path) for file in self.files)
        for path, num_entries in paths.items():
            if num_entries > 1:
                raise BankFormatError(f"it names the file {path} {num_entries} times")
            if len(path.parts) != 3 or path.parts[0] != "segments":
                raise BankFormatError(f"it names the file {path}, which is in no segment")
        codecs = self.list_files(CODEC_KIND)
        num_needed = int(bool(parse_codec(self.layout.codec).digest))
        if len(codecs) != num_needed:
            raise BankFormatError(
                f"it names {len(codecs)} files of a codec, but its codec {self.layout.codec} has {num_needed}"
            )
        for file in codecs:
            if file.size_bytes > MAX_CODEC_BYTES:
                raise BankFormatError(f"it names a codec of {file.size_bytes} bytes, must be at most {MAX_CODEC_BYTES}")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _list_numbers(value: Any, name: str) -> list[tuple[str, float]]:
    """Returns the numbers in a JSON value, with their names."""
    if isinstance(value, dict):
        return [found for key in value for found in _list_numbers(value[key], f"{name}.{key}")]
    if isinstance(value, list):
        return [found for item in value for found in _list_numbers(item, name)]
    return [(name, value)] if isinstance(value, int | float) else []


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
}
"""The JSON types of the plain values of a manifest."""


def make_manifest_name(version: int) -> str:
    """Returns the name of a version's manifest below the bank."""
    return f"{MANIFESTS_FOLDER}/{version:08d}.json"


def list_versions(place: str | Path | BankStore) -> list[int]:
    """Returns the committed versions of a bank, ascending; empty if there is no bank yet."""
    names = open_store(place).list_files(MANIFESTS_FOLDER)
    found = (re.fullmatch(f"{MANIFESTS_FOLDER}/([0-9]{{8,}}).json", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def read_manifest(place: str | Path | BankStore, version: int) -> Manifest:
    """Reads one version's manifest.

    Raises:
        BankFormatError: there is no such version, or its manifest is not valid.
    """
    store = open_store(place)
    origin = f"{store.url}/{make_manifest_name(version)}"
    try:
        content = store.read_range(make_manifest_name(version), 0, MAX_MANIFEST_BYTES + 1)
        if len(content) > MAX_MANIFEST_BYTES:
            raise BankFormatError(f"{origin} has more than {MAX_MANIFEST_BYTES} bytes; it is no manifest of a bank")
        text = content.decode()
    except FileNotFoundError as error:
        known = ", ".join(map(str, list_versions(store))) or "none"
        raise BankFormatError(f"bank {store.url} has no version {version}; its versions are: {known}") from error
    except UnicodeDecodeError as error:
        raise BankFormatError(f"{origin} is not a manifest of a bank; give the folder of a bank") from error
    manifest = Manifest.from_json(text, origin=origin)
    if manifest.version != version:
        raise BankFormatError(f"{origin} says it is version {manifest.version}; restore it from a copy")
    return manifest


def commit_manifest(place: str | Path | BankStore, manifest: Manifest) -> None:
    """Makes a version exist, exclusively and durably.

    Raises:
        ConflictError: another writer has committed that version first.
    """
    store = open_store(place)
    try:
        store.create(make_manifest_name(manifest.version), manifest.to_json().encode())
    except FileExistsError as error:
        raise ConflictError(
            f"version {manifest.version} of bank {store.url} was committed by somebody else meanwhile; run again"
        ) from error
