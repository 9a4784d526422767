"""Codecs on the key-values of real text: ``python -m benchmarks.bench_codecs``.

Documents are split in two. On references of the first part codecs are trained; references of the second are coded,
decoded and read by contexts of the second part, each chunk with the five references that lie nearest to it. SNR is the
power of vectors over that of their errors. Speeds are CPU time of one thread. How long five memories of the paper's
model take to be decoded is measured by ``memory3 bench storage``.

    python -m benchmarks.bench_codecs [--corpus FILE.jsonl[.zst]] [--references 10000] [--rounds 10] [--codecs a,b]
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.bench_index import iterate_texts
from model.codec_error import Readings, collect_readings, measure_attention_error, measure_key_metric
from model.codec_files import TrainedCodec
from model.codec_training import train_codec
from model.coding import KeyValueCodec, build_codec
from model.embedding import load_embedder
from model.loading import load_writer
from model.reading import CHUNK_TOKENS, MEMORIES_PER_CHUNK
from model.writing import Memories, ReferenceWriter
from schemas.codec_names import is_trained, parse_codec
from schemas.protocols import IntArray

PAPER = "OPQ8x32-Residual2x14-PQ8x10"

CODECS = (
    "none,int8,mapped-int8,turbo4,turbo3,turbo2,mapped-turbo4,mapped-turbo3,PRQ2x7x8,mapped-PRQ2x7x8,lloyd14,"
    f"mapped-lloyd10,mapped-lloyd14,mapped-lloyd18,mapped-lloyd24,{PAPER}"
)

PASSAGE_CHUNKS = 8

MIN_TOKENS = 32


class CodecBench:
    """References and contexts of real text, and what codecs do to them."""

    def __init__(self, texts: list[str], num_references: int, seed: int, rounds: int) -> None:
        """Encodes references of nine tenths of the documents to train on, and of the others to measure on."""
        self._draw = np.random.default_rng(seed)
        self._writer: ReferenceWriter = load_writer(dtype="float32")
        self._embedder = load_embedder()
        self._seed, self._rounds = seed, rounds
        order = self._draw.permutation(len(texts))
        num_test = len(texts) // 10
        held_out, others = ([texts[place] for place in part] for part in (order[:num_test], order[num_test:]))
        self.test = self._read(held_out, 1500, 40)
        self._metric = measure_key_metric(self._writer.checkpoint, self._read(others, 1500, 64))
        self._train = self._encode(self._cut(others)[:num_references])

    def _cut(self, texts: list[str]) -> list[IntArray]:
        references = []
        longest = self._writer.checkpoint.max_reference_tokens
        for tokens in self._writer.checkpoint.tokenizer.encode(texts):
            starts = range(0, len(tokens) - MIN_TOKENS, longest)
            references += [np.asarray(tokens[start : start + longest], dtype=np.int32) for start in starts]
        return [references[place] for place in self._draw.permutation(len(references))]

    def _encode(self, references: list[IntArray]) -> Memories:
        written = self._writer.write(references)
        keys, values = self._writer.codec.decode(torch.from_numpy(written.payload), torch.float32)
        offsets = torch.from_numpy(written.offsets.astype(np.int64))
        return Memories(
            keys_LBHSD=keys.transpose(0, 1), values_LBHSD=values.transpose(0, 1), offsets_LBHS=offsets.transpose(0, 1)
        )

    def _read(self, texts: list[str], num_references: int, num_passages: int) -> Readings:
        checkpoint = self._writer.checkpoint
        references = self._cut(texts)[:num_references]
        vectors = self._embedder.embed([checkpoint.tokenizer.decode(tokens) for tokens in references])
        bos = np.array(checkpoint.bos_token_ids, dtype=np.int64)
        room = PASSAGE_CHUNKS * CHUNK_TOKENS - len(bos)
        long = [tokens for tokens in checkpoint.tokenizer.encode(texts) if len(tokens) >= room]
        passages, indexes = [], []
        for place in self._draw.permutation(len(long))[:num_passages]:
            start = int(self._draw.integers(0, len(long[place]) - room + 1))
            passage = np.concatenate((bos, long[place][start : start + room]))
            chunks = [checkpoint.tokenizer.decode(chunk) for chunk in np.split(passage, PASSAGE_CHUNKS)]
            nearest = np.argsort(-(self._embedder.embed(chunks) @ vectors.T), axis=1)[:, :MEMORIES_PER_CHUNK]
            passages.append(passage)
            indexes.append(torch.from_numpy(nearest.copy()))
        return collect_readings(checkpoint, passages, self._encode(references), indexes)

    def make_codec(self, name: str) -> tuple[KeyValueCodec, float]:
        """Returns a codec and the CPU seconds its training took."""
        keys_NLHSD = self._train.keys_LBHSD.transpose(0, 1)
        shape = (keys_NLHSD.shape[1], keys_NLHSD.shape[2], keys_NLHSD.shape[4])
        parsed = parse_codec(name)
        start = time.process_time()
        if is_trained(parsed.keys) or is_trained(parsed.values):
            values_NLHSD = self._train.values_LBHSD.transpose(0, 1)
            trained = train_codec(
                name, keys_NLHSD, values_NLHSD, key_metric_LHDD=self._metric, seed=self._seed, rounds=self._rounds
            )
        else:
            trained = TrainedCodec(keys=parsed.keys, values=parsed.values, shape=shape, tensors={})
        return build_codec(trained, num_slots=keys_NLHSD.shape[3]), time.process_time() - start

    def measure(self, name: str) -> list[str]:
        """Returns the row of a codec."""
        codec, train_seconds = self.make_codec(name)
        memories = self.test.memories
        right = memories.keys_LBHSD.transpose(0, 1), memories.values_LBHSD.transpose(0, 1)
        num_vectors = 2 * right[0][..., 0].numel()
        start = time.process_time()
        payload = codec.encode(*right)
        middle = time.process_time()
        found = codec.decode(payload, torch.float32)
        end = time.process_time()
        error = measure_attention_error(self._writer.checkpoint, self.test, *found)
        ratios = [
            10 * torch.log10(a.square().sum() / (a - b).square().sum()) for a, b in zip(right, found, strict=True)
        ]
        return [
            name,
            f"{codec.keys.code_bytes}/{codec.values.code_bytes}",
            *(f"{float(ratio):.1f}" for ratio in ratios),
            f"{100 * error:.2f} %",
            f"{num_vectors / (middle - start):,.0f}",
            f"{num_vectors / (end - middle):,.0f}",
            f"{train_seconds:.0f}",
        ]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--references", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codecs", default=CODECS)
    options = parser.parse_args()
    console = Console(width=140)
    warnings.simplefilter("ignore", UserWarning)
    torch.set_num_threads(1)
    bench = CodecBench(list(iterate_texts(options.corpus)), options.references, options.seed, options.rounds)
    heads = ("codec", "bytes", "keys dB", "values dB", "error of attention", "coded/s", "decoded/s", "training s")
    table = Table(*heads, title="memory3-tiny", box=box.SIMPLE)
    for name in options.codecs.split(","):
        table.add_row(*bench.measure(name))
    console.print(table)


if __name__ == "__main__":
    main()
