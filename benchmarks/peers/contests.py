"""How the tools (:mod:`benchmarks.peers.tools`) are run on an input, in turn on one core, and measured."""

import dataclasses
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.peers.environments import PeerError, find_environment
from benchmarks.peers.prepare import Input
from benchmarks.peers.tools import Tool

HERE = Path(__file__).parent

THREAD_SETTINGS = ("OMP", "OPENBLAS", "MKL", "NUMBA", "RAYON")
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in THREAD_SETTINGS} | {
    "POLARS_MAX_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}
"""A process bound to one core still starts a thread a core of the machine, which only costs."""

Report = Callable[[str], None]


@dataclasses.dataclass(kw_only=True)
class Measurement:
    """What a tool cost on an input, over all rounds.

    Attributes:
        tool: the tool.
        source: the input.
        cpu_seconds: user and system time of each round.
        peak_mb: peak memory of each round.
        error: why there are no figures, "" if there are.
    """

    tool: Tool
    source: Input
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    peak_mb: list[float] = dataclasses.field(default_factory=list)
    error: str = ""

    @property
    def median_seconds(self) -> float:
        """The median of the CPU seconds."""
        return statistics.median(self.cpu_seconds)

    @property
    def median_peak_mb(self) -> float:
        """The median of the peaks."""
        return statistics.median(self.peak_mb)

    def describe(self) -> dict[str, object]:
        """Returns the figures as JSON has them."""
        return {
            "tool": self.tool.name,
            "input": self.source.name,
            "input_mb": round(self.source.size_mb, 3),
            "num_texts": len(self.source.texts),
            "cpu_seconds": self.cpu_seconds,
            "peak_mb": self.peak_mb,
            "error": self.error,
        }


class Arena:
    """Runs tools one after the other on one core and measures them."""

    def __init__(self, *, work: Path, peers: Path, core: int, report: Report) -> None:
        """Takes the place of the work.

        Args:
            work: folder for inputs and outputs.
            peers: folder of the peers' environments.
            core: the core that everything measured runs on.
            report: called with a line of progress.
        """
        self.work = work
        self.report = report
        self._peers = peers
        self._core = core
        self._pythons: dict[str, Path | str] = {}

    def _find_python(self, peer: str) -> Path | str:
        """Returns a peer's interpreter, or why there is none."""
        if not peer:
            return Path(sys.executable)
        if peer not in self._pythons:
            self.report(f"environment of {peer}")
            try:
                self._pythons[peer] = find_environment(peer, self._peers)
            except PeerError as error:
                self._pythons[peer] = f"not installed: {error}"
        return self._pythons[peer]

    def _make_command(self, tool: Tool) -> list[str]:
        python = self._find_python(tool.peer)
        if isinstance(python, str):
            raise PeerError(python)
        if not (HERE / tool.script).exists():
            raise PeerError(f"not measured: there is no {tool.script}")
        if tool.peer:
            return [str(python), str(HERE / tool.script)]
        return [str(python), "-m", f"benchmarks.peers.{tool.script.removesuffix('.py')}"]

    def run(self, tool: Tool, source: Input, measurement: Measurement | None = None) -> Path:
        """Runs a tool once.

        Args:
            tool: the tool.
            source: its input.
            measurement: gets the figures, if given.

        Returns:
            The folder of its output, which the tool's next run empties.

        Raises:
            PeerError: the tool is not there or failed.
        """
        command = self._make_command(tool)
        folder = self.work / "runs" / re.sub("[^a-z0-9]+", "-", tool.name.lower())
        shutil.rmtree(folder, ignore_errors=True)
        # A home of its own: datasets keeps the results of earlier runs there and would take them instead of working.
        environment = os.environ | ONE_THREAD | {"HF_HOME": str(folder / "home")}
        (folder / "home").mkdir(parents=True)
        output, log, costs_path = folder / "output", folder / "log.txt", folder / "costs.json"
        path = source.parquet if tool.reads == "parquet" else source.jsonl
        launcher = (sys.executable, "-S", str(HERE / "measure.py"))
        subprocess.run(
            [*launcher, str(costs_path), str(self._core), str(log), *command, *tool.arguments, str(path), str(output)],
            env=environment,
            check=True,
        )
        costs = json.loads(costs_path.read_text())
        if costs["status"]:
            lines = log.read_text(errors="replace").strip().splitlines() or ["nothing was printed"]
            raise PeerError(f"failed with {costs['status']}: {lines[-1][:200]} ({log})")
        if measurement:
            measurement.cpu_seconds.append(costs["cpu_seconds"])
            measurement.peak_mb.append(costs["peak_mb"])
        if tool.has_list:
            subprocess.run([*command, "--list", str(output)], env=environment, check=True, capture_output=True)
        return output

    def compete(self, pairs: Sequence[tuple[Tool, Input]], warm_up: Input, num_rounds: int) -> list[Measurement]:
        """Measures tools in turn, every round in another order, after an unmeasured run of each on a small input."""
        measurements = [Measurement(tool=tool, source=source) for tool, source in pairs]
        for tool in dict.fromkeys(tool for tool, _ in pairs):
            self.report(f"warming up {tool.name}")
            try:
                self.run(tool, warm_up)
            except PeerError as error:
                for measurement in measurements:
                    if measurement.tool == tool:
                        measurement.error = str(error)
        for turn in range(num_rounds):
            start = turn % len(measurements)
            for measurement in measurements[start:] + measurements[:start]:
                if measurement.error:
                    continue
                name = f"{measurement.tool.name} on {measurement.source.name}"
                self.report(f"round {turn + 1} of {num_rounds}: {name} ({measurement.source.size_mb:.0f} MB)")
                try:
                    self.run(measurement.tool, measurement.source, measurement)
                except PeerError as error:
                    measurement.error = str(error)
                    continue
                self.report(f"    {measurement.cpu_seconds[-1]:.2f} CPU seconds, {measurement.peak_mb[-1]:.0f} MB")
        return measurements


def read_removed(output: Path) -> set[str]:
    """Returns the ids a tool removed."""
    if (output / "removed.parquet").exists():
        return set(pq.read_table(output / "removed.parquet").column(0).to_pylist())
    return set((output / "removed.txt").read_text().splitlines())
