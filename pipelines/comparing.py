"""Near-duplicate removal as jobs over files, for documents and for references alike (both are called texts here).

    texts --sign--> signatures, band keys --pair--> candidate pairs --shingle, measure--> similarities --> duplicates

The functions that do the work are those of :func:`pipelines.clustering.find_duplicates`, and so is the result. A text's
row is its place in the order of all ids, so nothing depends on how the texts are spread over files. Band keys stand
in a column a band: a unit of the job that pairs reads one band of all files, and nothing has to be regrouped. Shingle
sets are made for the texts that stand in some pair only, and mapped from a file when pairs are measured.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.clustering import DeduplicationConfig, cluster_duplicates
from pipelines.minhashing import sign_texts
from pipelines.pairing import Jaccards, find_equal_keys, hash_bands, list_candidate_pairs, unite_pairs, verify_pairs
from pipelines.running import EngineConfig, Unit, run_units
from pipelines.shingling import shingle_texts
from pipelines.words import Hashes, Indices
from pipelines.workspace import list_finished, read_columns, write_columns
from schemas.atomic import replace_atomically

PAIRS_PER_UNIT = 1 << 18
"""Pairs measured in one unit of work."""

SIGNED = pa.schema([("id", pa.string()), ("sequence_key", pa.uint64()), ("num_shingles", pa.int64())])
"""The columns of signed texts beside the signature and the keys of its bands."""

LEFT_OUT = b"num_left_out"
"""Entry of a file of pairs: how many more there are that share the band."""

STEPS = ("signed", "pairs", "sets", "measured")

ReadTexts = Callable[[Unit], pa.Table]
"""Reads the columns ``id`` and ``text`` of a unit; always the same rows in the same order. Picklable."""

ReadSigned = Callable[[Unit], pa.Table]
"""Reads the columns ``id``, ``signature``, ``sequence_key`` and ``num_shingles`` of texts of a unit that were signed
before; of others too, and in any order. Picklable."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Texts that are compared with one another.

    Attributes:
        root: folder of the work on them.
        units: their files or parts of files; each has its own target in the folder ``signed``, by order of names.
        read: reads a unit.
        config: how they are compared.
        engine: where the jobs run.
        known: reads the signatures that are stored already; None if there are none.
    """

    root: Path
    units: Sequence[Unit]
    read: ReadTexts
    config: DeduplicationConfig
    engine: EngineConfig
    known: ReadSigned | None = None

    def get_folder(self, step: str) -> Path:
        """Returns the folder of a step's files."""
        return self.root / step

    def list_files(self, step: str) -> list[Path]:
        """Returns the finished files of a step."""
        return list_finished(self.get_folder(step))


def plan_comparison(
    root: Path,
    sources: Sequence[tuple[Path, int]],
    read: ReadTexts,
    config: DeduplicationConfig,
    engine: EngineConfig,
    *,
    known: ReadSigned | None = None,
) -> Comparison:
    """Returns a comparison of the texts in (file, part of it), its folders made."""
    for step in STEPS:
        (root / step).mkdir(parents=True, exist_ok=True)
    units = [
        Unit(source=path, part=part, target=root / "signed" / f"{number:06d}.arrow")
        for number, (path, part) in enumerate(sources)
    ]
    return Comparison(root=root, units=units, read=read, config=config, engine=engine, known=known)


def _save(array: np.ndarray, path: Path) -> None:
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)  # np.save would not say that a disk is full


def _name_band(band: int) -> str:
    return f"band_{band:03d}"


# Texts -> signatures --------------------------------------------------------------------------------------------------


def _sign(texts: pa.Table, config: DeduplicationConfig) -> pa.Table:
    signed = sign_texts(texts["text"], config.num_words, config.num_permutations, config.seed)
    columns = {
        "id": texts["id"],
        "signature": pa.FixedSizeListArray.from_arrays(pa.array(signed.signatures.ravel()), config.num_permutations),
        "sequence_key": signed.sequence_keys,
        "num_shingles": signed.num_shingles,
    }
    return pa.table(columns)


def _sign_new(texts: pa.Table, known: pa.Table, config: DeduplicationConfig) -> pa.Table:
    """Returns the signed texts, in their order, of which some are known."""
    places = pc.index_in(texts["id"], value_set=known["id"].combine_chunks()).combine_chunks()
    is_new = pc.is_null(places).combine_chunks() if isinstance(places, pa.ChunkedArray) else pc.is_null(places)
    signed = _sign(texts.filter(is_new).combine_chunks(), config)
    taken = known.take(places.drop_null()).select(signed.column_names).cast(signed.schema)
    back = np.empty(len(texts), np.int64)
    order = np.argsort(is_new.to_numpy(zero_copy_only=False), kind="stable")  # the known ones first, then the new
    back[order] = np.arange(len(texts))
    return pa.concat_tables([taken, signed]).take(pa.array(back)).combine_chunks()


