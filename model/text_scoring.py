"""Log-likelihoods with references as text in the prompt (RAG): what :mod:`model.loglikelihoods` is compared with.

A prompt gets its references once, found with the 64 tokens that end it, as in generation. A document gets them anew for
every 64 tokens, found with the 64 before these, as its chunks get memories; each such piece is read on its own, behind
its references and as much of the document before it as there is room for.
"""

from collections.abc import Sequence

import numpy as np

from model.loglikelihoods import ScoredSequence, SequenceScorer, TokenScores
from model.overlap_filter import QuestionSearch
from model.reading import CHUNK_TOKENS, MEMORIES_PER_CHUNK
from model.text_references import ReferenceTexts


def cut_document(sequence: ScoredSequence) -> list[ScoredSequence]:
    """Cuts a part of a document at its chunks into pieces, whose context is all that stands before them."""
    tokens, num_given = sequence.tokens, len(sequence.context)
    assert sequence.earlier is not None
    # A piece begins where a chunk does; the first one has what the context leaves of its chunk.
    starts = [num_given, *range(CHUNK_TOKENS * (num_given // CHUNK_TOKENS + 1), len(tokens), CHUNK_TOKENS)]
    ends = [*starts[1:], len(tokens)]
    return [
        ScoredSequence(
            context=tokens[:start],
            continuation=tokens[start:end],
            earlier=(*sequence.earlier, *tokens[: CHUNK_TOKENS * (start // CHUNK_TOKENS)]),
            questions=sequence.questions,
        )
        for start, end in zip(starts, ends, strict=True)
    ]


class TextScorer:
    """Scores sequences behind references that it puts before them as text.

    Attributes:
        scorer: the ordinary model.
    """

    def __init__(
        self,
        scorer: SequenceScorer,
        search: QuestionSearch,
        texts: ReferenceTexts,
        *,
        num_references: int = MEMORIES_PER_CHUNK,
        max_prompt_tokens: int | None = None,
    ) -> None:
        """Joins a model with the references of a bank.

        Args:
            scorer: the ordinary model.
            search: finds references.
            texts: lays them out.
            num_references: references of a prompt, or of 64 tokens of a document.
            max_prompt_tokens: the longest prompt with its references and what is scored: of a longer one the beginning
                of the context is cut off. None refuses sequences for which there may be no room.
        """
        self._max_prompt_tokens = max_prompt_tokens
        self.scorer = scorer
        self._search, self._texts, self._num_references = search, texts, num_references

    @property
    def max_tokens(self) -> int:
        """The longest sequence, as :attr:`SequenceScorer.max_tokens`: what references may take is left free."""
        if self._max_prompt_tokens is not None:
            return self.scorer.max_tokens
        return max(1, self.scorer.max_tokens - self._texts.count_tokens(self._num_references))

    def score(self, sequences: Sequence[ScoredSequence]) -> list[TokenScores]:
        """Returns the scores of each sequence, in their order.

        Raises:
            InputError: a sequence does not fit the model together with its references.
        """
        pieces = [[sequence] if sequence.earlier is None else cut_document(sequence) for sequence in sequences]
        laid_out = self._put_references([piece for of_sequence in pieces for piece in of_sequence])
        scores = iter(self.scorer.score(laid_out))
        return [_join([next(scores) for _ in of_sequence]) for of_sequence in pieces]

    def _put_references(self, pieces: Sequence[ScoredSequence]) -> list[ScoredSequence]:
        bos, decode = self.scorer.checkpoint.bos_token_ids, self.scorer.checkpoint.tokenizer.decode
        queries = [(piece.context if piece.earlier is None else piece.earlier)[-CHUNK_TOKENS:] for piece in pieces]
        questions = [piece.questions for piece in pieces]
        hits = self._search.search([decode(query) for query in queries], questions, self._num_references)
        ready = []
        for piece, before in zip(pieces, self._texts.lay_out(hits), strict=True):
            num_bos = len(bos) if piece.context[: len(bos)] == bos else 0
            context = piece.context[num_bos:]
            if self._max_prompt_tokens is not None:
                room = self._max_prompt_tokens - num_bos - len(before) - len(piece.continuation)
                context = context[max(0, len(context) - max(1, room)) :]
            ready.append(
                ScoredSequence(
                    context=(*piece.context[:num_bos], *before, *context),
                    continuation=piece.continuation,
                )
            )
        return ready


def _join(parts: Sequence[TokenScores]) -> TokenScores:
    return TokenScores(
        logprobs=np.concatenate([part.logprobs for part in parts]),
        is_likeliest=np.concatenate([part.is_likeliest for part in parts]),
    )
