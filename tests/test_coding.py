"""Codecs of keys and values: decoding against FAISS and slow references, payloads, hostile bytes, files."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.additive_codecs import ProductResidualCodec, RotatedResidualCodec
from model.bit_packing import (
    count_packed_bytes,
    look_up_bits,
    pack_bits,
    unpack_bits,
    unpack_bits_anywhere,
)
from model.codec_files import METADATA, TrainedCodec, load_trained, read_codec_name
from model.codec_training import order_parts, train_codec
from model.coding import KeyValueCodec, build_codec, load_codec
from model.lloyd_codec import find_levels
from model.mapped_codec import train_map
from model.turbo_codec import TurboCodec, make_rotation
from schemas.errors import BankFormatError, InputError
from schemas.records import RecordLayout

SHAPE = (40, 2, 2, 4, 8)
"""Records, layers, heads, slots, head dim of the vectors that small codecs are trained on."""

UNTRAINED = ["none", "int8", "turbo1", "turbo2", "turbo3", "turbo4", "none/turbo3", "int8/turbo2"]
TRAINED = [
    "lloyd3",
    "mapped-lloyd3",
    "mapped-turbo2",
    "mapped-int8",
    "PRQ2x2x3",
    "mapped-PRQ2x2x3",
    "OPQ2x8-Residual2x3-PQ4x3",
    "mapped-OPQ2x8-Residual2x3-PQ4x3",
    "int8/mapped-lloyd4",
]


def draw_vectors(seed: int = 0) -> torch.Tensor:
    """Returns correlated vectors with a mean, other ones for each layer and head."""
    generator = torch.Generator().manual_seed(seed)
    _, num_layers, num_heads, _, size = SHAPE
    mixed = torch.randn(num_layers, num_heads, size, size, generator=torch.Generator().manual_seed(7))
    vectors = torch.einsum("nlhsd,lhde->nlhse", torch.randn(SHAPE, generator=generator), mixed)
    return vectors + 3 * mixed[:, :, None, 0]


@pytest.fixture(scope="module", params=UNTRAINED + TRAINED)
def codec(request: pytest.FixtureRequest) -> KeyValueCodec:
    _, num_layers, num_heads, num_slots, head_dim = SHAPE
    if request.param in UNTRAINED:
        return load_codec(
            request.param,
            num_layers=num_layers,
            num_kv_heads=num_heads,
            num_slots=num_slots,
            head_dim=head_dim,
        )
    trained = train_codec(request.param, draw_vectors(), draw_vectors(1), rounds=3)
    return build_codec(trained, num_slots=num_slots)


def measure_error(right: torch.Tensor, found: torch.Tensor) -> float:
    return float((right - found).square().sum() / right.square().sum())


def test_payload_has_the_bytes_of_the_layout_key_by_key(codec: KeyValueCodec) -> None:
    keys, values = draw_vectors(2), draw_vectors(3)
    payload = codec.encode(keys, values)
    _, num_layers, num_heads, num_slots, head_dim = SHAPE
    layout = RecordLayout(
        num_layers=num_layers, num_kv_heads=num_heads, num_slots=num_slots, head_dim=head_dim, codec=codec.name
    )
    assert payload.shape == (len(keys), layout.payload_bytes)
    assert payload.is_contiguous()
    assert codec.payload_bytes == layout.payload_bytes

    at = 0
    coded = codec.keys.encode(keys), codec.values.encode(values)
    for layer in range(num_layers):
        for codes in coded:
            for head in range(num_heads):
                for slot in range(num_slots):
                    one = codes[:, layer, head, slot]
                    assert torch.equal(payload[:, at : at + one.shape[-1]], one)
                    at += one.shape[-1]
    assert at == layout.payload_bytes

    padded = torch.nn.functional.pad(payload, (0, -layout.payload_bytes % 64))  # rows of longer records
    found = codec.decode(padded[:, : layout.payload_bytes], torch.float32)
    assert torch.equal(found[0], codec.keys.decode(coded[0]))
    assert torch.equal(found[1], codec.values.decode(coded[1]))
    assert measure_error(keys, found[0]) < 0.4
    assert measure_error(values, found[1]) < 0.4
    assert codec.decode(payload, torch.float16)[0].dtype == torch.float16


def test_vectors_are_decoded_alone(codec: KeyValueCodec) -> None:
    payload = codec.encode(draw_vectors(2), draw_vectors(3))
    together = codec.decode(payload, torch.float32)
    one = codec.decode(payload[5:6], torch.float32)
    for all_of_them, single in zip(together, one, strict=True):
        assert torch.allclose(all_of_them[5:6], single, atol=1e-5)
    none = codec.decode(payload[:0], torch.float32)
    assert none[0].shape == (0, *SHAPE[1:])


def test_zeros_and_any_bytes_decode_to_finite_numbers(codec: KeyValueCodec) -> None:
    zeros = torch.zeros(SHAPE)
    for found in codec.decode(codec.encode(zeros, zeros), torch.float32):
        assert bool(found.isfinite().all())
    if "none" in codec.name:
        return  # what is stored as it is may be infinite
    generator = torch.Generator().manual_seed(0)
    payload = torch.randint(0, 256, (500, codec.payload_bytes), dtype=torch.uint8, generator=generator)
    payload[0], payload[1] = 255, 127
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for found in codec.decode(payload, dtype):
            assert bool(found.isfinite().all())


def test_none_is_the_plain_bytes() -> None:
    keys, values = draw_vectors(2), draw_vectors(3)
    for dtype in ("bfloat16", "float16", "float32"):
        codec = load_codec("none", num_layers=2, num_kv_heads=2, num_slots=4, head_dim=8, dtype=dtype)
        plain = torch.stack((keys, values), 2).to(getattr(torch, dtype)).contiguous()
        payload = codec.encode(keys, values)
        assert payload.numpy().tobytes() == plain.view(torch.uint8).numpy().tobytes()
        found = codec.decode(payload, getattr(torch, dtype))
        assert torch.equal(found[0], plain[:, :, 0])
        assert found[0].untyped_storage().data_ptr() == payload.untyped_storage().data_ptr()


def test_int8_by_hand() -> None:
    vector = torch.tensor([127.0, -127.0, 1.4, 0.6, 0.0, 63.5, -2.6, 100.0]).view(1, 1, 1, 1, 8)
    codec = load_codec("int8", num_layers=1, num_kv_heads=1, num_slots=1, head_dim=8)
    codes = codec.keys.encode(vector).flatten().tolist()
    assert codes == [0x00, 0x3C, 127, 129, 1, 1, 0, 64, 253, 100]


@given(
    num_bits=st.lists(st.integers(0, 16), min_size=1, max_size=20).filter(any),
    seed=st.integers(0, 99),
)
def test_packing_bits(num_bits: list[int], seed: int) -> None:
    draw = np.random.default_rng(seed)
    numbers = np.stack([draw.integers(0, 2**bits, 3) for bits in num_bits], -1)
    packed = pack_bits(torch.from_numpy(numbers), num_bits)
    for row, found in zip(numbers.tolist(), packed.numpy(), strict=True):
        joined, shift = 0, 0
        for number, bits in zip(row, num_bits, strict=True):
            joined |= number << shift
            shift += bits
        assert found.tobytes() == joined.to_bytes(count_packed_bytes(num_bits), "little")
    table = torch.randn(len(num_bits) << 16, 3)
    first = torch.arange(len(num_bits), dtype=torch.int32) << 16
    assert torch.equal(unpack_bits_anywhere(packed, num_bits), torch.from_numpy(numbers).int())
    rows = table[torch.from_numpy(numbers) + first].flatten(-2)
    assert torch.equal(look_up_bits(packed, num_bits, first, table), rows)
    assert torch.equal(unpack_bits(packed, num_bits), torch.from_numpy(numbers).int())


@pytest.mark.parametrize("head_dim", [32, 80])
@pytest.mark.parametrize("num_bits", [1, 2, 3, 4])
def test_turbo_looks_up_what_faiss_does(head_dim: int, num_bits: int) -> None:
    quantizer = faiss.ScalarQuantizer(head_dim, getattr(faiss.ScalarQuantizer, f"QT_{num_bits}bit_tqmse"))
    quantizer.train(np.zeros((2, head_dim), np.float32))
    raw = np.random.default_rng(0).integers(0, 256, (200, quantizer.code_size), dtype=np.uint8)
    one = torch.tensor([0x00, 0x3C], dtype=torch.uint8).expand(200, 2)
    codec = TurboCodec(num_bits, head_dim)
    codes = torch.cat((one, torch.from_numpy(raw)), 1)[:, None, None, None]
    right = torch.from_numpy(quantizer.decode(raw))
    assert torch.allclose(codec.look_up(codes)[:, 0, 0, 0], right, atol=1e-6)
    assert torch.allclose(codec.decode(codes)[:, 0, 0, 0], right @ make_rotation(head_dim), atol=1e-5)


def test_turbo_has_the_error_its_levels_promise() -> None:
    vectors = torch.randn(400, 1, 1, 1, 80, generator=torch.Generator().manual_seed(0)) * 5
    for num_bits, promised in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):  # Max 1960, for normal numbers
        codec = TurboCodec(num_bits, 80)
        assert measure_error(vectors, codec.decode(codec.encode(vectors))) == pytest.approx(promised, rel=0.05)


def test_the_rotation_is_the_same_for_ever() -> None:
    digests = {}
    for head_dim in (32, 80):
        rotation = make_rotation(head_dim)
        assert torch.allclose(rotation @ rotation.T, torch.eye(head_dim), atol=1e-5)
        digests[head_dim] = hashlib.sha256(rotation.numpy().astype("<f4").tobytes()).hexdigest()[:16]
    assert digests == {32: "4fdf53aeb82c740c", 80: "cdc992504fd6d2e6"}


@pytest.mark.filterwarnings("ignore:a codebook")
def test_product_residual_codes_are_those_of_faiss() -> None:
    rows = draw_vectors().flatten(0, 3).numpy()
    quantizer = faiss.ProductResidualQuantizer(8, 2, 3, 4)
    quantizer.train(rows)
    codebooks = faiss.vector_to_array(quantizer.codebooks).reshape(2, 3, 16, 4)
    codec = ProductResidualCodec(name="PRQ2x3x4", stages_PKRE=torch.from_numpy(codebooks))
    codes = quantizer.compute_codes(rows)
    assert np.array_equal(codec.encode(draw_vectors()).flatten(0, 3).numpy(), codes)
    found = codec.decode(torch.from_numpy(codes)[:, None, None, None])[:, 0, 0, 0]
    assert np.allclose(found.numpy(), quantizer.decode(codes), atol=1e-5)


def test_the_papers_codec_decodes_as_the_parts_of_faiss_do() -> None:
    codec = build_codec(train_codec("OPQ2x8-Residual2x4-PQ4x3", draw_vectors(), draw_vectors(1), rounds=3), num_slots=4)
    keys = codec.keys
    assert isinstance(keys, RotatedResidualCodec)
    rotation = faiss.LinearTransform(8, 8, False)
    faiss.copy_array_to_vector(keys.basis_DD.numpy().ravel(), rotation.A)
    rotation.is_trained = True
    rotation.set_is_orthonormal()
    stages = faiss.ResidualQuantizer(8, 2, 4)
    faiss.copy_array_to_vector(keys.stages_KRD.numpy().ravel(), stages.codebooks)
    stages.is_trained = True
    parts: Any = faiss.ProductQuantizer(8, 4, 3)
    faiss.copy_array_to_vector(keys.parts_PRE.numpy().ravel(), parts.centroids)

    vectors = draw_vectors(5)
    rotated = rotation.apply(vectors.flatten(0, 3).numpy())
    coarse = stages.decode(stages.compute_codes(rotated))
    right = rotation.reverse_transform(coarse + parts.decode(parts.compute_codes(rotated - coarse)))
    found = keys.decode(keys.encode(vectors)).flatten(0, 3).numpy()
    assert np.abs(found - right).max() < 1e-4
    assert keys.code_bytes == math.ceil((2 * 4 + 4 * 3) / 8)


@given(seed=st.integers(0, 20), num_levels=st.sampled_from([1, 2, 8, 16]))
def test_levels_are_the_means_of_what_is_nearest_to_them(seed: int, num_levels: int) -> None:
    samples = np.sort(np.random.default_rng(seed).standard_normal(2000))
    levels, error = find_levels(samples, num_levels)
    nearest = np.abs(samples[:, None] - levels).argmin(1)
    squared = (samples - levels[nearest]) ** 2
    assert squared.mean() == pytest.approx(error, rel=0.01)
    evenly = np.quantile(samples, (np.arange(num_levels) + 0.5) / num_levels)
    assert error <= np.square(samples[:, None] - evenly).min(1).mean() + 1e-9


def test_the_map_is_undone_and_makes_errors_costs() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 2, 8, 8, generator=generator)
    metric = root.mT @ root
    vectors, errors = draw_vectors(), torch.randn(2, 2, 8, generator=generator)
    for learns in (True, False):
        found, variances = train_map(vectors, metric, learns=learns)
        assert torch.allclose(found["map"] @ found["inverse"], torch.eye(8).expand(2, 2, 8, 8), atol=1e-3)
        mapped = torch.einsum("nlhsd,lhde->nlhse", vectors - found["mean"][:, :, None], found["map"])
        assert torch.allclose(
            mapped.square().mean((0, 3)), variances.float(), rtol=0.02, atol=0.02 * float(variances.max())
        )
        if learns:
            mapped_errors = torch.einsum("lhd,lhde->lhe", errors, found["map"])
            cost = torch.einsum("lhd,lhde,lhe->lh", errors, metric, errors)
            assert torch.allclose(mapped_errors.square().sum(-1), cost, rtol=0.1)


def test_a_map_makes_a_codec_better() -> None:
    keys, values = draw_vectors(2), draw_vectors(3)
    errors = {}
    for name in ("lloyd3", "mapped-lloyd3", "turbo2", "mapped-turbo2"):
        shape = {"num_layers": 2, "num_kv_heads": 2, "num_slots": 4, "head_dim": 8}
        plain = name == "turbo2"
        codec = load_codec(name, **shape) if plain else build_codec(train_codec(name, keys, values), num_slots=4)
        errors[name] = measure_error(keys, codec.decode(codec.encode(keys, values), torch.float32)[0])
    assert errors["mapped-lloyd3"] < errors["lloyd3"] / 2
    assert errors["mapped-turbo2"] < errors["turbo2"] / 1.5


def test_parts_are_dealt_out_evenly() -> None:
    assert order_parts(8, 2).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


def test_a_file_is_read_as_it_was_written_and_equal_training_gives_equal_bytes(tmp_path: Path) -> None:
    keys, values = draw_vectors(), draw_vectors(1)
    for place in ("a", "b"):
        name = "mapped-lloyd3/PRQ2x2x3"
        train_codec(name, keys, values, rounds=3, seed=5).save(tmp_path / f"{place}.safetensors")
    path = tmp_path / "a.safetensors"
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    trained = load_trained(path)
    assert trained.training == {"references": 40, "vectors": 640, "seed": 5}
    assert read_codec_name(path) == trained.name == f"mapped-lloyd3/PRQ2x2x3@{trained.digest}"

    codec = load_codec(str(path), num_layers=2, num_kv_heads=2, num_slots=4, head_dim=8)
    assert codec.name == trained.name
    direct = build_codec(trained, num_slots=4)
    assert torch.equal(codec.encode(keys, values), direct.encode(keys, values))
    with pytest.raises(InputError, match=r"\(2, 2, 8\), the model has \(3, 2, 8\)"):
        load_codec(str(path), num_layers=3, num_kv_heads=2, num_slots=4, head_dim=8)


def test_damaged_files_and_files_of_others_are_told(tmp_path: Path) -> None:
    path = tmp_path / "codec.safetensors"
    trained = train_codec("mapped-int8", draw_vectors(), draw_vectors(1))
    trained.save(path)
    content = path.read_bytes()
    for damage in (content[:-1], content[: len(content) // 2], b"", b"{}" * 50, content[:-4] + b"\0\0\1\0"):
        path.write_bytes(damage)
        with pytest.raises(BankFormatError, match="damaged|codec"):
            load_trained(path)
    path.write_bytes(safetensors.torch.save(trained.tensors))
    with pytest.raises(BankFormatError, match="not the file of a codec"):
        load_trained(path)
    facts = {"format": 2, "codec": trained.name, "shape": trained.shape, "training": {}}
    path.write_bytes(safetensors.torch.save(trained.tensors, {METADATA: json.dumps(facts)}))
    with pytest.raises(BankFormatError, match="format 1"):
        load_trained(path)
    with pytest.raises(InputError, match="memory3 codec train"):
        load_trained(tmp_path / "missing.safetensors")


def test_tables_that_cannot_be_are_refused() -> None:
    trained = train_codec("lloyd3", draw_vectors(), draw_vectors(1))
    wrong = [
        {**trained.tensors, "keys.bits": torch.full((8,), 8, dtype=torch.uint8)},
        {**trained.tensors, "keys.levels": trained.tensors["keys.levels"] * torch.nan},
        {**trained.tensors, "keys.levels": trained.tensors["keys.levels"] + 1e7},
        {**trained.tensors, "keys.levels": trained.tensors["keys.levels"].double()},
        {**trained.tensors, "keys.more": torch.zeros(1)},
        {"keys.bits": trained.tensors["keys.bits"]},
    ]
    for tensors in wrong:
        with pytest.raises(InputError, match="codec"):
            TrainedCodec(keys="lloyd3", values="lloyd3", shape=(2, 2, 8), tensors=tensors)


def test_what_cannot_be_trained_or_loaded_is_refused() -> None:
    few = draw_vectors()[:1]
    for name, match in (
        ("turbo3", "not to be trained"),
        ("mapped-lloyd3@" + "0" * 32, "not to be trained"),
        ("PRQ2x2x8", "codebook of 256 rows cannot be trained on 16"),
        ("OPQ2x8-Residual2x8-PQ4x3", "codebook of 256 rows cannot be trained on 16"),
        ("PRQ3x2x3", "does not divide 8"),
    ):
        with pytest.raises(InputError, match=match):
            train_codec(name, few, few)
    with pytest.raises(InputError, match="memory3 codec train"):
        load_codec("mapped-lloyd3", num_layers=2, num_kv_heads=2, num_slots=4, head_dim=8)
    with pytest.warns(UserWarning, match="624 make a better one"):
        train_codec("PRQ2x1x4", draw_vectors()[:20], draw_vectors()[:20], rounds=2)


def test_memories_with_empty_slots_are_not_learnt_from() -> None:
    keys, values = draw_vectors(), draw_vectors(1)
    emptied = torch.cat((keys, torch.zeros(7, *SHAPE[1:])))
    right = train_codec("mapped-lloyd3", keys, values)
    assert train_codec("mapped-lloyd3", emptied, torch.cat((values, values[:7]))).digest == right.digest


@pytest.mark.parametrize(
    ("codec", "shape"),
    [
        ("PRQ0x1x8", "[1, 1, 8]"),
        ("PRQ2x7x8", "[1, 1, 8]"),
        ("PRQ2x1x8", "[1, 1, 7]"),
        ("lloyd4", "[1, 1, Infinity]"),
        ("lloyd4", "[1, 1, 0]"),
        ("lloyd4", '["9", 1, 8]'),
        ("lloyd4", "[true, 1, 8]"),
        ("lloyd4", "8"),
        ("lloyd4", "[" * 100_000 + "]" * 100_000),
        ("mapped-int8", "[1, 1, 4000000000]"),
    ],
)
def test_files_that_lie_about_their_codec_are_refused(tmp_path: Path, codec: str, shape: str) -> None:
    facts = f'{{"format": 1, "codec": "{codec}@{"0" * 32}", "shape": {shape}, "training": {{}}}}'
    path = tmp_path / "codec.safetensors"
    path.write_bytes(safetensors.torch.save({"x": torch.zeros(1)}, {METADATA: facts}))
    with pytest.raises(BankFormatError, match="damaged"):
        load_trained(path)
