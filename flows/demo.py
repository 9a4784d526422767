"""``make demo``: a bank of the Python documentation on this machine, three searches, generation, and losses.

One document in twenty is held out: the shipped model was not trained on it and the bank does not hold it. Their losses
without and with memory are printed, with random memories beside retrieved ones.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from flows.progress import choose_display, set_display, show_stage
from flows.splitting import is_held_out
from pipelines.python_docs import iterate_python_docs
from schemas.atomic import write_bytes_atomically

if TYPE_CHECKING:
    from flows.searching import FoundReference
    from model.evaluating import LossReport

QUERIES = (
    "how does the with statement call __enter__ and __exit__",
    "split a string at a separator",
    "compress data with zlib",
)

PROMPT = "The assert statement is a convenient way to insert debugging"

MAX_HELD_OUT_CHARS = 60_000
"""Held-out text that is scored: enough for a stable mean, little enough for a demo."""


def _list_long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) > 40}


def write_corpus(folder: Path) -> tuple[Path, list[str]]:
    """Writes the documents that are not held out as JSON lines; returns the file and the held-out texts.

    Modules copy docstrings from each other, so a held-out text counts only if none of its long lines stands in a
    document that is kept.
    """
    lines, held_out = [], []
    kept_lines: set[str] = set()
    for document in iterate_python_docs():
        if is_held_out(document["id"]):
            held_out.append(document["text"])
        else:
            lines.append(orjson.dumps(document) + b"\n")
            kept_lines |= _list_long_lines(document["text"])
    held_out = [text for text in held_out if kept_lines.isdisjoint(_list_long_lines(text))]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "python-docs.jsonl"
    content = b"".join(lines)
    if not path.is_file() or path.read_bytes() != content:
        write_bytes_atomically(path, content)
    return path, held_out


def choose_passages(texts: list[str]) -> list[str]:
    """Returns held-out texts, shortest first, up to a number of characters, so that many documents are scored."""
    chosen, num_chars = [], 0
    for text in sorted((text for text in texts if len(text) > 1000), key=len):
        if num_chars + len(text) > MAX_HELD_OUT_CHARS:
            break
        chosen.append(text)
        num_chars += len(text)
    return chosen


def get_cache_folder() -> Path:
    """Returns where the demo keeps its bank, by the conventions of the platform."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memory3" / "demo"


def _shorten_home(path: Path) -> str:
    """Writes a path as a shell would take it, short."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _drop_old_bank(bank: Path) -> None:
    """Removes the demo's bank of a release with another format on disk; it is made again."""
    from schemas.manifest import MANIFESTS_FOLDER, OLD_FORMATS, list_versions

    newest = list_versions(bank)[-1:]
    if newest:
        manifest = orjson.loads((bank / MANIFESTS_FOLDER / f"{newest[0]:08d}.json").read_bytes())
        if manifest.get("format") in OLD_FORMATS:
            shutil.rmtree(bank)


def run_demo(folder: Path | None, *, built: Callable[[], None]) -> None:
    """Builds, searches, generates and scores; see the module's docstring.

    Args:
        folder: where to put the bank; a cache folder if None.
        built: called when the build is over and nothing is left that must end in order.
    """
    started = time.monotonic()
    folder = folder or get_cache_folder()
    corpus, held_out = write_corpus(folder)
    bank_path = folder / "bank"
    if folder == get_cache_folder():
        _drop_old_bank(bank_path)
    shown = _shorten_home(bank_path)
    _heading(f"memory3 build --corpus {_shorten_home(corpus)} --bank {shown}")
    display = choose_display()
    set_display(display)
    try:
        with show_stage("engine"):
            from flows.config import preset_tiny
            from flows.engine import start_engine

            start_engine()
            from flows.build import build_bank
        summary = build_bank([str(corpus)], str(bank_path), preset_tiny().to_json())
    finally:
        display.close()
    built()
    from flows.console import print_hits, print_summary, print_traces
    from flows.generation import open_writer
    from flows.searching import describe_hits, open_retriever
    from model.evaluating import measure_losses
    from model.fetching import BankMemories
    from model.generating import GenerationConfig, Generator
    from schemas.bank import Bank

    print_summary(summary, shown)
    bank = Bank.open(bank_path)
    retriever = open_retriever(bank)
    hits: list[FoundReference] = []
    for query in QUERIES:
        _heading(f'memory3 search --bank {shown} "{query}" -k 2')
        hits = describe_hits(bank, retriever, query, 2)
        print_hits(hits)

    memories = BankMemories(bank, open_writer(bank, bank.manifest.config["memory"]["model"]))
    config = GenerationConfig(max_new_tokens=48, repetition_penalty=1.2)
    for option, generator in (
        ("--no-memory", Generator(memories.checkpoint)),
        (f"--bank {shown}", Generator(memories.checkpoint, retriever, memories)),
    ):
        _heading(f'memory3 generate --prompt "{PROMPT}" {option}')
        sys.stdout.write(PROMPT)
        for piece in generator.generate(PROMPT, config):
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        print()
    print_traces(generator.traces)

    _heading("loss of held-out documents, in nats a token: lower is better")
    set_display(display := choose_display())
    try:
        with show_stage("score"):
            report = measure_losses(memories.checkpoint, retriever, memories, choose_passages(held_out))
    finally:
        display.close()
    _print_report(report)
    print(f"\n{time.monotonic() - started:.0f} seconds in all; the bank is {shown}")


def _print_report(report: "LossReport") -> None:
    from flows.console import print_rows

    rows = [
        ["the ordinary model, no memory", f"{report.plain:.4f}", ""],
        ["5 random memories", f"{report.random:.4f}", f"{report.random - report.plain:+.4f}"],
        ["5 retrieved memories", f"{report.retrieved:.4f}", f"{report.retrieved - report.plain:+.4f}"],
    ]
    print_rows(["", "loss", "change"], rows, numeric={1, 2})
    scored = f"{report.num_tokens:,} tokens in {report.num_passages} passages"
    print(f"{scored} of documents that are neither in the bank nor in the training data")
