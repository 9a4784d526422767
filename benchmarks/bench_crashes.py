"""What is left when an operation on a bank is killed: ``python -m benchmarks.bench_crashes``.

Every operation runs in a process of its own on a copy of a bank, and is killed with SIGKILL at a random moment between
its first write and its end. Then the bank must open, at the old version or the new one, and be sound to the last byte;
what was opened before must be read as before; the same command must succeed, and leave the very files that it leaves
when nobody kills it, and the content of a fresh build; and a collection must leave nothing that no manifest names. An
operation that ended before it was to be killed does not count; another moment is drawn. Work saved is the share of the
CPU time of an undisturbed run that the same command did not need any more, the median of the kills before the commit.

    python -m benchmarks.bench_crashes [--kills 200] [--operations build update ...] [--seed 1] [--folder FOLDER]
"""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from flows.building import build, update
from flows.collecting import collect, plan_collection
from flows.compacting import compact_bank
from flows.config import BuildConfig, apply_changes
from flows.deleting import delete_documents
from flows.drafting import load_models
from flows.generation import open_writer
from flows.migrating import Migration, migrate_bank
from flows.purging import purge_bank
from flows.steps import Steps
from flows.verifying import verify_bank
from model.fetching import BankMemories
from model.locating import SHIPPED_MODEL, find_checkpoint
from pipelines.auditing import audit_hashes
from pipelines.python_docs import iterate_python_docs
from pipelines.running import LOOP_RUNNER
from schemas.bank import SEGMENTS_FOLDER, WORK_FOLDER, Bank
from schemas.errors import BankError
from schemas.manifest import list_versions, make_manifest_name
from schemas.stores import LocalStore
from schemas.tags import set_tag
from tests.bank_contents import assert_equal_banks, list_live, read_memories

NUM_DOCUMENTS = 8
DOCUMENT_CHARS = 1200
REFERENCES_PER_SHARD = 6

WAIT_SECONDS = 600
"""Time after which a process counts as hanging."""

CHANGING_EVENTS = frozenset({"os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate"})
WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT

IMPORTED = (
    "faiss",
    "flows.generation",
    "flows.migrating",
    "flows.purging",
    "flows.verifying",
    "model.embedding",
    "sentence_transformers",
    "transformers.models.llama.modeling_llama",
)
"""What the server that makes the processes imports once. It runs nothing, so that it has no threads when it forks."""


# What is killed -------------------------------------------------------------------------------------------------------


def make_config(model: str = SHIPPED_MODEL) -> BuildConfig:
    """Returns the settings of all banks: small shards, so that there is work to save, and short signatures."""
    changes = {
        "engine": {"runner": LOOP_RUNNER, "num_workers": 1},
        "memory": {"references_per_shard": REFERENCES_PER_SHARD, "model": model},
        "deduplication": {"num_permutations": 32, "num_bands": 8},
    }
    return apply_changes(BuildConfig(), changes)


def write_inputs(folder: Path, num_documents: int = NUM_DOCUMENTS, num_chars: int = DOCUMENT_CHARS) -> None:
    """Writes two corpora, ``old.jsonl`` and ``new.jsonl``, and another model."""
    taken = itertools.islice(iterate_python_docs(), num_documents + 3)
    documents = [
        {"id": f"d{number:02d}", "text": str(document["text"])[:num_chars]} for number, document in enumerate(taken)
    ]
    documents.append({"id": "copy", "text": documents[4]["text"].replace(" the ", " this ", 1)})
    changed = {**documents[2], "text": documents[2]["text"] + "\n\n" + documents[0]["text"][:400]}
    for name, chosen in (("old", documents[:num_documents]), ("new", [changed, *documents[3:]])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in chosen))
    write_other_model(folder / "model")


