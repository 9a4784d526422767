"""Trains the checkpoint that comes with this project, from text to files: the recipe, step by step.

    python -m flows.train_tiny corpus    --data corpora --work runs/recipe
    python -m flows.train_tiny tokenizer --work runs/recipe
    python -m flows.train_tiny embedder  --work runs/recipe
    python -m flows.train_tiny warmup    --work runs/recipe
    python -m flows.train_tiny bank      --work runs/recipe
    python -m flows.train_tiny continual --work runs/recipe
    python -m flows.train_tiny ship      --work runs/recipe

Each step is what ``memory3 build`` and ``memory3 train`` do, with the settings written down here; a step that was
stopped goes on where it was. Which documents are held out of everything is in :mod:`flows.splitting`, which parts of
the corpora are used in :mod:`flows.tiny_corpus`.
"""

import dataclasses
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import zstandard

from flows.options import show_work

if TYPE_CHECKING:
    from flows.training import TrainingConfig

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train the shipped checkpoint.")

WorkOption = Annotated[Path, typer.Option(help="Folder for everything the recipe makes.")]

SHAPE = "mini"
"""The preset that is trained."""

WARMUP_STEPS = 1260
"""Steps of 2048 tokens, after a short rise all at the greatest rate: stage two goes on from there, and decays."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One of the runs of stage two.

    Attributes:
        name: its folder.
        data: the folder of its sequences.
        num_steps: steps of 2048 tokens.
        seed: of the order of the sequences.
        echo_share: as in :class:`model.training.drawing.DrawingConfig`, like the two below.
        distractor_share: see there.
        lag_share: see there.
        misled_share: see there.
        pick_share: see there.
        num_slots: tokens that memories keep, see :class:`model.selecting.SelectionConfig`.
        score: how they are chosen.
        decay_share: part of the steps at the end in which the rate falls.
        learning_rate: the greatest rate.
        blocks_per_window: how well the order is mixed, see :class:`model.training.streaming.StreamConfig`.
        mean_of: runs whose weights' mean it starts from; empty for the run before.
    """

    name: str
    data: str = "continual-data"
    num_steps: int
    seed: int = 0
    echo_share: float
    distractor_share: float
    lag_share: float = 0.0
    misled_share: float = 0.0
    pick_share: float = 0.1
    num_slots: int
    score: str = "residual"
    decay_share: float = 0.0
    learning_rate: float = 1e-3
    blocks_per_window: int = 8
    mean_of: tuple[str, ...] = ()

    def make_config(self, share: float) -> "TrainingConfig":
        """Returns the settings of the run, with a part of its steps."""
        from flows.training import make_continual_config
        from model.training.optimizing import OptimizerConfig
        from model.training.schedule import ScheduleConfig

        config = make_continual_config(max(1, round(self.num_steps * share)))
        schedule, optimizer = (
            ScheduleConfig(decay_share=self.decay_share),
            OptimizerConfig(learning_rate=self.learning_rate),
        )
        return dataclasses.replace(
            config,
            loop=dataclasses.replace(config.loop, schedule=schedule, optimizer=optimizer, save_every=50),
            stream=dataclasses.replace(config.stream, seed=self.seed, blocks_per_window=self.blocks_per_window),
            drawing=dataclasses.replace(
                config.drawing,
                echo_share=self.echo_share,
                distractor_share=self.distractor_share,
                lag_share=self.lag_share,
                misled_share=self.misled_share,
                pick_share=self.pick_share,
            ),
            num_slots=self.num_slots,
            score=self.score,
        )


