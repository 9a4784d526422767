"""What clients are answered: the objects of OpenAI's API, with ``memory3`` beside them, and this project's own."""

from typing import Literal

from pydantic import BaseModel, model_serializer

FinishReason = Literal["stop", "length"]
"""How an answer ends: by itself or at a stop sequence, or at the number of tokens that was asked for."""


class ReadMemory(BaseModel):
    """A memory that a chunk has read.

    Attributes:
        ref_id: the reference.
        score: its similarity with the query.
        attention: its share of the attention that memories got, averaged over layers.
    """

    ref_id: str
    score: float
    attention: float


class ReadChunk(BaseModel):
    """What a chunk of a prompt and its continuation has read.

    Attributes:
        first_token: its first token, counted from the beginning of the context.
        version: version of the bank that it retrieved from.
        num_tokens: its tokens; none if the text ended before the first.
        text: its text; that of all chunks joins to the whole.
        memories: what it has read, best first.
    """

    first_token: int
    version: int
    num_tokens: int
    text: str
    memories: list[ReadMemory]


Verdict = Literal["confirmed", "supported", "unclear", "refuted"]
"""What leaving a memory out says: the text is likelier because of it, and of no other more; because of it, but of
another more; not beyond noise; less likely."""


class CitedMemory(BaseModel):
    """A memory that a generated chunk cites.

    Attributes:
        ref_id: the reference.
        score: its similarity with the query.
        attention: its share of the attention that the chunk gave to memories, averaged over layers.
        support: by how many nats the chunk is likelier with it than without.
        verdict: what follows from that.
        confirmed: whether that is ``confirmed``.
    """

    ref_id: str
    score: float
    attention: float
    support: float
    verdict: Verdict
    confirmed: bool


class CitingPart(BaseModel):
    """A generated chunk with its citations.

    Attributes:
        first_token: its first token, counted from the beginning of the context.
        num_tokens: its tokens.
        text: its text; that of all generated chunks joins to the whole.
        logprob: its log-likelihood in nats, by the model itself: without temperature and penalty.
        support: by how many nats it is likelier with its memories than with none.
        noise: support up to this is none.
        citations: its memories, the one with the largest share of the attention first.
    """

    first_token: int
    num_tokens: int
    text: str
    logprob: float
    support: float
    noise: float
    citations: list[CitedMemory]


class AnswerMemory(BaseModel):
    """What is this project's own in an answer.

    Attributes:
        version: version of the bank that was read; of several prompts the newest.
        memory: whether memories were read.
        seed: seed of the sampling; prompt ``i`` of several has ``seed + i``.
    """

    version: int
    memory: bool
    seed: int


class ChoiceMemory(BaseModel):
    """What is this project's own in a choice.

    Attributes:
        version: version of the bank that is read now, or was in the end.
        versions: all that were read so far, in order; more than one if another was committed meanwhile.
        num_tokens: tokens generated so far.
        trace: what each chunk has read, where that was asked for; in a stream the chunks that have ended since the
            event before.
        citations: which of that the generated chunks are owed to, where that was asked for; in a stream with the end of
            the choice.
        citation_problem: why there are no citations though they were asked for.
    """

    version: int
    versions: list[int]
    num_tokens: int
    trace: list[ReadChunk] | None = None
    citations: list[CitingPart] | None = None
    citation_problem: str | None = None


class Usage(BaseModel):
    """Tokens used.

    Attributes:
        prompt_tokens: of the prompts.
        completion_tokens: generated.
        total_tokens: both.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    """The continuation of a prompt, or a piece of it.

    Attributes:
        index: which prompt.
        text: the text.
        logprobs: not supported.
        finish_reason: how it ended, None while it goes on.
        memory3: what it has read.
    """

    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None = None
    memory3: ChoiceMemory


class Completion(BaseModel):
    """Continuations, or pieces of them.

    Attributes:
        id: name of the answer.
        object: what this is.
        created: when the request came, in seconds since 1970.
        model: the model.
        choices: one a prompt.
        usage: tokens used; in a stream only in the last event, where it is asked for.
        memory3: what they have read.
    """

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    memory3: AnswerMemory


class AnswerMessage(BaseModel):
    """An answer.

    Attributes:
        role: who speaks.
        content: what is said.
        refusal: not supported.
    """

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """An answer with how it ended.

    Attributes:
        index: 0.
        message: the answer.
        logprobs: not supported.
        finish_reason: how it ended.
        memory3: what it has read.
    """

    index: int
    message: AnswerMessage
    logprobs: None = None
    finish_reason: FinishReason
    memory3: ChoiceMemory


class ChatCompletion(BaseModel):
    """The answer to a conversation.

    Attributes:
        id: name of the answer.
        object: what this is.
        created: when the request came, in seconds since 1970.
        model: the model.
        choices: one.
        usage: tokens used.
        memory3: what it has read.
    """

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    memory3: AnswerMemory


class Delta(BaseModel):
    """A piece of an answer.

    Attributes:
        role: who speaks, in the first piece.
        content: what is said further.
    """

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def list_given(self) -> dict[str, str]:
        """Leaves out what is not there, as OpenAI's API does."""
        return {name: value for name, value in (("role", self.role), ("content", self.content)) if value is not None}


