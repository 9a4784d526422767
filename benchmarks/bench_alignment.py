"""make bench-alignment: questions about held-out documents before and after SFT and DPO, with and without memory.

    python -m benchmarks.bench_alignment --data corpora --work runs/recipe/alignment --model runs/recipe/strict/model
    python -m benchmarks.bench_alignment ... --only start,sft-1

Questions (:mod:`benchmarks.question_sets`) are trained on and asked as a user would do it: a bank of the catalogue with
the model's own memories, SFT and DPO of :mod:`flows.aligning`, answers of the generator. After every stage all
questions about held-out documents are asked anew, with a bank that the model of that stage has written; then with a
bank of the changed catalogue, where nothing is trained. A stage that is finished is kept, one that was stopped goes on.

SFT has two parts: a model tells whole entries and answers from one memory, then it answers with memories of five
references. Only rows whose entry is among their memories are trained on.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.question_sets import Question, make_pairs, rank_entries, write_lines, write_question_sets
from flows.aligning import AlignmentConfig, AlignmentResult, fine_tune, optimise_preferences
from flows.benching import describe_machine
from flows.building import build
from flows.config import BuildConfig, MemoryConfig
from flows.console import print_rows
from flows.generation import open_generator
from flows.options import show_work
from flows.searching import open_retriever
from flows.steps import Steps
from flows.training import MODEL_FOLDER
from model.answering import AnswerReport, AskedQuestion, answer_questions, normalize_answer
from model.locating import SHIPPED_MODEL
from model.reading import MEMORIES_PER_CHUNK
from model.training.chat import load_chat_template
from model.training.conversations import ConversationConfig
from model.training.loop import LoopConfig
from model.training.optimizing import OptimizerConfig
from model.training.schedule import ScheduleConfig
from schemas.atomic import write_bytes_atomically
from schemas.bank import Bank
from schemas.stores import open_store

START = "start"
"""The stage before all training."""

RESULTS_FILE = "results.json"

DATA = Path(__file__).parents[2] / "shared" / "data"
"""Where the corpora are unless somebody says otherwise."""

app = typer.Typer(add_completion=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of training.

    Attributes:
        name: its name.
        method: ``sft`` or ``dpo``.
        num_steps: optimizer steps.
        learning_rate: greatest rate.
        num_memories: memories that a prompt reads; only rows whose entry is among them are trained on.
        sets: the question sets that are trained on; for DPO the pairs of their questions.
        decay_share: part of the steps at the end in which the rate falls.
        unread_share: part of the exchanges that read nothing.
        batch_size: exchanges, or pairs, of a step.
        beta: how much a log-ratio counts, for DPO.
        max_rows: rows that are trained on at most, taken evenly; None for all. DPO measures each of them before it
            begins, which is idle for those that its steps do not reach.
    """

    name: str
    method: str = "sft"
    num_steps: int
    learning_rate: float
    num_memories: int = MEMORIES_PER_CHUNK
    sets: tuple[str, ...] = ("train",)
    decay_share: float = 0.3
    unread_share: float = 0.1
    batch_size: int = 24
    beta: float = 0.1
    max_rows: int | None = None

    def make_config(self, num_slots: int | None) -> AlignmentConfig:
        """Returns the settings as SFT and DPO take them; slots as in :class:`Workplace`."""
        return AlignmentConfig(
            loop=LoopConfig(
                num_steps=self.num_steps,
                optimizer=OptimizerConfig(learning_rate=self.learning_rate),
                schedule=ScheduleConfig(warmup_share=0.05, decay_share=self.decay_share),
                save_every=25,
                num_kept=1,
            ),
            draw=ConversationConfig(
                batch_size=self.batch_size,
                micro_batch_size=self.batch_size,
                num_memories=self.num_memories,
                unread_share=self.unread_share if self.method == "sft" else 0.0,
            ),
            num_slots=num_slots,
            beta=self.beta,
        )


STAGES = (
    Stage(name="sft-1", num_steps=150, learning_rate=1e-3, num_memories=1, sets=("recite", "recite", "train")),
    Stage(name="sft-5", num_steps=240, learning_rate=1e-3, decay_share=0.5),
    Stage(name="dpo", method="dpo", num_steps=20, learning_rate=2e-5, batch_size=12, max_rows=480),
)


@dataclasses.dataclass(frozen=True)
class Workplace:
    """The folder in which everything is made, and what is made first.

    Attributes:
        folder: the folder.
        questions: all question sets by name.
        num_slots: tokens that a memory keeps at each KV head; None for as many as the model was trained with.
    """

    folder: Path
    questions: dict[str, list[Question]]
    num_slots: int | None

    @property
    def sets(self) -> Path:
        """The folder of the question sets."""
        return self.folder / "questions"

    def build_bank(self, model: str, stage: str, catalogue: str) -> str:
        """Builds a bank of a catalogue for the model of a stage; returns its place.

        Memories are written when they are first read: of most entries nobody asks.
        """
        place = str(self.folder / "banks" / stage / catalogue)
        config = BuildConfig(memory=MemoryConfig(model=model, num_slots=self.num_slots, cold=True))
        build(open_store(place), [str(self.sets / f"{catalogue}.jsonl")], config, Steps())
        return place

    def get_model(self, stage: str) -> Path:
        """Returns the folder of the model that a stage has trained."""
        return self.folder / stage / MODEL_FOLDER


