"""``POST /v1/completions``: prompts to continuations, whole or as a stream."""

import secrets

from fastapi import Request

from flows.serving.answering import EventStream
from flows.serving.batching import Progress
from flows.serving.prompting import Prompter, describe_choice
from flows.serving.request_models import CompletionRequest
from flows.serving.response_models import AnswerMemory, Completion, CompletionChoice, Usage

COMPLETION_TOKENS = 16
"""Tokens of a completion that does not say how many, as in OpenAI's API."""


async def complete(prompter: Prompter, asked: CompletionRequest, request: Request) -> Completion | EventStream:
    """Answers a request.

    Raises:
        ApiError: it cannot be answered.
    """
    prompter.check_model(asked.model)
    contexts = await prompter.encode(asked.list_prompts())
    answer, seed = prompter.submit(
        asked, contexts, param="prompt", max_tokens=asked.max_tokens, default_tokens=COMPLETION_TOKENS
    )
    name = f"cmpl-{secrets.token_hex(12)}"

    def make(version: int, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(
            id=name,
            created=answer.created,
            model=prompter.model_name,
            choices=choices,
            usage=usage,
            memory3=AnswerMemory(version=version, memory=asked.memory3.memory, seed=seed),
        )

    def make_choice(row: int, text: str, progress: Progress) -> CompletionChoice:
        described = describe_choice(asked, progress)
        return CompletionChoice(index=row, text=text, finish_reason=progress.finish_reason, memory3=described)

    def render(row: int, progress: Progress) -> str:
        return make(progress.version, [make_choice(row, progress.text, progress)], None).model_dump_json()

    def render_end() -> str | None:
        return make(answer.version, [], answer.count_usage()).model_dump_json() if asked.includes_usage else None

    if asked.stream:
        return await answer.stream(request, render, render_end)
    await answer.finish(request)
    choices = [make_choice(row, answer.texts[row], end) for row, end in enumerate(answer.ends)]
    return make(answer.version, choices, answer.count_usage())
