"""memory3 report: figures counted again from the Parquet files, and a page that nothing in a corpus can break."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.bench_codecs import bench_codecs
from flows.building import build, update
from flows.cli import main
from flows.config import BuildConfig, apply_changes
from flows.deleting import delete_documents
from flows.history import roll_back
from flows.progress import SilentDisplay, set_display
from flows.reporting.contents import CodecError, Report, Skipped
from flows.reporting.making import ReportRequest, make_report
from flows.reporting.page import format_number, format_percent, render_page
from flows.steps import Steps
from flows.verifying import verify_bank
from pipelines.duplicate_clusters import ClusterSurvey
from pipelines.running import LOOP_RUNNER
from pipelines.surveying import Distribution, Survey
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.stores import LocalStore
from tests.browser import CHROMIUM, Browser
from tests.corpora import make_documents

ENGINE = {"runner": LOOP_RUNNER}

ROOT = Path(__file__).parents[1]

RunCommand = Callable[..., tuple[int, str, str]]

SCRIPT = "<script>document.title='taken'</script><img src=http://evil.example/x onerror=alert(1)>"

HEBREW = "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון. "

REPEATED = "The storage layer keeps every table in its own file and writes the manifest of a version last of all. "


def make_corpus() -> list[dict[str, Any]]:
    """The small corpus of the tests, and documents that attack whoever shows them."""
    documents = [{**row, "language": "en", "score": number / 4} for number, row in enumerate(make_documents())]
    hostile = f"{SCRIPT} </style></title> {{{{ 7 * 7 }}}} &lt;b&gt; \u202etxet\u0007\u0000\u009b\ufffe "
    text = hostile + 3 * REPEATED
    documents.append({"id": f"doc {SCRIPT}", "source": f"from {SCRIPT}", "text": f"One {text}", "language": SCRIPT})
    documents.append({"id": "near the hostile", "source": "near", "text": f"Two {text}", "a/~'\"b": 1})
    documents.append({"id": "hebrew", "source": "right to left", "text": 6 * HEBREW, "language": "he"})
    documents.append({"id": "long line", "source": "long", "text": "0123456789 abcdefghij " * 47_700})
    return documents


def write_corpus(path: Path, documents: list[dict[str, Any]]) -> Path:
    lines = [json.dumps(document).encode() for document in documents]
    lines += [b'{"id": "half a pair", "text": "\\ud800 is half of a pair"}', b'{"id": "broken", "text": "\xff\xfe"}']
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of hostile texts that was built, updated, had a document deleted, and was rolled back."""
    folder = tmp_path_factory.mktemp("report")
    documents = make_corpus()
    assert len(documents[-1]["text"]) > 1_000_000
    corpus = write_corpus(folder / "corpus.jsonl", documents)
    store = LocalStore(folder / "bank")
    config = apply_changes(BuildConfig(), {"engine": ENGINE, "memory": {"cold": True}})
    build(store, [str(corpus)], config, Steps())
    documents[0]["text"] += f"\nA sentence that nobody has written before. {SCRIPT}"
    write_corpus(corpus, [*documents[:4], *documents[5:]])
    update(store, None, ENGINE, Steps())
    delete_documents(store, ["topic/import"])
    roll_back(store, 2)
    return folder


@pytest.fixture(scope="module")
def bank(folder: Path) -> Bank:
    return Bank.open(folder / "bank", 2)


@pytest.fixture(scope="module")
def report(bank: Bank) -> Report:
    return make_report(bank, ReportRequest(num_samples=20))


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return render_page(report)


def read_rows(bank: Bank, kind: str) -> list[dict[str, Any]]:
    return [row for path in bank.locate_all(kind) for row in pq.read_table(path).to_pylist()]


def find_live(bank: Bank) -> set[str]:
    dropped = {row["ref_id"] for kind in ("duplicates", "tombstones", "contaminated") for row in read_rows(bank, kind)}
    return {row["ref_id"] for row in read_rows(bank, "references")} - dropped


def get_survey(report: Report) -> Survey:
    assert isinstance(report.survey, Survey)
    return report.survey


def get_clusters(report: Report) -> ClusterSurvey:
    assert isinstance(report.clusters, ClusterSurvey)
    return report.clusters


def count_within(values: list[float], label: str) -> int:
    """Counts whole numbers in a bin as its label says it."""
    ends = [int(end.replace(",", "")) for end in label.split("-")]
    return sum(ends[0] <= value <= ends[-1] for value in values)