class ChunkChoice(BaseModel):
    """A piece of an answer with how it ended.

    Attributes:
        index: 0.
        delta: the piece.
        logprobs: not supported.
        finish_reason: how it ended, None while it goes on.
        memory3: what it has read.
    """

    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: FinishReason | None = None
    memory3: ChoiceMemory


class ChatCompletionChunk(BaseModel):
    """An event of a streamed answer.

    Attributes:
        id: name of the answer.
        object: what this is.
        created: when the request came, in seconds since 1970.
        model: the model.
        choices: one, or none with the usage.
        usage: tokens used, in the last event where it is asked for.
        memory3: what it has read.
    """

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    memory3: AnswerMemory


class Model(BaseModel):
    """A model.

    Attributes:
        id: its name.
        object: what this is.
        created: when the server was started, in seconds since 1970.
        owned_by: this project.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["memory3"] = "memory3"


class ModelList(BaseModel):
    """All models.

    Attributes:
        object: what this is.
        data: the models.
    """

    object: Literal["list"] = "list"
    data: list[Model]


class Source(BaseModel):
    """Where a reference stands.

    Attributes:
        doc_id: the document.
        title: its title.
        source: where it is from.
        ordinal: which of the document's references it is.
        start_char: where it begins in the document, in characters.
        end_char: where it ends.
    """

    doc_id: str
    title: str
    source: str
    ordinal: int
    start_char: int
    end_char: int


class FoundMemory(BaseModel):
    """A hit of a search.

    Attributes:
        ref_id: the reference.
        score: its similarity with the query.
        text: its text.
        num_sources: in how many places it stands.
        sources: the first of them.
    """

    ref_id: str
    score: float
    text: str
    num_sources: int
    sources: list[Source]


class SearchAnswer(BaseModel):
    """Hits, best first.

    Attributes:
        version: version of the bank.
        hits: the hits.
    """

    version: int
    hits: list[FoundMemory]


class KeptHead(BaseModel):
    """What a KV head of a layer keeps of a reference.

    Attributes:
        layer: the layer.
        head: the KV head.
        tokens: places of the kept tokens, ascending.
    """

    layer: int
    head: int
    tokens: list[int]


class DescribedMemory(BaseModel):
    """A reference and its memory.

    Attributes:
        version: version of the bank.
        ref_id: the reference.
        text: its text.
        tokens: texts of its tokens, which join to its text; one more where text follows the last token.
        num_tokens: its length.
        is_live: whether it can be found; a near-duplicate or a contaminated reference cannot.
        kept_for: the reference it was dropped for as a near-duplicate.
        num_sources: in how many places it stands.
        sources: the first of them.
        kept: what each head keeps; empty if it is not live.
    """

    version: int
    ref_id: str
    text: str
    tokens: list[str]
    num_tokens: int
    is_live: bool
    kept_for: str | None
    num_sources: int
    sources: list[Source]
    kept: list[KeptHead]


class Health(BaseModel):
    """How the server is.

    Attributes:
        status: ``ok``, or what is wrong.
        model: the model.
        bank: the bank; None where clients need a key, which nobody gives to ask this.
        version: the version that is served.
        problem: why the version that should be served is not; None if it is. Where clients need a key, only that it is
            not.
        num_waiting: prompts that wait.
        num_running: prompts that are generated.
    """

    status: str
    model: str
    bank: str | None
    version: int
    problem: str | None
    num_waiting: int
    num_running: int
