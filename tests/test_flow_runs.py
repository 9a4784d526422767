"""Flows on Prefect's own server: their states, names, retries, artifacts and events, on real small banks."""

import contextlib
import importlib.util
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from schemas.bank import Bank
from schemas.errors import BankFormatError, ConflictError, CorpusError, InputError
from schemas.manifest import list_versions
from schemas.stores import LocalStore
from tests.corpora import make_documents, write_lines
from tests.test_storage import endpoint  # noqa: F401
from tests.test_stores import Proxy

pytestmark = pytest.mark.usefixtures("engine")

COLD = {"memory": {"cold": True}}

Read = Callable[..., Any]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("corpus") / "docs.jsonl", make_documents()[:4])


@pytest.fixture(scope="module")
def built(engine: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of one version."""
    from flows.build import build_bank

    folder = tmp_path_factory.mktemp("banks") / "lms-bank"
    build_bank([str(corpus)], str(folder), COLD, verify="quick")
    return folder


@pytest.fixture
def bank(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "lms-bank"))


def ask(path: str, wanted: dict[str, Any]) -> Any:
    """Returns what the server's own API answers."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        answer = client._client.post(path, json=wanted)
        answer.raise_for_status()
        return answer.json()


def read_run(run_id: UUID) -> Any:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id)


def read_artifacts(run_id: UUID) -> dict[str, Any]:
    """Returns the artifacts of a run by the last word of their key."""
    found = ask("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [str(run_id)]}}})
    return {(one["key"] or one["type"]).rpartition("-")[2]: one for one in found}


def count_tries(run_id: UUID) -> dict[str, int]:
    """Returns how often each task of a run was begun; the server hears of the last tasks a little later."""
    for _ in range(600):
        found = ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [str(run_id)]}}})
        if found and all(task["state_type"] in ("COMPLETED", "FAILED") for task in found):
            break
        time.sleep(0.2)
    return {task["name"].rpartition("-")[0]: task["run_count"] for task in found}


def find_events(event: str, bank: str) -> list[dict[str, Any]]:
    """Returns the events about a bank, which arrive a little later."""
    wanted = {"filter": {"event": {"name": [event]}, "resource": {"id": [f"memory3.bank.{bank}"]}}}
    for _ in range(600):
        if found := ask("/events/filter", wanted)["events"]:
            return list(found)
        time.sleep(0.2)
    return []


