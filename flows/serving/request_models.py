"""What clients may ask: the fields of OpenAI's API that are supported, with ``memory3`` beside them.

A field that is not here is an error, since to ignore it would be to answer another question. Fields of OpenAI's API
that mean what the server does anyway are taken with that value alone: ``n`` is 1, ``echo`` false.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_STOPS = 4

MAX_MEMORIES = 20
"""Memories a chunk: four times those of the paper."""

INT64 = 2**63

Text = Annotated[str, Field(min_length=1)]

TokenId = Annotated[int, Field(ge=0, lt=2**31)]

Nothing = Annotated[float, Field(ge=0, le=0)]

Empty = Annotated[list[None], Field(max_length=0)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class MemoryOptions(_Asked):
    """What is this project's own.

    Attributes:
        memory: whether memories are read; false asks the ordinary model.
        num_memories: memories that each 64 tokens read.
        trace: whether the answer says what each of them has read.
        cite: whether it says in the end which of that its text is owed to.
        repetition_penalty: what the logits of tokens seen before are divided by; 1 is off.
    """

    memory: bool = Field(default=True, description="Whether memories are read; false asks the ordinary model.")
    num_memories: int = Field(default=5, ge=1, le=MAX_MEMORIES, description="Memories that each 64 tokens read.")
    trace: bool = Field(default=False, description="Whether the answer says what each of them has read.")
    cite: bool = Field(
        default=False,
        description="Whether the answer says in the end which of that its text is owed to: each memory is left out "
        "once, which takes further passes.",
    )
    repetition_penalty: float = Field(default=1.0, ge=1.0, le=100.0, description="1 is off.")


class StreamOptions(_Asked):
    """How an answer is streamed.

    Attributes:
        include_usage: whether a last event tells the tokens used.
    """

    include_usage: bool | None = None


class ResponseFormat(_Asked):
    """The form of an answer.

    Attributes:
        type: text, and nothing else.
    """

    type: Literal["text"]


class GenerationRequest(_Asked):
    """What completions and chats have in common.

    Attributes:
        model: name of the model.
        max_tokens: tokens to generate at most.
        temperature: 0 takes the likeliest token.
        top_p: sample from the likeliest tokens of this probability.
        seed: seed of the sampling; one is drawn if it is not given.
        stop: sequences that end the answer, and are not part of it.
        stream: whether the answer comes piece by piece.
        stream_options: how it does.
        memory3: what is this project's own.
        n: answers a prompt.
        frequency_penalty: not supported.
        presence_penalty: not supported.
        logit_bias: not supported.
        user: who asks; changes nothing.
    """

    model: Text
    max_tokens: int | None = Field(default=None, ge=1, le=2**31)
    temperature: float | None = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64)
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    memory3: MemoryOptions = MemoryOptions()
    n: Literal[1] | None = None
    frequency_penalty: Nothing | None = None
    presence_penalty: Nothing | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop sequences."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the tokens used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """A request to ``/v1/completions``.

    Attributes:
        prompt: a text, tokens, or several of them.
        best_of: answers to choose from.
        echo: not supported.
        logprobs: not supported.
        suffix: not supported.
    """

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None

    def list_prompts(self) -> list[str | list[int]]:
        """Returns the prompts one by one."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], int):
            return [[token for token in prompt if isinstance(token, int)]]
        return [part for part in prompt if not isinstance(part, int)]


class TextPart(_Asked):
    """A part of a message.

    Attributes:
        type: text, and nothing else.
        text: the text.
    """

    type: Literal["text"]
    text: str


class ChatMessage(_Asked):
    """A message of a conversation; what an answer of this server has beside its text may be sent back with it.

    Attributes:
        role: who speaks.
        content: what is said.
        refusal: not supported.
        annotations: not supported.
        audio: not supported.
        function_call: not supported.
        tool_calls: not supported.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    refusal: None = None
    annotations: Empty | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Empty | None = None

    @property
    def text(self) -> str:
        """The whole content."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """A request to ``/v1/chat/completions``.

    Attributes:
        messages: the conversation, which a user's message ends.
        max_completion_tokens: newer name of ``max_tokens``.
        logprobs: not supported.
        top_logprobs: not supported.
        response_format: text.
        tools: not supported.
        tool_choice: none.
        store: not supported.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31)
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    response_format: ResponseFormat | None = None
    tools: Empty | None = None
    tool_choice: Literal["none"] | None = None
    store: Literal[False] | None = None


class SearchRequest(_Asked):
    """A request to ``/v1/search``.

    Attributes:
        query: what to look for.
        num_hits: references to return at most.
    """

    query: Annotated[str, Field(max_length=20_000)]
    num_hits: int = Field(default=5, ge=1, le=100)

    @field_validator("query")
    @classmethod
    def check_query(cls, query: str) -> str:
        """Refuses a query without a word."""
        if not query.strip():
            raise ValueError("is empty; say what to look for")
        return query
