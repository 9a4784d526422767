"""``memory3 bench codec``: what codecs take and what they cost, on memories of a bank.

References of the bank are encoded again, exactly. Each codec stores them and returns them, and the difference is
measured where it matters: in what is read from them by texts that lie near.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from flows.benching import BenchReport, BenchRow, describe_machine, synchronize
from flows.codec_training import compute_snr_db, encode_sample, read_neighbours, sample_references
from flows.generation import open_writer
from model.codec_error import measure_attention_error
from model.codec_files import load_trained
from model.coding import TRAINED_SUFFIX, load_codec
from model.fetching import check_fingerprint
from model.writing import ReferenceWriter
from schemas.bank import Bank
from schemas.errors import InputError

UNTRAINED = ("none", "int8", "turbo4", "turbo3", "turbo2")


def _check_unseen(codec: str, seed: int) -> None:
    """Makes sure that a trained codec has not seen what it is measured on.

    Raises:
        InputError: it was trained with another seed, and so perhaps on these references.
    """
    if codec.endswith(TRAINED_SUFFIX):
        trained_with = load_trained(Path(codec)).training.get("seed")
        if trained_with != seed:
            raise InputError(f"{codec} was trained with seed {trained_with}, which set other references aside; give it")


def bench_codecs(
    bank: Bank, model: str, codecs: Sequence[str], *, num_references: int, num_rounds: int = 3, seed: int = 0
) -> BenchReport:
    """Measures codecs on references of a bank.

    Args:
        bank: where the references are from.
        model: the model that wrote the bank.
        codecs: names of codecs that need no training, and files of trained ones.
        num_references: references at most; those that ``memory3 codec train`` sets aside with the same seed come first.
        num_rounds: rounds of coding and decoding, of which the best counts.
        seed: seed of the sample.

    Raises:
        InputError: no such codec, one that may have seen these references, or too few of them.
        WrongModelError: the bank was written by another model.
    """
    stored = open_writer(bank, model)
    check_fingerprint(bank.url, bank.manifest.fingerprint, stored)
    checkpoint, layout = stored.checkpoint, bank.manifest.layout
    writer = ReferenceWriter(checkpoint, stored.selection, dtype="float32")
    _, held_out = sample_references(bank, 0, seed, num_held_out=num_references)
    sample = encode_sample(bank, writer, held_out, "encode")
    readings = read_neighbours(checkpoint, sample)
    keys_NLHSD, values_NLHSD = (
        vectors.transpose(0, 1) for vectors in (sample.memories.keys_LBHSD, sample.memories.values_LBHSD)
    )
    num_vectors = 2 * keys_NLHSD[..., 0].numel()
    rows = []
    for name in codecs:
        _check_unseen(name, seed)
        codec = load_codec(
            name,
            num_layers=layout.num_layers,
            num_kv_heads=layout.num_kv_heads,
            num_slots=layout.num_slots,
            head_dim=layout.head_dim,
            dtype=layout.dtype,
            device=checkpoint.device,
        )
        encoding = decoding = float("inf")
        for _ in range(num_rounds):
            started = time.perf_counter()
            payload = codec.encode(keys_NLHSD, values_NLHSD)
            synchronize()
            between = time.perf_counter()
            found = codec.decode(payload, torch.float32)
            synchronize()
            encoding = min(encoding, between - started)
            decoding = min(decoding, time.perf_counter() - between)
        error = measure_attention_error(checkpoint, readings, *found)
        snr = [compute_snr_db(right, left) for right, left in zip((keys_NLHSD, values_NLHSD), found, strict=True)]
        rows.append(
            BenchRow(
                name=f"{codec.name.partition('@')[0]}: error of what is read",
                value=100 * error,
                unit="%",
                note=f"{codec.keys.code_bytes} + {codec.values.code_bytes} bytes a vector of keys and values, "
                f"{snr[0]:.1f} and {snr[1]:.1f} dB; {num_vectors / encoding / 1e3:,.0f} k/s coded, "
                f"{num_vectors / decoding / 1e3:,.0f} k/s decoded",
            )
        )
    title = f"codecs: {Path(model).name}, {len(held_out)} references of {bank.url}"
    return BenchReport(title=title, machine=describe_machine(str(checkpoint.device)), rows=rows)
