"""The commands ``memory3 train ...``: prepare sequences, train in stages, adapt, align, grade."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.options import (
    JsonOption,
    RunnerOption,
    RunnerOptionsOption,
    VersionOption,
    WorkersOption,
    open_bank,
    show_work,
)
from schemas.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    help="Training: sequences with what each chunk retrieves, the paper's two stages, SFT, DPO.\n\n"
    "Several processes: torchrun --nproc-per-node 8 -m flows.cli train continual ...",
)

DataOption = Annotated[Path, typer.Option(help="Folder of sequences, from: memory3 train prepare.", metavar="FOLDER")]
OutOption = Annotated[Path, typer.Option(help="Folder of the run; goes on if unfinished.", metavar="FOLDER")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="YAML or TOML file with settings, see flows/training.py.")
]
StepsOption = Annotated[int, typer.Option(help="Optimizer steps.")]
RateOption = Annotated[float | None, typer.Option(help="Greatest learning rate.")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of weights, order and draws.")]
SequencesOption = Annotated[int | None, typer.Option("--sequences-per-step", help="Sequences of an optimizer step.")]
BatchOption = Annotated[int | None, typer.Option("--sequences-per-batch", help="Sequences of one forward pass.")]
SaveOption = Annotated[int | None, typer.Option("--save-every", help="Steps from one checkpoint to the next.")]
LayersOption = Annotated[
    str | None, typer.Option("--memory-layers", help="first-half, middle, or a list such as 0,3,5-9.")
]
AdapterOption = Annotated[int | None, typer.Option("--lora", help="Train low-rank adapters of this rank.")]
SlotsOption = Annotated[
    int | None, typer.Option("--slots", help="Tokens of a reference kept at each KV head; the model's own by default.")
]
ScoreOption = Annotated[
    str | None,
    typer.Option("--score", help="How they are chosen: softmax, exp or residual; the model's own by default."),
]
DtypeOption = Annotated[str | None, typer.Option("--saved-dtype", help="float32 or bfloat16, for the trained weights.")]


def _collect_changes(**options: Any) -> dict[str, Any]:
    """Returns the options that were given as changes of a configuration; names are paths with dots for two dashes."""
    changes: dict[str, Any] = {}
    for path, value in options.items():
        if value is None:
            continue
        *sections, name = path.split("__")
        place = changes
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return changes


def _train(
    stage: str,
    model: str,
    data: Path,
    out: Path,
    steps: int,
    config: Path | None,
    tokenizer: str | None,
    changes: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    from flows.config import apply_changes, read_settings
    from flows.console import print_json, print_training
    from flows.training import STAGES, train_stage

    settings = STAGES[stage](steps)
    if config is not None:
        settings = apply_changes(settings, read_settings(config), str(config))
    settings = apply_changes(settings, changes)
    with show_work():
        result = train_stage(model, data, out, settings, tokenizer=tokenizer)
    if as_json:
        print_json(result.to_json())
    else:
        print_training(result)


@app.command()
def prepare(
    corpus: Annotated[
        list[str],
        typer.Option("--corpus", help="File, folder, glob or s3:// prefix; may be given again.", metavar="PATH"),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.", metavar="FOLDER")],
    bank: Annotated[
        str | None, typer.Option("--bank", help="Bank to retrieve from; none for warmup only.", metavar="URI")
    ] = None,
    at: VersionOption = None,
    model: Annotated[
        str | None, typer.Option(help="memory3-tiny, or a folder with a tokenizer: the one to train with.")
    ] = None,
    sequence_tokens: Annotated[int | None, typer.Option(help="Tokens of a sequence, whole chunks of 64.")] = None,
    candidates: Annotated[int | None, typer.Option(help="References retrieved for each chunk.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the order of documents.")] = None,
    runner: RunnerOption = None,
    runner_options: RunnerOptionsOption = None,
    workers: WorkersOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pack a corpus into sequences, retrieve references for every 64-token chunk, leave out those that would leak.

    Example: memory3 train prepare --corpus docs/ --bank my-bank --out runs/sequences
    """
    from flows.config import apply_changes, read_settings
    from flows.console import print_dataset, print_json
    from flows.preparing import PrepareConfig, prepare_sequences

    settings = PrepareConfig()
    if config is not None:
        settings = apply_changes(settings, read_settings(config), str(config))
    changes = _collect_changes(
        model=model,
        sequence_tokens=sequence_tokens,
        seed=seed,
        candidates__num_candidates=candidates,
        engine__runner=runner,
        engine__num_workers=workers,
        engine__options=runner_options,
    )
    settings = apply_changes(settings, changes)
    with show_work():
        manifest = prepare_sequences(corpus, out, bank, at, settings)
    if as_json:
        print_json(manifest.to_json())
    else:
        print_dataset(manifest, str(out))


