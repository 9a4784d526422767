"""Training of codecs on the key-values of real references.

FAISS learns the codebooks of additive codecs; levels and maps are learnt here. Equal vectors, seed and number of
threads give equal parameters.

Shape letters: as in :mod:`model.coding`; E the numbers of a mapped vector, P parts, K stages, R rows of a codebook.
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch

from model.additive_codecs import MOST_BYTES, encode_stages, sum_rows
from model.codec_files import Parameters, TrainedCodec
from model.lloyd_codec import train_lloyd
from model.mapped_codec import apply_map, train_map
from schemas.codec_names import VectorCodecName, count_code_bytes, is_trained, parse_codec, parse_vector_codec
from schemas.errors import InputError
from schemas.protocols import FloatArray

LEARNING_FAMILIES = ("lloyd", "PRQ", "OPQ")

POINTS_PER_ROW = 39
"""Vectors that FAISS wants for each row of a codebook; with fewer there is a warning, with less than one an error."""

ROUNDS = 25
"""Rounds of k-means for a codebook."""

Report = Callable[[str], None]


def train_codec(
    name: str,
    keys_NLHSD: torch.Tensor,
    values_NLHSD: torch.Tensor,
    *,
    key_metric_LHDD: torch.Tensor | None = None,
    seed: int = 0,
    rounds: int = ROUNDS,
    report: Report | None = None,
) -> TrainedCodec:
    """Trains a codec of keys and values.

    Args:
        name: a codec without digest, keys and values being of the same or of two kinds, such as
            ``mapped-lloyd14/mapped-lloyd12``; at least one of them is trained.
        keys_NLHSD: keys before RoPE, of full references: memories with an empty slot are left out.
        values_NLHSD: their values.
        key_metric_LHDD: what errors of keys cost, from :func:`model.codec_error.measure_key_metric`; codecs without a
            map make no use of it. None for the plain squared error.
        seed: seed of what is drawn.
        rounds: rounds of k-means for a codebook.
        report: is called with a line on what begins.

    Raises:
        InputError: the name is none of a trained codec, shapes do not fit, or there are too few vectors.
    """
    parsed = parse_codec(name)
    if parsed.digest or not (is_trained(parsed.keys) or is_trained(parsed.values)):
        raise InputError(f"the codec {name!r} is not to be trained; name one that is, without digest, or use it as is")
    if keys_NLHSD.shape != values_NLHSD.shape or keys_NLHSD.ndim != 5:
        raise InputError(
            f"keys have the shape {tuple(keys_NLHSD.shape)}, values {tuple(values_NLHSD.shape)}; "
            "both must be (references, layers, heads, slots, head dim)"
        )
    full_N = (keys_NLHSD != 0).any(-1).flatten(1).all(1) & (values_NLHSD != 0).any(-1).flatten(1).all(1)
    num_used = int(full_N.sum())
    _, num_layers, num_heads, num_slots, head_dim = keys_NLHSD.shape
    tensors: Parameters = {}
    for kind, part, vectors, metric in (
        ("keys", parsed.keys, keys_NLHSD, key_metric_LHDD),
        ("values", parsed.values, values_NLHSD, None),
    ):
        count_code_bytes(part, head_dim, 4)
        if is_trained(part):
            if report is not None:
                report(f"training {part} for {kind} on {num_used * num_layers * num_heads * num_slots:,} vectors")
            found = _train_part(part, vectors[full_N].float().cpu(), metric, seed=seed, rounds=rounds)
            tensors |= {f"{kind}.{label}": tensor for label, tensor in found.items()}
    return TrainedCodec(
        keys=parsed.keys,
        values=parsed.values,
        shape=(num_layers, num_heads, head_dim),
        tensors=tensors,
        training={"references": num_used, "vectors": num_used * num_layers * num_heads * num_slots, "seed": seed},
    )


def _train_part(
    name: str, vectors_NLHSD: torch.Tensor, metric_LHDD: torch.Tensor | None, *, seed: int, rounds: int
) -> Parameters:
    parsed = parse_vector_codec(name)
    head_dim = vectors_NLHSD.shape[-1]
    num_vectors = vectors_NLHSD[..., 0].numel()
    if num_vectors < 2 * head_dim:
        raise InputError(f"the codec {name!r} cannot be trained on {num_vectors} vectors; give it more references")
    if not parsed.mapped:
        return _train_inner(parsed, vectors_NLHSD.flatten(0, -2), torch.ones(head_dim), seed=seed, rounds=rounds)
    learns = parsed.family in LEARNING_FAMILIES
    found, variances_LHE = train_map(vectors_NLHSD, metric_LHDD, learns=learns)
    if parsed.family == "PRQ":
        order = order_parts(head_dim, parsed.numbers[0])
        found["map"], found["inverse"] = found["map"][..., order], found["inverse"][..., order, :]
        variances_LHE = variances_LHE[..., order]
    spread_LHE = variances_LHE.clamp(min=1e-20).sqrt()
    if parsed.family != "lloyd":
        spread_LHE = spread_LHE.square().mean(-1, keepdim=True).sqrt().expand_as(spread_LHE)
    found["map"] = (found["map"] / spread_LHE[..., None, :]).float().contiguous()
    found["inverse"] = (found["inverse"] * spread_LHE[..., None]).float().contiguous()
    if learns:
        mapped = apply_map(vectors_NLHSD, found["mean"], found["map"]).flatten(0, -2)
        weights = variances_LHE.mean((0, 1))
        found |= _train_inner(parsed, mapped, weights, seed=seed, rounds=rounds)
    return found


def order_parts(head_dim: int, num_parts: int) -> torch.Tensor:
    """Returns the order in which descending numbers make parts that are about equal: dealt out to and fro."""
    rows = torch.arange(head_dim).view(-1, num_parts)
    rows[1::2] = rows[1::2].flip(1)
    return rows.T.flatten()


def _train_inner(
    parsed: VectorCodecName, vectors: torch.Tensor, weights: torch.Tensor, *, seed: int, rounds: int
) -> Parameters:
    if parsed.family == "lloyd":
        return train_lloyd(vectors, weights, parsed.numbers[0])
    rows = np.ascontiguousarray(vectors.numpy())
    if parsed.family == "PRQ":
        splits, stages, bits = parsed.numbers
        _check_count(len(rows), 2**bits)
        parts = np.split(rows, splits, axis=1)
        trained = [_train_stages(np.ascontiguousarray(part), stages, bits, seed, rounds)[0] for part in parts]
        return {"stages": torch.from_numpy(np.stack(trained))}
    return _train_rotated(rows, parsed.numbers, seed, rounds)


def _check_count(num_vectors: int, num_rows: int) -> None:
    """Makes sure that there are vectors enough for a codebook.

    Raises:
        InputError: there are fewer than rows.
    """
    if num_vectors < num_rows:
        raise InputError(
            f"a codebook of {num_rows} rows cannot be trained on {num_vectors} vectors; give it more references"
        )
    if num_vectors < POINTS_PER_ROW * num_rows:
        warnings.warn(
            f"a codebook of {num_rows} rows is trained on {num_vectors} vectors; "
            f"{POINTS_PER_ROW * num_rows} make a better one",
            stacklevel=2,
        )


def _train_stages(
    rows: FloatArray, num_stages: int, num_bits: int, seed: int, rounds: int
) -> tuple[FloatArray, FloatArray]:
    """Returns codebooks (K, R, E), and what they leave of the rows."""
    import faiss

    quantizer = faiss.ResidualQuantizer(rows.shape[1], num_stages, num_bits)
    quantizer.cp.niter = rounds
    quantizer.cp.seed = seed + 1234
    quantizer.cp.min_points_per_centroid = 1
    quantizer.train_type = faiss.ResidualQuantizer.Train_default
    quantizer.max_mem_distances = MOST_BYTES
    quantizer.train(rows)
    codebooks = faiss.vector_to_array(quantizer.codebooks).reshape(num_stages, 2**num_bits, rows.shape[1])
    stages_KRE = torch.from_numpy(codebooks)
    return codebooks, rows - sum_rows(stages_KRE, encode_stages(stages_KRE, rows).int()).numpy()


def _train_rotated(rows: FloatArray, numbers: tuple[int, ...], seed: int, rounds: int) -> Parameters:
    import faiss

    rotated_splits, head_dim, stages, stage_bits, splits, bits = numbers
    _check_count(len(rows), 2 ** max(stage_bits, bits))
    rotation = faiss.OPQMatrix(head_dim, rotated_splits)
    inner = faiss.ProductQuantizer(head_dim, rotated_splits, 8)
    inner.cp.min_points_per_centroid = 1
    rotation.pq = inner
    rotation.train(rows)
    basis = faiss.vector_to_array(rotation.A).reshape(head_dim, head_dim)
    codebooks, left = _train_stages(rows @ basis.T, stages, stage_bits, seed, rounds)
    quantizer = faiss.ProductQuantizer(head_dim, splits, bits)
    quantizer.cp.niter = rounds
    quantizer.cp.seed = seed + 1234
    quantizer.cp.min_points_per_centroid = 1
    quantizer.train(np.ascontiguousarray(left))
    parts = faiss.vector_to_array(quantizer.centroids).reshape(splits, 2**bits, head_dim // splits)
    return {
        "basis": torch.from_numpy(basis.copy()),
        "stages": torch.from_numpy(codebooks.copy()),
        "parts": torch.from_numpy(parts.copy()),
    }
