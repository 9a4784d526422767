"""Log-likelihoods of continuations: against one sequence at a time, causal, and the same in every batch."""

from collections.abc import Sequence
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from model.checkpoint import Checkpoint, load_checkpoint
from model.chunk_memories import ChunkMemories, GenerationTrace
from model.evaluating import score_with_memory, score_with_text, shift_chosen
from model.fetching import BankMemories
from model.generating import GenerationConfig, Generator
from model.knowledge import Knowledge
from model.locating import find_checkpoint
from model.loglikelihoods import ScoredSequence, SequenceScorer, TokenScores, plan_chunks
from model.overlap_filter import FilteredSearch
from model.reading import CHUNK_TOKENS, MEMORIES_PER_CHUNK
from model.retrieving import Retriever
from model.text_references import ReferenceTexts
from model.text_scoring import TextScorer
from model.writing import ReferenceWriter
from schemas.bank import Bank
from schemas.errors import InputError
from tests.banks import get_embedder, make_bank
from tests.models import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return make_checkpoint("llama")


@pytest.fixture(scope="module")
def bank(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("bank"), ReferenceWriter(checkpoint))


@pytest.fixture(scope="module")
def search(bank: Bank) -> FilteredSearch:
    return FilteredSearch(bank, Retriever(bank, get_embedder()), max_overlap=1)


@pytest.fixture(scope="module")
def memories(bank: Bank, checkpoint: Checkpoint) -> BankMemories:
    return BankMemories(bank, ReferenceWriter(checkpoint))


@pytest.fixture(scope="module")
def scorer(checkpoint: Checkpoint, search: FilteredSearch, memories: BankMemories) -> SequenceScorer:
    return SequenceScorer(checkpoint, search, memories, batch_size=4)


def encode(checkpoint: Checkpoint, name: str, num_tokens: int) -> tuple[int, ...]:
    """The beginning of a topic, ``<s>`` included."""
    tokens = checkpoint.tokenizer.encode([topics[name]])[0].tolist()
    assert len(tokens) >= num_tokens
    return (*checkpoint.bos_token_ids, *tokens[: num_tokens - 1])


def make_sequences(checkpoint: Checkpoint) -> list[ScoredSequence]:
    """Prompts and documents of many lengths, in no order."""
    names = [name for name in sorted(topics) if len(topics[name]) > 3000]
    shapes = [(1, 5), (70, 1), (200, 150), (64, 64), (3, 130), (128, 10), (17, 40), (150, 65), (65, 2)]
    sequences = []
    for name, (num_given, num_scored) in zip(names, shapes, strict=False):
        tokens = encode(checkpoint, name, num_given + num_scored)
        sequences.append(ScoredSequence(context=tokens[:num_given], continuation=tokens[num_given:]))
    document = encode(checkpoint, names[0], 200)
    sequences.append(ScoredSequence(context=document[:1], continuation=document[1:], earlier=()))
    sequences.append(ScoredSequence(context=document[80:81], continuation=document[81:], earlier=document[:80]))
    return sequences


def list_hits(search: FilteredSearch, checkpoint: Checkpoint, chunks: Sequence[Sequence[int]]) -> list[list[str]]:
    texts = [checkpoint.tokenizer.decode(chunk) for chunk in chunks]
    found = search.search(texts, [()] * len(texts), MEMORIES_PER_CHUNK)
    return [[hit.ref_id for hit in hits] for hits in found]


def join(scores: Sequence[TokenScores]) -> np.ndarray:
    return np.concatenate([score.logprobs for score in scores])


def cut(tokens: Sequence[int]) -> list[Sequence[int]]:
    return [tokens[start : start + CHUNK_TOKENS] for start in range(0, len(tokens), CHUNK_TOKENS)]


