"""The stack of docker-compose.yml as real processes: a scheduled update by itself, and kills in the middle of a run.

PostgreSQL, the Prefect server and worker, SeaweedFS, Dask's scheduler and two workers, and ``memory3 serve`` run with
the commands and variables of the file (:mod:`tests.composed`). ``make stack-test`` runs this and prints a table.
"""

import dataclasses
import json
import shutil
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from distributed import Client

from flows.verifying import verify_bank
from pipelines.python_docs import iterate_python_docs
from schemas.bank import Bank
from schemas.manifest import list_versions
from schemas.stores import open_store
from tests.composed import MissingError, Stack, wait_until

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(1500)]

BANK = "s3://memory3/bank"
KEY = "a-key-of-this-test-alone"
QUERY = "What is the keeper of the lighthouse at Skerryvore called?"
FACT = "# The lighthouse\n\nThe keeper of the lighthouse at Skerryvore is called {}, and she has a red boat.\n"
KEEPERS = ("Morag", "Ishbel", "Catriona", "Effie", "Una")
"""The fact that changes, one name for each version of the corpus."""

PAGE_CHARS = range(1500, 6000)
CORPUS_CHARS = 60_000
"""Of Python's own documentation, beside the page of the fact. With each version of the corpus all pages are others, so
that there is something to encode; about 130 references."""

GOOD_SECONDS = 900.0
"""For a change to be served, whatever was killed meanwhile."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: what was done, what came of it."""

    event: str
    stage: str
    seconds: float
    version: int
    verified: str


class Reader(threading.Thread):
    """Asks the server all the time, and notes what it says: which version, which fact, which errors."""

    def __init__(self, site: "Site") -> None:
        super().__init__(daemon=True)
        self._site = site
        self.ended = threading.Event()
        self.facts: dict[int, set[str]] = {}
        self.versions: list[int] = []
        self.refused: list[str] = []
        self.wrong: list[str] = []

    def run(self) -> None:
        while not self.ended.wait(2.0):
            try:
                self._look()
            except httpx.TransportError as error:
                self.wrong.append(f"the server does not answer: {error!r}")

    def _look(self) -> None:
        found = self._site.post("/v1/search", {"query": QUERY, "num_hits": 1})
        if found.status_code != 200:
            self.refused.append(f"{found.status_code} {found.text[:200]}")
            return
        answer = found.json()
        self.versions.append(answer["version"])
        text = answer["hits"][0]["text"]
        names = {name for name in KEEPERS if name in text}
        if len(names) != 1 or FACT.format(*names).split("\n\n")[1].strip() not in text:
            self.wrong.append(f"version {answer['version']} says {text!r}")
        self.facts.setdefault(answer["version"], set()).update(names)
        asked = {"model": "memory3-tiny", "prompt": "The keeper of the lighthouse", "max_tokens": 2}
        written = self._site.post("/v1/completions", asked)
        if written.status_code == 503:
            self.refused.append(f"503 {written.text[:200]}")
        elif written.status_code != 200:
            self.wrong.append(f"{written.status_code} {written.text[:200]}")


