"""Text of tokens that come one by one: whole letters, stop sequences, nothing lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.serving.growing_text import GrowingText
from model.tokenizing import CheckpointTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> CheckpointTokenizer:
    return load_tokenizer("memory3-tiny")


def grow(tokenizer: CheckpointTokenizer, tokens: list[int], *stops: str, trims_start: bool = False) -> list[str]:
    text = GrowingText(tokenizer.decode, stops, trims_start=trims_start)
    pieces = [text.add(token) for token in tokens]
    return [*pieces, text.finish()]


def cut_slowly(text: str, stops: list[str]) -> str:
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def test_letters_of_several_tokens_come_whole(tokenizer: CheckpointTokenizer) -> None:
    text = "Grüße, 世界! 🙂🙃 done"
    tokens = tokenizer.encode([text])[0].tolist()
    pieces = grow(tokenizer, tokens)
    assert len(tokens) > len(text.split())
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    cut = grow(tokenizer, tokenizer.encode(["ab 🙂"])[0].tolist()[:-1])
    assert "".join(cut) == "ab \N{REPLACEMENT CHARACTER}"


@given(tokens=st.lists(st.integers(min_value=3, max_value=8191), max_size=40))
def test_pieces_join_to_the_text_of_all_tokens(tokenizer: CheckpointTokenizer, tokens: list[int]) -> None:
    assert "".join(grow(tokenizer, tokens)) == tokenizer.decode(tokens)


@given(
    text=st.text(alphabet="abc ", max_size=40),
    stops=st.lists(st.text(alphabet="abc ", min_size=1, max_size=5), max_size=4),
)
def test_the_text_ends_before_the_first_stop_sequence(
    tokenizer: CheckpointTokenizer, text: str, stops: list[str]
) -> None:
    pieces = grow(tokenizer, tokenizer.encode([text])[0].tolist(), *stops)
    # Whichever is complete first ends the text; no stop sequence is ever shown.
    joined = "".join(pieces)
    assert not any(stop in joined for stop in stops)
    assert text.startswith(joined)
    if len(stops) == 1 or not any(stop in text for stop in stops):
        assert joined == cut_slowly(text, stops)


def test_a_stop_sequence_that_only_begins_is_shown_in_the_end(tokenizer: CheckpointTokenizer) -> None:
    tokens = tokenizer.encode(["one two"])[0].tolist()
    assert "".join(grow(tokenizer, tokens, "two three")) == "one two"
    assert "".join(grow(tokenizer, tokens, " two")) == "one"


def test_white_space_at_the_start_can_be_left_out(tokenizer: CheckpointTokenizer) -> None:
    tokens = tokenizer.encode([" \n\n  an answer "])[0].tolist()
    assert "".join(grow(tokenizer, tokens, trims_start=True)) == "an answer "
    assert "".join(grow(tokenizer, tokens)) == " \n\n  an answer "
