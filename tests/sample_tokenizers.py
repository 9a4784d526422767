"""Tokenizers of several kinds, trained on a little text in several scripts, and texts to try them on."""

import functools
import itertools
from collections.abc import Sequence
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from schemas.identifiers import hash_bytes
from schemas.protocols import EncodedTexts, IntArray, TextTokenizer

KINDS = ("byte_bpe", "words", "unigram", "prepending", "dropping")

CHINESE = (
    "第一条 为了保护专利权人的合法权益，制定本法。本法所称的发明创造是指发明、实用新型和外观设计。"
    "他问：“什么是外观设计？”外观设计是产品的新设计！"
)
HINDI = "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि की देन प्राप्त है। "
THAI = "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิต่างมีเหตุผลและมโนธรรม"
ARABIC = "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. هل تفهم؟ نعم، وقد وهبوا عقلا وضميرا. "
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
ACCENTED = "e\u0301"


class WrappedTokenizer:
    """The protocol's methods over a tokenizer, one text at a time; says of no place that it is separable."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_encoded_bytes = 0

    @property
    def tokenizer_id(self) -> str:
        return hash_bytes(self._tokenizer.to_str().encode())

    def encode(self, texts: Sequence[str]) -> list[IntArray]:
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in found]

    def encode_texts(self, texts: pa.Array) -> EncodedTexts:
        token_ids, spans, separable, offsets = [], [np.empty((0, 2), dtype=np.int64)], [], [0]
        for text in texts.to_pylist():
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            places = np.array([0, *itertools.accumulate(len(character.encode()) for character in text)])
            self.num_encoded_bytes += places[-1]
            token_ids.extend(encoding.ids)
            spans.append(places[np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)])
            separable.extend(self.find_separable(encoding.word_ids))
            offsets.append(len(token_ids))
        starts, ends = np.ascontiguousarray(np.concatenate(spans).T)
        return EncodedTexts(
            token_ids=np.array(token_ids, dtype=np.int32),
            starts=starts,
            ends=ends,
            separable=np.array(separable, dtype=bool),
            offsets=np.array(offsets, dtype=np.int64),
        )

    def find_separable(self, word_ids: Sequence[int]) -> list[bool]:
        return [False] * len(word_ids)


class SeparatingTokenizer(WrappedTokenizer):
    """Says that words are separable: true of a tokenizer whose expression for words does not look around."""

    def find_separable(self, word_ids: Sequence[int]) -> list[bool]:
        return [place == 0 or word_ids[place - 1] != word for place, word in enumerate(word_ids)]


def iterate_training_text() -> list[str]:
    return [topics[name] for name in sorted(topics)[:40]] + [CHINESE, HINDI, THAI, ARABIC, FAMILY] * 5


@functools.cache
def make_tokenizer(kind: str) -> TextTokenizer:
    trainer: trainers.Trainer
    if kind == "byte_bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    elif kind == "words":
        tokenizer = Tokenizer(models.BPE())
        words = pre_tokenizers.Split(Regex(r" ?[^\s.,。，]+|\s|[.,。，]"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(iterate_training_text(), trainer)
        return SeparatingTokenizer(tokenizer)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=2000, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
    elif kind == "prepending":  # a space before every text, so that a piece has more tokens alone than in its document
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bytes_of_fallback = [f"<0x{value:02X}>" for value in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=1200, special_tokens=["<unk>", *bytes_of_fallback], max_token_length=8, show_progress=False
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tokenizer.train_from_iterator(iterate_training_text(), trainer)
        tokenizer.pre_tokenizer = None
        return WrappedTokenizer(tokenizer)
    else:  # drops white space, and all that is not a letter or a digit
        tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " ")
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(iterate_training_text(), trainer)
    return WrappedTokenizer(tokenizer)
