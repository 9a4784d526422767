"""``POST /v1/search`` and ``GET /v1/memories/{ref_id}``: what the bank holds, without generating anything.

Done in a thread of its own, one request at a time, so that the thread of the model goes on.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from flows.serving.bounded_pool import BoundedPool
from flows.serving.editions import Edition, Shelf
from flows.serving.errors import ApiError
from flows.serving.response_models import DescribedMemory, FoundMemory, KeptHead, SearchAnswer, Source
from flows.serving.settings import ServingConfig
from flows.showing import cut_tokens
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.records import EMPTY_SLOT

MAX_SOURCES = 20
"""Places of a reference that are told; what stands on every page stands in many."""

T = TypeVar("T")


def list_sources(bank: Bank, ref_ids: Sequence[str]) -> dict[str, list[Source]]:
    """Returns where references stand, in the order of the documents.

    Raises:
        BankFormatError: a table is missing or damaged.
    """
    columns = ["ref_id", "doc_id", "ordinal", "start_char", "end_char"]
    places = bank.read_rows("occurrences", "ref_id", ref_ids, columns).to_pylist()
    ids = [place["doc_id"] for place in places]
    rows = bank.read_rows("documents", "doc_id", ids, ["doc_id", "title", "source"]).to_pylist()
    documents = {row["doc_id"]: row for row in rows}
    sources: dict[str, list[Source]] = {ref_id: [] for ref_id in ref_ids}
    for place in places:
        sources[place["ref_id"]].append(Source.model_validate({**place, **documents[place["doc_id"]]}))
    return sources


def find_references(edition: Edition, query: str, num_hits: int) -> SearchAnswer:
    """Searches a version.

    Raises:
        BankFormatError: a table is missing or damaged.
    """
    hits = edition.search.search([query], num_hits)[0]
    ref_ids = [hit.ref_id for hit in hits]
    texts = edition.bank.read_references(ref_ids, ["text"])["text"].to_pylist() if hits else []
    sources = list_sources(edition.bank, ref_ids)
    return SearchAnswer(
        version=edition.version,
        hits=[
            FoundMemory(
                ref_id=hit.ref_id,
                score=hit.score,
                text=text,
                num_sources=len(sources[hit.ref_id]),
                sources=sources[hit.ref_id][:MAX_SOURCES],
            )
            for hit, text in zip(hits, texts, strict=True)
        ],
    )


def list_kept(edition: Edition, ref_id: str) -> list[KeptHead] | None:
    """Returns what each head of each memory layer keeps of a reference; None if it is not live.

    Raises:
        BankFormatError: there is no memory, or it is damaged.
    """
    try:
        records = edition.memories.fetch_records([ref_id])
    except InputError:
        return None
    _, offsets_NLHS = edition.bank.manifest.layout.unpack(records, [ref_id])
    return [
        KeptHead(layer=layer, head=head, tokens=np.sort(of_head[of_head != EMPTY_SLOT]).tolist())
        for layer, of_layer in zip(edition.checkpoint.memory_layers, offsets_NLHS[0], strict=True)
        for head, of_head in enumerate(of_layer)
    ]


def describe_memory(edition: Edition, ref_id: str) -> DescribedMemory:
    """Collects what a version knows of a reference.

    Raises:
        ApiError: it has no such reference.
        BankFormatError: a file is missing or damaged.
    """
    bank = edition.bank
    rows = bank.read_rows("references", "ref_id", [ref_id], ["text", "num_tokens"]).to_pylist()
    if not rows:
        raise ApiError(
            404,
            f"version {edition.version} of the bank has no reference {ref_id}; find one with /v1/search",
            param="ref_id",
        )
    kept = list_kept(edition, ref_id)
    kept_for = bank.read_rows("duplicates", "ref_id", [ref_id], ["kept_ref_id"])["kept_ref_id"].to_pylist()
    sources = list_sources(bank, [ref_id])[ref_id]
    return DescribedMemory(
        version=edition.version,
        ref_id=ref_id,
        text=rows[0]["text"],
        tokens=cut_tokens(edition.checkpoint.tokenizer, rows[0]["text"]),
        num_tokens=rows[0]["num_tokens"],
        is_live=kept is not None,
        kept_for=kept_for[0] if kept_for else None,
        num_sources=len(sources),
        sources=sources[:MAX_SOURCES],
        kept=kept or [],
    )


class LookingUp:
    """Looks things up in the edition of the moment, one request at a time."""

    def __init__(self, config: ServingConfig, shelf: Shelf) -> None:
        """Makes the thread that does it."""
        self._shelf = shelf
        self._pool = BoundedPool(num_threads=1, max_queue=config.max_queue, timeout_seconds=config.timeout_seconds)

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Calls a function with the edition of the moment and what else is given.

        Raises:
            ApiError: too many wait, or it was not done in time.
            BankError: what the function raises.
        """
        return await self._pool.run(function, self._shelf.edition, *arguments)

    async def close(self) -> None:
        """Ends the thread."""
        await self._pool.close()