def write_other_model(folder: Path) -> None:
    """Writes the shipped model with one matrix changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(find_checkpoint(SHIPPED_MODEL), folder)
    weights = load_file(folder / "model.safetensors")
    name = min(name for name in weights if name.endswith("k_proj.weight"))
    weights[name] = weights[name] * 1.25
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def build_old(store: LocalStore, folder: Path) -> None:
    """Makes the first version."""
    build(store, [str(folder / "old.jsonl")], make_config(), Steps())


def update_to_new(store: LocalStore, folder: Path) -> None:
    """Makes the bank equal to the other corpus."""
    update(store, [str(folder / "new.jsonl")], {}, Steps())


OPERATIONS: dict[str, Callable[[LocalStore, Path], object]] = {
    "first build": build_old,
    "build": lambda store, folder: build(store, [str(folder / "new.jsonl")], make_config(), Steps()),
    "update": update_to_new,
    "compact": lambda store, _: compact_bank(store),
    "gc": lambda store, _: collect(store, plan_collection(store, keep=1)),
    "purge": lambda store, _: purge_bank(store, ["d05"]),
    "migrate": lambda store, folder: migrate_bank(store, Migration(model=str(folder / "model"))),
}


BEGINNINGS = {
    "build": "old",
    "update": "old",
    "migrate": "old",
    "compact": "new",
    "gc": "compacted",
    "purge": "deleted",
}
"""The bank of :func:`write_beginnings` that each operation begins with; a first build begins with none."""

RESULTS = {
    "first build": "old",
    "build": "new",
    "update": "new",
    "compact": "new",
    "gc": "new",
    "purge": "new without d04 d05",
    "migrate": "old by model",
}
"""The fresh build of :func:`write_results` that the bank is equal to after each operation."""


def write_beginnings(folder: Path) -> None:
    """Makes the banks that operations begin with."""
    folder.mkdir()
    build_old(LocalStore(folder / "old"), folder.parent)
    shutil.copytree(folder / "old", folder / "new")
    update_to_new(LocalStore(folder / "new"), folder.parent)
    shutil.copytree(folder / "new", folder / "compacted")
    compact_bank(LocalStore(folder / "compacted"))
    abandoned = folder / "compacted" / SEGMENTS_FOLDER / "abandoned" / "references.parquet"
    abandoned.parent.mkdir()
    abandoned.write_bytes(b"of a version that was never committed")
    shutil.copytree(folder / "new", folder / "deleted")
    set_tag(LocalStore(folder / "deleted"), "before", 1)
    delete_documents(LocalStore(folder / "deleted"), ["d04"])


def write_results(folder: Path) -> None:
    """Builds what banks must be equal to after operations."""
    folder.mkdir()
    for name in sorted(set(RESULTS.values())):
        corpus, _, change = name.partition(" ")
        path = folder.parent / f"{corpus}.jsonl"
        shutil.copy2(path, folder / "corpus.jsonl")
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["id"] not in change.split()))
        model = str(folder.parent / "model") if "model" in change else SHIPPED_MODEL
        build(LocalStore(folder / name), [str(path)], make_config(model), Steps())
        shutil.move(folder / "corpus.jsonl", path)  # with the time of its last change


# Processes ------------------------------------------------------------------------------------------------------------


def _is_write(event: str, arguments: Sequence[Any], place: str) -> bool:
    """Tells whether an audit event of Python changes something below a place."""
    if event == "open":
        return bool(arguments[2] & WRITING_FLAGS) and str(arguments[0]).startswith(place)
    return event in CHANGING_EVENTS and str(arguments[0]).startswith(place)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds, by the clock and of computing in this process."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Times":
        """Reads the clocks."""
        return cls(time.monotonic(), time.process_time())

    def __sub__(self, other: "Times") -> "Times":
        """Returns what has passed since."""
        return Times(self.wall - other.wall, self.cpu - other.cpu)


def run_operation(connection: Connection, name: str, bank: Path, folder: Path) -> None:
    """Runs an operation in this process, with its models loaded; sends when it begins to write, and then the times."""
    if name not in ("compact", "gc"):
        load_models(make_config())
    if name == "migrate":
        load_models(make_config(str(folder / "model")))
    started: Times | None = None

    def notice(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal started
        if not started and _is_write(event, arguments, str(bank)):
            started = Times.now()
            connection.send(None)

    sys.addaudithook(notice)
    OPERATIONS[name](LocalStore(bank), folder)
    ended = Times.now()
    connection.send(ended - started if started else ended - ended)


class Operation:
    """A process that runs one operation; to be ended by :meth:`finish` or :meth:`kill`."""

    def __init__(self, name: str, bank: Path, folder: Path) -> None:
        """Starts the process, and waits until it writes or has ended."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=run_operation, args=(theirs, name, bank, folder), daemon=True)
        self._process.start()
        theirs.close()
        self._spent = self._receive()

    def _receive(self) -> Times | None:
        """Returns the time the operation took, None if it is only beginning to write.

        Raises:
            BankError: the process failed or hangs.
        """
        try:
            if not self._connection.poll(WAIT_SECONDS):
                self._process.kill()
                raise BankError(f"hangs since {WAIT_SECONDS} seconds")
            spent: Times | None = self._connection.recv()
        except EOFError:
            self._process.join()
            raise BankError(f"ended with exit code {self._process.exitcode}") from None
        return spent

    def finish(self) -> Times:
        """Waits for the end and returns the time from the first write to it."""
        while self._spent is None:
            self._spent = self._receive()
        self._process.join()
        return self._spent

    def kill(self, seconds: float) -> bool:
        """Kills the process some seconds after its first write; False if it ended before."""
        if self._spent is None:
            self._connection.poll(seconds)
        self._process.kill()
        self._process.join()
        with contextlib.suppress(EOFError):  # nothing more was sent
            self._spent = self._connection.recv()
        return self._spent is None and self._process.exitcode == -signal.SIGKILL


