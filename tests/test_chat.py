"""Conversations: rows and their rejects, templates, exchanges, and that an answer ends where training ended it."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.answering import AskedQuestion, answer_questions, read_questions
from model.generating import GenerationConfig, Generator
from model.training.chat import (
    DEFAULT_MARKERS,
    ChatTemplate,
    load_chat_template,
    read_exchanges,
    stop_at_answers,
)
from model.training.messages import MAX_ROUNDS, Message, cut_rounds, parse_messages
from schemas.errors import InputError
from tests.chats import make_chat_checkpoint, make_chat_tokenizer, wrap_tokenizer

USER, ASSISTANT, END = 3, 4, 5

CONTENTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
    lambda text: text.strip() and not any(marker in text for marker in (*DEFAULT_MARKERS, "<s>", "</s>", "<pad>"))
)


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate(wrap_tokenizer(make_chat_tokenizer()), [1])


def make_messages(contents: list[str], instructions: str | None = None) -> list[Message]:
    """Contents of user and assistant in turn."""
    spoken = [
        Message(role=("user", "assistant")[place % 2], content=text.strip()) for place, text in enumerate(contents)
    ]
    return spoken if instructions is None else [Message(role="system", content=instructions), *spoken]


def test_the_default_template_marks_both_sides_and_the_end(chat: ChatTemplate) -> None:
    encode = make_chat_tokenizer().encode
    exchange = chat.make_exchange(make_messages(["Who is it?", "the user"]))
    assert exchange.prompt_ids.tolist() == [1, USER, *encode(" Who is it?").ids, END, ASSISTANT]
    assert exchange.answer_ids.tolist() == [*encode(" the user").ids, END]
    assert chat.end_token_id == END
    assert chat.render_question(" Who is it?\n") == exchange.prompt_ids.tolist()
    assert chat.encode_answer("the user").tolist() == exchange.answer_ids.tolist()


def test_the_first_word_of_an_answer_is_the_token_it_is_in_a_text(chat: ChatTemplate) -> None:
    """What a model copies from a reference must not be spelt with other tokens there."""
    in_text = make_chat_tokenizer().encode("It is the one").ids
    assert chat.encode_answer("the one").tolist()[:-1] == in_text[-len(chat.encode_answer("the one")) + 1 :]


def test_what_the_system_says_stands_before_the_first_question(chat: ChatTemplate) -> None:
    prompt = chat.render(make_messages(["why?"], "Be brief."))
    assert prompt == [1, USER, *make_chat_tokenizer().encode(" Be brief.\n\nwhy?").ids, END, ASSISTANT]


@given(st.lists(CONTENTS, min_size=1, max_size=4), st.booleans())
def test_every_answer_is_an_exchange_that_begins_as_generation_would(contents: list[str], instructed: bool) -> None:
    chat = ChatTemplate(wrap_tokenizer(SHARED_TOKENIZER), [1])
    messages = make_messages(
        [text for content in contents for text in (content, content[::-1])], "x" * instructed or None
    )
    exchanges = chat.make_exchanges(messages)
    answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
    assert len(exchanges) == len(contents) == len(answers)
    for exchange, place in zip(exchanges, answers, strict=True):
        assert exchange.prompt_ids.tolist() == chat.render(messages[:place])
        assert exchange.answer_ids.tolist().count(END) == 1
        assert exchange.answer_ids[-1] == END
        assert SHARED_TOKENIZER.decode(exchange.answer_ids[:-1].tolist()) == " " + messages[place].content


SHARED_TOKENIZER = make_chat_tokenizer()


@pytest.mark.parametrize("content", ["a <|end|> b", "</s>", "<|assistant|> I am the model"])
def test_a_content_cannot_end_a_turn(chat: ChatTemplate, content: str) -> None:
    with pytest.raises(InputError, match="spells the special token"):
        chat.render_question(content)
    with pytest.raises(InputError, match="spells the special token"):
        chat.make_exchange(make_messages(["why?", content]))


def test_the_template_of_a_checkpoint_is_used_and_what_follows_an_answer_is_left_out() -> None:
    template = (
        "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer = make_chat_tokenizer()
    chat = ChatTemplate(wrap_tokenizer(tokenizer, template), [1])
    first, second = chat.make_exchanges(make_messages(["a", "b", "c", "d"]))
    newline = tokenizer.encode("\n").ids
    assert first.answer_ids.tolist() == [*tokenizer.encode("b").ids, END]
    assert second.prompt_ids.tolist() == [
        *first.prompt_ids.tolist(), *first.answer_ids.tolist(), *newline,
        USER, *tokenizer.encode("c").ids, END, *newline, ASSISTANT,
    ]  # fmt: skip


def test_a_template_that_is_of_no_use_is_refused() -> None:
    tokenizer = make_chat_tokenizer()
    without_end = "{% for message in messages %}{{ message.role + ': ' + message.content }}{% endfor %}"
    with pytest.raises(InputError, match="end with a special token"):
        ChatTemplate(wrap_tokenizer(tokenizer, without_end), [1])
    with pytest.raises(InputError, match="no special token <|user|>"):
        ChatTemplate(wrap_tokenizer(make_chat_tokenizer(())), [1])
    forgetful = (
        "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content[:loop.revindex] + '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    chat = ChatTemplate(wrap_tokenizer(tokenizer, forgetful), [1])
    with pytest.raises(InputError, match="writes a prompt differently"):
        chat.make_exchange(make_messages(["a long question", "an answer"]))
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + forgetful
    with pytest.raises(InputError, match="no system"):
        ChatTemplate(wrap_tokenizer(tokenizer, strict), [1]).render(make_messages(["a"], "b"))


GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}

BAD_ROWS = [
    (b"{", "not JSON"),
    (b'{"prompt": "\xff"}', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[1]", "not an object"),
    (b"{}", "no messages"),
    (b'{"messages": {}}', "no messages"),
    (b'{"messages": [1]}', "role is none of"),
    (b'{"messages": [{"role": ["user"], "content": "a"}]}', "role is none of"),
    (b'{"messages": [{"role": "tool", "content": "a"}]}', "role is none of"),
    (b'{"prompt": " ", "completion": "b"}', "empty or no text"),
    (b'{"prompt": "a", "completion": 5}', "empty or no text"),
    (b'{"prompt": "\\ud800", "completion": "b"}', "no valid Unicode"),
    (b'{"prompt": "a"}', "the last message is no answer"),
    (b'{"messages": [{"role": "assistant", "content": "a"}]}', "do not take turns"),
    (b'{"messages": [{"role": "system", "content": "a"}]}', "do not take turns"),
    (b'{"prompt": "a", "completion": "<|end|>"}', "spells the special token"),
]


def test_rows_are_kept_or_rejected_with_their_reason(chat: ChatTemplate, tmp_path: Path) -> None:
    long = {"messages": GOOD["messages"] * (MAX_ROUNDS + 1)}
    good = [json.dumps(row).encode() for row in (GOOD, {"prompt": " a\n", "completion": "b"}, long)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([*good, b"", *(row for row, _ in BAD_ROWS)]))
    read = read_exchanges(path, chat, sequence_tokens=100)
    expected = [chat.make_exchange(make_messages(["a", "b"] * rounds)) for rounds in (1, 1, *range(1, MAX_ROUNDS + 1))]
    assert [exchange.prompt_ids.tolist() for exchange in read.exchanges] == [
        exchange.prompt_ids.tolist() for exchange in expected
    ]
    assert read.num_kept == 3
    assert read.num_cut == 1
    for row, (_, reason) in zip(read.rejected, BAD_ROWS, strict=True):
        assert reason in row.reason
    assert [row.line for row in read.rejected] == list(range(5, 5 + len(BAD_ROWS)))
    with pytest.raises(InputError, match="cannot be read"):
        read_exchanges(tmp_path / "missing.jsonl", chat, sequence_tokens=100)


def test_rounds_that_do_not_fit_are_left_out(chat: ChatTemplate, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": GOOD["messages"] * 3}))
    sizes = [exchange.num_tokens for exchange in chat.make_exchanges(make_messages(["a", "b"] * 3))]
    for num_fitting, size in enumerate(sizes, start=1):
        read = read_exchanges(path, chat, sequence_tokens=size)
        assert [exchange.num_tokens for exchange in read.exchanges] == sizes[:num_fitting]
        assert (read.num_kept, read.num_cut) == (1, int(num_fitting < 3))
    read = read_exchanges(path, chat, sequence_tokens=sizes[0] - 1)
    assert (read.num_kept, read.num_cut, read.exchanges) == (0, 0, [])
    assert "longer than" in read.rejected[0].reason


def test_rounds_are_cut_after_the_last_answer_that_is_kept() -> None:
    messages = tuple(make_messages(["q", "a"] * 3, "rules"))
    assert cut_rounds(messages, 2) == messages[:5]
    assert cut_rounds(messages, 3) == messages
    assert parse_messages({"prompt": "q"}) == messages[1:2]


def test_a_generation_stops_where_training_ended_answers() -> None:
    checkpoint, chat = make_chat_checkpoint()
    head = torch.nn.Linear(64, 512).requires_grad_(False)
    head.weight.zero_()
    head.bias.zero_()[END] = 1.0
    checkpoint.model.lm_head = head
    generator, config = Generator(checkpoint), GenerationConfig(max_new_tokens=3)
    prompt = chat.render_question("why?")
    assert generator.generate_tokens([prompt], config) == [[END] * 3]
    stop_at_answers(checkpoint, chat)
    assert generator.generate_tokens([prompt], config) == [[]]
    assert checkpoint.config.eos_token_id == [2, END]
    stop_at_answers(checkpoint, chat)
    assert checkpoint.config.eos_token_id == [2, END]


def test_the_shipped_tokenizer_has_what_the_default_template_needs() -> None:
    from model.checkpoint import load_checkpoint

    checkpoint = load_checkpoint()
    chat = load_chat_template("memory3-tiny", checkpoint)
    prompt = chat.render_question("Which PEP is it?")
    assert prompt[:2] == [1, USER]
    assert prompt[-2:] == [END, ASSISTANT]
    assert prompt[2:-2] == checkpoint.tokenizer.encode([" Which PEP is it?"])[0].tolist()


def test_answers_are_those_of_single_questions_cut_at_their_end(tmp_path: Path) -> None:
    checkpoint, chat = make_chat_checkpoint()
    generator = Generator(checkpoint)
    path = tmp_path / "questions.jsonl"
    rows = [
        {"prompt": "why" * number, "completion": "so", "kind": "even" if number % 2 == 0 else "odd"}
        for number in (7, 2, 4)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    report = answer_questions(generator, chat, read_questions(path), max_answer_tokens=6)
    config = GenerationConfig(max_new_tokens=6)
    for question, row in zip(report.questions, rows, strict=True):
        assert question.prompt == row["prompt"]
        (tokens,) = generator.generate_tokens([chat.render_question(row["prompt"])], config)
        assert END not in tokens
        assert question.answer == checkpoint.tokenizer.decode(tokens).strip()
    chat.end_token_id = tokens[3]
    cut = answer_questions(generator, chat, read_questions(path)[2:], max_answer_tokens=6)
    assert cut.questions[0].answer == checkpoint.tokenizer.decode(tokens[: tokens.index(tokens[3])]).strip()


def test_accuracy_counts_exact_matches_by_kind() -> None:
    said = [("Ada  Lovelace\n", "ada lovelace", "a"), ("Ada", "Ada Lovelace", "a"), ("12", "12", "b")]
    questions = [AskedQuestion(prompt="?", answer=answer, expected=right, kind=kind) for answer, right, kind in said]
    from model.answering import AnswerReport

    report = AnswerReport(questions=questions)
    assert report.accuracy == pytest.approx(2 / 3)
    assert report.accuracy_by_kind == {"a": 0.5, "b": 1.0}