class Site:
    """The stack, its corpus, and what a user does with both."""

    def __init__(self, stack: Stack, corpus: Path, rows: list[Row]) -> None:
        self.stack = stack
        self.corpus = corpus
        self.url = f"http://127.0.0.1:{stack.find_port('serve', 8000)}"
        documents = {document["id"]: document["text"] for document in iterate_python_docs()}
        self._pages = {name: text for name, text in documents.items() if len(text) in PAGE_CHARS}
        self.keeper = ""
        self.rows = rows

    def write_corpus(self, number: int) -> None:
        """Changes the fact and all pages."""
        self.keeper = KEEPERS[number]
        wanted = {"lighthouse.md": FACT.format(self.keeper)}
        pages = sorted(self._pages)[number :: len(KEEPERS)]
        while sum(map(len, wanted.values())) < CORPUS_CHARS:
            page = pages.pop()
            wanted[f"{page.replace('/', '-')}.md"] = self._pages[page]
        for name, text in wanted.items():
            # A run may be reading: a page is there whole or not at all.
            temporary = self.stack.folder / "tmp" / name
            temporary.write_text(text)
            temporary.replace(self.corpus / name)
        for path in self.corpus.iterdir():
            if path.name not in wanted:
                path.unlink()

    def post(self, path: str, wanted: dict[str, Any]) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.post(f"{self.url}{path}", json=wanted, headers=headers, timeout=150)

    def find_fact(self) -> dict[str, Any]:
        """Returns what the server finds for the question; empty while it cannot."""
        try:
            found = self.post("/v1/search", {"query": QUERY, "num_hits": 1})
        except httpx.TransportError:
            return {}
        return dict(found.json()) if found.status_code == 200 else {}

    def serves_fact(self) -> bool:
        """Tells whether the newest fact is served."""
        hits = self.find_fact().get("hits") or [{"text": ""}]
        return self.keeper in hits[0]["text"]

    def complete(self, prompt: str) -> dict[str, Any]:
        """Returns the choice of a completion, with what it has read."""
        wanted = {
            "model": "memory3-tiny",
            "prompt": prompt,
            "temperature": 0,
            "max_tokens": 12,
            "memory3": {"trace": True},
        }
        answer = self.post("/v1/completions", wanted)
        assert answer.status_code == 200, answer.text
        choice: dict[str, Any] = answer.json()["choices"][0]
        return choice

    def ask_prefect(self, path: str, wanted: dict[str, Any] | None = None) -> Any:
        """Asks the Prefect server."""
        url = f"http://127.0.0.1:{self.stack.find_port('prefect-server', 4200)}/api{path}"
        content = None if wanted is None else json.dumps(wanted).encode()
        request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def list_runs(self) -> list[dict[str, Any]]:
        """Returns the runs of the deployment that have begun, oldest first."""
        wanted = {"flows": {"name": {"any_": ["update_bank"]}}, "sort": "EXPECTED_START_TIME_ASC"}
        found = self.ask_prefect("/flow_runs/filter", wanted)
        return [run for run in found if run["state_type"] not in ("SCHEDULED", "PENDING")]

    def count_faults(self) -> int:
        """Returns how many stages were tried again so far, and how many runs have failed."""
        stages = self.ask_prefect("/task_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 200})
        failed = [run for run in self.list_runs() if run["state_type"] in ("FAILED", "CRASHED") or run["run_count"] > 1]
        return len(failed) + sum(stage["run_count"] > 1 for stage in stages)

    def find_busy_worker(self) -> int | None:
        """Returns which of Dask's workers has work; None if none has."""
        with Client(f"tcp://127.0.0.1:{self.stack.find_port('dask-scheduler', 8786)}", timeout=30) as client:
            busy = {address for address, keys in client.processing().items() if keys}
        ports = [self.stack.find_port("dask-worker", 8790, replica) for replica in range(2)]
        return next((n for n, port in enumerate(ports) if f"tcp://127.0.0.1:{port}" in busy), None)

    def list_work(self, pattern: str) -> list[Path]:
        """Returns files in the workspace of the bank."""
        return list(self.stack.find_folder("work").glob(f"cache/memory3/banks/*/work/*/{pattern}"))

    def verify(self) -> str:
        """Verifies the newest version in depth, and all earlier ones quickly.

        Raises:
            AssertionError: one is damaged.
        """
        done = self.stack.run("serve", "memory3", "verify", "--bank", BANK, "--deep")
        assert done.returncode == 0, done.stdout + done.stderr
        versions = list_versions(open_store(BANK))
        for version in versions:
            checks = verify_bank(Bank.open(BANK, version))
            assert all(check.passed for check in checks), checks
        return f"sound, with {len(versions)} versions"


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Starts everything, and ends it whatever happens; the logs stay if a test failed."""
    corpus = Path(tempfile.mkdtemp(prefix="memory3-corpus-"))
    variables = {
        "MEMORY3_CORPUS": str(corpus),
        "MEMORY3_API_KEY": KEY,
        "MEMORY3_S3_ACCESS_KEY": "memory3",
        "MEMORY3_S3_SECRET_KEY": "a-secret-of-this-test-alone",
        "POSTGRES_PASSWORD": "word",
        "MEMORY3_CRON": "*/2 * * * *",
    }
    try:
        stack = Stack(variables)
    except MissingError as error:
        pytest.fail(str(error))  # nobody asks for this test by accident
    failed = request.session.testsfailed
    rows: list[Row] = []
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in stack.make_environment(stack.services["serve"]).items():
                if name.startswith(("AWS_", "XDG_")):
                    patch.setenv(name, value)
            site = Site(stack, corpus, rows)
            site.write_corpus(0)
            started = time.monotonic()
            stack.up()
            wait_until(site.serves_fact, "the first version is not served", 60)
            seconds = time.monotonic() - started
            rows.append(Row(event="none", stage="start", seconds=seconds, version=1, verified=site.verify()))
            yield site
    finally:
        has_failed = request.session.testsfailed > failed or not rows
        stack.close(keep_logs=has_failed)
        shutil.rmtree(corpus)
        print_table(rows)
        if has_failed:
            print(f"logs of all services: {stack.folder / 'logs'}")


def print_table(rows: list[Row]) -> None:
    """Prints what was shown."""
    print("\n\n| killed | while | seconds until the next good version | version | verify --deep |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.event} | {row.stage} | {row.seconds:.0f} | {row.version} | {row.verified} |")


@pytest.fixture
def reader(site: Site) -> Iterator[Reader]:
    """Reads as long as a test lasts; afterwards no answer may have been wrong."""
    reader = Reader(site)
    reader.start()
    yield reader
    reader.ended.set()
    reader.join()
    assert reader.wrong == []
    assert reader.versions == sorted(reader.versions)
    assert [len(names) for names in reader.facts.values()] == [1] * len(reader.facts)
    print(f"\n{len(reader.versions)} answers, {len(reader.refused)} refused {sorted(set(reader.refused))[:2]}")


def follow(site: Site, number: int, event: str, stage: str, break_it: Callable[[], None]) -> None:
    """Changes the corpus, breaks something during the update that follows by itself, and waits for a good version."""
    before = site.find_fact()["version"]
    site.write_corpus(number)
    break_it()
    seconds = wait_until(site.serves_fact, f"no version with {site.keeper}", GOOD_SECONDS)
    after = site.find_fact()["version"]
    assert after > before
    site.rows.append(Row(event=event, stage=stage, seconds=seconds, version=after, verified=site.verify()))


def await_work(site: Site, pattern: str) -> None:
    """Waits until a run has left a file of its workspace, and no longer."""
    wait_until(lambda: site.list_work(pattern), f"no run has left {pattern}", GOOD_SECONDS, pause=0.02)


def test_a_scheduled_update_builds_on_dask_and_is_served(site: Site, reader: Reader) -> None:
    prompt = FACT.format("").split("\n\n")[1].partition(" ,")[0]
    before, first = site.find_fact(), site.complete(prompt)
    follow(site, 1, "none", "update by schedule", lambda: None)
    found = site.find_fact()
    assert found["hits"][0]["ref_id"] != before["hits"][0]["ref_id"]
    second = site.complete(prompt)
    assert second["memory3"]["version"] == found["version"]
    read = {memory["ref_id"] for chunk in second["memory3"]["trace"] for memory in chunk["memories"]}
    assert found["hits"][0]["ref_id"] in read
    assert second["text"] != first["text"]
    print(f"\nbefore: {first['text']!r}\nafter:  {second['text']!r}")
    made = [run for run in site.list_runs() if run["name"].endswith(f" v{found['version']}")]
    assert [run["auto_scheduled"] for run in made] == [True]
    assert made[0]["work_pool_name"] == "nightly"
    assert "engine" in made[0]["parameters"]


def test_a_dask_worker_is_killed_while_memories_are_written(site: Site, reader: Reader) -> None:
    def kill() -> None:
        await_work(site, "unwritten/*.parquet")
        wait_until(lambda: site.find_busy_worker() is not None, "no worker has work", 60, pause=0.02)
        killed.append(site.find_busy_worker() or 0)
        site.stack.kill("dask-worker", killed[0])

    killed: list[int] = []
    follow(site, 2, "the Dask worker that works", "memories are written", kill)
    site.stack.start("dask-worker", killed[0])
    site.stack.wait("dask-worker", killed[0])


def test_the_prefect_worker_is_killed_with_its_run(site: Site, reader: Reader) -> None:
    def kill() -> None:
        await_work(site, "unwritten/*.parquet")
        site.stack.kill("prefect-worker")
        lost = [run["id"] for run in site.list_runs() if run["state_type"] == "RUNNING"]
        assert lost
        site.stack.start("prefect-worker")
        lost_runs.extend(lost)

    lost_runs: list[str] = []
    follow(site, 3, "the Prefect worker and its run", "memories are written", kill)
    states = [site.ask_prefect(f"/flow_runs/{run}")["state"] for run in lost_runs]
    assert [state["type"] for state in states] == ["CRASHED"] * len(states)


def test_the_object_store_is_killed_while_a_segment_is_published(site: Site, reader: Reader) -> None:
    def kill() -> None:
        await_work(site, "segment/*")
        site.stack.kill("object-store")
        time.sleep(10.0)
        site.stack.start("object-store")
        site.stack.wait("object-store")

    before = site.count_faults()
    follow(site, 4, "the object store, for 10 s", "a segment is published", kill)
    assert site.count_faults() > before  # somebody has met it
