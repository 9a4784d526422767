"""Where documents are cut: by the rule as it is written, and at the places that a reader would choose."""

import itertools
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import example, given, settings

from pipelines.boundaries import INNER, rank_places
from pipelines.chunking import ChunkingConfig
from pipelines.cutting import find_cuts
from schemas.protocols import EncodedTexts, TextTokenizer
from tests.chunks import CONFIGS, MIXED_TEXTS, SMALL, check_chunks, chunk
from tests.sample_tokenizers import ACCENTED, CHINESE, FAMILY, HINDI, THAI, WrappedTokenizer, make_tokenizer


def rank_characters(text: str, boundary: str) -> list[int]:
    content = text.encode()
    ranks = rank_places(np.frombuffer(content, dtype=np.uint8), np.array([0, len(content)]), boundary)
    return [int(ranks[place]) for place in itertools.accumulate((len(c.encode()) for c in text), initial=0)]


def choose_cuts_slowly(text: str, spans: list[tuple[int, int]], config: ChunkingConfig) -> list[tuple[int, int]]:
    """The rule as it is written: looks at every token again for every reference. For tokenizers that cover all.

    ``spans`` are those of the text's tokens in characters; returns those of the references.
    """
    ranks = rank_characters(text, config.boundary)
    ends_before = list(itertools.accumulate((end for _, end in spans), max))
    starts_after = list(itertools.accumulate((start for start, _ in reversed(spans)), min))[::-1]
    places = {count: spans[count][0] for count in range(1, len(spans)) if ends_before[count - 1] <= starts_after[count]}
    found = []
    begin = done = 0
    while len(spans) - begin > config.max_tokens:
        reachable = [count for count in places if done < count <= begin + config.max_tokens]
        with_text = [count for count in reachable if text[places[count] :].strip()]
        allowed = with_text or reachable
        filled = [count for count in allowed if count >= begin + config.min_fill * config.max_tokens]
        outer_filled = [count for count in filled if ranks[places[count]] != INNER]
        outer = [count for count in allowed if ranks[places[count]] != INNER]
        start = places.get(begin, 0)
        if outer_filled:
            done = min(outer_filled, key=lambda count: (ranks[places[count]], -count))
        else:
            done = (outer or filled or allowed)[-1]
        found.append((start, places[done]))
        shared = [
            count
            for count in places
            if begin < count < done and count >= done - config.overlap_tokens and ranks[places[count]] != INNER
        ]
        best = min((ranks[places[count]] for count in shared), default=None)
        begin = next((count for count in shared if ranks[places[count]] == best), done)
        while begin != done and text[places[begin]] in "\r\n":
            following = min(count for count in places if count > begin)
            if following == done or ranks[places[following]] != best:
                break
            begin = following
    return [*found, (places.get(begin, 0), len(text))]


def find_spans(text: str, tokenizer: TextTokenizer) -> list[tuple[int, int]]:
    """Returns the spans of a text's tokens in characters."""
    tokens = tokenizer.encode_texts(pa.array([text]))
    places = {
        place: index for index, place in enumerate(itertools.accumulate((len(c.encode()) for c in text), initial=0))
    }
    return [
        (places[start], places[end]) for start, end in zip(tokens.starts.tolist(), tokens.ends.tolist(), strict=True)
    ]


@pytest.mark.parametrize("name", ["tiling", "overlapping", "lines", "hard"])
@settings(max_examples=50)
@given(MIXED_TEXTS)
@example("The bank holds references. \n\n" * 12)
@example("The bank holds references, and more of them.\r\n" * 12 + THAI)
def test_cuts_are_those_of_the_rule(name: str, text: str) -> None:
    tokenizer, config = make_tokenizer("byte_bpe"), CONFIGS[name]
    spans = choose_cuts_slowly(text, find_spans(text, tokenizer), config)
    pieces = [text[start:end] for start, end in spans]
    counts = [len(token_ids) for token_ids in tokenizer.encode(pieces)]
    if text and all(count <= config.max_tokens for count in counts) and not any(piece.isspace() for piece in pieces):
        table = chunk([text], tokenizer, config)
        assert list(zip(table["start_char"].to_pylist(), table["end_char"].to_pylist(), strict=True)) == spans


