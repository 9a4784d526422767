"""Generation with memories: when it retrieves, what each chunk reads, and that nothing stored changes."""

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from model.checkpoint import Checkpoint
from model.embedding import SHIPPED_EMBEDDER
from model.fetching import BankMemories
from model.generating import GenerationConfig, Generator
from model.retrieving import Hit, Retriever
from model.static_embedding import StaticEmbedder
from model.text_references import ReferenceTexts
from model.writing import Memories, ReferenceWriter
from schemas.bank import Bank
from schemas.errors import InputError, MemoryNotReadError
from tests.banks import make_bank
from tests.models import make_checkpoint


class NotingRetriever(Retriever):
    """The real retriever, which also notes what it was asked."""

    def __init__(self, bank: Bank, embedder: StaticEmbedder) -> None:
        super().__init__(bank, embedder)
        self.queries: list[str] = []

    def search(self, texts: Sequence[str], num_hits: int) -> list[list[Hit]]:
        self.queries += texts
        return super().search(texts, num_hits)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return make_checkpoint("llama")


@pytest.fixture(scope="module")
def bank(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("bank"), ReferenceWriter(checkpoint))


def open_parts(checkpoint: Checkpoint, bank: Bank) -> tuple[NotingRetriever, BankMemories]:
    return NotingRetriever(bank, StaticEmbedder(SHIPPED_EMBEDDER)), BankMemories(bank, ReferenceWriter(checkpoint))


def make_prompt(checkpoint: Checkpoint, num_tokens: int) -> str:
    """A prompt of exactly so many tokens, ``<s>`` included."""
    return checkpoint.tokenizer.decode(checkpoint.tokenizer.encode([" the" * 400])[0][: num_tokens - 1])


def test_a_prompt_of_128_and_128_generated_tokens_make_three_retrievals(checkpoint: Checkpoint, bank: Bank) -> None:
    retriever, memories = open_parts(checkpoint, bank)
    generator = Generator(checkpoint, retriever, memories)
    config = GenerationConfig(max_new_tokens=128, prefetch_tokens=0)
    pieces = list(generator.generate(make_prompt(checkpoint, 128), config))
    assert len(pieces) == 128
    assert generator.num_retrievals == len(retriever.queries) == 3
    assert [trace.first_token for trace in generator.traces] == [0, 64, 128, 192]
    prompt, last, inherited, fresh = generator.traces
    assert inherited.hits == last.hits
    generated = checkpoint.tokenizer.decode([piece.token_id for piece in pieces[:64]])
    assert retriever.queries[2] == generated
    assert fresh.hits == retriever.search([generated], 5)[0]
    for trace in (prompt, last, inherited, fresh):
        assert len(trace.hits) == 5
        assert sum(trace.attention) == pytest.approx(1.0, abs=1e-3)


def test_generation_equals_greedy_choice_from_full_passes(checkpoint: Checkpoint, bank: Bank) -> None:
    """Token by token with a cache, against reading everything again for each token."""
    from model.reading import read_sequences

    retriever, memories = open_parts(checkpoint, bank)
    generator = Generator(checkpoint, retriever, memories)
    prompt = make_prompt(checkpoint, 70)
    produced = [piece.token_id for piece in generator.generate(prompt, GenerationConfig(max_new_tokens=10))]

    tokens = [*checkpoint.bos_token_ids, *checkpoint.tokenizer.encode([prompt])[0].tolist()]
    hits = [trace.hits for trace in generator.traces[:2]]
    ref_ids = [hit.ref_id for of_chunk in hits for hit in of_chunk]
    fetched, index = memories.fetch(ref_ids), torch.arange(10).view(1, 2, 5)
    expected: list[int] = []
    with torch.inference_mode():
        for _ in range(10):
            everything = torch.tensor([tokens + expected])
            chunk = (torch.arange(everything.shape[1]) >= 64).long()[None]
            hidden, _ = read_sequences(checkpoint, everything, fetched, index, chunk)
            expected.append(int(checkpoint.head(hidden)[0, -1].argmax()))
    assert produced == expected


