"""The check before a build: whether the columns that were named are in the corpus.

    files (:mod:`pipelines.formats`) -> **check** -> reading (:mod:`pipelines.reading`)

A mistyped column would make every record a reject; here it is found from the heads of the files, before workers start.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.formats import (
    COMPRESSIONS,
    PARQUET,
    TEXT,
    UNKNOWN,
    CorpusFile,
    DamagedLineError,
    iterate_lines,
    open_file,
)
from pipelines.reading import BYTE_ORDER_MARK
from pipelines.records import ReadingConfig, name_json_type
from pipelines.row_groups import holds_text
from schemas.errors import CorpusError

logger = logging.getLogger(__name__)

PREFLIGHT_LINES = 1000


def check_corpus(files: Sequence[CorpusFile], config: ReadingConfig) -> None:
    """Checks before workers start that the named columns are there and that the text column holds strings.

    Looks at the schema of every Parquet file and at the first record of every file of lines. Empty and damaged files
    pass: reading rejects what is wrong with them. So it does with a file that does not fit beside others that do, of
    which a warning tells. An id, source or title column that was named by the user must be in some file.

    Raises:
        CorpusError: files lack the text column or have it as another type, and no file fits; no file has another
            column that was named; or a file cannot be opened.
    """
    seen: set[str] = set()
    misfits = []
    num_fitting = 0
    for file in files:
        if file.format == UNKNOWN:
            continue
        if file.format == TEXT:
            num_fitting += 1
            continue
        columns = _describe_parquet(file) if file.format == PARQUET else _describe_lines(file, config)
        if columns is None:
            continue
        seen |= columns.keys()
        misfit = _describe_misfit(file, columns, config)
        misfits += [misfit] if misfit else []
        num_fitting += not misfit
    if misfits and not num_fitting:
        raise CorpusError(f"{misfits[0]}; name another with --text-column")
    if misfits:
        logger.warning("%d of %d files do not fit, their records are rejects: %s", len(misfits), len(files), misfits[0])
    if seen:
        _check_named_columns(files, config, seen)


def _describe_misfit(file: CorpusFile, columns: dict[str, str], config: ReadingConfig) -> str:
    """Returns why the records of a file have no text, "" if they have."""
    kind = columns.get(config.text_column)
    if kind is None:
        return f"{file.path} has no column {config.text_column!r}; its columns are {_join_names(columns)}"
    return "" if kind == "string" else f"{file.path} has {kind} in column {config.text_column!r}, not text"


def _check_named_columns(files: Sequence[CorpusFile], config: ReadingConfig, seen: set[str]) -> None:
    """Refuses a column named by the user that no file has; looks further into the files before it does."""
    for option in ("id_column", "source_column", "title_column"):
        name = getattr(config, option)
        if name in seen or name == getattr(ReadingConfig, option):
            continue
        lines = (file for file in files if file.format in COMPRESSIONS)
        if not any(name in row for file in lines for row in _iterate_first_rows(file, config)):
            raise CorpusError(
                f"no file of the corpus has a column {name!r}; the columns are {_join_names(seen)}: "
                f"name one of them as {option}"
            )


def _join_names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _describe_parquet(file: CorpusFile) -> dict[str, str] | None:
    """Returns the columns with their types, ``string`` for all kinds of text; None if the file is damaged."""
    with open_file(file) as stream:
        try:
            schema = pq.read_schema(stream)
        except (pa.ArrowException, OSError):
            return None
    return {field.name: "string" if holds_text(field.type) else str(field.type) for field in schema}


def _describe_lines(file: CorpusFile, config: ReadingConfig) -> dict[str, str] | None:
    """Returns the columns of the first record with a text or without its column, with the types of the values."""
    for row in _iterate_first_rows(file, config):
        if row.get(config.text_column, "") is not None:
            return {name: name_json_type(value) for name, value in row.items()}
    return None


def _iterate_first_rows(file: CorpusFile, config: ReadingConfig) -> Iterator[dict[str, Any]]:
    """Yields the objects among the first lines of a file, as far as it is whole."""
    try:
        for number, line, _ in iterate_lines(file, config.max_document_bytes):
            if number > PREFLIGHT_LINES:
                return
            try:
                row = orjson.loads(bytes(line or b"").removeprefix(BYTE_ORDER_MARK))
            except orjson.JSONDecodeError:
                continue
            if isinstance(row, dict):
                yield row
    except DamagedLineError:
        return
