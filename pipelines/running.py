"""How a stage runs on Beam: linear jobs over units of work, each with one source and one sink.

A unit is the atom of work, of retry and of resume: a function reads its input file, computes on whole columns and
writes one output file atomically. An output that exists is complete, and its unit is never done again. Jobs hand over
through files. This form gives identical results on every runner; side inputs, tagged outputs and several sinks do not:
they are silently wrong on Beam's DaskRunner. Nor is anything grouped by Beam, whose embedded runner would hold a whole
shuffle in memory: a stage writes its rows parted and sorted, and each unit of the next reads its part of every file.
"""

import dataclasses
import logging
import os
import pickle
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from schemas.errors import BankError, InputError, StoppedError, StorageFullError
from schemas.stores import FULL

if TYPE_CHECKING:
    import apache_beam as beam

T = TypeVar("T")

EMBEDDED_RUNNER = "FnApiRunner"
"""Beam's in-process runner. Named explicitly, because ``DirectRunner`` first tries to download another engine."""


LOOP_RUNNER = "loop"
"""No engine: the units one after the other in the calling thread. For debugging, and to measure an engine against."""

DASK_RUNNER, PORTABLE_RUNNER = "dask", "portable"

BEAM_RUNNERS = {
    DASK_RUNNER: "apache_beam.runners.dask.dask_runner.DaskRunner",
    PORTABLE_RUNNER: "apache_beam.runners.portability.portable_runner.PortableRunner",
}
"""Short names of Beam's runners on other machines."""

ADDRESS_OPTIONS = ("dask_client_address", "job_endpoint")
"""Options that say where an engine is. Beam waits for ever for one that is not there, so it is called first."""

DASK_PARTITIONS = ("dask_partition_size", "dask_npartitions")
"""Options that say how many units a Dask worker takes at once."""

EMBEDDED_JOBS = "embed"
"""Where Beam starts a job service by itself."""

CONNECT_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where and how wide a job runs.

    Attributes:
        runner: ``dask``, ``portable``, another Beam runner's name, or ``loop``. Workers elsewhere must see corpus
            and workspace at the same paths.
        num_workers: threads of the embedded runner; by default one a core.
        options: further pipeline options as ``name=value``, such as ``dask_client_address=tcp://scheduler:8786``.
    """

    runner: str = EMBEDDED_RUNNER
    num_workers: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: fewer than one worker, or an option without a name.
        """
        if self.num_workers < 1:
            raise InputError(f"engine: num_workers is {self.num_workers}, must be at least 1")
        # Older banks name their options as on a command line.
        object.__setattr__(self, "options", tuple(option.removeprefix("--") for option in self.options))
        for option in self.options:
            if not re.fullmatch(r"[a-z]\w*(=.*)?", option):
                raise InputError(f"engine: option is {option!r}, must be name=value, as job_endpoint=localhost:8099")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """One unit of work.

    Attributes:
        source: the file it reads.
        part: a part of that file, for instance a row group; 0 where the whole file is meant.
        target: the file it writes.
        first_row: number of its first row among the rows of all units, where that matters.
    """

    source: Path
    target: Path
    part: int = 0
    first_row: int = 0


_stop = threading.Event()
_failures: list[BankError] = []
_idle = threading.Condition()
_num_working = 0
_loaded: dict[bytes, Any] = {}
_loading = threading.Lock()


def load_once(factory: Callable[[], T]) -> T:
    """Returns what a picklable factory makes, made once a process: all threads and units share a model."""
    key = pickle.dumps(factory)
    with _loading:
        if key not in _loaded:
            _loaded[key] = factory()
        result: T = _loaded[key]
    return result


def request_stop() -> None:
    """Asks jobs of this process to end after the units they are at; finished units are kept."""
    _stop.set()


def clear_stop() -> None:
    """Takes :func:`request_stop` back, before a new run."""
    _stop.clear()


def is_stopping() -> bool:
    """Tells a unit of several steps whether a stop was asked for: it ends after the step it is at."""
    return _stop.is_set()


def check_stop() -> None:
    """Ends the caller if a stop was asked for.

    Raises:
        StoppedError: it was.
    """
    if _stop.is_set():
        raise StoppedError("stopped; finished work is kept, and the same command goes on from there")


