"""Two writers at once, readers meanwhile, and a full disk: nobody loses anything, and nobody sees half of it."""

import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from benchmarks import bench_crashes
from benchmarks.bench_crashes import BEGINNINGS, OPERATIONS, RESULTS, list_strangers, make_config, read_content
from flows.building import build, update
from flows.collecting import collect, plan_collection
from flows.compacting import compact_bank
from flows.config import apply_changes
from flows.steps import Steps
from flows.verifying import verify_bank
from model.fetching import BankMemories
from model.loading import load_writer
from pipelines.indexing import write_index
from pipelines.running import EMBEDDED_RUNNER
from schemas.bank import Bank
from schemas.errors import BankFormatError, ConflictError, StorageFullError
from schemas.manifest import list_versions
from schemas.stores import FULL as FULL_ERRORS
from schemas.stores import LocalStore
from tests.bank_contents import assert_equal_banks, list_live

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

FULL = "^no space is left on the device of .*: free some space and run the same command again$"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs, the banks that operations begin with, and fresh builds of what they are to end with."""
    folder = tmp_path_factory.mktemp("writers")
    bench_crashes.write_inputs(folder, 6, 500)
    bench_crashes.write_beginnings(folder / "beginnings")
    bench_crashes.write_results(folder / "results")
    return folder


@pytest.fixture
def place(folder: Path, tmp_path: Path) -> Path:
    """A bank of one version, of the old corpus."""
    shutil.copytree(folder / "beginnings" / "old", tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture
def third(folder: Path, tmp_path: Path) -> Path:
    """A third corpus: half of each of the two others."""
    lines = [line for name in ("old", "new") for line in (folder / f"{name}.jsonl").read_text().splitlines()[1::2]]
    (tmp_path / "third.jsonl").write_text("".join(f"{line}\n" for line in dict.fromkeys(lines)))
    return tmp_path / "third.jsonl"


def update_to(store: LocalStore, corpus: Path) -> int:
    """Updates a bank and returns the number of its newest version."""
    version: int = update(store, [str(corpus)], {}, Steps())["version"]
    return version


def check_equal_to_fresh(bank: Bank, corpus: Path, fresh: Path) -> None:
    build(LocalStore(fresh), [str(corpus)], make_config(), Steps())
    assert_equal_banks(bank, Bank.open(fresh))
    assert all(check.passed for check in verify_bank(bank, deep=True))


# Two writers ----------------------------------------------------------------------------------------------------------

UPDATING = """
import sys
from pathlib import Path
from benchmarks.bench_crashes import update_to_new
from schemas.stores import LocalStore

class WaitingStore(LocalStore):
    def publish(self, folder, name):
        print("publishes", flush=True)
        sys.stdin.readline()
        super().publish(folder, name)

