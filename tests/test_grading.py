"""Classifiers fine-tuned on graded documents: from files with grades to a filter of a build."""

import json
import math
import random
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flows.building import build
from flows.grading import GradingConfig, read_graded, train_quality
from flows.steps import Steps
from model.quality import load_scorer
from model.training.conversations import DrawConfig
from model.training.grading import (
    GradedBatch,
    GradedDocuments,
    GradedSource,
    GradingObjective,
    compare_grades,
    find_max_tokens,
    save_classifier,
    split_held_out,
    start_classifier,
)
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.stores import LocalStore
from tests.models import train_tokenizer
from tests.test_equality import make_config

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

PARAGRAPHS = [
    paragraph.strip()
    for name in sorted(topics)
    for paragraph in topics[name].split("\n\n")
    if 20 <= len(paragraph.split()) <= 60
][:450]


def damage_words(text: str, share: float, seed: int) -> str:
    """Puts the characters of a share of the words of a text in another order."""
    draw, words = random.Random(seed), text.split()
    for place in draw.sample(range(len(words)), round(share * len(words))):
        words[place] = "".join(draw.sample(words[place], len(words[place])))
    return " ".join(words)


def grade_paragraphs() -> list[dict[str, Any]]:
    """The paragraphs with shares of their words damaged, each a sixth from 5, none, to 0, all."""
    return [
        {"id": str(row), "text": damage_words(text[:250], 1 - row % 6 / 5, row), "grade": row % 6}
        for row, text in enumerate(PARAGRAPHS)
    ]


GRADES = [float(row["grade"]) for row in grade_paragraphs()]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def save_tokenizer(folder: Path, **names: str) -> Path:
    words = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer()._tokenizer, model_max_length=64, **names)
    words.save_pretrained(folder)
    return folder


# Reading grades -------------------------------------------------------------------------------------------------------


def test_what_is_no_graded_document_is_left_out_with_its_reason(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"text": "good", "grade": 5, "other": "x"},
        {"text": "fair", "grade": 2.5},
        {"text": "none"},
        {"text": "null", "grade": None},
        {"text": "words", "grade": "3"},
        {"text": "truth", "grade": True},
        {"text": "much", "grade": 5.01},
        {"text": "little", "grade": -1},
        {"text": "  ", "grade": 3},
        {"grade": 3},
        "{not json",
    ]
    path = write_lines(tmp_path / "graded.jsonl", rows)
    documents, rejects = read_graded([str(path)], text_column="text", grade_column="grade")
    assert documents == GradedDocuments(texts=["good", "fair"], grades=[5.0, 2.5])
    assert rejects == {
        "empty": 1,
        "grade_not_a_number": 2,
        "grade_out_of_range": 2,
        "missing_grade": 2,
        "missing_text": 1,
        "not_json": 1,
    }
    assert sum(rejects.values()) + len(documents) == len(rows)


def test_parquet_is_read_with_columns_of_any_name(tmp_path: Path) -> None:
    table = pa.table({"body": ["a text", "another", "third"], "score": pa.array([1.0, math.nan, 4.5], pa.float32())})
    pq.write_table(table, tmp_path / "graded.parquet")
    documents, rejects = read_graded([str(tmp_path)], text_column="body", grade_column="score")
    assert documents == GradedDocuments(texts=["a text", "third"], grades=[1.0, 4.5])
    assert sum(rejects.values()) == 1


@given(seed=st.integers(0, 1000), share=st.sampled_from([0.1, 0.5]))
def test_copies_of_a_text_are_on_one_side_and_the_order_makes_no_difference(seed: int, share: float) -> None:
    draw = random.Random(seed)
    texts = [f"{number} {draw.random()}" for number in range(300)]
    rows = [(text, float(draw.randrange(6))) for text in texts for _ in range(draw.randint(1, 3))]
    draw.shuffle(rows)
    trained, held_out = split_held_out(GradedDocuments(texts=[t for t, _ in rows], grades=[g for _, g in rows]), share)
    both = [*zip(trained.texts, trained.grades, strict=True), *zip(held_out.texts, held_out.grades, strict=True)]
    assert sorted(both) == sorted(rows)
    assert not set(trained.texts) & set(held_out.texts)
    assert abs(len(set(held_out.texts)) / 300 - share) < 0.12


@pytest.mark.parametrize("share", [0.0, 1.0, 0.999999])
def test_a_side_without_documents_is_refused(share: float) -> None:
    with pytest.raises(InputError, match=r"held_out_share|held out"):
        split_held_out(GradedDocuments(texts=["one", "two", "three", "four"], grades=[1.0] * 4), share)