# What must be so ------------------------------------------------------------------------------------------------------


def hash_content(bank: Bank, records: Mapping[str, bytes]) -> str:
    """Returns a digest of the documents, the live references and their memories."""
    documents = bank.read_table("documents", ["doc_id", "content_hash"]).to_pylist()
    digest = hashlib.sha256(json.dumps([documents, sorted(records)]).encode())
    for ref_id in sorted(records):
        digest.update(records[ref_id])
    return digest.hexdigest()


def read_content(bank: Bank) -> str:
    """Returns :func:`hash_content` of a bank by the plainest means."""
    records = read_memories(bank, list_live(bank))
    return hash_content(bank, {ref_id: record.tobytes() for ref_id, record in records.items()})


class Reader:
    """Somebody who has a version open."""

    def __init__(self, bank: Bank) -> None:
        """Opens all that is needed to read memories, and reads none."""
        self._bank = bank
        self._ref_ids = sorted(list_live(bank))
        self._memories = BankMemories(bank, open_writer(bank, bank.manifest.config["memory"]["model"]), cache_bytes=0)

    def read(self) -> str:
        """Returns :func:`hash_content` of the version.

        Raises:
            BankError: the version was removed, or is not what it was.
        """
        records = self._memories.fetch_records(self._ref_ids)
        found = zip(self._ref_ids, records, strict=True)
        return hash_content(self._bank, {ref_id: record.tobytes() for ref_id, record in found})


