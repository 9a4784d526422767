"""``memory3 eval lm`` with the real harness: equal to its own model without memory, and reading with memory."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.evaluating.evaluated_model import EvaluatedModel, EvaluationOptions
from flows.evaluating.harness.offline import go_offline
from model.locating import find_checkpoint
from model.training.chat import DEFAULT_TEMPLATE
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.stores import open_store
from tests.pages import ROOT, SHELL, read_blocks
from tests.servers import MODEL, build_bank

pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed: pip install 'memory3[eval]'")
go_offline()

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from flows.evaluating.harness.harness_model import MemoryLM  # noqa: E402
from flows.evaluating.harness.harness_runs import HarnessReport, run_tasks  # noqa: E402
from flows.evaluating.harness.harness_tasks import TaskOptions, load_tasks  # noqa: E402

NAMES = ("assert", "del", "pass", "break", "continue", "global", "import", "raise")

TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    },
    "documents": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "endings": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks of Python's documentation, with their data."""
    import datasets

    folder = tmp_path_factory.mktemp("tasks")
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    rows = []
    for place, name in enumerate(NAMES):
        words = topics[name].split()
        other = topics[NAMES[(place + 1) % len(NAMES)]].split()
        right, wrong = " ".join(words[50:58]), " ".join(other[50:56])
        gold = place % 2
        row = {"question": " ".join(words[2:50]), "choices": [wrong, right] if gold else [right, wrong], "gold": gold}
        # The last document does not fit into the model at once.
        rows.append({**row, "text": topics["class"] if place == len(NAMES) - 1 else topics[name][:700]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
        text = json.dumps({"task": name, **data, "test_split": "test", **task})  # JSON is YAML
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """A bank with the text that questions are made of."""
    documents = {name: topics[name][:1500] for name in NAMES}
    return Bank.open(open_store(str(build_bank(tmp_path_factory.mktemp("bank"), documents))))


@pytest.fixture(scope="module")
def run(folder: Path) -> Callable[..., HarnessReport]:
    def run(bank: Bank | None, **options: Any) -> HarnessReport:
        tasks = TaskOptions(tasks=(str(folder),), with_samples=True)
        return run_tasks(MODEL if bank is None else None, bank, EvaluationOptions(**options), tasks)

    return run


def list_answers(samples: dict[str, Any], task: str) -> list[Any]:
    """The answers of a task in the order of its documents: scores, or texts."""
    ordered = sorted(samples[task], key=lambda sample: sample["doc_id"])
    return [answer for sample in ordered for (answer,) in sample["resps"]]


def list_scores(samples: dict[str, Any], task: str) -> np.ndarray:
    answers = list_answers(samples, task)
    return np.array([answer[0] if isinstance(answer, (list, tuple)) else answer for answer in answers], dtype=float)


def test_without_memory_it_is_the_harnesss_own_model(folder: Path, run: Callable[..., HarnessReport]) -> None:
    own = HFLM(pretrained=str(find_checkpoint(MODEL)), device="cpu", dtype="float32", batch_size=4)
    loaded = load_tasks(TaskOptions(tasks=(str(folder),)))
    expected = evaluate(lm=own, task_dict=loaded, log_samples=True, bootstrap_iters=100)
    report = run(None, knowledge="none", with_bos=False, batch_size=4)
    assert own.max_length == report.options["max_length"] == 1024
    for task in ("choices", "documents"):
        scores, theirs = list_scores(report.samples, task), list_scores(expected["samples"], task)
        assert len(scores) == len(NAMES) * (2 if task == "choices" else 1)
        # The harness adds up in float32, where numbers around a hundred are 1e-5 apart, and thousands 1e-4.
        np.testing.assert_allclose(scores, theirs, atol=1e-5, rtol=1e-6)
    greedy = [answer[1] for answer in list_answers(report.samples, "choices")]
    assert greedy == [answer[1] for answer in list_answers(expected["samples"], "choices")]
    assert list_answers(report.samples, "endings") == list_answers(expected["samples"], "endings")
    metrics = {(row.task, row.metric): row for row in report.rows}
    for (task, metric), row in metrics.items():
        assert row.value == pytest.approx(expected["results"][task][f"{metric},none"], rel=1e-5)
        assert row.num_samples == len(NAMES)
    assert metrics["choices", "acc"].stderr == pytest.approx(expected["results"]["choices"]["acc_stderr,none"])
    assert {metric for _, metric in metrics} == {"acc", "word_perplexity", "bits_per_byte", "exact_match"}


def test_memories_are_read_and_leaking_references_are_not(bank: Bank, run: Callable[..., HarnessReport]) -> None:
    plain = run(None, knowledge="none")
    filtered, unfiltered = run(bank), run(bank, max_overlap=1.0)
    assert unfiltered.attention_share is not None
    assert filtered.attention_share is not None
    assert min(unfiltered.attention_share, filtered.attention_share) > 0.01
    assert plain.attention_share is None
    assert filtered.counts["num_dropped"] >= filtered.counts["num_dropped_references"] > 0
    assert (unfiltered.counts["num_dropped"], unfiltered.counts["num_compared"]) == (0, 0)
    for task in ("choices", "documents"):
        scores = [list_scores(report.samples, task) for report in (plain, filtered, unfiltered)]
        assert np.abs(scores[0] - scores[1]).min() > 1e-3
        assert np.abs(scores[1] - scores[2]).max() > 1e-3
    # The bank has the very text: reading it makes the documents likelier, and the filter takes that back.
    document_scores = [list_scores(report.samples, "documents")[:-1].sum() for report in (filtered, unfiltered)]
    assert document_scores[1] > document_scores[0]


def test_references_as_text_are_read(bank: Bank, run: Callable[..., HarnessReport]) -> None:
    plain, rag = run(None, knowledge="none"), run(bank, knowledge="text", max_overlap=1.0, num_memories=2)
    assert rag.attention_share is None
    assert rag.counts["num_searches"] > 0
    assert rag.options["max_length"] < plain.options["max_length"]
    short = slice(0, len(NAMES) - 1)
    assert list_scores(rag.samples, "documents")[short].sum() > list_scores(plain.samples, "documents")[short].sum()
    assert np.abs(list_scores(rag.samples, "choices") - list_scores(plain.samples, "choices")).min() > 1e-3


@pytest.mark.parametrize("knowledge", ["memory", "none", "text"])
def test_neither_batch_nor_order_changes_an_answer(bank: Bank, knowledge: str) -> None:
    def make_instances(kind: str, arguments: list[Any]) -> list[Instance]:
        return [Instance(kind, {}, one, place) for place, one in enumerate(arguments)]  # type: ignore[arg-type]

    words = {name: topics[name].split() for name in NAMES}
    pairs = [(" ".join(words[name][: 20 + 30 * place]), " the name") for place, name in enumerate(NAMES)]
    pairs += [(context, " of " + " ".join(words["del"][:90])) for context, _ in pairs[:2]] + [("", "Names of a class")]
    documents = [(topics[name][: 300 * (place + 1)],) for place, name in enumerate(NAMES[:4])]
    settings = {"until": [".", "\n\n"], "max_gen_toks": 70 if knowledge == "memory" else 20}
    prompts = [(context, settings) for context, _ in pairs[:5]]
    found = []
    for batch_size in (1, 16) if knowledge == "text" else (1, 4, 16):
        options = EvaluationOptions(knowledge=knowledge, batch_size=batch_size, num_memories=3)
        lm = MemoryLM(EvaluatedModel(None, bank, options))
        order = np.random.default_rng(batch_size).permutation(len(pairs)).tolist()
        scored = lm.loglikelihood(make_instances("loglikelihood", [pairs[place] for place in order]))
        totals = [scored[order.index(place)][0] for place in range(len(pairs))]
        reverse = lm.loglikelihood_rolling(make_instances("loglikelihood_rolling", documents[::-1]))[::-1]
        texts = lm.generate_until(make_instances("generate_until", prompts))
        assert all("." not in text and "\n\n" not in text for text in texts)
        found.append(([*totals, *reverse], texts))
    for totals, texts in found[1:]:
        np.testing.assert_allclose(totals, found[0][0], rtol=1e-6, atol=1e-5)
        assert texts == found[0][1]
    assert any(found[0][1])


def test_the_command_prints_a_table_and_writes_a_report(folder: Path, bank: Bank, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    given = ["--include-path", folder, "--tasks", "choices", "--bank", bank.url, "--limit", 4, "--num-fewshot", 1]
    done = CliRunner().invoke(app, ["eval", "lm", *map(str, given), "--out", str(out)])
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text(encoding="utf-8"))
    (row,) = report["rows"]
    assert (row["task"], row["metric"], row["num_fewshot"], row["num_samples"]) == ("choices", "acc", 1, 4)
    assert 0 <= row["value"] <= 1
    assert len(report["samples"]["choices"]) == 4
    assert report["counts"]["num_scored"] == 8
    assert report["version"] == 1
    assert f"{row['value']:.4f}" in done.stdout
    assert "dropped" in done.stdout
    assert math.isclose(report["options"]["max_overlap"], 2 / 3)


def test_prompts_go_through_the_chat_template_of_the_model(folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(find_checkpoint(MODEL), tmp_path / "chatting")
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "chat_template": DEFAULT_TEMPLATE}), encoding="utf-8")
    options = EvaluationOptions(knowledge="none")
    tasks = TaskOptions(tasks=(str(folder / "choices.yaml"),), limit=2, with_chat=True, with_samples=True)
    report = run_tasks(str(model), None, options, tasks)
    asked = report.samples["choices"][0]["arguments"][0][0]
    assert asked.startswith("<|user|> ")
    assert asked.endswith("<|end|><|assistant|>")
    lm = MemoryLM(EvaluatedModel(str(model), None, options))
    tokens = lm.tok_encode(asked)
    # What the template writes are special tokens, behind the <s> of every context.
    assert (tokens[:2], tokens[-2:]) == ([1, 3], [5, 4])