@app.command()
def warmup(
    data: DataOption,
    out: OutOption,
    steps: StepsOption,
    model: Annotated[str, typer.Option(help="tiny, mini, 0.9b, 2.4b for random weights, or a checkpoint.")] = "tiny",
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder of the tokenizer for random weights; the shipped one by default.")
    ] = None,
    copying_heads: Annotated[
        bool | None, typer.Option("--copying-heads", help="Random weights begin with heads that copy.")
    ] = None,
    learning_rate: RateOption = None,
    sequences_per_step: SequencesOption = None,
    sequences_per_batch: BatchOption = None,
    save_every: SaveOption = None,
    seed: SeedOption = None,
    saved_dtype: DtypeOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stage one: ordinary language modelling, no memory.

    Example: memory3 train warmup --data runs/sequences --out runs/warmup --steps 3000
    """
    changes = _collect_changes(
        loop__optimizer__learning_rate=learning_rate,
        loop__save_every=save_every,
        loop__seed=seed,
        stream__seed=seed,
        stream__sequences_per_step=sequences_per_step,
        stream__sequences_per_batch=sequences_per_batch,
        copying_heads=copying_heads,
        saved_dtype=saved_dtype,
    )
    _train("warmup", model, data, out, steps, config, tokenizer, changes, as_json=as_json)


@app.command()
def continual(
    data: DataOption,
    out: OutOption,
    steps: StepsOption,
    model: Annotated[str, typer.Option(help="Folder of the warmed-up model, or of any checkpoint to adapt.")],
    learning_rate: RateOption = None,
    memory_layers: LayersOption = None,
    lora: AdapterOption = None,
    slots: SlotsOption = None,
    score: ScoreOption = None,
    sequences_per_step: SequencesOption = None,
    sequences_per_batch: BatchOption = None,
    save_every: SaveOption = None,
    seed: SeedOption = None,
    saved_dtype: DtypeOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stage two: every 64-token chunk reads the references it and the four chunks before retrieved.

    Example: memory3 train continual --data runs/sequences --model runs/warmup/model --out runs/continual --steps 1000
    """
    changes = _collect_changes(
        loop__optimizer__learning_rate=learning_rate,
        loop__save_every=save_every,
        loop__seed=seed,
        stream__seed=seed,
        stream__sequences_per_step=sequences_per_step,
        stream__sequences_per_batch=sequences_per_batch,
        memory_layers=memory_layers,
        adapter_rank=lora,
        num_slots=slots,
        score=score,
        saved_dtype=saved_dtype,
    )
    _train("continual", model, data, out, steps, config, None, changes, as_json=as_json)


