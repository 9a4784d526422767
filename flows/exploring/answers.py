"""What the page is told beyond the API: a version, its references and where they stand, versions and how they differ.

All lists are bounded; those that may be long come in pages, with the number of all.
"""

from typing import Literal

from pydantic import BaseModel

from flows.serving.response_models import KeptHead

State = Literal["live", "near_duplicate", "contaminated", "deleted"]
"""What a stored reference is: found and read, or why it is not."""


class Snippet(BaseModel):
    """A reference in short.

    Attributes:
        ref_id: the reference.
        doc_id: the first document it stands in, empty if it stands in none.
        text: its text.
    """

    ref_id: str
    doc_id: str
    text: str


class Snippets(BaseModel):
    """References in short.

    Attributes:
        version: version of the bank.
        references: those that the version has, in the order asked for.
    """

    version: int
    references: list[Snippet]


class ExploredBank(BaseModel):
    """A version as a whole.

    Attributes:
        bank: where the bank is.
        version: the version that is served.
        created_at: when it was made, UTC, ISO 8601.
        model: the model, as completions name it.
        model_tokens: tokens that the model has room for, of a prompt and its continuation together.
        num_documents: documents in it, None if its operation did not count them.
        num_references: live references in it, or None.
        memory_layers: the layers that write and read.
        num_heads: KV heads of each.
        num_slots: tokens that each head keeps of a reference, at most.
        memory_bytes: bytes of a memory.
        codec: how its vectors are stored.
        is_cold: whether memories are encoded when they are first asked for.
        examples: some live references.
    """

    bank: str
    version: int
    created_at: str
    model: str
    model_tokens: int
    num_documents: int | None
    num_references: int | None
    memory_layers: list[int]
    num_heads: int
    num_slots: int
    memory_bytes: int
    codec: str
    is_cold: bool
    examples: list[Snippet]


class ExploredReference(BaseModel):
    """A reference of any version, with its memory.

    Attributes:
        version: version of the bank.
        served_version: the version that is served.
        ref_id: the reference.
        text: its text.
        tokens: texts of its tokens, which join to its text; the whole text as one where they cannot be told apart.
        num_tokens: its length.
        state: whether it is live, and if not, why.
        kept_ref_id: the reference it was dropped for as a near-duplicate.
        jaccard: how similar the two are, 0 to 1.
        matched_doc_id: the test text it gives away.
        overlap: how much of it, 0 to 1.
        num_sources: in how many places it stands.
        num_duplicates: near-duplicates that were dropped for it.
        memory_bytes: bytes of its memory, 0 if it has none.
        memory_layers: the layers that write and read.
        num_heads: KV heads of each.
        num_slots: tokens that each head keeps, at most.
        kept: what each head keeps; empty if it is not live, or if that is not known for this version.
    """

    version: int
    served_version: int
    ref_id: str
    text: str
    tokens: list[str]
    num_tokens: int
    state: State
    kept_ref_id: str | None
    jaccard: float | None
    matched_doc_id: str | None
    overlap: float | None
    num_sources: int
    num_duplicates: int
    memory_bytes: int
    memory_layers: list[int]
    num_heads: int
    num_slots: int
    kept: list[KeptHead]


class Place(BaseModel):
    """A place of a document at which a reference stands.

    Attributes:
        doc_id: the document.
        title: its title.
        source: where it is from.
        path: the file it was read from.
        ordinal: which of the document's references it is, from 0.
        num_references: how many the document has.
        start_byte: where it begins in the document, in bytes of UTF-8.
        end_byte: where it ends.
        start_char: where it begins, in characters.
        end_char: where it ends.
        previous_ref_id: the reference before it in the document, None if it is the first.
        next_ref_id: the one behind it, None if it is the last.
    """

    doc_id: str
    title: str
    source: str
    path: str
    ordinal: int
    num_references: int
    start_byte: int
    end_byte: int
    start_char: int
    end_char: int
    previous_ref_id: str | None
    next_ref_id: str | None


class PlacePage(BaseModel):
    """Places of a reference, by document and then in its order.

    Attributes:
        version: version of the bank.
        total: how many places there are.
        places: those of this page.
    """

    version: int
    total: int
    places: list[Place]


class Stretch(BaseModel):
    """A stretch of a text that is compared with another.

    Attributes:
        text: the stretch.
        differs: whether the other text has something else in its place.
    """

    text: str
    differs: bool


class Pair(BaseModel):
    """A reference beside one that is nearly the same.

    Attributes:
        ref_id: the other reference.
        is_kept: whether the other is the one that was kept; else it was dropped.
        jaccard: how similar the two are, 0 to 1.
        own: the text of the reference that was asked for.
        other: the text of the other.
    """

    ref_id: str
    is_kept: bool
    jaccard: float
    own: list[Stretch]
    other: list[Stretch]


class PairPage(BaseModel):
    """Near-duplicates of a reference: the one it was dropped for, or those that were dropped for it.

    Attributes:
        version: version of the bank.
        total: how many there are.
        pairs: those of this page, the most similar first.
    """

    version: int
    total: int
    pairs: list[Pair]


class VersionLine(BaseModel):
    """A version in a list.

    Attributes:
        version: its number.
        parent: the version it was made from, which may be gone, or None.
        operation: what made it.
        created_at: when, UTC, ISO 8601.
        tags: its names.
        num_documents: documents in it, None if its operation did not count them.
        num_references: live references in it, or None.
        size_bytes: bytes of its files.
        new_size_bytes: bytes of those that no version before it has.
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


class VersionPage(BaseModel):
    """Versions of the bank.

    Attributes:
        served_version: the version that is served.
        total: how many there are.
        versions: those of this page, the newest first.
    """

    served_version: int
    total: int
    versions: list[VersionLine]


class ListedDocuments(BaseModel):
    """Documents that came, changed or went.

    Attributes:
        count: how many.
        doc_ids: the first of them by id.
    """

    count: int
    doc_ids: list[str]


class ListedReferences(BaseModel):
    """References that came or went.

    Attributes:
        count: how many.
        samples: some of them.
    """

    count: int
    samples: list[Snippet]


class ChangedSetting(BaseModel):
    """A setting that differs.

    Attributes:
        name: its dotted name.
        before: its value as JSON, None where there was none.
        after: the same afterwards.
    """

    name: str
    before: str | None
    after: str | None


class ExploredDifference(BaseModel):
    """How a version differs from another.

    Attributes:
        before: number of the one.
        after: number of the other.
        documents_added: documents that only ``after`` has.
        documents_changed: documents of both whose text differs.
        documents_removed: documents that only ``before`` has.
        references_added: references that are live in ``after`` only.
        references_removed: references that are live in ``before`` only.
        added_size_bytes: bytes of the files that only ``after`` names.
        removed_size_bytes: bytes of those that only ``before`` names.
        settings: the settings that differ.
        fingerprint: the parts of the model's fingerprint that differ.
    """

    before: int
    after: int
    documents_added: ListedDocuments
    documents_changed: ListedDocuments
    documents_removed: ListedDocuments
    references_added: ListedReferences
    references_removed: ListedReferences
    added_size_bytes: int
    removed_size_bytes: int
    settings: list[ChangedSetting]
    fingerprint: list[str]