def _sign_unit(unit: Unit, read: ReadTexts, known: ReadSigned | None, config: DeduplicationConfig) -> None:
    texts = read(unit).combine_chunks()
    signed = _sign_new(texts, known(unit), config) if known else _sign(texts, config)
    values = signed["signature"].combine_chunks().flatten().to_numpy().reshape(-1, config.num_permutations)
    bands = hash_bands(values, config.num_bands)
    for band in range(config.num_bands):
        signed = signed.append_column(_name_band(band), pa.array(np.ascontiguousarray(bands[:, band])))
    write_columns([signed], signed.schema, unit.target, compression=None)


def sign_all(comparison: Comparison) -> None:
    """Computes the signature of every text that is not known, and the keys of the bands of all."""
    process = functools.partial(_sign_unit, read=comparison.read, known=comparison.known, config=comparison.config)
    run_units("sign", comparison.units, process, comparison.engine)


def read_signed(comparison: Comparison, columns: Sequence[str]) -> pa.Table:
    """Reads columns of :data:`SIGNED` of all texts in the order of the files."""
    nothing = pa.schema([SIGNED.field(name) for name in columns]).empty_table()
    return pa.concat_tables([nothing, *(read_columns(path, columns) for path in comparison.list_files("signed"))])


# Signatures -> candidate pairs ----------------------------------------------------------------------------------------


def _pair_band(unit: Unit, signed: Sequence[Path], rows_path: Path, max_bucket: int) -> None:
    parts = [read_columns(path, [_name_band(unit.part)]).column(0) for path in signed]
    keys = np.concatenate([np.empty(0, np.uint64), *(chunk.to_numpy() for part in parts for chunk in part.chunks)])
    rows = np.load(rows_path)
    compared = np.flatnonzero(rows >= 0)
    pairs, num_left_out = list_candidate_pairs(keys[compared], rows[compared], max_bucket)
    table = pa.table({"left": pairs[:, 0], "right": pairs[:, 1]}, metadata={LEFT_OUT: str(num_left_out)})
    write_columns([table], table.schema, unit.target, compression=None)


def pair_all(comparison: Comparison) -> None:
    """Finds the pairs of texts that share a band of their signatures; copies are left to their first."""
    signed = read_signed(comparison, ["id", "sequence_key", "num_shingles"])
    order = pc.sort_indices(signed["id"]).to_numpy().astype(np.int64)
    firsts = find_equal_keys(signed["sequence_key"].to_numpy()[order])
    is_compared = (firsts == np.arange(len(order))) & (signed["num_shingles"].to_numpy()[order] > 0)
    rows = np.empty(len(order), np.int64)
    rows[order] = np.where(is_compared, np.arange(len(order)), -1)
    _save(rows, comparison.root / "rows.npy")
    process = functools.partial(
        _pair_band,
        signed=comparison.list_files("signed"),
        rows_path=comparison.root / "rows.npy",
        max_bucket=comparison.config.max_bucket,
    )
    units = [
        Unit(source=comparison.root, part=band, target=comparison.get_folder("pairs") / f"{band:03d}.arrow")
        for band in range(comparison.config.num_bands)
    ]
    run_units("pair", units, process, comparison.engine)


# Candidate pairs -> exact similarities --------------------------------------------------------------------------------


def _shingle_unit(unit: Unit, read: ReadTexts, num_words: int, root: Path) -> None:
    rows = np.load(root / "rows.npy", mmap_mode="r")[unit.first_row :]
    rows = rows[: len(read_columns(root / "signed" / unit.target.name, ["sequence_key"]))]
    wanted = np.load(root / "wanted.npy", mmap_mode="r")
    places = np.minimum(np.searchsorted(wanted, rows), max(len(wanted) - 1, 0))
    chosen = np.flatnonzero(wanted[places] == rows) if len(wanted) else np.empty(0, np.int64)
    texts = read(unit)["text"].take(pa.array(chosen)).combine_chunks() if len(chosen) else pa.array([], pa.string())
    hashes, offsets = shingle_texts(texts, num_words)
    sets = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(hashes))
    table = pa.table({"row": np.asarray(rows[chosen]), "shingles": sets})
    write_columns([table], table.schema, unit.target, compression=None)


