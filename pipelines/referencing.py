"""The stages from kept documents to live references, in the order data flows; each is a job over files.

    records, the base's documents -> chunks -> references -> (contaminated) -> compared -> duplicates

What a version before has already is taken over (:mod:`pipelines.reusing`): documents of the same content are not cut
again, and stored signatures not computed again. :mod:`pipelines.encoding` goes on with what is live.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.chunking import CHUNKS, ChunkingConfig, chunk_documents
from pipelines.clustering import FIRST, SOURCE, DeduplicationConfig, prefer_sources, rank_sources
from pipelines.comparing import Comparison, plan_comparison
from pipelines.decontaminating import DecontaminationConfig, Needles, find_contaminated
from pipelines.jobs import list_row_groups, read_drops, read_kept, select_kept
from pipelines.reusing import REUSED, Base, filter_new, match_documents, read_ids, read_range
from pipelines.running import EngineConfig, Unit, load_once, run_units
from pipelines.words import Indices
from pipelines.workspace import Workspace, read_columns, read_tables, write_columns
from schemas.bank import Bank
from schemas.protocols import TokenizerFactory
from schemas.tables import CONTAMINATED, REFERENCES, signatures_schema, write_table

NUM_DIGITS = 16
"""Chunks are parted by the first digit of their reference's id."""

ROWS_PER_PART = 1 << 20
"""References in a file from which files are parted by one digit more."""

GATHERED = pa.schema([*REFERENCES, pa.field("is_stored", pa.bool_(), nullable=False)])
"""The references of all documents, and whether the base has them already."""


# Documents -> documents that are cut already --------------------------------------------------------------------------


def _name_reused(path: Path, part: int) -> str:
    return f"{path.stem}-{part:05d}.parquet"


def match_corpus(work: Workspace, base: Base, *, by_title: bool) -> None:
    """Finds the kept documents whose references are in the base already."""
    columns = ["path", "position", "doc_id", "content_hash", "title", "reason"]
    drops = read_drops(work)
    found = [REUSED.empty_table()]
    for path in work.list_files("records"):
        file = pq.ParquetFile(path)
        for part in range(file.num_row_groups):
            records = select_kept(file.read_row_group(part, columns=columns), drops)
            reused = match_documents(records, base, by_title=by_title)
            write_table(reused, work.get_folder("reused") / _name_reused(path, part))
            found.append(reused)
    write_table(pa.concat_tables(found).sort_by("doc_id"), work.reused_path)


# Records -> chunks ----------------------------------------------------------------------------------------------------


def _iterate_parts(chunks: pa.Table) -> Iterator[pa.Table]:
    """Sorts chunks by reference and yields those of each first digit."""
    ordered = chunks.sort_by([("ref_id", "ascending"), ("doc_id", "ascending"), ("ordinal", "ascending")])
    digits = pc.utf8_slice_codeunits(ordered["ref_id"], 0, 1).combine_chunks().to_numpy(zero_copy_only=False)
    bounds = np.searchsorted(digits, [f"{digit:x}" for digit in range(NUM_DIGITS)]).tolist()
    for start, end in zip(bounds, [*bounds[1:], len(ordered)], strict=True):
        yield ordered.slice(start, end - start)


def _chunk_row_group(
    unit: Unit, factory: TokenizerFactory, config: ChunkingConfig, drops_folder: Path, reused_folder: Path
) -> None:
    kept = read_kept(unit, ["doc_id", "text", "title"], drops_folder)
    reused = reused_folder / _name_reused(unit.source, unit.part)
    if reused.exists():
        kept = kept.filter(pc.invert(pc.is_in(kept["doc_id"], value_set=read_ids([reused], "doc_id"))))
        kept = kept.combine_chunks()
    chunks = chunk_documents(kept["doc_id"], kept["text"], kept["title"], load_once(factory), config)
    write_columns(_iterate_parts(chunks), CHUNKS, unit.target, compression="lz4")


