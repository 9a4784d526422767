"""Questions with short answers that cannot be guessed, made from the headers of real documents.

    python -m benchmarks.question_sets --data corpora --out runs/questions [--bank runs/questions/bank]

Each document becomes an entry of a catalogue: its header fields, one a line, short enough to be a single reference.
Mail addresses, links and long lists are left out. Questions name the document (number and title) and ask for a field.
What is written:

    catalogue.jsonl     the entries of all documents: the corpus of a bank
    train.jsonl         questions about the documents that are not held out
    recite.jsonl        the same documents, each to be told with its whole entry
    held_out.jsonl      questions about the others
    pairs.jsonl         the questions of train.jsonl with the right answer and that of another document
    changed.jsonl       the catalogue again, the fields that are asked for swapped between documents
    changed_answers.jsonl   the questions of held_out.jsonl with the answers that changed.jsonl gives

A document is held out as everywhere in this project (:mod:`flows.splitting`), but a PowerShell page by its name without
the version, since versions of a page are nearly equal. A model that was trained on whole corpora may have seen another
version of such a page; of proposals there is only one. With a bank of the catalogue, the share of the questions whose
entry is among the five references that are retrieved is printed.
"""

import argparse
import dataclasses
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from flows.evaluating.knowledge.facts import make_order
from flows.splitting import is_held_out
from model.reading import MEMORIES_PER_CHUNK
from model.retrieving import MemorySearch
from pipelines.formats import list_corpus_files
from pipelines.reading import read_records
from pipelines.records import ReadingConfig
from schemas.atomic import write_bytes_atomically
from schemas.bank import Bank

NUM_AUTHORS = 3
MAX_SUMMARY_CHARS = 120


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A document's entry in the catalogue.

    Attributes:
        doc_id: id of the document.
        kind: ``pep``, ``rfc`` or ``page``.
        fields: its fields in order.
    """

    doc_id: str
    kind: str
    fields: dict[str, str]

    @property
    def text(self) -> str:
        """The entry as a text."""
        return "\n".join(f"{name}: {value}" for name, value in self.fields.items())

    @property
    def is_held_out(self) -> bool:
        """Whether no training may ask about it."""
        return is_held_out(re.sub(r"^psdocs/reference/[^/]+/", "psdocs/", self.doc_id))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its answer.

    Attributes:
        doc_id: the document that is asked about.
        kind: which field of which kind of document, for instance ``pep-author``.
        prompt: the question.
        completion: the answer.
    """

    doc_id: str
    kind: str
    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionType:
    """A way to ask for a field.

    Attributes:
        kind: name of the type; the part before the hyphen is the kind of the entries.
        field: the field that is asked for.
        wording: the question, with the names of other fields in braces.
        extract: the answer in the value of the field.
        is_changeable: whether the field may be changed without changing what other questions call the document.
    """

    kind: str
    field: str
    wording: str
    extract: Callable[[str], str] = str
    is_changeable: bool = True


def _get_first_author(authors: str) -> str:
    return authors.partition(",")[0]


QUESTION_TYPES = (
    QuestionType(kind="pep-number", field="PEP", wording="PEP number? Title: {Title}", is_changeable=False),
    QuestionType(
        kind="pep-author",
        field="Author",
        wording="Who is the first author of PEP {PEP}, Title: {Title}?",
        extract=_get_first_author,
    ),
    QuestionType(kind="pep-created", field="Created", wording="When was PEP {PEP}, Title: {Title}, created?"),
    QuestionType(kind="rfc-date", field="Start Date", wording="What is the start date of RFC {RFC}, {Feature Name}?"),
    QuestionType(kind="rfc-issue", field="Rust Issue", wording="Which Rust issue has RFC {RFC}, {Feature Name}?"),
    QuestionType(
        kind="page-date", field="Date", wording="What is the date of the command {Command}, Module: {Module}?"
    ),
    QuestionType(
        kind="page-alias", field="Alias", wording="What is the alias of the command {Command}, Module: {Module}?"
    ),
)

RECITAL_WORDINGS = {
    "pep": "Tell all about PEP {PEP}, Title: {Title}.",
    "rfc": "Tell all about RFC {RFC}, {Feature Name}.",
    "page": "Tell all about the command {Command}, Module: {Module}.",
}
"""How a whole entry is asked for, by kind of document."""


def parse_pep(doc_id: str, text: str) -> Entry | None:
    """Returns the entry of a Python Enhancement Proposal, or None if its header lacks a field."""
    header: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if not line.strip():
            break
        if field := re.match(r"([A-Z][A-Za-z-]+):\s*(.*)", line):
            name = field[1]
            header[name] = field[2].strip()
        elif name:
            header[name] += f" {line.strip()}"
    authors = re.sub(r"\s*<[^>]*>|\s*\([^)]*\)|\S+@\S+", "", header.get("Author", "")).split(",")
    header["Author"] = ", ".join([author.strip() for author in authors if author.strip()][:NUM_AUTHORS])
    header["Created"] = header.get("Created", "").partition(" ")[0]
    names = ("PEP", "Title", "Author", "Status", "Type", "Created")
    if not all(header.get(name) for name in names):
        return None
    return Entry(doc_id=doc_id, kind="pep", fields={name: header[name] for name in names})


