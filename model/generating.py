"""Generation: text token by token, new memories every 64 generated tokens.

The prompt is split into chunks of 64 tokens; each retrieves with its own text and all are read in one call. The first
generated chunk inherits the memories of the last prompt chunk; when 64 tokens have been generated, those 64 are the
query for the next memories (method section 6). A prompt of 128 tokens and 128 generated ones make 3 retrievals.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from model.checkpoint import Checkpoint
from model.fetching import BankMemories
from model.reading import CHUNK_TOKENS, MEMORIES_PER_CHUNK, ReadingSession
from model.retrieving import Hit, Retriever
from model.writing import Memories
from schemas.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to generate.

    Attributes:
        max_new_tokens: when to stop at the latest.
        temperature: 0 takes the likeliest token; otherwise the logits are divided by it and sampled.
        top_p: sample from the likeliest tokens that together have this probability.
        repetition_penalty: logits of tokens seen before are divided (multiplied if negative) by it; 1 is off.
        seed: seed of the sampling.
        num_memories: memories a chunk.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    seed: int = 0
    num_memories: int = MEMORIES_PER_CHUNK

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a value is out of its bounds.
        """
        if self.max_new_tokens < 1:
            raise InputError(f"generation: max_new_tokens is {self.max_new_tokens}, must be at least 1")
        if self.temperature < 0:
            raise InputError(f"generation: temperature is {self.temperature}, must be at least 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"generation: top_p is {self.top_p}, must be in (0, 1]")
        if self.repetition_penalty < 1:
            raise InputError(f"generation: repetition_penalty is {self.repetition_penalty}, must be at least 1")
        if self.num_memories < 1:
            raise InputError(f"generation: num_memories is {self.num_memories}, must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkTrace:
    """What one chunk read.

    Attributes:
        first_token: place of its first token in the context.
        hits: the references it retrieved, or inherited, best first.
        attention: the share of the memory attention each of them got, averaged over layers; sums to 1.
    """

    first_token: int
    hits: list[Hit]
    attention: list[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedPiece:
    """A piece of generated text.

    Attributes:
        text: the text that has become certain; may be empty in the middle of a letter.
        token_id: the token.
    """

    text: str
    token_id: int


class Generator:
    """Generates from a prompt, with the memories of a bank or without.

    Attributes:
        traces: what each chunk of the last generation read; complete once it has ended.
        num_retrievals: retrievals of the last generation.
    """

    def __init__(
        self, checkpoint: Checkpoint, retriever: Retriever | None = None, memories: BankMemories | None = None
    ) -> None:
        """Joins a model with a bank; without retriever and memories it is the ordinary model, without the prefix."""
        if (retriever is None) != (memories is None):
            raise InputError("give both a retriever and the memories of its bank, or neither")
        self._checkpoint = checkpoint
        self._retriever = retriever
        self._memories = memories
        self.traces: list[ChunkTrace] = []
        self.num_retrievals = 0

    def _retrieve(self, queries: Sequence[Sequence[int]], num_memories: int) -> list[list[Hit]]:
        assert self._retriever is not None
        texts = [self._checkpoint.tokenizer.decode(query) for query in queries]
        self.num_retrievals += len(queries)
        return self._retriever.search(texts, num_memories)

    def _fetch(self, hits: list[list[Hit]], width: int) -> tuple[Memories | None, torch.Tensor]:
        assert self._memories is not None
        distinct = list(dict.fromkeys(hit.ref_id for of_chunk in hits for hit in of_chunk))
        place = {ref_id: row for row, ref_id in enumerate(distinct)}
        rows = [[place[hit.ref_id] for hit in of_chunk] + [-1] * (width - len(of_chunk)) for of_chunk in hits]
        index = torch.tensor([rows], device=self._checkpoint.device)
        return (self._memories.fetch(distinct) if distinct else None), index

    def _note(self, attention_LCM: torch.Tensor, hits: list[list[Hit]], first_tokens: list[int]) -> None:
        shares = attention_LCM / attention_LCM.sum(-1, keepdim=True).clamp(min=1e-30)
        for chunk, (of_chunk, first) in enumerate(zip(hits, first_tokens, strict=True)):
            received = shares[:, chunk].mean(0).tolist()[: len(of_chunk)]
            self.traces.append(ChunkTrace(first_token=first, hits=of_chunk, attention=received))

    def generate(self, prompt: str, config: GenerationConfig) -> Iterator[GeneratedPiece]:
        """Yields the continuation of a prompt, token by token; ends at the end-of-text token or the limit.

        Raises:
            InputError: the prompt is empty, or does not fit the model together with what is to be generated.
            MemoryNotReadError: memories were retrieved but got no attention.
        """
        self.traces, self.num_retrievals = [], 0
        checkpoint = self._checkpoint
        tokens = [*checkpoint.bos_token_ids, *checkpoint.tokenizer.encode([prompt])[0].tolist()]
        if len(tokens) == len(checkpoint.bos_token_ids):
            raise InputError("the prompt is empty; give some text with --prompt")
        with_memory = self._retriever is not None
        limit = int(checkpoint.config.max_position_embeddings) - (checkpoint.context_start if with_memory else 0)
        if len(tokens) + config.max_new_tokens > limit:
            raise InputError(
                f"the prompt has {len(tokens)} tokens and {config.max_new_tokens} more are to be generated; "
                f"the model has room for {limit}: shorten the prompt or lower --max-new-tokens"
            )
        session = ReadingSession(checkpoint, with_prefix=with_memory)
        random = torch.Generator().manual_seed(config.seed)
        hits, logits = self._read_prompt(session, tokens, config)
        stops = _list_stop_tokens(checkpoint)
        generated: list[int] = []
        shown = ""
        memories, index, attention = None, None, None
        if with_memory:
            memories, index = self._fetch(hits, config.num_memories)
        for step in range(config.max_new_tokens):
            token = _choose_token(logits[0, -1].float().cpu().clone(), tokens + generated, config, random)
            if token in stops:
                break
            generated.append(token)
            text = checkpoint.tokenizer.decode(generated)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield GeneratedPiece(text=text[len(shown) :], token_id=token)
                shown = text
            else:
                yield GeneratedPiece(text="", token_id=token)
            if with_memory and len(generated) % CHUNK_TOKENS == 0:
                first = len(tokens) + len(generated) - CHUNK_TOKENS
                if attention is not None:
                    self._note(attention, hits, [first])
                    attention = None
                if len(generated) == config.max_new_tokens:
                    break
                hits = self._retrieve([generated[-CHUNK_TOKENS:]], config.num_memories)
                memories, index = self._fetch(hits, config.num_memories)
            if step == config.max_new_tokens - 1:
                break
            logits, context = session.read(torch.tensor([[token]], device=checkpoint.device), memories, index)
            if context is not None and context.attention_LBCM is not None:
                received = context.attention_LBCM[:, 0].cpu()
                attention = received if attention is None else attention + received
        if attention is not None:
            first = len(tokens) + len(generated) - len(generated) % CHUNK_TOKENS
            self._note(attention, hits, [first])

    def _read_prompt(
        self, session: ReadingSession, tokens: list[int], config: GenerationConfig
    ) -> tuple[list[list[Hit]], torch.Tensor]:
        """Reads all chunks of the prompt in one call; returns the hits of the last chunk and the last logits."""
        device = self._checkpoint.device
        token_ids = torch.tensor([tokens], device=device)
        if self._retriever is None:
            return [], session.read(token_ids, last_only=True)[0]
        # A last chunk that is not full asks with the 64 tokens that end the prompt: more words, the same place.
        ends = [min(start + CHUNK_TOKENS, len(tokens)) for start in range(0, len(tokens), CHUNK_TOKENS)]
        hits = self._retrieve([tokens[max(0, end - CHUNK_TOKENS) : end] for end in ends], config.num_memories)
        memories, index = self._fetch(hits, config.num_memories)
        chunk = (torch.arange(len(tokens), device=device) // CHUNK_TOKENS)[None]
        logits, context = session.read(token_ids, memories, index, chunk, last_only=True)
        if context is not None and context.attention_LBCM is not None:
            firsts = list(range(0, len(tokens), CHUNK_TOKENS))
            self._note(context.attention_LBCM[:, 0].cpu(), hits, firsts)
        return hits[-1:], logits


def _list_stop_tokens(checkpoint: Checkpoint) -> set[int]:
    eos = checkpoint.config.eos_token_id
    return set(eos) if isinstance(eos, list) else {eos} - {None}


def _choose_token(logits: torch.Tensor, seen: list[int], config: GenerationConfig, random: torch.Generator) -> int:
    if config.repetition_penalty > 1:
        places = torch.tensor(sorted(set(seen)))
        values = logits[places]
        logits[places] = torch.where(values > 0, values / config.repetition_penalty, values * config.repetition_penalty)
    if config.temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / config.temperature).softmax(-1).sort(descending=True)
    # The likeliest token always stays; a later one stays if those before it have not yet reached top_p.
    probabilities[probabilities.cumsum(0) - probabilities >= config.top_p] = 0.0
    return int(order[int(torch.multinomial(probabilities, 1, generator=random))])
