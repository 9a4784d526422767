"""Whatever is added, edited, deleted, renamed or copied: after each update a bank equals a fresh build."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, rule

from flows.building import build, update
from flows.compacting import compact_bank
from flows.config import BuildConfig, apply_changes
from flows.deleting import delete_documents
from flows.steps import Steps
from pipelines.running import LOOP_RUNNER
from schemas.bank import Bank
from schemas.stores import LocalStore
from tests.bank_contents import assert_equal_banks, read_whole

PARAGRAPHS = sorted({part for text in topics.values() for part in text.split("\n\n") if 250 < len(part) < 600})[:60]

CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"deduplication": {"keep": "first", "strict": True}, "chunking": {"overlap_tokens": 16}},
    {"reading": {"title_column": "title"}, "chunking": {"title_prefix": True}, "memory": {"references_per_shard": 4}},
)
WITH_DOCUMENTS: dict[str, Any] = {"document_deduplication": {"enabled": True, "threshold": 0.7}}


def make_config(changes: dict[str, Any]) -> BuildConfig:
    return apply_changes(BuildConfig(), {"engine": {"runner": LOOP_RUNNER, "num_workers": 1}, **changes})


def write_corpus(folder: Path, documents: dict[str, str]) -> Path:
    """Writes documents by id; their order in the file is that of their ids, which must not matter elsewhere."""
    path = folder / "corpus.jsonl"
    rows = [{"id": name, "text": text, "title": f"About {name[:1]}"} for name, text in sorted(documents.items())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def change_word(text: str, place: int) -> str:
    words = text.split(" ")
    words[place % len(words)] = "otherwise"
    return " ".join(words)


class BankMachine(RuleBasedStateMachine):
    """A bank that follows a corpus of a few documents, compared with a fresh build after every step."""

    documents = Bundle("documents")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="memory3-equality-"))
        self.corpus: dict[str, str] = {}
        self.num_names = 0
        self.has_deleted = False

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def name_new(self) -> str:
        self.num_names += 1
        return f"{'abc'[self.num_names % 3]}{self.num_names}"

    @initialize(
        target=documents,
        parts=st.lists(st.lists(st.sampled_from(PARAGRAPHS), min_size=1, max_size=3), min_size=2, max_size=4),
        changes=st.sampled_from(CONFIGS),
        with_documents=st.booleans(),
    )
    def begin(self, parts: list[list[str]], changes: dict[str, Any], with_documents: bool) -> Any:
        self.with_documents = with_documents
        self.config = make_config({**changes, **(WITH_DOCUMENTS if with_documents else {})})
        for paragraphs in parts:
            self.corpus[self.name_new()] = "\n\n".join(paragraphs)
        path = write_corpus(self.folder, self.corpus)
        self.store = LocalStore(self.folder / "bank")
        build(self.store, [str(path)], self.config, Steps())
        return multiple(*self.corpus)

    def build_fresh(self) -> Bank:
        folder = self.folder / "fresh"
        shutil.rmtree(folder, ignore_errors=True)
        build(LocalStore(folder), [str(self.folder / "corpus.jsonl")], self.config, Steps())
        return Bank.open(folder)

    def follow(self) -> None:
        path = write_corpus(self.folder, self.corpus)
        os.utime(path, ns=(self.num_names, self.num_names))
        before = Bank.open(self.store)
        stored = sum(file.num_rows for file in before.manifest.list_files("memories"))
        summary = update(self.store, None, {}, Steps())
        self.has_deleted = False
        bank = Bank.open(self.store)
        assert_equal_banks(bank, self.build_fresh())
        if not summary["unchanged"]:
            encoded = summary["counts"]["changes"]["references"]["encoded"]
            assert sum(file.num_rows for file in bank.manifest.list_files("memories")) == stored + encoded

    @rule(target=documents, paragraphs=st.lists(st.sampled_from(PARAGRAPHS), min_size=1, max_size=3))
    def add(self, paragraphs: list[str]) -> str:
        name = self.name_new()
        self.corpus[name] = "\n\n".join(paragraphs)
        self.follow()
        return name

    @rule(name=documents, paragraph=st.sampled_from(PARAGRAPHS), at_start=st.booleans())
    def edit(self, name: str, paragraph: str, at_start: bool) -> None:
        parts = [paragraph, self.corpus[name]] if at_start else [self.corpus[name], paragraph]
        self.corpus[name] = "\n\n".join(parts)[:2000]
        self.follow()

    @rule(target=documents, name=documents, place=st.integers(0, 80))
    def copy_nearly(self, name: str, place: int) -> str:
        copy = self.name_new()
        self.corpus[copy] = change_word(self.corpus[name], place)
        self.follow()
        return copy

    @rule(target=documents, name=consumes(documents))
    def rename(self, name: str) -> str:
        other = self.name_new()
        self.corpus[other] = self.corpus.pop(name)
        self.follow()
        return other

    @rule(name=consumes(documents))
    def remove(self, name: str) -> None:
        if len(self.corpus) > 1:
            del self.corpus[name]
            self.follow()

    @rule(name=consumes(documents))
    def delete(self, name: str) -> None:
        if len(self.corpus) == 1 or self.with_documents:  # a near-duplicate that was dropped cannot come back by itself
            return
        delete_documents(self.store, [name])
        del self.corpus[name]
        self.has_deleted = True
        write_corpus(self.folder, self.corpus)
        assert_equal_banks(Bank.open(self.store), self.build_fresh(), same_corpus=False)

    @rule()
    def compact(self) -> None:
        compact_bank(self.store)
        bank, fresh = Bank.open(self.store), self.build_fresh()
        assert len({file.path.rpartition("/")[0] for file in bank.manifest.files}) == 1
        assert_equal_banks(bank, fresh, same_corpus=not self.has_deleted)
        # The very bytes, but for memories, whose last bits depend on what they were written beside.
        expected = {file.kind: file.sha256 for file in fresh.manifest.files if file.kind not in ("shard", "memories")}
        found = {file.kind: file.sha256 for file in bank.manifest.files}
        different = {kind for kind in expected if found[kind] != expected[kind]}
        assert different <= ({"documents", "rejects"} if self.has_deleted else set())


# A failing sequence is short as it is; to shrink it would take longer than to find it.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
BankMachine.TestCase.settings = settings(
    max_examples=4, stateful_step_count=4, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck)
)
TestBank = BankMachine.TestCase


class ManyBanks(BankMachine):
    """The same, for as many sequences as make rare ones likely."""


ManyBanks.TestCase.settings = settings(
    max_examples=300, stateful_step_count=4, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck)
)
TestManyBanks = pytest.mark.slow(pytest.mark.timeout(7200)(ManyBanks.TestCase))


def test_deleting_a_bridge_splits_its_cluster_and_promotes(tmp_path: Path) -> None:
    """Three texts, each like the next and the ends unlike: without the middle one both ends are kept."""
    words = PARAGRAPHS[0].split()[:60]
    first = " ".join(words)
    middle = " ".join([*words[:6], "alpha", *words[7:]])
    last = " ".join([*words[:6], "alpha", *words[7:52], "beta", "gamma", *words[54:]])
    config = make_config({"deduplication": {"threshold": 0.7, "num_bands": 30}})
    path = write_corpus(tmp_path, {"a": first, "b": middle, "c": last})
    store = LocalStore(tmp_path / "bank")
    build(store, [str(path)], config, Steps())
    duplicates = read_whole(Bank.open(store), "duplicates")
    assert duplicates is not None
    assert len(duplicates) == 2
    delete_documents(store, ["b"])
    bank = Bank.open(store)
    left = read_whole(bank, "duplicates")
    assert left is not None
    write_corpus(tmp_path, {"a": first, "c": last})
    build(LocalStore(tmp_path / "fresh"), [str(path)], config, Steps())
    assert_equal_banks(bank, Bank.open(tmp_path / "fresh"), same_corpus=False)
