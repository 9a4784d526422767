"""The stages of the flow beyond the plain build: run twice, with nothing left, decontaminated, scored, verified."""

import dataclasses
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from flows import stages
from flows.config import BuildConfig, apply_changes
from flows.workplace import lock_bank, open_workspace
from pipelines import assembling, encoding, jobs
from pipelines.formats import list_corpus_files
from pipelines.reusing import Base
from pipelines.running import LOOP_RUNNER
from pipelines.workspace import Workspace
from schemas.errors import CorpusError, InputError, NothingLeftError
from schemas.stores import LocalStore
from tests.corpora import make_documents, write_lines


def make_config(**changes: Any) -> BuildConfig:
    return apply_changes(BuildConfig(), {"engine": {"runner": LOOP_RUNNER}, **changes})


def begin(corpus: Path, folder: Path, config: BuildConfig) -> Workspace:
    work = Workspace(folder)
    work.create()
    stages.read(list_corpus_files([corpus]), work, config)
    return work


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "corpus.jsonl", make_documents())


def test_comparing_documents_again_gives_the_same_drops(corpus: Path, tmp_path: Path) -> None:
    config = make_config(document_deduplication={"enabled": True})
    work = begin(corpus, tmp_path / "work", config)
    stages.deduplicate_documents(work, config)
    drops = work.get_folder("drops") / jobs.DOCUMENT_DROPS
    first = drops.read_bytes()
    pairs = [{"copy", "topic/lambda"}, {"near-copy", "topic/with"}]
    assert [len(pair & set(pq.read_table(drops)["doc_id"].to_pylist())) for pair in pairs] == [1, 1]
    stages.deduplicate_documents(work, config)  # what a build that was stopped later does
    assert drops.read_bytes() == first
    stages.chunk(work, Base(), config)
    stages.gather(work, Base(), config)
    stages.deduplicate(work, Base(), config)


def test_references_may_be_left_as_they_are(corpus: Path, tmp_path: Path) -> None:
    config = make_config(deduplication={"enabled": False}, embedding={"embedder": "static"})
    work = begin(corpus, tmp_path / "work", config)
    stages.chunk(work, Base(), config)
    stages.gather(work, Base(), config)
    num_live, _ = stages.deduplicate(work, Base(), config)
    assert num_live == sum(pq.read_metadata(path).num_rows for path in work.list_files("references"))
    assert pq.read_metadata(work.duplicates_path).num_rows == 0
    assembling.begin_segment(work)
    counts = assembling.write_reference_tables(work, Base())
    assert counts["kept"] == num_live == counts["read"] - sum(counts["dropped"].values())


def test_an_empty_corpus_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    with pytest.raises(NothingLeftError, match="has no record"):
        begin(tmp_path / "empty.jsonl", tmp_path / "work", make_config())


def test_a_decontaminated_corpus_lacks_what_the_tests_ask_for(corpus: Path, tmp_path: Path) -> None:
    questions = write_lines(tmp_path / "questions.jsonl", [{"id": "q", "text": topics["assert"]}])
    config = make_config(decontamination={"paths": [str(questions)]})
    work = begin(corpus, tmp_path / "work", config)
    stages.chunk(work, Base(), config)
    stages.gather(work, Base(), config)
    stages.decontaminate(work, config)
    num_live, _ = stages.deduplicate(work, Base(), config)
    found = [row for path in work.list_files("contaminated") for row in pq.read_table(path).to_pylist()]
    assert len(found) >= 3
    assert {row["matched_doc_id"] for row in found} == {"q"}
    assert encoding.split_unwritten(work, Base(), 64) == num_live
    live = {ref_id for path in work.list_files("unwritten") for ref_id in pq.read_table(path)["ref_id"].to_pylist()}
    assert len(live) == num_live
    assert not live & {row["ref_id"] for row in found}

    rows = [row for row in make_documents() if row["text"].strip()]
    everything = make_config(
        decontamination={"paths": [str(write_lines(tmp_path / "all.jsonl", rows))], "threshold": 0.5}
    )
    work = begin(corpus, tmp_path / "all", everything)
    stages.chunk(work, Base(), everything)
    stages.gather(work, Base(), everything)
    stages.decontaminate(work, everything)
    with pytest.raises(NothingLeftError, match="every reference of the corpus is contaminated"):
        stages.deduplicate(work, Base(), everything)


def test_test_texts_that_cannot_be_read_are_refused(corpus: Path, tmp_path: Path) -> None:
    config = make_config(decontamination={"paths": [str(write_lines(tmp_path / "q.jsonl", [{"id": 1, "text": ""}]))]})
    work = begin(corpus, tmp_path / "work", config)
    stages.chunk(work, Base(), config)
    stages.gather(work, Base(), config)
    with pytest.raises(InputError, match="1 of 1 records"):
        stages.decontaminate(work, config)


@dataclasses.dataclass(frozen=True)
class LengthScorer:
    """Scores by length: a scorer without a model, for the stage around it."""

    scorer_id: str = "length"

    def score(self, texts: list[str]) -> np.ndarray:
        return np.array([0.7 if len(text) > 2000 else 0.1 for text in texts], np.float32)


def make_length_scorer() -> LengthScorer:
    return LengthScorer()


def test_scores_drop_what_is_below_and_keep_what_is_equal(corpus: Path, tmp_path: Path) -> None:
    config = make_config()
    work = begin(corpus, tmp_path / "work", config)
    jobs.score_documents(work, make_length_scorer, config.engine)
    jobs.drop_low_scores(work, 0.7, 1.0)
    drops = pq.read_table(work.get_folder("drops") / "quality.parquet").to_pylist()
    short = {row["id"] for row in make_documents() if row["text"].strip() and len(row["text"]) <= 2000}
    assert {row["doc_id"] for row in drops} == short
    assert {row["detail"] for row in drops} == {"quality score 0.1, the bound is 0.7"}
    assert {row["threshold"] for row in drops} == {0.7}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quality": {"threshold": 0.5}}, "must be given together"),
        ({"quality": {"model": "m", "threshold": float("nan")}}, "threshold is nan"),
        ({"quality": {"model": "m", "top_share": 1.5}}, "top_share is 1.5"),
        (
            {"deduplication": {"keep": "source", "source_priority": [1]}},
            r"source_priority\[0\] is 1, must be of type str",
        ),
        ({"chunking": {"title_prefix": True}}, "reading.title_column names no column"),
        ({"filtering": {"min_words": "many"}}, "must be of type"),
        ({"decontamination": {"threshold": 1}}, "threshold is 1.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_config(**changes)


def fail_in_workspace(bank: Path, error: CorpusError) -> None:
    store = LocalStore(bank)
    with lock_bank(store), open_workspace(store, "a" * 32) as work:
        (work.root / "records" / "x.parquet").write_bytes(b"x")
        raise error


def test_a_lost_object_store_keeps_the_workspace(tmp_path: Path) -> None:
    for error, is_kept in ((CorpusError("gone"), True), (NothingLeftError("nothing"), False)):
        with pytest.raises(CorpusError):
            fail_in_workspace(tmp_path / "bank", error)
        assert (tmp_path / "bank" / "work" / ("a" * 32)).exists() == is_kept