# Batches and objective ------------------------------------------------------------------------------------------------


def make_source(config: DrawConfig, num_documents: int = 20) -> tuple[GradedSource, torch.nn.Module]:
    model, words = start_classifier(None, tokenizer="memory3-tiny", mean_grade=2.0)
    texts = [paragraph[: 20 + 9 * row] for row, paragraph in enumerate(PARAGRAPHS[:num_documents])]
    grades = [float(row % 6) for row in range(num_documents)]
    source = GradedSource(GradedDocuments(texts=texts, grades=grades), words, find_max_tokens(model, words), config)
    return source, model.eval()


def test_every_document_is_drawn_once_an_epoch_whatever_the_number_of_processes() -> None:
    source, _ = make_source(DrawConfig(batch_size=4, micro_batch_size=3))
    other, _ = make_source(DrawConfig(batch_size=4, micro_batch_size=3, seed=1))

    def list_step(source: GradedSource, step: int, num_ranks: int) -> list[tuple[int, ...]]:
        batches = [batch for rank in range(num_ranks) for batch in source.draw(step, rank, num_ranks)]
        return sorted(
            tuple(row[valid].tolist())
            for batch in batches
            if isinstance(batch, GradedBatch)
            for row, valid in zip(batch.tokens_BT, batch.valid_BT, strict=True)
        )

    first = [document for step in range(5) for document in list_step(source, step, 1)]
    second = [document for step in range(5, 10) for document in list_step(source, step, 1)]
    assert len(set(first)) == 20
    assert sorted(first) == sorted(second)
    assert [list_step(source, step, 1) for step in range(5)] != [list_step(source, step, 1) for step in range(5, 10)]
    for num_ranks in (2, 4):
        assert [list_step(source, step, num_ranks) for step in range(7)] == [
            list_step(source, step, 1) for step in range(7)
        ]
    assert source.source_id != other.source_id
    with pytest.raises(InputError, match="multiple of the 3 processes"):
        source.draw(0, 0, 3)


def test_the_loss_is_the_sum_of_squared_errors_of_the_scores(tmp_path: Path) -> None:
    """What is trained is what is scored later: the same tokens, the same output, padding without effect."""
    model, words = start_classifier(None, tokenizer="memory3-tiny", mean_grade=2.0)
    texts, grades = [PARAGRAPHS[row][: 30 + 40 * row] for row in range(7)], [float(row % 6) for row in range(7)]
    save_classifier(model, words, tmp_path / "model")
    scores = load_scorer(tmp_path / "model").score(texts).astype(np.float64)
    expected = float(((scores - np.array(grades)) ** 2).sum())
    documents = GradedDocuments(texts=texts, grades=grades)
    for size in (7, 1, 3):
        config = DrawConfig(batch_size=7, micro_batch_size=size)
        source = GradedSource(documents, words, find_max_tokens(model, words), config)
        objective = GradingObjective(model).eval()
        with torch.no_grad():
            batches = source.draw(0, 0, 1)
            assert sum(batch.num_targets for batch in batches) == 7
            assert sum(float(objective(batch.to(torch.device("cpu")))) for batch in batches) == pytest.approx(
                expected, rel=1e-3
            )


def test_an_untrained_classifier_says_the_mean_grade() -> None:
    source, model = make_source(DrawConfig(batch_size=20, micro_batch_size=20))
    (batch,) = source.draw(0, 0, 1)
    assert isinstance(batch, GradedBatch)
    with torch.no_grad():
        logits = model(input_ids=batch.tokens_BT, attention_mask=batch.valid_BT.long()).logits
    assert logits.shape == (20, 1)
    assert (logits - 2.0).abs().max() < 0.5


def test_measures_are_those_of_their_definitions() -> None:
    trained = GradedDocuments(texts=["a", "b"], grades=[1.0, 3.0])
    held_out = GradedDocuments(texts=list("cdef"), grades=[0.0, 1.0, 4.0, 5.0])
    report = compare_grades(np.array([0.5, 3.5, 3.0, 4.0], np.float32), trained, held_out)
    assert report.mean_error == pytest.approx((0.5 + 2.5 + 1.0 + 1.0) / 4)
    assert report.mean_error_of_constant == pytest.approx((2 + 1 + 2 + 3) / 4)
    assert report.accuracy == 0.75
    assert report.accuracy_of_constant == 0.5
    # Ranks 1 2 3 4 against 1 3 2 4: 1 - 6 * 2 / (4 * 15).
    assert report.spearman == pytest.approx(0.8)
    assert compare_grades(np.zeros(4, np.float32), trained, held_out).spearman is None
    without_tokens = compare_grades(np.array([math.nan, 1, 4, 5], np.float32), trained, held_out)
    assert without_tokens.mean_error == 0.0