def check_whole_numbers(distribution: Distribution, values: list[float]) -> None:
    assert [bin.count for bin in distribution.bins] == [count_within(values, bin.label) for bin in distribution.bins]
    assert sum(bin.count for bin in distribution.bins) == len(values) > 0
    ordered = sorted(values)
    assert (distribution.least, distribution.most) == (ordered[0], ordered[-1])
    assert distribution.median == ordered[math.ceil(0.5 * len(values)) - 1]
    assert distribution.p95 == ordered[math.ceil(0.95 * len(values)) - 1]
    assert distribution.mean == pytest.approx(sum(values) / len(values))


# Figures.


def test_counts_add_up(bank: Bank, report: Report) -> None:
    documents, references = report.tallies
    assert documents.kept == len(read_rows(bank, "documents"))
    assert references.kept == len(find_live(bank))
    assert {reason.label: reason.count for reason in documents.dropped} == Counter(
        row["reason"] for row in read_rows(bank, "rejects")
    )
    for tally in report.tallies:
        assert tally.read == tally.kept + tally.num_dropped
        assert tally.num_dropped > 0


def test_stored_references_are_counted_by_what_became_of_them(bank: Bank, report: Report) -> None:
    stored = get_survey(report).stored
    assert stored.live == len(find_live(bank))
    assert stored.near_duplicate == len(read_rows(bank, "duplicates")) > 0
    assert stored.deleted == len(read_rows(bank, "tombstones")) > 0
    assert stored.contaminated == 0
    assert sum(dataclasses.astuple(stored)) == len(read_rows(bank, "references"))


def test_lengths_are_those_of_the_files(bank: Bank, report: Report) -> None:
    survey, live, documents = get_survey(report), find_live(bank), read_rows(bank, "documents")
    tokens = [row["num_tokens"] for row in read_rows(bank, "references") if row["ref_id"] in live]
    check_whole_numbers(survey.tokens, tokens)
    check_whole_numbers(survey.document_chars, [row["num_chars"] for row in documents])
    places = Counter(row["doc_id"] for row in read_rows(bank, "occurrences"))
    check_whole_numbers(survey.references_a_document, [places[row["doc_id"]] for row in documents])


def test_sources_are_those_of_the_files(bank: Bank, report: Report) -> None:
    survey, documents = get_survey(report), read_rows(bank, "documents")
    counts = Counter(row["source"] for row in documents)
    assert survey.num_sources == len(counts)
    assert {source.name: source.num_documents for source in survey.sources} == counts
    assert survey.other_sources is None
    for source in survey.sources:
        mine = [row for row in documents if row["source"] == source.name]
        assert source.num_chars == sum(row["num_chars"] for row in mine)
        assert source.num_references == sum(row["num_references"] for row in mine)


def test_metadata_is_that_of_the_files(bank: Bank, report: Report) -> None:
    survey = get_survey(report)
    rows = [json.loads(row["metadata"]) for row in read_rows(bank, "documents")]
    assert {column.name: column.num_documents for column in survey.metadata} == Counter(
        name for row in rows for name in row
    )
    columns = {column.name: column for column in survey.metadata}
    assert {bin.label: bin.count for bin in columns["language"].values} == Counter(
        row["language"][:80] for row in rows if "language" in row
    )
    scores = [row["score"] for row in rows if "score" in row]
    found = columns["score"].distribution
    assert found is not None
    assert (found.least, found.most) == (min(scores), max(scores))
    assert sum(bin.count for bin in found.bins) == len(scores)
    width = (max(scores) - min(scores)) / len(found.bins)
    places = Counter(min(len(found.bins) - 1, int((score - min(scores)) / width)) for score in scores)
    assert [bin.count for bin in found.bins] == [places[place] for place in range(len(found.bins))]


def test_rejects_have_their_first_example(bank: Bank, report: Report) -> None:
    rows = read_rows(bank, "rejects")
    found = {reject.reason: reject for reject in get_survey(report).rejects}
    assert found.keys() == {row["reason"] for row in rows}
    for reason, reject in found.items():
        first = min((row for row in rows if row["reason"] == reason), key=lambda row: (row["path"], row["position"]))
        assert (reject.path, reject.position) == (first["path"], first["position"])


