"""``memory3 eval knowledge`` on real banks: what is updated, deleted, contradicted, and counted."""

import dataclasses
import json
import shlex
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flows.cli import app
from flows.evaluating.knowledge.asking import Asker
from flows.evaluating.knowledge.auroc import measure_confidence
from flows.evaluating.knowledge.fact_banks import FactBank, FactModel
from flows.evaluating.knowledge.fact_figures import (
    CONTRADICTED,
    COUNTER,
    FORGET,
    UNCHANGED,
    UPDATE,
    are_equal,
    judge_facts,
)
from flows.evaluating.knowledge.fact_questions import NEW, OLD
from flows.evaluating.knowledge.fact_tests import FactReplies, choose_other, run_fact_tests
from flows.evaluating.knowledge.facts import hash_documents, read_documents
from flows.evaluating.knowledge.file_questions import read_files
from flows.evaluating.knowledge.questions import Question, Reply
from flows.evaluating.knowledge.suite import KnowledgeOptions, make_command, read_facts, run_knowledge
from model.loglikelihoods import ScoredSequence, SequenceScorer
from model.reading import ReadingSession
from schemas.bank import Bank
from schemas.errors import InputError
from tests.chats import make_chat_checkpoint
from tests.servers import MODEL
from tests.test_question_files import CSV, HALUEVAL, SQUAD

NUMBERS = [1, 3]

NUM_FACTS = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Notes on topics of Python's language reference, with headers like those of mails."""
    folder = tmp_path_factory.mktemp("corpus")
    names = [name for name in sorted(topics) if name.isalpha()][:24]
    months = ("Jan", "Mar", "May", "Jul", "Sep", "Nov")
    rows = []
    for place, name in enumerate(names):
        date = f"{10 + place % 18}-{months[place % 6]}-{1995 + place}"
        title = topics[name].splitlines()[0].strip().strip('"')
        text = f"Number: {300 + 7 * place}\nTitle: {title}\nCreated: {date}\nStatus: Draft\n\n{topics[name][:300]}"
        rows.append({"id": f"notes/{name}", "text": text, "source": "notes"})
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def options(corpus: Path) -> KnowledgeOptions:
    return KnowledgeOptions(corpus=(str(corpus),), num_facts=NUM_FACTS, num_controls=4, num_memories=3)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work") / "facts"


@pytest.fixture(scope="module")
def replies(options: KnowledgeOptions, work: Path) -> FactReplies:
    catalogue, chosen = read_facts(options)
    return run_fact_tests(catalogue, chosen, FactModel(name=MODEL), work, NUMBERS)


def read_texts(bank: Path) -> dict[int, set[str]]:
    """The live texts of each version of a bank."""
    store = FactBank(bank, FactModel(name=MODEL)).store
    newest = Bank.open(store).manifest.version
    texts = {}
    for version in range(1, newest + 1):
        opened = Bank.open(store, version)
        stand = opened.read_table("occurrences", ["ref_id"])["ref_id"].to_pylist()
        texts[version] = set(opened.read_references(sorted(set(stand)), ["text"])["text"].to_pylist())
    return texts


def test_the_banks_are_made_by_real_updates_and_deletions(
    options: KnowledgeOptions, replies: FactReplies, work: Path
) -> None:
    catalogue, chosen = read_facts(options)
    whole = {entry.text for entry in catalogue.entries.values()}
    mine = {fact.key: catalogue.entries[fact.fact.entry_id] for fact in chosen.asked}
    assert read_texts(work / "catalogue") == {1: whole}
    after = {
        fact.key: mine[fact.key].change(fact.fact.field, fact.question.candidates[NEW]).text for fact in chosen.asked
    }
    countered = {
        fact.key: mine[fact.key].change(fact.fact.field, fact.question.candidates[replies.stated[fact.key]]).text
        for fact in chosen.asked
    }
    others = whole - {entry.text for entry in mine.values()}
    assert read_texts(work / "updated") == {
        1: whole,
        2: others | set(after.values()),
        3: others | set(countered.values()),
    }
    assert read_texts(work / "deleted") == {1: whole, 2: others}
    assert read_texts(work / "never") == {1: others}


def test_with_the_right_memory_the_answer_follows_the_bank(options: KnowledgeOptions, replies: FactReplies) -> None:
    _, chosen = read_facts(options)
    for fact in chosen.asked:
        first = replies.right_first[1][fact.key]
        assert first.ref_ids == replies.references[fact.key]
        assert first.attention == pytest.approx((1.0,))
        assert first.logprobs[OLD] > replies.plain[fact.key].logprobs[OLD]
        assert replies.right_first[3][fact.key].ref_ids[0] == first.ref_ids[0]
        assert len(set(replies.right_first[3][fact.key].ref_ids)) == 3
    moved = [
        replies.updated[1][fact.key].logprobs[NEW] - replies.before[1][fact.key].logprobs[NEW] for fact in chosen.asked
    ]
    assert np.mean(moved) > 0.5