@pytest.mark.slow
def test_the_page_on_tasks_is_true(bank: Bank, tmp_path: Path) -> None:
    """Runs the blocks of docs/how-to/evaluate.md."""
    (tmp_path / "my-bank").symlink_to(Path(bank.url).absolute())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    printed = []
    for block in read_blocks("docs/how-to/evaluate.md"):
        if block.mark == "file":
            (tmp_path / block.value).write_text(block.text, encoding="utf-8")
        elif block.language in SHELL:
            script = f'memory3() {{ "{sys.executable}" -m flows.cli "$@"; }}\nset -e\n{block.text}'
            command = ["bash", "-c", script]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            printed += [line for line in done.stdout.splitlines() if line.strip().startswith("questions ")]
    assert len(printed) == 4
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["rows"][0]["num_samples"] == 2


def test_what_cannot_be_run_is_said_in_a_line(
    folder: Path, bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = tmp_path / "far.yaml"
    far.write_text(json.dumps({"task": "far", "dataset_path": "nobody/no-such-data", "test_split": "test"}))
    with pytest.raises(InputError, match="nothing is downloaded"):
        load_tasks(TaskOptions(tasks=(str(far),)))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="has no YAML file"):
        load_tasks(TaskOptions(tasks=(str(empty),)))
    tasks = TaskOptions(tasks=(str(folder / "choices.yaml"),), limit=1, with_chat=True)
    with pytest.raises(InputError, match="no chat template"):
        run_tasks(MODEL, None, EvaluationOptions(knowledge="none"), tasks)
    with pytest.raises(InputError, match="give the bank"):
        run_tasks(MODEL, None, EvaluationOptions(), tasks)
    with pytest.raises(InputError, match="leave out --no-bos"):
        EvaluationOptions(with_bos=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="not installed"):
        go_offline()


@pytest.mark.slow
def test_a_name_is_looked_for_among_the_tasks_of_the_harness(folder: Path) -> None:
    with pytest.raises(InputError, match="no task 'no_such_task'"):
        load_tasks(TaskOptions(tasks=("no_such_task",)))
    with pytest.raises(InputError, match="the data of task 'arc_easy' is not on this machine"):
        load_tasks(TaskOptions(tasks=("arc_easy",)))
