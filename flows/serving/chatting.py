"""``POST /v1/chat/completions``: a conversation to its next answer, whole or as a stream."""

import asyncio
import secrets
from collections.abc import Sequence

from fastapi import Request

from flows.serving.answering import EventStream
from flows.serving.batching import Progress
from flows.serving.errors import ApiError
from flows.serving.prompting import Prompter, describe_choice
from flows.serving.request_models import ChatMessage, ChatRequest
from flows.serving.response_models import (
    AnswerMemory,
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChunkChoice,
    Delta,
    Usage,
)
from model.training.chat import ChatTemplate
from model.training.messages import parse_messages
from schemas.errors import InputError

CHAT_TOKENS = 256
"""Tokens of an answer that does not say how many, if there is room for them."""


def render_messages(chat: ChatTemplate, messages: Sequence[ChatMessage]) -> list[int]:
    """Returns the tokens of the prompt that asks for the next answer.

    Raises:
        ApiError: the messages are no conversation that a user's message ends, or spell a special token.
    """
    # "developer" is a newer name of "system".
    rows = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        for message in messages
    ]
    try:
        parsed = parse_messages({"messages": rows})
        if parsed[-1].role != "user":
            raise InputError("the last message is not the user's")
        return chat.render(parsed)
    except InputError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from error


async def answer_chat(
    prompter: Prompter, chat: ChatTemplate | None, asked: ChatRequest, request: Request
) -> ChatCompletion | EventStream:
    """Answers a request.

    Args:
        prompter: puts prompts into the queue.
        chat: the template of the model; None if it has none.
        asked: what is asked.
        request: the request itself.

    Raises:
        ApiError: it cannot be answered.
    """
    prompter.check_model(asked.model)
    if chat is None:
        raise ApiError(400, "this model cannot be talked to, since it has no chat template; use /v1/completions")
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
        raise ApiError(
            400, "max_tokens: is the older name of max_completion_tokens; give one of them", param="max_tokens"
        )
    context = await asyncio.to_thread(render_messages, chat, asked.messages)
    answer, seed = prompter.submit(
        asked,
        [context],
        param="messages",
        max_tokens=asked.max_completion_tokens or asked.max_tokens,
        default_tokens=CHAT_TOKENS,
        end_token_id=chat.end_token_id,
    )
    name = f"chatcmpl-{secrets.token_hex(12)}"
    is_first = True

    def describe(version: int) -> AnswerMemory:
        return AnswerMemory(version=version, memory=asked.memory3.memory, seed=seed)

    def make_chunk(version: int, choices: list[ChunkChoice], usage: Usage | None) -> str:
        return ChatCompletionChunk(
            id=name,
            created=answer.created,
            model=prompter.model_name,
            choices=choices,
            usage=usage,
            memory3=describe(version),
        ).model_dump_json()

    def render(row: int, progress: Progress) -> str:
        nonlocal is_first
        delta = Delta(role="assistant" if is_first else None, content=progress.text)
        is_first = False
        described = describe_choice(asked, progress)
        choice = ChunkChoice(index=row, delta=delta, finish_reason=progress.finish_reason, memory3=described)
        return make_chunk(progress.version, [choice], None)

    def render_end() -> str | None:
        return make_chunk(answer.version, [], answer.count_usage()) if asked.includes_usage else None

    if asked.stream:
        return await answer.stream(request, render, render_end)
    await answer.finish(request)
    (end,), (text,) = answer.ends, answer.texts
    choice = ChatChoice(
        index=0,
        message=AnswerMessage(content=text),
        finish_reason=end.finish_reason or "stop",
        memory3=describe_choice(asked, end),
    )
    return ChatCompletion(
        id=name,
        created=answer.created,
        model=prompter.model_name,
        choices=[choice],
        usage=answer.count_usage(),
        memory3=describe(end.version),
    )
