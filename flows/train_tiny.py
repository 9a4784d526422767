"""Trains the checkpoint that comes with this project, from text to files: the recipe, step by step.

    python -m flows.train_tiny tokenizer --data ../shared/data --work runs/tiny
    python -m flows.train_tiny warmup    --work runs/tiny --steps 2400
    python -m flows.train_tiny continual --work runs/tiny --steps 500
    python -m flows.train_tiny ship      --work runs/tiny

Two stages as in the paper (section 7 of its method): ordinary language modelling first, then sequences whose 64-token
chunks read memories of other documents. One document in twenty is held out of everything, chosen by a hash of its id.
"""

import hashlib
import io
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import typer

from pipelines.python_docs import iterate_python_docs

app = typer.Typer(add_completion=False, help="Train the shipped checkpoint.")

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text falls into pre-tokens: the pattern of Llama 3, which keeps runs of blanks together and digits in threes."""

SHARES = {"peps-2025-08": 1.0, "rfcs": 1.0, "psdocs": 0.35, "laws": 0.06}
"""The part of each corpus of ``--data`` that is used; the Python documentation of the machine is used whole."""


def is_held_out(doc_id: str) -> bool:
    """Tells whether a document belongs to the twentieth that no stage of the training sees."""
    return hashlib.blake2b(doc_id.encode(), digest_size=8).digest()[0] % 20 == 0


def _hash_share(doc_id: str) -> float:
    return int.from_bytes(hashlib.blake2b(b"share:" + doc_id.encode(), digest_size=4).digest(), "big") / 2**32


def iterate_training_documents(data: Path) -> Iterator[dict[str, str]]:
    """Yields the documents of the recipe that are not held out."""
    for document in iterate_python_docs():
        if not is_held_out(document["id"]):
            yield document
    import zstandard

    for name, share in SHARES.items():
        with zstandard.open(data / f"{name}.jsonl.zst", "rb") as lines:
            for line in io.BufferedReader(lines):
                document = orjson.loads(line)
                if _hash_share(document["id"]) < share and not is_held_out(document["id"]):
                    yield document


@app.command()
def tokenizer(
    data: Annotated[Path, typer.Option(help="Folder with the corpora named in SHARES.")],
    work: Annotated[Path, typer.Option(help="Folder for everything the recipe makes.")],
) -> None:
    """Train the tokenizer (byte-level BPE) and write the token stream."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from model.presets import memory3_tiny

    work.mkdir(parents=True, exist_ok=True)
    documents = list(iterate_training_documents(data))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=memory3_tiny().vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=32,
    )
    bpe.train_from_iterator((document["text"] for document in documents), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(work / "tokenizer")

    parts = []
    for document in documents:
        ids = bpe.encode(document["text"], add_special_tokens=False).ids
        parts.append(np.asarray([fast.bos_token_id, *ids, fast.eos_token_id], dtype=np.uint16))
    stream = np.concatenate(parts)
    np.save(work / "stream.npy", stream)
    np.save(work / "document_starts.npy", np.cumsum([0] + [len(part) for part in parts]))
    size_bytes = sum(len(document["text"].encode()) for document in documents)
    typer.echo(f"{len(documents)} documents, {size_bytes} bytes, {len(stream)} tokens")


def _iterate_log(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as log:
        log.write(json.dumps(row) + "\n")


@app.command()
def warmup(
    work: Annotated[Path, typer.Option(help="Folder with the token stream.")],
    steps: Annotated[int, typer.Option(help="Number of steps of 2048 tokens.")] = 3200,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the data order.")] = 0,
) -> None:
    """Stage one: ordinary language modelling, no memory."""
    import torch
    from transformers import LlamaForCausalLM

    from model.presets import memory3_tiny
    from model.training.objective import backward_loss
    from model.training.schedule import warmup_stable_decay
    from model.training.sequences import sample_sequences

    torch.manual_seed(seed)
    config = memory3_tiny()
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    model = LlamaForCausalLM(config)
    model.train()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1.5e-3,
        betas=(0.9, 0.98),
        fused=True,
    )
    stream = np.load(work / "stream.npy", mmap_mode="r")
    generator = np.random.default_rng(seed)
    started, tokens = time.monotonic(), 0
    for step in range(steps):
        factor = warmup_stable_decay(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * factor
        batch = torch.from_numpy(
            sample_sequences(
                stream, num_sequences=4, sequence_length=513, bos_id=1, repeat_share=0.25, generator=generator
            )
        )
        hidden = model.model(batch[:, :-1], use_cache=False).last_hidden_state
        loss = backward_loss(hidden, batch[:, 1:], model.lm_head)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += batch.numel()
        if step % 40 == 0 or step == steps - 1:
            rate = tokens / (time.monotonic() - started)
            row = {"stage": "warmup", "step": step, "loss": round(loss, 4), "tokens_per_second": round(rate)}
            _iterate_log(work / "log.jsonl", row)
            typer.echo(json.dumps(row))
        if (step + 1) % 200 == 0 or step == steps - 1:
            model.save_pretrained(work / "warmup.tmp")
            torch.save(optimizer.state_dict(), work / "optimizer.tmp")
            os.replace(work / "optimizer.tmp", work / "warmup-optimizer.pt")
            os.system(f"rm -rf {work}/warmup && mv {work}/warmup.tmp {work}/warmup")
    assert math.isfinite(loss)


if __name__ == "__main__":
    app()
