"""Citations: each memory left out against generation told its tokens, and what must be equal by the rules."""

import dataclasses
from collections.abc import Sequence
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from model.checkpoint import Checkpoint, load_checkpoint
from model.chunk_memories import ChunkMemories, ChunkTrace, GenerationTrace
from model.citing import (
    CONFIRMED,
    LEAST_SUPPORT,
    REFUTED,
    SUPPORTED,
    UNCLEAR,
    CitedChunk,
    CitedText,
    Citer,
    judge_supports,
    list_reads,
    list_variants,
    retrieve_reads,
)
from model.fetching import BankMemories
from model.generating import GenerationConfig, Generator
from model.knowledge import Knowledge
from model.loglikelihoods import ScoredSequence, SequenceScorer
from model.overlap_filter import FilteredSearch
from model.reading import MEMORIES_PER_CHUNK
from model.retrieving import Hit, Retriever
from model.writing import ReferenceWriter
from schemas.bank import Bank
from tests.banks import get_embedder, make_bank
from tests.models import make_checkpoint

NUM_MEMORIES = 3


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return make_checkpoint("llama")


@pytest.fixture(scope="module")
def bank(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("bank"), ReferenceWriter(checkpoint))


@pytest.fixture(scope="module")
def retriever(bank: Bank) -> Retriever:
    return Retriever(bank, get_embedder())


@pytest.fixture(scope="module")
def memories(bank: Bank, checkpoint: Checkpoint) -> BankMemories:
    return BankMemories(bank, ReferenceWriter(checkpoint))


@pytest.fixture(scope="module")
def citer(checkpoint: Checkpoint, memories: BankMemories) -> Citer:
    return Citer(checkpoint, memories, num_memories=NUM_MEMORIES, batch_size=4)


def encode(checkpoint: Checkpoint, name: str, num_tokens: int) -> tuple[int, ...]:
    """The beginning of a topic, ``<s>`` included."""
    tokens = checkpoint.tokenizer.encode([topics[name]])[0].tolist()
    return (*checkpoint.bos_token_ids, *tokens[: num_tokens - 1])


def generate(
    checkpoint: Checkpoint, retriever: Retriever, memories: BankMemories, prompt: tuple[int, ...], num_new: int
) -> tuple[CitedText, list[ChunkTrace]]:
    """A generated text with what it has read."""
    generator = Generator(checkpoint, retriever, memories)
    config = GenerationConfig(
        max_new_tokens=num_new, num_memories=NUM_MEMORIES, temperature=1.0, seed=3, stop_at_end=False
    )
    (generated,) = generator.generate_tokens([prompt], config)
    reads = list_reads(generator.traces, len(prompt), len(generated))
    return CitedText(prompt=prompt, generated=tuple(generated), reads=reads), generator.traces


def tell_generation(
    checkpoint: Checkpoint,
    memories: BankMemories,
    retriever: Retriever,
    text: CitedText,
    reads: Sequence[Sequence[Hit]],
) -> list[float]:
    """The slow reference: the log-likelihood of each token by generation that is told its tokens and its memories."""
    of_prompt, rest = list(reads[: text.num_prompt_chunks]), iter(reads[text.num_prompt_chunks + 1 :])
    asked = iter([of_prompt, *([one] for one in rest)])

    def find(_rows: Sequence[int], texts: Sequence[str], _num_hits: int) -> list[list[Hit]]:
        found = [list(hits) for hits in next(asked)]
        assert len(found) == len(texts)
        return found

    reading = ChunkMemories(
        checkpoint,
        lambda: Knowledge(retriever=retriever, memories=memories),
        GenerationTrace(chunks=[[]]),
        num_memories=NUM_MEMORIES,
        num_new_tokens=len(text.generated),
        find=find,
    )
    session, logits = reading.read_prompts([text.prompt], len(text.prompt) + len(text.generated))
    logprobs = []
    for place, token in enumerate(text.generated):
        logprobs.append(float(logits[0].log_softmax(-1)[token]))
        is_last = place == len(text.generated) - 1
        reading.advance([token], [True], is_last=is_last)
        if not is_last:
            logits = session.step(torch.tensor([token]))
    return logprobs


def leave_out(text: CitedText, number: int, left_out: set[str]) -> list[tuple[Hit, ...]]:
    """What a text reads without some memories of a generated chunk, the first of which shares them with the prompt."""
    chunk = text.num_prompt_chunks + number
    touched = {chunk, chunk - 1} if number == 0 else {chunk}
    return [
        tuple(hit for hit in hits if place not in touched or hit.ref_id not in left_out)
        for place, hits in enumerate(text.reads)
    ]


