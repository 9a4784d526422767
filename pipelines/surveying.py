"""What a version of a bank consists of, in figures: counts, distributions, sources, metadata, by SQL over its tables.

    tables of a version --views (:mod:`pipelines.inspecting`)--> **figures** --> ``memory3 report``

Every figure is one query whose result is small, so that a bank of millions of references is surveyed in seconds and no
row of it is held in Python. Near-duplicates have their own figures in :mod:`pipelines.duplicate_clusters`.
"""

import dataclasses
import math
import re

from pipelines.inspecting import BankViews, run_query

TOKENS_PER_BIN = 8

MAX_GROUPS = 12
"""Sources, or values of a metadata column, that are told one by one."""

MAX_METADATA_COLUMNS = 8

MAX_VALUE_CHARS = 80
"""Beginning of a text in the metadata by which it is told from others."""

NUM_VALUE_BINS = 10

FAVOURITE_COLUMN = re.compile("lang|quality|score|licen[cs]e", re.IGNORECASE)
"""Metadata that people look for first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bin:
    """A bar of a distribution.

    Attributes:
        label: the values that are counted, such as ``9-16``.
        count: how many there are.
    """

    label: str
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distribution:
    """How a number is distributed.

    Attributes:
        bins: counts in ascending order of the values, without a gap; empty if nothing was counted.
        least: the least value, None if nothing was counted, as are the others then.
        median: half of all are at most this.
        p95: nineteen of twenty are at most this.
        most: the greatest value.
        mean: the mean.
    """

    bins: list[Bin]
    least: float | None
    median: float | None
    p95: float | None
    most: float | None
    mean: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredReferences:
    """Every stored reference counted once.

    Attributes:
        live: those that can be retrieved.
        near_duplicate: those that another stands for.
        contaminated: those that give away a test text.
        deleted: those that stand in no document of the version any more.
    """

    live: int
    near_duplicate: int
    contaminated: int
    deleted: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RejectReason:
    """Records of the corpus that were dropped for one reason.

    Attributes:
        reason: its name.
        count: records.
        path: the corpus file of the first of them.
        position: its line or row there, from 1.
        detail: what was said of it.
        least: the least value that decided, None where none did.
        median: the median of these values.
        most: the greatest.
        threshold: the bound they were compared with, None where there was none or they had several.
    """

    reason: str
    count: int
    path: str
    position: int
    detail: str
    least: float | None
    median: float | None
    most: float | None
    threshold: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A source of documents.

    Attributes:
        name: what the corpus calls it.
        num_documents: documents of it.
        num_references: references in them, with repetitions.
        num_chars: characters of them.
    """

    name: str
    num_documents: int
    num_references: int
    num_chars: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetadataColumn:
    """A column that the corpus has beside the text.

    Attributes:
        name: its name.
        num_documents: documents that have it.
        num_values: different values.
        distribution: of its values where all are numbers, else None.
        values: its most frequent values otherwise, and how many documents have them; empty where no value repeats.
    """

    name: str
    num_documents: int
    num_values: int
    distribution: Distribution | None
    values: list[Bin]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
    """What a version consists of.

    Attributes:
        stored: its stored references.
        rejects: the records it dropped, by reason, the most frequent first.
        tokens: tokens of a live reference.
        references_a_document: references a document, with repetitions.
        document_chars: characters of a document.
        sources: the largest sources, the largest first.
        num_sources: all sources.
        other_sources: what the sources that are not listed have together, None if all are listed.
        metadata: columns of the corpus, those that people look for first and then the most frequent.
        num_metadata_columns: all columns.
    """

    stored: StoredReferences
    rejects: list[RejectReason]
    tokens: Distribution
    references_a_document: Distribution
    document_chars: Distribution
    sources: list[Source]
    num_sources: int
    other_sources: Source | None
    metadata: list[MetadataColumn]
    num_metadata_columns: int