update_to_new(WaitingStore(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("is_killed", [False, True])
def test_who_comes_second_is_told_and_succeeds_later(
    folder: Path, place: Path, third: Path, tmp_path: Path, is_killed: bool
) -> None:
    command = [sys.executable, "-c", UPDATING, str(place), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdin
        assert other.stdout
        assert other.stdout.readline() == "publishes\n"
        finished = {path.stat().st_ino for path in place.glob("work/*/shards/*")}
        assert finished
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        store = LocalStore(place)
        operations: list[Callable[[], object]] = [
            lambda: update_to(store, third),
            lambda: update_to(store, folder / "new.jsonl"),
            lambda: build(store, [str(third)], make_config(), Steps()),
            lambda: OPERATIONS["purge"](store, folder),
            lambda: collect(store, plan_collection(store, keep=1)),
        ]
        for operation in operations:
            with pytest.raises(ConflictError, match="^another process is writing to .*; nothing was changed; wait for"):
                operation()
        assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        if is_killed:
            other.send_signal(signal.SIGKILL)
        else:
            other.stdin.write("\n")
            other.stdin.flush()
        assert other.wait() == (-signal.SIGKILL if is_killed else 0)
    assert list_versions(place) == ([1] if is_killed else [1, 2])
    if is_killed:  # whoever runs the same command has what is finished
        assert update_to(store, folder / "new.jsonl") == 2
        assert finished <= {path.stat().st_ino for path in Bank.open(place).locate_all("shard")}
    assert update_to(store, third) == 3
    check_equal_to_fresh(Bank.open(place), third, tmp_path / "fresh")
    assert_equal_banks(Bank.open(place, 2), Bank.open(folder / "results" / "new"))


class DistantStore(LocalStore):
    """A bank as another machine sees it, whose lock is nobody else's; it can be held up before it commits."""

    def __init__(self, path: Path, scratch: Path, *, moment: str = "", wait: Callable[[], object] = int) -> None:
        super().__init__(path)
        self._scratch = scratch
        self._moment = moment
        self._wait = wait

    @property
    def scratch(self) -> Path:
        return self._scratch

    def _pass(self, moment: str) -> None:
        if moment == self._moment:
            self._moment = ""
            self._wait()

    def publish(self, folder: Path, name: str) -> None:
        self._pass("publish")
        super().publish(folder, name)

    def create(self, name: str, content: bytes) -> None:
        self._pass("create")
        super().create(name, content)


LOST = "^version 2 of bank .* was committed by somebody else meanwhile; run again$"


@pytest.mark.parametrize("moment", ["publish", "create"])
@pytest.mark.parametrize("is_same", [False, True])
def test_of_two_writers_without_a_common_lock_the_first_wins(
    folder: Path, place: Path, third: Path, tmp_path: Path, moment: str, is_same: bool
) -> None:
    mine, theirs = (folder / "new.jsonl" if is_same else third), folder / "new.jsonl"
    other = DistantStore(place, tmp_path / "other")
    store = DistantStore(place, tmp_path / "mine", moment=moment, wait=lambda: update_to(other, theirs))
    with pytest.raises(ConflictError, match=LOST):
        update_to(store, mine)
    assert list_versions(place) == [1, 2]
    assert not list((tmp_path / "other").glob("work/*/shards/*"))
    assert list((tmp_path / "mine").glob("work/*/shards/*"))
    assert_equal_banks(Bank.open(place), Bank.open(folder / "results" / "new"))
    assert all(check.passed for check in verify_bank(Bank.open(place), deep=True))

    assert update_to(store, mine) == (2 if is_same else 3)
    check_equal_to_fresh(Bank.open(place), mine, tmp_path / "fresh")
    collect(store, plan_collection(store))
    assert not [path for path in (tmp_path / "mine" / "work").rglob("*") if path.name != "LOCK"]
    assert list_strangers(LocalStore(place)) == []


def test_of_two_writers_that_commit_at_once_one_wins(folder: Path, place: Path, third: Path, tmp_path: Path) -> None:
    both = threading.Barrier(2)
    outcomes: dict[Path, int | ConflictError] = {}

    def write(corpus: Path) -> None:
        store = DistantStore(place, tmp_path / corpus.stem, moment="create", wait=lambda: both.wait(300))
        try:
            outcomes[corpus] = update_to(store, corpus)
        except ConflictError as error:
            outcomes[corpus] = error

    threads = [threading.Thread(target=write, args=(corpus,)) for corpus in (third, folder / "new.jsonl")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list_versions(place) == [1, 2]
    assert {type(outcome) for outcome in outcomes.values()} == {int, ConflictError}
    winner, loser = sorted(outcomes, key=lambda corpus: isinstance(outcomes[corpus], ConflictError))
    check_equal_to_fresh(Bank.open(place), winner, tmp_path / "fresh-2")
    assert update_to(DistantStore(place, tmp_path / loser.stem), loser) == 3
    check_equal_to_fresh(Bank.open(place), loser, tmp_path / "fresh-3")
    check_equal_to_fresh(Bank.open(place, 2), winner, tmp_path / "fresh-2")


# Readers meanwhile ----------------------------------------------------------------------------------------------------

GONE = ("was removed while it was open", "has no version")
"""What is said of a version that a collection has removed since it was listed."""


def read_newest(place: Path, open_memories: Callable[[Bank], BankMemories]) -> int:
    """Reads a little of everything of the newest version, and returns its number."""
    bank = Bank.open(place)
    counts = bank.manifest.counts
    assert len(bank.read_table("documents", ["doc_id"])) == counts["documents"]["kept"]
    assert len(bank.read_table("occurrences", ["doc_id"])) == counts["references"]["read"]
    live = sorted(list_live(bank))
    assert len(live) == counts["references"]["kept"]
    chosen = live[:: max(1, len(live) // 3)]
    assert len(open_memories(bank).fetch_records(chosen)) == len(chosen)
    texts = bank.read_references(chosen, ["text"])["text"]
    assert pc.all(pc.greater(pc.utf8_length(texts), 0)).as_py()
    return bank.manifest.version


def test_readers_see_whole_versions_while_others_write(folder: Path, place: Path) -> None:
    ended = threading.Event()
    seen: Counter[int] = Counter()
    num_gone = 0
    failures: list[BaseException] = []

    def read() -> None:
        nonlocal num_gone
        writer = load_writer()
        while not ended.is_set():
            try:
                seen[read_newest(place, lambda bank: BankMemories(bank, writer, cache_bytes=0))] += 1
            except BankFormatError as error:
                if not any(text in str(error) for text in GONE):
                    failures.append(error)
                num_gone += 1
            except BaseException as error:
                failures.append(error)
                raise

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        store = LocalStore(place)
        for _ in range(2):
            for corpus in ("new", "old"):
                update_to(store, folder / f"{corpus}.jsonl")
                compact_bank(store)
                collect(store, plan_collection(store, keep=1))
    finally:
        ended.set()
        for reader in readers:
            reader.join()
    assert failures == []
    assert len(seen) > 3
    assert sum(seen.values()) > num_gone
    assert list_versions(place) == [9]
    assert_equal_banks(Bank.open(place), Bank.open(folder / "results" / "old"))


# A full disk ----------------------------------------------------------------------------------------------------------


def limit_files(size_bytes: int, action: Callable[[], object]) -> None:
    """Calls an action while no file of this process may grow beyond a size: the disk is full for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def check_sound(place: Path, contents: dict[int, str]) -> None:
    assert list_versions(place) == list(contents)
    for version, content in contents.items():
        bank = Bank.open(place, version)
        assert read_content(bank) == content
        assert all(check.passed for check in verify_bank(bank, deep=False))


@pytest.mark.parametrize("name", ["first build", "update", "compact", "migrate"])
def test_files_that_cannot_be_written_leave_an_intact_bank(folder: Path, tmp_path: Path, name: str) -> None:
    place, once = tmp_path / "bank", tmp_path / "once"
    for path in (place, once):
        if name in BEGINNINGS:
            shutil.copytree(folder / "beginnings" / BEGINNINGS[name], path)
    contents = {version: read_content(Bank.open(place, version)) for version in list_versions(place)}
    OPERATIONS[name](LocalStore(once), folder)
    written = {path for path in once.glob("segments/*/*") if not (place / path.relative_to(once)).exists()}
    largest = max(path.stat().st_size for path in written)
    for limit in (0, 1, 400, largest // 2, largest - 1):
        with pytest.raises(StorageFullError, match=FULL) as caught:
            limit_files(limit, lambda: OPERATIONS[name](LocalStore(place), folder))
        assert str(caught.value).count("\n") == 0
        check_sound(place, contents)
    OPERATIONS[name](LocalStore(place), folder)
    assert_equal_banks(Bank.open(place), Bank.open(folder / "results" / RESULTS[name]))
    collect(LocalStore(place), plan_collection(LocalStore(place)))
    assert list_strangers(LocalStore(place)) == []


@pytest.mark.parametrize("size_bytes", [0, 40, 5_000, 20_000])
def test_an_index_that_cannot_be_written_is_an_error_of_the_disk(tmp_path: Path, size_bytes: int) -> None:
    vectors = np.eye(64, 80, dtype=np.float32)  # 20 480 bytes and a header
    with pytest.raises(OSError, match="File too large") as caught:
        limit_files(size_bytes, lambda: write_index(vectors, tmp_path / "index.faiss"))
    assert caught.value.errno in FULL_ERRORS
    assert list(tmp_path.iterdir()) == []
    write_index(vectors, tmp_path / "index.faiss")
    assert (tmp_path / "index.faiss").stat().st_size > 20_480


def test_a_disk_that_is_full_for_many_workers_is_one_error(folder: Path, tmp_path: Path) -> None:
    config = apply_changes(make_config(), {"engine": {"runner": EMBEDDED_RUNNER, "num_workers": 2}})
    corpus = [str(folder / "old.jsonl")]
    for limit in (300, 4000, 30_000):
        with pytest.raises(StorageFullError, match=FULL):
            limit_files(limit, lambda: build(LocalStore(tmp_path / "bank"), corpus, config, Steps()))
    build(LocalStore(tmp_path / "bank"), corpus, config, Steps())
    assert_equal_banks(Bank.open(tmp_path / "bank"), Bank.open(folder / "results" / "old"))


FILLING = """
import shutil, subprocess, sys
from pathlib import Path
from benchmarks.bench_crashes import BEGINNINGS, OPERATIONS, RESULTS, list_strangers, read_content
from flows.collecting import collect, plan_collection
from flows.verifying import verify_bank
from schemas.bank import Bank
from schemas.errors import StorageFullError
from schemas.manifest import list_versions
from schemas.stores import LocalStore
from tests.bank_contents import assert_equal_banks

disk, folder, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
place, filler = disk / "bank", disk / "filler"

def fill(num_free):
    '''Leaves so many bytes on the disk.'''
    size = shutil.disk_usage(disk).free - num_free
    with filler.open("ab") as file:
        while size > 0:
            size -= file.write(bytes(min(size, 1 << 16)))

def check(contents):
    assert list_versions(place) == list(contents)
    for version, content in contents.items():
        assert read_content(Bank.open(place, version)) == content
    if contents:
        assert all(check.passed for check in verify_bank(Bank.open(place), deep=True))

def run_command(name):
    corpus = str(folder / ("old.jsonl" if name == "build" else "new.jsonl"))
    arguments = {"compact": [], "build": ["--corpus", corpus], "update": ["--corpus", corpus]}[name]
    command = [sys.executable, "-m", "flows.cli", name, "--bank", str(place), "--json", *arguments]
    return subprocess.run(command, capture_output=True, text=True)

for name in names:
    if name not in OPERATIONS:
        continue
    num_full = 0
    for num_kilobytes in (0, 4, 24, 100, 300):
        if name in BEGINNINGS:
            shutil.copytree(folder / "beginnings" / BEGINNINGS[name], place)
        contents = {version: read_content(Bank.open(place, version)) for version in list_versions(place)}
        fill(num_kilobytes << 10)
        try:
            OPERATIONS[name](LocalStore(place), folder)
        except StorageFullError as error:
            num_full += 1
            assert str(error).startswith("no space is left on the device of "), error
            check(contents)
        filler.unlink()
        OPERATIONS[name](LocalStore(place), folder)
        assert_equal_banks(Bank.open(place), Bank.open(folder / "results" / RESULTS[name]))
        collect(LocalStore(place), plan_collection(LocalStore(place)))
        assert not (strangers := list_strangers(LocalStore(place))), (name, num_kilobytes, strangers)
        shutil.rmtree(place)
    assert num_full >= 4, num_full
for name in names:
    if not name.startswith("memory3 "):
        continue
    name = name.removeprefix("memory3 ")
    if name != "build":
        shutil.copytree(folder / "beginnings" / BEGINNINGS[name], place)
    contents = {version: read_content(Bank.open(place, version)) for version in list_versions(place)}
    fill(40 << 10)
    done = run_command(name)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if "no space is left" in line]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: no space is left on the device of "), errors
    assert done.stderr.splitlines()[-1] == errors[0]
    check(contents)
    filler.unlink()
    done = run_command(name)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(place)
print("done")
"""


def run_on_a_small_disk(folder: Path, tmp_path: Path, *names: str) -> None:
    """Runs operations, and then commands, on a file system of a few megabytes that is nobody else's."""
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=8m none "$1" || exit 77; shift; exec "$@"'
    python = [sys.executable, "-c", textwrap.dedent(FILLING), str(tmp_path / "disk"), str(folder), *names]
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(tmp_path / "disk")]
    try:
        done = subprocess.run([*command, *python], capture_output=True, text=True, check=False, cwd=ROOT)
    except FileNotFoundError:
        pytest.skip("unshare is missing")
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("no file system may be mounted here")
    assert done.stdout == "done\n", done.stderr


def test_a_small_disk_that_runs_full_leaves_an_intact_bank(folder: Path, tmp_path: Path) -> None:
    run_on_a_small_disk(folder, tmp_path, "first build", "update", "compact", "memory3 compact")


@pytest.mark.timeout(1800)
def test_a_small_disk_that_runs_full_under_the_engine(engine: None, folder: Path, tmp_path: Path) -> None:
    run_on_a_small_disk(folder, tmp_path, "memory3 build", "memory3 update")
