"""The stages from corpus files to the documents that are kept, in the order data flows; each is a job over files.

    corpus files -> records -> (scores) -> (document duplicates)

The functions that do the work are in the modules named after it; here they are wired to the files of a workspace. What
needs to see all files at once (ids, cuts in a ranking) is a plain function over a few columns, between two jobs.
Near-duplicates are found by :mod:`pipelines.comparing`, and :mod:`pipelines.referencing` goes on with what is kept.
"""

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.clustering import FIRST, SOURCE, DeduplicationConfig, prefer_sources, rank_sources
from pipelines.comparing import Comparison, plan_comparison
from pipelines.conflicts import find_id_conflicts
from pipelines.filtering import FilterConfig, filter_records
from pipelines.formats import CorpusFile
from pipelines.ranking import choose_score_cut
from pipelines.reading import read_records
from pipelines.records import RECORDS, ReadingConfig
from pipelines.running import EngineConfig, Unit, is_stopping, load_once, run_units
from pipelines.words import Indices
from pipelines.workspace import Workspace, read_tables
from schemas.atomic import replace_atomically
from schemas.protocols import ScorerFactory
from schemas.tables import DOCUMENT_DUPLICATES, REJECTS, write_table

UNIT_BYTES = 16 << 20
UNIT_FILES = 256

PART_BYTES = 16 << 20
"""Text in a file of records, which is also what a stopped reader of a large file does again at most."""

DOCUMENT_DROPS = "documents.parquet"

LOW_QUALITY = "low_quality"
NEAR_DUPLICATE_DOCUMENT = "near_duplicate_document"


# Corpus files -> records ----------------------------------------------------------------------------------------------


def group_files(files: Sequence[CorpusFile]) -> list[list[CorpusFile]]:
    """Groups corpus files, in their order, to units of at most 16 MB or 256 files; a large file is one of its own."""
    groups: list[list[CorpusFile]] = []
    size_bytes = 0
    for file in files:
        if not groups or len(groups[-1]) == UNIT_FILES or size_bytes + file.size_bytes > UNIT_BYTES:
            groups.append([])
            size_bytes = 0
        groups[-1].append(file)
        size_bytes += file.size_bytes
    return groups