def select_found(questions: Sequence[Question], places: Sequence[int | None], num_memories: int) -> list[Question]:
    """Returns the questions whose entry is among the memories they read: of the others nothing can be learnt."""
    return [
        question
        for question, place in zip(questions, places, strict=True)
        if place is not None and place < num_memories
    ]


def take_evenly(questions: Sequence[Question], max_rows: int | None) -> list[Question]:
    """Returns so many of the questions at most, at even distances."""
    if max_rows is None or len(questions) <= max_rows:
        return list(questions)
    return [questions[row * len(questions) // max_rows] for row in range(max_rows)]


def train(stage: Stage, model: str, workplace: Workplace, bank: Bank) -> AlignmentResult:
    """Trains a stage; the same call goes on where it was."""
    asked = [question for name in stage.sets for question in workplace.questions[name]]
    catalogue = workplace.sets / "catalogue.jsonl"
    places = rank_entries(asked, catalogue, bank, open_retriever(bank), stage.num_memories)
    found = select_found(asked, places, stage.num_memories)
    found = take_evenly(found, stage.max_rows)
    file = workplace.folder / f"{stage.name}.jsonl"
    out, config = workplace.folder / stage.name, stage.make_config(workplace.num_slots)
    if stage.method == "dpo":
        write_lines(file, make_pairs(found))
        return optimise_preferences(model, file, out, bank, config)
    write_lines(file, map(dataclasses.asdict, found))
    return fine_tune(model, file, out, bank, config)


def ask(
    model: str, bank: str | None, questions: Sequence[Question], num_memories: int = MEMORIES_PER_CHUNK
) -> AnswerReport:
    """Asks a model questions, with a bank or without memory."""
    generator = open_generator(model, bank, knowledge="memory" if bank else "none")
    asked = [AskedQuestion(prompt=row.prompt, expected=row.completion, kind=row.kind) for row in questions]
    chat = load_chat_template(model, generator.checkpoint)
    return answer_questions(generator, chat, asked, num_memories=num_memories)


def measure_share(flags: Sequence[bool]) -> float:
    """Returns the share of what is true."""
    return sum(flags) / max(1, len(flags))


def find_sources(report: AnswerReport, texts: Sequence[str]) -> list[bool]:
    """Tells of each answer whether it stands in the text of the references that were retrieved for its question."""
    return [
        bool(question.answer) and normalize_answer(question.answer) in normalize_answer(text)
        for question, text in zip(report.questions, texts, strict=True)
    ]


def measure(stage: str, model: str, workplace: Workplace) -> dict[str, Any]:
    """Asks all questions about held-out documents; returns the figures of the tables."""
    held_out, changed = workplace.questions["held_out"], workplace.questions["changed_answers"]
    place = workplace.build_bank(model, stage, "catalogue")
    bank = Bank.open(place)
    search = open_retriever(bank)
    places = rank_entries(held_out, workplace.sets / "catalogue.jsonl", bank, search)
    hits = [[hit.ref_id for hit in of_question] for of_question in search.search([q.prompt for q in held_out], 5)]
    texts = ["\n".join(bank.read_references(ref_ids, ["text"])["text"].to_pylist()) for ref_ids in hits]
    reports = {
        "with_memory": ask(model, place, held_out),
        "with_one_memory": ask(model, place, held_out, 1),
        "without_memory": ask(model, None, held_out),
    }
    with_memory = reports["with_memory"]
    correct = [question.is_correct for question in with_memory.questions]
    wrong = [source for source, right in zip(find_sources(with_memory, texts), correct, strict=True) if not right]
    changed_place = workplace.build_bank(model, stage, "changed")
    old = {question.prompt: normalize_answer(question.completion) for question in held_out}

    def ask_changed(num_memories: int) -> dict[str, float]:
        report = ask(model, changed_place, changed, num_memories)
        stale = [normalize_answer(question.answer) == old[question.prompt] for question in report.questions]
        return {"new_answer": report.accuracy, "old_answer": measure_share(stale)}

    by_place = defaultdict(list)
    for found, right in zip(places, correct, strict=True):
        by_place["none" if found is None else str(found + 1)].append(right)
    return {
        "num_questions": len(held_out),
        "accuracy": {name: report.accuracy for name, report in reports.items()},
        "by_kind": {name: report.accuracy_by_kind for name, report in reports.items()},
        "by_place": {name: (len(of_place), measure_share(of_place)) for name, of_place in sorted(by_place.items())},
        "retrieved": measure_share([found is not None for found in places]),
        "with_memory_where_retrieved": measure_share(
            [right for found, right in zip(places, correct, strict=True) if found is not None]
        ),
        "wrong_from_another_entry": measure_share(wrong),
        "num_changed": len(changed),
        "changed": {"with_memory": ask_changed(MEMORIES_PER_CHUNK), "with_one_memory": ask_changed(1)},
        "answers": [dataclasses.asdict(question) for question in with_memory.questions],
    }


def read_results(folder: Path) -> dict[str, Any]:
    """Returns what finished stages have brought, by stage."""
    file = folder / RESULTS_FILE
    results: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
    return results


def run_stages(stages: Sequence[Stage], model: str, workplace: Workplace, wanted: set[str]) -> dict[str, Any]:
    """Trains and measures the stages that are wanted and not yet finished; returns the results of all.

    Raises:
        typer.BadParameter: a stage was finished with other settings, or its forerunner is missing.
    """
    results, before = read_results(workplace.folder), START
    bank = Bank.open(workplace.build_bank(model, START, "catalogue"))
    for stage in (None, *stages):
        name = START if stage is None else stage.name
        settings: dict[str, Any] = {"model": model, "num_slots": workplace.num_slots}
        if stage is not None:
            settings |= {**dataclasses.asdict(stage), "sets": [*stage.sets]}
        if name in results and results[name]["settings"] != settings:
            raise typer.BadParameter(f"{workplace.folder} holds {name} of other settings; name another folder")
        if name in wanted and name not in results:
            trained: dict[str, Any] = {}
            if stage is not None:
                if stage is not stages[0] and before not in results:
                    raise typer.BadParameter(f"{name} starts from what {before} leaves; do that stage first")
                result = train(stage, model, workplace, bank)
                if not result.summary.is_finished:
                    typer.echo(f"{name} stopped after {result.summary.step} steps; the same command goes on")
                    return results
                trained = result.to_json()
            answering = model if stage is None else str(workplace.get_model(name))
            results[name] = {"settings": settings, "trained": trained, **measure(name, answering, workplace)}
            write_bytes_atomically(workplace.folder / RESULTS_FILE, json.dumps(results, indent=1).encode())
        if stage is not None:
            model, before = str(workplace.get_model(name)), name
    return {name: results[name] for name in (START, *(stage.name for stage in stages)) if name in results}


def format_share(share: float) -> str:
    """Returns a share as a table shows it."""
    return f"{share:.1%}"


def show(results: dict[str, Any]) -> None:
    """Prints the tables."""
    rows = []
    for name, figures in results.items():
        accuracy, changed = figures["accuracy"], figures["changed"]
        shares = [
            accuracy["without_memory"],
            accuracy["with_memory"],
            figures["with_memory_where_retrieved"],
            figures["wrong_from_another_entry"],
            changed["with_memory"]["new_answer"],
            changed["with_memory"]["old_answer"],
            accuracy["with_one_memory"],
            changed["with_one_memory"]["new_answer"],
            changed["with_one_memory"]["old_answer"],
        ]
        rows.append([name, *map(format_share, shares)])
    figures = results[list(results)[-1]]
    print(
        f"\n{figures['num_questions']} questions about held-out documents, entry among the five memories for "
        f"{figures['retrieved']:.1%}; {figures['num_changed']} of which the changed bank changes the answer"
    )
    of_five = ["right", "if retrieved", "errors in a hit", "changed: new", "old"]
    columns = ["after", "no memory", *(f"5: {name}" for name in of_five), "1: right", "1: changed: new", "1: old"]
    print_rows(columns, rows, numeric=set(range(1, len(columns))))
    kinds = list(figures["by_kind"]["with_memory"])
    titles = {"with_memory": "5 memories", "with_one_memory": "1 memory", "without_memory": "no memory"}
    for way, title in titles.items():
        print(f"by kind of question, {title}")
        by_kind = [[name, *(format_share(of["by_kind"][way][kind]) for kind in kinds)] for name, of in results.items()]
        print_rows(["after", *kinds], by_kind, numeric=set(range(1, len(kinds) + 1)))


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder with the corpora.")] = DATA,
    model: Annotated[str, typer.Option(help="The model to start from.")] = SHIPPED_MODEL,
    work: Annotated[Path, typer.Option(help="Folder for all that is made.")] = Path("runs/recipe/alignment"),
    steps_scale: Annotated[float, typer.Option(help="Steps of each stage, as a part of those written here.")] = 1.0,
    slots: Annotated[
        int | None, typer.Option(help="Tokens kept at each KV head; as the model says if not given.")
    ] = None,
    only: Annotated[str, typer.Option(help="Stages to do, such as start,sft-1; all if empty.")] = "",
) -> None:
    """Train a model to answer from its bank, and measure it on held-out documents."""
    stages = [dataclasses.replace(stage, num_steps=max(1, round(stage.num_steps * steps_scale))) for stage in STAGES]
    known = {START, *(stage.name for stage in stages)}
    wanted = set(only.split(",")) if only else known
    if wanted - known:
        raise typer.BadParameter(f"there is no stage {', '.join(sorted(wanted - known))}")
    print(f"{model}; {describe_machine()}")
    with show_work():
        workplace = Workplace(work, write_question_sets(data, work / "questions"), slots)
        results = run_stages(stages, model, workplace, wanted)
    if results:
        show(results)


if __name__ == "__main__":
    app()
