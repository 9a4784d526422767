"""References as text in the prompt (RAG): the honest baseline of memory, on the same model with the same retrieval.

The question is that of the memories, the last 64 tokens of the prompt; its references stand before the prompt, each
after ``Reference:``, the best one nearest to the prompt.
"""

from collections.abc import Sequence

from model.checkpoint import PREFIX_TEXT, Checkpoint
from model.retrieving import Hit, MemorySearch
from schemas.bank import Bank


class ReferenceTexts:
    """Finds references and lays out their tokens."""

    def __init__(self, checkpoint: Checkpoint, bank: Bank, retriever: MemorySearch) -> None:
        """Joins the model that reads the text with a bank."""
        self._checkpoint, self._bank, self._retriever = checkpoint, bank, retriever
        encode = checkpoint.tokenizer.encode
        self._before, self._after = (part.tolist() for part in encode([PREFIX_TEXT + " ", "\n\n"]))

    def count_tokens(self, num_references: int) -> int:
        """Returns how many tokens so many references take in a prompt at most."""
        longest = self._checkpoint.max_reference_tokens
        return num_references * (len(self._before) + longest + len(self._after))

    def find(self, queries: Sequence[Sequence[int]], num_references: int) -> list[list[Hit]]:
        """Returns the references of each question, best first."""
        texts = [self._checkpoint.tokenizer.decode(query) for query in queries]
        return self._retriever.search(texts, num_references)

    def lay_out(self, hits: Sequence[Sequence[Hit]]) -> list[list[int]]:
        """Returns for each question the tokens of its references as they stand before the prompt."""
        ref_ids = list(dict.fromkeys(hit.ref_id for of_query in hits for hit in of_query))
        if not ref_ids:
            return [[] for _ in hits]
        rows = self._bank.read_references(ref_ids, ["token_ids"])["token_ids"].to_pylist()
        tokens = dict(zip(ref_ids, rows, strict=True))
        return [
            [token for hit in reversed(of_query) for token in (*self._before, *tokens[hit.ref_id], *self._after)]
            for of_query in hits
        ]