@pytest.mark.parametrize("kind", ["byte_bpe", "unigram"])
@pytest.mark.parametrize(("text", "ends"), [(CHINESE, "。！”"), (HINDI, "।")])
def test_text_of_other_scripts_is_cut_at_its_own_sentence_ends(kind: str, text: str, ends: str) -> None:
    table = check_chunks([text * 12], make_tokenizer(kind), ChunkingConfig())
    assert table.num_rows > 3
    assert all(part.rstrip()[-1] in ends for part in table["text"].to_pylist())


def test_thai_is_cut_between_tokens_and_filled() -> None:
    table = check_chunks([THAI * 20], make_tokenizer("byte_bpe"), ChunkingConfig())
    assert min(table["num_tokens"].to_pylist()[:-1]) > 120


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


def test_references_overlap_by_whole_sentences_where_they_can() -> None:
    sentences = [f"Sentence number {row} is here. " for row in range(60)]
    config = ChunkingConfig(max_tokens=64, overlap_tokens=30)
    table = check_chunks(["".join(sentences)], make_tokenizer("byte_bpe"), config)
    parts = table["text"].to_pylist()
    assert all(part.lstrip().startswith("Sentence") for part in parts)
    starts, ends = table["start_char"].to_pylist()[1:], table["end_char"].to_pylist()[:-1]
    shared = [end - start for start, end in zip(starts, ends, strict=True)]
    assert min(shared) >= len(sentences[0]) - 1
    assert max(shared) < 4 * len(sentences[0])


def test_lines_are_the_boundaries_where_asked_for() -> None:
    text = "One sentence. Another,\nand a third one of them. Done\n" * 40
    for boundary, mark in (("line", "\n"), ("sentence", ".")):
        table = check_chunks([text], make_tokenizer("words"), ChunkingConfig(max_tokens=32, boundary=boundary))
        assert all(part.rstrip(" ").endswith(mark) for part in table["text"].to_pylist()[:-1])


def test_hard_cuts_fill_every_reference() -> None:
    texts = [topics[name].replace("\r", "") for name in sorted(topics)[:20]]
    table = check_chunks(texts, make_tokenizer("words"), ChunkingConfig(boundary="hard"))
    is_end = pc.equal(table["ordinal"][1:], 0).to_pylist()
    sizes = table["num_tokens"].to_pylist()[:-1]
    assert {size for size, end in zip(sizes, is_end, strict=True) if not end} == {128}


class OverlappingTokenizer(WrappedTokenizer):
    """Gives every twentieth token a span that reaches into its neighbours, as the protocol allows."""

    def encode_texts(self, texts: pa.Array) -> EncodedTexts:
        tokens = super().encode_texts(texts)
        for text, first, last in zip(texts.to_pylist(), tokens.offsets[:-1], tokens.offsets[1:], strict=True):
            tokens.starts[first + 2 : last : 20] = np.maximum(tokens.starts[first + 2 : last : 20] - 3, 0)
            tokens.ends[first + 2 : last : 20] = np.minimum(tokens.ends[first + 2 : last : 20] + 3, len(text.encode()))
        return tokens


def test_no_cut_lies_inside_the_span_of_a_token() -> None:
    inner = make_tokenizer("byte_bpe")
    assert isinstance(inner, WrappedTokenizer)
    tokenizer = OverlappingTokenizer(inner._tokenizer)
    texts = [THAI * 9 + topics["assert"] + HINDI * 3, CHINESE * 5]
    table = check_chunks(texts, tokenizer, SMALL)
    tokens = tokenizer.encode_texts(pa.array(texts))
    for row, (first, last) in enumerate(itertools.pairwise(tokens.offsets.tolist())):
        own = table.filter(pc.equal(table["doc_id"], f"doc-{row}"))
        assert own.num_rows > 5
        for end in own["end_byte"].to_pylist():
            assert not ((tokens.starts[first:last] < end) & (end < tokens.ends[first:last])).any()


def test_places_to_cut_ascend_strictly_beside_tokens_without_characters() -> None:
    content = np.frombuffer(b"ab cd", dtype=np.uint8)
    spans = np.array([[0, 0], [0, 2], [2, 2], [2, 2], [2, 5], [5, 5]])
    places, counts = find_cuts(content, rank_places(content, np.array([0, 5])), *np.ascontiguousarray(spans.T))
    assert (places.tolist(), counts.tolist()) == ([0, 2, 5], [0, 2, 6])
