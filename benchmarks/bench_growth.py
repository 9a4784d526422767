"""What memory brings, against the tokens that a model has read: a table and a picture.

    python -m benchmarks.bench_growth --work runs/recipe --out runs/growth

The model that each run of the recipe has left (:mod:`flows.train_tiny`) is scored on the same held-out documents with a
bank that also holds them, by the rule of the last: by how much retrieved memories lower the loss, and random ones.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.bench_training import open_bench, prepare_held_out
from flows.console import print_rows
from flows.options import show_work
from flows.train_tiny import PHASES
from flows.training import MODEL_FOLDER
from model.checkpoint import load_checkpoint
from model.selecting import SelectionConfig, record_selection
from model.training.metrics import plot_losses, read_metrics

PICTURE = "gain.png"

app = typer.Typer(add_completion=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowthPoint:
    """A model of the recipe.

    Attributes:
        run: the run that left it.
        tokens: tokens read until then.
        none: held-out loss without memory, nats a token.
        retrieved: by how much retrieved memories lower it.
        by_tokens: the same, each source weighted by its tokens.
        random: by how much random ones do.
    """

    run: str
    tokens: int
    none: float
    retrieved: float
    by_tokens: float
    random: float


def measure_growth(work: Path, num_each: int) -> list[GrowthPoint]:
    """Scores the model of every run, in their order."""
    selection = SelectionConfig(num_slots=PHASES[-1].num_slots, score=PHASES[-1].score)
    points, before = [], 0
    for run in ("warmup", *(phase.name for phase in PHASES)):
        before += int(read_metrics(work / run)[-1]["tokens"])
        checkpoint = load_checkpoint(str(work / run / MODEL_FOLDER))
        record_selection(checkpoint.config, selection)
        bench = open_bench(checkpoint, work / "held-out-all", num_each)
        table = bench.measure(("none", "random", "retrieved"))
        points.append(
            GrowthPoint(
                run=run,
                tokens=before,
                none=table.mean("none"),
                retrieved=table.gain("retrieved"),
                by_tokens=table.gain_by_tokens("retrieved", bench.tokens),
                random=table.gain("random"),
            )
        )
    return points


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Folder of the recipe, see flows/train_tiny.py.")] = Path("runs/recipe"),
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("runs/growth"),
    sequences: Annotated[int, typer.Option(help="Held-out sequences of each source.")] = 6,
) -> None:
    """Score every model of the recipe, and draw the gain over the tokens."""
    with show_work():
        prepare_held_out(work)
    points = measure_growth(work, sequences)
    rows = []
    for point in points:
        gains = (point.retrieved, point.by_tokens, point.random)
        rows.append([point.run, f"{point.tokens:,}", f"{point.none:.4f}", *(f"{gain:+.4f}" for gain in gains)])
    print_rows(["after", "tokens", "none", "gain", "by tokens", "of random"], rows, numeric={1, 2, 3, 4, 5})
    curves = {
        "five retrieved memories": [(point.tokens, point.retrieved) for point in points],
        "the same, by tokens": [(point.tokens, point.by_tokens) for point in points],
        "five random memories": [(point.tokens, point.random) for point in points],
    }
    out.mkdir(parents=True, exist_ok=True)
    plot_losses(curves, out / PICTURE, title="what memory lowers the held-out loss by", label="gain, nats a token")
    typer.echo(f"{out / PICTURE}")


if __name__ == "__main__":
    app()
