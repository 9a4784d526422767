"""How many questions a model answers: exact matches of what it says, greedily, with and without memory.

Stands beside :mod:`model.evaluating`, which measures losses: this goes through the generator as a user does.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from model.generating import GenerationConfig, Generator
from model.training.chat import ChatTemplate
from model.training.messages import parse_content, read_rows
from schemas.errors import InputError

QUESTIONS_PER_BATCH = 32

MAX_ANSWER_TOKENS = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskedQuestion:
    """A question and what it was answered.

    Attributes:
        prompt: the question.
        expected: the right answer.
        kind: a group it is counted with; "" for none.
        answer: what the model said.
    """

    prompt: str
    expected: str
    kind: str = ""
    answer: str = ""

    @property
    def is_correct(self) -> bool:
        """Whether the answer is the right one, white space and the case of letters aside."""
        return normalize_answer(self.answer) == normalize_answer(self.expected)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerReport:
    """How many questions were answered.

    Attributes:
        questions: all of them, with their answers.
    """

    questions: list[AskedQuestion]

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return sum(question.is_correct for question in self.questions) / max(1, len(self.questions))

    @property
    def accuracy_by_kind(self) -> dict[str, float]:
        """The share of right answers in each group."""
        asked = Counter(question.kind for question in self.questions)
        correct = Counter(question.kind for question in self.questions if question.is_correct)
        return {kind: correct[kind] / asked[kind] for kind in sorted(asked)}


def normalize_answer(text: str) -> str:
    """Returns an answer as it is compared."""
    return " ".join(text.split()).casefold()


def read_questions(path: Path) -> list[AskedQuestion]:
    """Reads questions from JSON Lines: ``{"prompt": ..., "completion": ..., "kind": ...}``, the kind if there is one.

    Raises:
        InputError: the file cannot be read, has no question, or a row is no question.
    """
    questions = []
    for line, row in read_rows(path):
        try:
            if isinstance(row, InputError):
                raise row
            prompt, expected = parse_content(row.get("prompt")), parse_content(row.get("completion"))
        except InputError as error:
            raise InputError(f"{path}, line {line} is no question with an answer: {error}") from error
        questions.append(AskedQuestion(prompt=prompt, expected=expected, kind=str(row.get("kind", ""))))
    if not questions:
        raise InputError(f"{path} has no question; give JSON lines with a prompt and a completion")
    return questions


def answer_prompts(
    generator: Generator, chat: ChatTemplate, prompts: Sequence[Sequence[int]], config: GenerationConfig
) -> list[str]:
    """Returns what a model answers to prompts that a chat template has rendered; all advance together.

    An answer ends where the template ends it, whether or not the model is set to stop there.
    """
    decode = generator.checkpoint.tokenizer.decode
    answers = []
    for tokens in generator.generate_tokens(prompts, config):
        end = tokens.index(chat.end_token_id) if chat.end_token_id in tokens else len(tokens)
        answers.append(decode(tokens[:end]).strip())
    return answers


def answer_questions(
    generator: Generator,
    chat: ChatTemplate,
    questions: Sequence[AskedQuestion],
    *,
    num_memories: int = GenerationConfig.num_memories,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
) -> AnswerReport:
    """Asks a generator every question, many at a time.

    Args:
        generator: a model with or without memories.
        chat: the template of the model.
        questions: what to ask.
        num_memories: memories a chunk.
        max_answer_tokens: where an answer is cut that does not end.

    Raises:
        InputError: a question spells a special token, or is too long for the model.
    """
    config = GenerationConfig(max_new_tokens=max_answer_tokens, num_memories=num_memories)
    prompts = [chat.render_question(question.prompt) for question in questions]
    # Prompts of about the same length go together: the shorter ones of a batch are padded.
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), QUESTIONS_PER_BATCH):
        group = order[start : start + QUESTIONS_PER_BATCH]
        given = answer_prompts(generator, chat, [prompts[place] for place in group], config)
        for place, answer in zip(group, given, strict=True):
            answers[place] = answer
    return AnswerReport(
        questions=[
            dataclasses.replace(question, answer=answer) for question, answer in zip(questions, answers, strict=True)
        ]
    )