def run_flow(flow: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Runs a flow; returns its final state and the run as the server has it."""
    state = flow(*args, **kwargs, return_state=True)
    return state, read_run(state.state_details.flow_run_id)


def test_an_update_says_what_it_did(bank: Path, tmp_path: Path) -> None:
    from flows.build import update_bank

    corpus = write_lines(tmp_path / "docs.jsonl", make_documents()[1:6])
    state, run = run_flow(update_bank, [str(corpus)], str(bank), verify="quick")
    assert state.is_completed()
    assert run.name == "update lms-bank v2"
    assert run.state.message.startswith("version 2 made by update: ")
    assert state.result()["counts"]["changes"]["documents"] == {
        "added": 2,
        "changed": 0,
        "removed": 1,
        "unchanged": 3,
        "chunked": 2,
    }
    found = read_artifacts(run.id)
    manifest = Bank.open(bank).manifest
    counts = {row["what"]: row for row in eval_table(found["counts"])}
    for name in ("documents", "references"):
        expected = manifest.counts[name]
        assert (counts[name]["read"], counts[name]["kept"]) == (expected["read"], expected["kept"])
        assert counts[name]["dropped"] == sum(expected["dropped"].values())
    sizes = {row["part"]: row["bytes"] for row in eval_table(found["bytes"])}
    assert sum(sizes.values()) == sum(file.size_bytes for file in manifest.files)
    assert {row["stage"] for row in eval_table(found["stages"])} == set(manifest.seconds)
    page = found["report"]["data"]
    first, *_, last = (document["id"] for document in make_documents()[:6])
    assert f"# {bank} version 2" in page
    assert f"`{first}`" in page.partition("documents removed")[2]
    assert f"`{last}`" in page.partition("documents added")[2].partition("\n")[0]
    assert "| files | ok |" in page
    event = find_events("memory3.version.committed", str(bank))[0]
    assert event["payload"]["version"] == 2
    assert event["payload"]["changes"]["documents"]["added"] == 2


def eval_table(artifact: dict[str, Any]) -> list[dict[str, Any]]:
    import json

    rows: list[dict[str, Any]] = json.loads(artifact["data"])
    assert rows
    return rows


def test_an_update_with_nothing_to_do_says_so(bank: Path) -> None:
    from flows.build import update_bank

    state, run = run_flow(update_bank, None, str(bank))
    assert state.result()["unchanged"]
    assert run.name == "update lms-bank v1 (unchanged)"
    assert set(read_artifacts(run.id)) == {"report"}
    assert count_tries_or_none(run.id) == {}
    assert list_versions(bank) == [1]


def count_tries_or_none(run_id: UUID) -> dict[str, int]:
    found = ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [str(run_id)]}}})
    return {task["name"]: task["run_count"] for task in found}


def test_a_known_error_fails_at_once_with_its_own_sentence(bank: Path, corpus: Path) -> None:
    from flows.build import build_bank, update_bank

    state, run = run_flow(update_bank, ["/nowhere"], str(bank))
    assert run.state_type == "FAILED"
    assert run.state.message.startswith("/nowhere does not exist")
    with pytest.raises(CorpusError, match="^/nowhere does not exist"):
        state.result()
    model = {"memory": {"model": "nowhere"}}
    state, run = run_flow(build_bank, [str(corpus)], str(bank.parent / "other"), model)
    assert run.state.message.startswith("nowhere ")
    assert "\n" not in run.state.message
    assert count_tries(run.id) == {"models": 1}
    state, run = run_flow(build_bank, [str(corpus)], str(bank), verify="thorough")
    assert run.state.message == "verify is 'thorough', must be one of none, quick, deep"
    state, run = run_flow(build_bank, [str(corpus)], "ftp://somewhere/bank")
    assert run.state.message.startswith("ftp://somewhere/bank is no place for a bank")


def test_verify_fails_with_what_is_damaged(bank: Path) -> None:
    from flows.upkeep import verify_bank

    state, run = run_flow(verify_bank, str(bank))
    assert run.name == "verify lms-bank v1"
    assert run.state.message == f"version 1 is sound: {len(state.result()['checks'])} checks"
    index = Bank.open(bank).locate_all("index")[0]
    index.write_bytes(index.read_bytes()[:-7])
    state, run = run_flow(verify_bank, str(bank))
    assert run.state.message.startswith(f"{bank} version 1 is damaged: files")
    assert count_tries(run.id) == {"verify": 1}
    with pytest.raises(BankFormatError, match="is damaged"):
        state.result()
    failed = {row["name"] for row in eval_table(read_artifacts(run.id)["checks"]) if row["passed"] == "FAILED"}
    assert "files" in failed
    event = find_events("memory3.verify.failed", str(bank))[0]
    assert set(event["payload"]["failed"]) == failed
    assert index.name in event["payload"]["failed"]["files"]


def test_compact_and_migrate_are_flows_too(bank: Path, tmp_path: Path) -> None:
    from flows.build import update_bank
    from flows.upkeep import compact_bank, migrate_bank

    update_bank([str(write_lines(tmp_path / "docs.jsonl", make_documents()[:5]))], str(bank))
    state, run = run_flow(compact_bank, str(bank), verify="deep")
    assert run.name == "compact lms-bank v3"
    assert {"gather", "assemble", "publish", "commit", "verify"} <= set(count_tries(run.id))
    state, run = run_flow(migrate_bank, str(bank), codec="turbo4", first=2)
    assert run.name == "migrate lms-bank v4"
    assert state.result()["counts"]["changes"]["references"]["encoded"] == 2
    assert Bank.open(bank).manifest.layout.codec == "turbo4"
    state, run = run_flow(migrate_bank, str(bank))
    assert run.state.message == "migration: give a model, a codec or both"


def test_evaluate_reports_random_memories_beside_retrieved_ones(bank: Path, tmp_path: Path) -> None:
    from flows.learning import evaluate_model

    documents = make_documents()
    unseen = write_lines(tmp_path / "unseen.jsonl", [documents[0], documents[7]])
    state, run = run_flow(evaluate_model, str(bank), [str(unseen)], config={"num_passages": 1})
    found = state.result()
    assert run.name == "evaluate lms-bank v1"
    assert found["data"]["num_documents"] >= 1
    assert found["data"]["num_documents_in_bank"] <= 1
    assert found["data"]["num_tokens"] > 64
    values = {figure["way"]: figure["value"] for figure in found["figures"] if figure["name"] == "loss"}
    assert set(values) == {"plain", "none", "random of 5", "retrieved of 5"}
    assert len({round(value, 6) for value in values.values()}) == 4
    losses = {row["read"]: float(row["loss"]) for row in eval_table(read_artifacts(run.id)["losses"])}
    assert losses == {way: pytest.approx(value, abs=1e-4) for way, value in values.items()}
    assert "retrieved of 5 " in run.state.message
    short = write_lines(tmp_path / "short.jsonl", [{"id": "a", "text": "too short"}])
    state, run = run_flow(evaluate_model, str(bank), [str(short)])
    assert "has 128 tokens" in run.state.message


def test_a_stage_of_training_goes_on_as_a_flow(tmp_path: Path) -> None:
    from flows.learning import train_model
    from flows.preparing import PrepareConfig, prepare_sequences

    corpus = write_lines(tmp_path / "docs.jsonl", make_documents())
    data, out = tmp_path / "data", tmp_path / "runs" / "warm"
    prepare_sequences([str(corpus)], data, None, None, PrepareConfig(sequence_tokens=128))
    settings = {"stream": {"sequences_per_step": 2, "sequences_per_batch": 1}}
    state, run = run_flow(train_model, "warmup", str(data), str(out), 2, config=settings)
    result = state.result()
    assert (run.name, result["step"], result["is_finished"]) == ("train warm", 2, True)
    assert run.state.message.startswith("finished after 2 steps, loss ")
    assert (out / "model" / "config.json").is_file()
    state, run = run_flow(train_model, "cooldown", str(data), str(out), 2)
    assert run.state.message == "stage is 'cooldown', must be one of warmup, continual"


def test_a_bank_that_somebody_writes_to_is_refused_or_waited_for(bank: Path, corpus: Path, tmp_path: Path) -> None:
    from flows.build import update_bank
    from flows.workplace import lock_bank

    changed = write_lines(tmp_path / "docs.jsonl", make_documents()[:5])
    with lock_bank(LocalStore(bank)):
        state, run = run_flow(update_bank, [str(changed)], str(bank))
        with pytest.raises(ConflictError, match="another process is writing"):
            state.result()
        assert run.state.message.startswith("another process is writing to")
    free = threading.Event()

    def hold() -> None:
        with lock_bank(LocalStore(bank)):
            free.set()
            time.sleep(3)

    holder = threading.Thread(target=hold)
    holder.start()
    free.wait()
    state, run = run_flow(update_bank, [str(changed)], str(bank), wait_minutes=5.0)
    holder.join()
    assert run.name == "update lms-bank v2"
    assert list_versions(bank) == [1, 2]


def test_progress_of_long_stages_is_published(engine: None) -> None:
    from prefect import flow

    from flows import run_progress
    from flows.flow_runs import run_work
    from flows.progress import show_stage

    done = 0

    @flow(name="slow_work")
    def work() -> UUID | None:
        from flows.run_records import get_flow_run_id

        def count(_steps: object) -> None:
            nonlocal done
            with show_stage("write", 4, "references", lambda: done):
                for _ in range(4):
                    time.sleep(0.4)
                    done += 1
                run_id = get_flow_run_id()
                for _ in range(600):  # a busy server hears of it late
                    if run_id is not None and "progress" in read_artifacts(run_id):
                        break
                    time.sleep(0.1)

        run_work(count)
        return get_flow_run_id()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_progress, "PUBLISH_SECONDS", 0.3)
        run_id = work()
    assert run_id is not None
    progress = read_artifacts(run_id)["progress"]
    assert progress["data"] == 100.0
    assert progress["description"].startswith("write: 4/4 references (100%)")


def test_records_are_lost_without_harm_if_the_server_is(caplog: pytest.LogCaptureFixture) -> None:
    """Of a run whose server goes away, only what people look at is lost: nothing is raised, and the log says so."""
    from prefect.logging import get_logger
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    from flows.run_records import publish_markdown, publish_table, rename_run

    log = get_logger("memory3")
    with (
        caplog.at_level("DEBUG", logger=log.name),
        contextlib.ExitStack() as stack,
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api", PREFECT_CLIENT_MAX_RETRIES: 0}),
    ):
        log.addHandler(caplog.handler)
        stack.callback(log.removeHandler, caplog.handler)
        publish_table("/a/bank", "counts", [{"a": 1}], "none")
        publish_markdown("/a/bank", "report", "# none", "none")
        rename_run("none")  # there is no run
    lost = {record.getMessage() for record in caplog.records if record.name == log.name}
    assert lost
    assert all(message.startswith("not told to the Prefect server: ") for message in lost)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch, endpoint: str, tmp_path: Path) -> Iterator[Proxy]:  # noqa: F811
    between = Proxy(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("schemas.object_urls.MAX_RETRIES", 0)
    yield between
    between.server.shutdown()
    between.server.server_close()


@pytest.mark.skipif(importlib.util.find_spec("moto") is None, reason="moto, the object store, is missing")
def test_a_store_that_fails_and_recovers_costs_a_retry(corpus: Path, proxy: Proxy, tmp_path: Path) -> None:
    from flows.build import build_bank
    from flows.verifying import verify_bank

    proxy.lost = {"PUT"}

    def recover() -> None:
        while not proxy.count("PUT"):
            time.sleep(0.02)
        time.sleep(1)
        proxy.lost = set()

    recovery = threading.Thread(target=recover)
    recovery.start()
    url = f"s3://corpora/{tmp_path.name}/bank"
    state, run = run_flow(build_bank, [str(corpus)], url, COLD)
    recovery.join()
    assert state.is_completed(), run.state.message
    tries = count_tries(run.id)
    assert tries["publish"] == 2
    assert {tries[name] for name in ("models", "read", "chunk", "assemble", "commit")} == {1}
    assert all(check.passed for check in verify_bank(Bank.open(url)))


def test_only_faults_that_may_pass_are_tried_again() -> None:
    from flows.steps import may_pass

    unreachable = CorpusError("the store cannot be reached")
    unreachable.may_pass = True
    passing = [unreachable, RuntimeError("a worker was lost"), ConnectionResetError("reset"), OSError(5, "busy")]
    assert [error for error in passing if not may_pass(error)] == []
    lasting = [
        InputError("x"),
        CorpusError("x"),
        BankFormatError("x"),
        TypeError("x"),
        KeyError("x"),
        KeyboardInterrupt(),
    ]
    assert [error for error in lasting if may_pass(error)] == []
