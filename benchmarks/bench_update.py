"""What an update costs beside a fresh build, and that the two are equal.

    python -m benchmarks.bench_update [--before OLD.jsonl.zst --after NEW.jsonl.zst] [--references 200000]

With two states of a corpus: the bank of the first is updated to the second and compared with a fresh build of the
second; what was cut and encoded is compared with what differs by an own count over the files and the tables. Without: a
corpus is made of sentences of Python's documentation, and one document in a hundred is changed. Every operation is a
process of its own through the command line; CPU seconds are those of the process and of all it started, the engine's
server too.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from flows.console import print_rows
from pipelines.formats import list_corpus_files
from pipelines.reading import read_records
from pipelines.records import RECORDS, ReadingConfig
from schemas.bank import Bank
from tests.bank_contents import assert_equal_banks, list_live

SENTENCES_PER_DOCUMENT = 2
"""So that a document is one reference: what an update costs a document counts most where documents are short."""


def run_command(*arguments: str) -> dict[str, Any]:
    """Runs a command and returns what it prints as JSON, with ``cpu`` and ``wall`` seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    command = [sys.executable, "-m", "flows.cli", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**json.loads(done.stdout), "cpu": cpu, "wall": time.monotonic() - started}


def _describe(name: str, result: dict[str, Any], fresh: dict[str, Any]) -> list[str]:
    changes = result["counts"].get("changes", {}) if not result["unchanged"] else {}
    documents, references = changes.get("documents", {}), changes.get("references", {})
    return [
        name,
        f"{documents.get('chunked', 0):,}",
        f"{references.get('encoded', 0):,}",
        f"{result['cpu']:.1f}",
        f"{result['wall']:.1f}",
        f"{result['cpu'] / fresh['cpu']:.1%}",
        f"{result['wall'] / fresh['wall']:.1%}",
    ]


COLUMNS = ["operation", "documents cut", "references encoded", "CPU s", "wall s", "CPU / fresh", "wall / fresh"]


def hash_texts(path: Path) -> set[str]:
    """Returns the distinct hashes of a corpus's texts."""
    batches = [batch for file in list_corpus_files([str(path)]) for batch in read_records(file, ReadingConfig())]
    records = pa.Table.from_batches(batches, RECORDS)
    return set(records.filter(pc.is_null(records["reason"]))["content_hash"].to_pylist())


def measure_corpus(before: Path, after: Path, folder: Path) -> None:
    """Updates a bank from one state of a corpus to another."""
    bank, fresh = str(folder / "bank"), str(folder / "fresh")
    run_command("build", "--corpus", str(before), "--bank", bank)
    live_before = list_live(Bank.open(bank))
    updated = run_command("update", "--corpus", str(after), "--bank", bank)
    built = run_command("build", "--corpus", str(after), "--bank", fresh)
    again = run_command("update", "--bank", bank)
    assert_equal_banks(Bank.open(bank), Bank.open(fresh))
    changes = updated["counts"]["changes"]
    texts = Bank.open(fresh).read_table("documents", ["content_hash"])["content_hash"].to_pylist()
    known = hash_texts(before)
    num_changed = sum(text not in known for text in texts)
    num_new = len(list_live(Bank.open(fresh)) - live_before)
    rows = [_describe(name, result, built) for name, result in (("update", updated), ("again", again))]
    print_rows(COLUMNS, [*rows, _describe("fresh build", built, built)], numeric=set(range(1, 7)))
    print(f"equal to the fresh build; documents of new content {num_changed}, cut {changes['documents']['chunked']}")
    print(f"references live for the first time {num_new}, encoded {changes['references']['encoded']}")


def make_sentences() -> list[str]:
    """Returns the sentences of Python's documentation."""
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    return [f"{part.strip()}." for part in text.split(". ") if 40 < len(part) < 240]


def write_corpus(path: Path, num_documents: int, changed: frozenset[int] = frozenset()) -> None:
    """Writes documents of random sentences, each the same in every run; those in ``changed`` of others."""
    sentences = make_sentences()
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_documents):
            draw = random.Random(f"{number} {number in changed}")
            words = [draw.choice(sentences) for _ in range(SENTENCES_PER_DOCUMENT)]
            # Numbers keep sentences that were drawn twice from being the same reference.
            text = " ".join(f"{sentence} ({draw.randrange(10**6)})" for sentence in words)
            file.write(json.dumps({"id": f"doc-{number:06d}", "text": text}) + "\n")


def measure_synthetic(num_references: int, folder: Path) -> None:
    """Changes one document in a hundred of a large bank."""
    corpus, bank = folder / "corpus.jsonl", str(folder / "bank")
    write_corpus(corpus, num_references)
    built = run_command("build", "--corpus", str(corpus), "--bank", bank)
    again = run_command("update", "--bank", bank)
    os.utime(corpus, (1, 1))
    touched = run_command("update", "--bank", bank)
    changed = frozenset(random.Random(0).sample(range(num_references), num_references // 100))
    write_corpus(corpus, num_references, changed)
    updated = run_command("update", "--bank", bank)
    results = [("again", again), ("touched files", touched), ("1 % changed", updated), ("fresh build", built)]
    print_rows(COLUMNS, [_describe(name, result, built) for name, result in results], numeric=set(range(1, 7)))
    kept = built["counts"]["references"]["kept"]
    print(f"{built['counts']['documents']['kept']:,} documents, {kept:,} references; {len(changed)} documents changed")
    print(f"SHA-256 of the corpus {hashlib.sha256(corpus.read_bytes()).hexdigest()[:16]}")


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--after", type=Path)
    parser.add_argument("--references", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="memory3-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.before and arguments.after:
            measure_corpus(arguments.before, arguments.after, folder)
        else:
            measure_synthetic(arguments.references, folder)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
