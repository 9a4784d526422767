"""Facts of a corpus: what the structured headers and tables of its documents say, and how it can be asked for.

    corpus -> sections (:mod:`flows.evaluating.knowledge.headers`) -> entries of a catalogue -> **facts**

An entry is a section as a short text: first the lines that name its document (the **subject**), then one line a field.
A fact is one of these fields whose value differs from document to document, so that it cannot be guessed. What is no
fact is counted with its reason: read = kept + dropped.
"""

import dataclasses
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath

from flows.evaluating.knowledge.field_values import DATE, NAME, NUMBER, OTHER, gives_away, judge_value, name_kind
from flows.evaluating.knowledge.headers import TABLE, Section, find_sections
from flows.splitting import find_family
from model.answering import normalize_answer
from pipelines.formats import list_corpus_files
from pipelines.reading import read_records
from pipelines.records import ReadingConfig

MIN_DISTINCT = 6
"""Values that a field has at least: the right one, four alternatives, and one to spare."""

MAX_SHARE = 0.25
"""A field in which one value is more frequent can be guessed."""

IDENTIFYING_SHARE = 0.95
"""Of the documents, how many a field must tell apart from all others to name them."""

MAX_IDENTIFYING = 2

IDENTIFYING, ALIKE, GIVEN, ROOM = (
    "names the document",
    "hardly varies",
    "stands in the question",
    "no room in the entry",
)
VERSION = "another version of the document is taken"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """What a document says in one field.

    Attributes:
        key: its name in every run: document, section and field.
        doc_id: the document.
        entry_id: its entry of the catalogue.
        group: what its field is called, of which form and source: values of one group can stand in for each other.
        subject: the lines that name the document.
        field: the field.
        value: its value.
        kind: number, date, name or other.
        line: the line of the document that it stands on, from 1.
    """

    key: str
    doc_id: str
    entry_id: str
    group: str
    subject: str
    field: str
    value: str
    kind: str
    line: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A section as a short text that is one reference.

    Attributes:
        entry_id: its id in the catalogue.
        doc_id: the document it is of.
        source: of the document.
        subject: the lines that name the document.
        fields: the other fields in order.
    """

    entry_id: str
    doc_id: str
    source: str
    subject: tuple[str, ...]
    fields: dict[str, str]

    @property
    def text(self) -> str:
        """The entry as a document of the catalogue."""
        return "".join(
            f"{line}\n" for line in (*self.subject, *(f"{name}: {self.fields[name]}" for name in self.fields))
        )

    def change(self, field: str, value: str) -> "Entry":
        """Returns the entry with another value of one field."""
        return dataclasses.replace(self, fields={**self.fields, field: value})

    def begin(self, field: str, *, with_fields: bool) -> str:
        """Returns the entry up to the value of a field, to be continued with a space and the value.

        Args:
            field: the field.
            with_fields: whether the fields before it are there, or the subject alone.
        """
        before = list(self.subject)
        if with_fields:
            names = list(self.fields)
            before += [f"{name}: {self.fields[name]}" for name in names[: names.index(field)]]
        return "".join(f"{line}\n" for line in before) + f"{field}:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The entries of a corpus and the facts in them.

    Attributes:
        entries: by their ids, sorted.
        facts: sorted by key.
        num_documents: documents read.
        num_read: fields read.
        dropped: fields that are no facts, by reason.
        corpora_sha256: digest of the documents that were read, whatever their order and their files.
    """

    entries: dict[str, Entry]
    facts: list[Fact]
    num_documents: int
    num_read: int
    dropped: dict[str, int]
    corpora_sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Draft:
    """A section of a document with its fields as they are asked for."""

    doc_id: str
    source: str
    section: Section
    place: int
    values: dict[str, str]
    lines: dict[str, int]


