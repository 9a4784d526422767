"""Questions whose answer is known, made from a bank itself: which reference is meant, and which may not be found.

Two kinds, of the same references, which are drawn by a hash of their id:

``sentence``: a sentence of the reference. The reference has it word for word, so this is looking up text by its own
words; whatever reference has the sentence too is an answer as well.

``before``: the 64 tokens that stand before the reference in its document, which is what generation asks with. The
references in which these tokens themselves stand are left out of all rankings: they are no answer, and when text is
generated they are not in the bank.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import pyarrow as pa

from flows.splitting import find_family
from model.reading import CHUNK_TOKENS
from pipelines.scanning import SENTENCE_MARKS, WIDE_SENTENCE_MARKS
from schemas.bank import Bank
from schemas.identifiers import hash_json
from schemas.protocols import TextTokenizer

SENTENCE, BEFORE = "sentence", "before"

_MARKS = re.escape("".join(sorted({*SENTENCE_MARKS, *WIDE_SENTENCE_MARKS})))

SENTENCES = re.compile(rf"[^{_MARKS}\n]+(?:[{_MARKS}]+|\n|\Z)")
"""Up to a mark that ends sentences, or the end of a line; a mark within a number ends one too."""

MIN_CHARS, MAX_CHARS = 24, 240
"""A shorter run says too little to be looked for; 240 characters are about a chunk."""

MIN_BEFORE_TOKENS = CHUNK_TOKENS // 2
"""Fewer tokens than these before a reference are no question."""

MAX_BEFORE_BYTES = 16 * CHUNK_TOKENS
"""Bytes before a reference that are looked at; 64 tokens are seldom more than a third of these."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its answers.

    Attributes:
        key: its name, the same in every run: the kind, and the reference or the id of the query.
        item: what it is counted for: the document it is from, all versions of it together, or the query itself.
        kind: ``sentence``, ``before`` or ``beir``.
        source: where the document is from; empty if that is not known.
        text: what is searched for.
        answers: for each right answer how good it is, above 0.
        excluded: what is left out of rankings.
    """

    key: str
    item: str
    kind: str
    source: str
    text: str
    answers: dict[str, float]
    excluded: frozenset[str] = frozenset()


def pick_sentence(text: str, name: str) -> str:
    """Returns a sentence of a text, always the same for the same name; "" if none is long enough.

    Of a long one it is the beginning.
    """
    found = [part.strip() for part in SENTENCES.findall(text)]
    long = [part[:MAX_CHARS] for part in found if len(part) >= MIN_CHARS]
    return long[int(hash_json([name, "sentence"]), 16) % len(long)] if long else ""


class BankQuestions:
    """Makes questions of one version of a bank."""

    def __init__(self, bank: Bank, tokenizer: TextTokenizer) -> None:
        """Reads the texts of the references and where they stand.

        Args:
            bank: the version.
            tokenizer: the one that cut its references.

        Raises:
            BankFormatError: a table is missing or damaged.
        """
        self._tokenizer = tokenizer
        references = bank.read_table("references", ["ref_id", "text"])
        self._texts: dict[str, str] = dict(
            zip(references["ref_id"].to_pylist(), references["text"].to_pylist(), strict=True)
        )
        self._dropped = frozenset(bank.read_dropped_ids().to_pylist())
        self._kept_of: dict[str, str] = {}
        if bank.manifest.list_files("duplicates"):
            rows = bank.read_table("duplicates", ["ref_id", "kept_ref_id"])
            self._kept_of = dict(zip(rows["ref_id"].to_pylist(), rows["kept_ref_id"].to_pylist(), strict=True))
        places = bank.read_table("occurrences", ["doc_id", "ordinal", "start_byte", "end_byte", "prefix", "ref_id"])
        self._places = places.sort_by([("doc_id", "ascending"), ("ordinal", "ascending")]).combine_chunks()
        documents = bank.read_table("documents", ["doc_id", "source"])
        self._sources: dict[str, str] = dict(
            zip(documents["doc_id"].to_pylist(), documents["source"].to_pylist(), strict=True)
        )

    @property
    def num_live(self) -> int:
        """Live references."""
        return len(self._texts.keys() - self._dropped)

    def draw_references(self, num_references: int, *, seed: int, skipped: int = 0) -> list[str]:
        """Returns ids of live references: those with the least hash of seed and id, past the first ``skipped``."""
        live = [ref_id for ref_id in self._texts if ref_id not in self._dropped]
        ordered = sorted(live, key=lambda ref_id: hash_json([seed, ref_id]))
        return ordered[skipped : skipped + num_references]

    def find_live(self, ref_id: str) -> str:
        """Returns the live reference that stands for a near-duplicate; any other is returned as it is."""
        return self._kept_of.get(ref_id, ref_id)

    def has_text(self, ref_id: str, text: str) -> bool:
        """Tells whether a reference has a text word for word."""
        return text in self._texts[ref_id]

    def make(self, ref_ids: Sequence[str]) -> Iterator[Question]:
        """Yields a question of each kind for references, where there is one."""
        first = self._find_places(ref_ids)
        for ref_id in ref_ids:
            row = first.get(ref_id)
            source, item = ("", ref_id) if row is None else self._describe(row)
            sentence = pick_sentence(self._texts[ref_id], ref_id)
            if sentence:
                key = f"{SENTENCE}/{ref_id}"
                yield Question(key=key, item=item, kind=SENTENCE, source=source, text=sentence, answers={ref_id: 1.0})
            before = None if row is None else self._ask_before(ref_id, row, source, item)
            if before is not None:
                yield before

    def _describe(self, row: int) -> tuple[str, str]:
        """Returns the source of the document of a row, and what the document is called as an item."""
        doc_id = self._places["doc_id"][row].as_py()
        source = self._sources[doc_id]
        return source, f"{find_family(source)}: {find_family(doc_id)}"

    def _find_places(self, ref_ids: Sequence[str]) -> dict[str, int]:
        """Returns a row of the places for each reference: the first in which it or a near-duplicate of it stands."""
        wanted, column = set(ref_ids), self._places["ref_id"].to_pylist()
        rows: dict[str, int] = {}
        standing_in: dict[str, int] = {}
        for row, ref_id in enumerate(column):
            if ref_id in wanted:
                rows.setdefault(ref_id, row)
            elif self.find_live(ref_id) in wanted:
                standing_in.setdefault(self.find_live(ref_id), row)
        return standing_in | rows

    def _list_before(self, row: int, num_bytes: int) -> list[int]:
        """Returns the rows of the same document before a row that have some of the bytes right before its start."""
        doc_id, start = self._places["doc_id"][row], self._places["start_byte"][row].as_py()
        rows = []
        for earlier in range(row - 1, -1, -1):
            if self._places["doc_id"][earlier] != doc_id:
                break
            if self._places["end_byte"][earlier].as_py() <= start - num_bytes:
                break
            rows.append(earlier)
        return rows

    def _read_before(self, row: int) -> str:
        """Returns the text of the document before the reference of a row, as far as it is looked at."""
        start = self._places["start_byte"][row].as_py()
        parts: list[bytes] = []
        for earlier in self._list_before(row, MAX_BEFORE_BYTES):
            prefix = self._places["prefix"][earlier].as_py()
            text = self._texts[self._places["ref_id"][earlier].as_py()].removeprefix(prefix).encode()
            begin, end = (
                self._places["start_byte"][earlier].as_py(),
                min(start, self._places["end_byte"][earlier].as_py()),
            )
            parts.append(text[: end - begin])
            start = begin
        return b"".join(reversed(parts)).decode(errors="ignore")

    def _ask_before(self, ref_id: str, row: int, source: str, item: str) -> Question | None:
        """Returns the question with the tokens before a reference, None if there are too few of them."""
        before = self._read_before(row)
        encoded = self._tokenizer.encode_texts(pa.array([before]))
        num_tokens = len(encoded.token_ids)
        if num_tokens < MIN_BEFORE_TOKENS:
            return None
        cut = int(encoded.starts[max(0, num_tokens - CHUNK_TOKENS)])
        asked = before.encode()[cut:]
        own = [self._places["ref_id"][place].as_py() for place in self._list_before(row, len(asked))]
        excluded = frozenset(map(self.find_live, own))
        text = asked.decode(errors="ignore")
        if ref_id in excluded or not text.strip():
            return None  # the text says itself again
        return Question(
            key=f"{BEFORE}/{ref_id}",
            item=item,
            kind=BEFORE,
            source=source,
            text=text,
            answers={ref_id: 1.0},
            excluded=excluded,
        )


def group_by_source(questions: Sequence[Question]) -> dict[str, list[Question]]:
    """Returns questions by source, sources in order."""
    groups: defaultdict[str, list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.source].append(question)
    return dict(sorted(groups.items()))
