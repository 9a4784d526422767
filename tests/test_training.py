"""The training step: loss, schedule, sequences, which references are read, and that gradients reach the writer."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.reading import CHUNK_TOKENS, read_sequences
from model.selecting import SelectionConfig
from model.training.continual import backward_continual, index_memories
from model.training.objective import ROWS_PER_SLICE, backward_loss
from model.training.retrieval import ReferenceStream, bound_overlap, cut_references
from model.training.schedule import warmup_stable_decay
from model.training.sequences import sample_sequences
from model.writing import encode_references, pad_references
from tests.models import make_checkpoint


def test_sliced_loss_equals_the_ordinary_loss_and_gradient() -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, ROWS_PER_SLICE // 2, 8, generator=random, dtype=torch.float64)
    targets = torch.randint(0, 11, hidden.shape[:2], generator=random)
    targets[0, :7] = -100
    head = torch.nn.Linear(8, 11, bias=False, dtype=torch.float64)

    expected_hidden = hidden.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(head(expected_hidden).flatten(0, 1), targets.flatten())
    expected.backward()
    expected_weight = head.weight.grad.clone()
    head.weight.grad = None

    found_hidden = hidden.clone().requires_grad_()
    found = backward_loss(found_hidden * 1.0, targets, head)
    assert found == pytest.approx(expected.item())
    torch.testing.assert_close(found_hidden.grad, expected_hidden.grad)
    torch.testing.assert_close(head.weight.grad, expected_weight)


def test_schedule_warms_up_stays_and_decays() -> None:
    factors = [warmup_stable_decay(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 20)
    assert factors[20:900] == [1.0] * 880
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[900:]))
    assert factors[-1] == pytest.approx(0.01)


def test_sequences_are_windows_of_the_stream_and_some_repeat_a_span() -> None:
    stream = np.arange(10_000)
    options = {"num_sequences": 64, "sequence_length": 513, "bos_id": 1}
    plain, starts = sample_sequences(stream, **options, repeat_share=0.0, generator=np.random.default_rng(0))  # type: ignore[arg-type]
    for row, start in zip(plain, starts, strict=True):
        assert row[0] == 1
        assert (row[1:] == stream[start + 1 : start + 513]).all()
    copied, _ = sample_sequences(stream, **options, repeat_share=1.0, generator=np.random.default_rng(0))  # type: ignore[arg-type]
    for row in copied:
        values, counts = np.unique(row, return_counts=True)
        assert 32 <= (counts == 2).sum() <= 513 // 3
        assert counts.max() == 2
        assert len(values) == len(counts)


def test_a_chunk_reads_its_own_reference_and_those_of_the_four_before() -> None:
    index = index_memories(torch.tensor([[10, 11, -1, 13, 14, 15]]))
    assert index[0].tolist() == [
        [10, -1, -1, -1, -1],
        [11, 10, -1, -1, -1],
        [-1, 11, 10, -1, -1],
        [13, -1, 11, 10, -1],
        [14, 13, -1, 11, 10],
        [15, 14, 13, -1, 11],
    ]


def measure_common_subsequence(left: list[int], right: list[int]) -> int:
    lengths = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if a == b else max(lengths[i][j + 1], lengths[i + 1][j])
    return lengths[-1][-1]


@given(st.lists(st.integers(0, 5), max_size=40), st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_the_leak_bound_is_never_below_the_overlap(sequence: list[int], reference: list[int]) -> None:
    bound = bound_overlap(np.array(sequence, dtype=np.int64), np.array(reference), 6)
    assert bound >= measure_common_subsequence(sequence, reference) / len(reference)
    assert bound <= 1


def test_references_are_cut_inside_documents() -> None:
    stream = np.array([1, *range(10, 310), 2, 1, *range(400, 410), 2])
    references = cut_references(stream, np.array([0, 302, 314]))
    assert [len(references.get_tokens(row)) for row in range(4)] == [128, 128, 44, 10]
    joined = np.concatenate([references.get_tokens(row) for row in range(4)])
    assert joined.tolist() == [*range(10, 310), *range(400, 410)]
    assert isinstance(references, ReferenceStream)


def test_gradients_reach_the_writer_only_through_the_memories() -> None:
    """The continual step against the same loss written out, and the writer's part of the gradient is not zero."""
    checkpoint = make_checkpoint("llama")
    checkpoint.model.requires_grad_(True)
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 512, (2, 2 * CHUNK_TOKENS + 1), generator=random)
    given_references = [
        [torch.randint(3, 512, (30 + 10 * place + row,), generator=random).int().numpy() for place in range(2)]
        for row in range(2)
    ]
    loss = backward_continual(checkpoint, tokens, given_references, SelectionConfig())
    found = {name: parameter.grad.clone() for name, parameter in checkpoint.model.named_parameters()}

    checkpoint.model.zero_grad()
    padded, valid = pad_references([reference for row in given_references for reference in row], checkpoint.device)
    memories = encode_references(checkpoint, padded, valid, SelectionConfig())
    index = torch.tensor([[[0, -1, -1, -1, -1], [1, 0, -1, -1, -1]], [[2, -1, -1, -1, -1], [3, 2, -1, -1, -1]]])
    chunk = (torch.arange(2 * CHUNK_TOKENS) // CHUNK_TOKENS).expand(2, -1)
    hidden, context = read_sequences(checkpoint, tokens[:, :-1], memories, index, chunk)
    assert context.attention_LBCM is None
    logits = checkpoint.head(hidden)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    through_memory = torch.autograd.grad(expected, memories.values_LBHSD, retain_graph=True)[0]
    assert through_memory.abs().sum() > 0
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in checkpoint.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)