def _iterate_row_groups(batches: Iterable[pa.RecordBatch], num_bytes: int) -> Iterator[pa.Table]:
    """Joins the batches of many small files: a row group is the unit of chunking and should be worth its while."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        if waiting and sum(part.nbytes for part in waiting) + batch.nbytes > num_bytes:
            yield pa.Table.from_batches(waiting)
            waiting = []
        waiting.append(batch)
    if waiting:
        yield pa.Table.from_batches(waiting)


def _iterate_records(
    group: Sequence[CorpusFile], config: ReadingConfig, filters: FilterConfig, start: tuple[str, int] | None
) -> Iterator[pa.RecordBatch]:
    """Reads the files of a group, after a (path, position) where an earlier run ended."""
    paths = [file.path for file in group]
    first = paths.index(start[0]) if start else 0
    for number, file in enumerate(group[first:]):
        after = start[1] if start and number == 0 else 0
        for batch in read_records(file, config, after=after):
            yield filter_records(batch, filters)


def _find_resume_point(parts: Sequence[Path]) -> tuple[str, int] | None:
    """Returns path and position of the last record that an earlier run has written."""
    if not parts:
        return None
    file = pq.ParquetFile(parts[-1])
    rows = file.read_row_group(file.num_row_groups - 1, columns=["path", "position"])
    return rows["path"][-1].as_py(), rows["position"][-1].as_py()


def _read_group(
    unit: Unit, groups: Sequence[Sequence[CorpusFile]], folder: Path, config: ReadingConfig, filters: FilterConfig
) -> None:
    """Reads a group of files into files of records, going on after the last that an earlier run finished."""
    parts = sorted(folder.glob(f"{unit.target.stem}-*.parquet"))
    batches = _iterate_records(groups[unit.part], config, filters, _find_resume_point(parts))
    tables = _iterate_row_groups(batches, config.batch_text_bytes)
    table = next(tables, None)
    while table is not None:
        target = folder / f"{unit.target.stem}-{len(parts):05d}.parquet"
        size_bytes = 0
        with (
            replace_atomically(target) as temporary,
            pq.ParquetWriter(temporary, RECORDS, compression="zstd", compression_level=1) as sink,
        ):
            while table is not None and size_bytes < PART_BYTES:
                sink.write_table(table, row_group_size=len(table))
                size_bytes += table.nbytes
                table = next(tables, None)
        parts.append(target)
        if is_stopping():
            return
    with replace_atomically(unit.target) as temporary:
        temporary.write_text(json.dumps({"parts": len(parts)}))


def read_corpus(
    files: Sequence[CorpusFile], work: Workspace, config: ReadingConfig, filters: FilterConfig, engine: EngineConfig
) -> None:
    """Reads every corpus file into records, kept and rejected ones alike; the filters reject some more."""
    groups = group_files(files)
    units = [
        Unit(source=work.root, part=part, target=work.get_folder("read") / f"{part:06d}.json")
        for part in range(len(groups))
    ]
    folder = work.get_folder("records")
    process = functools.partial(_read_group, groups=groups, folder=folder, config=config, filters=filters)
    run_units("read", units, process, engine)


# Records -> records to drop -------------------------------------------------------------------------------------------


def _name_places(table: pa.Table) -> pa.ChunkedArray:
    kind = table["path"].type
    return pc.binary_join_element_wise(table["path"], table["position"].cast(kind), pa.scalar("\0", kind))


def select_kept(records: pa.Table, drops: pa.Table) -> pa.Table:
    """Returns the records that have no reason to be dropped and are not among ``drops``."""
    kept = records.filter(pc.is_null(records["reason"]))
    if not len(drops):
        return kept
    return kept.filter(pc.invert(pc.is_in(_name_places(kept), value_set=_name_places(drops).combine_chunks())))


def read_drops(work: Workspace, without: str | None = None) -> pa.Table:
    """Returns the records that stages after reading have dropped, as :data:`schemas.tables.REJECTS`.

    Args:
        work: the build's files.
        without: the name of a file of drops that is left out, for the stage that writes it again.
    """
    files = [path for path in work.list_files("drops") if path.name != without]
    return read_tables(files, REJECTS.names, REJECTS)


def drop_conflicts(work: Workspace) -> None:
    """Drops the records whose document id another record has."""
    columns = ["path", "position", "doc_id", "content_hash", "reason"]
    records = read_tables(work.list_files("records"), columns, RECORDS)
    kept = records.filter(pc.is_null(records["reason"]))
    write_table(find_id_conflicts(kept), work.get_folder("drops") / "conflicts.parquet")


def list_row_groups(work: Workspace) -> list[tuple[Path, int]]:
    """Returns the row groups of all records, as file and number."""
    return [
        (path, part) for path in work.list_files("records") for part in range(pq.read_metadata(path).num_row_groups)
    ]


def read_kept(unit: Unit, columns: Sequence[str], drops_folder: Path) -> pa.Table:
    """Reads columns of the records of a row group that no stage has dropped so far."""
    wanted = list(dict.fromkeys([*columns, "path", "position", "reason"]))
    records = pq.ParquetFile(unit.source).read_row_group(unit.part, columns=wanted)
    # Only the drops of these corpus files: there may be as many drops as records.
    mine = [("path", "in", records["path"].unique().to_pylist())]
    files = sorted(drops_folder.glob("*.parquet")) if len(records) else []
    found = [pq.read_table(path, columns=["path", "position"], filters=mine) for path in files]
    drops = pa.concat_tables([REJECTS.empty_table().select(["path", "position"]), *found])
    return select_kept(records, drops).select(list(columns)).combine_chunks()


def _score_row_group(unit: Unit, factory: ScorerFactory, drops_folder: Path) -> None:
    kept = read_kept(unit, ["path", "position", "doc_id", "text"], drops_folder)
    scores = load_once(factory).score(kept["text"].to_pylist())
    write_table(kept.drop_columns("text").append_column("score", pa.array(scores, pa.float32())), unit.target)


def score_documents(work: Workspace, factory: ScorerFactory, engine: EngineConfig) -> None:
    """Scores the quality of every kept document."""
    folder = work.get_folder("scores")
    units = [
        Unit(source=path, part=part, target=folder / f"{path.stem}-{part:05d}.parquet")
        for path, part in list_row_groups(work)
    ]
    process = functools.partial(_score_row_group, factory=factory, drops_folder=work.get_folder("drops"))
    run_units("score", units, process, engine)


def drop_low_scores(work: Workspace, threshold: float | None, top_share: float | None) -> None:
    """Drops the documents that score below a threshold, or outside of the best share."""
    scored = pa.concat_tables([pq.read_table(path) for path in work.list_files("scores")]).combine_chunks()
    scores = scored["score"].to_numpy()
    dropped = choose_score_cut(scores, scored["doc_id"].to_pylist(), threshold, top_share)
    least = float(scores[~dropped].min()) if not dropped.all() else None
    rows = scored.filter(pa.array(dropped))
    is_below = [threshold is not None and not score >= np.float32(threshold) for score in rows["score"].to_numpy()]
    bounds = [threshold if below else least for below in is_below]
    wordings = [
        f"the bound is {threshold:g}" if below else f"outside of the best {100 * (top_share or 0):g} %"
        for below in is_below
    ]
    details = [
        f"quality score {score:g}, {wording}"
        for score, wording in zip(rows["score"].to_pylist(), wordings, strict=True)
    ]
    columns = {
        **{name: rows[name] for name in ("path", "position", "doc_id")},
        "reason": pa.array([LOW_QUALITY] * len(rows), pa.string()),
        "detail": pa.array(details, pa.string()),
        "value": rows["score"],
        "threshold": pa.array(bounds, pa.float64()),
    }
    write_table(pa.table(columns).cast(REJECTS), work.get_folder("drops") / "quality.parquet")


# Documents -> near-duplicate documents --------------------------------------------------------------------------------


def _read_document_texts(unit: Unit, drops_folder: Path) -> pa.Table:
    return read_kept(unit, ["doc_id", "text"], drops_folder).rename_columns(["id", "text"])


def plan_documents(work: Workspace, config: DeduplicationConfig, engine: EngineConfig) -> Comparison:
    """Returns the comparison of all documents that are kept so far; its drops must not change while it runs."""
    read = functools.partial(_read_document_texts, drops_folder=work.get_folder("drops"))
    return plan_comparison(work.get_folder("documents"), list_row_groups(work), read, config, engine)


def prefer_documents(work: Workspace, config: DeduplicationConfig, ids: pa.Array) -> Indices:
    """Returns the preference of each document, see :class:`pipelines.clustering.DeduplicationConfig`."""
    if config.keep == FIRST:
        return np.zeros(len(ids), np.int64)  # ties go to the least id
    records = read_tables(work.list_files("records"), ["doc_id", "source", "size_bytes", "reason"], RECORDS)
    kept = records.filter(pc.is_null(records["reason"])).combine_chunks()
    rows = kept.take(pc.index_in(ids, value_set=kept["doc_id"].combine_chunks()))
    sizes: Indices = rows["size_bytes"].to_numpy()
    if config.keep != SOURCE:
        return -sizes
    return prefer_sources(rank_sources(rows["source"].combine_chunks(), config.source_priority), sizes)


def drop_document_duplicates(work: Workspace, duplicates: pa.Table, threshold: float) -> None:
    """Drops near-duplicate documents, and keeps the table that says of what they are duplicates."""
    write_table(duplicates.rename_columns(DOCUMENT_DUPLICATES.names), work.document_duplicates_path)
    places = read_tables(work.list_files("records"), ["path", "position", "doc_id", "reason"], RECORDS)
    # A stage that is run again has written its drops already.
    kept = select_kept(places, read_drops(work, without=DOCUMENT_DROPS)).combine_chunks()
    rows = kept.take(pc.index_in(duplicates["id"], value_set=kept["doc_id"].combine_chunks()))
    similarity = pc.cast(pc.round(duplicates["matched_jaccard"], 4), pa.string())
    columns = {
        **{name: rows[name] for name in ("path", "position", "doc_id")},
        "reason": pa.array([NEAR_DUPLICATE_DOCUMENT] * len(rows), pa.string()),
        "detail": pc.binary_join_element_wise("similarity", similarity, "to document", duplicates["matched_id"], " "),
        "value": duplicates["matched_jaccard"],
        "threshold": pa.array([threshold] * len(rows), pa.float64()),
    }
    write_table(pa.table(columns).cast(REJECTS), work.get_folder("drops") / DOCUMENT_DROPS)
