"""Writing: batches, what a batch may not change, which parts of the model run, and gradients."""

import itertools
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.checkpoint import Checkpoint, load_checkpoint
from model.selecting import SelectionConfig
from model.writing import ReferenceWriter, encode_references, pad_references, split_batches
from schemas.protocols import IntArray
from tests.models import CONFIGS, make_checkpoint


def list_references(checkpoint: Checkpoint, lengths: list[int]) -> list[IntArray]:
    names = sorted(topics)
    encoded = checkpoint.tokenizer.encode([topics[name][:2000] for name in names[: 2 * len(lengths)]])
    long_enough = [ids for ids in encoded if len(ids) >= max(lengths)]
    return [ids[:length] for ids, length in zip(long_enough, lengths, strict=False)]


@given(st.lists(st.integers(1, 128), max_size=60), st.integers(1, 700))
def test_batches_take_every_reference_once_shortest_first_within_the_bound(lengths: list[int], bound: int) -> None:
    batches = list(split_batches(np.array(lengths, dtype=np.int64), bound))
    rows = [int(row) for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= bound
    for batch, following in itertools.pairwise(batches):
        assert (len(batch) + 1) * lengths[following[0]] > bound


@pytest.mark.parametrize("selection", [SelectionConfig(), SelectionConfig(score="residual", refit=True)])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_what_is_written_does_not_depend_on_the_batch(name: str, selection: SelectionConfig) -> None:
    checkpoint = make_checkpoint(name)
    writer = ReferenceWriter(checkpoint, selection, dtype="float32")
    references = list_references(checkpoint, [128, 3, 70, 128, 9, 1, 69, 40, 128, 100, 128, 127])
    together = writer.write(references)
    for row, reference in enumerate(references):
        alone = writer.write([reference])
        np.testing.assert_array_equal(alone.offsets[0], together.offsets[row])
        pair = [written.view(np.float32) for written in (alone.payload[0], together.payload[row])]
        np.testing.assert_allclose(*pair, rtol=2e-3, atol=2e-3)


def test_nothing_past_the_keys_and_values_of_the_last_memory_layer_is_run() -> None:
    checkpoint = make_checkpoint("llama")
    ran: list[str] = []
    for name, module in checkpoint.model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _module, _inputs, _output, name=name: ran.append(name))
    with torch.inference_mode():
        padded, valid = pad_references(list_references(checkpoint, [20]), checkpoint.device)
        encode_references(checkpoint, padded, valid, SelectionConfig())
    last = checkpoint.memory_layers[-1]
    inside = [name for name in ran if name.startswith("model.layers.")]
    assert max(int(name.split(".")[2]) for name in inside) == last
    assert [name for name in inside if name.startswith(f"model.layers.{last}.")][-1].endswith("v_proj")
    assert f"model.layers.{last - 1}.mlp.down_proj" in ran


def test_memories_are_the_same_with_gradients_and_carry_them_to_keys_and_values() -> None:
    checkpoint = make_checkpoint("llama")
    padded, valid = pad_references(list_references(checkpoint, [50, 20]), checkpoint.device)
    for selection in (SelectionConfig(), SelectionConfig(score="residual", refit=True)):
        with torch.inference_mode():
            plain = encode_references(checkpoint, padded, valid, selection)
        checkpoint.model.requires_grad_(True)
        memories = encode_references(checkpoint, padded, valid, selection)
        torch.testing.assert_close(memories.keys_LBHSD, plain.keys_LBHSD)
        torch.testing.assert_close(memories.values_LBHSD, plain.values_LBHSD)
        (memories.keys_LBHSD.sum() + memories.values_LBHSD.sum()).backward()
        attention = checkpoint.decoder.get_submodule(f"layers.{checkpoint.memory_layers[-1]}.self_attn")
        for name in ("k_proj", "v_proj"):
            gradient = attention.get_submodule(name).weight.grad
            assert isinstance(gradient, torch.Tensor)
            assert gradient.abs().sum() > 0
        assert attention.get_submodule("q_proj").weight.grad is None
        checkpoint.model.zero_grad()
        checkpoint.model.requires_grad_(False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("selection", [SelectionConfig(), SelectionConfig(score="residual", refit=True)])
def test_a_gpu_writes_what_the_cpu_writes(selection: SelectionConfig) -> None:
    written = []
    for device in ("cpu", "cuda"):
        checkpoint = load_checkpoint(device=device)
        references = list_references(checkpoint, [128, 3, 70, 128, 9, 1])
        written.append(ReferenceWriter(checkpoint, selection, dtype="float32").write(references))
    assert (written[0].offsets == written[1].offsets).mean() > 0.99
    same = (written[0].offsets == written[1].offsets).all((1, 2, 3))
    pair = [memories.payload[same].view(np.float32) for memories in written]
    np.testing.assert_allclose(*pair, rtol=1e-2, atol=1e-2)