def test_what_other_memories_say_is_looked_up(options: KnowledgeOptions, replies: FactReplies, work: Path) -> None:
    """Against the entries as they stand in the bank after the update."""
    catalogue, chosen = read_facts(options)
    changed = {fact.fact.entry_id: fact for fact in chosen.asked}
    said = {}
    for entry_id, entry in catalogue.entries.items():
        fact = changed.get(entry_id)
        said[entry_id] = entry if fact is None else entry.change(fact.fact.field, fact.question.candidates[NEW])
    refs = FactBank(work / "updated", FactModel(name=MODEL))
    texts = refs.read_texts(ref for reply in replies.updated[3].values() for ref in reply.ref_ids)
    by_text = {entry.text: entry for entry in said.values()}
    for fact in chosen.asked:
        read = [by_text[texts[ref]] for ref in replies.updated[3][fact.key].ref_ids]
        expected = any(entry.fields.get(fact.fact.field) == fact.fact.value for entry in read)
        assert replies.repeated[3][fact.key] == expected


def test_what_was_deleted_is_as_if_it_had_never_been_known(replies: FactReplies) -> None:
    for number in NUMBERS:
        for key, reply in replies.forgotten[number].items():
            assert are_equal(reply, replies.never[number][key])
            assert not set(reply.ref_ids) & set(replies.references[key])
    assert any(not are_equal(replies.before[1][key], reply) for key, reply in replies.forgotten[1].items())


def test_the_contradiction_is_never_what_the_parameters_prefer(replies: FactReplies) -> None:
    for key, place in replies.stated.items():
        assert place != replies.plain[key].choice
        assert place == choose_other(replies.plain[key])


def test_rates_are_counted_from_the_replies(options: KnowledgeOptions, replies: FactReplies) -> None:
    """Against a plain loop over facts."""
    _, chosen = read_facts(options)
    figures = judge_facts(chosen, replies, NUMBERS)
    found = {measured.label: measured for measured in figures.measurements}
    for number, way in ((1, "1 memory"), (3, "3 memories")):
        updated = forgotten = countered = 0
        for fact in chosen.asked:
            before, after = replies.before[number][fact.key], replies.updated[number][fact.key]
            updated += before.logprobs[0] > before.logprobs[1] and after.logprobs[1] > after.logprobs[0]
            forgotten += replies.forgotten[number][fact.key].given == replies.never[number][fact.key].given
            scores = replies.countered[number][fact.key].logprobs
            countered += scores[replies.stated[fact.key]] > scores[replies.plain[fact.key].choice]
        assert found[UPDATE, way, ""].totals.sum() == updated
        assert found[FORGET, way, ""].totals.sum() == forgotten
        assert found[COUNTER, way, ""].totals.sum() == countered
        num_failed = 3 * NUM_FACTS - updated - forgotten - countered
        failures = [failure for failure in figures.failures if failure["memories"] == number]
        assert len(failures) == num_failed
        assert all(failure["wanted"] and failure["log-probabilities"] for failure in failures)
        foreign = {fact.key for fact in chosen.asked if replies.stated[fact.key] != OLD}
        assert set(found[UNCHANGED, way, ""].keys) == set(found[CONTRADICTED, way, ""].keys) == foreign
        unchanged = 0
        for key in foreign:
            scores = replies.before[number][key].logprobs
            unchanged += scores[replies.stated[key]] > scores[replies.plain[key].choice]
        assert found[UNCHANGED, way, ""].totals.sum() == unchanged
        control = found["unchanged document, same choice", way, ""]
        assert set(control.keys) == {fact.key for fact in chosen.controls}


def make_asked(replies: FactReplies) -> list[Question]:
    return [reply.question for reply in replies.plain.values()]


def test_log_probabilities_are_those_of_one_sequence_after_the_other(replies: FactReplies, work: Path) -> None:
    """Without memory against the model itself; with memories against the scorer, one sequence at a time."""
    bank = FactBank(work / "catalogue", FactModel(name=MODEL))
    asker = bank.open()
    plain = Asker(asker.checkpoint)
    for question in make_asked(replies)[:3]:
        context = plain.encode_question(question)
        for place, tokens in enumerate(plain.encode_answers(question)):
            whole = torch.tensor([[*context, *tokens]])
            logits, _ = ReadingSession(plain.checkpoint, with_prefix=False).read(whole)
            scores = logits[0, len(context) - 1 : -1].log_softmax(-1)
            expected = float(scores.gather(1, torch.tensor(tokens)[:, None]).sum())
            assert replies.plain[question.key].logprobs[place] == pytest.approx(expected, abs=1e-3)
            scorer = SequenceScorer(asker.checkpoint, asker.search, asker.memories, num_memories=3, batch_size=1)
            (alone,) = scorer.score([ScoredSequence(context=context, continuation=tokens)])
            assert replies.before[3][question.key].logprobs[place] == pytest.approx(alone.total, abs=1e-3)


