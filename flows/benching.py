"""What all benchmarks of ``memory3 bench`` share: rows of a table, fair timing, and on what machine it was.

Ratios are of works timed in turn in one process, so that a busy moment hits all alike; they carry over to other
machines, the rates beside them do not.
"""

import dataclasses
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One line of a benchmark.

    Attributes:
        name: what was measured.
        value: the figure, in ``unit``.
        unit: its unit.
        ratio: the speed as a share of that of ``against``; None where there is nothing to compare with.
        against: what it is compared with.
        note: what a reader should know.
    """

    name: str
    value: float
    unit: str
    ratio: float | None = None
    against: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchReport:
    """What one benchmark found.

    Attributes:
        title: what was measured, with which model.
        machine: where, see :func:`describe_machine`.
        rows: the figures.
    """

    title: str
    machine: dict[str, str]
    rows: list[BenchRow]


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """Returns what a figure depends on: processor, threads, device, versions, and the command."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {
        "processor": f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def profile_operations(work: Callable[[], object], num_operations: int = 8) -> list[BenchRow]:
    """Returns the operations of PyTorch in which most of the time of a work is spent, with their shares."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        work()
    spent = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in spent)
    return [
        BenchRow(
            name=f"  of it {event.key}",
            value=100 * event.self_cpu_time_total / total,
            unit="%",
            note=f"{event.count:,} calls",
        )
        for event in spent[:num_operations]
    ]


def synchronize() -> None:
    """Waits for what was given to an accelerator, if there is one: until then nothing has been measured."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_in_turn(
    works: Mapping[str, Callable[[], object]], num_rounds: int, *, prepare: Callable[[], None] | None = None
) -> dict[str, float]:
    """Returns the best seconds of each work over some rounds, in each of which every work is done once.

    Every round begins with another work, since a machine may be faster after a rest.

    Args:
        works: what is timed, by name.
        num_rounds: how often.
        prepare: done before each round, and not timed.
    """
    best = dict.fromkeys(works, float("inf"))
    names = list(works)
    for place in range(num_rounds):
        if prepare is not None:
            prepare()
        first = place % len(names)
        for name in names[first:] + names[:first]:
            synchronize()
            started = time.perf_counter()
            works[name]()
            synchronize()
            best[name] = min(best[name], time.perf_counter() - started)
    return best
