"""The commands that change a bank after it was built, look into its history, and read any of its versions."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import typer

from flows.building import build, update
from flows.cli import app, main
from flows.deleting import delete_documents
from flows.steps import Steps
from model.locating import SHIPPED_MODEL, find_checkpoint
from schemas.bank import Bank
from schemas.manifest import list_versions
from schemas.stores import LocalStore
from schemas.tags import list_tags, set_tag
from tests.bank_contents import assert_equal_banks, list_live
from tests.test_equality import make_config, write_corpus

FIRST = {"assert": topics["assert"], "global": topics["global"]}
SECOND = {**FIRST, "with": topics["with"]}
NUM_VERSIONS = 3


@dataclass(frozen=True)
class Done:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def value(self) -> Any:
        """What it printed as JSON."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        """The lines it printed."""
        assert self.code == 0, self.err
        return self.out.splitlines()


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """A bank that was built, updated with a document more, and had it deleted."""
    folder = tmp_path_factory.mktemp("grown")
    store = LocalStore(folder / "bank")
    build(store, [str(write_corpus(folder, FIRST))], make_config({}), Steps())
    write_corpus(folder, SECOND)
    update(store, None, {}, Steps())
    set_tag(store, "whole", 2)
    delete_documents(store, ["with"])
    return store


@pytest.fixture
def store(grown: LocalStore, tmp_path: Path) -> LocalStore:
    shutil.copytree(grown.path, tmp_path / "bank")
    return LocalStore(tmp_path / "bank")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs the command line in this process."""

    def run_command(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["memory3", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, captured.out, captured.err)

    before = signal.getsignal(signal.SIGINT)
    yield run_command
    signal.signal(signal.SIGINT, before)


def count_documents(run: Run, store: LocalStore, *options: str) -> int:
    rows = run("sql", "--bank", store.path, "select count(*) as number from documents", "--json", *options).value
    return int(rows[0]["number"])


def expect_error(done: Done) -> str:
    """Checks that a command ended with one line about what is wrong, and returns it."""
    assert done.code == 1
    *progress, error = done.err.splitlines()
    assert error.startswith("error: ")
    assert [line.strip() for line in progress] in ([], ["models"])
    return error


# History --------------------------------------------------------------------------------------------------------------


def test_log_lists_the_versions_the_newest_first(run: Run, grown: LocalStore) -> None:
    rows = [line.split() for line in run("log", "--bank", grown.path).lines if line[:10].strip()[:1].isdigit()]
    assert [(row[0], row[1]) for row in rows] == [("3", "delete"), ("2", "update"), ("1", "build")]
    assert rows[1][-1] == "whole"
    versions = run("log", "--bank", grown.path, "--json").value
    assert [(version["version"], version["operation"], version["tags"]) for version in versions] == [
        (1, "build", []),
        (2, "update", ["whole"]),
        (3, "delete", []),
    ]
    assert versions[1]["changes"]["documents"]["added"] == 1
    assert [version["num_documents"] for version in versions] == [2, 3, 2]


def test_diff_compares_with_the_version_before_or_any_other(run: Run, grown: LocalStore) -> None:
    lines = run("diff", "--bank", grown.path).lines
    assert lines[0] == "from version 2 to version 3"
    assert lines[3].split() == ["documents", "removed", "1", "with"]
    for versions, added, removed in (
        (["1", "2"], ["with"], []),
        (["whole", "v1"], [], ["with"]),
        (["-2", "-1"], ["with"], []),
        (["1"], [], []),
        (["-1"], [], ["with"]),
    ):
        value = run("diff", "--bank", grown.path, *versions, "--json").value
        assert (value["documents"]["added"], value["documents"]["removed"]) == (added, removed), versions
    assert "has no version or tag 'nothing'" in expect_error(run("diff", "--bank", grown.path, "nothing"))


@pytest.mark.parametrize("version", ["2", "whole", "-1"])
def test_rollback_makes_an_old_version_the_newest(version: str, run: Run, store: LocalStore) -> None:
    assert run("rollback", "--bank", store.path, version).lines == [
        f"{store.path} version 4 has the content of version 2"
    ]
    assert_equal_banks(Bank.open(store), Bank.open(store, 2))
    assert run("rollback", "--bank", store.path, "3", "--json").value == {"version": 5, "content_of": 3}
    assert "is the newest" in expect_error(run("rollback", "--bank", store.path, "5"))
    assert list_versions(store) == [1, 2, 3, 4, 5]


def test_tags_are_set_moved_listed_and_removed(run: Run, store: LocalStore) -> None:
    assert run("tag", "--bank", store.path).lines == ["whole  version 2"]
    assert run("tag", "--bank", store.path, "now", "--json").value == {"now": 3, "whole": 2}
    assert run("tag", "--bank", store.path, "first", "--at", "-2").lines[0] == "first  version 1"
    assert "give --move" in expect_error(run("tag", "--bank", store.path, "first", "--at", "2"))
    assert list_tags(store)["first"] == 1
    assert run("tag", "--bank", store.path, "first", "--at", "whole", "--move", "--json").value["first"] == 2
    assert run("tag", "--bank", store.path, "whole", "--remove", "--json").value == {"first": 2, "now": 3}
    assert "has no tag 'whole'" in expect_error(run("tag", "--bank", store.path, "whole", "--remove"))
    for options in (["--remove"], ["--move"], ["--at", "1"]):
        assert "give the name of the tag" in expect_error(run("tag", "--bank", store.path, *options))
    assert "reads as the number of a version" in expect_error(run("tag", "--bank", store.path, "7"))


def test_gc_says_what_would_go_and_removes_it(run: Run, store: LocalStore) -> None:
    (store.path / "segments" / "stray").mkdir()
    (store.path / "segments" / "stray" / "file").write_bytes(b"12345")
    planned = run("gc", "--bank", store.path, "--keep", "1", "--dry-run", "--json").value
    assert (planned["dry_run"], planned["versions"]) == (True, [1])
    assert "segments/stray/file" in planned["files"]
    assert list_versions(store) == [1, 2, 3]
    (line,) = run("gc", "--bank", store.path, "--keep", "1", "--dry-run").lines
    assert line.startswith(f"would be removed from {store.path}: versions 1, ")
    (line,) = run("gc", "--bank", store.path, "--keep", "1").lines
    assert line.startswith(f"removed from {store.path}: versions 1, ")
    assert list_versions(store) == [2, 3]  # one is tagged
    assert not (store.path / "segments" / "stray").exists()
    assert run("gc", "--bank", store.path, "--json").value["files"] == {}
    assert "keep is 0" in expect_error(run("gc", "--bank", store.path, "--keep", "0"))


# Reading any version --------------------------------------------------------------------------------------------------


def test_at_names_the_version_that_is_queried(run: Run, grown: LocalStore) -> None:
    assert count_documents(run, grown) == 2
    for at, number in (("1", 2), ("2", 3), ("v2", 3), ("whole", 3), ("-1", 3), ("-2", 2), ("3", 2)):
        assert count_documents(run, grown, "--at", at) == number, at
    for at in ("4", "0", "-3", "nothing"):
        assert f"{grown.path} has no version" in expect_error(
            run("sql", "--bank", grown.path, "select 1", "--at", at)
        ), at


def test_at_names_the_version_that_is_searched_shown_and_verified(run: Run, grown: LocalStore) -> None:
    query = topics["with"][:300]

    def search(*options: str) -> Any:
        return run("search", "--bank", grown.path, query, "--json", *options).value

    (best, *_) = search("--at", "whole")
    assert best["doc_id"] == "with"
    assert all(hit["doc_id"] != "with" for at in ((), ("--at", "1")) for hit in search(*at))
    shown = run("show", "--bank", grown.path, best["ref_id"], "--at", "-1", "--json").value
    assert [place["doc_id"] for place in shown["occurrences"]] == ["with"]
    assert any(token["num_heads"] for token in shown["tokens"])
    assert "has no reference" in expect_error(run("show", "--bank", grown.path, best["ref_id"], "--at", "1"))
    for at, version in (("-1", 2), ("whole", 2), ("1", 1)):
        lines = run("verify", "--bank", grown.path, "--at", at).lines
        assert lines[-1] == f"{grown.path} version {version} is sound"
    assert all(check["passed"] for check in run("verify", "--bank", grown.path, "--at", "2", "--json").value)


def test_generate_reads_a_version(run: Run, grown: LocalStore) -> None:
    prompt = topics["with"][:200]
    arguments = ("generate", "--bank", grown.path, "--prompt", prompt, "--max-new-tokens", "2", "--json")
    done = run(*arguments)
    ref_ids = {hit["ref_id"] for chunk in done.value["chunks"] for hit in chunk["hits"]}
    assert ref_ids <= list_live(Bank.open(grown))


# Changing -------------------------------------------------------------------------------------------------------------


def test_delete_says_what_would_change_and_does_it(run: Run, store: LocalStore) -> None:
    done = run("delete", "--bank", store.path, "--document", "global", "--dry-run")
    assert done.lines[0] == f"{store.path} version 3 would change:"
    assert "1 removed" in done.lines[1]
    preview = run("delete", "--bank", store.path, "--document", "global", "--dry-run", "--json").value
    assert list_versions(store) == [1, 2, 3]
    summary = run("delete", "--bank", store.path, "--document", "global", "--json").value
    assert (summary["version"], summary["operation"]) == (4, "delete")
    assert summary["counts"]["changes"] == preview["changes"]
    assert count_documents(run, store) == 1
    assert "has no document 'global'" in expect_error(run("delete", "--bank", store.path, "--document", "global"))
    assert "nothing would be left" in expect_error(run("delete", "--bank", store.path, "--document", "assert"))
    run("rollback", "--bank", store.path, "2")
    lines = run("delete", "--bank", store.path, "--document", "with", "--document", "global").lines
    assert lines[0] == f"{store.path} version 6"
    assert any(line.startswith("changes") and "2 removed" in line for line in lines)


def test_compact_says_when_there_is_nothing_to_do(run: Run, store: LocalStore) -> None:
    summary = run("compact", "--bank", store.path, "--json").value
    assert (summary["version"], summary["operation"], summary["unchanged"]) == (4, "compact", False)
    assert run("compact", "--bank", store.path, "--json").value["unchanged"]
    assert run("compact", "--bank", store.path).lines[0].startswith(f"{store.path} is up to date: version 4")


def test_purge_says_what_is_gone_and_what_was_searched(run: Run, store: LocalStore) -> None:
    num_gone = len(list_live(Bank.open(store, 2)) - list_live(Bank.open(store, 1)))
    lines = run("purge", "--bank", store.path).lines
    assert lines[0] == f"{store.path} version 4 is all that is left; versions removed: 1, 2, 3"
    assert lines[1] == "tags removed: whole"
    assert f", {num_gone} references forgotten" in lines[2]
    assert lines[-1].endswith("and the columns of all tables: no trace is left")
    value = run("purge", "--bank", store.path, "--document", "global", "--json").value
    assert (value["version"], value["removed_versions"], value["removed_tags"]) == (6, [4, 5], [])
    assert value["num_forgotten"] > 0
    assert "no version of bank" in expect_error(run("purge", "--bank", store.path, "--document", "nobody"))


def test_migrate_goes_as_far_as_it_is_told(run: Run, store: LocalStore, tmp_path: Path) -> None:
    model = tmp_path / "renamed-model"
    shutil.copytree(find_checkpoint(SHIPPED_MODEL), model)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 20_000.0
    (model / "config.json").write_text(json.dumps(config))
    live = sorted(list_live(Bank.open(store)))
    with (tmp_path / "uses.csv").open("w") as file:
        csv.writer(file).writerows([("ref_id", "count"), (live[-1], 2)])
    arguments = ("migrate", "--bank", store.path, "--model", model)
    assert run("migrate", "--bank", store.path, "--model", SHIPPED_MODEL, "--json").value["unchanged"]
    first = run(*arguments, "--first", "1", "--uses", tmp_path / "uses.csv", "--json").value
    assert first["counts"]["changes"]["references"] == {"encoded": 1, "not_encoded": len(live) - 1}
    assert Bank.open(store).read_table("memories", ["ref_id"])["ref_id"].to_pylist() == [live[-1]]
    lines = run(*arguments).lines
    assert any(line.startswith("changes") and f"{len(live) - 1} encoded" in line for line in lines)
    assert run(*arguments).lines[0].startswith(f"{store.path} is up to date: version 5")
    assert "cannot be read as Parquet or CSV" in expect_error(run(*arguments, "--uses", tmp_path / "none.csv"))
    assert "limit is -1" in expect_error(run(*arguments, "--first", "-1"))
    assert "nowhere" in expect_error(run("migrate", "--bank", store.path, "--model", "nowhere"))


# All commands ---------------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, list[str]] = {
    "update": [],
    "delete": ["--document", "x"],
    "purge": [],
    "compact": [],
    "migrate": ["--model", SHIPPED_MODEL],
    "log": [],
    "diff": [],
    "rollback": ["1"],
    "tag": ["name"],
    "gc": [],
    "sql": ["select 1"],
    "show": ["0123"],
    "search": ["words"],
    "verify": [],
}