@pytest.mark.parametrize(("num_given", "num_new"), [(90, 140), (64, 64), (130, 1), (5, 65)])
def test_support_is_what_generation_without_the_memory_says(
    checkpoint: Checkpoint,
    retriever: Retriever,
    memories: BankMemories,
    citer: Citer,
    num_given: int,
    num_new: int,
) -> None:
    text, _ = generate(checkpoint, retriever, memories, encode(checkpoint, "class", num_given), num_new)
    (chunks,) = citer.cite([text])
    assert len(chunks) == -(-num_new // 64)
    whole = tell_generation(checkpoint, memories, retriever, text, text.reads)
    for number, chunk in enumerate(chunks):
        some = slice(64 * number, 64 * (number + 1))
        assert chunk.first_token == num_given + 64 * number
        assert chunk.tokens == text.generated[some]
        assert chunk.logprob == pytest.approx(sum(whole[some]), abs=2e-3)
        hits = text.reads[text.num_prompt_chunks + number]
        assert {citation.ref_id for citation in chunk.citations} == {hit.ref_id for hit in hits}
        assert len(hits) == NUM_MEMORIES
        for citation in chunk.citations:
            reads = leave_out(text, number, {citation.ref_id})
            without = tell_generation(checkpoint, memories, retriever, text, reads)
            assert citation.support == pytest.approx(sum(whole[some]) - sum(without[some]), abs=2e-3)
            assert without[: 64 * number] == pytest.approx(whole[: 64 * number], abs=1e-6)
        nothing = tell_generation(
            checkpoint, memories, retriever, text, leave_out(text, number, {hit.ref_id for hit in hits})
        )
        assert chunk.support == pytest.approx(sum(whole[some]) - sum(nothing[some]), abs=2e-3)
    # The random model's memories do matter, or nothing above would be told apart.
    assert max(abs(citation.support) for chunk in chunks for citation in chunk.citations) > 0.01


def test_shares_are_those_of_the_trace(
    checkpoint: Checkpoint, retriever: Retriever, memories: BankMemories, citer: Citer
) -> None:
    text, traces = generate(checkpoint, retriever, memories, encode(checkpoint, "with", 100), 128)
    (chunks,) = citer.cite([text])
    by_place = {trace.first_token: trace for trace in traces}
    # The first chunk's trace has not the token before it; the second's has the very tokens that foretell it.
    for chunk, tolerance in zip(chunks, (0.05, 1e-4), strict=True):
        trace = by_place[chunk.first_token]
        told = {hit.ref_id: share for hit, share in zip(trace.hits, trace.attention, strict=True)}
        found = {citation.ref_id: citation.attention for citation in chunk.citations}
        assert found == pytest.approx(told, abs=tolerance)
        assert sum(found.values()) == pytest.approx(1.0, abs=1e-6)
        assert list(found.values()) == sorted(found.values(), reverse=True)


def test_chunks_add_up_to_the_log_likelihood_of_the_text(
    checkpoint: Checkpoint, bank: Bank, retriever: Retriever, memories: BankMemories, citer: Citer
) -> None:
    tokens = encode(checkpoint, "class", 300)
    search = FilteredSearch(bank, retriever, max_overlap=1)
    (text,) = retrieve_reads(checkpoint, search, [(tokens[:90], tokens[90:])], [()], NUM_MEMORIES)
    (chunks,) = citer.cite([text])
    scorer = SequenceScorer(checkpoint, search, memories, num_memories=NUM_MEMORIES)
    (score,) = scorer.score([ScoredSequence(context=tokens[:90], continuation=tokens[90:])])
    assert sum(chunk.logprob for chunk in chunks) == pytest.approx(score.total, abs=1e-3)
    assert [len(chunk.tokens) for chunk in chunks] == [64, 64, 64, 18]


def strip(chunk: CitedChunk) -> dict[str, float]:
    return {citation.ref_id: citation.support for citation in chunk.citations}


def test_neither_order_nor_company_nor_what_follows_changes_support(
    checkpoint: Checkpoint, retriever: Retriever, memories: BankMemories, citer: Citer
) -> None:
    texts = [
        generate(checkpoint, retriever, memories, encode(checkpoint, name, 70 + 20 * place), 130)[0]
        for place, name in enumerate(("class", "with", "import"))
    ]
    together = citer.cite(texts)
    for text, chunks in zip(texts, together, strict=True):
        turned = dataclasses.replace(text, reads=tuple(hits[::-1] for hits in text.reads))
        (again,) = citer.cite([turned])
        # Other memories further on: what a chunk is said to owe is settled at its end.
        other = dataclasses.replace(text, reads=(*text.reads[:-2], texts[1].reads[0], texts[2].reads[0]))
        first = citer.cite_chunk(other, 0)
        assert strip(first) == pytest.approx(strip(chunks[0]), abs=1e-4)
        for chunk, same in zip(chunks, again, strict=True):
            assert strip(chunk) == pytest.approx(strip(same), abs=1e-4)
        for number, chunk in enumerate(chunks):
            assert strip(citer.cite_chunk(text, number)) == pytest.approx(strip(chunk), abs=1e-4)


def test_an_only_memory_has_all_the_support(
    checkpoint: Checkpoint, retriever: Retriever, memories: BankMemories, citer: Citer
) -> None:
    text, _ = generate(checkpoint, retriever, memories, encode(checkpoint, "class", 90), 100)
    single = dataclasses.replace(text, reads=tuple(hits[:1] for hits in text.reads))
    (chunks,) = citer.cite([single])
    for chunk in chunks:
        (citation,) = chunk.citations
        assert citation.support == pytest.approx(chunk.support, abs=1e-6)
        assert citation.attention == pytest.approx(1.0)
    nothing = dataclasses.replace(text, reads=((),) * len(text.reads))
    (plain,) = citer.cite([nothing])
    assert [(chunk.citations, chunk.support) for chunk in plain] == [((), 0.0)] * 2
    assert plain[0].logprob != chunks[0].logprob


def test_rounding_stays_below_what_is_called_noise(tmp_path_factory: pytest.TempPathFactory) -> None:
    """In bfloat16, where it is largest: memories read in another order are the same memories."""
    half = load_checkpoint(dtype="bfloat16")
    writer = ReferenceWriter(half)
    bank = make_bank(tmp_path_factory.mktemp("half"), writer)
    search = FilteredSearch(bank, Retriever(bank, get_embedder()), max_overlap=1)
    citer = Citer(half, BankMemories(bank, writer), num_memories=MEMORIES_PER_CHUNK)
    tokens = [encode(half, name, 220) for name in ("class", "with", "import", "try")]
    texts = retrieve_reads(half, search, [(one[:90], one[90:]) for one in tokens], [()] * 4, MEMORIES_PER_CHUNK)
    turned = [dataclasses.replace(text, reads=tuple(hits[::-1] for hits in text.reads)) for text in texts]
    pairs = [
        (left, right)
        for ones, others in zip(citer.cite(texts), citer.cite(turned), strict=True)
        for left, right in zip(ones, others, strict=True)
    ]
    changes = np.array([abs(left.logprob - right.logprob) for left, right in pairs])
    assert changes.max() > 0
    assert all(change < left.noise for change, (left, _) in zip(changes, pairs, strict=True))
    assert all(left.noise > LEAST_SUPPORT for left, _ in pairs if len(left.tokens) == 64)


def test_verdicts_follow_from_support_alone() -> None:
    assert judge_supports([2.0, 0.5, 0.05, -0.05, -1.0], 0.1) == [CONFIRMED, SUPPORTED, UNCLEAR, UNCLEAR, REFUTED]
    assert judge_supports([0.1, 0.0], 0.1) == [UNCLEAR, UNCLEAR]
    assert judge_supports([-3.0], 0.1) == [REFUTED]
    assert judge_supports([], 0.1) == []


def test_what_is_left_out_stands_in_the_chunk_alone() -> None:
    hits = [tuple(Hit(ref_id=f"{chunk}{place}", score=1.0) for place in range(2)) for chunk in range(4)]
    shared = Hit(ref_id="10", score=1.0)
    # The second chunk of the prompt is what the first generated one inherits; the last has one of its memories too.
    reads = (hits[0], hits[1], hits[1], (hits[3][0], shared))
    text = CitedText(prompt=(1,) * 70, generated=(2,) * 100, reads=reads)
    whole, without, *_ = list_variants(text, 0)
    assert whole == list(reads[:3])
    assert without == [hits[0], hits[1][1:], hits[1][1:]]
    assert list_variants(text, 1)[2] == [*reads[:3], hits[3][:1]]
    assert list_variants(text, 1)[3] == [*reads[:3], ()]
    with pytest.raises(ValueError, match="have 4 chunks, not 3"):
        dataclasses.replace(text, reads=reads[:3])
