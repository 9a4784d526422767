"""Reading a memory is exact: it equals plain attention over the reference's own tokens, for every architecture."""

import copy
import dataclasses

import pytest
import torch
from transformers import DynamicCache

from model.checkpoint import Checkpoint
from model.reading import ReadingSession, read_sequences
from model.selecting import SelectionConfig
from model.writing import Memories, encode_references, pad_references
from schemas.errors import InputError
from tests.models import CONFIGS, make_checkpoint

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return make_checkpoint(request.param)


def make_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 512, shape, generator=torch.Generator().manual_seed(seed))


def write(checkpoint: Checkpoint, references: torch.Tensor, num_slots: int = 8) -> Memories:
    padded, valid = pad_references([reference.numpy() for reference in references], checkpoint.device)
    with torch.inference_mode():
        return encode_references(checkpoint, padded, valid, SelectionConfig(num_slots=num_slots))


def attend_plainly(checkpoint: Checkpoint, reference: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Runs transformers' own eager attention over prefix + reference + context.

    In memory layers the context sees prefix, reference and context; in the others it sees prefix and context only.
    Layer by layer, with a mask for each kind of layer. A window counts the columns of prefix and context; a reference
    is in sight of all of it.
    """
    model = copy.deepcopy(checkpoint.model)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    decoder = model.get_submodule("model")
    num_prefix, num_reference = len(checkpoint.prefix_token_ids), len(reference)
    tokens = torch.cat((checkpoint.prefix_token_ids, reference, context))[None]
    start = checkpoint.context_start
    positions = torch.cat((torch.arange(num_prefix + num_reference), torch.arange(start, start + len(context))))[None]
    seen = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    apart = seen.clone()
    apart[num_prefix + num_reference :, num_prefix : num_prefix + num_reference] = False
    columns = torch.cat((torch.arange(num_prefix + num_reference), num_prefix + torch.arange(len(context))))
    is_reference = (torch.arange(len(columns)) >= num_prefix) & (
        torch.arange(len(columns)) < num_prefix + num_reference
    )
    hidden = decoder.embed_tokens(tokens)
    with torch.inference_mode():
        for index, layer in enumerate(decoder.layers):
            allowed = seen if index in checkpoint.memory_layers else apart
            window = getattr(layer.self_attn, "sliding_window", getattr(decoder.config, "sliding_window", None))
            if window is not None:
                allowed = allowed & ((columns[:, None] - columns < window) | is_reference)
            mask = torch.zeros_like(allowed, dtype=torch.float32).masked_fill(~allowed, -torch.inf)[None, None]
            kind = [checkpoint.config.layer_types[index]] if isinstance(decoder.rotary_emb.rope_type, dict) else []
            cos_sin = decoder.rotary_emb(hidden, positions, *kind)
            hidden = layer(hidden, attention_mask=mask, position_embeddings=cos_sin, position_ids=positions)
        return model.lm_head(decoder.norm(hidden))[0, num_prefix + num_reference :]  # type: ignore[no-any-return]


@pytest.mark.parametrize("memory_layers", [None, (1, 2), (0, 3)])
@pytest.mark.parametrize("num_tokens", [64, 250])
def test_memory_of_all_tokens_equals_plain_attention(
    checkpoint: Checkpoint, num_tokens: int, memory_layers: tuple[int, ...] | None
) -> None:
    checkpoint = dataclasses.replace(checkpoint, memory_layers=memory_layers or checkpoint.memory_layers)
    reference, context = make_tokens(100), make_tokens(num_tokens, seed=2)
    memories = write(checkpoint, reference[None], num_slots=128)
    index, chunk = torch.zeros(1, 1, 1, dtype=torch.int64), torch.zeros(1, num_tokens, dtype=torch.int64)

    logits, _ = ReadingSession(checkpoint).read(context[None], memories, index, chunk)
    expected = attend_plainly(checkpoint, reference, context)
    torch.testing.assert_close(logits[0], expected, rtol=TOLERANCE, atol=TOLERANCE)

    with torch.inference_mode():
        hidden, _ = read_sequences(checkpoint, context[None], memories, index, chunk)
        torch.testing.assert_close(checkpoint.head(hidden)[0], expected, rtol=TOLERANCE, atol=TOLERANCE)

    without, _ = ReadingSession(checkpoint).read(context[None])
    assert (without[0] - expected).abs().max() > 100 * TOLERANCE


def test_order_of_memories_does_not_matter(checkpoint: Checkpoint) -> None:
    memories = write(checkpoint, make_tokens(5, 90))
    context = make_tokens(1, 64, seed=3)
    first, _ = ReadingSession(checkpoint).read(context, memories, torch.tensor([[[0, 1, 2, 3, 4]]]))
    second, _ = ReadingSession(checkpoint).read(context, memories, torch.tensor([[[3, 0, 4, 2, 1]]]))
    other, _ = ReadingSession(checkpoint).read(context, memories, torch.tensor([[[0, 0, 0, 0, 0]]]))
    torch.testing.assert_close(first, second, rtol=TOLERANCE, atol=TOLERANCE)
    assert (first - other).abs().max() > 10 * TOLERANCE


def test_chunks_read_together_equal_chunks_read_one_by_one(checkpoint: Checkpoint) -> None:
    memories = write(checkpoint, make_tokens(12, 70))
    context = make_tokens(1, 200, seed=4)
    index = torch.tensor([[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [-1] * 5, [10, 11, 0, -1, -1]]])
    chunk = (torch.arange(200) // 64)[None]

    together, seen = ReadingSession(checkpoint).read(context, memories, index, chunk)
    session, parts = ReadingSession(checkpoint), []
    for place in range(4):
        part, _ = session.read(context[:, place * 64 : (place + 1) * 64], memories, index[:, place : place + 1])
        parts.append(part)
    torch.testing.assert_close(together, torch.cat(parts, 1), rtol=TOLERANCE, atol=TOLERANCE)
    assert seen is not None
    assert seen.attention_LBCM is not None
    assert bool((seen.attention_LBCM[:, 0, 2] == 0).all())
    assert bool((seen.attention_LBCM[:, 0, 0] > 0).all())


def test_prefill_and_decode_equal_one_full_pass(checkpoint: Checkpoint) -> None:
    memories = write(checkpoint, make_tokens(10, 80))
    context = make_tokens(1, 80, seed=5)
    index = torch.tensor([[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]])
    chunk = (torch.arange(80) // 64)[None]
    full, _ = ReadingSession(checkpoint).read(context, memories, index, chunk)

    session = ReadingSession(checkpoint)
    parts = [session.read(context[:, :50], memories, index, chunk[:, :50])[0]]
    for place in range(50, 80):
        token_index = index[:, place // 64 : place // 64 + 1]
        parts.append(session.read(context[:, place : place + 1], memories, token_index)[0])
    torch.testing.assert_close(full, torch.cat(parts, 1), rtol=TOLERANCE, atol=TOLERANCE)


def test_sequences_of_a_batch_read_their_own_memories(checkpoint: Checkpoint) -> None:
    memories = write(checkpoint, make_tokens(6, 60))
    context = make_tokens(2, 70, seed=6)
    index = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [-1, -1]]])
    chunk = torch.stack((torch.arange(70) // 64, (torch.arange(70) >= 10).long()))
    together, _ = ReadingSession(checkpoint, batch_size=2).read(context, memories, index, chunk)
    for row in range(2):
        alone, _ = ReadingSession(checkpoint).read(
            context[row : row + 1], memories, index[row : row + 1], chunk[row : row + 1]
        )
        torch.testing.assert_close(together[row], alone[0], rtol=TOLERANCE, atol=TOLERANCE)


def test_memories_are_unchanged_by_reading(checkpoint: Checkpoint) -> None:
    memories = write(checkpoint, make_tokens(5, 90))
    before = copy.deepcopy(memories)
    session = ReadingSession(checkpoint)
    for seed in range(3):
        session.read(make_tokens(1, 30, seed=seed), memories, torch.tensor([[[0, 1, 2, 3, 4]]]))
    assert torch.equal(before.keys_LBHSD, memories.keys_LBHSD)
    assert torch.equal(before.values_LBHSD, memories.values_LBHSD)
    assert torch.equal(before.offsets_LBHS, memories.offsets_LBHS)


def test_without_memory_equals_the_ordinary_model(checkpoint: Checkpoint) -> None:
    context = make_tokens(1, 90, seed=7)
    logits, _ = ReadingSession(checkpoint, with_prefix=False).read(context)
    model = copy.deepcopy(checkpoint.model)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.inference_mode():
        expected = model(context, past_key_values=DynamicCache()).logits
    torch.testing.assert_close(logits, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["mistral-window", "gemma3"])
def test_a_window_shorter_than_a_reference_is_refused(name: str) -> None:
    checkpoint = make_checkpoint(name, sliding_window=90)
    write(checkpoint, make_tokens(1, 80))
    with pytest.raises(InputError, match="sees 90 tokens"):
        write(checkpoint, make_tokens(1, 100))


def test_a_reference_is_written_the_same_in_any_batch(checkpoint: Checkpoint) -> None:
    references = [make_tokens(length, seed=length).numpy() for length in (128, 3, 60, 8, 1)]
    padded, valid = pad_references(references, checkpoint.device)
    with torch.inference_mode():
        together = encode_references(checkpoint, padded, valid, SelectionConfig())
        for row, reference in enumerate(references):
            alone = encode_references(checkpoint, *pad_references([reference], checkpoint.device), SelectionConfig())
            assert torch.equal(together.offsets_LBHS[:, row], alone.offsets_LBHS[:, 0])
            torch.testing.assert_close(together.keys_LBHSD[:, row], alone.keys_LBHSD[:, 0], rtol=1e-4, atol=1e-4)
