"""From corpus files to live references by the jobs: what holds for every corpus, however it is cut and ordered."""

import hashlib
import itertools
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.config import BuildConfig
from pipelines import assembling, comparing, documenting, encoding, jobs, referencing
from pipelines.clustering import DeduplicationConfig
from pipelines.filter_presets import FILTER_PRESETS
from pipelines.filtering import FilterConfig
from pipelines.formats import list_corpus_files
from pipelines.records import ReadingConfig
from pipelines.reusing import Base
from pipelines.running import LOOP_RUNNER, EngineConfig
from pipelines.workspace import Workspace
from schemas.tables import DUPLICATES, write_table
from tests.corpora import CHINESE, write_lines

LOOP = EngineConfig(runner=LOOP_RUNNER)
BEAM = EngineConfig(num_workers=2)


def run_jobs(
    corpus: Path,
    folder: Path,
    engine: EngineConfig = LOOP,
    reading: ReadingConfig | None = None,
    filters: FilterConfig | None = None,
    documents: DeduplicationConfig | None = None,
) -> Workspace:
    """Runs the jobs up to the live references, as the flow does, and writes the tables."""
    config = BuildConfig()
    work = Workspace(folder)
    work.create()
    files = list_corpus_files([corpus])
    jobs.read_corpus(files, work, reading or config.reading, filters or config.filtering, engine)
    jobs.drop_conflicts(work)
    if documents is not None:
        comparison = jobs.plan_documents(work, documents, engine)
        found, _ = comparing.compare_all(comparison, lambda ids: jobs.prefer_documents(work, documents, ids))
        jobs.drop_document_duplicates(work, found, documents.threshold)
    referencing.chunk_corpus(work, config.make_tokenizer_factory(), config.chunking, engine)
    documenting.write_document_tables(work, Base())
    referencing.gather_references(work, Base(), engine)
    comparison = referencing.plan_references(work, Base(), config.deduplication, engine)
    found, _ = comparing.compare_all(
        comparison, lambda ids: referencing.prefer_references(work, config.deduplication, ids)
    )
    write_table(found.rename_columns(DUPLICATES.names).cast(DUPLICATES), work.duplicates_path)
    return work


def read_live(work: Workspace) -> pa.Table:
    return pa.concat_tables([table.combine_chunks() for table in encoding.iterate_live(work)])


def hash_tables(work: Workspace) -> dict[str, str]:
    """Writes the tables that depend on texts alone, and hashes their bytes."""
    assembling.begin_segment(work)
    assembling.write_reference_tables(work, Base())
    names = ("references.parquet", "occurrences.parquet", "duplicates.parquet", "signatures.parquet")
    return {name: hashlib.sha256((work.get_folder("segment") / name).read_bytes()).hexdigest() for name in names}


PARAGRAPHS = sorted({part for text in topics.values() for part in text.split("\n\n") if 80 < len(part) < 600})[:120]

paragraph = st.one_of(
    st.sampled_from(PARAGRAPHS),
    st.text(max_size=300),
    st.sampled_from(
        [CHINESE[:200], "สวัสดีครับ " * 30, "مرحبا بالعالم. " * 20, "👩‍👩‍👧🇨🇭 " * 40, "\x00\x00 nul", "a\r\nb\r\n" * 30]
    ),
)
document_text = st.lists(paragraph, max_size=8).map("\n\n".join)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(document_text, min_size=1, max_size=6), order=st.randoms(use_true_random=False))
def test_references_account_for_every_character_and_record(texts: list[str], order: random.Random) -> None:
    rows: list[dict[str, Any]] = [{"id": f"d{number}", "text": text} for number, text in enumerate(texts)]
    rows += [{"id": "d0", "text": "taken"}] * bool(texts[0].strip()) + [{"no": "text"}]
    with tempfile.TemporaryDirectory() as name:
        work = run_jobs(write_lines(Path(name) / "in" / "a.jsonl", rows), Path(name) / "work")
        if not any(pq.read_metadata(path).num_rows for path in work.list_files("references")):
            return
        assembling.begin_segment(work)
        documents = documenting.write_document_tables(work, Base())
        references = assembling.write_reference_tables(work, Base())
        segment = work.get_folder("segment")
        assert documents["read"] == len(rows) == documents["kept"] + sum(documents["dropped"].values())
        assert references["read"] == references["kept"] + sum(references["dropped"].values())
        assert references["kept"] == len(read_live(work))
        stored = pq.read_table(segment / "references.parquet").to_pylist()
        by_id = {row["ref_id"]: row for row in stored}
        assert all(1 <= row["num_tokens"] == len(row["token_ids"]) <= 128 for row in stored)
        occurrences = pq.read_table(segment / "occurrences.parquet").to_pylist()
        kept = set(pq.read_table(segment / "documents.parquet")["doc_id"].to_pylist())
        for doc_id, group in itertools.groupby(occurrences, key=lambda row: row["doc_id"]):
            text = texts[int(doc_id[1:])]
            places = list(group)
            assert [place["ordinal"] for place in places] == list(range(len(places)))
            assert "".join(by_id[place["ref_id"]]["text"] for place in places) == text
            for place in places:
                part = by_id[place["ref_id"]]["text"]
                assert text[place["start_char"] : place["end_char"]] == part
                assert text.encode()[place["start_byte"] : place["end_byte"]].decode() == part
            kept.discard(doc_id)
        assert not kept

        before = read_live(work)
        number = order.randrange(len(texts))
        more = [*rows, {"id": "another", "text": texts[number]}]
        order.shuffle(more)
        # The copy, and another order of all records; a record whose id is taken goes where it was.
        more = [row for row in more if row.get("text") != "taken"]
        again = run_jobs(write_lines(Path(name) / "in2" / "b.jsonl", more), Path(name) / "again")
        assert read_live(again).equals(before)


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    """Topics, some of them several times with small changes, and texts in other scripts."""
    rows = [{"id": name, "text": text, "source": "topics"} for name, text in sorted(topics.items())[:50]]
    rows += [{**row, "id": row["id"] + "/near", "text": row["text"].replace(" the ", " a ", 2)} for row in rows[:12]]
    rows += [{**row, "id": row["id"] + "/copy", "source": "copies"} for row in rows[20:30]]
    return [*rows, {"id": "law", "text": CHINESE, "source": "laws"}]