def shingle_all(comparison: Comparison) -> None:
    """Makes the shingle sets of the texts that stand in a candidate pair."""
    counts = [len(read_columns(path, ["sequence_key"])) for path in comparison.list_files("signed")]
    first_rows = np.cumsum([0, *counts]).tolist()
    units = [
        dataclasses.replace(unit, first_row=first_row, target=comparison.get_folder("sets") / unit.target.name)
        for unit, first_row in zip(comparison.units, first_rows[:-1], strict=True)
    ]
    process = functools.partial(
        _shingle_unit, read=comparison.read, num_words=comparison.config.num_words, root=comparison.root
    )
    run_units("shingle", units, process, comparison.engine)


def _join_sets(comparison: Comparison) -> None:
    """Joins the shingle sets of all units to one file that can be mapped."""
    rows, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    with replace_atomically(comparison.root / "sets.bin") as temporary, temporary.open("wb") as sink:
        for path in comparison.list_files("sets"):
            table = read_columns(path, ["row", "shingles"])
            rows.append(table["row"].to_numpy())
            for chunk in table["shingles"].chunks:
                sink.write(chunk.flatten().to_numpy().data)
                lengths.append(chunk.value_lengths().to_numpy())
        _save(np.concatenate(rows), comparison.root / "set_rows.npy")
        _save(np.append(0, np.cumsum(np.concatenate(lengths))), comparison.root / "set_offsets.npy")


def open_sets(root: Path) -> Callable[[Indices], Jaccards]:
    """Returns a function that measures pairs of rows by the joined shingle sets."""
    rows, offsets = np.load(root / "set_rows.npy"), np.load(root / "set_offsets.npy")
    size = (root / "sets.bin").stat().st_size
    hashes: Hashes = np.memmap(root / "sets.bin", np.uint64, mode="r") if size else np.empty(0, np.uint64)
    by_row = np.argsort(rows, kind="stable")

    def measure(pairs: Indices) -> Jaccards:
        return verify_pairs(by_row[np.searchsorted(rows, pairs, sorter=by_row)], hashes, offsets)

    return measure


def _measure_unit(unit: Unit) -> None:
    start = unit.part * PAIRS_PER_UNIT
    pairs = np.load(unit.source, mmap_mode="r")[start : start + PAIRS_PER_UNIT]
    _save(open_sets(unit.source.parent)(pairs), unit.target)


def measure_all(comparison: Comparison) -> int:
    """Measures every candidate pair exactly; returns the number of pairs that were left out as too many."""
    root, files = comparison.root, comparison.list_files("pairs")
    tables = [read_columns(path, ["left", "right"]) for path in files]
    found = [np.stack([table["left"].to_numpy(), table["right"].to_numpy()], axis=1) for table in tables]
    pairs = unite_pairs(found)
    if not (root / "sets.bin").exists():
        _save(pairs, root / "candidates.npy")
        _save(np.unique(pairs), root / "wanted.npy")
        shingle_all(comparison)
        _join_sets(comparison)
    units = [
        Unit(source=root / "candidates.npy", part=part, target=comparison.get_folder("measured") / f"{part:06d}.npy")
        for part in range(-(-len(pairs) // PAIRS_PER_UNIT))
    ]
    run_units("measure", units, _measure_unit, comparison.engine)
    return sum(int(table.schema.metadata[LEFT_OUT]) for table in tables)


# Similarities -> duplicates -------------------------------------------------------------------------------------------


def resolve_all(comparison: Comparison, prefer: Callable[[pa.Array], Indices]) -> pa.Table:
    """Joins the pairs above the threshold to clusters.

    Args:
        comparison: measured by :func:`measure_all`.
        prefer: returns for ids, ascending, the preference of each; the least of a cluster is kept.

    Returns:
        A table as :func:`pipelines.clustering.cluster_duplicates` makes it.
    """
    signed = read_signed(comparison, ["id", "sequence_key"])
    order = pc.sort_indices(signed["id"])
    ids = signed["id"].combine_chunks().take(order)
    firsts = find_equal_keys(signed["sequence_key"].to_numpy()[order.to_numpy()])
    jaccards = [np.load(path) for path in comparison.list_files("measured")]
    return cluster_duplicates(
        ids,
        prefer(ids),
        firsts,
        np.load(comparison.root / "candidates.npy"),
        np.concatenate([np.empty(0), *jaccards]),
        open_sets(comparison.root),
        comparison.config,
    )


def compare_all(comparison: Comparison, prefer: Callable[[pa.Array], Indices]) -> tuple[pa.Table, int]:
    """Runs all steps; returns the duplicates, see :func:`resolve_all`, and the number of pairs left out."""
    sign_all(comparison)
    pair_all(comparison)
    num_left_out = measure_all(comparison)
    return resolve_all(comparison, prefer), num_left_out