def make_order(text: str) -> bytes:
    """Returns by what things are sorted that are to be in an order that has nothing to do with them."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def read_documents(corpus: Sequence[str]) -> list[tuple[str, str, str]]:
    """Returns the documents of a corpus: their ids, sources and texts.

    Raises:
        CorpusError: the corpus cannot be read.
    """
    documents = []
    for file in list_corpus_files(corpus):
        for batch in read_records(file, ReadingConfig()):
            rows = batch.select(["doc_id", "source", "text"]).to_pylist()
            documents += [(row["doc_id"], row["source"], row["text"]) for row in rows if row["text"] is not None]
    return documents


def make_catalogue(
    documents: Sequence[tuple[str, str, str]], count_tokens: Callable[[Sequence[str]], Sequence[int]], max_tokens: int
) -> Catalogue:
    """Returns the facts of documents.

    Args:
        documents: their ids, sources and texts.
        count_tokens: returns the tokens of each text.
        max_tokens: of an entry at most; fields at its end are left out where it has more.
    """
    dropped: Counter[str] = Counter()
    drafts, num_documents = _draft_sections(documents, dropped)
    by_group = defaultdict(list)
    for draft in drafts:
        by_group[draft.source, draft.section.form].append(draft)
    entries: dict[str, Entry] = {}
    places: dict[str, _Draft] = {}
    for of_group in by_group.values():
        naming = [] if of_group[0].section.form == TABLE else find_identifying(of_group)
        for draft in of_group:
            entry = _make_entry(draft, naming)
            dropped[IDENTIFYING] += len(draft.values) - len(entry.fields)
            entries[entry.entry_id], places[entry.entry_id] = entry, draft
    _fit_entries(entries, count_tokens, max_tokens, dropped)
    facts = _find_facts(entries, places, dropped)
    return Catalogue(
        entries=dict(sorted(entries.items())),
        facts=sorted(facts, key=lambda fact: fact.key),
        num_documents=num_documents,
        num_read=len(facts) + sum(dropped.values()),
        dropped=dict(sorted(dropped.items())),
        corpora_sha256=hash_documents(documents),
    )


def hash_documents(documents: Iterable[tuple[str, str, str]]) -> str:
    """Returns the SHA-256 of documents, whatever their order."""
    digest = hashlib.sha256()
    for document in sorted(documents):
        digest.update(json.dumps(document).encode())
    return digest.hexdigest()


def _draft_sections(documents: Iterable[tuple[str, str, str]], dropped: Counter[str]) -> tuple[list[_Draft], int]:
    """Returns the sections of documents; of the versions of a document, and of equal headings, the last alone."""
    drafts: dict[tuple[str, str, str, tuple[str, ...]], _Draft] = {}
    num_documents = 0
    for doc_id, source, text in sorted(documents):
        num_documents += 1
        for place, section in enumerate(find_sections(text)):
            values, lines = {}, {}
            for field in section.fields:
                value, reason = judge_value(field.value)
                if reason:
                    dropped[reason] += 1
                else:
                    values[field.name], lines[field.name] = value, field.line
            key = source, section.form, name_document(doc_id), section.headings
            if key in drafts:
                dropped[VERSION] += len(drafts[key].values)
            drafts[key] = _Draft(doc_id=doc_id, source=source, section=section, place=place, values=values, lines=lines)
    return list(drafts.values()), num_documents


def name_document(doc_id: str) -> str:
    """Returns what names a document in an entry: the last part of its id, without ending and version."""
    name = PurePosixPath(find_family(doc_id)).name
    return name.rpartition(".")[0] or name if re.search(r"\.[A-Za-z]{1,5}$", name) else name


def find_identifying(drafts: Sequence[_Draft]) -> list[str]:
    """Returns the fields that name the documents of a group: hardly any value is that of two of them."""
    names = dict.fromkeys(name for draft in drafts for name in draft.values)
    found: list[str] = []
    for name in names:
        values = [draft.values[name] for draft in drafts if name in draft.values]
        num_distinct = len({normalize_answer(value) for value in values})
        is_number = sum(name_kind(value) == NUMBER for value in values) > len(values) / 2
        is_date = sum(name_kind(value) == DATE for value in values) > len(values) / 2
        if is_date or (is_number and found) or min(len(values), num_distinct) < IDENTIFYING_SHARE * len(drafts):
            continue
        found.append(name)
        if len(found) == MAX_IDENTIFYING:
            break
    return found


def _make_entry(draft: _Draft, naming: Sequence[str]) -> Entry:
    given = [name for name in naming if name in draft.values]
    document = name_document(draft.doc_id)
    subject = list(draft.section.headings) or [f"{name}: {draft.values[name]}" for name in given]
    if not any(name_kind(draft.values[name]) in (NAME, OTHER) for name in given):
        # Numbers alone, or a heading of the kind that many documents have, do not say what an entry is of.
        subject = subject if any(document in line for line in subject) else [f"Document: {document}", *subject]
    fields = {name: value for name, value in draft.values.items() if name not in given}
    return Entry(
        entry_id=f"{draft.doc_id}#{draft.place}",
        doc_id=draft.doc_id,
        source=draft.source,
        subject=tuple(subject),
        fields=fields,
    )


def _fit_entries(
    entries: dict[str, Entry],
    count_tokens: Callable[[Sequence[str]], Sequence[int]],
    max_tokens: int,
    dropped: Counter[str],
) -> None:
    """Takes fields from the end of entries that are too long, and entries without any field away."""
    wanted = list(entries)
    while wanted:
        sizes = count_tokens([entries[entry_id].text for entry_id in wanted])
        wanted = [
            entry_id
            for entry_id, size in zip(wanted, sizes, strict=True)
            if size > max_tokens and entries[entry_id].fields
        ]
        for entry_id in wanted:
            entry = entries[entry_id]
            entries[entry_id] = dataclasses.replace(entry, fields=dict(list(entry.fields.items())[:-1]))
            dropped[ROOM] += 1
    for entry_id in [entry_id for entry_id, entry in entries.items() if not entry.fields]:
        del entries[entry_id]


def _find_facts(entries: dict[str, Entry], drafts: dict[str, _Draft], dropped: Counter[str]) -> list[Fact]:
    groups = defaultdict(list)
    for entry_id, entry in entries.items():
        for name in entry.fields:
            groups[f"{entry.source}, {drafts[entry_id].section.form}, {name}"].append((entry_id, name))
    facts = []
    for group, places in groups.items():
        found = Counter(normalize_answer(entries[entry_id].fields[name]) for entry_id, name in places)
        if len(found) < MIN_DISTINCT or max(found.values()) > MAX_SHARE * len(places):
            dropped[ALIKE] += len(places)
            continue
        for entry_id, name in places:
            entry = entries[entry_id]
            value, subject = entry.fields[name], "\n".join(entry.subject)
            kind = name_kind(value)
            if gives_away(entry.begin(name, with_fields=True).rpartition("\n")[0], value, kind):
                dropped[GIVEN] += 1
                continue
            facts.append(
                Fact(
                    key=f"{entry_id}#{name}",
                    doc_id=entry.doc_id,
                    entry_id=entry_id,
                    group=group,
                    subject=subject,
                    field=name,
                    value=value,
                    kind=kind,
                    line=drafts[entry_id].lines[name],
                )
            )
    return facts
