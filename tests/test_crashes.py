"""Wherever an operation ends, the bank is the old or the new version, and the same command makes up for it."""

import functools
import io
import itertools
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import bench_crashes
from benchmarks.bench_crashes import BEGINNINGS, OPERATIONS, RESULTS, list_strangers, read_content
from flows.collecting import collect, plan_collection
from flows.history import roll_back
from flows.workplace import list_abandoned
from schemas.bank import Bank
from schemas.manifest import list_versions
from schemas.stores import LocalStore
from tests.bank_contents import assert_equal_banks

pytestmark = pytest.mark.slow

DOCUMENT_CHARS = 500


class CrashError(BaseException):
    """The process is gone: not even an error that nobody foresaw is caught."""


class FragileStore(LocalStore):
    """A store whose process ends right after its n-th change, for 0 before the first.

    To remove several files is two changes, so that it ends with some of them gone.
    """

    def __init__(self, path: Path, num_changes: int) -> None:
        super().__init__(path)
        self._num_left = num_changes

    def _change(self, change: Callable[[], None]) -> None:
        if self._num_left == 0:
            raise CrashError
        change()
        self._num_left -= 1
        if self._num_left == 0:
            raise CrashError

    def create(self, name: str, content: bytes) -> None:
        self._change(lambda: super(FragileStore, self).create(name, content))

    def replace(self, name: str, content: bytes) -> None:
        self._change(lambda: super(FragileStore, self).replace(name, content))

    def publish(self, folder: Path, name: str) -> None:
        self._change(lambda: super(FragileStore, self).publish(folder, name))

    def remove(self, names: Iterable[str]) -> None:
        wanted = list(names)
        for some in (wanted[: len(wanted) // 2], wanted[len(wanted) // 2 :]):
            if some:
                self._change(functools.partial(super().remove, some))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs, the banks that operations begin with, and fresh builds of what they are to end with."""
    folder = tmp_path_factory.mktemp("crashes")
    bench_crashes.write_inputs(folder, 6, DOCUMENT_CHARS)
    bench_crashes.write_beginnings(folder / "beginnings")
    bench_crashes.write_results(folder / "results")
    return folder


def begin(name: str, folder: Path, place: Path) -> None:
    """Puts the bank that an operation begins with to a place."""
    shutil.rmtree(place, ignore_errors=True)
    if name in BEGINNINGS:
        shutil.copytree(folder / "beginnings" / BEGINNINGS[name], place)


def check_ended(name: str, folder: Path, place: Path, versions: list[int]) -> None:
    store = LocalStore(place)
    assert list_versions(store) == versions
    fresh = Bank.open(folder / "results" / RESULTS[name])
    assert_equal_banks(Bank.open(store), fresh, same_corpus=name != "purge")
    collect(store, plan_collection(store))
    assert list_strangers(store) == []


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "build"])
def test_a_crash_at_any_change_of_the_bank_leaves_the_old_or_the_new_version(
    folder: Path, tmp_path: Path, name: str
) -> None:
    place = tmp_path / "bank"
    begin(name, folder, place)
    old = list_versions(place)
    before = read_content(Bank.open(place)) if old else ""
    OPERATIONS[name](LocalStore(place), folder)
    expected = list_versions(place)
    after = read_content(Bank.open(place))
    check_ended(name, folder, place, expected)
    found = set()
    for num_changes in itertools.count():
        begin(name, folder, place)
        try:
            OPERATIONS[name](FragileStore(place, num_changes), folder)
        except CrashError:
            pass
        else:
            break
        versions = list_versions(place)
        assert all(Bank.open(place, version).is_complete() for version in versions)
        content = read_content(Bank.open(place)) if versions else ""
        assert content == (before if versions[-1:] == old[-1:] else after)
        found.add(content)
        OPERATIONS[name](LocalStore(place), folder)
        check_ended(name, folder, place, expected)
    assert found == {before, after}
    assert num_changes > 2


def test_what_a_killed_operation_has_left_is_kept_until_nobody_can_go_on_with_it(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "bank"
    begin("update", folder, place)
    store = LocalStore(place)
    with pytest.raises(CrashError):
        OPERATIONS["update"](FragileStore(place, 0), folder)
    kept = {path for path in place.rglob("shards/*") if path.is_file()}
    assert kept
    collect(store, plan_collection(store))
    assert list_abandoned(store) == []
    assert all(path.is_file() for path in kept)

    inodes = {path.stat().st_ino for path in kept}
    OPERATIONS["update"](store, folder)
    assert inodes <= {path.stat().st_ino for path in Bank.open(store).locate_all("shard")}

    with pytest.raises(CrashError):
        OPERATIONS["compact"](FragileStore(place, 0), folder)
    roll_back(store, 1)
    assert len(list_abandoned(store)) == 1
    done = collect(store, plan_collection(store))
    assert done.caches
    assert list_abandoned(store) == []
    assert list_strangers(store) == []


def test_a_segment_of_a_killed_compaction_is_not_written_to(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tables are files of the workspace under another name."""
    place = tmp_path / "bank"
    begin("compact", folder, place)
    before = set(place.glob("segments/*/*"))
    with pytest.raises(CrashError):
        OPERATIONS["compact"](FragileStore(place, 1), folder)
    contents = {path: path.read_bytes() for path in place.glob("segments/*/*")}
    assert contents.keys() > before

    def copy_some(_source: Path, target: Path) -> None:
        target.write_bytes(b"PAR1")
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copy_some)
        with pytest.raises(CrashError):
            OPERATIONS["compact"](LocalStore(place), folder)
    assert contents == {path: path.read_bytes() for path in contents}
    OPERATIONS["compact"](LocalStore(place), folder)
    check_ended("compact", folder, place, [1, 2, 3])


@pytest.mark.timeout(3600)
def test_two_kills_of_every_operation(tmp_path: Path) -> None:
    log = io.StringIO()
    names = list(OPERATIONS)
    assert bench_crashes.run(names, 2 * len(names), 7, tmp_path, Console(file=log, width=120)) == 0, log.getvalue()