def survey_version(views: BankViews) -> Survey:
    """Computes all figures of a version but those of near-duplicates.

    Raises:
        BankFormatError: a table is damaged.
    """
    sources, num_sources, others = _read_sources(views)
    columns = _list_metadata_columns(views)
    return Survey(
        stored=count_stored(views),
        rejects=_read_reject_reasons(views),
        tokens=measure_steps(views, "num_tokens", "references", step=TOKENS_PER_BIN),
        references_a_document=measure_doublings(views, "num_references", "documents"),
        document_chars=measure_doublings(views, "num_chars", "documents"),
        sources=sources,
        num_sources=num_sources,
        other_sources=others,
        metadata=[_survey_column(views, *column) for column in columns[:MAX_METADATA_COLUMNS]],
        num_metadata_columns=len(columns),
    )


def count_stored(views: BankViews) -> StoredReferences:
    """Counts the stored references by what became of them."""
    sql = """
        select count(*) filter (is_live) as live, count(*) filter (is_deleted) as deleted,
               count(*) filter (not is_live and not is_deleted and kept_ref_id <> ref_id) as near_duplicate,
               count(*) filter (not is_live and not is_deleted and kept_ref_id = ref_id) as contaminated
        from all_references"""
    return StoredReferences(**run_query(views, sql).to_pylist()[0])


def measure_steps(views: BankViews, value: str, table: str, *, step: int) -> Distribution:
    """Returns the distribution of whole numbers from 1 in bins of equal width."""
    rows = run_query(views, f"select ({value} - 1) // {step} as bin, count(*) as num from {table} group by bin")
    counts = dict(zip(rows["bin"].to_pylist(), rows["num"].to_pylist(), strict=True))
    bins = [
        Bin(label=f"{step * place + 1}-{step * (place + 1)}", count=counts.get(place, 0))
        for place in range(max(counts, default=-1) + 1)
    ]
    return _summarize(views, value, table, bins)


def measure_doublings(views: BankViews, value: str, table: str) -> Distribution:
    """Returns the distribution of whole numbers from 0 in bins that double: 0, 1, 2, 3-4, 5-8, 9-16 and so on."""
    # The length of x - 1 in binary digits is the logarithm of x, rounded up, exactly.
    place = f"case when {value} < 1 then -1 when {value} = 1 then 0 else length(bin({value} - 1)) end"
    rows = run_query(views, f"select {place} as bin, count(*) as num from {table} group by bin")
    counts = dict(zip(rows["bin"].to_pylist(), rows["num"].to_pylist(), strict=True))
    if not counts:
        return _summarize(views, value, table, [])
    bins = [
        Bin(label=_name_doubling(place), count=counts.get(place, 0)) for place in range(min(counts), max(counts) + 1)
    ]
    return _summarize(views, value, table, bins)


def _name_doubling(place: int) -> str:
    if place < 2:
        return ("0", "1", "2")[place + 1]
    return f"{2 ** (place - 1) + 1:,}-{2**place:,}"


def measure_shares(views: BankViews, value: str, table: str, *, num_bins: int) -> Distribution:
    """Returns the distribution of numbers from 0 to 1 in bins of equal width, the last of which holds 1 too."""
    place = f"least({num_bins - 1}, floor(round({value} * {num_bins}, 9)))::integer"
    rows = run_query(views, f"select {place} as bin, count(*) as num from {table} group by bin")
    counts = dict(zip(rows["bin"].to_pylist(), rows["num"].to_pylist(), strict=True))
    bins = [
        Bin(label=f"{place / num_bins:.2f}-{(place + 1) / num_bins:.2f}", count=counts.get(place, 0))
        for place in range(min(counts, default=0), num_bins if counts else 0)
    ]
    return _summarize(views, value, table, bins)


def _summarize(views: BankViews, value: str, table: str, bins: list[Bin]) -> Distribution:
    sql = f"""
        select min({value}) as least, quantile_disc({value}, 0.5) as median, quantile_disc({value}, 0.95) as p95,
               max({value}) as most, avg({value}) as mean
        from {table}"""
    return Distribution(bins=bins, **run_query(views, sql).to_pylist()[0])


