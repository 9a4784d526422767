"""What the path from text to memories costs on this machine: ``make bench``.

Every row compares two ways of doing the same work, timed in turn in one process, best of several rounds; ratios carry
over to other machines, the rates beside them do not.

    python -m benchmarks.bench_slice [--model memory3-tiny] [--references 256]
"""

import argparse
import os
import time
from collections.abc import Callable
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from flows.bench_encoding import make_bare_forward
from model.generating import GenerationConfig, Generator
from model.loading import load_writer
from model.locating import find_checkpoint
from model.reading import ReadingSession
from model.writing import ReferenceWriter, pad_references
from pipelines.chunking import ChunkingConfig, chunk_documents
from pipelines.clustering import DeduplicationConfig, find_duplicates

ROUNDS = 3


def time_best(*works: Callable[[], object]) -> list[float]:
    """Returns the best seconds of each work, run in turn so that a busy moment hits all alike."""
    best = [float("inf")] * len(works)
    for _ in range(ROUNDS):
        for place, work in enumerate(works):
            started = time.perf_counter()
            work()
            best[place] = min(best[place], time.perf_counter() - started)
    return best


def make_decoding(writer: ReferenceWriter, tokens: list[np.ndarray], *, with_memory: bool) -> Callable[[], None]:
    """Returns 64 steps of decoding one token, reading five memories or none; retrieval is not part of it."""
    from model.writing import encode_references

    padded, valid = pad_references(tokens[:5], writer.checkpoint.device)
    with torch.inference_mode():
        memories = encode_references(writer.checkpoint, padded, valid, writer.selection)
    index = torch.arange(5).view(1, 1, 5) if with_memory else None

    def decode() -> None:
        session = ReadingSession(writer.checkpoint)
        token = torch.tensor([[3]])
        for _ in range(64):
            logits, _ = session.read(token, memories if with_memory else None, index)
            token = logits[:, -1].argmax(-1, keepdim=True)

    return decode


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="memory3-tiny", help="memory3-tiny or the folder of a checkpoint")
    parser.add_argument("--references", type=int, default=256, help="references to write")
    arguments = parser.parse_args()

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # documents are chunked by one thread too
    writer = load_writer(arguments.model)
    tokenizer = writer.checkpoint.tokenizer
    names = sorted(topics)
    texts = [topics[name] for name in names]
    size_mb = sum(len(text.encode()) for text in texts) / 1e6
    library = Tokenizer.from_file(str(find_checkpoint(arguments.model) / "tokenizer.json"))
    doc_ids, documents = pa.array(names), pa.array(texts)
    chunks = chunk_documents(doc_ids, documents, None, tokenizer, ChunkingConfig())
    tokens = [np.asarray(ids, dtype=np.int32) for ids in chunks["token_ids"].to_pylist()[: arguments.references]]
    references = chunks.group_by("ref_id", use_threads=False).aggregate([("text", "first"), ("num_tokens", "first")])
    ref_ids, chunk_texts = (references[name].combine_chunks() for name in ("ref_id", "text_first"))
    preferences = -references["num_tokens_first"].to_numpy().astype(np.int64)

    write, forward = time_best(lambda: writer.write(tokens), make_bare_forward(writer, tokens))
    reading, plain = time_best(
        make_decoding(writer, tokens, with_memory=True), make_decoding(writer, tokens, with_memory=False)
    )
    chunk, encode = time_best(
        lambda: chunk_documents(doc_ids, documents, None, tokenizer, ChunkingConfig()),
        lambda: library.encode_batch(texts, add_special_tokens=False),
    )
    (deduplicate,) = time_best(lambda: find_duplicates(ref_ids, chunk_texts, preferences, DeduplicationConfig()))
    prompt = tokenizer.decode(np.concatenate(tokens[:4])[:120])
    generator = Generator(writer.checkpoint)
    (generate,) = time_best(lambda: list(generator.generate(prompt, GenerationConfig(max_new_tokens=64))))

    table = Table(box=box.SIMPLE_HEAD, title=f"{arguments.model}, {torch.get_num_threads()} threads")
    for name, justify in (("what", "left"), ("rate", "right"), ("against", "left"), ("ratio of speeds", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_row(
        "write memories", f"{len(tokens) / write:,.0f} references/s", "bare forward of the same layers and batches",
        f"{forward / write:.2f}",
    )  # fmt: skip
    table.add_row("decode with 5 memories", f"{64 / reading:,.0f} tokens/s", "without memory", f"{plain / reading:.2f}")
    table.add_row(
        "chunk documents", f"{size_mb / chunk:.2f} MB/s", "Hugging Face tokenizer alone", f"{encode / chunk:.2f}"
    )
    table.add_row("remove near-duplicates", f"{size_mb / deduplicate:.1f} MB/s", "", "")
    table.add_row("generate, no memory", f"{64 / generate:,.0f} tokens/s", "", "")
    Console().print(table)


if __name__ == "__main__":
    main()
