"""What is saved when a build is killed: ``python -m benchmarks.bench_resume``.

A build is killed with SIGKILL at random moments and started again. Every time it must end with the same bytes as a
build that nobody killed, and must not do again any unit of work that was finished; the table says how much of the work,
by units and by time, was there already. What is joined between two jobs (ids, rows, clusters: a few columns) is made
anew and not counted. A build that ended before it was to be killed does not count; another moment is drawn.

    python -m benchmarks.bench_resume [--kills 30] [--corpus PATH] [--documents 150] [--seed 1]
"""

import argparse
import contextlib
import hashlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson
from rich import box
from rich.console import Console
from rich.table import Table

from pipelines.python_docs import iterate_python_docs

POLL_SECONDS = 0.02
UNIT_FOLDERS = frozenset(
    {"records", "read", "chunks", "references", "signed", "pairs", "sets", "measured", "embeddings", "shards"}
)
"""The last folders of files that are units of work."""
CONFIG = "engine: {num_workers: 1}\nmemory: {references_per_shard: 128}\nreading: {batch_text_bytes: 65536}\n"


def hash_segments(bank: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file of the bank but the manifest, which tells the time of the build."""
    paths = sorted(path for path in (bank / "segments").rglob("*") if path.is_file())
    return {str(path.relative_to(bank)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def list_finished(work: Path) -> dict[str, int]:
    """Returns the finished files of a workspace with their inodes; a file that is written again gets another."""
    found = {}
    with contextlib.suppress(FileNotFoundError):  # the folder goes when the build commits
        for path in work.rglob("*"):
            if path.parent.name in UNIT_FOLDERS and path.suffix not in (".tmp", "") and path.is_file():
                found["/".join(path.parts[len(work.parts) + 1 :])] = path.stat().st_ino
    return found


@contextlib.contextmanager
def watch(work: Path) -> Iterator[dict[str, set[int]]]:
    """Collects every inode under which a file of the workspace is seen."""
    seen: dict[str, set[int]] = defaultdict(set)
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(POLL_SECONDS):
            for name, inode in list_finished(work).items():
                seen[name].add(inode)

    watcher = threading.Thread(target=poll, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


def start_build(corpus: Path, bank: Path, config: Path) -> "subprocess.Popen[bytes]":
    """Starts a build in a process group of its own, so that it can be killed as a whole."""
    command = [sys.executable, "-m", "flows.cli", "build", "--corpus", str(corpus), "--bank", str(bank)]
    return subprocess.Popen(
        [*command, "--config", str(config)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finish_build(corpus: Path, bank: Path, config: Path) -> float:
    """Builds to the end and returns the seconds."""
    started = time.monotonic()
    with start_build(corpus, bank, config) as process:
        if process.wait() != 0:
            raise SystemExit(f"error: the build of {bank} ended with exit code {process.returncode}")
    return time.monotonic() - started


def kill_build(corpus: Path, bank: Path, config: Path, seconds: float) -> bool:
    """Starts a build and kills it some seconds after its first file is finished; False if it ended before."""
    with start_build(corpus, bank, config) as process:
        while process.poll() is None and not list_finished(bank / "work"):
            time.sleep(POLL_SECONDS)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait() == -signal.SIGKILL


def measure_work(corpus: Path, bank: Path, config: Path) -> tuple[float, float, int]:
    """Builds once undisturbed: seconds in all, seconds from the first finished file to the end, number of files."""
    names: set[str] = set()
    first = 0.0
    started = time.monotonic()
    with start_build(corpus, bank, config) as process:
        while process.poll() is None:
            names |= set(list_finished(bank / "work"))
            first = first or (time.monotonic() if names else 0.0)
            time.sleep(POLL_SECONDS)
    return time.monotonic() - started, time.monotonic() - first, len(names)


def run(arguments: argparse.Namespace, folder: Path, console: Console) -> int:
    """Kills and resumes as often as asked, prints the table, and returns the number of runs that were not right."""
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    corpus = arguments.corpus
    if corpus is None:
        corpus = folder / "corpus.jsonl"
        documents = itertools.islice(iterate_python_docs(), arguments.documents)
        corpus.write_bytes(b"".join(orjson.dumps(document) + b"\n" for document in documents))
    fresh = folder / "fresh"
    whole_seconds, work_seconds, num_files = measure_work(corpus, fresh, config)
    expected = hash_segments(fresh)
    console.print(f"undisturbed: {whole_seconds:.1f} s, of which {work_seconds:.1f} s after the first finished file")

    generator = random.Random(arguments.seed)
    table = Table(box=box.SIMPLE, title="builds killed with SIGKILL and started again")
    for heading in (
        "kill at",
        "units there",
        "share",
        "done again",
        "time of the rest",
        "time saved",
        "bytes",
    ):
        table.add_column(heading, justify="right")
    shares: list[float] = []
    wrong = 0
    while len(shares) < arguments.kills:
        number = len(shares)
        bank = folder / f"killed-{number}"
        moment = generator.uniform(0, work_seconds)
        if not kill_build(corpus, bank, config, moment):
            shutil.rmtree(bank)
            continue
        there = list_finished(bank / "work")
        with watch(bank / "work") as seen:
            seconds = finish_build(corpus, bank, config)
        again = sorted(name for name, inode in there.items() if seen[name] - {inode})
        equal = hash_segments(bank) == expected
        wrong += bool(again) or not equal
        shares.append(len(there) / num_files)
        table.add_row(
            f"{moment:.1f} s",
            f"{len(there):,}/{num_files:,}",
            f"{shares[-1]:.0%}",
            ", ".join(again[:3]) or "none",
            f"{seconds:.1f} s",
            f"{1 - seconds / whole_seconds:.0%}",
            "equal" if equal else "DIFFERENT",
        )
        console.print(
            f"{number + 1}/{arguments.kills}: killed at {moment:.1f} s, {shares[-1]:.0%} there, {len(again)} again, "
            f"{'equal' if equal else 'DIFFERENT'}, {seconds:.1f} s"
        )
        shutil.rmtree(bank)
    console.print(table)
    console.print(f"{sum(shares) / len(shares):.0%} of the units were there on average; {wrong} runs were not right")
    return wrong


def main(given: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="how many builds to kill")
    parser.add_argument("--corpus", type=Path, help="corpus to build; Python's own documentation if not given")
    parser.add_argument("--documents", type=int, default=150, help="documents of it")
    parser.add_argument("--seed", type=int, default=1, help="seed of the moments")
    arguments = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        wrong = run(arguments, Path(folder), Console(width=120))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