def _read_reject_reasons(views: BankViews) -> list[RejectReason]:
    sql = f"""
        with first as (
            select distinct on (reason) reason, path, position, left(detail, {4 * MAX_VALUE_CHARS}) as detail
            from rejects order by reason, path, position
        ), counted as (
            select reason, count(*) as count, min(value) as least, quantile_disc(value, 0.5) as median,
                   max(value) as most,
                   case when min(threshold) = max(threshold) then min(threshold) end as threshold
            from rejects group by reason
        )
        select * from counted join first using (reason) order by count desc, reason"""
    return [RejectReason(**row) for row in run_query(views, sql).to_pylist()]


def _read_sources(views: BankViews) -> tuple[list[Source], int, Source | None]:
    """Returns the largest sources, the number of all, and what those that are not listed have together."""
    sums = "sum(num_references)::bigint as num_references, sum(num_chars)::bigint as num_chars"
    sql = f"""
        select source as name, count(*) as num_documents, {sums}
        from documents group by source order by num_documents desc, name limit {MAX_GROUPS}"""
    sources = [Source(**row) for row in run_query(views, sql).to_pylist()]
    sql = f"select count(distinct source) as num_sources, count(*) as num_documents, {sums} from documents"
    total = run_query(views, sql).to_pylist()[0]
    num_others = total.pop("num_sources") - len(sources)
    if not num_others:
        return sources, len(sources), None
    left = {name: number - sum(getattr(source, name) for source in sources) for name, number in total.items()}
    return sources, len(sources) + num_others, Source(name=f"{num_others:,} others", **left)


def _list_metadata_columns(views: BankViews) -> list[tuple[str, int]]:
    """Returns the columns of the metadata with the number of documents that have them."""
    sql = """
        select name, count(*) as num_documents
        from (select unnest(json_keys(metadata)) as name from documents)
        group by name order by num_documents desc, name"""
    rows = run_query(views, sql).to_pylist()
    rows.sort(key=lambda row: FAVOURITE_COLUMN.search(row["name"]) is None)
    return [(row["name"], row["num_documents"]) for row in rows]


def _survey_column(views: BankViews, name: str, num_documents: int) -> MetadataColumn:
    pointer = "/" + name.replace("~", "~0").replace("/", "~1")
    quoted = pointer.replace("'", "''")
    text = f"json_extract_string(metadata, '{quoted}')"
    values = f"(select {text} as text, json_type(metadata, '{quoted}') as kind from documents) where text is not null"
    sql = f"""
        select count(distinct text) as num_values, bool_and(kind in ('BIGINT', 'UBIGINT', 'DOUBLE')) as is_number
        from {values}"""
    found = run_query(views, sql).to_pylist()[0]
    distribution, groups = None, []
    if found["is_number"]:
        numbers = f"(select text::double as number from {values} and isfinite(text::double))"
        distribution = _measure_range(views, "number", numbers)
    elif found["num_values"] < num_documents:
        sql = f"""
            select left(text, {MAX_VALUE_CHARS}) as label, count(*) as count
            from {values} group by label order by count desc, label limit {MAX_GROUPS}"""
        groups = [Bin(**row) for row in run_query(views, sql).to_pylist()]
    return MetadataColumn(
        name=name,
        num_documents=num_documents,
        num_values=found["num_values"],
        distribution=distribution,
        values=groups,
    )


def _measure_range(views: BankViews, value: str, table: str) -> Distribution:
    """Returns the distribution of any numbers, in bins of equal width from the least to the greatest."""
    summary = _summarize(views, value, table, [])
    least, most = summary.least, summary.most
    if least is None or most is None or least == most or not math.isfinite(most - least):
        return summary
    width = (most - least) / NUM_VALUE_BINS
    place = f"least({NUM_VALUE_BINS - 1}, floor(({value} - {least!r}::double) / {width!r}::double))::integer"
    rows = run_query(views, f"select {place} as bin, count(*) as num from {table} group by bin")
    counts = dict(zip(rows["bin"].to_pylist(), rows["num"].to_pylist(), strict=True))
    bins = [
        Bin(label=f"{least + width * place:.4g} to {least + width * (place + 1):.4g}", count=counts.get(place, 0))
        for place in range(NUM_VALUE_BINS)
    ]
    return dataclasses.replace(summary, bins=bins)
