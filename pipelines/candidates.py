"""What each 64-token chunk of a training sequence may read: retrieved with its own text, without what gives it away.

    packed sequences -> references that are nearest to each chunk -> **without leaking ones, best first**

A candidate is left out where its tokens would give the sequence away (the leak rule, method section 7), or where it was
cut from the very place of a document that the sequence is from (the place rule).

These rules leave most chunks with other parts of their own documents, which are of more use than what there is to read
where a text is new. A model that met nothing else trusts its memories too much, so a share of the sequences can be
prepared by strict rules, much like those of evaluation: nothing of their documents, not even where it was stored for
another document that says nearly the same, and nothing that shares a run of tokens. Documents are told by their ids:
another version of a page under another name is another document.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.running import load_once
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.overlap import SHARED_RUN, bound_overlap, measure_overlap, shares_run
from schemas.protocols import ChunkSearchFactory, IntArray
from schemas.reference_tokens import ReferenceTokens
from schemas.sequences import CHUNK_TOKENS, PACKED, SEQUENCES

Candidates = list[list[tuple[str, float]]]
"""For each chunk the ids of references and their similarities, best first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CandidateConfig:
    """What chunks retrieve.

    Attributes:
        num_candidates: references retrieved for each chunk, of which those are stored that it may read.
        max_overlap: a reference with a greater overlap with the sequence is left out.
        exclude_own_place: leave out references that stand in the text of the sequence.
        strict_share: of the sequences, references that stand anywhere in one of their documents, are kept in the place
            of one that does, or share 13 consecutive tokens with the sequence, are left out as well. Which sequences
            depends on their numbers alone.
        num_distractors: references beside the candidates that the dataset takes along, for training to mislead with;
            a bank of no more references is taken along whole.
    """

    num_candidates: int = 12
    max_overlap: float = 0.9
    exclude_own_place: bool = True
    strict_share: float = 0.0
    num_distractors: int = 200_000

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a number out of bounds.
        """
        if self.num_candidates < 1:
            raise InputError(f"candidates: num_candidates is {self.num_candidates}, must be at least 1")
        if not 0 < self.max_overlap <= 1:
            raise InputError(f"candidates: max_overlap is {self.max_overlap}, must be above 0 and at most 1")
        if not 0 <= self.strict_share <= 1:
            raise InputError(f"candidates: strict_share is {self.strict_share}, must be between 0 and 1")
        if self.num_distractors < 0:
            raise InputError(f"candidates: num_distractors is {self.num_distractors}, must be at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CandidateSource:
    """What workers open to find candidates.

    Attributes:
        search: makes the search for chunks.
        bank: opens the version of the bank that is searched, for where its references stand.
        references: the file with the tokens of its references.
        config: which of them may be read.
    """

    search: ChunkSearchFactory
    bank: Callable[[], Bank]
    references: Path
    config: CandidateConfig


def split_chunks(tokens: IntArray) -> list[IntArray]:
    """Returns the chunks of a sequence: its last token is predicted and not read."""
    return [
        tokens[start : min(start + CHUNK_TOKENS, len(tokens) - 1)] for start in range(0, len(tokens) - 1, CHUNK_TOKENS)
    ]


class OwnPlaces:
    """Which references stand at which places of some documents."""

    def __init__(self, bank: Bank, doc_ids: Iterable[str]) -> None:
        """Reads where the references of these documents stand, and which are kept in their place.

        Raises:
            BankFormatError: a table is missing or damaged.
        """
        columns = ["doc_id", "start_char", "end_char", "ref_id"]
        rows = bank.read_rows("occurrences", "doc_id", doc_ids, columns).to_pydict()
        self._places: dict[str, list[tuple[int, int, str]]] = {}
        for doc_id, *place in zip(*(rows[name] for name in columns), strict=True):
            self._places.setdefault(doc_id, []).append((place[0], place[1], place[2]))
        self._kept_of: dict[str, str] = {}
        if bank.manifest.list_files("duplicates"):
            near = bank.read_rows("duplicates", "ref_id", set(rows["ref_id"]), ["ref_id", "kept_ref_id"]).to_pydict()
            self._kept_of = dict(zip(near["ref_id"], near["kept_ref_id"], strict=True))

    def find(self, spans: Sequence[dict[str, Any]]) -> set[str]:
        """Returns the references of which some text stands in these spans of documents."""
        return {
            ref_id
            for span in spans
            for start, end, ref_id in self._places.get(span["doc_id"], ())
            if start < span["end_char"] and end > span["start_char"]
        }

    def find_all(self, spans: Sequence[dict[str, Any]]) -> set[str]:
        """Returns the references that stand anywhere in these documents, and those that are kept in their place."""
        own = {ref_id for span in spans for _, _, ref_id in self._places.get(span["doc_id"], ())}
        return own | {self._kept_of[ref_id] for ref_id in own & self._kept_of.keys()}


def is_strict(sequence: int, share: float) -> bool:
    """Tells whether a sequence is among the share that is prepared by the strict rules, by its number."""
    return share > 0 and np.random.default_rng(sequence).random() < share


def select_candidates(
    tokens: IntArray,
    found: Candidates,
    own: set[str],
    references: dict[str, IntArray],
    max_overlap: float,
    *,
    shared_run: int | None = None,
) -> tuple[list[list[tuple[str, float, float]]], int, int]:
    """Leaves out what the chunks of a sequence retrieved but may not read.

    Args:
        tokens: the sequence.
        found: what each chunk retrieved.
        own: references that stand in the text of the sequence, or in its documents.
        references: the tokens of all that was retrieved.
        max_overlap: the leak rule's bound.
        shared_run: a reference that shares so many consecutive tokens with the sequence leaks, too; None for no such
            rule.

    Returns:
        For each chunk id, overlap and similarity, best first; and how often one was left out for the leak rule, and for
        its place though the leak rule allows it.
    """
    overlaps: dict[str, float] = {}
    for ref_id in {ref_id for of_chunk in found for ref_id, _ in of_chunk}:
        overlap = bound_overlap(tokens, references[ref_id])
        overlaps[ref_id] = overlap if overlap <= max_overlap else measure_overlap(tokens, references[ref_id])
    leaking = {ref_id for ref_id, overlap in overlaps.items() if overlap > max_overlap}
    if shared_run is not None:
        leaking |= {ref_id for ref_id in overlaps if shares_run(tokens, references[ref_id], shared_run)}
    num_leaking = num_own_place = 0
    selected: list[list[tuple[str, float, float]]] = []
    for of_chunk in found:
        selected.append([])
        for ref_id, similarity in of_chunk:
            if ref_id in leaking:
                num_leaking += 1
            elif ref_id in own:
                num_own_place += 1
            else:
                selected[-1].append((ref_id, overlaps[ref_id], similarity))
    return selected, num_leaking, num_own_place


def add_candidates(
    block: pa.Table, first_sequence: int, source: CandidateSource | None, own: OwnPlaces | None
) -> dict[str, list[Any]]:
    """Returns the columns that sequences have beyond the packed ones."""
    sequences = [np.asarray(tokens, np.int32) for tokens in block["tokens"].to_pylist()]
    chunks = [split_chunks(tokens) for tokens in sequences]
    numbers = list(range(first_sequence, first_sequence + len(block)))
    columns: dict[str, list[Any]] = {name: [] for name in SEQUENCES.names if name not in PACKED.names}
    columns["sequence"] = numbers
    if source is None:
        nothing: list[list[Any]] = [[[] for _ in of_sequence] for of_sequence in chunks]
        counts = [0] * len(block)
        return {
            **columns,
            **dict.fromkeys(("ref_ids", "overlaps", "similarities"), nothing),
            **dict.fromkeys(("num_leaking", "num_own_place"), counts),
        }
    config = source.config
    flat = [chunk for of_sequence in chunks for chunk in of_sequence]
    found = iter(load_once(source.search).search(flat, config.num_candidates))
    stored = load_once(functools.partial(ReferenceTokens, source.references))
    documents = block["documents"].to_pylist()
    for number, tokens, of_sequence, spans in zip(numbers, sequences, chunks, documents, strict=True):
        mine = [next(found) for _ in of_sequence]
        ref_ids = sorted({ref_id for of_chunk in mine for ref_id, _ in of_chunk})
        rows = stored.find_rows(pa.array(ref_ids, pa.string())).tolist()
        references = {ref_id: stored.get_tokens(row) for ref_id, row in zip(ref_ids, rows, strict=True)}
        strictly = is_strict(number, config.strict_share)
        own_ids = set()
        if own and strictly:
            own_ids = own.find_all(spans)
        elif own and config.exclude_own_place:
            own_ids = own.find(spans)
        selected, num_leaking, num_own_place = select_candidates(
            tokens,
            mine,
            own_ids,
            references,
            config.max_overlap,
            shared_run=SHARED_RUN if strictly else None,
        )
        for name, place in (("ref_ids", 0), ("overlaps", 1), ("similarities", 2)):
            columns[name].append([[candidate[place] for candidate in of_chunk] for of_chunk in selected])
        columns["num_leaking"].append(num_leaking)
        columns["num_own_place"].append(num_own_place)
    return columns
