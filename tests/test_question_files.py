"""Files of questions in the genuine formats, what is wrong with others, and scores against obvious ones."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.evaluating.knowledge.file_scores import measure_choices, measure_f1, normalize_squad
from flows.evaluating.knowledge.question_files import ChoiceQuestion, read_halueval, read_squad, read_truthfulqa
from schemas.errors import InputError

SQUAD: dict[str, Any] = {
    "version": "v2.0",
    "data": [
        {
            "title": "Normans",
            "paragraphs": [
                {
                    "qas": [
                        {
                            "question": "In what country is Normandy located?",
                            "id": "56ddde6b9a695914005b9628",
                            "answers": [
                                {"text": "France", "answer_start": 159},
                                {"text": "France", "answer_start": 159},
                            ],
                            "is_impossible": False,
                        },
                        {
                            "plausible_answers": [{"text": "Rollo", "answer_start": 308}],
                            "question": "Who was the Duke of the battle of Hastings?",
                            "id": "5ad39d53604f3c001a3fe8d1",
                            "answers": [],
                            "is_impossible": True,
                        },
                    ],
                    "context": "The Normans gave their name to Normandy, a region in France.",
                }
            ],
        }
    ],
}

HALUEVAL = {
    "knowledge": "Arthur's Magazine (1844–1846) was an American literary periodical published in Philadelphia.",
    "question": "Which magazine was started first Arthur's Magazine or First for Women?",
    "right_answer": "Arthur's Magazine",
    "hallucinated_answer": "First for Women was started first.",
}

CSV = (
    "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    'Adversarial,Misconceptions,"What happens, if you eat seeds?",They pass through you,'
    "They pass through you; Nothing happens,You grow a tree; You die.,https://x.org\n"
)

TARGETS = {
    "question": "What is the smallest country?",
    "mc1_targets": {"Nauru is the smallest.": 1, "The US is.": 0, "Vatican City is not.": 0},
    "mc2_targets": {"Nauru is the smallest.": 1, "Nauru.": 1, "The US is.": 0},
}


def write(folder: Path, text: str) -> Path:
    path = folder / "file"
    path.write_text(text, encoding="utf-8")
    return path


def test_squad(tmp_path: Path) -> None:
    possible, impossible = read_squad(write(tmp_path, json.dumps(SQUAD)))
    assert possible.key == "56ddde6b9a695914005b9628"
    assert (possible.right, possible.wrong, possible.topic) == (("France",), (), "Normans")
    assert possible.knowledge == impossible.knowledge == SQUAD["data"][0]["paragraphs"][0]["context"]
    assert (impossible.right, impossible.wrong) == ((), ("Rollo",))


def test_squad_of_version_1_has_answers_alone(tmp_path: Path) -> None:
    qas = [{"id": "1", "question": "Where?", "answers": [{"answer_start": 0, "text": "Here"}]}]
    document = {"version": "1.1", "data": [{"title": "A", "paragraphs": [{"context": "Here.", "qas": qas}]}]}
    (question,) = read_squad(write(tmp_path, json.dumps(document)))
    assert (question.right, question.question) == (("Here",), "Where?")


def test_halueval(tmp_path: Path) -> None:
    (question,) = read_halueval(write(tmp_path, json.dumps(HALUEVAL, ensure_ascii=False) + "\n\n"))
    assert question.knowledge == HALUEVAL["knowledge"]
    assert (question.right, question.wrong) == (("Arthur's Magazine",), ("First for Women was started first.",))


def test_truthfulqa_in_csv(tmp_path: Path) -> None:
    (question,) = read_truthfulqa(write(tmp_path, CSV))
    assert question.question == "What happens, if you eat seeds?"
    assert question.single == ("They pass through you.", "You grow a tree.", "You die.")
    assert question.right == ("They pass through you.", "Nothing happens.")
    assert question.wrong == ("You grow a tree.", "You die.")


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([TARGETS]),
        json.dumps(TARGETS),
        json.dumps(
            {
                "question": TARGETS["question"],
                **{
                    name: {"choices": list(TARGETS[name]), "labels": list(TARGETS[name].values())}  # type: ignore[attr-defined, call-overload]
                    for name in ("mc1_targets", "mc2_targets")
                },
            }
        ),
    ],
)
def test_truthfulqa_in_json(tmp_path: Path, text: str) -> None:
    (question,) = read_truthfulqa(write(tmp_path, text))
    assert question.single == ("Nauru is the smallest.", "The US is.", "Vatican City is not.")
    assert (question.right, question.wrong) == (("Nauru is the smallest.", "Nauru."), ("The US is.",))


def drop(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_squad, "{", "line 1 is no JSON"),
        (read_squad, "[]", "the document has no field 'data' with a list"),
        (read_squad, '{"data": [{"title": "x"}]}', r"data\[0\] has no field 'paragraphs' with a list"),
        (
            read_squad,
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", "answers": []}]}]}]}',
            r"data\[0\].paragraphs\[0\].qas\[0\] has no answer; give one, or set is_impossible",
        ),
        (read_squad, '{"data": []}', "has no question"),
        (
            read_squad,
            json.dumps(SQUAD).replace("region in France", r"region \ud83d in France"),
            r"data\[0\].paragraphs\[0\], field 'context' has half a character, .ud83d",
        ),
        (
            read_truthfulqa,
            CSV.replace("You grow a tree; You die.", "They pass through you."),
            "line 2 has no wrong answer but the best one",
        ),
        (
            read_truthfulqa,
            json.dumps(TARGETS).replace("The US is.", r"The US \udc00"),
            "line 1, field 'mc1_targets' has half a character",
        ),
        (read_halueval, json.dumps(HALUEVAL) + "\n{", "line 2 is no JSON"),
        (read_halueval, json.dumps(drop(HALUEVAL, "right_answer")), "line 1 has no field 'right_answer' with a text"),
        (read_halueval, "[1]", "line 1 has no field 'question'"),
        (read_truthfulqa, "Question,Best Answer\nx,y\n", "line 1 has no column 'Correct Answers'"),
        (read_truthfulqa, CSV.replace("They pass through you,", ",", 1), "line 2 has no field 'Best Answer'"),
        (read_truthfulqa, CSV.replace("You grow a tree; You die.", ";"), "line 2, column 'Incorrect Answers' is empty"),
        (
            read_truthfulqa,
            json.dumps([drop(TARGETS, "mc2_targets")]),
            r"\[0\] has no field 'mc2_targets' with a object",
        ),
        (
            read_truthfulqa,
            json.dumps({**TARGETS, "mc1_targets": {"a": 1, "b": 1, "c": 0}}),
            "line 1, mc1_targets has 2 right answers, must have 1",
        ),
        (read_truthfulqa, json.dumps({**TARGETS, "mc2_targets": {"a": 1}}), "mc2_targets must have right answers"),
    ],
)
def test_errors_say_where(tmp_path: Path, read: Callable[[Path], Any], text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_keys_are_of_what_is_asked_and_not_of_where_it_stands(tmp_path: Path) -> None:
    other = {**HALUEVAL, "question": "Which magazine is older?"}
    one, two, again = read_halueval(
        write(tmp_path, "".join(json.dumps(row) + "\n" for row in (HALUEVAL, other, HALUEVAL)))
    )
    assert again.key == f"{one.key}:2"
    assert [row.key for row in read_halueval(write(tmp_path, json.dumps(other)))] == [two.key]
    first, *_ = read_truthfulqa(write(tmp_path, CSV))
    head, row = CSV.splitlines(keepends=True)
    moved = read_truthfulqa(write(tmp_path, head + row.replace("seeds", "pips") + row))
    assert [question.key == first.key for question in moved] == [False, True]


def test_two_questions_of_one_id_are_an_error(tmp_path: Path) -> None:
    twice = {**SQUAD, "data": SQUAD["data"] * 2}
    with pytest.raises(InputError, match="two questions are called"):
        read_squad(write(tmp_path, json.dumps(twice)))


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_halueval(tmp_path / "none.json")


def test_squads_scores() -> None:
    assert normalize_squad("  The  Eiffel-Tower, a tower. ") == "eiffeltower tower"
    assert measure_f1("the cat sat", ["a cat"]) == pytest.approx(2 * 1 / (2 + 1))
    assert measure_f1("cat cat", ["cat", "dog dog"]) == pytest.approx(2 * 1 / (2 + 1))
    assert measure_f1("bird", ["cat", "dog"]) == 0.0
    assert measure_f1("exactly this", ["other", "Exactly this!"]) == 1.0


def test_mc1_and_mc2_are_those_of_the_paper() -> None:
    question = ChoiceQuestion(key="", question="", single=("a", "x", "y"), right=("a", "b"), wrong=("x", "y"))
    scores = {"a": -2.0, "b": -5.0, "x": -3.0, "y": -2.5}
    first, second = measure_choices(question, scores)
    right = math.exp(-2.0) + math.exp(-5.0)
    assert first == 1.0
    assert second == pytest.approx(right / (right + math.exp(-3.0) + math.exp(-2.5)))
    assert measure_choices(question, {**scores, "b": 0.0, "y": -1.9})[0] == 0.0
    far = {answer: score - 2000 for answer, score in scores.items()}  # where exp() alone would be 0
    assert measure_choices(question, far) == pytest.approx((first, second))
