"""A model with memory as the lm-evaluation-harness knows models: ``lm_eval.api.model.TemplateLM``.

    requests -> tokens -> sequences (:mod:`model.loglikelihoods`) or prompts (:mod:`model.generating`) -> answers

The question that the filter compares references with is, for a prompt, the prompt with each of the continuations that
are asked for it, so that all choices of a question read the same; for a document it is the whole document; and for a
text to be generated the prompt. Imported only where the harness is installed.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerFast

from flows.evaluating.evaluated_model import EvaluatedModel
from flows.progress import show_stage
from flows.serving.growing_text import GrowingText
from model.chunk_memories import FindHits
from model.generating import GenerationConfig
from model.locating import find_checkpoint
from model.loglikelihoods import ScoredSequence, TokenScores
from model.overlap_filter import Questions
from schemas.errors import InputError

TokenPair = tuple[tuple[str, str] | None, list[int], list[int]]

DEFAULT_NEW_TOKENS = 256
"""What the harness generates where a task does not say how much."""

SETTINGS = {"do_sample", "until", "max_gen_toks", "temperature", "top_p", "repetition_penalty"}
"""The settings of generation that a task may have."""


@dataclasses.dataclass(kw_only=True)
class RequestCounts:
    """What tasks asked for so far.

    Attributes:
        num_scored: continuations.
        num_documents: whole documents.
        num_generated: texts to generate.
        num_new_tokens: tokens generated.
        num_cut: contexts that were too long and lost their beginning.
    """

    num_scored: int = 0
    num_documents: int = 0
    num_generated: int = 0
    num_new_tokens: int = 0
    num_cut: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prompt:
    """A text to generate."""

    tokens: list[int]
    config: GenerationConfig
    stops: tuple[str, ...]


class MemoryLM(TemplateLM):
    """Answers the requests of tasks.

    Attributes:
        counts: what was asked so far.
    """

    def __init__(self, evaluated: EvaluatedModel) -> None:
        """Takes a model that is ready to be measured.

        Raises:
            InputError: its tokenizer cannot be loaded.
        """
        super().__init__()
        self._evaluated = evaluated
        folder = find_checkpoint(evaluated.name)
        try:
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"the tokenizer of {folder} cannot be loaded: {' '.join(str(error).split())}") from error
        self.counts = RequestCounts()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        eos = self._evaluated.checkpoint.config.eos_token_id
        return int(eos[0] if isinstance(eos, list) else self.prefix_token_id if eos is None else eos)

    @property
    def prefix_token_id(self) -> int:
        """The token that an empty context consists of."""
        bos = self._evaluated.checkpoint.bos_token_ids
        return bos[0] if bos else self.eot_token_id

    @property
    def max_length(self) -> int:
        """The longest sequence that is read."""
        return self._evaluated.max_length

    @property
    def tokenizer_name(self) -> str:
        """The name of the checkpoint, which its chat template is known by."""
        return self._evaluated.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns messages as the chat template of the model writes them.

        Raises:
            InputError: the model has none, or it refuses the messages.
        """
        from jinja2.exceptions import TemplateError

        if not self.tokenizer.chat_template:
            raise InputError(f"{self._evaluated.name} has no chat template; leave out --chat")
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )
        except TemplateError as error:
            raise InputError(f"the chat template refuses the messages of the task: {error}") from error

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the tokens of a text; special tokens that it spells, as a chat template writes them, are such.

        Args:
            string: the text.
            add_special_tokens: False for what does not begin a context. Else it begins with ``<s>``, or, with
                ``--no-bos``, as the tokenizer has it.
        """
        if self._evaluated.options.with_bos:
            tokens = list(self.tokenizer.encode(string, add_special_tokens=False))
            bos = list(self._evaluated.checkpoint.bos_token_ids)
            return tokens if add_special_tokens is False or tokens[: len(bos)] == bos else [*bos, *tokens]
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of continuations, and whether greedy generation gives them.

        Args:
            requests: the contexts with their continuations.
            disable_tqdm: has no meaning here.
        """
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[TokenPair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        wordings: defaultdict[tuple[int, ...], dict[tuple[int, ...], None]] = defaultdict(dict)
        for _text, context, continuation in requests:
            wordings[tuple(context)][*context, *continuation] = None
        empty = (self.prefix_token_id,)
        sequences = []
        for _text, context, continuation in requests:
            is_empty = tuple(context) == empty
            # Nothing but the choice itself tells what an empty context is the question of.
            questions = (tuple(continuation),) if is_empty else tuple(wordings[tuple(context)])
            sequences.append(
                ScoredSequence(
                    context=self._cut(context, self.max_length + 1 - len(continuation)),
                    continuation=tuple(continuation),
                    earlier=() if is_empty else None,
                    questions=questions,
                )
            )
        scores = self._score(sequences)
        self.counts.num_scored += len(sequences)
        answers = [(score.total, score.is_greedy) for score in scores]
        for (text, _context, _continuation), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of whole documents, in windows of the longest sequence that is read.

        The windows are the harness's own: they do not overlap, but for the last token of one, which the next begins
        with. A window's first chunk asks with the end of the document before it.

        Args:
            requests: the documents.
            disable_tqdm: has no meaning here.
        """
        sequences: list[ScoredSequence] = []
        counts = []
        for request in requests:
            document = self.tok_encode(request.args[0], add_special_tokens=self._keep_start())
            parts = self._cut_windows(document)
            counts.append(len(parts))
            sequences += parts
        scores = iter(self._score(sequences))
        self.counts.num_documents += len(requests)
        totals = [sum(next(scores).total for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns what the model generates, up to one of the strings that a task ends it with.

        Args:
            requests: the prompts, and how to generate.
            disable_tqdm: has no meaning here.

        Raises:
            InputError: a task has a setting that there is not, or asks for more tokens than the model has room for.
        """
        prompts = [self._read_prompt(request.args[0], request.args[1], row) for row, request in enumerate(requests)]
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row].tokens))
        answers = [""] * len(prompts)
        size = self._evaluated.options.batch_size
        num_done = 0
        with show_stage("generate", len(prompts), "texts", lambda: num_done):
            for start in range(0, len(order), size):
                group = order[start : start + size]
                for row, text in zip(group, self._generate([prompts[row] for row in group]), strict=True):
                    answers[row] = text
                num_done += len(group)
        self.counts.num_generated += len(prompts)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _score(self, sequences: Sequence[ScoredSequence]) -> list[TokenScores]:
        scorer, counts = self._evaluated.scorer, self._evaluated.plain_scorer.counts
        num_before = counts.num_sequences
        # Documents are cut into more sequences where references are text.
        total = len(sequences) if scorer is self._evaluated.plain_scorer else 0
        with show_stage("score", total, "sequences", lambda: counts.num_sequences - num_before):
            return scorer.score(sequences)

    def _keep_start(self) -> bool | None:
        return False if self._evaluated.options.with_bos else None

    def _cut_windows(self, document: list[int]) -> list[ScoredSequence]:
        windows = get_rolling_token_windows(
            token_list=document, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )
        sequences = []
        num_scored = 0
        for window in windows:
            context, continuation = make_disjoint_window(window)
            sequences.append(
                ScoredSequence(
                    context=tuple(context),
                    continuation=tuple(continuation),
                    earlier=tuple(document[: max(0, num_scored - len(context))]),
                    questions=(tuple(document),),
                )
            )
            num_scored += len(continuation)
        return sequences

    def _cut(self, context: Sequence[int], room: int) -> tuple[int, ...]:
        """Returns a context without what there is no room for, which is at its beginning, behind ``<s>``.

        Raises:
            InputError: there is no room for any context.
        """
        bos = self._evaluated.checkpoint.bos_token_ids if self._evaluated.options.with_bos else ()
        if room <= len(bos):
            raise InputError(
                f"a continuation of a task has {self.max_length + 1 - room} tokens; the model reads {self.max_length}: "
                "take another task, or a model with more room"
            )
        if len(context) <= room:
            return tuple(context)
        self.counts.num_cut += 1
        return (*bos, *context[len(context) - room + len(bos) :])

    def _read_prompt(self, text: str, settings: dict[str, Any], row: int) -> _Prompt:
        known = cast("dict[str, Any]", normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS))
        unknown = sorted(known.keys() - SETTINGS)
        if unknown:
            raise InputError(
                f"a task sets {', '.join(unknown)} for generation; memory3 has {', '.join(sorted(SETTINGS))}: take it "
                "out of the task's generation_kwargs"
            )
        config = GenerationConfig(
            max_new_tokens=known["max_gen_toks"],
            temperature=float(known.get("temperature") or 0.0) if known.get("do_sample") else 0.0,
            top_p=float(known.get("top_p", 1.0)),
            repetition_penalty=float(known.get("repetition_penalty", 1.0)),
            seed=row,
            num_memories=self._evaluated.options.num_memories,
            prefetch_tokens=0,
        )
        tokens = self._cut(self.tok_encode(text), self.max_length - config.max_new_tokens)
        return _Prompt(tokens=list(tokens), config=config, stops=tuple(stop for stop in known["until"] if stop))

    def _generate(self, prompts: Sequence[_Prompt]) -> list[str]:
        decode = self._evaluated.checkpoint.tokenizer.decode
        texts = [GrowingText(decode, prompt.stops) for prompt in prompts]
        answers = [""] * len(prompts)
        stream = self._evaluated.generator.stream_tokens(
            [prompt.tokens for prompt in prompts],
            [prompt.config for prompt in prompts],
            lambda row: texts[row].is_stopped,
            self._make_find([(tuple(prompt.tokens),) for prompt in prompts]),
        )
        for tokens in stream:
            for row, token in enumerate(tokens):
                if token is not None:
                    answers[row] += texts[row].add(token)
                    self.counts.num_new_tokens += 1
        return [answer + text.finish() for answer, text in zip(answers, texts, strict=True)]

    def _make_find(self, questions: Sequence[Questions]) -> FindHits | None:
        """Returns the search with the filter, for the prompts of a batch."""
        search = self._evaluated.search
        if search is None:
            return None
        return lambda rows, texts, num_hits: search.search(texts, [questions[row] for row in rows], num_hits)
