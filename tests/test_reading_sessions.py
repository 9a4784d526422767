"""Every fast way of reading equals the slow one: joint softmax over memories and context, one sequence at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint import Checkpoint
from model.chunked_reading import MemoryContext, attend_with_log_sum, attend_with_log_sum_plainly
from model.context_cache import ContextCache
from model.held_reading import attend_token
from model.reading import ReadingSession, read_sequences
from model.writing import Memories
from schemas.errors import MemoryNotReadError
from tests.models import CONFIGS, make_checkpoint
from tests.test_exactness import TOLERANCE, make_tokens, write


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return make_checkpoint(request.param)


@pytest.fixture(scope="module")
def llama() -> Checkpoint:
    return make_checkpoint("llama")


def attend_slowly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64, one head at a time; returns the output and the logarithms of the sums."""
    batch, num_heads, num_queries, dim = query.shape
    group = num_heads // key.shape[1]
    out, sums = torch.zeros(batch, num_heads, num_queries, dim), torch.zeros(batch, num_heads, num_queries)
    for row in range(batch):
        for head in range(num_heads):
            scores = query[row, head].double() @ key[row, head // group].double().T * scaling
            if mask is not None:
                scores = scores.masked_fill(~mask[row, 0], -torch.inf)
            out[row, head] = (scores.softmax(-1) @ value[row, head // group].double()).float()
            sums[row, head] = scores.logsumexp(-1).float()
    return out, sums


def read_jointly(
    checkpoint: Checkpoint, context: torch.Tensor, memories: Memories, index: torch.Tensor, chunk: torch.Tensor
) -> torch.Tensor:
    """Logits by the path that training takes: memories and context before a single softmax, without a cache."""
    with torch.enable_grad():
        hidden, read = read_sequences(checkpoint, context, memories, index, chunk)
    assert read.attention_LBCM is None
    with torch.no_grad():
        return checkpoint.head(hidden)  # type: ignore[no-any-return]


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 3), heads=st.sampled_from([(1, 1), (4, 2), (6, 2)]), num_queries=st.integers(1, 40),
    before=st.integers(0, 30), dim=st.sampled_from([8, 64, 80]), masked=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_with_its_sum_is_attention(
    batch: int, heads: tuple[int, int], num_queries: int, before: int, dim: int, masked: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    num_keys = num_queries + before
    query = torch.randn(batch, heads[0], num_queries, dim, generator=random)
    key, value = (torch.randn(batch, heads[1], num_keys, dim, generator=random) for _ in range(2))
    seen = torch.ones(batch, 1, num_queries, num_keys, dtype=torch.bool).tril(before)
    if masked:
        seen = seen & (torch.rand(batch, 1, 1, num_keys, generator=random) > 0.3) | torch.eye(num_keys).bool()[before:]
    mask = seen if masked or before else None
    expected = attend_slowly(query, key, value, seen, 0.3)
    for function in (attend_with_log_sum, attend_with_log_sum_plainly):
        out, log_sum = function(query, key, value, mask, 0.3)
        torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(log_sum, expected[1], rtol=1e-4, atol=1e-4)
    out, weights = attend_token(query[:, :, -1:], key, value, seen[:, :, -1:], 0.3)
    torch.testing.assert_close(out, expected[0][:, :, -1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_its_sum_on_a_gpu(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, heads, 100, 64) for heads in (8, 2, 2))
    expected = attend_slowly(query, key, value, torch.ones(2, 1, 100, 100).bool().tril(), 0.125)
    found = attend_with_log_sum(query.to("cuda", dtype), key.to("cuda", dtype), value.to("cuda", dtype), None, 0.125)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left.float().cpu(), right, rtol=0.03, atol=0.03)


def test_a_token_that_sees_nothing_spoils_nothing() -> None:
    """Padding stands before the context, so its tokens see nothing; what they give must be finite."""
    mask = torch.ones(1, 1, 4, 4).tril().bool()
    mask[..., :2] = False
    for function in (attend_with_log_sum, attend_with_log_sum_plainly):
        out, log_sum = function(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), mask, 0.3)
        assert bool(out.isfinite().all())
        assert bool(log_sum.isfinite().all())


def test_chunks_are_read_as_with_one_softmax(checkpoint: Checkpoint) -> None:
    memories = write(checkpoint, make_tokens(12, 70))
    context = make_tokens(2, 150, seed=4)
    index = torch.tensor(
        [[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [-1] * 5], [[10, 11, 0, -1, -1], [1, 2, -1, -1, -1], [3] * 5]]
    )
    chunk = (torch.arange(150) // 64).expand(2, -1)
    fast, _ = ReadingSession(checkpoint, batch_size=2).read(context, memories, index, chunk)
    torch.testing.assert_close(
        fast, read_jointly(checkpoint, context, memories, index, chunk), rtol=TOLERANCE, atol=TOLERANCE
    )


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), batch=st.integers(1, 3), num_chunks=st.integers(1, 3), num_tokens=st.integers(1, 30))
def test_chunks_read_and_note_what_brute_force_does(seed: int, batch: int, num_chunks: int, num_tokens: int) -> None:
    """Any deal of tokens to chunks, any slots empty, against float64 token by token."""
    random = torch.Generator().manual_seed(seed)
    heads, group, dim, memories, slots = 2, 3, 8, 2, 4
    query = torch.randn(batch, heads * group, num_tokens, dim, generator=random)
    key, value = (torch.randn(batch, heads, num_tokens, dim, generator=random) for _ in range(2))
    size = (1, batch, num_chunks, heads, memories * slots)
    stored = [torch.randn(*size, dim, generator=random) for _ in range(2)]
    valid = torch.rand(size, generator=random) > 0.3
    chunk = torch.randint(-1, num_chunks, (batch, num_tokens), generator=random)
    with torch.inference_mode():
        context = MemoryContext((0,), stored[0], stored[1], valid, chunk, memories)
        out = context.attend(0, query, key, value, None, 0.4)

    received = torch.zeros(batch, num_chunks, memories)
    for row in range(batch):
        for head in range(heads * group):
            for token in range(num_tokens):
                own, kv = int(chunk[row, token]), head // group
                keys, values = key[row, kv, : token + 1], value[row, kv, : token + 1]
                allowed = valid[0, row, own, kv] if own >= 0 else torch.zeros(memories * slots, dtype=torch.bool)
                keys = torch.cat((stored[0][0, row, own, kv][allowed], keys)).double()
                values = torch.cat((stored[1][0, row, own, kv][allowed], values)).double()
                weights = (keys @ query[row, head, token].double() * 0.4).softmax(-1)
                expected = (weights @ values).float()
                torch.testing.assert_close(out[row, head, token], expected, rtol=1e-4, atol=1e-5)
                for place, weight in zip(allowed.nonzero().flatten().tolist(), weights.tolist(), strict=False):
                    received[row, own, place // slots] += weight
    assert context.attention_LBCM is not None
    torch.testing.assert_close(context.attention_LBCM[0], received, rtol=1e-4, atol=1e-4)


def test_single_tokens_read_held_memories_as_with_one_softmax(checkpoint: Checkpoint) -> None:
    memories = write(checkpoint, make_tokens(12, 70))
    context = make_tokens(2, 90, seed=5)
    index = torch.tensor([[[0, 1, 2], [3, 4, 5], [6, 7, -1]], [[8, 9, 10], [11, 0, -1], [-1, -1, -1]]])
    chunk = torch.cat((torch.zeros(40), torch.ones(30), torch.full((20,), 2))).long().expand(2, -1)
    expected = read_jointly(checkpoint, context, memories, index, chunk)

    session = ReadingSession(checkpoint, batch_size=2, num_held_slots=24, num_expected=50)
    parts = [session.read(context[:, :40], memories, index, chunk[:, :40])[0]]
    for place in range(40, 90):
        if place in (40, 70):
            session.hold(memories, index[:, chunk[0, place]])
        parts.append(session.step(context[:, place])[:, None])
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert session.held is not None
    attention = session.held.sum_attention()
    assert attention is not None
    assert bool((attention[:, 0, :2] > 0).all())
    assert bool((attention[:, 0, 2] == 0).all())
    assert bool((attention[:, 1] == 0).all())


def test_references_shorter_than_their_slots_leave_slots_empty(llama: Checkpoint) -> None:
    short = write(llama, make_tokens(1, 3))
    context = make_tokens(1, 20, seed=6)
    index, chunk = torch.tensor([[[0]]]), torch.zeros(1, 20, dtype=torch.int64)
    session = ReadingSession(llama, num_held_slots=8)
    first, _ = session.read(context[:, :10], short, index)
    session.hold(short, index[:, 0])
    rest = [session.step(context[:, place])[:, None] for place in range(10, 20)]
    expected = read_jointly(llama, context, short, index, chunk)
    torch.testing.assert_close(torch.cat((first, *rest), 1), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("with_memory", [True, False])
def test_contexts_of_several_lengths_advance_together(checkpoint: Checkpoint, with_memory: bool) -> None:
    """Padded on the left, each as if it were alone: positions, chunks, memories, and the tokens after."""
    memories = write(checkpoint, make_tokens(6, 60)) if with_memory else None
    lengths, longest = torch.tensor([70, 1, 64, 33]), 70
    contexts = [make_tokens(length + 5, seed=length) for length in lengths.tolist()]
    index = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [-1, -1]], [[1, 3], [-1, -1]], [[-1, -1], [-1, -1]]])

    padded = torch.stack([torch.nn.functional.pad(tokens[:-5], (longest - len(tokens) + 5, 0)) for tokens in contexts])
    places = torch.arange(longest)[None] - (longest - lengths)[:, None]
    session = ReadingSession(checkpoint, batch_size=4, with_prefix=with_memory, num_held_slots=16)
    first, _ = session.read(padded, memories, index, places.clamp(min=0) // 64, lengths_B=lengths)
    if memories is not None:
        session.hold(memories, index[torch.arange(4), (lengths - 1) // 64])
    steps = [session.step(torch.stack([tokens[place - 5] for tokens in contexts])) for place in range(5)]

    for row, (tokens, length) in enumerate(zip(contexts, lengths.tolist(), strict=True)):
        alone = ReadingSession(checkpoint, with_prefix=with_memory)
        own = index[row : row + 1]
        whole, _ = alone.read(tokens[None, :length], memories, own, (torch.arange(length) // 64)[None])
        torch.testing.assert_close(first[row, longest - length :], whole[0], rtol=TOLERANCE, atol=TOLERANCE)
        rest, _ = alone.read(tokens[None, length:], memories, own[:, (length - 1) // 64][:, None])
        after = torch.stack(steps, 1)[row]
        torch.testing.assert_close(after, rest[0], rtol=TOLERANCE, atol=TOLERANCE)


def test_a_rewound_context_goes_on_as_a_new_one(llama: Checkpoint) -> None:
    start, one, other = make_tokens(1, 30), make_tokens(1, 12, seed=2), make_tokens(1, 9, seed=3)
    session = ReadingSession(llama)
    session.read(torch.cat((start, one), 1))
    session.step(one[:, 0])
    session.rewind(30)
    assert session.num_tokens == 30
    again, _ = session.read(other)
    expected, _ = ReadingSession(llama).read(torch.cat((start, other), 1))
    torch.testing.assert_close(again, expected[:, 30:], rtol=TOLERANCE, atol=TOLERANCE)


def test_what_is_held_is_a_copy(llama: Checkpoint) -> None:
    memories = write(llama, make_tokens(3, 50))
    before = memories.keys_LBHSD.clone(), memories.values_LBHSD.clone()
    session = ReadingSession(llama, num_held_slots=16)
    session.read(make_tokens(1, 5))
    session.hold(memories, torch.tensor([[0, 2]]))
    for token in range(5):
        session.step(torch.tensor([token + 3]))
    assert torch.equal(before[0], memories.keys_LBHSD)
    assert torch.equal(before[1], memories.values_LBHSD)


def test_held_memories_that_no_layer_reads_are_an_error(llama: Checkpoint) -> None:
    memories = write(llama, make_tokens(2, 50))
    session = ReadingSession(llama, num_held_slots=16)
    session.read(make_tokens(1, 5))
    session.hold(memories, torch.tensor([[0, 1]]))
    llama.model.set_attn_implementation("sdpa")  # type: ignore[operator]
    try:
        with pytest.raises(MemoryNotReadError, match="no attention"):
            session.step(torch.tensor([3]))
    finally:
        llama.model.set_attn_implementation("memory3")  # type: ignore[operator]


def test_memories_must_fill_the_slots_of_the_session(llama: Checkpoint) -> None:
    memories = write(llama, make_tokens(2, 50))
    session = ReadingSession(llama, num_held_slots=16)
    with pytest.raises(ValueError, match="has seen 0 tokens"):
        session.hold(memories, torch.tensor([[0, 1]]))
    session.read(make_tokens(1, 5))
    with pytest.raises(ValueError, match="8 slots cannot be held by a session of 16"):
        session.hold(memories, torch.tensor([[0]]))
    with pytest.raises(ValueError, match="no padding"):
        session.read(make_tokens(1, 5), lengths_B=torch.tensor([3]))


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), room=st.integers(1, 5), num_slots=st.integers(0, 3))
def test_the_cache_returns_all_it_was_given(sizes: list[int], room: int, num_slots: int) -> None:
    cache = ContextCache(2, (1,), num_slots, room)
    parts: list[list[torch.Tensor]] = [[], []]
    held = torch.randn(1, 2, 3, num_slots, 4)
    for turn, size in enumerate(sizes):
        for layer in range(2):
            new = torch.randn(2, 3, size, 4)
            parts[layer].append(new)
            keys, values = cache.update(new, -new, layer)
            assert torch.equal(keys, torch.cat(parts[layer], 2))
            assert torch.equal(values, -keys)
        assert cache.get_seq_length() == sum(sizes[: turn + 1])
        cache.hold(held, held)
    cache.show_slots(True)
    keys, _ = cache.update(torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 4), 1)
    assert torch.equal(keys[:, :, :num_slots], held[0])
    assert torch.equal(keys[:, :, num_slots:-1], torch.cat(parts[1], 2))
    first, _ = cache.update(torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 4), 0)
    assert torch.equal(first[:, :, :-1], torch.cat(parts[0], 2))