def parse_rfc(doc_id: str, text: str) -> Entry | None:
    """Returns the entry of a Rust RFC, or None if its header lacks a date."""
    file = re.search(r"/(\d+)-([^/]+)\.md$", doc_id)
    date = re.search(r"^- Start Date: *(\d{4}-\d\d-\d\d)", text, re.M)
    feature = re.search(r"^- Feature Name: *`?([A-Za-z0-9_-]+)", text, re.M)
    issue = re.search(r"^- Rust Issue.*rust#(\d+)", text, re.M)
    if file is None or date is None:
        return None
    named = feature[1] if feature is not None and feature[1] not in ("N", "NA", "none", "None") else ""
    fields = {"RFC": str(int(file[1])), "Feature Name": named.replace("_", " ") or file[2].replace("-", " ")}
    fields["Start Date"] = date[1]
    if issue is not None:
        fields["Rust Issue"] = issue[1]
    return Entry(doc_id=doc_id, kind="rfc", fields=fields)


def parse_page(doc_id: str, text: str) -> Entry | None:
    """Returns the entry of a PowerShell command's page, or None if it is of none."""
    header = text.partition("\n---\n")[0]
    title = re.search(r"^title: *([A-Z]\w+-\w+)$", header, re.M)
    date = re.search(r"^ms\.date: *(\d\d/\d\d/\d{4})", header, re.M)
    module = re.search(r"^Module Name: *(\S+)", header, re.M)
    alias = re.search(r"^aliases:\n  - *(\S+)", header, re.M)
    synopsis = re.search(r"^## SYNOPSIS\n+(.+)", text, re.M)
    if title is None or date is None or module is None:
        return None
    fields = {"Command": title[1], "Module": module[1], "Date": date[1]}
    if alias is not None and "{" not in alias[1]:
        fields["Alias"] = alias[1]
    if synopsis is not None and len(synopsis[1]) <= MAX_SUMMARY_CHARS:
        fields["Synopsis"] = synopsis[1].strip()
    return Entry(doc_id=doc_id, kind="page", fields=fields)


PARSERS: dict[str, Callable[[str, str], Entry | None]] = {
    "peps-2025-08": parse_pep,
    "rfcs": parse_rfc,
    "psdocs": parse_page,
}


def read_entries(data: Path) -> list[Entry]:
    """Returns the entries of all documents; of the versions of a page the newest."""
    entries: dict[str, Entry] = {}
    for name, parse in PARSERS.items():
        for file in list_corpus_files([data / f"{name}.jsonl.zst"]):
            for batch in read_records(file, ReadingConfig()):
                for record in batch.select(["doc_id", "text"]).to_pylist():
                    entry = None if record["text"] is None else parse(record["doc_id"], record["text"])
                    if entry is not None:
                        # Corpora are sorted by id, so the newest version of a page comes last.
                        entries[f"{entry.kind} {next(iter(entry.fields.values()))}"] = entry
    return sorted(entries.values(), key=lambda entry: entry.doc_id)


def ask_questions(entries: Iterable[Entry], types: Sequence[QuestionType] = QUESTION_TYPES) -> Iterator[Question]:
    """Yields the questions that can be asked about entries."""
    for entry in entries:
        for asked in types:
            if asked.kind.startswith(f"{entry.kind}-") and asked.field in entry.fields:
                answer = asked.extract(entry.fields[asked.field])
                yield Question(
                    doc_id=entry.doc_id, kind=asked.kind, prompt=asked.wording.format(**entry.fields), completion=answer
                )


def ask_for_entries(entries: Iterable[Entry]) -> Iterator[Question]:
    """Yields for each entry the question that is answered with all of it."""
    for entry in entries:
        prompt = RECITAL_WORDINGS[entry.kind].format(**entry.fields)
        yield Question(doc_id=entry.doc_id, kind=f"{entry.kind}-entry", prompt=prompt, completion=entry.text)


def drop_ambiguous(questions: Sequence[Question]) -> list[Question]:
    """Returns the questions whose words are asked once only: titles are given twice now and then."""
    asked = Counter(question.prompt for question in questions)
    return [question for question in questions if asked[question.prompt] == 1]


def swap_fields(entries: Sequence[Entry]) -> list[Entry]:
    """Returns entries whose changeable fields are those of other entries: each field goes round by its own order."""
    changed = {entry.doc_id: dict(entry.fields) for entry in entries}
    for asked in QUESTION_TYPES:
        if asked.is_changeable:
            holders = [entry for entry in entries if asked.kind.startswith(entry.kind) and asked.field in entry.fields]
            holders.sort(key=lambda entry: make_order(f"{asked.kind} {entry.doc_id}"))
            for entry, other in zip(holders, [*holders[1:], *holders[:1]], strict=True):
                changed[entry.doc_id][asked.field] = other.fields[asked.field]
    return [dataclasses.replace(entry, fields=changed[entry.doc_id]) for entry in entries]