def list_strangers(store: LocalStore) -> list[str]:
    """Returns what no manifest names and every bank does without."""
    manifests = [Bank.open(store, version).manifest for version in list_versions(store)]
    known = {file.path for manifest in manifests for file in manifest.files}
    known |= {make_manifest_name(manifest.version) for manifest in manifests} | {"work/LOCK"}
    found = [name for name in store.list_files() if name not in known]
    folders = [path for name in (SEGMENTS_FOLDER, WORK_FOLDER) for path in (store.path / name).rglob("*")]
    empty = [path for path in folders if path.is_dir() and not any(path.iterdir())]
    return [name for name in found if not name.startswith(("tags/", "checks/"))] + [str(path) for path in empty]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """An operation on a bank, and what it leaves when nobody disturbs it.

    Attributes:
        name: the operation.
        folder: of the inputs.
        before: the bank before.
        after: the bank after.
        fresh: a fresh build of what is in it then.
        contents: content of each version, before and after.
        spent: time from its first write to its end.
    """

    name: str
    folder: Path
    before: Path
    after: Path
    fresh: Path
    contents: dict[int, str]
    spent: Times

    def copy(self, place: Path) -> None:
        """Copies the bank before to a place where nothing is."""
        if self.before.exists():
            shutil.copytree(self.before, place)

    def check_opened(self, bank: Path, readers: Mapping[int, Reader]) -> tuple[bool, list[str]]:
        """Looks at a bank that was left by a kill; returns whether it is at a new version, and what is wrong."""
        store = LocalStore(bank)
        old, versions = list_versions(self.before), list_versions(store)
        if not versions:
            return False, ["no version is left"] if old else []
        wrong = []
        newest = Bank.open(store)
        if read_content(newest) != self.contents[versions[-1]]:
            wrong.append(f"version {versions[-1]} has the content of neither version")
        failed = [f"{check.name}: {check.detail}" for check in verify_bank(newest, deep=True) if not check.passed]
        wrong += [f"verify: {finding}" for finding in failed]
        wrong += [f"version {number} lacks files" for number in versions if not Bank.open(store, number).is_complete()]
        for version, reader in readers.items():
            try:
                if reader.read() != self.contents[version]:
                    wrong.append(f"who had version {version} open reads something else")
            except BankError as error:
                if version in versions or "was removed while it was open" not in str(error):
                    wrong.append(f"who had version {version} open: {error}")
        return versions != old, wrong

    def check_repeated(self, bank: Path) -> list[str]:
        """Returns what is wrong with a bank on which the operation was repeated, before and after a collection."""
        store = LocalStore(bank)
        wrong = []
        if list_versions(store) != list_versions(self.after):
            wrong.append(f"has the versions {list_versions(store)} instead of {list_versions(self.after)}")
        found, expected = Bank.open(store), Bank.open(self.after)
        if found.manifest.files != expected.manifest.files:
            wrong.append("has other files than after an undisturbed run")
        try:
            assert_equal_banks(found, Bank.open(self.fresh), same_corpus=self.name != "purge")
        except AssertionError as error:
            wrong.append(f"differs from a fresh build: {error}")
        collect(store, plan_collection(store))
        left = plan_collection(store)
        if left.versions or left.tags or left.files or left.caches:
            wrong.append(f"a second collection would remove {left}")
        wrong += [f"nobody needs {name}" for name in list_strangers(store)]
        return wrong + audit_hashes(found).wrong


def make_scene(name: str, folder: Path) -> Scene:
    """Runs an operation undisturbed."""
    before = folder / "beginnings" / BEGINNINGS.get(name, "nothing")
    after, fresh = folder / "ends" / name, folder / "results" / RESULTS[name]
    if before.exists():
        shutil.copytree(before, after)
    spent = Operation(name, after, folder).finish()
    versions = {version: Bank.open(after, version) for version in list_versions(after)}
    versions |= {version: Bank.open(before, version) for version in list_versions(before)}
    contents = {version: read_content(bank) for version, bank in versions.items()}
    # What is committed on the way to the last version, before a purge's documents are forgotten, has its content.
    newest = max(versions)
    contents |= {version: contents[newest] for version in range(1, newest) if version not in versions}
    return Scene(name=name, folder=folder, before=before, after=after, fresh=fresh, contents=contents, spent=spent)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """What came of killing an operation once.

    Attributes:
        moment: seconds after its first write.
        is_new: whether the bank was at a new version.
        saved: share of the computing that the same command did not need any more.
        wrong: what was not as it must be.
    """

    moment: float
    is_new: bool
    saved: float
    wrong: list[str]


