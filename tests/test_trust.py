"""A bank is read by the model that wrote it and by no other, when it is opened and at every fetch after that."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from model.checkpoint import Checkpoint
from model.fetching import BankMemories
from model.selecting import SelectionConfig
from model.writing import ReferenceWriter
from schemas.bank import Bank
from schemas.errors import WrongModelError
from tests.banks import change_manifest, list_tokens, make_bank, make_references
from tests.models import make_checkpoint, train_tokenizer

NUM_REFERENCES = 6


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return make_checkpoint("llama")


@pytest.fixture(scope="module")
def warm(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = tmp_path_factory.mktemp("warm") / "bank"
    return make_bank(folder, ReferenceWriter(checkpoint), num_references=NUM_REFERENCES)


@pytest.fixture(scope="module")
def ref_ids(warm: Bank) -> list[str]:
    ids: list[str] = warm.read_table("references", ["ref_id"])["ref_id"].to_pylist()
    return ids


class LowRankAdapter(nn.Module):
    """A linear map with a product of two small matrices beside it, named as PEFT names them."""

    def __init__(self, base_layer: nn.Linear, scale: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, bias=False)})
        for parameter in (*self.lora_A.parameters(), *self.lora_B.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator)
            parameter.requires_grad_(False)
        self.lora_B["default"].weight.mul_(scale)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.base_layer(inputs) + self.lora_B["default"](self.lora_A["default"](inputs))

    def get_delta(self) -> torch.Tensor:
        return self.lora_B["default"].weight @ self.lora_A["default"].weight


def add_adapters(checkpoint: Checkpoint, *, scale: float = 0.1) -> Checkpoint:
    for layer in checkpoint.decoder.layers:
        layer.self_attn.q_proj = LowRankAdapter(layer.self_attn.q_proj, scale)
    return checkpoint


def merge_adapters(checkpoint: Checkpoint) -> Checkpoint:
    """Adds the products to the weights the way PEFT does, past the version counters, and takes the adapters out."""
    for layer in checkpoint.decoder.layers:
        adapter = layer.self_attn.q_proj
        adapter.base_layer.weight.data += adapter.get_delta()
        layer.self_attn.q_proj = adapter.base_layer
    return checkpoint


# When a bank is opened ------------------------------------------------------------------------------------------------


def change_tokenizer(checkpoint: Checkpoint) -> ReferenceWriter:
    return ReferenceWriter(dataclasses.replace(checkpoint, tokenizer=train_tokenizer(400)))


def change_rope_base(checkpoint: Checkpoint) -> ReferenceWriter:
    rope = {**checkpoint.config.rope_parameters, "rope_theta": 500_000.0}
    return ReferenceWriter(make_checkpoint("llama", rope_parameters=rope))


def change_dtype(checkpoint: Checkpoint) -> ReferenceWriter:
    other = make_checkpoint("llama")
    other.model.to(torch.float64)
    return ReferenceWriter(other)


def change_one_weight(checkpoint: Checkpoint) -> ReferenceWriter:
    other = make_checkpoint("llama")
    other.decoder.get_parameter(f"layers.{other.memory_layers[-1]}.self_attn.v_proj.weight")[3, 5] += 1e-3
    return ReferenceWriter(other)


OTHER_MODELS: dict[str, tuple[Callable[[Checkpoint], ReferenceWriter], str]] = {
    "seed": (lambda checkpoint: ReferenceWriter(make_checkpoint("llama", seed=1)), "weights"),
    "one-weight": (change_one_weight, "weights"),
    "tokenizer": (change_tokenizer, "tokenizer"),
    "rope-base": (change_rope_base, "rope"),
    "slots": (lambda checkpoint: ReferenceWriter(checkpoint, SelectionConfig(num_slots=4)), "selection"),
    "score": (lambda checkpoint: ReferenceWriter(checkpoint, SelectionConfig(score="exp")), "selection"),
    "layers": (lambda checkpoint: ReferenceWriter(make_checkpoint("llama", memory_layers=[1])), "memory_layers"),
    "dtype": (change_dtype, "weights, (rope, )?compute_dtype"),
    "stored-dtype": (lambda checkpoint: ReferenceWriter(checkpoint, dtype="float32"), "storage"),
    "adapter": (lambda checkpoint: ReferenceWriter(add_adapters(make_checkpoint("llama"))), "weights"),
    "adapter-of-no-effect": (
        lambda checkpoint: ReferenceWriter(add_adapters(make_checkpoint("llama"), scale=0.0)),
        "weights",
    ),
    "norm": (lambda checkpoint: ReferenceWriter(make_checkpoint("llama", rms_norm_eps=1e-5)), "architecture"),
}


@pytest.mark.parametrize("name", sorted(OTHER_MODELS))
@pytest.mark.parametrize("is_cold", [False, True])
def test_a_bank_of_another_model_is_refused_by_the_part_that_differs(
    warm: Bank, checkpoint: Checkpoint, name: str, is_cold: bool
) -> None:
    make_writer, part = OTHER_MODELS[name]
    bank = change_manifest(warm, cold=is_cold)
    with pytest.raises(
        WrongModelError, match=f"another model: {part}(, storage)? differ; use the model it was built with"
    ):
        BankMemories(bank, make_writer(checkpoint))
    assert not (Path(warm.url) / "cold").exists()


def test_a_weight_past_the_memory_layers_makes_no_difference(warm: Bank, ref_ids: list[str]) -> None:
    other = make_checkpoint("llama")
    other.decoder.get_parameter(f"layers.{other.memory_layers[-1] + 1}.self_attn.v_proj.weight")[3, 5] += 1.0
    other.head.get_parameter("weight")[0, 0] += 1.0
    assert BankMemories(warm, ReferenceWriter(other)).fetch_records(ref_ids[:2]).any()


@pytest.mark.parametrize("name", ["llama-rope-scaled", "qwen2", "qwen3", "mistral"])
def test_a_fingerprint_that_went_through_json_is_the_writers(tmp_path: Path, name: str) -> None:
    writer = ReferenceWriter(make_checkpoint(name))
    bank = make_bank(tmp_path, writer, num_references=3)
    assert bank.manifest.fingerprint == writer.fingerprint
    assert bank.manifest.fingerprint.digest == writer.fingerprint.digest
    assert BankMemories(bank, writer).fetch(make_references(writer.checkpoint.tokenizer, 3)["ref_id"].to_pylist())


def test_the_same_weights_loaded_twice_are_the_same_model(warm: Bank, ref_ids: list[str]) -> None:
    expected = BankMemories(warm, ReferenceWriter(make_checkpoint("llama"))).fetch_records(ref_ids)
    again = BankMemories(warm, ReferenceWriter(make_checkpoint("llama")))
    assert again.fetch_records(ref_ids).tobytes() == expected.tobytes()


def test_a_merged_adapter_counts_by_the_weights_it_leaves(warm: Bank, ref_ids: list[str]) -> None:
    nothing = merge_adapters(add_adapters(make_checkpoint("llama"), scale=0.0))
    assert BankMemories(warm, ReferenceWriter(nothing)).fetch_records(ref_ids).any()
    something = merge_adapters(add_adapters(make_checkpoint("llama")))
    with pytest.raises(WrongModelError, match="another model: weights differ"):
        BankMemories(warm, ReferenceWriter(something))


def test_an_adapter_past_the_memory_layers_makes_no_difference(warm: Bank, ref_ids: list[str]) -> None:
    other = make_checkpoint("llama")
    attention = other.decoder.get_submodule(f"layers.{other.memory_layers[-1] + 1}.self_attn")
    attention.q_proj = LowRankAdapter(attention.get_submodule("q_proj"), 1.0)
    assert BankMemories(warm, ReferenceWriter(other)).fetch_records(ref_ids).any()


# At the next fetch ----------------------------------------------------------------------------------------------------


def get_projection(checkpoint: Checkpoint) -> nn.Parameter:
    return checkpoint.decoder.get_parameter(f"layers.{checkpoint.memory_layers[-1]}.self_attn.k_proj.weight")


def change_in_place(checkpoint: Checkpoint) -> None:
    get_projection(checkpoint)[1, 2] += 1e-3


def change_embedding(checkpoint: Checkpoint) -> None:
    checkpoint.decoder.get_parameter("embed_tokens.weight")[7] *= 2


def change_past_the_counter(checkpoint: Checkpoint) -> None:
    get_projection(checkpoint).data *= 1.01


def change_by_assignment(checkpoint: Checkpoint) -> None:
    # The new matrix may well come to lie where an old one was.
    for _ in range(3):
        get_projection(checkpoint).data = get_projection(checkpoint).data.clone() + 0.5


def change_by_loading(checkpoint: Checkpoint) -> None:
    other = make_checkpoint("llama", seed=1)
    checkpoint.model.load_state_dict(other.model.state_dict(), assign=True)


def change_by_training(checkpoint: Checkpoint) -> None:
    weight = get_projection(checkpoint)
    weight.requires_grad_(True)
    weight.square().sum().backward()
    torch.optim.SGD([weight], lr=1e-3).step()
    weight.requires_grad_(False)


def change_configured_rope_base(checkpoint: Checkpoint) -> None:
    checkpoint.config.rope_parameters["rope_theta"] = 500_000.0


def change_frequencies(checkpoint: Checkpoint) -> None:
    checkpoint.decoder.rotary_emb.inv_freq.mul_(0.5)


def replace_frequencies(checkpoint: Checkpoint) -> None:
    rotary = checkpoint.decoder.rotary_emb
    rotary.inv_freq = rotary.inv_freq * 0.5


CHANGES: dict[str, tuple[Callable[[Checkpoint], object], str]] = {
    "in-place": (change_in_place, "weights"),
    "embedding": (change_embedding, "weights"),
    "past-the-counter": (change_past_the_counter, "weights"),
    "assignment": (change_by_assignment, "weights"),
    "loading": (change_by_loading, "weights"),
    "training": (change_by_training, "weights"),
    "adapter": (add_adapters, "weights"),
    "adapter-of-no-effect": (lambda checkpoint: add_adapters(checkpoint, scale=0.0), "weights"),
    "merged-adapter": (lambda checkpoint: merge_adapters(add_adapters(checkpoint)), "weights"),
    "configured-rope-base": (change_configured_rope_base, "rope"),
    "frequencies": (change_frequencies, "rope"),
    "other-frequencies": (replace_frequencies, "rope"),
    "norm": (lambda checkpoint: setattr(checkpoint.config, "rms_norm_eps", 1e-2), "architecture"),
    "dtype": (lambda checkpoint: checkpoint.model.to(torch.float64), "weights, (rope, )?compute_dtype"),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
@pytest.mark.parametrize("is_cold", [False, True])
def test_a_model_that_changes_after_opening_is_refused_at_the_next_fetch(
    warm: Bank, ref_ids: list[str], tmp_path: Path, name: str, is_cold: bool
) -> None:
    change, part = CHANGES[name]
    model = make_checkpoint("llama")
    bank = change_manifest(warm, cold=is_cold)
    memories = BankMemories(bank, ReferenceWriter(model))
    assert memories.fetch(ref_ids[:2]).keys_LBHSD.any()
    change(model)
    for asked in (ref_ids[:2], ref_ids[3:], []):  # in the cache, not in it, nothing
        for fetch in (memories.fetch, memories.fetch_records):
            with pytest.raises(WrongModelError, match=f"another model: {part} differ; use the model it was built with"):
                fetch(asked)


def test_a_model_changed_back_reads_on(warm: Bank, ref_ids: list[str]) -> None:
    model = make_checkpoint("llama")
    memories = BankMemories(warm, ReferenceWriter(model))
    expected = memories.fetch_records(ref_ids)
    before = get_projection(model).clone()
    get_projection(model).zero_()
    with pytest.raises(WrongModelError):
        memories.fetch_records(ref_ids)
    get_projection(model).copy_(before)
    assert memories.fetch_records(ref_ids).tobytes() == expected.tobytes()


def test_a_copy_of_the_same_weights_is_accepted_at_the_next_fetch(warm: Bank, ref_ids: list[str]) -> None:
    model = make_checkpoint("llama")
    writer = ReferenceWriter(model)
    memories = BankMemories(warm, writer)
    before = writer.fingerprint
    for parameter in model.model.parameters():
        parameter.data = parameter.data.clone()
    assert memories.fetch_records(ref_ids).any()
    assert writer.fingerprint == before
    assert writer.fingerprint is not before


def test_the_weights_are_read_again_only_after_a_change(checkpoint: Checkpoint) -> None:
    writer = ReferenceWriter(checkpoint)
    first = writer.fingerprint
    writer.write(list_tokens(make_references(checkpoint.tokenizer, 2)))
    assert writer.fingerprint is first
    last = checkpoint.decoder.get_parameter(f"layers.{checkpoint.memory_layers[-1] + 1}.mlp.up_proj.weight")
    last.add_(0.0)  # past the memory layers
    assert writer.fingerprint is first


def test_a_model_loaded_for_inference_alone_has_a_fingerprint(warm: Bank, ref_ids: list[str]) -> None:
    with torch.inference_mode():
        model = make_checkpoint("llama")
        memories = BankMemories(warm, ReferenceWriter(model))
        assert memories.fetch_records(ref_ids).any()
        get_projection(model).mul_(1.01)  # no tensor made in inference mode counts its changes
        with pytest.raises(WrongModelError, match="weights differ"):
            memories.fetch_records(ref_ids)
