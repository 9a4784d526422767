"""A new version is served while answers are under way; one that cannot be opened is not."""

import dataclasses
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from flows.building import build
from flows.migrating import Migration, migrate_bank
from flows.serving.batching import Batch, Progress, Task
from flows.serving.editions import Shelf
from flows.serving.settings import ServingConfig
from flows.steps import Steps
from model.generating import GenerationConfig
from schemas.bank import Bank
from schemas.manifest import commit_manifest, make_manifest_name
from schemas.stores import LocalStore
from schemas.tags import set_tag
from tests.bank_contents import list_live
from tests.servers import DOCUMENTS, LONG, MODEL, RunningServer, build_bank, run_server, update_bank, wait_until
from tests.test_equality import make_config
from tests.test_verifying import rewrite_manifest

FACT = "The keeper of the lighthouse at Skerryvore is called Morag, and she has a red boat."

LATER = {**DOCUMENTS, "lighthouse": FACT}

STREAMED: dict[str, Any] = {"model": MODEL, "prompt": LONG, "temperature": 0, "max_tokens": 300, "stream": True}


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bank(tmp_path_factory.mktemp("versions"))


@pytest.fixture
def server(bank: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """A server of a copy of the bank, ``bank`` beside its corpus."""
    shutil.copytree(bank, tmp_path / "bank")
    with run_server(tmp_path / "bank", tmp_path / "log", "--watch-seconds", "0.2") as running:
        yield running


def find(server: RunningServer, query: str) -> dict[str, Any]:
    with server.open_client() as plain:
        found: dict[str, Any] = plain.post("/v1/search", json={"query": query, "num_hits": 1}).json()
    return found


def get_health(server: RunningServer) -> dict[str, Any]:
    with server.open_client() as plain:
        health: dict[str, Any] = plain.get("/healthz").json()
    return health


class Streams(threading.Thread):
    """Long answers, one after the other, until told to stop; the versions of every one of them are noted."""

    def __init__(self, client: OpenAI) -> None:
        super().__init__()
        self._client = client
        self.ended = threading.Event()
        self.begun: list[int] = []
        self.versions: list[set[int]] = []
        self.reasons: list[str | None] = []

    def run(self) -> None:
        while not self.ended.is_set():
            found: set[int] = set()
            reason = None
            for event in self._client.completions.create(**STREAMED):
                assert event.model_extra is not None
                version = event.model_extra["memory3"]["version"]
                if not found:
                    self.begun.append(version)
                found.add(version)
                reason = event.choices[0].finish_reason
            self.versions.append(found)
            self.reasons.append(reason)


def test_a_new_version_answers_while_streams_go_on(server: RunningServer, tmp_path: Path) -> None:
    assert "Morag" not in find(server, "keeper of the lighthouse")["hits"][0]["text"]
    streams = Streams(server.connect())
    streams.start()
    wait_until(lambda: bool(streams.begun))
    update_bank(tmp_path / "bank", LATER)
    wait_until(lambda: find(server, "keeper of the lighthouse")["version"] == 2)
    found = find(server, "keeper of the lighthouse")
    assert found["hits"][0]["text"] == FACT
    assert found["hits"][0]["sources"][0]["doc_id"] == "lighthouse"
    answer = server.connect().completions.create(
        model=MODEL, prompt="The keeper of the lighthouse", max_tokens=4, extra_body={"memory3": {"trace": True}}
    )
    assert answer.choices[0].model_extra is not None
    told = answer.choices[0].model_extra["memory3"]
    assert told["version"] == 2
    assert found["hits"][0]["ref_id"] in {memory["ref_id"] for memory in told["trace"][0]["memories"]}
    wait_until(lambda: 2 in streams.begun)
    streams.ended.set()
    streams.join()
    # Every answer was finished; the first began before the change.
    assert streams.reasons == ["length"] * len(streams.reasons)
    assert streams.versions[-1] == {2}
    assert streams.begun[0] == 1
    assert streams.begun == sorted(streams.begun)
    assert server.read_metric("memory3_bank_version") == 2
    assert server.read_metric("memory3_bank_exchanges") == 1
    assert get_health(server)["problem"] is None
    assert server.log.read_text().count("version 2 is served in the place of version 1") == 1


def await_problem(server: RunningServer, words: str) -> None:
    """Waits until a problem is told, and makes sure that version 1 goes on answering."""
    wait_until(lambda: words in (get_health(server)["problem"] or ""))
    health = get_health(server)
    assert (health["status"], health["version"]) == ("ok", 1)
    assert find(server, "assert")["version"] == 1
    assert server.connect().completions.create(model=MODEL, prompt="a", max_tokens=2).choices


def test_a_version_that_cannot_be_opened_is_not_served(server: RunningServer, tmp_path: Path) -> None:
    """Damaged, incomplete, of another model, whole again: the old version stays until there is a better one."""
    first = Bank.open(tmp_path / "bank")
    second = tmp_path / "bank" / make_manifest_name(2)
    second.write_text("{}")
    await_problem(server, second.name)

    table = first.manifest.list_files("references")[0]
    missing = dataclasses.replace(table, path=table.path.replace("references", "gone"))
    rewrite_manifest(first, version=2, parent=1, files=[*first.manifest.files, missing])
    await_problem(server, "lacks files")

    strange = dataclasses.replace(first.manifest.fingerprint, weights="0" * 32)
    rewrite_manifest(first, version=2, parent=1, fingerprint=strange)
    await_problem(server, "was written by another model: weights differ")
    assert server.read_metric("memory3_bank_version") == 1
    assert server.read_metric("memory3_bank_failures") >= 3
    told = [line for line in server.log.read_text().splitlines() if "version 1 stays" in line]
    assert len(told) == server.read_metric("memory3_bank_failures")

    second.unlink()
    update_bank(tmp_path / "bank", LATER)
    wait_until(lambda: get_health(server)["version"] == 2)
    assert get_health(server)["problem"] is None
    assert find(server, "keeper of the lighthouse")["hits"][0]["text"] == FACT


def test_an_edition_reads_on_when_its_files_are_removed(bank: Path, tmp_path: Path) -> None:
    """As after a purge: its shards are open, and a model that fits is not loaded again."""
    shutil.copytree(bank, tmp_path / "bank")
    settings = {"memory": {"references_per_shard": 8}}
    build(LocalStore(tmp_path / "hot"), [str(bank.parent / "corpus.jsonl")], make_config(settings), Steps())
    config = ServingConfig(bank=str(tmp_path / "hot"))
    shelf = Shelf(config)
    old = shelf.edition
    shards = old.bank.manifest.list_files("shard")
    assert len(shards) >= 2
    assert not shelf.refresh()
    commit_manifest(old.bank.store, dataclasses.replace(old.bank.manifest, version=2, parent=1))
    assert shelf.refresh()
    assert (shelf.edition.version, old.version) == (2, 1)
    assert shelf.edition.writer is old.writer
    for shard in shards:
        (tmp_path / "hot" / shard.path).unlink()
    (tokens,) = old.make_generator(with_memory=True).generate_batch([LONG], GenerationConfig(max_new_tokens=70))
    assert len(tokens) == 70
    assert old.memories.statistics.num_read >= 5


def generate(batch: Batch, num_tokens: int) -> list[Progress]:
    """Lets a batch of one prompt go on for so many tokens, or to its end."""
    found: list[Progress] = []
    while not found or found[-1].num_tokens < num_tokens:
        step = batch.step()
        if step is None:
            break
        found += step.values()
    return found


def test_the_next_chunk_of_an_answer_under_way_reads_the_new_version(bank: Path, tmp_path: Path) -> None:
    shutil.copytree(bank, tmp_path / "bank")
    shutil.copy(bank.parent / "corpus.jsonl", tmp_path)
    shelf = Shelf(ServingConfig(bank=str(tmp_path / "bank")))
    old = shelf.edition
    tokens = [*old.checkpoint.bos_token_ids, *old.checkpoint.tokenizer.encode([LONG])[0].tolist()]
    task = Task(tokens=tokens, config=GenerationConfig(max_new_tokens=200), traces=True)

    def begin() -> Batch:
        return Batch(lambda: shelf.edition, [task])

    undisturbed = "".join(progress.text for progress in generate(begin(), 200))
    batch = begin()
    found = generate(batch, 70)
    # Everything that the first version has, deleted: only the new document can be found from now on.
    update_bank(tmp_path / "bank", {"lighthouse": FACT})
    assert shelf.refresh()
    new = shelf.edition
    found += generate(batch, 200)
    assert new.writer is old.writer
    # With the last token of the second chunk the memories of the third are laid out.
    assert found[-1].num_tokens == 200
    assert all(progress.versions == ((1,) if progress.num_tokens < 128 else (1, 2)) for progress in found)
    chunks = [chunk for progress in found for chunk in progress.chunks]
    assert [(chunk.trace.first_token, chunk.version) for chunk in chunks] == [
        (0, 1),
        (len(tokens), 1),
        (len(tokens) + 64, 1),
        (len(tokens) + 128, 2),
    ]
    assert {hit.ref_id for hit in chunks[-1].trace.hits} == list_live(new.bank)
    assert sum(chunks[-1].trace.attention) == pytest.approx(1.0, abs=1e-3)
    text = "".join(progress.text for progress in found)
    read_before = chunks[1].text + chunks[2].text
    assert text.startswith(read_before)
    assert undisturbed.startswith(read_before)
    assert old.memories.statistics.num_read + old.memories.statistics.num_encoded > 0
    assert new.memories.statistics.num_encoded == 1


def test_an_answer_keeps_its_version_if_the_next_was_written_otherwise(bank: Path, tmp_path: Path) -> None:
    shutil.copytree(bank, tmp_path / "bank")
    shelf = Shelf(ServingConfig(bank=str(tmp_path / "bank")))
    old = shelf.edition
    tokens = [*old.checkpoint.bos_token_ids, *old.checkpoint.tokenizer.encode([LONG])[0].tolist()]
    batch = Batch(lambda: shelf.edition, [Task(tokens=tokens, config=GenerationConfig(max_new_tokens=100))])
    generate(batch, 10)
    migrate_bank(old.bank.store, Migration(codec="turbo4"))
    assert shelf.refresh()
    assert shelf.edition.writer is not old.writer
    assert generate(batch, 100)[-1].versions == (1,)
    later = Batch(lambda: shelf.edition, [Task(tokens=tokens, config=GenerationConfig(max_new_tokens=10))])
    assert generate(later, 10)[-1].versions == (2,)


def test_a_tag_is_followed(bank: Path, tmp_path: Path) -> None:
    shutil.copytree(bank, tmp_path / "bank")
    store = LocalStore(tmp_path / "bank")
    set_tag(store, "live", 1)
    shelf = Shelf(ServingConfig(bank=str(tmp_path / "bank"), at="live"))
    update_bank(tmp_path / "bank", LATER)
    assert not shelf.refresh()
    set_tag(store, "live", 2, move=True)
    assert shelf.refresh()
    assert shelf.edition.version == 2
    set_tag(store, "live", 1, move=True)
    assert shelf.refresh()
    assert shelf.edition.version == 1
