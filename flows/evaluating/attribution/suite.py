"""``memory3 eval attribution``: is the memory that a chunk attended to most the one that its words are owed to?

    prompts (:mod:`flows.evaluating.attribution.prompts`) -> texts, generated or real -> citations, each left out once
    (:mod:`model.citing`) -> figures (:mod:`flows.evaluating.attribution.figures`) -> report

Attention names a citation; leaving the memory out says whether it is true. Both are measured on what the model
generates, greedily and sampled, and on the real text that follows the same prompts.
"""

import dataclasses
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from flows.evaluating.attribution.figures import JudgedChunk, measure_new
from flows.evaluating.attribution.prompts import AttributionPrompt, PromptSource, choose_passages, read_prompts
from flows.evaluating.attribution.reporting import (
    count_chunks,
    list_failures,
    make_charts,
    make_tables,
    make_verdicts,
    measure_all,
)
from flows.evaluating.evaluated_model import EvaluatedModel, EvaluationOptions
from flows.evaluating.suite_reports import SuiteReport
from flows.progress import show_stage
from model.chunk_memories import FindHits
from model.citing import CitedChunk, CitedText, Citer, list_reads, retrieve_reads
from model.generating import GenerationConfig
from model.reading import CHUNK_TOKENS, MEMORIES_PER_CHUNK
from schemas.bank import Bank
from schemas.errors import InputError

TEXTS_AT_ONCE = 8
"""Texts whose variants are put into common batches, those of about the same length together."""

