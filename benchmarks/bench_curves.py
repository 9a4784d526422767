"""When should a model begin to read memories, and how many parameters is reading worth? The paper's Figure 11, small.

    python -m benchmarks.bench_curves --work runs/recipe --out runs/curves

Models of one shape are trained on equally many tokens, from the same weights:

    no memory          stage one all the way
    memory from start  stage two all the way
    warmup, memory     stage one for the first part, then stage two
    ... middle layers  the same, memories in the middle of the model instead of its first half
    twice the size     stage one all the way, twice as many parameters outside the embeddings

All end with the same decay of the learning rate. Every checkpoint of every run is scored on held-out documents, with a
bank that also holds them: reading nothing, and reading five retrieved memories if it was trained to. The table, the
picture and the losses (JSON) are left in the folder; runs that are done are not trained again, and one that was
stopped goes on. No run reads a sequence twice but the two whose second part is drawn anew, a few percent of it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.bench_training import open_bench, prepare_held_out
from flows.console import print_rows
from flows.options import show_work
from flows.training import MODEL_FOLDER, TrainingConfig, make_continual_config, make_warmup_config, train_stage
from model.checkpoint import load_checkpoint
from model.locating import SHIPPED_MODEL
from model.memory_layers import MIDDLE
from model.training.metrics import plot_losses
from model.training.objective import LanguageObjective
from model.training.optimizing import OptimizerConfig
from model.training.planting import plant_copying
from model.training.saving import list_checkpoints, load_weights, read_state
from model.training.schedule import ScheduleConfig
from model.training.starting import save_model, start_model
from schemas.atomic import write_bytes_atomically

WIDTHS = {"small": (160, 5, 352), "twice": (224, 7, 512)}
"""Hidden size, heads and width of the MLP of the two shapes: 2.2 and 4.4 million parameters outside the embeddings."""

WARMUP_SHARE = 0.6
DECAY_SHARE = 0.2
NUM_CHECKPOINTS = 5
STEP_TOKENS = 2048
LEARNING_RATE = 1.2e-3
PICTURE = "figure-11.png"

NO_MEMORY, FROM_START, WARMED_UP, IN_MIDDLE, TWICE = (
    "no memory",
    "memory from the start",
    "warmup, then memory",
    "the same, middle layers",
    "no memory, twice the size",
)

app = typer.Typer(add_completion=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A checkpoint of a run.

    Attributes:
        tokens: tokens read since the first weights.
        none: the held-out loss without memory.
        retrieved: with five retrieved memories; None if the run has not been trained to read.
        random: with five random ones.
    """

    tokens: int
    none: float
    retrieved: float | None = None
    random: float | None = None

    @property
    def best(self) -> float:
        """The loss of the model as it is meant to be used."""
        return self.none if self.retrieved is None else self.retrieved


def write_start(shape: str, target: Path) -> None:
    """Writes the first weights of a shape, with heads that copy."""
    from model.presets import PRESETS

    config = PRESETS["mini"]()
    config.hidden_size, config.num_attention_heads, config.intermediate_size = WIDTHS[shape]
    config.num_key_value_heads = config.num_attention_heads
    checkpoint = start_model(config, tokenizer=SHIPPED_MODEL)
    plant_copying(checkpoint)
    save_model(checkpoint, target, tokenizer=SHIPPED_MODEL)


def write_checkpoint(start: Path, run: Path, step: int, target: Path) -> None:
    """Writes the weights that a run had after a step as a model."""
    checkpoint = start_model(str(start))
    load_weights(
        next(path for path in list_checkpoints(run) if read_state(path)["step"] == step), LanguageObjective(checkpoint)
    )
    save_model(checkpoint, target, tokenizer=SHIPPED_MODEL)


def make_configs(num_steps: int) -> dict[str, TrainingConfig]:
    """Returns the settings of each run, before those of the loop: the mix of stage two leans on retrieved text."""
    warmup = make_warmup_config(num_steps)
    continual = dataclasses.replace(make_continual_config(num_steps), num_slots=16, score="residual")
    from_start = dataclasses.replace(continual, stream=warmup.stream)
    return {
        NO_MEMORY: warmup,
        TWICE: warmup,
        FROM_START: from_start,
        WARMED_UP: continual,
        IN_MIDDLE: dataclasses.replace(continual, memory_layers=MIDDLE),
    }


