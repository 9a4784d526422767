"""``memory3 bench storage``: what it takes to have the five memories of a chunk, from the drive to decoded tensors.

A payload shard of the real layout is written to a folder, read record by record as a bank's is (one read each,
checksums included) and decoded by each codec. Warm reads find the pages in RAM; cold ones come from the drive, since
the system is asked to forget the shard before each.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from flows.benching import BenchReport, BenchRow, describe_machine, synchronize
from model.codec_files import TrainedCodec, list_shapes
from model.coding import KeyValueCodec, build_codec
from model.planning import NUM_READ_MEMORIES, ModelShape
from schemas.codec_names import count_code_bytes, parse_codec
from schemas.identifiers import hash_bytes
from schemas.records import RecordLayout
from schemas.shards import ShardReader, write_shard

NUM_RECORDS = 256
"""Memories in the shard: enough that five of them at random are never neighbours."""


def make_random_codec(name: str, shape: ModelShape, dtype: str, device: torch.device | str = "cpu") -> KeyValueCodec:
    """Returns a codec for memories of a shape, with random tables: what decoding costs does not depend on them.

    Raises:
        InputError: no such codec, or not for vectors of this size.
    """
    parsed = parse_codec(name)
    for part in (parsed.keys, parsed.values):
        count_code_bytes(part, shape.head_dim, 4)
    size = (shape.num_memory_layers, shape.num_kv_heads, shape.head_dim)
    random = torch.Generator().manual_seed(0)
    tables = {
        f"{kind}.{label}": _make_table(label, table, part, random)
        for kind, part in (("keys", parsed.keys), ("values", parsed.values))
        for label, table in list_shapes(part, size).items()
    }
    trained = TrainedCodec(keys=parsed.keys, values=parsed.values, shape=size, tensors=tables)
    return build_codec(trained, num_slots=shape.kept_tokens, dtype=dtype, device=device)


def _make_table(label: str, size: tuple[int, ...], codec: str, random: torch.Generator) -> torch.Tensor:
    if label != "bits":
        return torch.randn(size, generator=random)
    total = 8 * count_code_bytes(codec, size[0], 4)
    return torch.tensor([(place + 1) * total // size[0] - place * total // size[0] for place in range(size[0])]).byte()


def _make_layout(codec: KeyValueCodec, shape: ModelShape, dtype: str) -> RecordLayout:
    return RecordLayout(
        num_layers=shape.num_memory_layers,
        num_kv_heads=shape.num_kv_heads,
        num_slots=shape.kept_tokens,
        head_dim=shape.head_dim,
        dtype=dtype,
        codec=codec.name,
    )


def _write_records(path: Path, layout: RecordLayout) -> None:
    ids = [hash_bytes(str(row).encode()) for row in range(NUM_RECORDS)]
    # Small bytes, so that whatever they stand for is a number.
    payloads = np.random.default_rng(1).integers(0, 60, (NUM_RECORDS, layout.payload_bytes), dtype=np.uint8)
    offsets = np.tile(np.arange(layout.num_slots, dtype=np.uint8), (NUM_RECORDS, *layout.offsets_shape[:2], 1))
    write_shard(path, layout.pack(payloads, offsets, ids), layout, "0" * 32)


def _time_reads(
    path: Path,
    layout: RecordLayout,
    codec: KeyValueCodec,
    num_reads: int,
    *,
    cold: bool,
    device: torch.device | str = "cpu",
) -> tuple[list[float], list[float]]:
    """Returns milliseconds of each reading, drive to records and records to tensors."""
    rows = np.random.default_rng(0)
    reading, decoding = [], []
    with ShardReader(path) as shard, path.open("rb") as file:
        for _ in range(num_reads):
            chosen = rows.choice(NUM_RECORDS, NUM_READ_MEMORIES, replace=False).tolist()
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            records = shard.read(chosen)
            layout.check_records(records)
            between = time.perf_counter()
            codec.decode(torch.from_numpy(records)[:, : layout.payload_bytes].to(device), torch.float32)
            synchronize()
            reading.append(1000 * (between - started))
            decoding.append(1000 * (time.perf_counter() - between))
    return reading, decoding


def measure_reading(
    layout: RecordLayout, codec: KeyValueCodec, device: torch.device | str = "cpu", num_reads: int = 50
) -> float:
    """Returns the seconds, p50, in which five memories of a layout come from the drive of temporary files, decoded."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "shard.safetensors"
        _write_records(path, layout)
        reading, decoding = _time_reads(path, layout, codec, num_reads, cold=True, device=device)
    return float(np.median(np.add(reading, decoding))) / 1000


def bench_storage(
    shape: ModelShape,
    codecs: Sequence[str],
    *,
    title: str,
    dtype: str = "bfloat16",
    folder: Path | None = None,
    num_reads: int = 100,
) -> BenchReport:
    """Measures reading and decoding five memories, codec by codec.

    Args:
        shape: whose memories.
        codecs: names of codecs.
        title: what the shape is of, for the report.
        dtype: the type of vectors stored as they are.
        folder: where the shard is written, to choose the drive; a temporary folder by default.
        num_reads: readings of five memories, warm and cold each.

    Raises:
        InputError: no such codec, or not for vectors of this size.
    """
    rows = []
    raw_bytes = None
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for name in codecs:
            codec, path = make_random_codec(name, shape, dtype), Path(place) / "shard.safetensors"
            layout = _make_layout(codec, shape, dtype)
            _write_records(path, layout)
            raw_bytes = raw_bytes or layout.payload_bytes
            _time_reads(path, layout, codec, 5, cold=False)
            other = 100 * (layout.stride_bytes / layout.payload_bytes - 1)
            rows.append(
                BenchRow(
                    name=f"{name}: one memory",
                    value=layout.payload_bytes,
                    unit="B",
                    note=f"{raw_bytes / layout.payload_bytes:.1f}x less, + {other:.1f} % for offsets, id, checksum",
                )
            )
            for kind in ("warm", "cold"):
                reading, decoding = _time_reads(path, layout, codec, num_reads, cold=kind == "cold")
                both = np.add(reading, decoding)
                rows.append(
                    BenchRow(
                        name=f"{name}: five memories, {kind}, p50",
                        value=float(np.median(both)),
                        unit="ms",
                        note=f"p99 {np.percentile(both, 99):.2f}; reading {np.median(reading):.2f}, "
                        f"decoding {np.median(decoding):.2f}",
                    )
                )
            path.unlink()
    return BenchReport(title=f"storage: {title}", machine=describe_machine(), rows=rows)
