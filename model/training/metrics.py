"""What a run tells of itself: JSON lines, TensorBoard, and a picture of the loss.

RUN/metrics.jsonl    one line every few steps
RUN/tensorboard/     the same for TensorBoard
RUN/loss.png         the loss over the tokens read
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from schemas.atomic import write_bytes_atomically

METRICS, BOARD, PICTURE = "metrics.jsonl", "tensorboard", "loss.png"

SMOOTHING_SHARE = 0.02
"""Width of the moving average in the picture, as a share of the points."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run, the earliest first; what follows a line cut short by a crash is left out."""
    rows: list[dict[str, Any]] = []
    path = folder / METRICS
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


class MetricsWriter:
    """Writes the metrics of one run; a run that goes on drops the lines of steps it does again."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Opens the files.

        Args:
            folder: the run's folder.
            first_step: steps done already: lines of later steps are dropped.
        """
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        kept = "".join(json.dumps(row) + "\n" for row in read_metrics(folder) if row["step"] <= first_step)
        path = folder / METRICS
        if kept and path.read_text() != kept:
            write_bytes_atomically(path, kept.encode())
        elif not kept:
            path.unlink(missing_ok=True)
        self._lines = path.open("a")
        self._board = SummaryWriter(str(folder / BOARD), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes the values of one step; None for one that is no number."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        self._lines.close()
        self._board.close()


def plot_losses(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    target: Path,
    *,
    title: str = "",
    label: str = "loss, nats a token",
) -> None:
    """Draws losses over tokens read, each as points and as a moving average.

    Args:
        curves: for each name (tokens, loss in nats a token), ascending; names without points are left out.
        target: the PNG file.
        title: what stands above.
        label: what stands beside the axis, where it is not the loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in curves.items():
        if not points:
            continue
        tokens, losses = np.array(points, dtype=np.float64).T
        width = max(1, round(len(losses) * SMOOTHING_SHARE))
        sums = np.cumsum(np.concatenate(([0.0], losses)))
        first = np.maximum(np.arange(1, len(losses) + 1) - width, 0)
        smooth = (sums[1:] - sums[first]) / (np.arange(1, len(losses) + 1) - first)
        (line,) = axes.plot(tokens, smooth, label=name)
        if width > 1:
            axes.plot(tokens, losses, ".", markersize=2, alpha=0.3, color=line.get_color())
    axes.set_xlabel("tokens read")
    axes.set_ylabel(label)
    axes.set_title(title)
    if len(axes.get_lines()):
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(str(target), dpi=120)


def plot_run(folder: Path) -> None:
    """Draws the loss of a run into its folder."""
    points = [(row["tokens"], row["loss"]) for row in read_metrics(folder) if row["loss"] is not None]
    plot_losses({"training": points}, folder / PICTURE, title=folder.name)