def test_an_answer_ends_with_its_line_and_is_the_likeliest_text(replies: FactReplies, work: Path) -> None:
    """What was given, scored as a candidate, is what greedy generation gives."""
    asker = FactBank(work / "catalogue", FactModel(name=MODEL)).open()
    bare = [
        Question(key=key, prompt=reply.question.prompt, words="", candidates=(reply.given,))
        for key, reply in replies.before[1].items()
        if reply.given
    ]
    assert bare
    for question, again in zip(bare, asker.ask(bare, 1), strict=True):
        assert "\n" not in question.candidates[0]
        context, (tokens,) = asker.encode_question(question), asker.encode_answers(question)
        assert asker.checkpoint.tokenizer.decode(tokens) == f" {question.candidates[0]}\n"
        scorer = SequenceScorer(asker.checkpoint, asker.search, asker.memories, num_memories=1, batch_size=1)
        (alone,) = scorer.score([ScoredSequence(context=context, continuation=tokens)])
        assert alone.is_greedy == again.gives(0) or again.given.startswith(question.candidates[0])


def test_with_a_chat_template_the_question_is_asked_in_words() -> None:
    """Against the model read directly; an answer ends where the template ends it."""
    checkpoint, chat = make_chat_checkpoint()
    asker = Asker(checkpoint, chat=chat)
    question = Question(
        key="a", prompt="Title: x\nAuthor:", words="What is the Author of x?", candidates=("Ada", "Bob B.")
    )
    context = chat.render_question("What is the Author of x?")
    (reply,) = asker.ask([question], 1)
    for place, answer in enumerate(question.candidates):
        tokens = chat.encode_answer(answer)
        assert tokens[-1] == chat.end_token_id
        logits, _ = ReadingSession(checkpoint, with_prefix=False).read(torch.tensor([[*context, *tokens]]))
        scores = logits[0, len(context) - 1 : -1].log_softmax(-1)
        expected = float(scores.gather(1, torch.tensor(tokens.astype(np.int64))[:, None]).sum())
        assert reply.logprobs[place] == pytest.approx(expected, abs=1e-3)
    assert "<|" not in reply.given


def test_empty_answers_are_no_part_of_the_area() -> None:
    area, empty = measure_confidence("area", "w", {"a": -1.0, "b": None, "c": -0.5}, {"a": -2.0, "b": -3.0, "c": None})
    assert area.value == 1.0
    assert set(area.keys) == {"a", "b", "c"}
    assert dict(zip(empty.keys, empty.totals, strict=True)) == {"a": 0.0, "b": 1.0, "c": 1.0}
    (alone,) = measure_confidence("area", "w", {"a": None}, {"b": -1.0})
    assert alone.value == 0.5


def test_preferences_by_token_divide_by_the_length() -> None:
    question = Question(key="", prompt="", words="", candidates=("a", "b c"))
    reply = Reply(question=question, logprobs=(-4.0, -6.0), num_tokens=(1, 3), given=" B  c", confidence=0.0)
    assert (reply.choice, reply.choice_by_token) == (0, 1)
    assert reply.prefers(0, 1)
    assert reply.prefers_by_token(1, 0)
    assert reply.gives(1)
    assert not reply.gives(0)


def test_files_of_questions_become_banks_of_their_own(tmp_path: Path) -> None:
    files = {"squad.json": json.dumps(SQUAD), "halueval.json": json.dumps(HALUEVAL), "truthfulqa.csv": CSV}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    options = KnowledgeOptions(
        squad=(tmp_path / "squad.json",),
        halueval=(tmp_path / "halueval.json",),
        truthfulqa=(tmp_path / "truthfulqa.csv",),
        num_memories=2,
        work=tmp_path / "banks",
    )
    report = run_knowledge(options)
    found = {measured.label: measured for measured in report.measurements}
    assert report.data["files"]["questions"] == {"SQuAD": 2, "HaluEval-QA": 1, "TruthfulQA": 1}
    for way in ("no memory", "1 memory", "2 memories"):
        assert set(found["SQuAD: F1", way, ""].keys) == {"56ddde6b9a695914005b9628"}
        assert 0 <= found["SQuAD: AUROC of the confidence", way, ""].value <= 1
        assert ("HaluEval-QA: right answer preferred", way, "") in found
    assert 0 < found["TruthfulQA: MC2", "no memory", ""].value < 1
    assert ("TruthfulQA: MC2", "1 memory", "") not in found  # no bank was named for it
    bank = Bank.open(FactBank(tmp_path / "banks" / "files" / "squad", FactModel(name=MODEL)).store)
    assert report.data["fingerprint"] == dataclasses.asdict(bank.manifest.fingerprint)
    assert "--work" not in report.command
    assert read_texts(tmp_path / "banks" / "files" / "halueval") == {1: {HALUEVAL["knowledge"]}}
    json.dumps(report.to_json(), allow_nan=False)


