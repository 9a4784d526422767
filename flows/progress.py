"""Progress of a run: stages with a bar, a rate and the time left.

A stage's progress is read off the files it has finished, so it is true for every engine, for a resumed run, and for
work done by other processes. On a terminal it is a live bar; elsewhere a line now and then.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

POLL_SECONDS = 0.25
LINE_SECONDS = 5.0


class Display(Protocol):
    """Where progress is shown."""

    def start(self, stage: str, total: int, item: str) -> None:
        """Begins a stage of ``total`` items (0: unknown)."""
        ...

    def update(self, done: int) -> None:
        """Shows how many items are done."""
        ...

    def finish(self, done: int) -> None:
        """Ends the stage."""
        ...

    def close(self) -> None:
        """Gives the terminal back."""
        ...


class SilentDisplay:
    """Shows nothing; the default for a flow that nobody watches."""

    def start(self, stage: str, total: int, item: str) -> None:
        """Does nothing."""

    def update(self, done: int) -> None:
        """Does nothing."""

    def finish(self, done: int) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def _format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_rate(rate: float) -> str:
    """Returns a rate with two digits at least, so that what takes seconds a piece does not read as standing still."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


class RunningStage:
    """A stage: its name, how far it is, and how fast it goes."""

    def __init__(self, name: str, total: int, item: str) -> None:
        """Begins a stage of ``total`` items (0: unknown)."""
        self.name, self.total, self.item = name, total, item
        self.started = time.monotonic()
        self.first: int | None = None

    def describe(self, done: int) -> tuple[str, str]:
        """Returns the rate and the time left, empty where they cannot be known yet.

        What was there when the stage began, from an earlier run, does not count as speed.
        """
        if self.first is None:
            self.first = done
        elapsed = time.monotonic() - self.started
        fresh = done - self.first
        if fresh <= 0 or elapsed <= 0:
            return "", ""
        rate = fresh / elapsed
        left = _format_seconds((self.total - done) / rate) + " left" if self.total else ""
        return f"{format_rate(rate)} {self.item}/s", left

    def describe_share(self, done: int) -> str:
        """Returns how much is done of how much, empty if that cannot be known."""
        return f"{done:,}/{self.total:,} {self.item} ({done / self.total:.0%})" if self.total else ""

    def describe_time(self) -> str:
        """Returns how long the stage has run."""
        return _format_seconds(time.monotonic() - self.started)


class LineDisplay:
    """A line at the beginning and the end of each stage and every few seconds, for logs and pipes."""

    def __init__(self) -> None:
        """Starts without a stage."""
        self._stage = RunningStage("", 0, "")
        self._shown = 0.0

    def _print(self, done: int, extra: str = "") -> None:
        stage = self._stage
        rate, left = stage.describe(done)
        parts = (f"{stage.name:<10}", stage.describe_share(done), rate, extra or left)
        print("  ".join(part for part in parts if part), file=sys.stderr)
        sys.stderr.flush()
        self._shown = time.monotonic()

    def start(self, stage: str, total: int, item: str) -> None:
        """Prints the stage's name and size."""
        self._stage = RunningStage(stage, total, item)
        self._print(0)

    def update(self, done: int) -> None:
        """Prints a line if the last one is some seconds old."""
        if time.monotonic() - self._shown >= LINE_SECONDS:
            self._print(done)

    def finish(self, done: int) -> None:
        """Prints the end of the stage."""
        self._print(done, f"{self._stage.describe_time()} done")

    def close(self) -> None:
        """Does nothing."""


class BarDisplay:
    """A live bar for each stage, on a terminal."""

    def __init__(self) -> None:
        """Takes the terminal."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:>9,.0f}/{task.fields[size]:<9}"),
            TextColumn("{task.fields[rate]:>22}"),
            TextColumn("{task.fields[left]:>12}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._progress.start()
        self._stage = RunningStage("", 0, "")

    def start(self, stage: str, total: int, item: str) -> None:
        """Adds the stage's bar."""
        self._stage = RunningStage(stage, total, item)
        size = f"{total:,}" if total else ""
        self._task = self._progress.add_task(stage, total=total or None, size=size, rate="", left="")

    def update(self, done: int) -> None:
        """Moves the bar."""
        rate, left = self._stage.describe(done)
        self._progress.update(self._task, completed=done, rate=rate, left=left)

    def finish(self, done: int) -> None:
        """Fills the bar."""
        rate, _ = self._stage.describe(done)
        self._progress.update(self._task, total=done or 1, completed=done or 1, rate=rate, left="")

    def close(self) -> None:
        """Gives the terminal back."""
        self._progress.stop()


_display: Display = SilentDisplay()


def set_display(display: Display) -> None:
    """Chooses where the progress of this process is shown."""
    global _display
    _display = display


@contextmanager
def wrap_display(wrap: Callable[[Display], Display]) -> Iterator[None]:
    """Shows the progress of what runs within on another display, which is given the one that is chosen."""
    outer = _display
    display = wrap(outer)
    set_display(display)
    try:
        yield
    finally:
        set_display(outer)
        display.close()


def choose_display() -> Display:
    """Returns a live bar on a terminal, lines elsewhere."""
    return BarDisplay() if sys.stderr.isatty() else LineDisplay()


@contextmanager
def show_stage(stage: str, total: int = 0, item: str = "", count: Callable[[], int] | None = None) -> Iterator[None]:
    """Shows a stage while it runs.

    Args:
        stage: its name.
        total: items to do, 0 if that cannot be known.
        item: what the items are, plural.
        count: says how many are done; called a few times a second from a thread of its own.
    """
    display = _display
    display.start(stage, total, item)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            display.update(count() if count else 0)

    watcher = threading.Thread(target=watch, name=f"progress-{stage}", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    display.finish(count() if count else total)