PHASES = (
    Phase(name="echoes", num_steps=220, echo_share=0.4, distractor_share=0.2, num_slots=8, score="softmax"),
    Phase(name="wide", num_steps=380, echo_share=0.3, distractor_share=0.15, num_slots=32, score="softmax"),
    Phase(name="narrow", num_steps=490, echo_share=0.25, distractor_share=0.25, num_slots=16),
    Phase(name="lagging", num_steps=420, echo_share=0.15, distractor_share=0.2, lag_share=0.75, num_slots=16),
    Phase(
        name="unread",
        num_steps=380,
        seed=1,
        echo_share=0.1,
        distractor_share=0.3,
        lag_share=0.8,
        num_slots=32,
        decay_share=0.9,
    ),
    Phase(
        name="one-sided",
        num_steps=1300,
        seed=2,
        echo_share=0.1,
        distractor_share=0.3,
        lag_share=0.8,
        num_slots=32,
        decay_share=0.5,
    ),
    Phase(
        name="continual",
        num_steps=260,
        seed=3,
        echo_share=0.1,
        distractor_share=0.3,
        lag_share=0.8,
        num_slots=32,
        decay_share=0.9,
        learning_rate=6e-4,
        blocks_per_window=128,
        mean_of=("unread", "one-sided"),
    ),
    Phase(
        name="strict",
        data="strict-data",
        num_steps=3000,
        seed=4,
        echo_share=0.06,
        distractor_share=0.15,
        lag_share=0.8,
        misled_share=0.12,
        pick_share=0.25,
        num_slots=32,
        decay_share=0.85,
        learning_rate=8e-4,
        blocks_per_window=128,
    ),
)
"""Stage two: each run reads fewer copies of its own text and more as generation does.

The first four read in the order of the warmup, and so its first sequences again, which taught less than it might have.
Windows of 8 blocks hardly mix the sources: the run ``one-sided`` met no Chinese at all and forgot it, while all else
became better. So the run after it starts from the mean of the weights before and after it, and reads everything mixed.
The last one meets memories as they are where a text is new: for half of its sequences nothing of their documents is
read, for some nothing that has to do with them."""

