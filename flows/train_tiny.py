"""Trains the checkpoint that comes with this project, from text to files: the recipe, step by step.

    python -m flows.train_tiny tokenizer --data corpora --work runs/tiny
    python -m flows.train_tiny warmup    --work runs/tiny
    python -m flows.train_tiny embedder  --data corpora
    python -m flows.train_tiny continual --work runs/tiny
    python -m flows.train_tiny ship      --work runs/tiny

Two stages as in the paper (section 7 of its method): ordinary language modelling first, then sequences whose 64-token
chunks read memories of other documents. One document in twenty is held out of everything, chosen by a hash of its id.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from flows.splitting import is_held_out
from pipelines.formats import list_corpus_files
from pipelines.python_docs import iterate_python_docs
from pipelines.reading import read_records
from pipelines.records import ReadingConfig

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import LlamaForCausalLM

Step = Callable[[int], float]
"""Runs forward and backward of one step and returns its loss."""

NUM_SEQUENCES, SEQUENCE_TOKENS = 4, 512
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

app = typer.Typer(add_completion=False, help="Train the shipped checkpoint.")

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text falls into pre-tokens: the pattern of Llama 3, which keeps runs of blanks together and digits in threes."""

SHARES = {"peps-2025-08": 1.0, "rfcs": 1.0, "psdocs": 0.35, "laws": 0.06}
"""The part of each corpus of ``--data`` that is used; the Python documentation of the machine is used whole."""


def _hash_share(doc_id: str) -> float:
    return int.from_bytes(hashlib.blake2b(b"share:" + doc_id.encode(), digest_size=4).digest(), "big") / 2**32


def iterate_training_documents(data: Path) -> Iterator[dict[str, str]]:
    """Yields the documents of the recipe that are not held out."""
    for document in iterate_python_docs():
        if not is_held_out(document["id"]):
            yield document
    for name, share in SHARES.items():
        for file in list_corpus_files([data / f"{name}.jsonl.zst"]):
            for batch in read_records(file, ReadingConfig()):
                for record in batch.select(["doc_id", "text", "source"]).to_pylist():
                    doc_id = record["doc_id"]
                    if record["text"] is not None and _hash_share(doc_id) < share and not is_held_out(doc_id):
                        yield {"id": doc_id, "text": record["text"], "source": record["source"]}


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


