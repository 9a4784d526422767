"""The clusters of near-duplicate references of a version, in figures and by examples.

    duplicates, occurrences --views (:mod:`pipelines.inspecting`)--> **clusters** --> ``memory3 report``

A cluster is a reference that is kept and those that were dropped for it. Examples are the largest clusters, each with
the member that is least like the kept one, since that is the one a threshold is judged by, and pairs drawn from all by
a seed.
"""

import dataclasses
from collections.abc import Sequence

from pipelines.inspecting import BankViews, run_query
from pipelines.surveying import Distribution, measure_doublings, measure_shares

NUM_LARGEST = 4
NUM_DRAWN = 6

NUM_JACCARD_BINS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuplicatePair:
    """A reference that was dropped, and the one that was kept for it.

    Attributes:
        kept_ref_id: the reference that stands for the cluster.
        ref_id: the dropped one.
        jaccard: exact similarity of the two, 0 to 1.
        cluster_size: references of the cluster, the kept one among them.
        kept_text: text of the kept one.
        text: text of the dropped one.
        kept_doc_id: the first document that the kept one stands in, empty if it stands in none.
        doc_id: the same of the dropped one.
    """

    kept_ref_id: str
    ref_id: str
    jaccard: float
    cluster_size: int
    kept_text: str
    text: str
    kept_doc_id: str
    doc_id: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterSurvey:
    """The near-duplicates of a version.

    Attributes:
        num_dropped: references that were dropped as near-duplicates.
        num_dropped_documents: documents that were, where documents were compared.
        sizes: references a cluster, the kept one among them; one is counted for each cluster.
        jaccard: similarity of each dropped reference to the kept one.
        largest: the largest clusters by their least similar members, the largest first.
        drawn: pairs drawn by the seed that are not among these, the least similar first.
    """

    num_dropped: int
    num_dropped_documents: int
    sizes: Distribution
    jaccard: Distribution
    largest: list[DuplicatePair]
    drawn: list[DuplicatePair]


def survey_clusters(views: BankViews, seed: int) -> ClusterSurvey:
    """Computes the figures of a version's near-duplicates and takes examples; equal seeds draw equal pairs.

    Raises:
        BankFormatError: a table is damaged.
    """
    counts = run_query(
        views,
        "select (select count(*) from duplicates) as num_dropped,"
        " (select count(*) from document_duplicates) as num_dropped_documents",
    ).to_pylist()[0]
    sizes = "(select count(*) + 1 as size from duplicates group by kept_ref_id)"
    # A digest as an order: the same for every release of the database, which its own sampling is not.
    drawn = f"""
        select kept_ref_id, ref_id, jaccard from duplicates order by md5(ref_id || ':{seed:d}'), ref_id
        limit {NUM_DRAWN}"""
    largest = f"""
        select kept_ref_id, arg_min(ref_id, (jaccard, ref_id)) as ref_id, min(jaccard) as jaccard
        from duplicates group by kept_ref_id order by count(*) desc, kept_ref_id limit {NUM_LARGEST}"""
    largest_pairs = _read_pairs(views, largest, "cluster_size desc, kept_ref_id")
    return ClusterSurvey(
        **counts,
        sizes=measure_doublings(views, "size", sizes),
        jaccard=measure_shares(views, "jaccard", "duplicates", num_bins=NUM_JACCARD_BINS),
        largest=largest_pairs,
        drawn=[pair for pair in _read_pairs(views, drawn, "jaccard, ref_id") if pair not in largest_pairs],
    )


def _read_pairs(views: BankViews, chosen: str, order: str) -> list[DuplicatePair]:
    """Adds to pairs that a query chooses their texts, documents and sizes."""
    sizes = "select kept_ref_id, count(*) + 1 as cluster_size from duplicates group by kept_ref_id"
    rows = run_query(
        views,
        f"with chosen as ({chosen}), sizes as ({sizes}) select * from chosen join sizes using (kept_ref_id)"
        f" order by {order}",
    ).to_pylist()
    ref_ids = sorted({row[name] for row in rows for name in ("kept_ref_id", "ref_id")})
    if not ref_ids:
        return []
    texts = views.bank.read_references(ref_ids, ["text"])
    text_of = dict(zip(texts["ref_id"].to_pylist(), texts["text"].to_pylist(), strict=True))
    document_of = _find_documents(views, ref_ids)
    return [
        DuplicatePair(
            **row,
            kept_text=text_of[row["kept_ref_id"]],
            text=text_of[row["ref_id"]],
            kept_doc_id=document_of.get(row["kept_ref_id"], ""),
            doc_id=document_of.get(row["ref_id"], ""),
        )
        for row in rows
    ]


def _find_documents(views: BankViews, ref_ids: Sequence[str]) -> dict[str, str]:
    """Returns the first document, by its id, that each of some references stands in; those in none are left out."""
    listed = ", ".join("'" + ref_id.replace("'", "''") + "'" for ref_id in ref_ids)
    if not listed:
        return {}
    rows = run_query(
        views, f"select ref_id, min(doc_id) as doc_id from occurrences where ref_id in ({listed}) group by ref_id"
    )
    return dict(zip(rows["ref_id"].to_pylist(), rows["doc_id"].to_pylist(), strict=True))
