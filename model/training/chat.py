"""Conversations in tokens, by the chat template of a checkpoint.

Where it stands: messages (:mod:`model.training.messages`) -> **exchanges**, a prompt and the answer that is to follow
it, in tokens -> what they read (:mod:`model.training.exchanges`) -> batches. Every answer of a conversation is an
exchange of its own, whose prompt is all that was said before: just what the model is given when it is to answer.

A checkpoint without a template gets :data:`DEFAULT_TEMPLATE`. It puts a space before every content, since that makes
the first word of an answer the same token as that word inside a text, and so easier to copy from one.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.checkpoint import Checkpoint
from model.locating import find_checkpoint
from model.training.messages import Message, RejectedRow, cut_rounds, parse_content, parse_messages, read_rows
from schemas.errors import InputError
from schemas.protocols import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEFAULT_TEMPLATE = (
    "{%- set instructions = namespace(text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- set instructions.text = message['content'] + '\\n\\n' -%}"
    "{%- else -%}"
    "{{- '<|' + message['role'] + '|> ' + instructions.text + message['content'] + '<|end|>' -}}"
    "{%- set instructions.text = '' -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""The template of a checkpoint that has none; what the system says stands at the beginning of the first question."""

DEFAULT_MARKERS = ("<|user|>", "<|assistant|>", "<|end|>")
"""The special tokens that :data:`DEFAULT_TEMPLATE` needs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """A prompt and the answer that is to follow it.

    Attributes:
        prompt_ids: tokens of the context, ``<s>`` included, up to where the answer begins.
        answer_ids: tokens of the answer and of its end.
    """

    prompt_ids: IntArray
    answer_ids: IntArray

    @property
    def num_tokens(self) -> int:
        """Tokens of both."""
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadExchanges:
    """What a file of conversations holds: its rows are those kept and those rejected.

    Attributes:
        exchanges: an exchange for every answer that is kept.
        rejected: the rows that are not, with their reasons.
        num_kept: rows that are.
        num_cut: rows of these whose last rounds are left out.
    """

    exchanges: list[Exchange]
    rejected: list[RejectedRow]
    num_kept: int
    num_cut: int


class ChatTemplate:
    """Turns messages into tokens as a checkpoint's chat template says.

    Attributes:
        end_token_id: the special token that ends an answer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", bos_token_ids: Sequence[int]) -> None:
        """Takes a tokenizer of transformers and checks its template, the default one if it has none.

        Args:
            tokenizer: the tokenizer.
            bos_token_ids: what a context begins with; put before what the template gives if that does not begin so.

        Raises:
            InputError: the tokenizer has neither a template nor the tokens of the default one, or its template does
                not end an answer with a special token.
        """
        self._tokenizer = tokenizer
        self._bos = list(bos_token_ids)
        self._template = tokenizer.get_chat_template() if tokenizer.chat_template else DEFAULT_TEMPLATE
        self._special = frozenset(tokenizer.added_tokens_decoder)
        self._special_texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        missing = [marker for marker in DEFAULT_MARKERS if marker not in self._special_texts]
        if self._template == DEFAULT_TEMPLATE and missing:
            raise InputError(
                f"the checkpoint has no chat template, and its tokenizer has no special token {missing[0]} for the "
                "default one: give a checkpoint with a chat template, or add the tokens"
            )
        probe = (Message(role="user", content="a"), Message(role="assistant", content="b"))
        prompt, whole = self.render(probe[:1]), self._render(probe, is_prompt=False)
        ends = [token for token in whole[len(prompt) :] if token in self._special]
        if not ends or whole[: len(prompt)] != prompt:
            raise InputError(
                "the checkpoint's chat template is of no use for training: an answer must follow its prompt and end "
                "with a special token"
            )
        self.end_token_id = ends[-1]

    def _render(self, messages: Sequence[Message], *, is_prompt: bool) -> list[int]:
        from jinja2.exceptions import TemplateError

        for message in messages:
            spelt = next((text for text in self._special_texts if text in message.content), None)
            if spelt is not None:
                raise InputError(f"a content that spells the special token {spelt}")
        try:
            text = self._tokenizer.apply_chat_template(
                [dataclasses.asdict(message) for message in messages],
                chat_template=self._template,
                add_generation_prompt=is_prompt,
                tokenize=False,
            )
        except TemplateError as error:
            raise InputError(f"the chat template refuses the messages: {error}") from error
        ids = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids if ids[: len(self._bos)] == self._bos else [*self._bos, *ids]

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens of a prompt, to be continued with an answer; what :meth:`Generator.generate_tokens` takes.

        Raises:
            InputError: a content spells a special token, or the template refuses the messages.
        """
        return self._render(messages, is_prompt=True)

    def render_question(self, question: str, instructions: str | None = None) -> list[int]:
        """Returns the tokens of the prompt that asks one question.

        Raises:
            InputError: the question is empty or spells a special token.
        """
        asked = [Message(role="user", content=parse_content(question))]
        if instructions is not None:
            asked.insert(0, Message(role="system", content=parse_content(instructions)))
        return self.render(asked)

    def make_exchange(self, messages: Sequence[Message]) -> Exchange:
        """Returns the last answer of some messages with the prompt that asks for it.

        What a template puts behind the end of an answer is left out.

        Raises:
            InputError: as :meth:`render`, or the prompt is not what the template gives with the answer behind it.
        """
        prompt = self.render(messages[:-1])
        whole = self._render(messages, is_prompt=False)
        answer = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt or self.end_token_id not in answer:
            raise InputError("the chat template writes a prompt differently once its answer is there")
        answer = answer[: answer.index(self.end_token_id) + 1]
        return Exchange(prompt_ids=np.array(prompt, dtype=np.int32), answer_ids=np.array(answer, dtype=np.int32))

    def encode_answer(self, answer: str) -> IntArray:
        """Returns the tokens of an answer and its end, as they would follow a question.

        Raises:
            InputError: as :meth:`make_exchange`.
        """
        asked = Message(role="user", content="a")
        return self.make_exchange([asked, Message(role="assistant", content=parse_content(answer))]).answer_ids

    def make_exchanges(self, messages: Sequence[Message]) -> list[Exchange]:
        """Returns an exchange for every answer of a conversation.

        Raises:
            InputError: as :meth:`make_exchange`.
        """
        return [
            self.make_exchange(messages[: place + 1])
            for place, message in enumerate(messages)
            if message.role == "assistant"
        ]


def read_exchanges(path: Path, chat: ChatTemplate, *, sequence_tokens: int) -> ReadExchanges:
    """Reads the exchanges of conversations from JSON Lines.

    A row is ``{"messages": [{"role": ..., "content": ...}, ...]}`` or ``{"prompt": ..., "completion": ...}``. Rounds
    past the eighth are left out, and those from the first on that does not fit.

    Args:
        path: the file.
        chat: the template of the model.
        sequence_tokens: the most tokens of an exchange, prompt and answer together.

    Raises:
        InputError: the file cannot be read.
    """
    exchanges: list[Exchange] = []
    rejected: list[RejectedRow] = []
    num_kept = num_cut = 0
    for line, row in read_rows(path):
        try:
            if isinstance(row, InputError):
                raise row
            messages = parse_messages(row)
            if messages[-1].role != "assistant":
                raise InputError("the last message is no answer")
            made = chat.make_exchanges(cut_rounds(messages))
            fitting = list(itertools.takewhile(lambda exchange: exchange.num_tokens <= sequence_tokens, made))
            if not fitting:
                raise InputError(f"longer than {sequence_tokens} tokens")
        except InputError as error:
            rejected.append(RejectedRow(line=line, reason=str(error)))
            continue
        exchanges += fitting
        num_kept += 1
        num_cut += 2 * len(fitting) < sum(message.role != "system" for message in messages)
    return ReadExchanges(exchanges=exchanges, rejected=rejected, num_kept=num_kept, num_cut=num_cut)


def load_chat_template(name: str, checkpoint: Checkpoint) -> ChatTemplate:
    """Loads the chat template of a checkpoint.

    Args:
        name: the checkpoint, by name or folder.
        checkpoint: the same, loaded.

    Raises:
        InputError: the folder has no tokenizer, or one that is of no use for conversations.
    """
    from transformers import PreTrainedTokenizerFast

    folder = find_checkpoint(name)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"the tokenizer of {folder} cannot be loaded: {' '.join(str(error).split())}") from error
    return ChatTemplate(tokenizer, checkpoint.bos_token_ids)


def stop_at_answers(checkpoint: Checkpoint, chat: ChatTemplate) -> None:
    """Makes a generation end where an answer ends, besides where it ended before; saved with the model.

    Called once after training on conversations: the token is added to ``eos_token_id`` of the configurations.
    """
    configs = [checkpoint.config, getattr(checkpoint.model, "generation_config", None)]
    for config in configs:
        if config is None:
            continue
        known = config.eos_token_id
        ends = [] if known is None else list(known) if isinstance(known, list) else [known]
        if chat.end_token_id not in ends:
            config.eos_token_id = [*ends, chat.end_token_id]