def test_clusters_are_those_of_the_files(bank: Bank, report: Report) -> None:
    clusters, rows = get_clusters(report), read_rows(bank, "duplicates")
    sizes = {kept: count + 1 for kept, count in Counter(row["kept_ref_id"] for row in rows).items()}
    check_whole_numbers(clusters.sizes, list(sizes.values()))
    assert clusters.num_dropped == len(rows)
    texts = {row["ref_id"]: row["text"] for row in read_rows(bank, "references")}
    jaccards = {row["ref_id"]: row["jaccard"] for row in rows}
    for bin in clusters.jaccard.bins:
        low, high = map(float, bin.label.split("-"))
        assert bin.count == sum(low <= value < high or value == high == 1 for value in jaccards.values())
    assert clusters.largest
    for pair in [*clusters.largest, *clusters.drawn]:
        assert (pair.kept_text, pair.text) == (texts[pair.kept_ref_id], texts[pair.ref_id])
        assert pair.jaccard == jaccards[pair.ref_id]
        assert pair.cluster_size == sizes[pair.kept_ref_id]
        for ref_id, doc_id in ((pair.kept_ref_id, pair.kept_doc_id), (pair.ref_id, pair.doc_id)):
            assert doc_id == min(row["doc_id"] for row in read_rows(bank, "occurrences") if row["ref_id"] == ref_id)
    assert clusters.largest[0].cluster_size == max(sizes.values())
    shown = {pair.ref_id for pair in clusters.largest}
    assert not shown & {pair.ref_id for pair in clusters.drawn}


def test_bytes_are_those_on_disk(bank: Bank, report: Report) -> None:
    for part in report.storage.parts:
        assert part.size_bytes == sum(path.stat().st_size for path in bank.locate_all(part.kind))
    assert report.storage.size_bytes == sum(file.size_bytes for file in bank.manifest.files)
    parent = {file.path for file in Bank.open(bank.store, 1).manifest.files}
    assert report.storage.new_size_bytes == sum(f.size_bytes for f in bank.manifest.files if f.path not in parent) > 0


def test_changes_are_those_of_two_versions(bank: Bank, report: Report) -> None:
    assert not isinstance(report.changes, Skipped)
    before = Bank.open(bank.store, 1)
    hashes = [{row["doc_id"]: row["content_hash"] for row in read_rows(one, "documents")} for one in (before, bank)]
    common = hashes[0].keys() & hashes[1].keys()
    expected = {
        "added": hashes[1].keys() - hashes[0].keys(),
        "changed": {doc_id for doc_id in common if hashes[0][doc_id] != hashes[1][doc_id]},
        "removed": hashes[0].keys() - hashes[1].keys(),
    }
    assert {change.what: set(change.doc_ids) for change in report.changes.documents} == expected
    assert expected["changed"]
    assert expected["removed"]
    came, went = find_live(bank) - find_live(before), find_live(before) - find_live(bank)
    assert (report.changes.num_references_added, report.changes.num_references_removed) == (len(came), len(went))
    assert {sample.ref_id for sample in report.changes.references_added} <= came
    assert {sample.ref_id for sample in report.changes.references_removed} <= went
    assert all(sample.text and sample.doc_id for sample in report.changes.references_removed)


def test_stages_have_the_rates_of_the_run(bank: Bank, report: Report) -> None:
    assert {stage.name: stage.seconds for stage in report.stages} == bank.manifest.seconds
    items = {stage.name: stage.num_items for stage in report.stages}
    assert items["read"] == report.tallies[0].read
    assert items["chunk"] == 1
    assert [stage.name for stage in report.stages][:3] == ["models", "read", "chunk"]


