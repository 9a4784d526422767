"""Deployments: what users may ask for, what Prefect's server then has, and when a watched corpus starts a run."""

import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flows.deploying import (
    DeploymentConfig,
    make_deployment,
    make_deployments,
    parse_interval,
    read_deployments,
    resolve_paths,
)
from flows.watching import Settling, Watch, fingerprint_corpus, watch_corpus
from schemas.errors import InputError

# What users ask for ---------------------------------------------------------------------------------------------------


def write_file(folder: Path, text: str) -> Path:
    path = folder / "deployments.yaml"
    path.write_text(text)
    return path


def test_a_file_names_several_deployments_with_common_settings(tmp_path: Path) -> None:
    file = write_file(
        tmp_path,
        """
        timezone: Europe/Berlin
        overlap: cancel
        deployments:
          - bank: banks/lms
            cron: "0 3 * * *"
            parameters: {corpus: [docs/]}
          - flow: verify
            bank: s3://banks/lms
            name: weekly
            every: 7d
            overlap: queue
            watch: [docs/, "s3://texts/faq"]
            parameters: {deep: true}
        """,
    )
    first, second = read_deployments(file)
    assert second.watch == (str(tmp_path / "docs"), "s3://texts/faq")
    assert (first.bank, first.timezone, first.overlap) == (str(tmp_path / "banks/lms"), "Europe/Berlin", "cancel")
    update, verify = make_deployments([first, second])
    assert update.full_name == "update_bank/lms"
    assert update.entrypoint == "flows.build.update_bank"
    expected = {"bank": str(tmp_path / "banks/lms"), "corpus": [str(tmp_path / "docs")], "verify": "quick"}
    assert update.parameters == expected
    assert update.concurrency_options is not None
    assert update.concurrency_options.collision_strategy.value == "CANCEL_NEW"
    assert verify.full_name == "verify_bank/weekly"
    assert verify.parameters == {"bank": "s3://banks/lms", "deep": True}
    assert verify.schedules is not None
    assert verify.schedules[0].schedule.interval == timedelta(days=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("deployments: []", "names no deployment"),
        ("deployments: [{bank: a, flow: upgrade}]", "flow is 'upgrade', must be one of build, update"),
        ("deployments: [{bank: a, evry: 1d}]", r"deployments\[0\] has no key 'evry'"),
        ("deployments: [{bank: a, every: often}]", "every is 'often', must be a number and s, m, h or d"),
        ("deployments: [{bank: a, every: 0s}]", "every is '0s'"),
        ("deployments: [{bank: a, overlap: both}]", "overlap is 'both', must be one of queue, cancel"),
        ("deployments: [{bank: a, cron: daily at three}]", "cron is 'daily at three'"),
        ("deployments: [{bank: a, cron: 0 3 * * *, timezone: Berlin}]", "timezone 'Berlin'"),
        ("deployments: [{every: 1d}]", "bank must be given"),
        ("deployments: [{bank: a}, {bank: b/a}]", "two deployments are called update_bank/a; give one of them a name"),
        ("deployments: [{bank: a, parameters: {depth: 3}}]", "there is no parameter 'depth'; there is corpus, bank"),
        ("deployments: [{bank: a, flow: verify, parameters: {deep: [1]}}]", "deep"),
        ("deployments: [{bank: 's3://key:hidden@store/a'}]", "parameters.bank looks like a secret"),
        ("deployments: [{bank: a, parameters: {engine: {aws_secret_access_key: x}}}]", "looks like a secret"),
        (
            "deployments: [{bank: a, parameters: {engine: {options: [s3_secret_access_key=x]}}}]",
            "looks like a secret",
        ),
        ("deployments: [{bank: a, poll_seconds: 0}]", "poll_seconds 0"),
        ("deployments: [{bank: a, watch: [docs], overlap: cancel}]", "what is watched needs overlap queue"),
        ("deployments: [{bank: a, parameters: {verify: deap}}]", "verify is 'deap', must be one of none, quick, deep"),
        ("deployments: [{bank: a, parameters: {engine: {runer: x}}}]", "parameters.engine has no key 'runer'"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make_deployments(read_deployments(write_file(tmp_path, text)))
    assert "\n" not in str(caught.value)


def test_every_flow_can_be_deployed() -> None:
    configs = [
        DeploymentConfig(flow="build", bank="/b", parameters={"corpus": ["/c"]}),
        DeploymentConfig(flow="update", bank="/b"),
        DeploymentConfig(flow="verify", bank="/b"),
        DeploymentConfig(flow="compact", bank="/b"),
        DeploymentConfig(flow="migrate", bank="/b", parameters={"codec": "turbo4"}),
        DeploymentConfig(flow="train", parameters={"stage": "warmup", "data": "/d", "out": "/runs/w", "steps": 9}),
        DeploymentConfig(flow="evaluate", bank="/b", parameters={"corpus": ["/c"]}),
    ]
    names = [deployment.full_name for deployment in make_deployments(configs)]
    assert names[0] == "build_bank/b"
    assert names[5] == "train_model/w"
    assert len(set(names)) == 7


def test_an_interval_does_not_begin_anew_with_each_start() -> None:
    config = DeploymentConfig(bank="/b", every="7d")
    for _ in range(2):
        schedules = make_deployment(config).schedules
        assert schedules is not None
        assert schedules[0].schedule.anchor_date == datetime(2020, 1, 1, tzinfo=UTC)


def test_intervals() -> None:
    assert parse_interval("15m") == timedelta(minutes=15)
    assert parse_interval("1.5 h") == timedelta(minutes=90)
    assert parse_interval("20s") == timedelta(seconds=20)


def test_names_stay_names_and_paths_become_absolute(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    config = DeploymentConfig(flow="migrate", bank="b", parameters={"model": "my-model", "codec": "int8", "uses": "u"})
    found = resolve_paths(config, tmp_path)
    assert found.parameters == {"model": str(tmp_path / "my-model"), "codec": "int8", "uses": str(tmp_path / "u")}


def test_print_shows_what_would_be_made_and_asks_no_server(tmp_path: Path) -> None:
    import json

    command = [sys.executable, "-m", "flows.cli", "deploy", "update", "--bank", "b", "--cron", "0 3 * * *", "--print"]
    command += ["--runner", "dask", "--runner-option", "dask_client_address=tcp://127.0.0.1:8786"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    [shown] = json.loads(done.stdout)
    engine = {"runner": "dask", "options": ["dask_client_address=tcp://127.0.0.1:8786"]}
    assert shown["parameters"]["engine"] == engine
    assert shown["name"] == "update_bank/b"
    assert shown["parameters"]["bank"] == str(Path.cwd() / "b")


# What the server has --------------------------------------------------------------------------------------------------


def test_deployments_are_made_listed_changed_and_removed(engine: None) -> None:
    from prefect.client.orchestration import get_client

    from flows.deploying import check_owners, list_deployments, register_deployments, remove_deployment

    config = DeploymentConfig(bank="/banks/listed", cron="0 3 * * *", timezone="Europe/Berlin")
    register_deployments(make_deployments([config, DeploymentConfig(flow="verify", bank="/banks/listed", every="1d")]))
    update, verify = list_deployments()
    assert (update.name, update.bank) == ("update_bank/listed", "/banks/listed")
    assert (update.schedule, update.paused) == ("cron 0 3 * * * Europe/Berlin", False)
    assert verify.schedule == "every 1 day, 0:00:00"
    with get_client(sync_client=True) as client:
        made = client.read_deployment_by_name("update_bank/listed")
    assert made.global_concurrency_limit is not None
    assert made.global_concurrency_limit.limit == 1
    assert made.path is None
    register_deployments(make_deployments([DeploymentConfig(bank="/banks/listed", every="6h", paused=True)]))
    update, verify = list_deployments()
    assert (update.schedule, update.paused) == ("every 6:00:00", True)
    register_deployments(make_deployments([DeploymentConfig(bank="/banks/listed")]))
    update, verify = list_deployments()
    assert (update.schedule, update.paused) == ("", False)
    with pytest.raises(InputError, match="update_bank/listed for /banks/listed, not for /elsewhere/listed"):
        check_owners(make_deployments([DeploymentConfig(bank="/elsewhere/listed")]))
    check_owners(make_deployments([DeploymentConfig(bank="/banks/listed"), DeploymentConfig(bank="/banks/new")]))
    remove_deployment("update_bank/listed")
    assert [one.name for one in list_deployments()] == ["verify_bank/listed"]
    with pytest.raises(InputError, match="there is no deployment update_bank/listed; there is verify_bank/listed"):
        remove_deployment("update_bank/listed")
    remove_deployment("verify_bank/listed")
    assert list_deployments() == []


def test_the_server_is_asked_once_to_end_runs_whose_process_is_gone(engine: None) -> None:
    from prefect.client.orchestration import get_client

    from flows.lost_runs import HEARTBEAT, HEARTBEAT_SECONDS, NAME, SILENT_SECONDS, end_lost_runs

    end_lost_runs("memory3")
    end_lost_runs("memory3")
    with get_client(sync_client=True) as client:
        [made] = client.read_automations_by_name(NAME)
        client.delete_automation(made.id)
    assert made.trigger.within == timedelta(seconds=SILENT_SECONDS)
    assert SILENT_SECONDS > 3 * HEARTBEAT_SECONDS, "a run that is late once or twice is not lost"
    assert made.trigger.after == {HEARTBEAT}
    assert [action.type for action in made.actions] == ["change-flow-run-state"]


def test_runs_of_workers_send_heartbeats_as_often_as_the_server_expects() -> None:
    pooled = make_deployment(DeploymentConfig(bank="/banks/pooled", pool="nightly"))
    assert pooled.job_variables == {"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}}
    assert make_deployment(DeploymentConfig(bank="/banks/served")).job_variables == {}


def test_a_pool_that_is_not_there_is_one_sentence(engine: None) -> None:
    from flows.deploying import register_deployments

    with pytest.raises(InputError, match="prefect work-pool create --type process nightly"):
        register_deployments(make_deployments([DeploymentConfig(bank="/banks/pooled", pool="nightly")]))


# Watching -------------------------------------------------------------------------------------------------------------


def test_a_state_counts_when_it_has_lasted_and_only_once() -> None:
    settling = Settling(10.0)
    assert not settling.is_due("a", 0.0)
    assert not settling.is_due("a", 9.0)
    assert settling.is_due("a", 10.0)
    settling.report("a")
    assert not settling.is_due("a", 30.0)
    # Copied in two parts: the clock begins anew with each.
    assert not settling.is_due("b", 31.0)
    assert not settling.is_due("c", 40.0)
    assert not settling.is_due("c", 49.0)
    assert settling.is_due("c", 50.0)
    assert settling.is_due("c", 51.0), "a run that could not be started is still due"
    settling.report("c")
    # Changed and changed back before it counted.
    assert not settling.is_due("d", 60.0)
    assert not settling.is_due("c", 61.0)
    assert not settling.is_due("c", 99.0)


class Starts(list[str]):
    """Notes the runs that are started, and can refuse to, as a server that is away does."""

    refusing = False
    num_refused = 0

    def start(self, deployment: str) -> None:
        if self.refusing:
            self.num_refused += 1
            raise ConnectionError("the server is away")
        self.append(deployment)


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_watched_folder_starts_one_run_for_each_change(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.md").write_text("one")
    starts, stop = Starts(), threading.Event()
    watch = Watch(deployment="update_bank/b", paths=(str(folder),), settle_seconds=1.5, poll_seconds=0.02)
    watcher = threading.Thread(target=watch_corpus, args=(watch, stop, time.monotonic, starts.start))
    watcher.start()
    try:
        wait_for(lambda: len(starts) == 1)  # for what changed before
        (folder / "a.md").write_text("one and more")
        wait_for(lambda: len(starts) == 2)
        for number in range(20):  # a slow copy of many files is one change
            (folder / f"b{number}.md").write_text("two")
            time.sleep(0.02)
        wait_for(lambda: len(starts) == 3)
        starts.refusing = True
        (folder / "a.md").unlink()
        wait_for(lambda: starts.num_refused > 1)
        starts.refusing = False
        wait_for(lambda: len(starts) == 4)
        folder.rename(tmp_path / "away")  # a disk that is not mounted is no change
        time.sleep(1.0)
        (tmp_path / "away").rename(folder)
        time.sleep(2.5)
    finally:
        stop.set()
        watcher.join()
    assert starts == ["update_bank/b"] * 4


def test_fingerprints_follow_names_and_content(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("one")
    first = fingerprint_corpus((str(tmp_path),))
    assert fingerprint_corpus((str(tmp_path),)) == first
    (tmp_path / "notes.docx").write_text("of no known format, and counted as a reject")
    second = fingerprint_corpus((str(tmp_path),))
    assert second != first
    (tmp_path / "a.md").rename(tmp_path / "b.md")
    assert fingerprint_corpus((str(tmp_path),)) not in (first, second)