def _align(
    stage: str,
    model: str,
    rows: Path,
    out: Path,
    bank: str | None,
    at: str | None,
    steps: int,
    config: Path | None,
    changes: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    from flows import aligning
    from flows.config import apply_changes, read_settings
    from flows.console import print_alignment, print_json

    settings = (aligning.make_sft_config if stage == "sft" else aligning.make_dpo_config)(steps)
    if config is not None:
        settings = apply_changes(settings, read_settings(config), str(config))
    settings = apply_changes(settings, changes)
    opened = None if bank is None else open_bank(bank, at)
    train = aligning.fine_tune if stage == "sft" else aligning.optimise_preferences
    with show_work():
        result = train(model, rows, out, opened, settings)
    if as_json:
        print_json(result.to_json())
    else:
        print_alignment(result)


@app.command()
def sft(
    conversations: Annotated[
        Path, typer.Option(help="JSON lines with messages, or with prompt and completion.", metavar="FILE")
    ],
    model: Annotated[str, typer.Option(help="memory3-tiny, or a checkpoint's folder.")],
    out: OutOption,
    steps: StepsOption,
    bank: Annotated[str | None, typer.Option("--bank", help="Bank that prompts retrieve from.", metavar="URI")] = None,
    at: VersionOption = None,
    memories: Annotated[
        str | None, typer.Option(help="written: in the same step, with gradient; bank: as they stand in it.")
    ] = None,
    unread_share: Annotated[float | None, typer.Option(help="Part of the exchanges that read nothing.")] = None,
    slots: SlotsOption = None,
    score: ScoreOption = None,
    learning_rate: RateOption = None,
    seed: SeedOption = None,
    save_every: SaveOption = None,
    saved_dtype: DtypeOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Supervised fine-tuning: answers of conversations, with the memories that generation would read.

    Example: memory3 train sft --conversations questions.jsonl --bank my-bank --model runs/continual/model
    --out runs/sft --steps 500
    """
    changes = _collect_changes(
        loop__optimizer__learning_rate=learning_rate,
        loop__save_every=save_every,
        loop__seed=seed,
        draw__seed=seed,
        draw__unread_share=unread_share,
        memories=memories,
        num_slots=slots,
        score=score,
        saved_dtype=saved_dtype,
    )
    _align("sft", model, conversations, out, bank, at, steps, config, changes, as_json=as_json)


@app.command()
def dpo(
    pairs: Annotated[Path, typer.Option(help="JSON lines with prompt, chosen and rejected.", metavar="FILE")],
    model: Annotated[str, typer.Option(help="A checkpoint's folder, best after sft.")],
    out: OutOption,
    steps: StepsOption,
    bank: Annotated[str | None, typer.Option("--bank", help="Bank that prompts retrieve from.", metavar="URI")] = None,
    at: VersionOption = None,
    beta: Annotated[float | None, typer.Option(help="How much a log-ratio counts; 0.01 if not given.")] = None,
    memories: Annotated[
        str | None, typer.Option(help="written: in the same step, with gradient; bank: as they stand in it.")
    ] = None,
    slots: SlotsOption = None,
    score: ScoreOption = None,
    learning_rate: RateOption = None,
    seed: SeedOption = None,
    save_every: SaveOption = None,
    saved_dtype: DtypeOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Direct preference optimisation: of two answers one is to become likelier, memories read for both.

    Example: memory3 train dpo --pairs pairs.jsonl --bank my-bank --model runs/sft/model --out runs/dpo --steps 200
    """
    changes = _collect_changes(
        loop__optimizer__learning_rate=learning_rate,
        loop__save_every=save_every,
        loop__seed=seed,
        draw__seed=seed,
        beta=beta,
        memories=memories,
        num_slots=slots,
        score=score,
        saved_dtype=saved_dtype,
    )
    _align("dpo", model, pairs, out, bank, at, steps, config, changes, as_json=as_json)


@app.command()
def quality(
    graded: Annotated[
        list[str], typer.Option(help="Graded documents, JSON lines or Parquet; may be given again.", metavar="PATH")
    ],
    out: OutOption,
    steps: StepsOption = 1000,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint's folder to start from; a small BERT from random weights if not given."),
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column that holds the text.")] = None,
    grade_column: Annotated[str | None, typer.Option(help="Column that holds the grade, 0 to 5.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Grade from which a document counts as good.")] = None,
    learning_rate: RateOption = None,
    seed: SeedOption = None,
    save_every: SaveOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a small classifier on graded documents: the quality filter of memory3 build.

    Example: memory3 train quality --graded grades.jsonl --out runs/quality --steps 500
    """
    from flows.config import apply_changes
    from flows.console import print_grading, print_json
    from flows.grading import GradingConfig, train_quality

    changes = _collect_changes(
        model=model,
        text_column=text_column,
        grade_column=grade_column,
        threshold=threshold,
        num_steps=steps,
        learning_rate=learning_rate,
        draw__seed=seed,
        save_every=save_every,
    )
    settings = apply_changes(GradingConfig(), changes)
    with show_work():
        result = train_quality(graded, out, settings)
    if as_json:
        print_json(result.to_json())
    else:
        print_grading(result)


@app.command()
def rank(
    model: Annotated[str, typer.Option(help="memory3-tiny, or a checkpoint's folder.")],
    corpus: Annotated[
        list[str],
        typer.Option(
            "--corpus", help="Texts the model has not seen: files, folders; may be given again.", metavar="PATH"
        ),
    ],
    distance: Annotated[int, typer.Option(help="Tokens back from which a token is distant.")] = 128,
    sequences: Annotated[int, typer.Option(help="Texts that are read.")] = 32,
    sequence_tokens: Annotated[int, typer.Option(help="Tokens that are read of each.")] = 1024,
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    picture: Annotated[Path | None, typer.Option(help="Heat map to write, a PNG file.", metavar="FILE")] = None,
    as_json: JsonOption = False,
) -> None:
    """Rank layers and heads by how much they use distant text, and name the layers to give memories to.

    Example: memory3 train rank --model my-model --corpus docs/ --picture heads.png
    """
    from flows.console import print_json
    from flows.ranking_layers import RankingRequest, list_ranking, plot_ranking, print_ranking, rank_layers

    request = RankingRequest(
        model=model,
        corpus=tuple(corpus),
        distance=distance,
        num_sequences=sequences,
        sequence_tokens=sequence_tokens,
        text_column=text_column,
        device=device,
    )
    if picture is not None and not picture.absolute().parent.is_dir():
        raise InputError(f"{picture.parent} is no folder; make it first, or name a picture elsewhere")
    with show_work():
        report = rank_layers(request)
    rows = list_ranking(report)
    if picture is not None:
        plot_ranking(report, picture)
    if as_json:
        print_json(rows)
    else:
        print_ranking(rows, report)
