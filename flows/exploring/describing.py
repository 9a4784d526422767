"""A version and its references as the page shows them: text, memory, state, places and near-duplicates.

Everything is read from the tables of a version by id, so that a look at a large bank costs what a look at a small one
does. Memories are read only in the version that is served, for whose model they are; of others the table ``memories``
says which tokens were kept.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flows.exploring.answers import (
    ExploredBank,
    ExploredReference,
    Pair,
    PairPage,
    Place,
    PlacePage,
    Snippet,
    Snippets,
    State,
    Stretch,
)
from flows.exploring.opened_versions import OpenedVersions
from flows.reporting.marking import mark_differences
from flows.serving.editions import Edition
from flows.serving.errors import ApiError
from flows.serving.looking_up import list_kept
from flows.serving.response_models import KeptHead
from flows.showing import cut_tokens
from schemas.bank import Bank
from schemas.records import EMPTY_SLOT

NUM_EXAMPLES = 6

EXAMPLE_ROWS = 24
"""References of which examples are chosen: the longest of them say the most."""


def describe_bank(edition: Edition, model_name: str) -> ExploredBank:
    """Describes the version that is served.

    Raises:
        BankFormatError: a table is missing or damaged.
    """
    manifest, layout = edition.bank.manifest, edition.bank.manifest.layout
    return ExploredBank(
        bank=edition.bank.url,
        version=edition.version,
        created_at=manifest.created_at,
        model=model_name,
        model_tokens=edition.make_generator(with_memory=True).num_places,
        num_documents=manifest.counts.get("documents", {}).get("kept"),
        num_references=manifest.counts.get("references", {}).get("kept"),
        memory_layers=manifest.fingerprint.memory_layers,
        num_heads=layout.num_kv_heads,
        num_slots=layout.num_slots,
        memory_bytes=layout.payload_bytes,
        codec=layout.codec,
        is_cold=manifest.cold,
        examples=_choose_examples(edition.bank),
    )


def _choose_examples(bank: Bank) -> list[Snippet]:
    """Returns the longest live ones among some references: they are sorted by digest, so any part is a fair one."""
    # An update's segment may have few, and of one document.
    largest = max(bank.manifest.list_files("references"), key=lambda file: file.num_rows, default=None)
    batch = next(bank.iterate_table(largest, ["ref_id", "num_tokens"], EXAMPLE_ROWS), None) if largest else None
    if batch is None:
        return []
    rows = sorted(batch.to_pylist(), key=lambda row: (-row["num_tokens"], row["ref_id"]))
    ref_ids = [row["ref_id"] for row in rows]
    dropped = find_states(bank, ref_ids)
    return list_snippets(bank, [ref_id for ref_id in ref_ids if ref_id not in dropped][:NUM_EXAMPLES])


def find_states(bank: Bank, ref_ids: Sequence[str]) -> dict[str, State]:
    """Returns why references are not live; those that are live are left out.

    Raises:
        BankFormatError: a table is missing or damaged.
    """
    states: dict[str, State] = {}
    # What is deleted is so whatever else it is, as for reading (model.bank_records.DroppedReferences).
    kinds: tuple[tuple[str, State], ...] = (
        ("duplicates", "near_duplicate"),
        ("contaminated", "contaminated"),
        ("tombstones", "deleted"),
    )
    for kind, state in kinds:
        for ref_id in bank.read_rows(kind, "ref_id", ref_ids, ["ref_id"])["ref_id"].to_pylist():
            states[ref_id] = state
    return states


def list_snippets(bank: Bank, ref_ids: Sequence[str]) -> list[Snippet]:
    """Returns references in short, in the order asked for, without those that the version does not have.

    Raises:
        BankFormatError: a table is missing or damaged.
    """
    rows = bank.read_rows("references", "ref_id", ref_ids, ["ref_id", "text"]).to_pylist()
    texts = {row["ref_id"]: row["text"] for row in rows}
    documents: dict[str, str] = {}
    for place in bank.read_rows("occurrences", "ref_id", ref_ids, ["ref_id", "doc_id"]).to_pylist():
        documents.setdefault(place["ref_id"], place["doc_id"])
    return [
        Snippet(ref_id=ref_id, doc_id=documents.get(ref_id, ""), text=texts[ref_id])
        for ref_id in ref_ids
        if ref_id in texts
    ]


def describe_snippets(
    edition: Edition, opened: OpenedVersions, ref_ids: Sequence[str], version: int | None
) -> Snippets:
    """Describes several references in short.

    Raises:
        ApiError: there is no such version.
        BankFormatError: a table is missing or damaged.
    """
    bank = opened.get(edition, version)
    return Snippets(version=bank.manifest.version, references=list_snippets(bank, ref_ids))


def _read_reference(bank: Bank, ref_id: str) -> dict[str, Any]:
    rows = bank.read_rows("references", "ref_id", [ref_id], ["text", "num_tokens"]).to_pylist()
    if not rows:
        raise ApiError(
            404, f"version {bank.manifest.version} of the bank has no reference {ref_id}; it may be in another version"
        )
    return dict(rows[0])


def _read_first(bank: Bank, kind: str, ref_id: str, columns: list[str]) -> dict[str, Any]:
    """Returns what a table has of a reference, None in every column if nothing."""
    rows = bank.read_rows(kind, "ref_id", [ref_id], columns).to_pylist()
    return rows[0] if rows else dict.fromkeys(columns)


def _list_stored(bank: Bank, ref_id: str) -> list[KeptHead]:
    """Returns what each head keeps of a live reference, as the table ``memories`` has it; nothing in a cold bank."""
    if not bank.manifest.list_files("memories"):
        return []
    rows = bank.read_rows("memories", "ref_id", [ref_id], ["offsets"])["offsets"].to_pylist()
    if not rows:
        return []
    offsets_LHS = np.asarray(rows[0]).reshape(bank.manifest.layout.offsets_shape)
    return [
        KeptHead(layer=layer, head=head, tokens=np.sort(of_head[of_head != EMPTY_SLOT]).tolist())
        for layer, of_layer in zip(bank.manifest.fingerprint.memory_layers, offsets_LHS, strict=True)
        for head, of_head in enumerate(of_layer)
    ]


def describe_reference(edition: Edition, opened: OpenedVersions, ref_id: str, version: int | None) -> ExploredReference:
    """Describes a reference and its memory.

    Raises:
        ApiError: there is no such version, or it has no such reference.
        BankFormatError: a file is missing or damaged.
    """
    bank = opened.get(edition, version)
    manifest, layout = bank.manifest, bank.manifest.layout
    row = _read_reference(bank, ref_id)
    state = find_states(bank, [ref_id]).get(ref_id, "live")
    kept = []
    if state == "live":
        kept = (list_kept(edition, ref_id) or []) if bank is edition.bank else _list_stored(bank, ref_id)
    is_readable = manifest.fingerprint.tokenizer == edition.bank.manifest.fingerprint.tokenizer
    tokens = cut_tokens(edition.checkpoint.tokenizer, row["text"]) if is_readable else [row["text"]]
    return ExploredReference(
        version=manifest.version,
        served_version=edition.version,
        ref_id=ref_id,
        text=row["text"],
        tokens=tokens,
        num_tokens=row["num_tokens"],
        state=state,
        **_read_first(bank, "duplicates", ref_id, ["kept_ref_id", "jaccard"]),
        **_read_first(bank, "contaminated", ref_id, ["matched_doc_id", "overlap"]),
        num_sources=len(bank.read_rows("occurrences", "ref_id", [ref_id], ["ordinal"])),
        num_duplicates=len(bank.read_rows("duplicates", "kept_ref_id", [ref_id], ["ref_id"])),
        memory_bytes=layout.payload_bytes if state == "live" else 0,
        memory_layers=manifest.fingerprint.memory_layers,
        num_heads=layout.num_kv_heads,
        num_slots=layout.num_slots,
        kept=kept if is_readable else [],
    )


def list_places(
    edition: Edition, opened: OpenedVersions, ref_id: str, version: int | None, start: int, limit: int
) -> PlacePage:
    """Lists where a reference stands, with its neighbours there.

    Args:
        edition: the version that is served.
        opened: other versions.
        ref_id: the reference.
        version: version to look into; None is the one that is served.
        start: places to leave out.
        limit: places to list at most.

    Raises:
        ApiError: there is no such version, or it has no such reference.
        BankFormatError: a table is missing or damaged.
    """
    bank = opened.get(edition, version)
    _read_reference(bank, ref_id)
    spans = ["start_byte", "end_byte", "start_char", "end_char"]
    places = bank.read_rows("occurrences", "ref_id", [ref_id], ["doc_id", "ordinal", *spans])
    total = len(places)
    listed = places.slice(start, limit).to_pylist()
    doc_ids = [place["doc_id"] for place in listed]
    columns = ["doc_id", "title", "source", "path", "num_references"]
    documents = {row["doc_id"]: row for row in bank.read_rows("documents", "doc_id", doc_ids, columns).to_pylist()}
    around = bank.read_rows("occurrences", "doc_id", doc_ids, ["doc_id", "ordinal", "ref_id"]).to_pylist()
    ref_id_at = {(row["doc_id"], row["ordinal"]): row["ref_id"] for row in around}
    return PlacePage(
        version=bank.manifest.version,
        total=total,
        places=[
            Place(
                **place,
                **{name: documents[place["doc_id"]][name] for name in columns[1:]},
                previous_ref_id=ref_id_at.get((place["doc_id"], place["ordinal"] - 1)),
                next_ref_id=ref_id_at.get((place["doc_id"], place["ordinal"] + 1)),
            )
            for place in listed
        ],
    )


def list_pairs(
    edition: Edition, opened: OpenedVersions, ref_id: str, version: int | None, start: int, limit: int
) -> PairPage:
    """Lists the near-duplicates of a reference, side by side with it; the arguments are those of :func:`list_places`.

    Raises:
        ApiError: there is no such version, or it has no such reference.
        BankFormatError: a table is missing or damaged.
    """
    bank = opened.get(edition, version)
    text = _read_reference(bank, ref_id)["text"]
    kept_for = bank.read_rows("duplicates", "ref_id", [ref_id], ["kept_ref_id", "jaccard"]).to_pylist()
    dropped = bank.read_rows("duplicates", "kept_ref_id", [ref_id], ["ref_id", "jaccard"]).to_pylist()
    found = [(row["jaccard"], row["kept_ref_id"], True) for row in kept_for]
    found += [(row["jaccard"], row["ref_id"], False) for row in dropped]
    found.sort(key=lambda one: (-one[0], one[1]))
    listed = found[start : start + limit]
    texts = bank.read_references([other for _, other, _ in listed], ["text"])["text"].to_pylist() if listed else []
    pairs = []
    for (jaccard, other, is_kept), other_text in zip(listed, texts, strict=True):
        own, theirs = (
            [Stretch(text=span.text, differs=span.differs) for span in side]
            for side in mark_differences(text, other_text)
        )
        pairs.append(Pair(ref_id=other, is_kept=is_kept, jaccard=jaccard, own=own, other=theirs))
    return PairPage(version=bank.manifest.version, total=len(found), pairs=pairs)
