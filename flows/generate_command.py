"""The command ``memory3 generate``."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.options import JsonOption, VersionOption

if TYPE_CHECKING:
    from flows.citing import CitingText
    from model.generating import GenerationConfig, Generator

app = typer.Typer()


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Option(help="Text to continue; several are continued together.")],
    bank: Annotated[
        str | None,
        typer.Option(
            "--bank", help="Bank to read: folder, s3:// URL, or http:// address of memory3 serve-bank.", metavar="URI"
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="memory3-tiny, or the folder of a transformers model.")] = "memory3-tiny",
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Run the ordinary model.")] = False,
    rag: Annotated[bool, typer.Option("--rag", help="Put 5 references into the prompt as text instead.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Ask a model after SFT: each prompt is a question.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this probability.")] = 0.95,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.")] = 1.2,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where to compute; by default where the bank was written.")] = None,
    cache_mb: Annotated[int, typer.Option(min=0, help="Memories kept in RAM, in MB; 0 keeps none.")] = 256,
    embedder: Annotated[
        str | None, typer.Option(help="Embedding model of a bank on a server, if it is not one of memory3's own.")
    ] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Print what each chunk read, and from where.")] = False,
    cite: Annotated[
        bool, typer.Option("--cite", help="Print which memories each chunk owes its words to, and whether that is so.")
    ] = False,
    at: VersionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue prompts, reading five memories for every 64 tokens.

    Baselines on the same model: --no-memory, and --rag, which finds references with the end of the prompt and puts
    their text before it.

    A model that was trained on conversations is asked with --chat: the prompt goes through its chat template, and the
    answer alone is printed.

    Citations (--cite) are the memories of each 64 generated tokens with their share of the attention. Each is left out
    once and the tokens are read again: a citation is confirmed if they are likelier with it, and with no other more.

    Example: memory3 generate --bank my-bank --prompt "The with statement" --trace
    """
    from flows.generation import open_generator
    from model.generating import GenerationConfig
    from schemas.errors import InputError

    if no_memory and rag:
        raise InputError("--no-memory and --rag exclude each other; give one of them")
    if cite:
        _check_citing(bank, no_memory=no_memory, rag=rag)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    knowledge = "none" if no_memory else "text" if rag else "memory"
    generator = open_generator(
        model, bank, at, knowledge=knowledge, cache_bytes=cache_mb << 20, device=device, embedder=embedder
    )
    if len(prompt) == 1 and not as_json and not chat:
        _stream(generator, prompt[0], settings)
    else:
        texts = _ask(model, generator, prompt, settings) if chat else _generate_together(generator, prompt, settings)
        if as_json:
            _print_json(generator, texts, _cite(generator, model, chat=chat) if cite else None)
            return
        for given, text in zip(prompt, texts, strict=True):
            sys.stdout.write(f"{text}\n" if chat and len(prompt) == 1 else f"{given}{' ' if chat else ''}{text}\n\n")
    if trace:
        from flows.console import print_traces

        for of_sequence in generator.trace.chunks:
            print_traces(of_sequence)
        if generator.statistics is not None:
            counted = generator.statistics
            sys.stdout.write(
                f"memories: {counted.num_cached:,} from the cache in RAM, {counted.num_read:,} from the bank, "
                f"{counted.num_encoded:,} encoded now; {counted.num_read_ahead:,} were read ahead\n"
            )
    if cite:
        from flows.console import print_citations

        print_citations(_cite(generator, model, chat=chat))


def _check_citing(bank: str | None, *, no_memory: bool, rag: bool) -> None:
    """Makes sure that there will be something to cite, and documents to name.

    Raises:
        InputError: there will not.
    """
    from flows.generation import is_server_url
    from schemas.errors import InputError

    if no_memory or rag:
        raise InputError(
            f"--cite is about memories, which {'--no-memory' if no_memory else '--rag'} does not read; give one of them"
        )
    if bank is not None and is_server_url(bank):
        raise InputError(
            f"{bank} hands out memories, not documents; give the folder or the store of the bank for --cite"
        )


def _cite(generator: "Generator", model: str, *, chat: bool) -> "list[CitingText]":
    from flows.citing import cite_generation
    from model.training.chat import load_chat_template

    end_token_id = load_chat_template(model, generator.checkpoint).end_token_id if chat else None
    return cite_generation(generator, end_token_id=end_token_id)


def _stream(generator: "Generator", prompt: str, settings: "GenerationConfig") -> None:
    sys.stdout.write(prompt)
    for piece in generator.generate(prompt, settings):
        sys.stdout.write(piece.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _generate_together(generator: "Generator", prompts: list[str], settings: "GenerationConfig") -> list[str]:
    decode = generator.checkpoint.tokenizer.decode
    return [decode(tokens) for tokens in generator.generate_batch(prompts, settings)]


def _ask(model: str, generator: "Generator", questions: list[str], settings: "GenerationConfig") -> list[str]:
    from model.answering import answer_prompts
    from model.training.chat import load_chat_template

    chat = load_chat_template(model, generator.checkpoint)
    return answer_prompts(generator, chat, [chat.render_question(question) for question in questions], settings)


def _print_json(generator: "Generator", texts: list[str], cited: "list[CitingText] | None") -> None:
    from flows.console import print_json

    found: list[dict[str, Any]] = [
        {"text": text, "chunks": [dataclasses.asdict(chunk) for chunk in chunks]}
        for text, chunks in zip(texts, generator.trace.chunks, strict=True)
    ]
    for of_text, citing in zip(found, cited or (), strict=False):
        of_text["citations"] = citing.to_json()
    print_json(found[0] if len(found) == 1 else found)
