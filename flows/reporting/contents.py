"""What a report of a version says: plain figures, complete before a page is made of them, and printed by ``--json``.

A section that could not be computed is a :class:`Skipped` with the reason: a damaged table or a model that is not at
hand must not keep the rest from being seen.
"""

import dataclasses
from typing import Any

from flows.history import VersionSummary
from flows.verifying import Check
from model.recall import IndexRecall
from pipelines.duplicate_clusters import ClusterSurvey
from pipelines.surveying import Bin, Survey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """A section that is not there.

    Attributes:
        skipped: why, as a sentence without its full stop.
    """

    skipped: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """Which version this is, and how it was made.

    Attributes:
        bank: where the bank is.
        version: the version's number.
        parent: the version it was made from, or None.
        newest: the newest version of the bank when the report was made.
        tags: names of the version.
        operation: what made it.
        created_at: when, UTC, ISO 8601.
        model: the model that wrote the memories, as it was named.
        fingerprint: digest of all that determines the memories.
        embedder: the embedding model, with the digest of its weights.
        codec: how vectors are stored.
        layout: shape and type of a memory.
        memory_bytes: bytes of the key-values of one memory.
        is_cold: whether memories that are not stored are encoded when first retrieved.
        corpus: what was read.
        settings: all settings by dotted name.
        reported_at: when the report was made, UTC, ISO 8601.
        release: the release that made it.
        seed: seed of every sample in it.
    """

    bank: str
    version: int
    parent: int | None
    newest: int
    tags: list[str]
    operation: str
    created_at: str
    model: str
    fingerprint: str
    embedder: str
    codec: str
    layout: str
    memory_bytes: int
    is_cold: bool
    corpus: list[str]
    settings: dict[str, Any]
    reported_at: str
    release: str
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """What was checked.

    Attributes:
        deep: whether every byte was read; else sizes and headers.
        passed: whether all is well.
        checks: each thing that was looked at.
        kept: the result that ``memory3 verify`` left in the bank, None if there is none.
    """

    deep: bool
    passed: bool
    checks: list[Check]
    kept: dict[str, Any] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tally:
    """What was read and what became of it.

    Attributes:
        noun: what is counted, in the plural.
        read: how many were read.
        kept: how many are in the version.
        dropped: the others by reason, the most frequent first.
    """

    noun: str
    read: int
    kept: int
    dropped: list[Bin]

    @property
    def num_dropped(self) -> int:
        """All that were dropped."""
        return sum(reason.count for reason in self.dropped)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Files of one kind.

    Attributes:
        kind: their kind.
        group: ``tables``, ``memories``, ``index`` or ``codec``.
        num_files: how many there are.
        num_rows: rows or records in them.
        size_bytes: their bytes.
        new_size_bytes: bytes of those that the parent does not name; all where it is not there.
    """

    kind: str
    group: str
    num_files: int
    num_rows: int
    size_bytes: int
    new_size_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """What the version takes.

    Attributes:
        parts: files by kind, the largest first.
        num_segments: segments they stand in.
        size_bytes: bytes of all.
        new_size_bytes: bytes of the files that this version brought.
        bytes_a_reference: bytes of all a live reference, None if there is none.
        advice: why the bank should be compacted, empty if it need not be.
    """

    parts: list[Part]
    num_segments: int
    size_bytes: int
    new_size_bytes: int
    bytes_a_reference: float | None
    advice: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecError:
    """What the codec of the bank loses.

    Attributes:
        model: the model that encoded the sample.
        num_references: references in the sample.
        key_bytes: bytes of a stored key.
        value_bytes: bytes of a stored value.
        factor: how many times as many bytes memories have as they are.
        key_snr_db: power of the keys over that of their error, in decibels.
        value_snr_db: the same for values.
        attention_error: relative error of what is read from the memories, 0 for none.
    """

    model: str
    num_references: int
    key_bytes: int
    value_bytes: int
    factor: float
    key_snr_db: float
    value_snr_db: float
    attention_error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of the run that made the version.

    Attributes:
        name: the stage.
        seconds: wall time.
        num_items: what it worked through, None where that is not counted.
        noun: what these are, in the plural.
    """

    name: str
    seconds: float
    num_items: int | None
    noun: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceSample:
    """A reference that came or went.

    Attributes:
        ref_id: its id.
        doc_id: the first document it stands in, empty if none.
        text: its text.
    """

    ref_id: str
    doc_id: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentChange:
    """Documents that came, changed or went.

    Attributes:
        what: ``added``, ``changed`` or ``removed``.
        count: how many.
        doc_ids: the first of them by id.
    """

    what: str
    count: int
    doc_ids: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """How the version differs from its parent.

    Attributes:
        parent: number of the parent.
        documents: documents added, changed and removed.
        num_references_added: references that are live here only.
        num_references_removed: references that were live in the parent only.
        references_added: some of those, drawn by the seed.
        references_removed: the same of these.
        settings: settings that differ, by dotted name: before and after.
        fingerprint: parts of the model's fingerprint that differ.
    """

    parent: int
    documents: list[DocumentChange]
    num_references_added: int
    num_references_removed: int
    references_added: list[ReferenceSample]
    references_removed: list[ReferenceSample]
    settings: dict[str, tuple[Any, Any]]
    fingerprint: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a report says, section by section."""

    head: Head
    verification: Verification
    tallies: list[Tally]
    survey: Survey | Skipped
    clusters: ClusterSurvey | Skipped
    storage: Storage
    codec: CodecError | Skipped
    index: IndexRecall | Skipped
    stages: list[Stage]
    changes: Changes | Skipped
    versions: list[VersionSummary] | Skipped

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a JSON value; a skipped section is an object with the key ``skipped``."""
        return dataclasses.asdict(self)