def test_reading_ahead_changes_nothing_but_where_memories_come_from(checkpoint: Checkpoint, bank: Bank) -> None:
    prompt = make_prompt(checkpoint, 100)
    found = {}
    for prefetch_tokens in (0, 20):
        retriever, memories = open_parts(checkpoint, bank)
        generator = Generator(checkpoint, retriever, memories)
        config = GenerationConfig(max_new_tokens=130, prefetch_tokens=prefetch_tokens)
        pieces = [piece.token_id for piece in generator.generate(prompt, config)]
        found[prefetch_tokens] = pieces, generator.traces, generator.num_retrievals
        if prefetch_tokens:
            generated = checkpoint.tokenizer.decode(pieces[:44])
            assert generated == retriever.queries[2]
            assert len(retriever.queries) == generator.num_retrievals + 2
            # A chunk whose memories were read ahead reads nothing itself.
            assert {hit.ref_id for hit in generator.traces[-1].hits} <= set(memories._cache._records)
    assert found[0] == found[20]


class FailingAhead(NotingRetriever):
    """Finds a reference that is not there for every question but those the method asks."""

    num_ahead = 0

    def search(self, texts: Sequence[str], num_hits: int) -> list[list[Hit]]:
        if threading.current_thread() is threading.main_thread():
            return super().search(texts, num_hits)
        self.num_ahead += 1
        return [[Hit(ref_id="0" * 32, score=1.0)] for _ in texts]


def test_what_cannot_be_read_ahead_is_nobody_s_error(checkpoint: Checkpoint, bank: Bank) -> None:
    retriever = FailingAhead(bank, StaticEmbedder(SHIPPED_EMBEDDER))
    generator = Generator(checkpoint, retriever, BankMemories(bank, ReferenceWriter(checkpoint)))
    config, plain = GenerationConfig(max_new_tokens=70), GenerationConfig(max_new_tokens=70, prefetch_tokens=0)
    prompt = make_prompt(checkpoint, 70)
    assert generator.generate_batch([prompt], config) == generator.generate_batch([prompt], plain)
    assert retriever.num_ahead == 1


def test_nothing_is_read_ahead_where_nothing_can_be_kept(checkpoint: Checkpoint, bank: Bank) -> None:
    retriever, _ = open_parts(checkpoint, bank)
    memories = BankMemories(bank, ReferenceWriter(checkpoint), cache_bytes=0)
    generator = Generator(checkpoint, retriever, memories)
    list(generator.generate(make_prompt(checkpoint, 70), GenerationConfig(max_new_tokens=70)))
    assert len(retriever.queries) == generator.num_retrievals == 3
    assert memories.statistics.num_read_ahead == memories.statistics.num_cached == 0