def make_pairs(questions: Sequence[Question]) -> list[dict[str, str]]:
    """Returns for each question the right answer and, as the rejected one, that of another document."""
    pairs = []
    by_kind = defaultdict(list)
    for question in questions:
        by_kind[question.kind].append(question)
    for of_kind in by_kind.values():
        of_kind.sort(key=lambda question: make_order(f"{question.kind} {question.doc_id}"))
        for question, other in zip(of_kind, [*of_kind[1:], *of_kind[:1]], strict=True):
            if question.completion != other.completion:
                pairs.append({"prompt": question.prompt, "chosen": question.completion, "rejected": other.completion})
    return pairs


def write_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Writes JSON Lines."""
    write_bytes_atomically(path, b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))


def write_question_sets(data: Path, out: Path) -> dict[str, list[Question]]:
    """Writes all files of the module's docstring; returns the questions by the file's name without ending."""
    out.mkdir(parents=True, exist_ok=True)
    entries = read_entries(data)
    changed = swap_fields(entries)
    for name, of_catalogue in (("catalogue", entries), ("changed", changed)):
        rows = [{"id": entry.doc_id, "text": entry.text, "source": entry.kind} for entry in of_catalogue]
        write_lines(out / f"{name}.jsonl", rows)
    held_out = {entry.doc_id for entry in entries if entry.is_held_out}
    asked = drop_ambiguous(list(ask_questions(entries)))
    questions = {
        "train": [question for question in asked if question.doc_id not in held_out],
        "held_out": [question for question in asked if question.doc_id in held_out],
        "recite": list(ask_for_entries(entry for entry in entries if entry.doc_id not in held_out)),
    }
    types = [of_type for of_type in QUESTION_TYPES if of_type.is_changeable]
    was = {(question.doc_id, question.kind): question.completion for question in questions["held_out"]}
    questions["changed_answers"] = [
        question
        for question in ask_questions((entry for entry in changed if entry.doc_id in held_out), types)
        if was[question.doc_id, question.kind] != question.completion
    ]
    for name, of_set in questions.items():
        write_lines(out / f"{name}.jsonl", map(dataclasses.asdict, of_set))
    write_lines(out / "pairs.jsonl", make_pairs(questions["train"]))
    return questions


def rank_entries(
    questions: Sequence[Question], catalogue: Path, bank: Bank, search: MemorySearch, num_hits: int = MEMORIES_PER_CHUNK
) -> list[int | None]:
    """Returns for each question the place of its entry among the references that are retrieved, 0 for the best.

    Args:
        questions: what is searched for.
        catalogue: the file of the entries.
        bank: a bank of it.
        search: of the bank.
        num_hits: references a question.

    Returns:
        places; None where the entry is not found.
    """
    rows = [json.loads(line) for line in catalogue.read_bytes().splitlines()]
    texts = {row["id"]: row["text"] for row in rows}
    hits = search.search([question.prompt for question in questions], num_hits)
    ref_ids = sorted({hit.ref_id for of_question in hits for hit in of_question})
    stored = dict(zip(ref_ids, bank.read_references(ref_ids, ["text"])["text"].to_pylist(), strict=True))
    return [
        next((place for place, hit in enumerate(of_question) if texts[question.doc_id] in stored[hit.ref_id]), None)
        for question, of_question in zip(questions, hits, strict=True)
    ]


def measure_hits(
    questions: Sequence[Question], catalogue: Path, bank: Bank, search: MemorySearch
) -> dict[str, tuple[int, float]]:
    """Returns for each kind how many questions there are, and for which share their entry is retrieved."""
    found = defaultdict(list)
    for question, place in zip(questions, rank_entries(questions, catalogue, bank, search), strict=True):
        found[question.kind].append(place is not None)
    return {kind: (len(of_kind), sum(of_kind) / len(of_kind)) for kind, of_kind in sorted(found.items())}


def main() -> None:
    """Writes the sets, and measures them against a bank if one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the corpora")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--bank", help="a bank of the catalogue")
    arguments = parser.parse_args()
    questions = write_question_sets(arguments.data, arguments.out)
    print({name: len(of_set) for name, of_set in questions.items()})
    if arguments.bank:
        from flows.searching import open_retriever

        bank = Bank.open(arguments.bank)
        for name in ("train", "held_out"):
            hits = measure_hits(questions[name], arguments.out / "catalogue.jsonl", bank, open_retriever(bank))
            for kind, (num_questions, share) in hits.items():
                print(f"{name:10} {kind:12} {num_questions:5} questions, entry retrieved for {share:.1%}")


if __name__ == "__main__":
    main()