def train_all(work: Path, out: Path, num_steps: int) -> dict[str, Path]:
    """Trains the runs that are not done; returns their folders."""
    num_warmup = round(num_steps * WARMUP_SHARE)
    save_every = num_steps // NUM_CHECKPOINTS
    for shape in WIDTHS:
        if not (out / f"start-{shape}").is_dir():
            write_start(shape, out / f"start-{shape}")
    folders: dict[str, Path] = {}
    for name, config in make_configs(num_steps).items():
        start, steps = out / f"start-{'twice' if name == TWICE else 'small'}", num_steps
        data = work / ("warmup-data" if config.drawing.stage == "warmup" else "continual-data")
        if name in (WARMED_UP, IN_MIDDLE):
            # Until the rate decays, the run without memory is the warmup of the others.
            if not (out / "warm").is_dir():
                write_checkpoint(start, folders[NO_MEMORY], num_warmup, out / "warm")
            start, steps = out / "warm", num_steps - num_warmup
        loop = dataclasses.replace(
            config.loop,
            num_steps=steps,
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
            schedule=ScheduleConfig(warmup_share=0.02, decay_share=DECAY_SHARE * num_steps / steps),
            save_every=save_every,
            num_kept=NUM_CHECKPOINTS + 1,
        )
        folders[name] = out / name.replace(", ", "-").replace(" ", "-")
        result = train_stage(str(start), data, folders[name], dataclasses.replace(config, loop=loop))
        if not result.summary.is_finished:
            raise typer.Exit(1)
    return folders


def score_run(name: str, folder: Path, held_out: Path, num_steps: int, num_each: int) -> list[CurvePoint]:
    """Scores every checkpoint of a run."""
    before = round(num_steps * WARMUP_SHARE) if name in (WARMED_UP, IN_MIDDLE) else 0
    checkpoint = load_checkpoint(str(folder / MODEL_FOLDER))
    reads = name not in (NO_MEMORY, TWICE)
    ways = ("none", "random", "retrieved") if reads else ("none",)
    points = []
    for path in list_checkpoints(folder):
        load_weights(path, LanguageObjective(checkpoint))
        table = open_bench(checkpoint, held_out, num_each).measure(ways)
        points.append(
            CurvePoint(
                tokens=STEP_TOKENS * (before + read_state(path)["step"]),
                none=table.mean("none"),
                retrieved=table.mean("retrieved") if reads else None,
                random=table.mean("random") if reads else None,
            )
        )
    return points


def show_curves(curves: dict[str, list[CurvePoint]]) -> None:
    """Prints the losses at the end, and what memory is worth in parameters."""
    rows = []
    for name, points in curves.items():
        last = points[-1]
        read = [f"{loss:.4f}" if loss is not None else "" for loss in (last.none, last.retrieved, last.random)]
        rows.append([name, f"{last.tokens:,}", *read, f"{curves[NO_MEMORY][-1].none - last.best:+.4f}"])
    print_rows(["run", "tokens", "none", "retrieved", "random", "better than no memory"], rows, numeric={1, 2, 3, 4, 5})
    smaller, twice, warmed = (curves[name][-1] for name in (NO_MEMORY, TWICE, WARMED_UP))
    doubling, own, overall = smaller.none - twice.none, warmed.none - warmed.best, smaller.none - warmed.best
    by_chance = 0.0 if warmed.random is None else warmed.none - warmed.random
    print(f"twice the parameters lower the loss by {doubling:.4f}")
    print(f"memory lowers it by {own:.4f} within its own run, random memories by {by_chance:.4f}")
    print(f"memory and the tokens spent on learning to read, against plain text, by {overall:.4f}")
    if doubling > 0:
        print(
            f"shares of doubling: {own / doubling:.0%} within its own run, {overall / doubling:.0%} against plain text"
        )


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Folder of the recipe, see flows/train_tiny.py.")] = Path("runs/recipe"),
    out: Annotated[Path, typer.Option(help="Folder for the runs, the picture and the losses.")] = Path("runs/curves"),
    steps: Annotated[int, typer.Option(help="Steps of 2048 tokens of every run.")] = 300,
    sequences: Annotated[int, typer.Option(help="Held-out sequences of each source.")] = 5,
) -> None:
    """Train the runs, score their checkpoints, draw the curves."""
    if steps % NUM_CHECKPOINTS:
        raise typer.BadParameter(f"steps is {steps}, must be a multiple of {NUM_CHECKPOINTS}")
    with show_work():
        prepare_held_out(work)
        folders = train_all(work, out, steps)
    curves = {}
    for name, folder in folders.items():
        scores = folder / f"scores-{sequences}.json"
        if not scores.is_file():
            points = score_run(name, folder, work / "held-out-all", steps, sequences)
            write_bytes_atomically(scores, json.dumps([dataclasses.asdict(point) for point in points]).encode())
        curves[name] = [CurvePoint(**point) for point in json.loads(scores.read_bytes())]
    show_curves(curves)
    drawn = {name: [(point.tokens, point.best) for point in points] for name, points in curves.items()}
    plot_losses(drawn, out / PICTURE, title="held-out loss, each run as it is meant to be used")
    typer.echo(f"{out / PICTURE}")


if __name__ == "__main__":
    app()