def test_the_error_of_the_codec_is_that_of_the_benchmark(bank: Bank, report: Report) -> None:
    assert isinstance(report.codec, CodecError)
    bench = bench_codecs(bank, "memory3-tiny", ["int8"], num_references=report.codec.num_references, num_rounds=1)
    assert report.codec.num_references == min(20, len(find_live(bank)) // 5)
    assert 100 * report.codec.attention_error == pytest.approx(bench.rows[0].value, rel=1e-4)
    assert 0.0005 < report.codec.attention_error < 0.02
    assert f"{report.codec.key_snr_db:.1f} and {report.codec.value_snr_db:.1f} dB" in bench.rows[0].note
    # 32 numbers of two bytes, or a byte each and a scale of two.
    assert (report.codec.key_bytes, report.codec.factor) == (34, 64 / 34)


def test_equal_seeds_give_equal_reports(bank: Bank, report: Report) -> None:
    again = make_report(bank, ReportRequest(num_samples=0))
    assert (again.survey, again.clusters, again.changes) == (report.survey, report.clusters, report.changes)


def test_a_first_version_and_a_rollback_have_less_to_say(folder: Path) -> None:
    first = make_report(Bank.open(folder / "bank", 1), ReportRequest(num_samples=0))
    assert first.changes == Skipped(skipped="it is the first version, all of it is new")
    back = make_report(Bank.open(folder / "bank"), ReportRequest(num_samples=0))
    assert back.stages == []
    assert "no stage was timed" in render_page(back)
    assert not isinstance(back.changes, Skipped)
    assert back.changes.documents[0].doc_ids == ["topic/import"]


# The page.


class Page(HTMLParser):
    """Parses strictly: every element is closed in order; keeps elements, attributes and text."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.stack[-1] if self.stack else "", data))


@pytest.fixture(scope="module")
def parsed(page: str) -> Page:
    return Page(page)


def test_the_page_is_well_formed_and_has_all_sections(parsed: Page) -> None:
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    sections = [attributes["aria-labelledby"] for tag, attributes in parsed.elements if tag == "section"]
    assert sections == ["version", "counts", "distributions", "duplicates", "bytes", "losses", "timings", "changes"]
    assert set(sections) <= set(ids)
    targets = {attributes["href"] for tag, attributes in parsed.elements if tag == "a"}
    assert targets == {f"#{section}" for section in sections}


def test_nothing_of_the_corpus_becomes_markup(parsed: Page, page: str) -> None:
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "input", "base"}
    assert not any(name.startswith("on") for _, attributes in parsed.elements for name in attributes)
    text = "".join(data for tag, data in parsed.texts if tag != "style")
    assert text.count(SCRIPT) >= 3  # a source, a value of the metadata, the texts of a pair
    assert "{{ 7 * 7 }}" in text
    assert "&lt;b&gt;" in text
    assert "[U+202E]txet␇␀�" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]", page)
    assert page.encode().decode() == page


def test_the_page_names_nothing_outside_itself(parsed: Page) -> None:
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "formaction"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,", (tag, value)
        assert "style" not in attributes
    style = "".join(data for tag, data in parsed.texts if tag == "style")
    assert style
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for t, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")


def test_the_page_can_be_read_without_seeing_it(parsed: Page) -> None:
    elements = parsed.elements
    assert ("html", {"lang": "en"}) in elements
    assert [tag for tag, _ in elements].count("h1") == 1
    levels = [int(tag[1]) for tag, _ in elements if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    num_tables = sum(tag == "table" for tag, _ in elements)
    assert num_tables == sum(tag == "caption" for tag, _ in elements) > 5
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in elements if tag == "th")
    ids = {attributes.get("id") for _, attributes in elements}
    for tag, attributes in elements:
        if tag == "svg" and attributes.get("role") == "img":
            assert set(str(attributes["aria-labelledby"]).split()) <= ids
        elif tag == "svg":
            assert attributes["aria-hidden"] == "true"


def test_the_page_shows_the_figures(report: Report, parsed: Page) -> None:
    text = "".join(data for _, data in parsed.texts)
    survey = get_survey(report)
    for bin in survey.tokens.bins:
        assert f"{bin.label}: {bin.count:,} references" in text
    assert f"{report.tallies[1].kept:,}" in text
    assert get_clusters(report).largest[0].kept_ref_id in text


def test_the_page_is_small_and_long_texts_are_cut(page: str) -> None:
    assert len(page.encode()) < 400_000


def test_words_that_differ_are_marked(parsed: Page) -> None:
    marked = [data for tag, data in parsed.texts if tag == "mark"]
    assert any("promises" in word or "guarantees" in word for word in marked)
    assert not any("statement" in word for word in marked)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0, "0"), (1234567, "1,234,567"), (1234.5, "1,234"), (0.12345, "0.123"), (-2.5, "-2.5")],
)
def test_numbers_are_written_as_people_read_them(value: float | None, shown: str) -> None:
    assert format_number(value) == shown


def test_a_share_is_never_rounded_to_all_or_nothing() -> None:
    assert [format_percent(share) for share in (0, 0.0001, 0.5, 0.9999, 1)] == [
        "0.0 %",
        "<0.1 %",
        "50.0 %",
        ">99.9 %",
        "100.0 %",
    ]


# Damage, and the command line.


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[RunCommand]:
    """Runs the command line in this process: its exit code, and what it printed as result and as errors."""
    handler = signal.getsignal(signal.SIGINT)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["memory3", "report", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGINT, handler)
    set_display(SilentDisplay())


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy of the bank whose table of duplicates has another byte."""
    shutil.copytree(folder / "bank", tmp_path / "bank")
    path = Bank.open(tmp_path / "bank").locate_all("duplicates")[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    return tmp_path / "bank"


def test_a_damaged_bank_still_has_a_report(damaged: Path, tmp_path: Path, run_command: RunCommand) -> None:
    out = tmp_path / "r.html"
    code, _, errors = run_command("--bank", str(damaged), "--out", str(out), "--samples", "0", "--deep")
    assert code == 1
    assert re.fullmatch("error: .* version 4 is damaged: files.*; run memory3 verify", errors.splitlines()[-1])
    text = "".join(data for _, data in Page(out.read_text(encoding="utf-8")).texts)
    assert "FAILED" in text
    assert "Not shown: table 'duplicates' of bank" in text
    assert "Bytes by part" in text


def test_a_quick_look_does_not_replace_a_deep_check(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "bank", tmp_path / "bank")
    bank = Bank.open(tmp_path / "bank")
    checks = verify_bank(bank, deep=True)
    assert all(check.passed for check in checks)
    kept = (tmp_path / "bank" / "checks" / "00000004.json").read_bytes()
    made = make_report(bank, ReportRequest(num_samples=0))
    assert (tmp_path / "bank" / "checks" / "00000004.json").read_bytes() == kept
    assert made.verification.kept is not None
    assert made.verification.kept["deep"] is True
    assert "The last kept result of memory3 verify --deep: sound" in "".join(
        d for _, d in Page(render_page(made)).texts
    )


def test_the_command_writes_the_file_and_prints_figures(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    bank = str(folder / "bank")
    arguments = ["--bank", bank, "--version", "2", "--out", str(out), "--samples", "0", "--json"]
    command = [sys.executable, "-m", "flows.cli", "report", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["head"]["version"] == 2
    assert value["codec"] == {"skipped": "not measured, because no sample was asked for"}
    assert value["tallies"][0]["read"] == value["tallies"][0]["kept"] + sum(
        reason["count"] for reason in value["tallies"][0]["dropped"]
    )
    Page(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bank", "BANK"], "give the file to write with --out report.html"),
        (["--bank", "BANK", "--version", "99", "--out", "x.html"], "has no version 99; its versions are: 1, 2, 3, 4"),
        (["--bank", "BANK/none", "--out", "x.html"], "does not exist; make one with: memory3 build"),
        (["--bank", "BANK", "--out", "nowhere/x.html"], "must be a file in a folder that is there"),
        (["--bank", "BANK", "--out", "x.html", "--model", "nowhere"], "nowhere is not a checkpoint"),
    ],
)
def test_errors_are_one_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_command: RunCommand,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, errors = run_command(*(argument.replace("BANK", str(folder / "bank")) for argument in arguments))
    assert (code, printed) == (1, "")
    assert message in errors.splitlines()[-1]
    assert errors.splitlines()[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("setting", ["num_samples", "seed"])
def test_a_number_below_0_is_refused(setting: str) -> None:
    with pytest.raises(InputError, match=f"report: {setting} is -1, must be at least 0"):
        ReportRequest(**{setting: -1})


def test_a_model_that_is_not_at_hand_leaves_its_section_out(bank: Bank) -> None:
    config = {**bank.manifest.config, "memory": {**bank.manifest.config["memory"], "model": "/gone/away"}}
    elsewhere = Bank(bank.store, dataclasses.replace(bank.manifest, config=config))
    made = make_report(elsewhere, ReportRequest(num_samples=20))
    assert isinstance(made.codec, Skipped)
    assert "/gone/away" in made.codec.skipped
    assert not isinstance(made.index, Skipped)
    assert "Not shown: /gone/away" in "".join(data for _, data in Page(render_page(made)).texts)


# In a browser.


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_a_browser_shows_it_and_asks_for_nothing(page: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    with Browser(tmp_path / "profile") as browser:
        browser.open(path.as_uri())
        assert browser.evaluate("document.title").endswith("version 2")
        heights = browser.evaluate("[...document.querySelectorAll('section')].map(one => one.offsetHeight)")
        assert len(heights) == 8
        assert min(heights) > 60
        assert browser.evaluate("[...document.querySelectorAll('figure rect')].every(r => r.getBBox().width > 0)")
        width = browser.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert width == 0
        grounds = []
        for scheme in ("light", "dark"):
            browser.prefer(scheme)
            grounds.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert grounds == ["rgb(255, 255, 255)", "rgb(20, 23, 28)"]
        browser.press("Tab")
        assert browser.evaluate("document.activeElement.className") == "skip"
        browser.evaluate("document.querySelector('summary').focus()")
        browser.press("Enter")
        assert browser.evaluate("document.querySelector('details').open")
        assert browser.complaints == []
        assert [url for url in browser.requests if not url.startswith("data:")] == [path.as_uri()]
