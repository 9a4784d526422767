"""``memory3 deploy`` as docs/nightly.md has it: its own server, a schedule that fires, a watched folder, overlaps."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.verifying import verify_bank
from schemas.bank import Bank
from schemas.manifest import list_versions
from tests.test_storage import find_free_port

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "nightly.md").read_text(encoding="utf-8")
WAIT_SECONDS = 400.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def list_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def list_commands() -> list[str]:
    return [line for block in list_blocks("sh") for line in block.splitlines()]


def find_command(start: str) -> str:
    [found] = [command for command in list_commands() if command.startswith(start)]
    return found


class Served:
    """The commands of the page, run in a folder of their own with a Prefect server of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = find_free_port()
        home = tempfile.mkdtemp(prefix="memory3-served-")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": home,
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            "DO_NOT_TRACK": "1",
        }

    def make_arguments(self, command: str) -> list[str]:
        words = shlex.split(command)
        assert words[0] == "memory3"
        return [sys.executable, "-m", "flows.cli", *words[1:]]

    def run(self, command: str) -> str:
        done = subprocess.run(
            self.make_arguments(command),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ask(self, path: str, wanted: dict[str, Any] | None = None) -> Any:
        """Returns what the server answers; a database that is busy is asked again, as Prefect's own client does."""
        content = None if wanted is None else json.dumps(wanted).encode()
        url = f"http://127.0.0.1:{self.port}/api{path}"
        for attempt in range(20):
            try:
                request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                if error.code != 503 or attempt == 19:
                    raise
            except TimeoutError:
                if attempt == 19:
                    raise
            time.sleep(1)
        raise AssertionError

    def list_runs(self, flow: str) -> list[dict[str, Any]]:
        """Returns the runs of a flow that have begun or ended, oldest first."""
        found = self.ask("/flow_runs/filter", {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_ASC"})
        return [run for run in found if run["state_type"] not in ("SCHEDULED", "PENDING")]

    def start_run(self, deployment: str) -> str:
        made = self.ask(f"/deployments/name/{deployment}")
        return str(self.ask(f"/deployments/{made['id']}/create_flow_run", {})["id"])

    def read_state(self, run_id: str) -> dict[str, Any]:
        state: dict[str, Any] = self.ask(f"/flow_runs/{run_id}")["state"]
        return state


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(1.0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Builds the bank of the page and serves its file, with times that a test can wait for."""
    folder = tmp_path_factory.mktemp("nightly")
    (folder / "docs").mkdir()
    (folder / "docs" / "install.md").write_text("# Install\n\nThe installer needs version 3 of the tool. " * 8)
    site = Served(folder)
    site.run(find_command("memory3 build"))
    [page] = list_blocks("yaml")
    asked = yaml.safe_load(page)
    update, verify, _ = asked["deployments"]
    update |= {"settle_seconds": 2.0, "poll_seconds": 0.5}
    del verify["cron"]
    verify |= {"every": "15s"}
    (folder / "deployments.yaml").write_text(yaml.safe_dump(asked))
    with (folder / "served.log").open("w") as log:
        command = [command for command in list_commands() if command.startswith("memory3 deploy --file")][-1]
        process = subprocess.Popen(
            site.make_arguments(command), cwd=folder, env=site.environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_for(lambda: "served until Ctrl-C" in (folder / "served.log").read_text(), "the server does not start")
            yield site
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)
    told = (folder / "served.log").read_text()
    assert process.returncode == 0, told[-6000:]
    assert "schedules are paused" in told


def count_ended(site: Served, flow: str) -> int:
    return sum(run["state_type"] in ("COMPLETED", "FAILED", "CRASHED") for run in site.list_runs(flow))


def test_the_schedule_fires_and_the_first_look_starts_a_run(served: Served) -> None:
    wait_for(lambda: count_ended(served, "update_bank"), "the first look starts no run")
    wait_for(lambda: count_ended(served, "verify_bank"), "the schedule does not fire")
    first = served.list_runs("update_bank")[0]
    assert (first["name"], first["state_type"]) == ("update lms-bank v1 (unchanged)", "COMPLETED")
    assert set(first["tags"]) == {"memory3", "watch"}
    verified = next(run for run in served.list_runs("verify_bank") if run["state_type"] == "COMPLETED")
    assert verified["auto_scheduled"]
    assert verified["state"]["message"].startswith("version 1 is sound")


def test_a_change_starts_one_run(served: Served) -> None:
    wait_for(lambda: count_ended(served, "update_bank"), "the first look starts no run")
    (served.folder / "docs" / "faq.md").write_text("# Questions\n\nIt is reset with the red button. " * 8)
    bank = served.folder / "lms-bank"
    wait_for(lambda: list_versions(bank) == [1, 2], "no version was made")
    wait_for(lambda: count_ended(served, "update_bank") == 2, "the run does not end")
    time.sleep(10)
    runs = served.list_runs("update_bank")
    assert [run["name"] for run in runs] == ["update lms-bank v1 (unchanged)", "update lms-bank v2"]
    assert Bank.open(bank).manifest.counts["documents"]["kept"] == 2


def test_two_updates_at_once_are_queued_and_the_bank_is_whole(served: Served) -> None:
    wait_for(lambda: count_ended(served, "update_bank"), "the first look starts no run")
    runs = [served.start_run("update_bank/lms-bank") for _ in range(2)]
    wait_for(lambda: all(served.read_state(run)["type"] == "COMPLETED" for run in runs), "they do not end")
    assert all(check.passed for check in verify_bank(Bank.open(served.folder / "lms-bank")))


def test_of_two_verifications_at_once_one_is_cancelled(served: Served) -> None:
    runs = [served.start_run("verify_bank/lms-bank") for _ in range(2)]
    final = ("COMPLETED", "CANCELLED", "FAILED", "CRASHED")
    wait_for(lambda: all(served.read_state(run)["type"] in final for run in runs), "they do not end")
    states = [served.read_state(run) for run in runs]
    assert "CANCELLED" in {state["type"] for state in states}
    assert {state["type"] for state in states} <= {"COMPLETED", "CANCELLED"}
    [message] = {state["message"] for state in states if state["type"] == "CANCELLED"}
    assert "concurrency limit" in message


def test_the_other_commands_of_the_page(served: Served) -> None:
    shown = json.loads(served.run(find_command("memory3 deploy --file deployments.yaml --print")))
    assert [one["name"] for one in shown] == ["update_bank/lms-bank", "verify_bank/lms-bank", "compact_bank/lms-bank"]
    one = json.loads(served.run(f"{find_command('memory3 deploy update')} --print"))
    assert one[0]["cron"] == "0 3 * * *"
    listed = served.run(find_command("memory3 deploy list"))
    assert all(name in listed for name in ("update_bank/lms-bank", "cron 0 3 * * * Europe/Berlin", "compact_bank"))
    served.run(find_command("memory3 deploy remove"))
    assert "compact_bank" not in served.run(find_command("memory3 deploy list"))
