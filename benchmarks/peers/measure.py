"""Runs one command on one core and writes what it cost: the CPU seconds and the peak memory of the whole process.

A process of its own, and a small one: the kernel counts towards a program's peak memory what the process that started
it had resident, so the benchmark, which holds the corpus, must not start the programs itself.

    python measure.py REPORT.json CORE LOG COMMAND...

The report has ``status`` (0 for success, negative for a signal), ``cpu_seconds`` (user and system, of the command and
of the children it waited for), ``wall_seconds`` and ``peak_mb`` (the largest of these processes).
"""

import json
import os
import sys
import time


def run_command(core: int, log: str, command: list[str]) -> dict[str, float]:
    """Runs a command bound to a core, its output in a log, and returns the report."""
    started = time.monotonic()
    process = os.fork()
    if not process:
        try:
            os.sched_setaffinity(0, {core})
            with open("/proc/self/oom_score_adj", "w") as score:
                score.write("1000")  # if memory runs out, this is what has to go
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.execvp(command[0], command)
        finally:
            os._exit(127)
    _, status, usage = os.wait4(process, 0)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "wall_seconds": time.monotonic() - started,
        "peak_mb": usage.ru_maxrss * 1024 / 1e6,
    }


def main() -> None:
    """Runs the command of the command line."""
    report, core, log, *command = sys.argv[1:]
    costs = run_command(int(core), log, command)
    with open(report, "w") as stream:
        json.dump(costs, stream)


if __name__ == "__main__":
    main()
