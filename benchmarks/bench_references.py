"""What corpus to references costs beside the peers, and how exact it is: ``make bench-references``.

    python -m benchmarks.bench_references [--only documents,quality] [--sample 64] [--json FILE] [--quick]

Whole processes on one core, from the file that is read to the file that is written, imports included; every tool in the
environment of its own that its pinned packages are installed to on first use. Tools take turns on the same input.
README.md in this folder says what is compared and how to read it.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.peers.contests import Arena, Measurement, read_removed
from benchmarks.peers.environments import PeerError
from benchmarks.peers.prepare import CORPORA, Input, Text, read_corpora, read_references, sample_texts, write_input
from benchmarks.peers.tables import Row, show_rows
from benchmarks.peers.tools import (
    DOCUMENT_PEERS,
    OUR_BEAM,
    OUR_CHUNKING,
    OUR_DOCUMENTS,
    OUR_LOOP,
    OUR_REFERENCES,
    OURS,
    REFERENCE_PEERS,
    TOKENIZERS,
    Tool,
)
from benchmarks.peers.truth import Quality, Rows, find_true_pairs, score_removals

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path.home() / ".cache" / "memory3"

STEPS = ("documents", "references", "chunking", "beam", "quality", "growth")
QUICK_MB = 2.0

QUALITY_CORPORA = ("psdocs", "laws")
"""Compared each as a whole; a quarter of them joins the others in the mix."""

MIN_QUALITY = 0.99
MAX_CPU_GROWTH, MAX_MEMORY_GROWTH, GROWTH = 4.4, 2.5, 4
MAX_BEAM = 1.3


def _measure_mb(texts: Sequence[Text]) -> float:
    return sum(text.size_bytes for text in texts) / 1e6


def _find_rows(source: Input, removed: set[str]) -> list[int]:
    rows = [row for row, text in enumerate(source.texts) if text.id in removed]
    if len(rows) < len(removed):
        raise PeerError(f"removed {len(removed)} texts, of which {len(removed) - len(rows)} are not in the input")
    return rows


class Benchmark:
    """The steps of the benchmark over one choice of data."""

    def __init__(
        self, arena: Arena, corpora: dict[str, list[Text]], *, sample_mb: float, num_rounds: int, with_peers: bool
    ) -> None:
        """Takes the data.

        Args:
            arena: runs the tools.
            corpora: the documents by corpus.
            sample_mb: megabytes that slow peers get, 0 for everything.
            num_rounds: measured rounds.
            with_peers: False leaves the peers out.
        """
        self._arena = arena
        self._corpora = corpora
        self._sample_mb = sample_mb
        self._num_rounds = num_rounds
        self._with_peers = with_peers
        self._chunks: Path | None = None
        self.rows: list[Row] = []
        self.measurements: list[dict[str, object]] = []

    @property
    def _documents(self) -> list[Text]:
        return [text for texts in self._corpora.values() for text in texts]

    @property
    def _sampled(self) -> list[Text]:
        """The documents that slow peers get."""
        return sample_texts(self._documents, self._sample_mb)

    def _write(self, name: str, texts: Sequence[Text]) -> Input:
        return write_input(name, texts, self._arena.work / "inputs")

    def _compete(self, step: str, pairs: Sequence[tuple[Tool, Input]], warm_up: Input) -> list[Measurement]:
        measurements = self._arena.compete(pairs, warm_up, self._num_rounds)
        self.measurements += [{"step": step, **measurement.describe()} for measurement in measurements]
        return measurements

    def _race(
        self, step: str, texts: Sequence[Text], sampled: Sequence[Text], ours: Tool, peers: Sequence[Tool]
    ) -> None:
        """Compares one step's tools, the fast ones on all texts, this project and the slow ones on the sample."""
        whole = self._write(f"{step}, all", texts)
        sample = whole if len(sampled) == len(texts) else self._write(f"{step}, sample", sampled)
        warm_up = self._write(f"{step}, warm-up", sample_texts(texts, QUICK_MB / 2))
        pairs = [(ours, whole)] if whole is sample else [(ours, whole), (ours, sample)]
        pairs += [(peer, sample if peer.is_slow else whole) for peer in peers if self._with_peers]
        measurements = self._compete(step, pairs, warm_up)
        own = {measurement.source.name: measurement for measurement in measurements if measurement.tool == ours}
        for measurement in measurements:
            self.rows.append(self._make_speed_row(step, measurement, own[measurement.source.name]))

    def _make_speed_row(self, step: str, measurement: Measurement, own: Measurement) -> Row:
        tool, source = measurement.tool, measurement.source
        name = f"{source.name.rpartition(', ')[2]}, {source.size_mb:.1f} MB"
        target = f"{tool.target:g}" if tool.target else ""
        if measurement.error or own.error:
            missed = False if tool.target or measurement is own else None
            why = measurement.error or f"no figure of {OURS}"
            return Row(table=step, cells=(tool.name, name, why, "", "", "", target), is_met=missed)
        seconds = measurement.cpu_seconds
        ratio = measurement.median_seconds / own.median_seconds
        cells = (
            tool.name,
            name,
            f"{measurement.median_seconds:.2f} ({min(seconds):.2f}-{max(seconds):.2f})",
            f"{source.size_mb / measurement.median_seconds:.2f}",
            f"{measurement.median_peak_mb:.0f}",
            "" if measurement is own else f"{ratio:.1f}",
            target,
        )
        return Row(table=step, cells=cells, is_met=ratio >= tool.target if tool.target else None)

    def compare_documents(self) -> None:
        """Near-duplicate removal of documents."""
        self._race("documents", self._documents, self._sampled, OUR_DOCUMENTS, DOCUMENT_PEERS)

    def compare_references(self) -> None:
        """Near-duplicate removal of references; the sample has those of the sampled documents."""
        whole, sample = (self._list_references(documents) for documents in (self._documents, self._sampled))
        self._race("references", whole, sample, OUR_REFERENCES, REFERENCE_PEERS)

    def compare_chunking(self) -> None:
        """Chunking to spans, beside the peer's tokens and offsets alone."""
        self._race("chunking", self._documents, self._sampled, OUR_CHUNKING, (TOKENIZERS,))

    def _list_references(self, documents: Sequence[Text]) -> list[Text]:
        """Returns the references of some of the documents; all documents are cut when this is first asked for."""
        if self._chunks is None:
            self._arena.report("cutting the documents into references")
            output = self._arena.run(OUR_CHUNKING, self._write("chunking, all", self._documents))
            self._chunks = (output / "chunks.parquet").replace(self._arena.work / "inputs" / "chunks.parquet")
        return read_references(self._chunks, documents)

    def compare_beam(self) -> None:
        """Corpus to references through Beam, beside the same functions in a plain loop."""
        whole = self._write("corpus, all", self._documents)
        warm_up = self._write("corpus, warm-up", sample_texts(self._documents, QUICK_MB / 2))
        beam, loop = self._compete("beam", [(OUR_BEAM, whole), (OUR_LOOP, whole)], warm_up)
        if error := beam.error or loop.error:
            self.rows.append(Row(table="beam", cells=("CPU", error, "", "", f"{MAX_BEAM}"), is_met=False))
            return
        ratio = beam.median_seconds / loop.median_seconds
        cells = ("CPU", f"{loop.median_seconds:.2f} s", f"{beam.median_seconds:.2f} s", f"{ratio:.2f}", f"{MAX_BEAM}")
        self.rows.append(Row(table="beam", cells=cells, is_met=ratio <= MAX_BEAM))

    def compare_quality(self) -> None:
        """Precision and recall of what each tool removes."""
        mix = [
            text
            for name, texts in self._corpora.items()
            for text in (sample_texts(texts, _measure_mb(texts) / 4) if name in QUALITY_CORPORA else texts)
        ]
        sets = {name: texts for name, texts in self._corpora.items() if name in QUALITY_CORPORA}
        for name, texts in (*sets.items(), ("mix", mix)):
            source = self._write(f"quality, {name}", sample_texts(texts, self._sample_mb))
            pairs = self._find_truth(source)
            for tool in (OUR_DOCUMENTS, *(peer for peer in DOCUMENT_PEERS if peer.is_complete and self._with_peers)):
                self._arena.report(f"{tool.name} on {source.name}")
                try:
                    rows = _find_rows(source, read_removed(self._arena.run(tool, source)))
                except PeerError as error:
                    cells = (name, tool.name, str(error), "", "", "")
                    self.rows.append(Row(table="quality", cells=cells, is_met=False if tool.name == OURS else None))
                    continue
                self._add_quality(source, tool, score_removals(pairs, len(source.texts), rows))

    def _add_quality(self, source: Input, tool: Tool, quality: Quality) -> None:
        name = f"{source.name.rpartition(', ')[2]}, {len(source.texts):,} documents, {source.size_mb:.1f} MB"
        figures = (f"{quality.precision:.4f}", f"{quality.recall:.4f}")
        is_ours = tool.name == OURS
        cells = (name, tool.name, str(quality.num_removed), *figures, f"{MIN_QUALITY}" if is_ours else "")
        is_met = min(quality.precision, quality.recall) >= MIN_QUALITY if is_ours else None
        self.rows.append(Row(table="quality", cells=cells, is_met=is_met))
        figures_of = {"input": source.name, "tool": tool.name, **dataclasses.asdict(quality)}
        self.measurements.append({"step": "quality", **figures_of})

    def _find_truth(self, source: Input) -> Rows:
        """Returns the true pairs, which are worked out once for an input and kept."""
        path = self._arena.work / "truth" / f"{source.digest}.npy"
        if not path.exists():
            self._arena.report(f"comparing all pairs of {source.name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, find_true_pairs([text.text for text in source.texts]))
        pairs: Rows = np.load(path)
        return pairs

    def compare_growth(self) -> None:
        """What four times the text costs."""
        documents = [text for texts in self._corpora.values() for text in texts[::GROWTH]]
        self._grow("documents", documents, self._documents, OUR_DOCUMENTS)
        quarter, whole = (self._list_references(chosen) for chosen in (documents, self._documents))
        self._grow("references", quarter, whole, OUR_REFERENCES)
        self._grow("corpus to references", documents, self._documents, OUR_BEAM)

    def _grow(self, name: str, quarter: Sequence[Text], whole: Sequence[Text], tool: Tool) -> None:
        inputs = self._write(f"growth of {name}, a quarter", quarter), self._write(f"growth of {name}, all", whole)
        warm_up = self._write(f"growth of {name}, warm-up", sample_texts(quarter, QUICK_MB / 2))
        small, large = self._compete("growth", [(tool, source) for source in inputs], warm_up)
        size = f"{inputs[0].size_mb:.1f} to {inputs[1].size_mb:.1f} MB"
        for unit, bound in (("CPU", MAX_CPU_GROWTH), ("peak memory", MAX_MEMORY_GROWTH)):
            if error := small.error or large.error:
                self.rows.append(Row(table="growth", cells=(name, size, unit, error, "", f"{bound}"), is_met=False))
                continue
            first, last = (
                measurement.median_seconds if unit == "CPU" else measurement.median_peak_mb
                for measurement in (small, large)
            )
            symbol = "s" if unit == "CPU" else "MB"
            cells = (name, size, unit, f"{first:.2f} to {last:.2f} {symbol}", f"{last / first:.2f}", f"{bound}")
            self.rows.append(Row(table="growth", cells=cells, is_met=last / first <= bound))


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the corpora")
    parser.add_argument("--peers", type=Path, default=CACHE / "peers", help="folder of the peers' environments")
    parser.add_argument("--work", type=Path, default=CACHE / "bench", help="folder for inputs and outputs")
    parser.add_argument("--sample", type=float, default=64.0, metavar="MB", help="text for slow peers, 0 for all")
    parser.add_argument("--repeat", type=int, default=3, help="measured rounds")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="the core to run on")
    parser.add_argument("--only", default=",".join(STEPS), help=f"steps, of {','.join(STEPS)}")
    parser.add_argument("--corpora", default=",".join(CORPORA), help=f"which of {','.join(CORPORA)}")
    parser.add_argument("--ours-only", action="store_true", help="leave the peers out")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_MB:g} MB and one round, to see that all works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    arguments = parser.parse_args()
    for name, known in (("only", STEPS), ("corpora", CORPORA)):
        chosen = getattr(arguments, name).split(",")
        if unknown := set(chosen) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))}, must be among {', '.join(known)}")
        setattr(arguments, name, chosen)
    if arguments.repeat < 1 or arguments.sample < 0:
        parser.error(f"--repeat is {arguments.repeat}, must be at least 1; --sample is {arguments.sample}, at least 0")
    return arguments