def kill_once(scene: Scene, bank: Path, draw: random.Random) -> Kill:
    """Kills an operation at a random moment, and looks at everything."""
    while True:
        shutil.rmtree(bank, ignore_errors=True)
        scene.copy(bank)
        readers = {version: Reader(Bank.open(bank, version)) for version in list_versions(bank)}
        moment = draw.uniform(0, scene.spent.wall)
        if Operation(scene.name, bank, scene.folder).kill(moment):
            break
    is_new, saved = False, 0.0
    try:
        is_new, wrong = scene.check_opened(bank, readers)
        saved = 1 - Operation(scene.name, bank, scene.folder).finish().cpu / scene.spent.cpu
        wrong += scene.check_repeated(bank)
    except BankError as error:
        wrong = [f"{type(error).__name__}: {error}"]
    return Kill(moment=moment, is_new=is_new, saved=saved, wrong=wrong)


# Figures --------------------------------------------------------------------------------------------------------------


def make_row(scene: Scene, kills: Sequence[Kill]) -> list[str]:
    """Returns the figures of one operation."""
    num_new = sum(kill.is_new for kill in kills)
    saved = [kill.saved for kill in kills if not kill.is_new]
    return [
        scene.name,
        f"{scene.spent.wall:.2f} s",
        str(len(kills)),
        f"{len(kills) - num_new} ({(len(kills) - num_new) / len(kills):.0%})",
        f"{num_new} ({num_new / len(kills):.0%})",
        f"{statistics.median(saved):.0%}" if saved else "",
        str(sum(bool(kill.wrong) for kill in kills)),
    ]


def run(names: Sequence[str], num_kills: int, seed: int, folder: Path, console: Console) -> int:
    """Kills operations in turn, prints the table, and returns the number of kills after which something was wrong."""
    draw = random.Random(seed)
    write_inputs(folder)
    write_beginnings(folder / "beginnings")
    write_results(folder / "results")
    scenes = {name: make_scene(name, folder) for name in names}
    kills: dict[str, list[Kill]] = {name: [] for name in names}
    for number, name in enumerate(itertools.islice(itertools.cycle(names), num_kills)):
        started = time.monotonic()
        kill = kill_once(scenes[name], folder / "killed", draw)
        kills[name].append(kill)
        console.print(
            f"{number + 1}/{num_kills}: {name} killed at {kill.moment:.2f} of {scenes[name].spent.wall:.2f} s, "
            f"{'new' if kill.is_new else 'old'} version, {'; '.join(kill.wrong) or 'all well'} "
            f"({time.monotonic() - started:.0f} s)",
            highlight=False,
            soft_wrap=True,
        )
        if kill.wrong:
            shutil.copytree(folder / "killed", folder / f"wrong-{number + 1}")
    table = Table(box=box.MARKDOWN, title=f"{num_kills} operations killed with SIGKILL, seed {seed}")
    for heading in ("operation", "undisturbed", "kills", "before the commit", "after", "work saved", "failures"):
        table.add_column(heading, justify="left" if heading == "operation" else "right")
    for name, scene in scenes.items():
        if kills[name]:
            table.add_row(*make_row(scene, kills[name]))
    console.print(table)
    num_wrong = sum(bool(kill.wrong) for some in kills.values() for kill in some)
    console.print(f"{num_kills - num_wrong} of {num_kills} banks were sound, and as if nobody had killed anything")
    return num_wrong


def main(given: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many operations to kill")
    parser.add_argument("--operations", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS))
    parser.add_argument("--seed", type=int, default=1, help="seed of the moments")
    parser.add_argument("--folder", type=Path, help="where to work; kept, with every bank that was not sound")
    arguments = parser.parse_args(given)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        wrong = run(arguments.operations, arguments.kills, arguments.seed, folder, Console(width=120))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