# Models to start from -------------------------------------------------------------------------------------------------


def test_a_bert_and_a_decoder_can_be_fine_tuned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    BertModel(BertConfig(**SHAPE)).save_pretrained(save_tokenizer(tmp_path / "bert", pad_token="<pad>"))
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(save_tokenizer(tmp_path / "llama", eos_token="</s>"))
    texts = [text for row in range(3) for text in ("= 0 1 2 3 4 5 6 7 8 9" * (row + 1), PARAGRAPHS[row])]
    for name in ("bert", "llama"):
        model, words = start_classifier(str(tmp_path / name), tokenizer="", mean_grade=0.0)
        source = GradedSource(
            GradedDocuments(texts=texts, grades=[0.0, 5.0] * 3),
            words,
            find_max_tokens(model, words),
            DrawConfig(batch_size=6, micro_batch_size=4),
        )
        objective = GradingObjective(model).eval()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        losses = []
        for step in range(40):
            optimizer.zero_grad()
            loss = sum((objective(batch) for batch in source.draw(step, 0, 1)), torch.zeros(()))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0]
        save_classifier(model, words, tmp_path / "model")
        scores = load_scorer(tmp_path / "model").score(texts)
        assert float(((scores - np.array([0.0, 5.0] * 3)) ** 2).sum()) < losses[-1]
        assert scores[1::2].min() > scores[::2].max()


def test_what_cannot_be_fine_tuned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no config.json"):
        start_classifier(str(tmp_path), tokenizer="", mean_grade=0.0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(save_tokenizer(tmp_path / "llama"))
    with pytest.raises(InputError, match="no token for padding or for the end"):
        start_classifier(str(tmp_path / "llama"), tokenizer="", mean_grade=0.0)
    BertConfig(**SHAPE).save_pretrained(tmp_path / "llama")
    with pytest.raises(InputError, match="has no weights for bert"):
        start_classifier(str(tmp_path / "llama"), tokenizer="", mean_grade=0.0)
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "no such thing"}')
    with pytest.raises(InputError, match="cannot be loaded as a sequence classifier"):
        start_classifier(str(tmp_path / "llama"), tokenizer="", mean_grade=0.0)
    with pytest.raises(InputError, match="threshold is 6"):
        GradingConfig(threshold=6.0)


# From files to a filter -----------------------------------------------------------------------------------------------


def test_a_classifier_learns_grades_and_filters_a_build(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "graded.jsonl", grade_paragraphs())
    config = GradingConfig(num_steps=100, held_out_share=0.2, draw=DrawConfig(batch_size=16, micro_batch_size=16))
    result = train_quality([str(path)], tmp_path / "run", config)
    assert result.num_read == len(PARAGRAPHS)
    assert result.rejects == {}
    report = result.report
    assert report is not None
    assert report.num_trained + report.num_held_out == len(PARAGRAPHS)
    assert report.spearman is not None
    assert report.spearman > 0.6
    assert report.mean_error < 0.75 * report.mean_error_of_constant
    assert report.accuracy > report.accuracy_of_constant + 0.05
    assert json.loads((tmp_path / "run" / "quality.json").read_bytes()) == json.loads(
        json.dumps(result.to_json()["report"])
    )

    again = train_quality([str(path)], tmp_path / "run", config)
    assert again.summary.resumed_at == 100
    assert again.report == report

    _, held_out = split_held_out(GradedDocuments(texts=[row["text"] for row in grade_paragraphs()], grades=GRADES), 0.2)
    scores = load_scorer(result.model).score(held_out.texts)
    corpus = write_lines(
        tmp_path / "corpus.jsonl", [{"id": str(row), "text": text} for row, text in enumerate(held_out.texts)]
    )
    quality = {"model": result.model, "threshold": 3.0}
    build(LocalStore(tmp_path / "bank"), [str(corpus)], make_config({"quality": quality}), Steps())
    kept = Bank.open(tmp_path / "bank").read_table("documents").column("doc_id").to_pylist()
    assert sorted(kept) == sorted(str(row) for row, score in enumerate(scores) if score >= 3.0)
    assert 0 < len(kept) < len(held_out)
    grades = [held_out.grades[int(doc_id)] for doc_id in kept]
    assert np.mean(grades) > np.mean(held_out.grades) + 1.0
