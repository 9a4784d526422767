"""Quality scores by small classifiers trained here, in seconds, to tell documentation from shuffled characters."""

import random
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from model.quality import load_scorer
from schemas.errors import InputError

SHAPE: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}

SENTENCES = [
    sentence.replace("\n", " ").strip()
    for name in sorted(topics)[:30]
    for sentence in topics[name].split(". ")
    if 40 < len(sentence) < 300
]


def shuffle_characters(text: str, seed: int) -> str:
    characters = list(text)
    random.Random(seed).shuffle(characters)
    return "".join(characters)


NOISE = [shuffle_characters(sentence, seed) for seed, sentence in enumerate(SENTENCES)]
HELD_OUT = slice(0, 40)


def train_tokenizer(*, with_padding: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if with_padding:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>" if with_padding else None,
        model_max_length=128,
    )


def train_classifier(folder: Path, model: Any, labels: Callable[[bool], float], *, with_padding: bool = True) -> Path:
    """Trains a model to tell sentences from noise and saves it as a checkpoint."""
    tokenizer = train_tokenizer(with_padding=with_padding)
    examples = [(text, labels(True)) for text in SENTENCES[40:]] + [(text, labels(False)) for text in NOISE[40:]]
    random.Random(0).shuffle(examples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for start in range(0, 40 * 32, 32):
        batch = [examples[index % len(examples)] for index in range(start, start + 32)]
        token_ids = [tokenizer(text, truncation=True, max_length=48)["input_ids"] for text, _ in batch]
        length = min(map(len, token_ids)) if not with_padding else max(map(len, token_ids))
        input_ids = torch.tensor([(ids + [0] * length)[:length] for ids in token_ids])
        mask = torch.tensor([([1] * len(ids) + [0] * length)[:length] for ids in token_ids])
        target = torch.tensor([label for _, label in batch])
        if not with_padding:
            logits = model.score(model.model(input_ids).last_hidden_state[:, -1])
            loss = torch.nn.functional.cross_entropy(logits, target.long())
        else:
            target = target.float() if model.config.num_labels == 1 else target.long()
            loss = model(input_ids=input_ids, attention_mask=mask, labels=target).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_bert(num_labels: int) -> BertForSequenceClassification:
    torch.manual_seed(0)
    # Weights larger than usual: a small model with the usual ones says the same of every text for long.
    config = BertConfig(**SHAPE, pad_token_id=0, initializer_range=0.15, hidden_dropout_prob=0.0)
    config.num_labels = num_labels
    return BertForSequenceClassification(config)


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_classifier(tmp_path_factory.mktemp("binary"), make_bert(2), float)


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_classifier(tmp_path_factory.mktemp("graded"), make_bert(6), lambda good: 5.0 if good else 1.0)


@pytest.fixture(scope="module")
def regression(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_classifier(tmp_path_factory.mktemp("regression"), make_bert(1), lambda good: 4.0 if good else 0.0)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**SHAPE, pad_token_id=None))
    return train_classifier(tmp_path_factory.mktemp("decoder"), model, float, with_padding=False)


CHECKPOINTS = ["binary", "graded", "regression", "decoder"]


def score_slowly(checkpoint: Path, texts: list[str], max_tokens: int = 128) -> list[float]:
    """One text at a time, by the model itself."""
    name = "Llama" if "decoder" in checkpoint.name else "Bert"
    kinds = {"Bert": BertForSequenceClassification, "Llama": LlamaForSequenceClassification}
    model = kinds[name].from_pretrained(checkpoint).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    scores = []
    for text in texts:
        input_ids = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=input_ids).logits[0].double()
        shares = logits.exp() / logits.exp().sum()
        expected = sum(index * float(share) for index, share in enumerate(shares))
        scores.append(float(logits[0]) if len(logits) == 1 else expected)
    return scores


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_scores_are_those_of_the_model_alone(name: str, request: pytest.FixtureRequest) -> None:
    checkpoint = request.getfixturevalue(name)
    texts = [*SENTENCES[:6], *NOISE[:6], "x", topics["lambda"], SENTENCES[7] * 20]
    scores = load_scorer(checkpoint, batch_size=4, max_tokens=128).score(texts)
    assert scores.dtype == np.float32
    assert scores.shape == (len(texts),)
    np.testing.assert_allclose(scores, score_slowly(checkpoint, texts), atol=1.1e-4)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_scores_separate_documentation_from_noise(name: str, request: pytest.FixtureRequest) -> None:
    scorer = load_scorer(request.getfixturevalue(name), max_tokens=48)
    good, bad = scorer.score(SENTENCES[HELD_OUT]), scorer.score(NOISE[HELD_OUT])
    wins = (good[:, None] > bad[None]).mean()
    assert wins > 0.9
    low, high = {"binary": (0, 1), "graded": (0, 5), "regression": (-9, 9), "decoder": (0, 1)}[name]
    assert ((low <= good) & (good <= high)).all()
    assert ((low <= bad) & (bad <= high)).all()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_scores_depend_neither_on_batch_nor_on_order(name: str, request: pytest.FixtureRequest) -> None:
    checkpoint = request.getfixturevalue(name)
    texts = [*SENTENCES[:9], *NOISE[:9], "", "pass", topics["assert"]]
    if name == "decoder":
        texts.remove("")
    scores = load_scorer(checkpoint, max_tokens=128).score(texts)
    alone = load_scorer(checkpoint, batch_size=1, max_tokens=128).score(texts)
    backwards = load_scorer(checkpoint, batch_size=5, max_tokens=128).score(texts[::-1])[::-1]
    np.testing.assert_allclose(scores, alone, atol=1.1e-4)
    np.testing.assert_allclose(scores, backwards, atol=1.1e-4)
    assert np.array_equal(scores, np.round(scores, 4))
    assert len(set(scores.tolist())) > 10