def test_what_gives_a_question_of_truthfulqa_away_is_not_read(tmp_path: Path) -> None:
    """A foreign bank with a short document that is a part of the question, and two that have nothing to do with it."""
    (tmp_path / "truthfulqa.csv").write_text(CSV, encoding="utf-8")
    texts = {"same": "What happens, if you eat seeds?", "with": topics["with"][:300], "class": topics["class"][:300]}
    bank = FactBank(tmp_path / "foreign", FactModel(name=MODEL)).build(texts)
    options = KnowledgeOptions(
        truthfulqa=(tmp_path / "truthfulqa.csv",), bank=str(tmp_path / "foreign" / "bank"), num_memories=1
    )
    report = run_knowledge(options)
    assert "--at 1" in report.command
    left_out = report.data["files"]["filter"]
    assert left_out["max_overlap"] == pytest.approx(2 / 3)
    assert 0 < left_out["num_dropped"] < left_out["num_compared"]
    (same,) = bank.list_references(["same"])["same"]
    (reply,) = bank.open().ask([Question(key="", prompt=texts["same"], words="", candidates=("You die.",))], 1)
    assert reply.ref_ids == (same,)  # a bank made for the test is read whole


def test_any_version_of_the_named_bank_is_read(tmp_path: Path) -> None:
    (tmp_path / "truthfulqa.csv").write_text(CSV, encoding="utf-8")
    bank = FactBank(tmp_path / "foreign", FactModel(name=MODEL)).build({"with": topics["with"][:300]})
    bank.update({"class": topics["class"][:300]})
    asked: dict[str, Any] = {"truthfulqa": (tmp_path / "truthfulqa.csv",), "bank": str(tmp_path / "foreign" / "bank")}
    newest = read_files(KnowledgeOptions(**asked)).bank
    assert newest is not None
    options = KnowledgeOptions(**asked, version="-1", num_memories=1)
    report = run_knowledge(options)
    assert report.data["files"]["bank"]["version"] == newest.manifest.version - 1
    words = shlex.split(report.command)
    assert words[words.index("--at") + 1] == str(newest.manifest.version - 1)
    with pytest.raises(InputError, match="name the bank"):
        KnowledgeOptions(truthfulqa=asked["truthfulqa"], version="1")


def test_the_command_prints_rates_verdicts_and_failures(corpus: Path) -> None:
    arguments = ["eval", "knowledge", "--corpus", str(corpus), "--facts", "3", "--controls", "2", "--memories", "1"]
    result = CliRunner().invoke(app, [*arguments, "--form", "subject", "--json"])
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    assert report["command"] == f"memory3 {' '.join(arguments)} --form subject"
    assert report["data"]["facts"]["facts_asked"] == 3
    assert report["data"]["corpora_sha256"] == hash_documents(read_documents([str(corpus)])[::-1])
    kept = report["data"]["facts"]
    assert kept["fields_read"] == kept["facts_kept"] + sum(kept["fields_dropped"].values())
    assert [verdict["question"] for verdict in report["verdicts"]] == [
        "an updated fact changes the answer, 1 memory?",
        "a deleted fact is gone, 1 memory?",
        "the bank wins over the parameters, 1 memory?",
    ]
    assert {failure["test"] for failure in report["failures"]} <= {"update", "forget", "counterfactual"}


def test_wrong_options_are_told_in_one_sentence(tmp_path: Path) -> None:
    for changes, message in (
        ({}, "nothing to ask"),
        ({"seen": ("a",), "squad": (tmp_path,)}, "--seen only fills up"),
        ({"corpus": ("a",), "num_facts": 1}, "num_facts is 1, must be at least 2"),
        ({"corpus": ("a",), "form": "chat"}, "form is 'chat', must be one of entry, subject"),
        ({"corpus": ("a",), "limit": 0}, "limit is 0"),
    ):
        with pytest.raises(InputError, match=message):
            KnowledgeOptions(**changes)  # type: ignore[arg-type]
    (tmp_path / "there").touch()
    with pytest.raises(InputError, match="is not empty"):
        run_knowledge(KnowledgeOptions(corpus=(str(tmp_path),), work=tmp_path))


def test_the_command_that_repeats_a_run_names_what_is_not_as_by_default() -> None:
    options = KnowledgeOptions(corpus=("a b", "c"), num_facts=50, with_chat=True, work=Path("banks"))
    assert make_command(options) == "memory3 eval knowledge --corpus 'a b' --corpus c --facts 50 --chat"