def write_cut(rows: Sequence[dict[str, Any]], folder: Path, num_files: int, order: random.Random) -> Path:
    shuffled = order.sample(list(rows), len(rows))
    for number in range(num_files):
        write_lines(folder / f"{order.randrange(1 << 30)}-{number}.jsonl", shuffled[number::num_files])
    return folder


@pytest.mark.parametrize("with_documents", [False, True])
def test_the_same_bytes_whatever_the_files_the_order_and_the_engine(
    documents: list[dict[str, Any]], tmp_path: Path, with_documents: bool
) -> None:
    deduplication = DeduplicationConfig() if with_documents else None
    expected = None
    for number, (num_files, engine, batch_bytes) in enumerate(
        [(1, LOOP, 4 << 20), (7, BEAM, 20_000), (3, EngineConfig(num_workers=1), 100_000)]
    ):
        corpus = write_cut(documents, tmp_path / f"in-{number}", num_files, random.Random(number))
        reading = ReadingConfig(batch_text_bytes=batch_bytes)
        work = run_jobs(corpus, tmp_path / f"work-{number}", engine, reading, documents=deduplication)
        hashes = hash_tables(work)
        expected = expected or hashes
        assert hashes == expected
    assert pq.read_metadata(work.duplicates_path).num_rows > 5


def test_dropped_documents_say_what_they_match(documents: list[dict[str, Any]], tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "in.jsonl", documents)
    keep_copies = DeduplicationConfig(keep="source", source_priority=("copies", "*"))
    work = run_jobs(corpus, tmp_path / "work", documents=keep_copies)
    assembling.begin_segment(work)
    counts = documenting.write_document_tables(work, Base())
    segment = work.get_folder("segment")
    duplicates = {row["doc_id"]: row for row in pq.read_table(segment / "document_duplicates.parquet").to_pylist()}
    rejects = pq.read_table(segment / "rejects.parquet")
    dropped = rejects.filter(pc.equal(rejects["reason"], jobs.NEAR_DUPLICATE_DOCUMENT)).to_pylist()
    assert {row["doc_id"] for row in dropped} == set(duplicates)
    assert counts["dropped"] == {jobs.NEAR_DUPLICATE_DOCUMENT: len(duplicates)}
    copied = {row["id"].removesuffix("/copy"): row["id"] for row in documents if row["id"].endswith("/copy")}
    assert len(copied) == 10
    assert all(duplicates[name]["kept_doc_id"] == copy for name, copy in copied.items())
    assert all(row["value"] >= row["threshold"] == 0.8 and "similarity" in row["detail"] for row in dropped)


def test_filters_leave_their_reason_rule_and_value(documents: list[dict[str, Any]], tmp_path: Path) -> None:
    short = {"id": "short", "text": "Too few words.", "source": "x"}
    corpus = write_lines(tmp_path / "in.jsonl", [*documents, short])
    work = run_jobs(corpus, tmp_path / "work", filters=FILTER_PRESETS["paper"]())
    assembling.begin_segment(work)
    counts = documenting.write_document_tables(work, Base())
    assert counts["read"] == len(documents) + 1 == counts["kept"] + sum(counts["dropped"].values())
    rejects = pq.read_table(work.get_folder("segment") / "rejects.parquet").to_pylist()
    (row,) = [row for row in rejects if row["doc_id"] == "short"]
    assert (row["value"], row["threshold"]) == (3, 50)


def test_a_reader_that_was_stopped_goes_on_inside_a_file(
    documents: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "PART_BYTES", 50_000)
    corpus = write_lines(tmp_path / "in.jsonl", documents)
    reading = ReadingConfig(batch_text_bytes=10_000)
    fresh = run_jobs(corpus, tmp_path / "fresh", reading=reading)
    files = fresh.list_files("records")
    assert len(files) > 3
    for num_left in range(len(files)):
        work = Workspace(tmp_path / f"work-{num_left}")
        work.create()
        for path in files[:num_left]:
            (work.get_folder("records") / path.name).write_bytes(path.read_bytes())
        config = BuildConfig()
        jobs.read_corpus(list_corpus_files([corpus]), work, reading, config.filtering, LOOP)
        assert [path.read_bytes() for path in work.list_files("records")] == [path.read_bytes() for path in files]