def test_only_the_beginning_of_a_text_counts(binary: Path) -> None:
    text = topics["lambda"]
    scorer = load_scorer(binary, max_tokens=32)
    same, other = scorer.score([text, text[:600] + NOISE[0] * 9]), scorer.score([NOISE[0] + text])
    assert same[0] == same[1] != other[0]


def test_a_text_that_spells_a_special_token_is_text(regression: Path) -> None:
    text = f"{NOISE[0][:40]} </s> <pad> <pad>"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(regression)
    model = BertForSequenceClassification.from_pretrained(regression).eval()
    expected = []
    for split in (True, False):
        input_ids = tokenizer(text, split_special_tokens=split, return_tensors="pt")["input_ids"]
        expected.append(float(model(input_ids=input_ids).logits.detach()))
    (score,) = load_scorer(regression, max_tokens=128).score([text])
    assert abs(expected[0] - expected[1]) > 1e-3
    assert score == pytest.approx(expected[0], abs=1.1e-4)


def test_no_texts_and_texts_without_tokens(binary: Path, decoder: Path) -> None:
    assert load_scorer(binary, max_tokens=64).score([]).shape == (0,)
    assert np.isfinite(load_scorer(binary, max_tokens=64).score([""])).all()
    scores = load_scorer(decoder, max_tokens=64).score(["", "pass"])
    assert np.isnan(scores).tolist() == [True, False]


def test_ids_follow_from_what_determines_a_score(binary: Path, graded: Path, tmp_path: Path) -> None:
    scorer_id = load_scorer(binary, max_tokens=64).scorer_id
    assert scorer_id.startswith("bert:")
    assert load_scorer(binary, batch_size=3, max_tokens=64, num_threads=2).scorer_id == scorer_id
    assert load_scorer(binary, max_tokens=63).scorer_id != scorer_id
    assert load_scorer(graded, max_tokens=64).scorer_id != scorer_id
    model = BertForSequenceClassification.from_pretrained(binary)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(binary)
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert load_scorer(tmp_path, max_tokens=64).scorer_id == scorer_id
    with torch.no_grad():
        model.classifier.bias[0] += 0.5
    model.save_pretrained(tmp_path)
    assert load_scorer(tmp_path, max_tokens=64).scorer_id != scorer_id


def test_a_language_model_is_no_scorer(binary: Path, tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**SHAPE)).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(binary).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"is no trained sequence classifier: it has no weights for .*classifier"
    ) as caught:
        load_scorer(tmp_path, max_tokens=64)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_checkpoint_is_refused(binary: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a checkpoint: it has no config.json"):
        load_scorer(tmp_path / "missing")
    (tmp_path / "config.json").write_bytes((binary / "config.json").read_bytes())
    with pytest.raises(InputError, match="cannot be loaded as a sequence classifier") as caught:
        load_scorer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "quality: batch_size is 0, must be at least 1"),
        ({"max_tokens": 0}, "quality: max_tokens is 0, must be at least 1"),
        ({"num_threads": 0}, "quality: num_threads is 0, must be at least 1"),
        ({"max_tokens": 512}, "quality: max_tokens is 512, must be at most 128"),
        ({"max_tokens": 64, "device": "nowhere"}, "the model cannot be put on the device 'nowhere'"),
    ],
)
def test_settings_are_checked(binary: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_scorer(binary, **changes)


def test_independent_labels_are_refused(binary: Path, tmp_path: Path) -> None:
    model = BertForSequenceClassification(BertConfig(**SHAPE, problem_type="multi_label_classification"))
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(binary).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="gives several labels to a text"):
        load_scorer(tmp_path, max_tokens=64)