def test_without_memory_scores_are_those_of_the_librarys_own_model() -> None:
    shipped = load_checkpoint()
    own = AutoModelForCausalLM.from_pretrained(
        find_checkpoint("memory3-tiny"), attn_implementation="eager", dtype=torch.float32
    )
    sequences = make_sequences(shipped)
    scores = SequenceScorer(shipped, batch_size=4).score(sequences)
    for sequence, score in zip(sequences, scores, strict=True):
        with torch.no_grad():
            logits = own(torch.tensor([sequence.tokens])).logits[0, len(sequence.context) - 1 : -1]
        wanted = torch.tensor(sequence.continuation)
        expected = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        np.testing.assert_allclose(score.logprobs, expected.numpy(), atol=1e-5, rtol=0)
        np.testing.assert_array_equal(score.is_likeliest, (logits.argmax(-1) == wanted).numpy())
        assert score.total == pytest.approx(float(score.logprobs.astype(np.float64).sum()), rel=1e-9)
        # A sum near 0 differs from the library's by what its terms do, which says nothing of its relative error.
        assert score.total == pytest.approx(float(expected.double().sum()), rel=1e-6, abs=1e-5)


def test_a_document_is_read_as_the_losses_are_measured(
    checkpoint: Checkpoint, search: FilteredSearch, memories: BankMemories, scorer: SequenceScorer
) -> None:
    tokens = encode(checkpoint, "class", 330)
    found = list_hits(search, checkpoint, cut(tokens))
    expected = score_with_memory(checkpoint, np.array(tokens), shift_chosen(found, MEMORIES_PER_CHUNK), memories.fetch)
    (score,) = scorer.score([ScoredSequence(context=tokens[:1], continuation=tokens[1:], earlier=())])
    np.testing.assert_allclose(score.logprobs[CHUNK_TOKENS - 1 :], -expected.numpy(), atol=2e-5, rtol=0)
    assert scorer.attention_share > 0


@pytest.mark.parametrize(("num_given", "num_scored"), [(90, 130), (64, 65), (5, 64)])
def test_a_prompt_and_what_follows_read_as_in_generation(
    checkpoint: Checkpoint,
    bank: Bank,
    memories: BankMemories,
    scorer: SequenceScorer,
    num_given: int,
    num_scored: int,
) -> None:
    """Against generation that is told its tokens, one by one."""
    tokens = encode(checkpoint, "class", num_given + num_scored)
    context, continuation = tokens[:num_given], tokens[num_given:]
    reading = ChunkMemories(
        checkpoint,
        lambda: Knowledge(retriever=Retriever(bank, get_embedder()), memories=memories),
        GenerationTrace(chunks=[[]]),
        num_memories=MEMORIES_PER_CHUNK,
        num_new_tokens=num_scored,
    )
    session, logits = reading.read_prompts([context], len(tokens))
    expected = []
    for place, token in enumerate(continuation):
        expected.append(float(logits[0].log_softmax(-1)[token]))
        reading.advance([token], [True], is_last=place == num_scored - 1)
        if place < num_scored - 1:
            logits = session.step(torch.tensor([token]))
    (score,) = scorer.score([ScoredSequence(context=context, continuation=continuation)])
    np.testing.assert_allclose(score.logprobs, expected, atol=2e-5, rtol=0)


def test_what_generation_gives_greedily_is_the_likeliest(
    checkpoint: Checkpoint, bank: Bank, memories: BankMemories, scorer: SequenceScorer
) -> None:
    prompt = encode(checkpoint, "with", 90)
    generator = Generator(checkpoint, Retriever(bank, get_embedder()), memories)
    config = GenerationConfig(max_new_tokens=150, repetition_penalty=1.0, stop_at_end=False)
    (generated,) = generator.generate_tokens([prompt], config)
    sequence = ScoredSequence(context=prompt, continuation=tuple(generated))
    (score,), (plain,) = scorer.score([sequence]), SequenceScorer(checkpoint).score([sequence])
    assert len(score.is_likeliest) == 150
    assert score.is_greedy
    assert not plain.is_greedy


@pytest.mark.parametrize("batch_size", [3, 16])
@pytest.mark.parametrize("reads", [False, True])
def test_neither_batch_nor_order_changes_a_score(
    checkpoint: Checkpoint, search: FilteredSearch, memories: BankMemories, batch_size: int, reads: bool
) -> None:
    parts = (search, memories) if reads else ()
    sequences = make_sequences(checkpoint)
    alone = [score for one in sequences for score in SequenceScorer(checkpoint, *parts, batch_size=1).score([one])]
    order = np.random.default_rng(batch_size).permutation(len(sequences)).tolist()
    scorer = SequenceScorer(checkpoint, *parts, batch_size=batch_size)
    together = scorer.score([sequences[place] for place in order])
    np.testing.assert_allclose(join(together), join([alone[place] for place in order]), atol=1e-5, rtol=0)
    assert scorer.counts.num_sequences == len(sequences)
    assert scorer.counts.num_tokens == sum(len(sequence.continuation) for sequence in sequences)
    assert (scorer.counts.num_reading > 0) == reads