def main() -> None:
    """Measures and prints the tables."""
    arguments = parse_arguments()
    console, progress, started = Console(), Console(stderr=True), time.monotonic()
    if not console.is_terminal:
        console.width = 132  # of a file or a pipe rich knows no width
    missing = [name for name in arguments.corpora if not (arguments.data / f"{name}.jsonl.zst").exists()]
    if missing:
        console.print(f"skipped: {arguments.data} has no {', '.join(missing)}; name the folder of corpora with --data")
        return

    def report(line: str) -> None:
        progress.print(f"{time.monotonic() - started:7.1f}s {line}", highlight=False, markup=False, soft_wrap=True)

    corpora = read_corpora(arguments.data, arguments.corpora)
    if arguments.quick:
        corpora = {name: sample_texts(texts, QUICK_MB / len(corpora)) for name, texts in corpora.items()}
    arena = Arena(
        work=arguments.work.resolve(),
        peers=arguments.peers.resolve(),
        core=arguments.core,
        report=report,
    )
    rounds = 1 if arguments.quick else arguments.repeat
    benchmark = Benchmark(
        arena, corpora, sample_mb=arguments.sample, num_rounds=rounds, with_peers=not arguments.ours_only
    )
    for step in STEPS:
        if step in arguments.only:
            try:
                getattr(benchmark, f"compare_{step}")()
            except PeerError as error:  # the references are not there
                benchmark.rows.append(Row(table=step, cells=(OURS, str(error)), is_met=False))
    rows = [dataclasses.replace(row, is_met=None) for row in benchmark.rows] if arguments.quick else benchmark.rows
    show_rows(rows, console)
    if arguments.json:
        figures = {
            "python": sys.version.split()[0],
            "rounds": rounds,
            "sample_mb": arguments.sample,
            "corpora": arguments.corpora,
            "rows": [dataclasses.asdict(row) for row in rows],
            "measurements": benchmark.measurements,
        }
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