def test_references_in_the_prompt_may_be_quoted(checkpoint: Checkpoint, bank: Bank) -> None:
    """The penalty for repetition is for what the prompt and the model said, not for what references say."""
    retriever = NotingRetriever(bank, StaticEmbedder(SHIPPED_EMBEDDER))
    generator = Generator(checkpoint, texts=ReferenceTexts(checkpoint, bank, retriever))
    config = GenerationConfig(max_new_tokens=12, repetition_penalty=50.0)
    prompt = "The assert statement"
    (found,) = generator.generate_batch([prompt], config)
    own = {*checkpoint.bos_token_ids, *checkpoint.tokenizer.encode([prompt])[0].tolist()}
    laid_out = ReferenceTexts(checkpoint, bank, retriever).lay_out([generator.traces[0].hits])[0]
    assert set(found) & set(laid_out) - own
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generation_in_half_precision_is_close(bank: Bank, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Chunk by chunk, held and as text: the paths run in other types and give nearly the same first logits."""
    from model.reading import ReadingSession

    retriever, memories = open_parts(checkpoint, bank)
    half = make_checkpoint("llama")
    half.model.to(dtype)
    hits = retriever.search([make_prompt(checkpoint, 60)], 5)[0]
    exact = memories.fetch([hit.ref_id for hit in hits])
    cast = Memories(
        keys_LBHSD=exact.keys_LBHSD.to(dtype),
        values_LBHSD=exact.values_LBHSD.to(dtype),
        offsets_LBHS=exact.offsets_LBHS,
    )
    tokens = torch.randint(3, 512, (1, 20), generator=torch.Generator().manual_seed(1))
    found = []
    for model, given in ((checkpoint, exact), (half, cast)):
        session = ReadingSession(model, num_held_slots=40)
        session.read(tokens[:, :-1], given, torch.arange(5)[None, None])
        session.hold(given, torch.arange(5)[None])
        found.append(session.step(tokens[:, -1]).float().softmax(-1))
    assert found[1].isfinite().all()
    assert (found[0] - found[1]).abs().sum() < 0.3


def test_prompts_of_a_batch_are_continued_as_if_alone(checkpoint: Checkpoint, bank: Bank) -> None:
    prompts = [make_prompt(checkpoint, length) for length in (100, 3, 64, 130)] + ["An assert statement"]
    config = GenerationConfig(max_new_tokens=70, repetition_penalty=1.3)
    generator = Generator(checkpoint, *open_parts(checkpoint, bank))
    together, traces = generator.generate_batch(prompts, config), generator.trace.chunks
    for prompt, tokens, of_sequence in zip(prompts, together, traces, strict=True):
        alone = [piece.token_id for piece in generator.generate(prompt, config)]
        assert tokens == alone
        for left, right in zip(of_sequence, generator.traces, strict=True):
            assert left.first_token == right.first_token
            assert [hit.ref_id for hit in left.hits] == [hit.ref_id for hit in right.hits]
            assert left.attention == pytest.approx(right.attention, abs=1e-3)


def test_sequences_that_end_leave_the_others_as_they_are(checkpoint: Checkpoint, bank: Bank) -> None:
    prompts = [make_prompt(checkpoint, length) for length in (20, 40, 60)]
    generator = Generator(checkpoint, *open_parts(checkpoint, bank))
    whole = generator.generate_batch(prompts, GenerationConfig(max_new_tokens=70))
    end = whole[1][5]
    before = checkpoint.config.eos_token_id
    checkpoint.config.eos_token_id = end
    try:
        ended = generator.generate_batch(prompts, GenerationConfig(max_new_tokens=70))
        forced = generator.generate_batch(prompts, GenerationConfig(max_new_tokens=70, stop_at_end=False))
    finally:
        checkpoint.config.eos_token_id = before
    assert forced == whole
    assert ended == [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in whole]
    assert len(ended[1]) <= 5


def test_each_prompt_of_a_batch_is_continued_in_its_own_way(checkpoint: Checkpoint, bank: Bank) -> None:
    """Limits, temperatures, penalties and seeds of their own, and ends from outside: all as if alone."""
    lengths = (100, 3, 64, 130)
    contexts = [[1, *checkpoint.tokenizer.encode([make_prompt(checkpoint, length)])[0].tolist()] for length in lengths]
    configs = [
        GenerationConfig(max_new_tokens=70, repetition_penalty=1.3),
        GenerationConfig(max_new_tokens=4, temperature=1.5, top_p=1.0, seed=9, stop_at_end=False),
        GenerationConfig(max_new_tokens=80, temperature=1.5, top_p=1.0, seed=9, stop_at_end=False),
        GenerationConfig(max_new_tokens=66, temperature=0.7, seed=1, stop_at_end=False),
    ]
    generator = Generator(checkpoint, *open_parts(checkpoint, bank))
    generated: list[list[int]] = [[] for _ in contexts]
    noted_at_end: dict[int, int] = {}

    def is_ended(row: int) -> bool:
        return row == 2 and len(generated[row]) == 20

    for tokens in generator.stream_tokens(contexts, configs, is_ended):
        for row, token in enumerate(tokens):
            if token is None:
                noted_at_end.setdefault(row, len(generator.trace.chunks[row]))
            else:
                generated[row].append(token)
    traces = generator.trace.chunks
    assert [len(tokens) for tokens in generated] == [70, 4, 20, 66]
    assert noted_at_end == {row: len(traces[row]) for row in (1, 2, 3)}
    for row, (context, config) in enumerate(zip(contexts, configs, strict=True)):
        alone = [token for (token,) in generator.stream_tokens([context], [config])]
        assert generated[row] == alone[: len(generated[row])]
        for left, right in zip(traces[row], generator.traces, strict=False):
            assert (left.first_token, [hit.ref_id for hit in left.hits]) == (
                right.first_token,
                [hit.ref_id for hit in right.hits],
            )


def test_references_as_text_are_the_ordinary_model_on_a_longer_prompt(checkpoint: Checkpoint, bank: Bank) -> None:
    """Found with the end of the prompt, laid out before it; the key-values of an equal beginning are used again."""
    retriever = NotingRetriever(bank, StaticEmbedder(SHIPPED_EMBEDDER))
    generator = Generator(checkpoint, texts=ReferenceTexts(checkpoint, bank, retriever))
    prompt, config = "The assert statement " + make_prompt(checkpoint, 90), GenerationConfig(max_new_tokens=9)
    first = [piece.token_id for piece in generator.generate(prompt, config)]
    (trace,) = generator.traces
    encode, decode = checkpoint.tokenizer.encode, checkpoint.tokenizer.decode
    assert retriever.queries == [decode(encode([prompt])[0][-64:].tolist())]
    assert trace.hits == retriever.search(retriever.queries, 5)[0]

    parts: list[int] = []
    for hit in reversed(trace.hits):
        tokens = bank.read_references([hit.ref_id], ["token_ids"])["token_ids"][0].as_py()
        for part in (encode(["Reference: "])[0].tolist(), tokens, encode(["\n\n"])[0].tolist()):
            parts += part
    context = [*checkpoint.bos_token_ids, *parts, *encode([prompt])[0].tolist()]
    expected: list[int] = []
    with torch.inference_mode():
        for _ in range(9):
            logits = checkpoint.model(torch.tensor([context + expected])).logits
            expected.append(int(logits[0, -1].argmax()))
    assert first == expected

    again = [piece.token_id for piece in generator.generate(prompt, config)]
    assert again == expected
    batch = generator.generate_batch([prompt, prompt[:60]], config)
    assert batch[0] == expected
    assert batch[1] == [piece.token_id for piece in generator.generate(prompt[:60], config)]


def test_nothing_stored_changes_and_a_second_run_says_the_same(checkpoint: Checkpoint, bank: Bank) -> None:
    def hash_files() -> dict[str, str]:
        files = sorted(path for path in Path(bank.url).rglob("*") if path.is_file())
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = hash_files()
    generator = Generator(checkpoint, *open_parts(checkpoint, bank))
    config = GenerationConfig(max_new_tokens=70)
    first = "".join(piece.text for piece in generator.generate("An assert", config))
    second = "".join(piece.text for piece in generator.generate("An assert", config))
    assert first == second
    assert hash_files() == before


def test_pieces_join_to_the_text_and_letters_are_never_cut(checkpoint: Checkpoint, bank: Bank) -> None:
    generator = Generator(checkpoint, *open_parts(checkpoint, bank))
    pieces = list(generator.generate("def", GenerationConfig(max_new_tokens=64, temperature=2.0, top_p=1.0, seed=3)))
    text = "".join(piece.text for piece in pieces)
    whole = checkpoint.tokenizer.decode([piece.token_id for piece in pieces])
    assert whole.startswith(text)
    assert len(whole) - len(text) <= 4


def test_sampling_follows_its_seed(checkpoint: Checkpoint) -> None:
    generator = Generator(checkpoint)

    def sample(seed: int) -> list[int]:
        config = GenerationConfig(max_new_tokens=20, temperature=1.0, seed=seed)
        return [piece.token_id for piece in generator.generate("a", config)]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_without_a_bank_it_is_the_ordinary_model(checkpoint: Checkpoint) -> None:
    produced = [
        piece.token_id for piece in Generator(checkpoint).generate("for x in", GenerationConfig(max_new_tokens=8))
    ]
    tokens = torch.tensor([[1, *checkpoint.tokenizer.encode(["for x in"])[0].tolist()]])
    with torch.inference_mode():
        for expected in produced:
            assert int(checkpoint.model(tokens).logits[0, -1].argmax()) == expected
            tokens = torch.cat((tokens, torch.tensor([[expected]])), 1)


def test_memories_that_are_not_read_are_an_error(checkpoint: Checkpoint, bank: Bank) -> None:
    """The real attention function is exchanged for one that ignores memories, as a changed library might."""
    generator = Generator(checkpoint, *open_parts(checkpoint, bank))
    checkpoint.model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        with pytest.raises(MemoryNotReadError, match="no attention"):
            list(generator.generate("An assert", GenerationConfig(max_new_tokens=2)))
    finally:
        checkpoint.model.set_attn_implementation("memory3")  # type: ignore[operator]


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "message"), [("", 5, "empty"), ("a b c " * 900, 5, "shorten"), ("a", 5000, "room for")]
)
def test_prompts_that_do_not_fit_are_refused(
    checkpoint: Checkpoint, prompt: str, max_new_tokens: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        list(Generator(checkpoint).generate(prompt, GenerationConfig(max_new_tokens=max_new_tokens)))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"repetition_penalty": 0.5},
        {"num_memories": 0},
        {"prefetch_tokens": 64},
    ],
)
def test_bad_settings_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        GenerationConfig(**changes)  # type: ignore[arg-type]