@pytest.mark.parametrize("earlier", [None, ()])
@pytest.mark.parametrize("place", [1, 63, 64, 65, 128])
def test_a_later_token_never_changes_the_score_of_an_earlier_one(
    checkpoint: Checkpoint, scorer: SequenceScorer, earlier: tuple[int, ...] | None, place: int
) -> None:
    num_given = 90 if earlier is None else 1
    tokens = encode(checkpoint, "class", num_given + 170)
    context, continuation = tokens[:num_given], tokens[num_given:]
    # Everything from there on is of another text, so that what it retrieves is other too.
    other = encode(checkpoint, "formatstrings", 171)[1:]
    changed = (*continuation[:place], *other[place:])
    before, after = (
        scorer.score([ScoredSequence(context=context, continuation=text, earlier=earlier)])[0]
        for text in (continuation, changed)
    )
    np.testing.assert_allclose(after.logprobs[:place], before.logprobs[:place], atol=1e-6, rtol=0)
    assert changed[place] != continuation[place]
    assert after.logprobs[place] != before.logprobs[place]


def test_the_plan_of_a_sequence_leaves_out_what_is_not_read() -> None:
    plan = plan_chunks(ScoredSequence(context=tuple(range(70)), continuation=tuple(range(70, 200))))
    assert plan.queries == [tuple(range(64)), tuple(range(6, 70)), tuple(range(70, 134)), tuple(range(134, 198))]
    assert plan.chunk_of_token == [0] * 64 + [1] * 6 + [1] * 63 + [2] * 64 + [3] * 2
    plan = plan_chunks(ScoredSequence(context=(7,), continuation=tuple(range(64)), earlier=(5, 6)))
    assert plan.queries == [(5, 6, 7)]
    assert plan.chunk_of_token == [0] * 64


def test_references_as_text_are_read_as_the_losses_are_measured(
    checkpoint: Checkpoint, bank: Bank, search: FilteredSearch
) -> None:
    tokens = encode(checkpoint, "class", 200)
    found = list_hits(search, checkpoint, cut(tokens))
    chosen = []
    for ids in shift_chosen(found, MEMORIES_PER_CHUNK):
        rows = bank.read_references(ids, ["token_ids"])["token_ids"].to_pylist() if ids else []
        chosen.append([np.array(row) for row in rows])
    expected = score_with_text(checkpoint, np.array(tokens), chosen)
    texts = ReferenceTexts(checkpoint, bank, Retriever(bank, get_embedder()))
    scorer = TextScorer(SequenceScorer(checkpoint, batch_size=2), search, texts)
    (score,) = scorer.score([ScoredSequence(context=tokens[:1], continuation=tokens[1:], earlier=())])
    np.testing.assert_allclose(score.logprobs[CHUNK_TOKENS - 1 :], -expected.numpy(), atol=2e-5, rtol=0)

    prompt, generator = tokens[:90], Generator(checkpoint, texts=texts)
    config = GenerationConfig(max_new_tokens=30, repetition_penalty=1.0, stop_at_end=False)
    (generated,) = generator.generate_tokens([prompt], config)
    (score,) = scorer.score([ScoredSequence(context=prompt, continuation=tuple(generated))])
    assert score.is_greedy


def test_what_does_not_fit_is_refused(checkpoint: Checkpoint, scorer: SequenceScorer) -> None:
    room = scorer.max_tokens
    tokens = (*checkpoint.bos_token_ids, *[5] * (room + 1))
    with pytest.raises(InputError, match=f"{room + 1} tokens; the model has room for {room}"):
        scorer.score([ScoredSequence(context=tokens[:-1], continuation=tokens[-1:])])
    with pytest.raises(InputError, match="batch_size is 0"):
        SequenceScorer(checkpoint, batch_size=0)
    with pytest.raises(ValueError, match="one token of each"):
        ScoredSequence(context=(1,), continuation=())
