"""``memory3 train`` from a corpus to models, command by command, on real text; and what the commands refuse."""

import json
import random
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from flows.building import build
from flows.cli import app
from flows.config import BuildConfig, MemoryConfig
from flows.generation import open_generator
from flows.preparing import find_special_ids
from flows.steps import Steps
from model.answering import AskedQuestion, answer_questions
from model.checkpoint import load_checkpoint
from model.generating import GenerationConfig, Generator
from model.loading import load_writer
from model.quality import load_scorer
from model.selecting import SelectionConfig, find_selection
from model.training.chat import load_chat_template
from model.training.metrics import BOARD, METRICS, PICTURE
from schemas.bank import Bank
from schemas.errors import BankError
from schemas.stores import open_store

TOPICS = sorted(topics)[:24]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a cold bank of it, and what ``train prepare`` makes of them."""
    folder = tmp_path_factory.mktemp("train")
    rows = [{"id": f"topic/{name}", "text": topics[name]} for name in TOPICS]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(
        open_store(str(folder / "bank")),
        [str(folder / "corpus.jsonl")],
        BuildConfig(memory=MemoryConfig(cold=True)),
        Steps(),
    )
    options = ("--corpus", folder / "corpus.jsonl", "--sequence-tokens", 128)
    plain = run_json("train", "prepare", *options, "--out", folder / "plain")
    assert plain["counts"]["documents"]["read"] == plain["counts"]["documents"]["kept"] == len(TOPICS)
    result = run("train", "prepare", *options, "--bank", folder / "bank", "--out", folder / "data")
    assert result.exit_code == 0, result.output
    assert "24 read, 24 kept, 0 dropped" in result.stdout
    assert "that give the sequence away" in result.stdout
    return folder


@pytest.fixture(scope="module")
def warm(place: Path) -> str:
    """The folder of a model that took three steps of stage one."""
    options = ("--sequences-per-step", 2, "--sequences-per-batch", 1, "--saved-dtype", "bfloat16")
    told = run_json("train", "warmup", "--data", place / "plain", "--out", place / "warm", "--steps", 3, *options)
    assert told["is_finished"]
    assert told["num_tokens"] == 3 * 2 * 128
    return str(told["model"])


def test_warmup_leaves_a_checkpoint_metrics_and_a_picture(place: Path, warm: str) -> None:
    folder = place / "warm"
    assert {METRICS, BOARD, PICTURE, "settings.json", "model"} <= {path.name for path in folder.iterdir()}
    checkpoint = load_checkpoint(warm)
    assert checkpoint.config.num_hidden_layers == 8
    # The output layer is the embedding: stored once, and tied again by whoever loads it.
    stored = load_file(Path(warm) / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert torch.equal(checkpoint.head.get_parameter("weight"), stored["model.embed_tokens.weight"].float())
    assert json.loads((Path(warm) / "config.json").read_text())["dtype"] == "bfloat16"
    assert find_special_ids(warm) == (1, 2)
    told = run("train", "warmup", "--data", place / "plain", "--out", folder, "--steps", 4)
    assert told.exit_code != 0


@pytest.mark.parametrize("lora", [None, 4])
def test_continual_training_adapts_a_checkpoint_with_other_memory_layers(
    place: Path, warm: str, lora: int | None
) -> None:
    out = place / f"continual-{lora}"
    options = ["--memory-layers", "middle", "--sequences-per-step", 1, "--sequences-per-batch", 1]
    options += ["--slots", 3, "--score", "residual"]
    if lora:
        options += ["--lora", lora]
    told = run_json(
        "train", "continual", "--data", place / "data", "--model", warm, "--out", out, "--steps", 4, *options
    )
    before, after = load_checkpoint(warm), load_checkpoint(told["model"])
    assert after.memory_layers == (2, 3, 4, 5)
    states = before.model.state_dict(), after.model.state_dict()
    assert states[0].keys() == states[1].keys()
    changed = {name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])}
    assert "model.layers.3.self_attn.v_proj.weight" in changed
    assert ("model.embed_tokens.weight" in changed) == (lora is None)
    # What it was trained with is what it writes with, unless somebody says otherwise.
    assert find_selection(before.config) == SelectionConfig()
    assert load_writer(told["model"]).selection == SelectionConfig(num_slots=3, score="residual")
    assert load_writer(told["model"], num_slots=5).selection == SelectionConfig(num_slots=5, score="residual")
    if lora is None:
        further = ("--data", place / "data", "--model", told["model"], "--out", place / "further", "--steps", 1)
        told = run_json("train", "continual", *further, "--sequences-per-step", 1, "--sequences-per-batch", 1)
        assert load_writer(told["model"]).selection == SelectionConfig(num_slots=3, score="residual")


def test_a_bank_is_read_as_it_was_written_whatever_the_model_says_later(place: Path, warm: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(warm, model)
    settings = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps({**settings, "memory_selection": {"num_slots": 2}}))
    store = open_store(str(tmp_path / "bank"))
    build(store, [str(place / "corpus.jsonl")], BuildConfig(memory=MemoryConfig(model=str(model))), Steps())
    bank = Bank.open(store)
    assert bank.manifest.layout.num_slots == 2
    assert bank.manifest.config["memory"]["num_slots"] is None
    (model / "config.json").write_text(json.dumps({**settings, "memory_selection": {"num_slots": 4}}))
    generator = open_generator(str(model), str(tmp_path / "bank"))
    assert len(generator.generate_batch(["The assert statement"], GenerationConfig(max_new_tokens=2))[0]) <= 2
    assert all(generator.trace.chunks)


def test_sequences_of_another_tokenizer_are_refused(place: Path, warm: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in Path(warm).iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["merges"] = words["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(words))
    result = run(
        "train", "warmup", "--data", place / "plain", "--model", other, "--out", tmp_path / "run", "--steps", 1
    )
    assert result.exit_code != 0
    assert "another tokenizer" in str(result.exception)


def test_a_model_learns_to_answer_and_to_prefer(place: Path, warm: str) -> None:
    questions = [{"prompt": f"What is the topic {name} about?", "completion": name} for name in TOPICS[:6]]
    rows = [*questions, {"prompt": "no answer"}]
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = ("--bank", place / "bank", "--steps", 2)
    tuned = run_json(
        "train", "sft", "--conversations", place / "questions.jsonl", "--model", warm, "--out", place / "sft", *shared
    )
    assert tuned["num_read"] == 7
    assert tuned["num_kept"] == 6
    assert sum(tuned["rejects"].values()) == 1
    end = load_checkpoint(tuned["model"]).config.eos_token_id
    assert set(end) == {2, 5}

    checkpoint = load_checkpoint(tuned["model"])
    asked = [AskedQuestion(prompt=row["prompt"], expected="") for row in questions[:2]]
    chat = load_chat_template(tuned["model"], checkpoint)
    expected = answer_questions(Generator(checkpoint), chat, asked, max_answer_tokens=6)
    options = ("--no-memory", "--model", tuned["model"], "--max-new-tokens", 6, "--repetition-penalty", 1)
    prompts = [part for question in asked for part in ("--prompt", question.prompt)]
    told = run_json("generate", "--chat", *prompts, *options)
    assert [answer["text"] for answer in told] == [question.answer for question in expected.questions]
    assert run_json("generate", *prompts, *options)[0]["text"] != told[0]["text"]
    alone = run("generate", "--chat", *prompts[:2], *options)
    assert alone.stdout.strip() == told[0]["text"].strip()

    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
        for row, other in zip(questions, [*questions[1:], questions[0]], strict=True)
    ]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    result = run(
        "train", "dpo", "--pairs", place / "pairs.jsonl", "--model", tuned["model"], "--out", place / "dpo", *shared
    )
    assert result.exit_code == 0, result.output
    assert "6 read, 6 kept, 0 dropped" in result.stdout
    assert load_checkpoint(str(place / "dpo" / "model")).config.eos_token_id == end


def test_a_bank_of_another_model_is_refused_where_its_memories_are_to_be_read(place: Path, warm: str) -> None:
    result = run(
        "train", "sft", "--conversations", place / "corpus.jsonl", "--model", warm, "--out", place / "no", "--steps", 1,
        "--bank", place / "bank", "--memories", "bank",
    )  # fmt: skip
    assert result.exit_code != 0
    assert type(result.exception).__name__ == "WrongModelError"


def test_a_classifier_of_quality_is_trained_and_scores(place: Path) -> None:
    rows = []
    for name in TOPICS:
        words = topics[name].split()[:80]
        rows.append({"text": " ".join(words), "grade": 5})
        random.Random(name).shuffle(words)
        rows.append({"text": " ".join(words), "grade": 0})
    rows.append({"text": "no grade"})
    (place / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = run_json("train", "quality", "--graded", place / "graded.jsonl", "--out", place / "quality", "--steps", 3)
    assert told["num_read"] == len(rows)
    assert sum(told["rejects"].values()) == 1
    assert load_scorer(told["model"], device="cpu").score(["some text"]).shape == (1,)


def test_layers_are_ranked_and_drawn(place: Path, warm: str) -> None:
    options = ("--sequences", 2, "--sequence-tokens", 256, "--picture", place / "heads.png")
    rows = run_json("train", "rank", "--model", warm, "--corpus", place / "corpus.jsonl", *options)
    assert [row["layer"] for row in rows] == list(range(8))
    assert sum(row["recommended"] for row in rows) == 4
    assert (place / "heads.png").read_bytes().startswith(b"\x89PNG")
    table = run("train", "rank", "--model", warm, "--corpus", place / "corpus.jsonl", *options)
    assert "memory layer" in table.stdout


def test_odd_input_is_one_sentence_before_any_work(place: Path, warm: str, tmp_path: Path) -> None:
    a_file = tmp_path / "file"
    a_file.write_text("no folder")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"question": "who", "answer": "me"}\n')
    stage = ("train", "warmup", "--data", place / "plain", "--steps", 1)
    align = ("train", "sft", "--model", warm, "--out", tmp_path / "run", "--steps", 1)
    stored = ("--bank", place / "bank", "--memories", "bank")
    cases = [
        ((*stage, "--out", a_file), "is a file; give a folder"),
        ((*stage, "--out", tmp_path / "run", "--saved-dtype", "float16"), "saved_dtype is 'float16'"),
        ((*stage, "--out", tmp_path / "run", "--model", tmp_path / "none"), "neither a preset"),
        ((*align, "--conversations", empty), "it has no row"),
        ((*align, "--conversations", odd), "1 x"),
        ((*align, "--conversations", odd, "--seed", -1), "seed is -1"),
        ((*align, *stored, "--conversations", odd, "--slots", 4), "leave out num_slots"),
        (("train", "continual", *stage[2:], "--model", warm, "--out", tmp_path / "run"), "no references"),
        (("train", "rank", "--model", warm, "--corpus", empty, "--picture", tmp_path / "no" / "x.png"), "is no folder"),
    ]  # fmt: skip
    for arguments, words in cases:
        result = run(*arguments)
        assert isinstance(result.exception, BankError), (arguments, result.exception)
        assert words in str(result.exception)
    assert not (tmp_path / "run" / "model").exists()


def test_a_refused_run_leaves_its_settings_as_they_were(place: Path, warm: str, tmp_path: Path) -> None:
    stage = ("train", "warmup", "--data", place / "plain", "--model", warm, "--out", tmp_path / "run", "--steps", 2)
    run_json(*stage, "--sequences-per-step", 1, "--sequences-per-batch", 1)
    before = (tmp_path / "run" / "settings.json").read_bytes()
    result = run(*stage, "--sequences-per-step", 1, "--sequences-per-batch", 1, "--learning-rate", 0.5)
    assert "optimizer was" in str(result.exception)
    assert (tmp_path / "run" / "settings.json").read_bytes() == before