@contextmanager
def _work() -> Iterator[None]:
    """Counts the work of this process that is under way, and remembers its known errors.

    Beam hands on no more of an error than its traceback as text, and does not wait for the other workers.
    """
    global _num_working
    with _idle:
        _num_working += 1
    try:
        yield
    except BankError as error:
        _failures.append(error)
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        full = StorageFullError(
            "no space is left on the device of the bank; nothing was committed and finished work is kept: "
            "free some space and run the same command again"
        )
        _failures.append(full)
        raise full from error
    finally:
        with _idle:
            _num_working -= 1
            _idle.notify_all()


def _wait_until_idle() -> None:
    """Waits for the units under way: a process that ends under a thread in native code is aborted."""
    with _idle:
        _idle.wait_for(lambda: _num_working == 0)


def _process_unit(unit: Unit, process: Callable[[Unit], None], is_here: bool) -> None:
    """Processes a unit; where this is the process that runs the pipeline, known errors are only remembered."""
    if _stop.is_set() or (is_here and _failures) or unit.target.exists():
        return
    try:
        with _work():
            process(unit)
    except BankError:
        if not is_here:
            raise


def check_runner(engine: EngineConfig) -> None:
    """Makes sure that Beam knows the runner and that its engine answers, before anything else is done.

    Raises:
        InputError: it does not.
    """
    if engine.runner in (LOOP_RUNNER, EMBEDDED_RUNNER):
        return
    import apache_beam as beam

    try:
        beam.runners.runner.create_runner(BEAM_RUNNERS.get(engine.runner, engine.runner))
    except (ValueError, AttributeError, ImportError, TypeError) as error:
        raise InputError(
            f"engine: there is no runner {engine.runner!r}; use {EMBEDDED_RUNNER}, {', '.join(BEAM_RUNNERS)} or "
            f"another of Apache Beam's: {error}"
        ) from error
    for option in engine.options:
        name, _, address = option.partition("=")
        if name in ADDRESS_OPTIONS and address != EMBEDDED_JOBS:
            _call(address)


def _call(address: str) -> None:
    """Makes sure that somebody listens at an address, with or without a scheme.

    Raises:
        InputError: nobody does.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"engine: the address {address!r} must be host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(f"engine: nothing answers at {address}: {error}") from error


def _run(label: str, engine: EngineConfig, wire: "Callable[[beam.Pipeline], object]") -> None:
    """Runs a pipeline to its end; a stop or a known error is raised as such, whatever Beam made of it.

    After a stop, or a known error in this process, the remaining units pass through undone: Beam would print an error
    with its traceback, and wait for ever if that cannot be printed, as on a full disk.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    options = [f"--job_name={label}", *(f"--{option}" for option in engine.options)]
    runner: str | beam.runners.runner.PipelineRunner = BEAM_RUNNERS.get(engine.runner, engine.runner)
    if engine.runner == EMBEDDED_RUNNER:
        from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

        runner = FnApiRunner()
        # What fails in this process is raised in this process; Beam's own log would show it a second time.
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
        options += ["--direct_running_mode=multi_threading", f"--direct_num_workers={engine.num_workers}"]
    elif engine.runner == DASK_RUNNER and not any(option.startswith(DASK_PARTITIONS) for option in engine.options):
        # A unit is much work: by default Beam would give 128 of them to one worker.
        options.append("--dask_partition_size=1")
    _failures.clear()
    try:
        with beam.Pipeline(runner=runner, options=PipelineOptions(options)) as pipeline:
            wire(pipeline)
    except RuntimeError:
        _wait_until_idle()
        check_stop()
        if _failures:
            raise _failures[0] from None
        raise
    check_stop()
    if _failures:
        raise _failures[0]


def run_units(label: str, units: Sequence[Unit], process: Callable[[Unit], None], engine: EngineConfig) -> None:
    """Runs ``process`` on every unit whose target does not exist yet.

    Args:
        label: name of the job.
        units: what to do.
        process: a picklable function that reads a unit's source and writes its target atomically.
        engine: where to run.

    Raises:
        StoppedError: a stop was asked for.
    """
    open_units = [unit for unit in units if not unit.target.exists()]
    if engine.runner == LOOP_RUNNER:
        for unit in open_units:
            check_stop()
            process(unit)
    elif open_units:
        import apache_beam as beam

        is_here = engine.runner == EMBEDDED_RUNNER
        do = beam.Map(_process_unit, process, is_here)
        _run(label, engine, lambda p: p | "Units" >> beam.Create(open_units) | "Do" >> do)