def _make_optimizer(model: "nn.Module") -> "torch.optim.AdamW":
    import torch

    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    scales = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def _run_steps(
    model: "LlamaForCausalLM",
    stage: str,
    work: Path,
    steps: int,
    first: int,
    stop_after: int,
    rate: float,
    step: "Step",
) -> None:
    """Runs a stage: its schedule spans ``steps``, of which ``first`` to ``stop_after`` are run; logs and saves."""
    import torch

    from model.training.schedule import warmup_stable_decay

    model.train()
    optimizer = _make_optimizer(model)
    optimizer_path = work / f"{stage}-optimizer.pt"
    if first:
        optimizer.load_state_dict(torch.load(optimizer_path, weights_only=True))
    started, num_tokens = time.monotonic(), 0
    for place in range(first, stop_after):
        for group in optimizer.param_groups:
            group["lr"] = rate * warmup_stable_decay(place, steps, decay_share=0.1 if stage == "warmup" else 0.4)
        loss = step(place)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        num_tokens += NUM_SEQUENCES * SEQUENCE_TOKENS
        if place % 40 == 0 or place == stop_after - 1:
            per_second = round(num_tokens / (time.monotonic() - started))
            row = {"stage": stage, "step": place, "loss": round(loss, 4), "tokens_per_second": per_second}
            with (work / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            typer.echo(json.dumps(row))
        if (place + 1) % 200 == 0 or place == stop_after - 1:
            temporary = work / f"{stage}.tmp"
            model.save_pretrained(temporary)
            torch.save(optimizer.state_dict(), optimizer_path.with_suffix(".tmp"))
            optimizer_path.with_suffix(".tmp").replace(optimizer_path)
            shutil.rmtree(work / stage, ignore_errors=True)
            temporary.rename(work / stage)


@app.command()
def warmup(
    work: Annotated[Path, typer.Option(help="Folder with the token stream.")],
    steps: Annotated[int, typer.Option(help="Steps of 2048 tokens that the schedule spans.")] = 3200,
    stop_after: Annotated[int | None, typer.Option(help="Steps to run; the continual stage decays instead.")] = None,
    resume_at: Annotated[int, typer.Option(help="Go on from the saved model, which has done so many steps.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the data order.")] = 0,
) -> None:
    """Stage one: ordinary language modelling, no memory."""
    import torch
    from transformers import LlamaForCausalLM

    from model.presets import memory3_tiny
    from model.training.objective import backward_loss
    from model.training.sequences import sample_sequences

    torch.manual_seed(seed)
    config = memory3_tiny()
    config.bos_token_id, config.eos_token_id, config.pad_token_id = BOS_ID, EOS_ID, PAD_ID
    model = LlamaForCausalLM.from_pretrained(work / "warmup") if resume_at else LlamaForCausalLM(config)
    stream = np.load(work / "stream.npy", mmap_mode="r")
    generator = np.random.default_rng(seed)

    def draw() -> np.ndarray:
        tokens, _ = sample_sequences(
            stream,
            num_sequences=NUM_SEQUENCES,
            sequence_length=SEQUENCE_TOKENS + 1,
            bos_id=BOS_ID,
            repeat_share=0.25,
            generator=generator,
        )
        return tokens

    for _ in range(resume_at):
        draw()

    def step(_: int) -> float:
        batch = torch.from_numpy(draw())
        hidden = model.model(batch[:, :-1], use_cache=False).last_hidden_state
        return backward_loss(hidden, batch[:, 1:], model.lm_head)

    _run_steps(model, "warmup", work, steps, resume_at, steps if stop_after is None else stop_after, 1.5e-3, step)


@app.command()
def continual(
    work: Annotated[Path, typer.Option(help="Folder with the token stream and the warmed-up model.")],
    steps: Annotated[int, typer.Option(help="Number of steps of 2048 tokens.")] = 600,
    seed: Annotated[int, typer.Option(help="Seed of the data order.")] = 1,
) -> None:
    """Stage two: every 64-token chunk reads memories of five references, written in the same step."""
    import torch
    from transformers import LlamaForCausalLM

    from model.checkpoint import wrap_model
    from model.embedding import load_embedder
    from model.selecting import SelectionConfig
    from model.tokenizing import load_tokenizer
    from model.training.continual import backward_continual
    from model.training.objective import backward_loss
    from model.training.retrieval import cut_references, retrieve_for_sequences
    from model.training.sequences import sample_sequences

    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(work / "warmup", dtype=torch.float32)
    tokenizer = load_tokenizer(work / "tokenizer")
    checkpoint = wrap_model(model, tokenizer, bos_token_id=BOS_ID)
    stream = np.load(work / "stream.npy", mmap_mode="r")
    generator = np.random.default_rng(seed)
    sequences, starts = sample_sequences(
        stream,
        num_sequences=NUM_SEQUENCES * steps,
        sequence_length=SEQUENCE_TOKENS + 1,
        bos_id=BOS_ID,
        repeat_share=0.1,
        generator=generator,
    )
    references = cut_references(stream, np.load(work / "document_starts.npy"))
    embedder = load_embedder("static")
    num_references = len(references.starts)
    vectors = embedder.embed([tokenizer.decode(references.get_tokens(row)) for row in range(num_references)])
    chosen = retrieve_for_sequences(
        sequences, starts, references, vectors, tokenizer, embedder, vocab_size=model.config.vocab_size
    )
    # A tenth of the references are distractors: the model must learn to tell what is of use to it.
    distracting = (generator.random(chosen.shape) < 0.1) & (chosen >= 0)
    drawn = generator.integers(0, num_references, chosen.shape)
    inside = (references.starts[drawn] < starts[:, None] + sequences.shape[1]) & (
        references.ends[drawn] > starts[:, None]
    )
    chosen = np.where(distracting & ~inside, drawn, chosen)
    typer.echo(f"{num_references} references; {(chosen < 0).mean():.1%} of the chunks have none")

    def step(place: int) -> float:
        rows = slice(place * NUM_SEQUENCES, (place + 1) * NUM_SEQUENCES)
        tokens = torch.from_numpy(sequences[rows])
        if place % 8 == 7:  # an ordinary step now and then keeps the model good without memory
            hidden = model.model(tokens[:, :-1], use_cache=False).last_hidden_state
            return backward_loss(hidden, tokens[:, 1:], model.lm_head)
        given = [[references.get_tokens(row) if row >= 0 else None for row in of_one] for of_one in chosen[rows]]
        return backward_continual(checkpoint, tokens, given, SelectionConfig())

    _run_steps(model, "continual", work, steps, 0, steps, 1.0e-3, step)


@app.command()
def embedder(
    data: Annotated[Path, typer.Option(help="Folder with the corpora named in SHARES.")],
    dimension: Annotated[int, typer.Option(help="Size of the vectors.")] = 128,
) -> None:
    """Distil the static embedder from all-MiniLM-L6-v2 into the package."""
    from model.embedding import SHIPPED_EMBEDDER, find_embedder
    from model.training.distilling import distil_embedder

    texts = [document["text"] for document in iterate_training_documents(data)]
    distil_embedder(find_embedder("minilm"), texts, dimension, SHIPPED_EMBEDDER)


@app.command()
def ship(work: Annotated[Path, typer.Option(help="Folder with the trained model.")]) -> None:
    """Write the trained model into the package, in bfloat16."""
    import torch
    from transformers import LlamaForCausalLM

    from model.locating import SHIPPED_MODEL, find_checkpoint

    target = find_checkpoint(SHIPPED_MODEL)
    model = LlamaForCausalLM.from_pretrained(work / "continual", dtype=torch.bfloat16)
    model.save_pretrained(target)
    for path in sorted((work / "tokenizer").iterdir()):
        shutil.copy(path, target / path.name)
    shutil.copy(work / "log.jsonl", target / "training-log.jsonl")
    size_bytes = sum(path.stat().st_size for path in target.iterdir())
    typer.echo(f"{target.name}: {size_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    app()
