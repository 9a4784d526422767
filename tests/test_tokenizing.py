"""Corpora encoded as the ``tokenizers`` library does: fast where its kind is known, and right where it is not."""

import itertools
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from model import byte_level
from model.pretokenizing import find_pattern
from model.tokenizing import CheckpointTokenizer, load_tokenizer
from pipelines.python_docs import iterate_docstrings
from schemas.errors import InputError
from schemas.protocols import EncodedTexts
from tests.test_byte_pairs import NAMES, PRE_TOKENIZERS, mixed_text

CHINESE = "参考文献的切分由句子的结尾决定，语言模型读取记忆；记忆来自文献。第12条：标题与正文。"
CORPUS = [*(topics[name] for name in sorted(topics)[:12]), *[CHINESE] * 20, "naïve café об этом ' 's 're 12345 مرحبا"]


def train(name: str, *, whole: bool = False, vocab_size: int = 700) -> Tokenizer:
    """Trains a byte-level BPE with a pattern; ``whole`` drops some merges' priority, so that it makes a difference."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[name]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    if not whole:
        return tokenizer
    parts = json.loads(tokenizer.to_str())
    parts["model"]["ignore_merges"] = True
    parts["model"]["merges"] = parts["model"]["merges"][200:] + parts["model"]["merges"][:200]
    return Tokenizer.from_str(json.dumps(parts))


@pytest.fixture(scope="module")
def trained() -> dict[tuple[str, bool], CheckpointTokenizer]:
    return {(name, whole): CheckpointTokenizer(train(name, whole=whole)) for name in NAMES for whole in (False, True)}


@pytest.fixture(scope="module")
def qwen() -> CheckpointTokenizer:
    """A tokenizer like those of Qwen 2 and 3: normal form C, and added tokens that are not special."""
    tokenizer = train("Qwen2")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<think>", normalized=True)])
    return CheckpointTokenizer(tokenizer)


def split(encoded: EncodedTexts) -> list[tuple[list[int], list[int], list[int], list[bool]]]:
    return [
        (
            encoded.token_ids[a:b].tolist(),
            encoded.starts[a:b].tolist(),
            encoded.ends[a:b].tolist(),
            encoded.separable[a:b].tolist(),
        )
        for a, b in itertools.pairwise(encoded.offsets.tolist())
    ]


def check_bytes(tokenizer: CheckpointTokenizer, texts: list[str]) -> None:
    """Compares with the library: ids, bytes as the vocabulary spells them, characters as the library counts them."""
    library = tokenizer._tokenizer
    rows = split(tokenizer.encode_texts(pa.array(texts, pa.string())))
    assert len(rows) == len(texts)
    for text, (ids, starts, ends, separable) in zip(texts, rows, strict=True):
        encoding = library.encode(text, add_special_tokens=False)
        assert ids == encoding.ids
        edges = np.cumsum([0, *(len(str(library.id_to_token(token))) for token in ids)]).tolist()
        assert (starts, ends) == (edges[:-1], edges[1:])
        chars = [index for index, char in enumerate(text) for _ in char.encode()]
        assert edges[-1] == len(chars)
        assert [(chars[a], chars[b - 1] + 1) for a, b in zip(starts, ends, strict=True)] == encoding.offsets
        assert separable[:1] == [True] * bool(ids)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", NAMES)
@given(st.lists(mixed_text, max_size=4))
def test_tokens_are_those_of_the_library(
    trained: dict[tuple[str, bool], CheckpointTokenizer], name: str, whole: bool, texts: list[str]
) -> None:
    check_bytes(trained[name, whole], texts)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_real_texts(trained: dict[tuple[str, bool], CheckpointTokenizer], name: str, whole: bool) -> None:
    tokenizer = trained[name, whole]
    assert tokenizer.describe_speed() == f"kernels for byte-level BPE ({name})"
    documents = [document["text"] for document in itertools.islice(iterate_docstrings(), 25)]
    check_bytes(tokenizer, [*documents, CHINESE * 30, "x" * 3000, " " * 3000])


def test_whole_words_make_a_difference(trained: dict[tuple[str, bool], CheckpointTokenizer]) -> None:
    texts = pa.array(CORPUS)
    assert trained["cl100k", True].encode_texts(texts).token_ids.tolist() != (
        trained["cl100k", False].encode_texts(texts).token_ids.tolist()
    )


@pytest.mark.parametrize("name", NAMES)
@given(mixed_text, st.data())
def test_text_between_separable_places_has_its_tokens_alone(
    trained: dict[tuple[str, bool], CheckpointTokenizer], name: str, text: str, data: st.DataObject
) -> None:
    tokenizer = trained[name, False]
    ((ids, starts, _, separable),) = split(tokenizer.encode_texts(pa.array([text])))
    cuts = [index for index, can_cut in enumerate(separable) if can_cut] + [len(ids)]
    first = data.draw(st.sampled_from(cuts))
    last = data.draw(st.sampled_from([cut for cut in cuts if cut >= first]))
    places = [*starts, len(text.encode())]
    part = text.encode()[places[first] : places[last]].decode()
    assert tokenizer.encode([part])[0].tolist() == ids[first:last]


def test_the_shipped_tokenizer_is_fast_and_right() -> None:
    tokenizer = load_tokenizer("memory3-tiny")
    assert tokenizer.describe_speed() == "kernels for byte-level BPE (cl100k)"
    check_bytes(tokenizer, [*CORPUS, *(topics[name] for name in sorted(topics)[20:40]), CHINESE])


def test_special_tokens_are_text(trained: dict[tuple[str, bool], CheckpointTokenizer]) -> None:
    for tokenizer in trained.values():
        check_bytes(tokenizer, ["</s>", "a</s>b <|end|>", "<pad>", " </s> "])
        found = tokenizer.encode_texts(pa.array(["</s>"]))
        assert tokenizer._tokenizer.token_to_id("</s>") not in found.token_ids


def test_empty_texts_arrays_slices_and_large_strings(trained: dict[tuple[str, bool], CheckpointTokenizer]) -> None:
    tokenizer = trained["cl100k", False]
    texts = ["", "It's", "", CHINESE, "end", ""]
    expected = split(tokenizer.encode_texts(pa.array(texts)))
    assert [row[0] for row in expected] == [ids.tolist() for ids in tokenizer.encode(texts)]
    for kind in (pa.string(), pa.large_string()):
        array = pa.array(texts, kind)
        assert split(tokenizer.encode_texts(array)) == expected
        for start, end in itertools.combinations(range(len(texts) + 1), 2):
            assert split(tokenizer.encode_texts(array[start:end])) == expected[start:end]
        for empty in (pa.array([], kind), array[3:3]):
            found = tokenizer.encode_texts(empty)
            assert (len(found.token_ids), found.offsets.tolist()) == (0, [0])
        assert split(tokenizer.encode_texts(pa.array(["", ""], kind))) == [([], [], [], [])] * 2
    found = tokenizer.encode_texts(pa.array(texts))
    types = [getattr(found, name).dtype for name in ("token_ids", "starts", "ends", "separable", "offsets")]
    assert types == [np.int32, np.int64, np.int64, np.bool_, np.int64]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (pa.array([1, 2]), "of type int64"),
        (pa.array(["a", None]), "1 texts are null"),
        (pa.array([b"\xff\xfe"]).view(pa.string()), "valid UTF-8"),
    ],
)
def test_what_is_no_text_is_refused(
    trained: dict[tuple[str, bool], CheckpointTokenizer], texts: pa.Array, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        trained["GPT-2", False].encode_texts(texts)


def test_threads_give_the_same_tokens(trained: dict[tuple[str, bool], CheckpointTokenizer]) -> None:
    fresh = CheckpointTokenizer(Tokenizer.from_str(trained["Qwen2", False]._tokenizer.to_str()))
    texts = pa.array([*CORPUS, *topics.values()])
    expected = split(trained["Qwen2", False].encode_texts(texts))
    found = []
    threads = [threading.Thread(target=lambda: found.append(split(fresh.encode_texts(texts)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_texts_to_normalize_and_added_tokens_are_left_to_the_library(qwen: CheckpointTokenizer) -> None:
    assert qwen.describe_speed() == "kernels for byte-level BPE (Qwen2)"
    texts = [
        "plain",
        "caf\u00e9",
        "cafe\u0301",
        "call <tool> now",
        CHINESE,
        "<think>",
        "\u1100\u1161",
        "\u0958",
        "\u212b",
    ]
    exceptions = byte_level.ByteLevelEncoder(qwen._tokenizer).find_exceptions(pa.array(texts))
    assert exceptions.tolist() == [False, False, True, True, False, True, True, True, True]
    rows = split(qwen.encode_texts(pa.array(texts)))
    for text, (ids, starts, ends, _) in zip(texts, rows, strict=True):
        encoding = qwen._tokenizer.encode(text, add_special_tokens=False)
        assert ids == encoding.ids
        places = [0, *itertools.accumulate(len(char.encode()) for char in text)]
        if text not in ("caf\u00e9", CHINESE):  # there tokens are parts of characters, which the library widens
            assert list(zip(starts, ends, strict=True)) == [(places[a], places[b]) for a, b in encoding.offsets]


@given(
    st.lists(
        st.one_of(mixed_text, st.sampled_from(["<tool>", "<think>", "e\u0301", "\u093c", "\u11a8", "각"])), max_size=5
    )
)
def test_exceptions_are_all_that_need_to_be(qwen: CheckpointTokenizer, texts: list[str]) -> None:
    texts = ["".join(texts), *texts]
    found = split(qwen.encode_texts(pa.array(texts, pa.string())))
    assert [row[0] for row in found] == [ids.tolist() for ids in qwen.encode(texts)]


def make_metaspace() -> Tokenizer:
    """A tokenizer like SentencePiece's: ``▁`` for spaces, and bytes for characters it does not know."""
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>"], show_progress=False)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(CORPUS[:12], trainer)
    parts = json.loads(tokenizer.to_str())
    vocabulary = parts["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    parts["model"].update(byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def make_wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    return tokenizer


@pytest.mark.parametrize("make", [make_metaspace, make_wordpiece])
def test_other_tokenizers_are_left_to_the_library(make: Callable[[], Tokenizer]) -> None:
    tokenizer = CheckpointTokenizer(make())
    assert tokenizer.describe_speed().startswith("the tokenizers library, since its pre-tokenizer is not")
    texts = [*CORPUS, "", "naïve 中文 ｆｕｌｌ \U0001f600 é", "", "last"]
    encoded = tokenizer.encode_texts(pa.array(texts))
    for text, (ids, starts, ends, separable) in zip(texts, split(encoded), strict=True):
        encoding = tokenizer._tokenizer.encode(text, add_special_tokens=False)
        assert ids == encoding.ids
        places = [0, *itertools.accumulate(len(char.encode()) for char in text)]
        assert list(zip(starts, ends, strict=True)) == [(places[a], places[b]) for a, b in encoding.offsets]
        assert separable == [True, *[False] * len(ids)][: len(ids)]


@pytest.fixture(scope="module")
def normalizing() -> CheckpointTokenizer:
    """A tokenizer that takes letters apart and swaps and drops some."""
    tokenizer = make_wordpiece()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Strip(), normalizers.Replace("1", "")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return CheckpointTokenizer(tokenizer)


@given(st.lists(st.one_of(mixed_text, st.sampled_from(["a\u0301\u0323b", " 1 \ufb03 ", "각"])), max_size=3))
def test_spans_ascend_whatever_a_normalizer_does(normalizing: CheckpointTokenizer, texts: list[str]) -> None:
    for text, (_, starts, ends, _) in zip(
        texts, split(normalizing.encode_texts(pa.array(texts, pa.string()))), strict=True
    ):
        assert starts == sorted(starts)
        assert ends == sorted(ends)
        assert all(0 <= start <= end <= len(text.encode()) for start, end in zip(starts, ends, strict=True))


def change(tokenizer: Tokenizer, **changes: object) -> CheckpointTokenizer:
    parts = json.loads(tokenizer.to_str())
    for name, value in changes.items():
        part, _, key = name.partition("__")
        if key:
            parts[part][key] = value
        else:
            parts[part] = value
    return CheckpointTokenizer(Tokenizer.from_str(json.dumps(parts)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "it normalizes texts"),
        ({"model__byte_fallback": True}, "its model has byte_fallback"),
        ({"model__dropout": 0.1}, "its model has dropout"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "its pre-tokenizer is not"),
    ],
)
def test_reasons_to_leave_it_to_the_library(changes: dict[str, object], reason: str) -> None:
    assert reason in change(train("GPT-2", vocab_size=300), **changes).describe_speed()


def test_an_alphabet_that_lacks_bytes_is_left_to_the_library() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    wrapped = CheckpointTokenizer(tokenizer)
    assert "lacks some of the 256 bytes" in wrapped.describe_speed()
    assert split(wrapped.encode_texts(pa.array(["abc"])))[0][0] == [2]


def test_a_difference_in_a_probe_switches_the_kernels_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Should a later library read an expression otherwise, nothing but speed is lost."""
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    monkeypatch.setattr(byte_level, "find_pattern", lambda _: find_pattern(gpt2))
    tokenizer = CheckpointTokenizer(train("cl100k", vocab_size=400))
    with caplog.at_level(logging.WARNING):
        found = tokenizer.encode_texts(pa.array(CORPUS))
    assert "tokens of the probe" in tokenizer.describe_speed()
    assert "tokens of the probe" in caplog.text
    assert [row[0] for row in split(found)] == [ids.tolist() for ids in tokenizer.encode(CORPUS)]


def test_prompts_do_without_kernels() -> None:
    program = (
        "import sys; from model.tokenizing import load_tokenizer; tokenizer = load_tokenizer('memory3-tiny');"
        "tokenizer.encode(['a prompt']); sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