@pytest.mark.parametrize("command", ARGUMENTS)
def test_where_there_is_no_bank_one_line_says_so_and_nothing_is_made(command: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        done = run(command, *ARGUMENTS[command], "--bank", tmp_path / name)
        assert str(tmp_path / name) in expect_error(done)
        assert done.out == ""
        done = run(command, *ARGUMENTS[command], "--bank", tmp_path / name, "--json")
        assert json.loads(done.out)["error"] == expect_error(done).removeprefix("error: ").rstrip()
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_every_command_says_how_it_is_used(run: Run) -> None:
    everything = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    groups = {name: everything[name].commands for name in ("bench", "codec", "deploy", "eval", "train")}
    commands = {name: command for name, command in everything.items() if name not in groups}
    assert set(ARGUMENTS) | {"build", "demo", "explore", "generate", "plan", "report", "serve", "serve-bank"} == set(
        commands
    )
    for group, members in groups.items():
        commands |= {f"{group} {name}": command for name, command in members.items()}
    for name, command in commands.items():
        done = run(*name.split(), "--help")
        assert done.code == 0
        assert f"Example: memory3 {name}" in done.out, name
        if name not in ("demo", "explore", "serve", "serve-bank") and not name.startswith("deploy "):
            assert "--json" in done.out, name
        if name in ("sql", "show", "search", "verify", "generate", "tag", "bench read", "codec train"):
            assert "--at" in done.out, name
        assert all(getattr(parameter, "help", "") for parameter in command.params), name
    listed = run("--help").out
    assert all(f"  {name} " in listed for name in everything)
    assert all(f"  {name} " in run(group, "--help").out for group, members in groups.items() for name in members)


def test_a_wrong_use_is_told_with_exit_code_2(run: Run, grown: LocalStore) -> None:
    for arguments in (["delete"], ["rollback"], ["log", "--nonsense"], ["gc", "--keep", "many"], ["nonsense"]):
        bank = [] if arguments == ["nonsense"] else ["--bank", grown.path]
        done = run(*arguments, *bank)
        assert (done.code, done.out) == (2, ""), arguments
        assert done.err.startswith("Usage: ")


# Update, by the engine ------------------------------------------------------------------------------------------------


def test_update_follows_the_corpus_as_a_flow(engine: None, store: LocalStore, tmp_path: Path) -> None:
    from flows.build import update_bank

    path = write_corpus(tmp_path, {"global": topics["global"], "pass": topics["pass"]})
    preview = update_bank([str(path)], str(store.path), dry_run=True)
    assert (preview["dry_run"], preview["version"]) == (True, 3)
    assert list_versions(store) == [1, 2, 3]
    summary = update_bank([str(path)], str(store.path))
    assert (summary["version"], summary["operation"]) == (4, "update")
    assert summary["counts"]["changes"] == preview["changes"]
    assert summary["counts"]["changes"]["documents"] == {
        "added": 1,
        "changed": 0,
        "removed": 1,
        "unchanged": 1,
        "chunked": 1,
    }
    bank = Bank.open(store)
    assert bank.read_table("documents")["doc_id"].to_pylist() == ["global", "pass"]
    assert bank.manifest.config["corpus"] == [str(path)]
    assert update_bank(None, str(store.path))["unchanged"]


def test_an_update_that_finds_nothing_new_starts_no_engine(run: Run, store: LocalStore) -> None:
    run("rollback", "--bank", store.path, "2")  # the deletion would be taken back
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "flows.cli", "update", "--bank", str(store.path), "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    summary = json.loads(done.stdout)
    assert (summary["version"], summary["unchanged"]) == (4, True)
    names = (line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:"))
    imported = {name.partition(".")[0] for name in names}
    assert "flows" in imported
    assert not {"prefect", "torch", "apache_beam", "transformers", "faiss"} & imported
    assert run("update", "--bank", store.path, "--dry-run").lines[0] == f"{store.path} version 4 would stay as it is"