GREEDY, REAL = "greedy", "real text"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttributionOptions:
    """How attribution is measured.

    Attributes:
        num_chunks: generated chunks of 64 tokens for each temperature, at least.
        chunks_per_text: of each text.
        prompt_tokens: tokens of a prompt that is cut from a document, ``<s>`` included.
        temperatures: how texts are generated; 0 takes the likeliest token.
        repetition_penalty: as in ``memory3 generate``.
        num_memories: memories a chunk.
        max_overlap: the greatest overlap of a reference with the prompt, or the real text, at which it is read; 1 reads
            what ``memory3 generate`` reads.
        batch_size: texts that are generated together, and variants that are read together.
        seed: of the choice of passages, and of the sampling.
    """

    num_chunks: int = 500
    chunks_per_text: int = 3
    prompt_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 0.8)
    repetition_penalty: float = 1.2
    num_memories: int = MEMORIES_PER_CHUNK
    max_overlap: float = 1.0
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a value is out of its bounds.
        """
        for name in ("num_chunks", "chunks_per_text", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"attribution: {name} is {getattr(self, name)}, must be at least 1")
        if self.prompt_tokens < 2:
            raise InputError(f"attribution: prompt_tokens is {self.prompt_tokens}, must be at least 2")
        if self.num_memories < 2:
            raise InputError(f"attribution: num_memories is {self.num_memories}; at least 2 can be told apart")
        if len(set(self.temperatures)) != len(self.temperatures):
            raise InputError("attribution: a temperature is given twice; give each once")

    @property
    def num_texts(self) -> int:
        """Texts that make up the chunks."""
        return -(-self.num_chunks // self.chunks_per_text)

    @property
    def new_tokens(self) -> int:
        """Tokens that follow a prompt."""
        return self.chunks_per_text * CHUNK_TOKENS


def run_attribution(
    model: str | None,
    bank: Bank,
    options: AttributionOptions,
    *,
    corpus: Sequence[str] = (),
    prompts: Path | None = None,
    device: str | None = None,
) -> SuiteReport:
    """Measures how often citations by attention are true.

    Args:
        model: the checkpoint, by name or folder; None for the one that wrote the bank.
        bank: what it reads.
        options: how it is measured.
        corpus: files and folders of held-out documents, whose passages are continued.
        prompts: in their place a file of prompts, see :func:`flows.evaluating.attribution.prompts.read_prompts`.
        device: where to compute; None for where the bank was written.

    Raises:
        InputError: neither or both of corpus and prompts are given, they are too few, or they do not fit the model.
        WrongModelError: the bank was written by another model.
    """
    if bool(corpus) == (prompts is not None):
        raise InputError("give held-out documents with --corpus, or a file with --prompts")
    with show_stage("model"):
        evaluation = EvaluationOptions(
            num_memories=options.num_memories, max_overlap=options.max_overlap, batch_size=options.batch_size
        )
        evaluated = EvaluatedModel(model, bank, evaluation, device=device)
    checkpoint = evaluated.checkpoint
    if prompts is not None:
        source = read_prompts(checkpoint, prompts, num_texts=options.num_texts)
    else:
        source = choose_passages(
            checkpoint,
            corpus,
            num_texts=options.num_texts,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            seed=options.seed,
        )
    started = time.monotonic()
    judged: dict[str, list[JudgedChunk]] = {}
    for temperature in options.temperatures:
        way = GREEDY if temperature == 0 else f"temperature {temperature:g}"
        judged[way] = _cite(evaluated, options, way, source.prompts, _generate(evaluated, options, source, temperature))
    if prompts is None:
        judged[REAL] = _cite(evaluated, options, REAL, source.prompts, _read_real(evaluated, options, source))
    judged = {way: chunks for way, chunks in judged.items() if chunks}
    if not judged:
        raise InputError(f"no chunk read two memories or more; does bank {bank.url} have references?")
    seconds = time.monotonic() - started
    command = make_command(evaluated, options, corpus, prompts, device)
    return _report(evaluated, options, source, judged, command, seconds)


def _make_find(evaluated: EvaluatedModel, prompts: Sequence[AttributionPrompt]) -> FindHits:
    search = evaluated.search
    assert search is not None
    return lambda rows, texts, num_hits: search.search(texts, [(prompts[row].tokens,) for row in rows], num_hits)


def _generate(
    evaluated: EvaluatedModel, options: AttributionOptions, source: PromptSource, temperature: float
) -> list[CitedText]:
    """Returns continuations of all prompts, each of the full length, with what their chunks read."""
    texts: list[CitedText] = []
    generator, size = evaluated.generator, options.batch_size
    with show_stage(f"generate, {temperature:g}", len(source.prompts), "texts", lambda: len(texts)):
        for start in range(0, len(source.prompts), size):
            batch = source.prompts[start : start + size]
            configs = [
                GenerationConfig(
                    max_new_tokens=options.new_tokens,
                    temperature=temperature,
                    repetition_penalty=options.repetition_penalty,
                    seed=options.seed + start + row,
                    num_memories=options.num_memories,
                    stop_at_end=False,
                )
                for row in range(len(batch))
            ]
            contexts = [prompt.tokens for prompt in batch]
            for _ in generator.stream_tokens(contexts, configs, find=_make_find(evaluated, batch)):
                pass
            trace = generator.trace
            for prompt, tokens, chunks in zip(batch, trace.generated, trace.chunks, strict=True):
                reads = list_reads(chunks, len(prompt.tokens), len(tokens))
                texts.append(CitedText(prompt=prompt.tokens, generated=tuple(tokens), reads=reads))
    return texts


def _read_real(evaluated: EvaluatedModel, options: AttributionOptions, source: PromptSource) -> list[CitedText]:
    """Returns the real text after all prompts with what its chunks would have read, had the model generated it."""
    assert evaluated.search is not None
    pairs = [(prompt.tokens, prompt.following) for prompt in source.prompts]
    questions = [((*tokens, *following),) for tokens, following in pairs]
    return retrieve_reads(evaluated.checkpoint, evaluated.search, pairs, questions, options.num_memories)


def _cite(
    evaluated: EvaluatedModel,
    options: AttributionOptions,
    way: str,
    prompts: Sequence[AttributionPrompt],
    texts: Sequence[CitedText],
) -> list[JudgedChunk]:
    """Returns the chunks of texts that read two memories or more, with their citations."""
    memories = evaluated.generator.memories
    assert memories is not None
    citer = Citer(evaluated.checkpoint, memories, num_memories=options.num_memories, batch_size=options.batch_size)
    judged: list[JudgedChunk] = []
    num_done = 0
    with show_stage(f"leave out, {way}", len(texts), "texts", lambda: num_done):
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            some = texts[start : start + TEXTS_AT_ONCE]
            for prompt, text, chunks in zip(prompts[start:], some, citer.cite(some), strict=False):
                judged += _judge_text(prompt, way, text, chunks)
            num_done += len(some)
    return judged


def _judge_text(
    prompt: AttributionPrompt, way: str, text: CitedText, chunks: Sequence[CitedChunk]
) -> list[JudgedChunk]:
    judged = []
    for number, chunk in enumerate(chunks):
        if len(chunk.citations) > 1:
            share_new = measure_new((*text.prompt, *text.generated[: number * CHUNK_TOKENS]), chunk.tokens)
            judged.append(JudgedChunk(item=prompt.item, name=prompt.name, way=way, chunk=chunk, share_new=share_new))
    return judged


def _report(
    evaluated: EvaluatedModel,
    options: AttributionOptions,
    source: PromptSource,
    judged: dict[str, list[JudgedChunk]],
    command: str,
    seconds: float,
) -> SuiteReport:
    bank = evaluated.bank
    assert bank is not None
    measurements = measure_all(judged)
    counts = {way: count_chunks(chunks) for way, chunks in judged.items()}
    return SuiteReport(
        suite="attribution",
        title="Attribution: are citations by attention true?",
        explanation=(
            "For each chunk of 64 tokens the memories that it read are left out one by one, and its tokens are read "
            "again: support is by how many nats they are likelier with the memory. The top citation is the memory with "
            f"the largest share of the attention; it is held against a random memory of the same chunk. Support up to "
            f"{max(one.chunk.noise for chunks in judged.values() for one in chunks):.2g} nats is noise. Items are "
            "documents without their versions, or prompts; intervals are 95 %, by bootstrap over them. A chunk is a "
            "loop if less than half of its runs of four tokens are new. With --max-overlap 1 a text that stands in the "
            "bank may read itself; the data count the documents for which that is so."
        ),
        command=command,
        data={
            "model": evaluated.name,
            "bank": bank.url,
            "version": bank.manifest.version,
            "fingerprint": dataclasses.asdict(bank.manifest.fingerprint),
            "files": source.files,
            "texts": len(source.prompts),
            "items": len({prompt.item for prompt in source.prompts}),
            "documents": len(source.documents),
            "documents_in_bank": count_known(bank, source.documents),
            "chunks": counts,
        },
        settings=dataclasses.asdict(options),
        measurements=measurements,
        tables=make_tables(measurements, counts),
        charts=make_charts(judged),
        verdicts=make_verdicts(measurements, judged),
        failures=list_failures(evaluated.checkpoint.tokenizer.decode, judged),
        seconds=seconds,
    )


def count_known(bank: Bank, documents: Sequence[tuple[str, str]]) -> int:
    """Returns how many of some documents stand in a bank, by their id or by their text.

    Args:
        bank: the version.
        documents: id and content hash of each.
    """
    table = bank.read_table("documents", ["doc_id", "content_hash"])
    known, hashes = (set(table[name].to_pylist()) for name in ("doc_id", "content_hash"))
    return sum(doc_id in known or content_hash in hashes for doc_id, content_hash in documents)


def make_command(
    evaluated: EvaluatedModel,
    options: AttributionOptions,
    corpus: Sequence[str],
    prompts: Path | None,
    device: str | None,
) -> str:
    """Returns the command that repeats a run."""
    assert evaluated.bank is not None
    words = ["memory3", "eval", "attribution", "--bank", evaluated.bank.url]
    words += ["--at", str(evaluated.bank.manifest.version), "--model", evaluated.name]
    words += [word for path in corpus for word in ("--corpus", path)]
    words += [] if prompts is None else ["--prompts", str(prompts)]
    words += ["--chunks", str(options.num_chunks), "--chunks-per-text", str(options.chunks_per_text)]
    words += ["--prompt-tokens", str(options.prompt_tokens), "--memories", str(options.num_memories)]
    words += [word for temperature in options.temperatures for word in ("--temperature", str(temperature))]
    words += ["--repetition-penalty", str(options.repetition_penalty), "--max-overlap", str(options.max_overlap)]
    words += ["--batch-size", str(options.batch_size), "--seed", str(options.seed)]
    words += [] if device is None else ["--device", device]
    return shlex.join(words)
