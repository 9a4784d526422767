"""Pretokens and byte pairs found by kernels, against the expressions themselves and merging written out."""

import itertools
import json
import threading
import unicodedata
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from model import byte_pairs
from model.byte_pairs import BytePairEncoder, Merges
from model.pretokenizing import (
    LETTER,
    NEWLINE,
    NUM_CLASSIFIED,
    NUMBER,
    OTHER,
    SPACE,
    Pattern,
    find_pattern,
    find_pretokens,
    get_class_table,
)
from schemas.errors import InputError

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = CL100K.replace("{1,3}", "")


def split_on(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS = {
    "GPT-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "cl100k": split_on(CL100K),
    "Qwen2": split_on(QWEN2),
}
NAMES = sorted(PRE_TOKENIZERS)

# Characters beside each other that patterns tell apart, mixed with any others.
telling = st.sampled_from(
    [*" \t\n\r\x0b\x85'’aétTdDsS1²٣!-中あ", "\u0301", "\u3000", "\u017f", "\u212a", "re", "LL", "vE"]
)
mixed_text = st.lists(st.one_of(telling, telling, st.characters(exclude_categories=["Cs"])), max_size=30).map("".join)


def describe(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Pattern | None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    return find_pattern(json.loads(tokenizer.to_str())["pre_tokenizer"])


def find_pieces(texts: list[str], name: str) -> tuple[list[list[str]], list[list[bool]]]:
    """Returns the pretokens of each text and whether it can be cut before each, from the kernel."""
    encoded = [text.encode() for text in texts]
    data = np.frombuffer(b"".join(encoded) + bytes(4), dtype=np.uint8)
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    ends, separable = np.zeros(len(data), dtype=np.int64), np.zeros(len(data), dtype=np.bool_)
    counts = np.zeros(len(texts), dtype=np.int64)
    pattern = describe(PRE_TOKENIZERS[name])
    assert pattern is not None
    assert find_pretokens(data, offsets, pattern, ends, separable, counts) == counts.sum()
    edges = [0, *ends[: counts.sum()].tolist()]
    pieces = [data[start:end].tobytes().decode() for start, end in itertools.pairwise(edges)]
    places = np.cumsum([0, *counts])
    return (
        [pieces[a:b] for a, b in itertools.pairwise(places)],
        [separable[a:b].tolist() for a, b in itertools.pairwise(places)],
    )


def split_slowly(text: str, name: str) -> list[str]:
    return [text[start:end] for _, (start, end) in PRE_TOKENIZERS[name].pre_tokenize_str(text)]


@pytest.mark.parametrize("name", NAMES)
@given(st.lists(mixed_text, max_size=4))
def test_pretokens_are_those_of_the_expression(name: str, texts: list[str]) -> None:
    assert find_pieces(texts, name)[0] == [split_slowly(text, name) for text in texts]


@pytest.mark.parametrize("name", NAMES)
def test_pretokens_of_every_short_sequence(name: str) -> None:
    texts = list(map("".join, itertools.product("aé中1²!' \t\n\r\u3000", repeat=4)))
    found, _ = find_pieces(texts, name)
    assert found == [split_slowly(text, name) for text in texts]


@pytest.mark.parametrize("name", NAMES)
def test_contractions_with_every_letter(name: str) -> None:
    letters = [chr(point) for point in range(0x2200) if unicodedata.category(chr(point))[0] == "L"]
    texts = [
        "".join(f"'{letter}x '{letter}e '{letter}l" for letter in letters[at : at + 50]) for at in range(0, 9000, 50)
    ]
    found, _ = find_pieces(texts, name)
    assert found == [split_slowly(text, name) for text in texts]


@pytest.mark.parametrize("name", NAMES)
@given(mixed_text, st.data())
def test_a_part_between_separable_pretokens_has_them_alone(name: str, text: str, data: st.DataObject) -> None:
    (pieces,), (separable,) = find_pieces([text], name)
    cuts = [index for index, can_cut in enumerate(separable) if can_cut] + [len(pieces)]
    start = data.draw(st.sampled_from(cuts))
    end = data.draw(st.sampled_from([cut for cut in cuts if cut >= start]))
    part = "".join(pieces[start:end])
    assert split_slowly(part, name) == pieces[start:end]


def test_only_what_cannot_be_told_from_the_end_is_not_separable() -> None:
    assert find_pieces(["a  1 b\t\t!"], "cl100k") == (
        [["a", " ", " ", "1", " b", "\t", "\t", "!"]],
        [[True, True, True, False, True, True, True, False]],
    )
    assert all(find_pieces(["It's 12345 words,\n\n  and  more !!\r\n"], "cl100k")[1][0])


def test_classes_are_those_of_unicode() -> None:
    points = [point for point in range(NUM_CLASSIFIED) if unicodedata.category(chr(point)) not in ("Cn", "Cs")]
    codes = {"L": LETTER, "N": NUMBER}
    expected = [codes.get(unicodedata.category(chr(point))[0], OTHER) for point in points]
    found = get_class_table()[points]
    is_space = np.isin(found, (SPACE, NEWLINE))
    assert np.where(is_space, OTHER, found).tolist() == expected
    spaces = {points[index] for index in np.flatnonzero(is_space)}
    assert spaces == {point for point in points if chr(point).isspace()} - {*range(0x1C, 0x20)}
    assert [points[index] for index in np.flatnonzero(found == NEWLINE)] == [0x0A, 0x0D]


def test_classes_beyond_the_table_are_other() -> None:
    beyond = "".join(map(chr, [0x40000, 0xE0041, 0xE01EF, 0xF0000, 0x10FFFF]))
    for name in NAMES:
        assert find_pieces([f"a{beyond}b"], name)[0][0] == split_slowly(f"a{beyond}b", name)


@pytest.mark.parametrize(
    "other",
    [
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        pre_tokenizers.Whitespace(),
        split_on(r"\p{L}+|\s"),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    ],
)
def test_other_pre_tokenizers_are_not_known(other: pre_tokenizers.PreTokenizer | None) -> None:
    if other is None:
        assert find_pattern(None) is None
    else:
        assert describe(other) is None


# Byte pairs.

PARTS = ["a", "b", "é", "ё", "中", "丮", "亮", "あ", "\U0001f600"]


@st.composite
def random_merges(draw: st.DrawFn) -> Merges:
    """Returns merges such as no training would find: in any order, some of parts never made before they are needed."""
    ids = {bytes([byte]): byte for byte in range(256)}
    pool = [bytes([byte]) for byte in sorted(set("".join(PARTS).encode()))]
    pairs: dict[tuple[bytes, bytes], None] = {}
    for _ in range(draw(st.integers(0, 60))):
        left, right = draw(st.sampled_from(pool)), draw(st.sampled_from(pool))
        if len(left) + len(right) <= 12:
            pairs[left, right] = None
            pool.append(left + right)
            ids.setdefault(left + right, len(ids))
    # Real characters, so that some of them can be taken whole.
    for letter in draw(st.lists(st.sampled_from(PARTS[2:8]), max_size=4)):
        text = letter.encode()
        for left, right in ((text[:1], text[1:2]), (text[:2], text[2:])):
            if right:
                pairs[left, right] = None
                ids.setdefault(left + right, len(ids))
    for word in draw(st.lists(st.sampled_from([*PARTS[2:], " a", "ab", " 中", "中中"]), max_size=3)):
        ids.setdefault(word.encode(), len(ids))  # no merge leads there
    order = draw(st.permutations(list(pairs)))
    table = np.array([[ids[a], ids[b], ids[a + b]] for a, b in order], dtype=np.int32).reshape(-1, 3)
    tokens = {token: text for text, token in ids.items()}
    return Merges(tokens=tokens, byte_ids=range(256), pairs=table, whole=draw(st.booleans()))


def merge_slowly(pretoken: bytes, merges: Merges) -> list[int]:
    """Byte-pair encoding as it is defined."""
    if merges.whole and (known := {text: token for token, text in merges.tokens.items()}.get(pretoken)) is not None:
        return [known]
    ranks = {(a, b): (rank, c) for rank, (a, b, c) in enumerate(merges.pairs.tolist())}
    ids = [merges.byte_ids[byte] for byte in pretoken]
    while known_pairs := [(ranks[pair], at) for at, pair in enumerate(itertools.pairwise(ids)) if pair in ranks]:
        (_, merged), at = min(known_pairs)
        ids[at : at + 2] = [merged]
    return ids


parts_text = st.lists(st.sampled_from([*PARTS, *"   a中"]), max_size=40).map("".join)


@given(random_merges(), st.lists(parts_text, max_size=4))
def test_tokens_are_those_of_merging_one_by_one(merges: Merges, texts: list[str]) -> None:
    found = BytePairEncoder(merges, Pattern(name="cl100k", max_digits=3, cl100k=True)).encode(
        pa.array(texts, pa.string())
    )
    for row, text in enumerate(texts):
        pretokens = [piece.encode() for piece in split_slowly(text, "cl100k")]
        ids = [merge_slowly(pretoken, merges) for pretoken in pretokens]
        part = slice(*found.offsets[row : row + 2])
        assert found.token_ids[part].tolist() == list(itertools.chain.from_iterable(ids))
        ends = np.cumsum([len(merges.tokens[token]) for tokens in ids for token in tokens], dtype=np.int64)
        assert found.ends[part].tolist() == ends.tolist()
        assert found.starts[part].tolist() == [0, *ends.tolist()][: len(ends)]


def test_a_pretoken_that_is_a_token_stays_whole() -> None:
    words = {256: "中", 257: "ab", 258: " 中中", 259: "中" * 3, 260: "a" * 300}
    tokens = {**{byte: bytes([byte]) for byte in range(256)}, **{token: word.encode() for token, word in words.items()}}
    texts = pa.array([*words.values(), "abc"])
    for whole in (True, False):
        merges = Merges(tokens=tokens, byte_ids=range(256), pairs=np.zeros((0, 3), dtype=np.int32), whole=whole)
        found = BytePairEncoder(merges, Pattern(name="GPT-2", spaced_numbers=True)).encode(texts)
        expected = [merge_slowly(text.encode(), merges) for text in texts.to_pylist()]
        assert [found.token_ids[a:b].tolist() for a, b in itertools.pairwise(found.offsets)] == expected
        assert expected[:5] == [[token] for token in words] or not whole


def learn_merges(text: bytes, num_merges: int, *, whole: bool = False) -> Merges:
    """Learns merges from one text without pretokens, the most frequent pair first."""
    ids = list(text)
    tokens = {byte: bytes([byte]) for byte in range(256)}
    pairs = []
    for token in range(256, 256 + num_merges):
        counts: dict[tuple[int, int], int] = {}
        for pair in itertools.pairwise(ids):
            counts[pair] = counts.get(pair, 0) + 1
        left, right = max(counts, key=lambda pair: (counts[pair], pair))
        tokens[token] = tokens[left] + tokens[right]
        pairs.append((left, right, token))
        merged = []
        at = 0
        while at < len(ids):
            if ids[at : at + 2] == [left, right]:
                merged.append(token)
                at += 2
            else:
                merged.append(ids[at])
                at += 1
        ids = merged
    return Merges(tokens=tokens, byte_ids=range(256), pairs=np.array(pairs, dtype=np.int32), whole=whole)


@pytest.fixture(scope="module")
def merges() -> Merges:
    return learn_merges((topics["assert"] + "参考文献的切分,由句子的结尾决定。" * 20).encode(), 120)


GPT2 = Pattern(name="GPT-2", spaced_numbers=True)


def test_runs_longer_than_the_cache_takes(merges: Merges) -> None:
    texts = [unit * count for unit in ("ab", "的", "e", "考文献", "=") for count in (80, 128, 129, 257, 1000)]
    found = BytePairEncoder(merges, GPT2).encode(pa.array(texts))
    for row, text in enumerate(texts):
        ids = [token for piece in split_slowly(text, "GPT-2") for token in merge_slowly(piece.encode(), merges)]
        assert found.token_ids[found.offsets[row] : found.offsets[row + 1]].tolist() == ids


def test_a_full_cache_changes_nothing(merges: Merges, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = pa.array(list(topics.values())[:12])
    expected = BytePairEncoder(merges, GPT2).encode(texts)
    monkeypatch.setattr(byte_pairs, "CACHE_SLOTS", 64)
    assert BytePairEncoder(merges, GPT2).encode(texts).token_ids.tolist() == expected.token_ids.tolist()
    monkeypatch.setattr(byte_pairs, "CACHE_SLOTS", 1 << 12)
    monkeypatch.setattr(byte_pairs, "CACHE_WORDS", 512)
    assert BytePairEncoder(merges, GPT2).encode(texts).token_ids.tolist() == expected.token_ids.tolist()


def test_keys_that_meet_in_one_slot_are_told_apart(merges: Merges) -> None:
    # Bytes of zero are no part of a key's length: these differ by their size alone.
    texts = ["\0" * size for size in range(1, 20)] + ["a" + "\0" * size for size in range(1, 20)]
    found = BytePairEncoder(merges, GPT2).encode(pa.array([*texts, *texts]))
    expected = [text.encode() for text in (*texts, *texts)]
    ids = [bytes(found.token_ids[a:b].tolist()) for a, b in itertools.pairwise(found.offsets)]
    assert ids == expected


@pytest.mark.parametrize("block_bytes", [1, 100, 5000])
def test_blocks_change_nothing(merges: Merges, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = pa.array(["", *list(topics.values())[:6], "", "a", ""])
    expected = BytePairEncoder(merges, GPT2).encode(texts)
    monkeypatch.setattr(byte_pairs, "BLOCK_BYTES", block_bytes)
    encoder = BytePairEncoder(merges, GPT2)
    for _ in range(2):
        found = encoder.encode(texts)
        for name in ("token_ids", "starts", "ends", "separable", "offsets"):
            assert np.array_equal(getattr(found, name), getattr(expected, name))
            assert getattr(found, name).dtype == getattr(expected, name).dtype


def test_threads_share_an_encoder(merges: Merges) -> None:
    encoder = BytePairEncoder(merges, GPT2)
    names = sorted(topics)
    batches = [pa.array([topics[name] for name in names[part::4]]) for part in range(4)]
    expected = [BytePairEncoder(merges, GPT2).encode(batch).token_ids.tolist() for batch in batches]
    found: dict[int, list[list[int]]] = {part: [] for part in range(4)}

    def work(part: int) -> None:
        for turn in range(4):
            found[part].append(encoder.encode(batches[(part + turn) % 4]).token_ids.tolist())

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for part in range(4):
        assert found[part] == [expected[(part + turn) % 4] for turn in range(4)]


def test_tables_out_of_bounds_are_refused(merges: Merges) -> None:
    large = Merges(tokens={1 << 21: b"a"}, byte_ids=range(256), pairs=merges.pairs, whole=False)
    with pytest.raises(InputError, match="2097153 tokens"):
        BytePairEncoder(large, GPT2)
    twice = np.concatenate([merges.pairs, merges.pairs[:1]])
    with pytest.raises(InputError, match="same pair"):
        BytePairEncoder(Merges(tokens=merges.tokens, byte_ids=range(256), pairs=twice, whole=False), GPT2)
