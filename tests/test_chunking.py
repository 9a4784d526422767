"""Cutting documents into references: boundaries, tiling, token limits, and equal text giving equal ids."""

import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pipelines import chunking
from pipelines.boundaries import (
    CLAUSE_END,
    LINE_END,
    PARAGRAPH_END,
    SENTENCE_END,
    WORD_END,
    find_boundaries,
    find_inner_positions,
)
from pipelines.chunking import CHUNKS, ChunkingConfig, chunk_documents
from schemas.errors import InputError
from schemas.identifiers import hash_bytes, make_ref_id
from schemas.protocols import IntArray, TextTokenizer
from schemas.tables import OCCURRENCES, REFERENCES

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
    """The protocol's three methods over a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def tokenizer_id(self) -> str:
        return hash_bytes(self._tokenizer.to_str().encode())

    def encode(self, texts: Sequence[str]) -> list[IntArray]:
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in found]

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[IntArray, IntArray]]:
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.array(encoding.ids, dtype=np.int32), np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2))
            for encoding in found
        ]


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


KINDS = ("byte_bpe", "unigram", "prepending", "dropping")
SENTENCE_MARKS, PLAIN_MARKS, CLOSERS = ".!?", "。！？", "\"')」”"

FRAGMENTS = [
    "The bank holds references. ",
    "It is read by attention, e.g. here; and (there). ",
    "    indented = code[0]\n",
    "\r\n",
    "\n\n",
    "\n",
    " ",
    "\t",
    "   ",
    "\x00",
    "\u200b",
    "\ufeff",
    "\ufdfa",
    "\u00a0",
    FAMILY,
    ACCENTED,
    "e" + "\u0316" * 13,
    "\U0001f1e9\U0001f1ea",
    "\u2764\ufe0f",
    "ﬁ①Å",
    CHINESE[:60],
    HINDI[:40],
    THAI[:40],
    ARABIC[:40],
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "....................",
    "%$#@!&^*()_+" * 3,
]
MIXED_TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=12), max_size=30).map("".join)
SMALL = ChunkingConfig(max_tokens=32)


def find_boundaries_slowly(text: str) -> dict[int, int]:
    """Asks of every place by itself what ends there; knows the marks named above only."""
    found: dict[int, int] = {}

    def add(place: int, rank: int) -> None:
        if 0 < place < len(text):
            found[place] = min(found.get(place, rank), rank)

    gaps = {}
    for run in re.finditer(r"\s+", text):
        num_newlines = run.group().count("\n") + run.group().replace("\r\n", "").count("\r")
        last_newline = max(run.group().rfind("\n"), run.group().rfind("\r"))
        after = run.start() + last_newline + 1 if num_newlines else run.end()
        gaps[run.start()] = (after, run.end())
        rank = {0: WORD_END, 1: LINE_END}.get(num_newlines, PARAGRAPH_END)
        add(run.start(), rank)
        add(after, rank)
    for place in range(1, len(text) + 1):
        mark = place
        while mark > 0 and text[mark - 1] in CLOSERS:
            mark -= 1
        last, following = text[mark - 1 : mark] or " ", text[place : place + 1]
        mark_rank = None
        next_character = text[gaps[place][1] : gaps[place][1] + 1] if place in gaps else ""
        if last in SENTENCE_MARKS and place in gaps and not ("a" <= next_character <= "z"):
            mark_rank = SENTENCE_END
        if last in PLAIN_MARKS and (following == "" or following not in CLOSERS):
            is_last = mark < place or following == "" or following not in PLAIN_MARKS
            mark_rank = SENTENCE_END if is_last else mark_rank
        if text[place - 1] == "，" or (text[place - 1] == "," and place in gaps):
            mark_rank = CLAUSE_END
        if mark_rank is not None:
            add(place, mark_rank)
            if place in gaps:
                add(gaps[place][0], mark_rank)
    return found


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet='aA1.!。？，, \n\r\t"」)', max_size=30))
def test_boundaries_match_a_slow_search(text: str) -> None:
    positions, ranks = find_boundaries(text)
    assert positions.dtype == np.int32
    assert ranks.dtype == np.uint8
    assert dict(zip(positions.tolist(), ranks.tolist(), strict=True)) == find_boundaries_slowly(text)
    assert positions.tolist() == sorted(positions.tolist())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two", {4: SENTENCE_END, 5: SENTENCE_END}),
        (
            'He said "No!" Then',
            {2: WORD_END, 3: WORD_END, 7: WORD_END, 8: WORD_END, 13: SENTENCE_END, 14: SENTENCE_END},
        ),
        ("v3.14 e.g. this", {5: WORD_END, 6: WORD_END, 10: WORD_END, 11: WORD_END}),
        ("if x:\n    y", {2: WORD_END, 3: WORD_END, 5: LINE_END, 6: LINE_END}),
        ("a\n\n  b", {1: PARAGRAPH_END, 3: PARAGRAPH_END}),
        ("他说：“好。”然后……走", {3: CLAUSE_END, 7: SENTENCE_END, 11: SENTENCE_END}),
        ("है। वह", {3: SENTENCE_END, 4: SENTENCE_END}),
        ("تفهم؟نعم", {5: SENTENCE_END}),
        ("ไม่มีช่องว่าง", {}),
        ("", {}),
    ],
)
def test_boundaries_of_known_texts(text: str, expected: dict[int, int]) -> None:
    positions, ranks = find_boundaries(text)
    assert dict(zip(positions.tolist(), ranks.tolist(), strict=True)) == expected


def test_inner_positions_are_those_within_what_a_reader_sees_as_one_character() -> None:
    text = f"a{ACCENTED}{FAMILY}x\r\n\U0001f1e9\U0001f1eab\U0001f44d\U0001f3fd\u2764\ufe0fन्स"
    expected = [
        place
        for place in range(1, len(text))
        if unicodedata.category(text[place]) in ("Mn", "Mc", "Me")
        or "\u200d" in text[place - 1 : place + 1]
        or text[place - 1 : place + 1] in ("\r\n", "\U0001f1e9\U0001f1ea")
        or text[place] == "\U0001f3fd"
    ]
    assert np.flatnonzero(find_inner_positions(text)).tolist() == expected
    assert np.flatnonzero(find_inner_positions("ab\r\ncd")).tolist() == [3]


def check_chunks(texts: Sequence[str], tokenizer: TextTokenizer, config: ChunkingConfig) -> pa.Table:
    """Checks every promise of the table and returns it."""
    doc_ids = [f"doc-{row}" for row in range(len(texts))]
    table = chunk_documents(doc_ids, texts, tokenizer, config)
    assert table.schema == CHUNKS
    table.validate(full=True)
    rows = table.to_pylist()
    assert [row["doc_id"] for row in rows] == sorted(
        (row["doc_id"] for row in rows), key=lambda doc_id: doc_ids.index(doc_id)
    )
    for doc_id, text in zip(doc_ids, texts, strict=True):
        own = [row for row in rows if row["doc_id"] == doc_id]
        if not own:
            assert not len(tokenizer.encode([text])[0])
            continue
        assert [row["ordinal"] for row in own] == list(range(len(own)))
        assert [row["start_char"] for row in own] == [0, *(row["end_char"] for row in own[:-1])]
        assert [row["start_byte"] for row in own] == [0, *(row["end_byte"] for row in own[:-1])]
        assert "".join(row["text"] for row in own) == text
        content = text.encode()
        for row in own:
            assert row["text"] == text[row["start_char"] : row["end_char"]]
            assert row["text"].encode() == content[row["start_byte"] : row["end_byte"]]
    for row, token_ids in zip(rows, tokenizer.encode([row["text"] for row in rows]), strict=True):
        assert 1 <= row["num_tokens"] == len(row["token_ids"]) <= config.max_tokens
        assert row["token_ids"] == token_ids.tolist()
        assert row["ref_id"] == make_ref_id(token_ids, tokenizer.tokenizer_id)
    return table


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(MIXED_TEXTS, max_size=3))
def test_chunks_tile_any_text_within_the_token_limit(kind: str, texts: list[str]) -> None:
    check_chunks(texts, make_tokenizer(kind), SMALL)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(MIXED_TEXTS, min_size=2, max_size=4))
def test_a_document_is_cut_the_same_in_any_batch(kind: str, texts: list[str]) -> None:
    doc_ids = [str(row) for row in range(len(texts))]
    together = chunk_documents(doc_ids, texts, make_tokenizer(kind), SMALL)
    alone = [
        chunk_documents([doc_id], [text], make_tokenizer(kind), SMALL)
        for doc_id, text in zip(doc_ids, texts, strict=True)
    ]
    assert together.equals(pa.concat_tables(alone))


def choose_cuts_slowly(text: str, spans: list[list[int]], config: ChunkingConfig) -> list[int]:
    """The rule as it is written: looks at every token again for every reference. For tokenizers that cover all."""
    boundaries = dict(zip(*(values.tolist() for values in find_boundaries(text)), strict=True))
    inner = find_inner_positions(text)
    places = {
        count: spans[count][0]
        for count in range(1, len(spans))
        if max(end for _, end in spans[:count]) <= min(start for start, _ in spans[count:])
    }
    ends = []
    done = 0
    while len(spans) - done > config.max_tokens:
        reachable = [count for count in places if done < count <= done + config.max_tokens]
        with_text = [count for count in reachable if text[places[count] :].strip()]
        allowed = with_text or reachable
        filled = [count for count in allowed if count >= done + config.min_fill * config.max_tokens]
        outer_filled = [count for count in filled if not inner[places[count]]]
        outer = [count for count in allowed if not inner[places[count]]]
        if outer_filled:
            done = min(outer_filled, key=lambda count: (boundaries.get(places[count], 9), -count))
        else:
            done = (outer or filled or allowed)[-1]
        ends.append(places[done])
    return [*ends, len(text)]


@settings(max_examples=150, deadline=None)
@given(MIXED_TEXTS)
def test_cuts_are_those_of_the_rule(text: str) -> None:
    tokenizer = make_tokenizer("byte_bpe")
    ends = choose_cuts_slowly(text, tokenizer.encode_with_spans([text])[0][1].tolist(), SMALL)
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *ends])]
    counts = [len(token_ids) for token_ids in tokenizer.encode(pieces)]
    if text and all(count <= SMALL.max_tokens for count in counts) and not any(piece.isspace() for piece in pieces):
        assert chunk_documents(["a"], [text], tokenizer, SMALL)["end_char"].to_pylist() == ends


@pytest.mark.parametrize("kind", KINDS)
def test_real_text_is_cut_at_ends_of_sentences_and_lines(kind: str) -> None:
    texts = [topics[name] for name in sorted(topics)]
    table = check_chunks(texts, make_tokenizer(kind), ChunkingConfig())
    num_good = 0
    for doc_id, end, part in zip(*(table[name].to_pylist() for name in ("doc_id", "end_char", "text")), strict=True):
        text = texts[int(doc_id.removeprefix("doc-"))]
        at_line_end = text[end : end + 1] in ("", "\n") or part.endswith("\n")
        num_good += at_line_end or re.search(r"[.!?]['\")\]}`*_]*\s*$", part) is not None
    assert num_good / table.num_rows > 0.95
    assert table["num_tokens"].to_numpy().mean() > 0.7 * 128
    assert not any(part.isspace() for part in table["text"].to_pylist())


def test_cutting_keeps_the_tokens_of_a_byte_level_bpe() -> None:
    tokenizer = make_tokenizer("byte_bpe")
    texts = [topics[name] for name in sorted(topics)]
    table = chunk_documents([str(row) for row in range(len(texts))], texts, tokenizer, ChunkingConfig())
    whole = [len(token_ids) for token_ids in tokenizer.encode(texts)]
    parts = np.bincount(table["doc_id"].cast(pa.int64()).to_numpy(), weights=table["num_tokens"].to_numpy())
    assert abs(parts.sum() - sum(whole)) / sum(whole) < 0.01
    assert sum(part.startswith(" ") for part in table["text"].to_pylist()) > 10


@pytest.mark.parametrize("kind", ["byte_bpe", "unigram"])
@pytest.mark.parametrize(("text", "ends"), [(CHINESE, "。！”"), (HINDI, "।")])
def test_text_of_other_scripts_is_cut_at_its_own_sentence_ends(kind: str, text: str, ends: str) -> None:
    table = check_chunks([text * 12], make_tokenizer(kind), ChunkingConfig())
    assert table.num_rows > 3
    assert all(part.rstrip()[-1] in ends for part in table["text"].to_pylist())


def test_thai_is_cut_between_tokens_and_filled() -> None:
    table = check_chunks([THAI * 20], make_tokenizer("byte_bpe"), ChunkingConfig())
    assert min(table["num_tokens"].to_pylist()[:-1]) > 120


def test_equal_text_has_an_equal_id_wherever_it_stands() -> None:
    paragraphs = [f"{topics[name][:300]}\n\n" for name in sorted(topics)[:30]]
    table = check_chunks(["".join(paragraphs), "".join(reversed(paragraphs))], make_tokenizer("byte_bpe"), SMALL)
    first, second = (
        dict(zip(own["text"].to_pylist(), own["ref_id"].to_pylist(), strict=True))
        for own in (table.filter(pc.equal(table["doc_id"], name)) for name in ("doc-0", "doc-1"))
    )
    shared = first.keys() & second.keys()
    assert len(shared) > len(first) / 2
    assert all(first[text] == second[text] for text in shared)
    assert len(set(first.values())) == len(first)


def test_characters_a_reader_sees_as_one_are_not_cut() -> None:
    clusters = [FAMILY, ACCENTED, "\U0001f1e9\U0001f1ea"]
    table = check_chunks(
        [cluster * 60 for cluster in clusters[:2]] + [f"{clusters[2]}," * 60], make_tokenizer("byte_bpe"), SMALL
    )
    for cluster, name in zip(clusters, ("doc-0", "doc-1", "doc-2"), strict=True):
        parts = table.filter(pc.equal(table["doc_id"], name))["text"].to_pylist()
        assert len(parts) > 3
        assert all(part.replace(cluster, "").strip(",") == "" for part in parts)


def test_a_cluster_longer_than_half_a_reference_stays_whole_where_there_is_room() -> None:
    cluster = "e" + "\u0316" * 13
    table = check_chunks([f"value number in {cluster}" * 20], make_tokenizer("byte_bpe"), SMALL)
    assert sum(part.count(cluster) for part in table["text"].to_pylist()) == 20


def test_lines_keep_their_indentation() -> None:
    text = "".join(
        f"class Class{row}:\n    def method(self, value):\n        return value + {row}\n\n" for row in range(40)
    )
    table = check_chunks([text], make_tokenizer("byte_bpe"), SMALL)
    lines = set(text.splitlines())
    assert table.num_rows > 20
    assert all(line in lines for part in table["text"].to_pylist() for line in part.splitlines())


def test_trailing_white_space_is_no_reference_of_its_own() -> None:
    tokenizer = make_tokenizer("byte_bpe")
    for num_words in range(20, 40):
        table = check_chunks(["word " * num_words + "\n\n \n"], tokenizer, SMALL)
        assert not any(part.isspace() for part in table["text"].to_pylist())


def test_a_document_longer_than_a_section_is_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "SECTION_CHARS", 2000)
    monkeypatch.setattr(chunking, "GROUP_CHARS", 5000)
    texts = [CHINESE * 200, THAI * 100, HINDI * 100, "x" * 4001]
    table = check_chunks(texts, make_tokenizer("byte_bpe"), ChunkingConfig())
    parts = table.filter(pc.equal(table["doc_id"], "doc-0"))["text"].to_pylist()
    assert all(part[-1] in "。！”" for part in parts)
    assert len(parts) > 50


class OverlappingTokenizer(WrappedTokenizer):
    """Gives every twentieth token a span that reaches into its neighbours, as the protocol allows."""

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[IntArray, IntArray]]:
        found = super().encode_with_spans(texts)
        for text, (_, spans) in zip(texts, found, strict=True):
            spans[2::20, 0] = np.maximum(spans[2::20, 0] - 3, 0)
            spans[2::20, 1] = np.minimum(spans[2::20, 1] + 3, len(text))
        return found


def test_no_cut_lies_inside_the_span_of_a_token() -> None:
    inner = make_tokenizer("byte_bpe")
    assert isinstance(inner, WrappedTokenizer)
    tokenizer = OverlappingTokenizer(inner._tokenizer)
    texts = [THAI * 9 + topics["assert"] + HINDI * 3, CHINESE * 5]
    table = check_chunks(texts, tokenizer, SMALL)
    for row, (_, spans) in enumerate(tokenizer.encode_with_spans(texts)):
        own = table.filter(pc.equal(table["doc_id"], f"doc-{row}"))
        assert own.num_rows > 5
        for end in own["end_char"].to_pylist():
            assert not ((spans[:, 0] < end) & (end < spans[:, 1])).any()


def test_a_tokenizer_that_puts_a_space_before_every_text_stays_within_the_limit() -> None:
    tokenizer = make_tokenizer("prepending")
    text = "".join(topics[name] for name in sorted(topics)[:20])
    spans = tokenizer.encode_with_spans([text])[0][1].tolist()
    ends = choose_cuts_slowly(text[:4000], [span for span in spans if span[1] <= 4000], SMALL)
    alone = tokenizer.encode([text[start:end] for start, end in itertools.pairwise([0, *ends])])
    assert max(len(token_ids) for token_ids in alone) > SMALL.max_tokens  # so the case is met
    check_chunks([text], tokenizer, SMALL)


def test_text_without_tokens_has_no_references() -> None:
    tokenizer = make_tokenizer("dropping")
    table = check_chunks(["!!! ???", "", "...word...", "*** " * 200 + "word"], tokenizer, SMALL)
    assert table["doc_id"].to_pylist() == ["doc-2", "doc-3"]


def test_punctuation_without_a_token_stays_with_its_sentence() -> None:
    text = "The value of the object. " * 30 + "The name!\n\n" * 30
    table = check_chunks([text], make_tokenizer("dropping"), SMALL)
    assert table.num_rows > 5
    assert all(part.endswith((".", "!\n\n")) for part in table["text"].to_pylist()[:-1])


def test_places_to_cut_ascend_strictly_beside_tokens_without_characters() -> None:
    text = "ab cd"
    spans = np.array([[0, 0], [0, 2], [2, 2], [2, 2], [2, 5], [5, 5]], dtype=np.int32)
    cuts = chunking._find_cuts(text, spans)
    assert (cuts.positions, cuts.num_tokens) == ([0, 2, 5], [0, 2, 6])
    assert len(cuts.ranks) == 3


def test_a_tokenizer_that_takes_back_its_tokens_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "-": 1}, unk_token="a"))
    tokenizer.normalizer = normalizers.Replace(Regex("^-+$"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    with pytest.raises(InputError, match=r"gives no token to '-+' alone"):
        chunk_documents(["a"], ["a" * 32 + "-" * 32], WrappedTokenizer(tokenizer), SMALL)


def test_no_documents_give_an_empty_table() -> None:
    table = chunk_documents([], [], make_tokenizer("byte_bpe"), ChunkingConfig())
    assert table.schema == CHUNKS
    assert table.num_rows == 0


def test_a_character_with_more_tokens_than_a_reference_is_named() -> None:
    with pytest.raises(InputError, match=r"max_tokens is 16.*'\ufdfa' alone takes \d+ tokens"):
        chunk_documents(["a"], ["\ufdfa"], make_tokenizer("unigram"), ChunkingConfig(max_tokens=16))


def test_columns_are_those_of_the_tables_of_the_bank() -> None:
    for schema in (OCCURRENCES, REFERENCES):
        for field in schema:
            assert CHUNKS.field(field.name) == field


@pytest.mark.parametrize(
    "values", [{"max_tokens": 15}, {"max_tokens": 256}, {"min_fill": -0.1}, {"min_fill": 1.0}], ids=str
)
def test_config_out_of_bounds_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        ChunkingConfig(**values)  # type: ignore[arg-type]