STRICT_CANDIDATES: dict[str, Any] = {"num_candidates": 24, "strict_share": 0.5}
"""What chunks of the last run retrieve: more, because less of it may be read."""

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text falls into pre-tokens: the pattern of Llama 3, which keeps runs of blanks together and digits in threes."""


def _iterate_texts(work: Path) -> Iterator[str]:
    import orjson

    for path in sorted((work / "corpus" / "train").glob("*.jsonl.zst")):
        with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            for line in io.TextIOWrapper(stream, encoding="utf-8"):
                yield orjson.loads(line)["text"]


@app.command()
def corpus(
    data: Annotated[Path, typer.Option(help="Folder with the corpora named in flows/tiny_corpus.py.")],
    work: WorkOption,
) -> None:
    """Write the texts to train on, to build banks of, and to hold out."""
    from flows.tiny_corpus import write_parts

    for part, counts in write_parts(data, work / "corpus").items():
        typer.echo(f"{part}: {', '.join(f'{number} {name}' for name, number in counts.items())}")


@app.command()
def tokenizer(work: WorkOption) -> None:
    """Train the tokenizer, byte-level BPE, into the package; without this step the one that is there is used."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from model.locating import SHIPPED_MODEL, find_checkpoint
    from model.presets import PRESETS

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PRESETS[SHAPE]().vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=32,
    )
    bpe.train_from_iterator(_iterate_texts(work), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(find_checkpoint(SHIPPED_MODEL))


@app.command()
def embedder(
    work: WorkOption,
    dimension: Annotated[int, typer.Option(help="Size of the vectors.")] = 128,
) -> None:
    """Distil the static embedder from all-MiniLM-L6-v2 into the package."""
    from model.embedding import SHIPPED_EMBEDDER, find_embedder
    from model.training.distilling import distil_embedder

    distil_embedder(find_embedder("minilm"), list(_iterate_texts(work)), dimension, SHIPPED_EMBEDDER)


@app.command()
def warmup(
    work: WorkOption,
    steps: Annotated[int, typer.Option(help="Steps of the stage.")] = WARMUP_STEPS,
) -> None:
    """Stage one: ordinary language modelling, from weights with heads that copy. Ctrl-C keeps what is done."""
    from flows.preparing import PrepareConfig, prepare_sequences
    from flows.training import make_warmup_config, train_stage
    from model.training.optimizing import OptimizerConfig
    from model.training.schedule import ScheduleConfig

    config = make_warmup_config(steps)
    loop = dataclasses.replace(
        config.loop,
        optimizer=OptimizerConfig(learning_rate=1.2e-3),
        schedule=ScheduleConfig(warmup_share=0.05, decay_share=0.0),
        save_every=100,
    )
    with show_work():
        data = work / "warmup-data"
        prepare_sequences([str(work / "corpus" / "train")], data, config=PrepareConfig())
        config = dataclasses.replace(config, loop=loop, copying_heads=True)
        result = train_stage(SHAPE, data, work / "warmup", config)
    typer.echo(result.to_json())


@app.command()
def bank(work: WorkOption) -> None:
    """Build the bank that training retrieves from; its memories are never read, so none are written."""
    from flows.building import build
    from flows.config import BuildConfig, MemoryConfig
    from flows.steps import Steps
    from model.locating import SHIPPED_MODEL
    from schemas.stores import open_store

    config = BuildConfig(memory=MemoryConfig(model=SHIPPED_MODEL, cold=True))
    with show_work():
        build(open_store(str(work / "bank")), [str(work / "corpus" / "banked")], config, Steps())


@app.command()
def continual(
    work: WorkOption,
    share: Annotated[float, typer.Option(help="Part of the steps that is done, for a trial.")] = 1.0,
) -> None:
    """Stage two: every 64-token chunk reads memories of five references, written in the same step."""
    from flows.preparing import PrepareConfig, prepare_sequences
    from flows.training import MODEL_FOLDER, train_stage
    from pipelines.candidates import CandidateConfig

    with show_work():
        texts = [str(work / "corpus" / "train")]
        for name, candidates in (
            ("continual-data", CandidateConfig()),
            ("strict-data", CandidateConfig(**STRICT_CANDIDATES)),
        ):
            prepare_sequences(texts, work / name, str(work / "bank"), config=PrepareConfig(candidates=candidates))
        start = work / "warmup" / MODEL_FOLDER
        for phase in PHASES:
            if phase.mean_of:
                start = _average(work, phase)
            result = train_stage(str(start), work / phase.data, work / phase.name, phase.make_config(share))
            typer.echo(result.to_json())
            if not result.summary.is_finished:
                raise typer.Exit(1)
            start = work / phase.name / MODEL_FOLDER


def _average(work: Path, phase: Phase) -> Path:
    """Writes the mean of earlier runs, once; returns its folder."""
    from flows.training import MODEL_FOLDER
    from model.training.starting import average_models, save_model

    target = work / f"{phase.name}-start"
    if not target.is_dir():
        names = [str(work / name / MODEL_FOLDER) for name in phase.mean_of]
        save_model(average_models(names), target, tokenizer=names[0])
    return target


@app.command()
def ship(work: WorkOption) -> None:
    """Write the trained model into the package, in bfloat16, with the losses of all runs."""
    import json

    from flows.training import MODEL_FOLDER
    from model.locating import SHIPPED_MODEL, find_checkpoint
    from model.training.metrics import plot_losses, read_metrics
    from model.training.starting import save_model, start_model

    trained, target = work / PHASES[-1].name / MODEL_FOLDER, find_checkpoint(SHIPPED_MODEL)
    made = work / SHIPPED_MODEL
    save_model(start_model(str(trained)), made, tokenizer=str(trained), dtype="bfloat16")
    for path in made.iterdir():
        shutil.copyfile(path, target / path.name)
    curves: dict[str, list[tuple[float, float]]] = {}
    lines, before = [], 0
    for stage in ("warmup", *(phase.name for phase in PHASES)):
        rows = read_metrics(work / stage)
        curves[stage] = [(before + row["tokens"], row["loss"]) for row in rows]
        lines += [json.dumps({"stage": stage, **row, "tokens": before + row["tokens"]}) + "\n" for row in rows]
        before += rows[-1]["tokens"]
    (target / "training-log.jsonl").write_text("".join(lines))
    plot_losses(curves, target / "training.png", title="training loss, stage by stage")
    size_bytes = sum(path.stat().st_size for path in target.iterdir())
    typer.echo(f"{target.name}: {size_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    app()