def chunk_corpus(work: Workspace, factory: TokenizerFactory, config: ChunkingConfig, engine: EngineConfig) -> None:
    """Splits the kept documents that are not taken over into references, one unit a row group of records."""
    folder = work.get_folder("chunks")
    units = [
        Unit(source=path, part=part, target=folder / f"{path.stem}-{part:05d}.arrow")
        for path, part in list_row_groups(work)
    ]
    process = functools.partial(
        _chunk_row_group,
        factory=factory,
        config=config,
        drops_folder=work.get_folder("drops"),
        reused_folder=work.get_folder("reused"),
    )
    run_units("chunk", units, process, engine)


# Chunks -> distinct references ----------------------------------------------------------------------------------------


def _keep_first(table: pa.Table) -> pa.Table:
    """Sorts by ref_id and keeps one row of each: equal ids have equal tokens, but their texts may differ.

    Tokenizers may map several texts to the same tokens; the least text is kept, so that the order of input does not
    matter.
    """
    ordered = table.sort_by([("ref_id", "ascending"), ("text", "ascending")]).combine_chunks()
    ids = ordered["ref_id"].combine_chunks()
    first = np.ones(len(ids), dtype=np.bool_)
    first[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    return ordered.filter(pa.array(first))


def _gather_part(unit: Unit, files: Sequence[Path], base: Base, current: Path) -> None:
    prefix = unit.target.stem
    tables = (read_columns(path, REFERENCES.names, batch=int(prefix[0], 16)) for path in files)
    mine = [table.filter(pc.starts_with(table["ref_id"], prefix)) if len(prefix) > 1 else table for table in tables]
    cut = _keep_first(pa.concat_tables([REFERENCES.empty_table(), *mine])).cast(REFERENCES)
    stored = REFERENCES.empty_table()
    if base.references:
        wanted = read_range([current], prefix, ["ref_id"], REFERENCES)["ref_id"].combine_chunks()
        stored = read_range(base.references, prefix, REFERENCES.names, REFERENCES)
        stored = stored.filter(pc.is_in(stored["ref_id"], value_set=wanted))
        cut = filter_new(cut, stored["ref_id"].combine_chunks())
    marked = [
        table.append_column(GATHERED.field("is_stored"), pa.array([is_stored] * len(table), pa.bool_()))
        for table, is_stored in ((cut, False), (stored, True))
    ]
    gathered = pa.concat_tables(marked)
    write_table(gathered.sort_by("ref_id") if len(stored) else gathered, unit.target)


def gather_references(work: Workspace, base: Base, engine: EngineConfig) -> None:
    """Gathers the distinct references of all documents, cut now or stored, sorted by id.

    There is one file for the ids that begin with the same digits.
    """
    files = work.list_files("chunks")
    num_rows = sum(len(read_columns(path, ["ordinal"])) for path in files)
    if base.references:
        current = pc.unique(read_ids([work.get_folder("tables") / "occurrences.parquet"]))
        write_table(pa.table({"ref_id": current}).sort_by("ref_id"), work.current_path)
        num_rows += len(current)
    num_digits = 1
    while num_rows > ROWS_PER_PART * NUM_DIGITS**num_digits:
        num_digits += 1
    units = [
        Unit(source=work.root, target=work.get_folder("references") / f"{part:0{num_digits}x}.parquet")
        for part in range(NUM_DIGITS**num_digits if num_rows else 0)
    ]
    process = functools.partial(_gather_part, files=files, base=base, current=work.current_path)
    run_units("gather", units, process, engine)


# References -> contaminated references --------------------------------------------------------------------------------


def _find_contaminated(unit: Unit, needles: Needles, config: DecontaminationConfig) -> None:
    references = pq.read_table(unit.source, columns=["ref_id", "token_ids"])
    write_table(find_contaminated(references, needles, config).cast(CONTAMINATED), unit.target)


def decontaminate(work: Workspace, needles: Needles, config: DecontaminationConfig, engine: EngineConfig) -> None:
    """Finds the references that overlap too much with texts a model is to be tested on."""
    folder = work.get_folder("contaminated")
    units = [Unit(source=path, target=folder / path.name) for path in work.list_files("references")]
    run_units("decontaminate", units, functools.partial(_find_contaminated, needles=needles, config=config), engine)


def take_contaminated(work: Workspace, bank: Bank) -> None:
    """Marks the references that were contaminated in a version, where nothing new is looked at."""
    if not bank.manifest.list_files("contaminated"):
        return
    known = bank.read_table("contaminated")
    for path in work.list_files("references"):
        ids = read_ids([path])
        found = known.filter(pc.is_in(known["ref_id"], value_set=ids)).cast(CONTAMINATED)
        write_table(found, work.get_folder("contaminated") / path.name)


# References -> near-duplicate references ------------------------------------------------------------------------------


def _read_reference_texts(unit: Unit, contaminated_folder: Path) -> pa.Table:
    references = pq.read_table(unit.source, columns=["ref_id", "text"])
    contaminated = contaminated_folder / unit.source.name
    if contaminated.exists():
        dropped = pq.read_table(contaminated, columns=["ref_id"])["ref_id"].combine_chunks()
        references = references.filter(pc.invert(pc.is_in(references["ref_id"], value_set=dropped)))
    return references.rename_columns(["id", "text"])


def _read_signatures(unit: Unit, paths: Sequence[Path], num_permutations: int) -> pa.Table:
    schema = signatures_schema("ref_id", num_permutations)
    return read_range(paths, unit.source.stem, schema.names, schema).rename_columns(["id", *schema.names[1:]])


def plan_references(work: Workspace, base: Base, config: DeduplicationConfig, engine: EngineConfig) -> Comparison:
    """Returns the comparison of all distinct references that are not contaminated."""
    read = functools.partial(_read_reference_texts, contaminated_folder=work.get_folder("contaminated"))
    known = functools.partial(_read_signatures, paths=base.signatures, num_permutations=config.num_permutations)
    sources = [(path, 0) for path in work.list_files("references")]
    return plan_comparison(
        work.get_folder("compared"), sources, read, config, engine, known=known if base.signatures else None
    )


def prefer_references(work: Workspace, config: DeduplicationConfig, ids: pa.Array) -> Indices:
    """Returns the preference of each reference, see :class:`pipelines.clustering.DeduplicationConfig`."""
    lengths = read_tables(work.list_files("references"), ["ref_id", "num_tokens"], REFERENCES).combine_chunks()
    places = pc.index_in(ids, value_set=lengths["ref_id"].combine_chunks())
    sizes: Indices = lengths["num_tokens"].combine_chunks().take(places).to_numpy().astype(np.int64)
    if config.keep not in (FIRST, SOURCE):
        return -sizes
    tables = work.get_folder("tables")
    # Sorted by document and place: the row of an occurrence is its place in the corpus.
    occurrences = pq.read_table(tables / "occurrences.parquet", columns=["doc_id", "ref_id"]).combine_chunks()
    rows = pc.index_in(occurrences["ref_id"], value_set=ids)
    places = np.flatnonzero(pc.is_valid(rows).to_numpy(zero_copy_only=False))
    rows = rows.drop_null().to_numpy()
    if config.keep == FIRST:
        first = np.full(len(ids), len(occurrences), np.int64)
        np.minimum.at(first, rows, places)
        return first
    documents = pq.read_table(tables / "documents.parquet", columns=["doc_id", "source"]).combine_chunks()
    owners = pc.index_in(occurrences["doc_id"], value_set=documents["doc_id"].combine_chunks()).to_numpy()[places]
    ranks = rank_sources(documents["source"].combine_chunks(), config.source_priority)[owners]
    best = np.full(len(ids), len(config.source_priority), np.int64)
    np.minimum.at(best, rows, ranks)
    return prefer_sources(best, sizes)
