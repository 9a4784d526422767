"""The stages from records to training sequences with what their chunks may read, in the order data flows.

    records -> packed sequences -> candidates of each chunk, without leaking ones -> shards -> dataset

Every 64-token chunk retrieves references with its own text. A candidate is left out where its tokens would give the
sequence away (the leak rule, method section 7), or where it was cut from the very place of a document that the sequence
is from (the place rule). What is left is stored best first; the loader chooses among it.

These rules leave most chunks with other parts of their own documents, which are of more use than what there is to read
where a text is new. A model that met nothing else trusts its memories too much, so a share of the sequences can be
prepared by the strict rules of evaluation: nothing of their documents, and nothing that shares a run of tokens.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.jobs import list_row_groups, read_drops, read_kept
from pipelines.packing import PackingConfig, pack_documents
from pipelines.records import RECORDS
from pipelines.running import EngineConfig, Unit, load_once, run_units
from pipelines.workspace import Workspace, read_tables
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.overlap import SHARED_RUN, bound_overlap, measure_overlap, shares_run
from schemas.protocols import ChunkSearchFactory, IntArray, TokenizerFactory
from schemas.reference_tokens import REFERENCE_TOKENS, ReferenceTokens, write_reference_tokens
from schemas.sequences import (
    CHUNK_TOKENS,
    PACKED,
    SEQUENCES,
    SEQUENCES_PER_BLOCK,
    SHARDS_FOLDER,
    write_sequences,
)

PACKED_FOLDER = "packed"

Candidates = list[list[tuple[str, float]]]
"""For each chunk the ids of references and their similarities, best first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CandidateConfig:
    """What chunks retrieve.

    Attributes:
        num_candidates: references retrieved for each chunk, of which those are stored that it may read.
        max_overlap: a reference with a greater overlap with the sequence is left out.
        exclude_own_place: leave out references that stand in the text of the sequence.
        strict_share: of the sequences, references that stand anywhere in one of their documents, or share 13
            consecutive tokens with the sequence, are left out as well. Which sequences depends on their numbers alone.
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


# Records -> packed sequences ------------------------------------------------------------------------------------------


def _pack_row_group(unit: Unit, factory: TokenizerFactory, config: PackingConfig, drops_folder: Path) -> None:
    kept = read_kept(unit, ["doc_id", "text"], drops_folder)
    ids, texts = (kept[name].combine_chunks() for name in ("doc_id", "text"))
    write_sequences([pack_documents(ids, texts, load_once(factory), config)], PACKED, unit.target)


def pack_corpus(work: Workspace, factory: TokenizerFactory, config: PackingConfig, engine: EngineConfig) -> None:
    """Packs the kept documents of each row group of records."""
    folder = work.get_folder(PACKED_FOLDER)
    folder.mkdir(exist_ok=True)
    units = [
        Unit(source=path, part=part, target=folder / f"{path.stem}-{part:05d}.parquet")
        for path, part in list_row_groups(work)
    ]
    process = functools.partial(_pack_row_group, factory=factory, config=config, drops_folder=work.get_folder("drops"))
    run_units("pack", units, process, engine)


# Bank -> tokens of its references -------------------------------------------------------------------------------------


def write_bank_references(bank: Bank, target: Path) -> None:
    """Writes the tokens of all live references of a version, sorted by id."""
    if target.exists():
        return
    stored = bank.read_table("references", REFERENCE_TOKENS.names)
    live = stored.filter(pc.invert(pc.is_in(stored["ref_id"], value_set=bank.read_dropped_ids())))
    write_reference_tokens([live.sort_by("ref_id")], target)


# Packed sequences -> what their chunks may read -----------------------------------------------------------------------


def split_chunks(tokens: IntArray) -> list[IntArray]:
    """Returns the chunks of a sequence: its last token is predicted and not read."""
    return [
        tokens[start : min(start + CHUNK_TOKENS, len(tokens) - 1)] for start in range(0, len(tokens) - 1, CHUNK_TOKENS)
    ]


class _OwnPlaces:
    """Which references stand at which places of some documents."""

    def __init__(self, bank: Bank, doc_ids: Iterable[str]) -> None:
        columns = ["doc_id", "start_char", "end_char", "ref_id"]
        rows = bank.read_rows("occurrences", "doc_id", doc_ids, columns).to_pydict()
        self._places: dict[str, list[tuple[int, int, str]]] = {}
        for doc_id, *place in zip(*(rows[name] for name in columns), strict=True):
            self._places.setdefault(doc_id, []).append((place[0], place[1], place[2]))

    def find(self, spans: Sequence[dict[str, Any]]) -> set[str]:
        """Returns the references of which some text stands in these spans of documents."""
        return {
            ref_id
            for span in spans
            for start, end, ref_id in self._places.get(span["doc_id"], ())
            if start < span["end_char"] and end > span["start_char"]
        }

    def find_all(self, spans: Sequence[dict[str, Any]]) -> set[str]:
        """Returns the references that stand anywhere in these documents."""
        return {ref_id for span in spans for _, _, ref_id in self._places.get(span["doc_id"], ())}


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


def _add_candidates(
    block: pa.Table, first_sequence: int, source: CandidateSource | None, own: _OwnPlaces | None
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


def _write_shard(unit: Unit, source: CandidateSource | None) -> None:
    packed = pq.read_table(unit.source)
    own = None
    if source is not None and (source.config.exclude_own_place or source.config.strict_share):
        doc_ids = {span["doc_id"] for spans in packed["documents"].to_pylist() for span in spans}
        own = _OwnPlaces(load_once(source.bank), sorted(doc_ids))

    def iterate_blocks() -> Iterator[pa.Table]:
        for start in range(0, len(packed), SEQUENCES_PER_BLOCK):
            block = packed.slice(start, SEQUENCES_PER_BLOCK)
            columns = _add_candidates(block, unit.first_row + start, source, own)
            arrays = [
                block[field.name].combine_chunks()
                if field.name in PACKED.names
                else pa.array(columns[field.name], field.type)
                for field in SEQUENCES
            ]
            yield pa.table(arrays, schema=SEQUENCES)

    write_sequences(iterate_blocks(), SEQUENCES, unit.target)


def list_shard_units(work: Workspace) -> list[Unit]:
    """Returns a unit for each packed file that has a sequence; its target is the shard."""
    units: list[Unit] = []
    num_rows = 0
    for path in work.list_files(PACKED_FOLDER):
        size = pq.read_metadata(path).num_rows
        if size:
            target = work.get_folder(SHARDS_FOLDER) / f"{len(units):06d}.parquet"
            units.append(Unit(source=path, target=target, first_row=num_rows))
            num_rows += size
    return units


def write_shards(work: Workspace, source: CandidateSource | None, engine: EngineConfig) -> None:
    """Writes a shard of each packed file, with candidates where there is a bank to search."""
    work.get_folder(SHARDS_FOLDER).mkdir(exist_ok=True)
    run_units("retrieve", list_shard_units(work), functools.partial(_write_shard, source=source), engine)


# Shards -> references a training needs, counts ------------------------------------------------------------------------


def count_documents(work: Workspace) -> dict[str, Any]:
    """Returns the number of records read and kept, and of those dropped for each reason."""
    reasons = read_tables(work.list_files("records"), ["reason"], RECORDS)["reason"]
    dropped: Counter[str] = Counter(reasons.drop_null().to_pylist())
    dropped.update(read_drops(work)["reason"].to_pylist())
    return {"read": len(reasons), "kept": len(reasons) - dropped.total(), "dropped": dict(sorted(dropped.items()))}


def write_dataset_references(shards: Sequence[Path], source: CandidateSource, target: Path, seed: int) -> int:
    """Writes the references that some chunk may read and a random sample of the others; returns their number."""
    stored = ReferenceTokens(source.references)
    if len(stored) <= source.config.num_distractors:
        rows = np.arange(len(stored))
    else:
        ids = [pq.read_table(path, columns=["ref_ids"])["ref_ids"].combine_chunks() for path in shards]
        used = pc.unique(pa.concat_arrays([pc.list_flatten(pc.list_flatten(column)) for column in ids]))
        is_chosen = np.zeros(len(stored), np.bool_)
        is_chosen[stored.find_rows(used)] = True
        others = np.flatnonzero(~is_chosen)
        generator = np.random.default_rng(seed)
        num_others = min(len(others), source.config.num_distractors)
        is_chosen[generator.choice(others, num_others, replace=False)] = True
        rows = np.flatnonzero(is_chosen)
    return write_reference_tokens(stored.iterate_tables(rows), target)


def count_sequences(shards: Sequence[Path]) -> dict[str, int]:
    """Returns what stands in shards, and what their chunks retrieved but may not read."""
    names = (
        "sequences",
        "tokens",
        "targets",
        "chunks",
        "chunks_without_candidate",
        "candidates",
        "leaking",
        "own_place",
    )
    counts = dict.fromkeys(names, 0)
    columns = ["num_tokens", "ref_ids", "num_leaking", "num_own_place"]
    for path in shards:
        table = pq.read_table(path, columns=columns)
        of_chunks = pc.list_value_length(pc.list_flatten(table["ref_ids"].combine_chunks()))
        num_tokens = pc.sum(table["num_tokens"]).as_py()
        counts["sequences"] += len(table)
        counts["tokens"] += num_tokens
        counts["targets"] += num_tokens - len(table)
        counts["chunks"] += len(of_chunks)
        counts["chunks_without_candidate"] += pc.sum(pc.equal(of_chunks, 0)).as_py() or 0
        counts["candidates"] += pc.sum(of_chunks).as_py() or 0
        counts["leaking"] += pc.sum(table["num_leaking"]).as_py()
        counts["own_place"] += pc.sum(table["num_own_place"]).as_py()
    return counts
