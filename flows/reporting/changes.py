"""How a version differs from its parent, with samples of the references that came and went."""

import numpy as np
import pyarrow as pa

from flows.history import compare_versions
from flows.reporting.contents import Changes, DocumentChange, ReferenceSample
from schemas.bank import Bank
from schemas.errors import InputError

MAX_LISTED_IDS = 20
NUM_SAMPLES = 5


def describe_changes(bank: Bank, seed: int) -> Changes:
    """Compares a version with its parent.

    Raises:
        InputError: it has none, or the parent is gone.
        BankFormatError: a table is missing or damaged.
    """
    number = bank.manifest.parent
    if number is None:
        raise InputError("it is the first version, all of it is new")
    parent = Bank.open(bank.store, number)
    difference = compare_versions(parent, bank)
    documents = [
        DocumentChange(what=what, count=len(doc_ids), doc_ids=doc_ids[:MAX_LISTED_IDS].to_pylist())
        for what, doc_ids in (
            ("added", difference.documents_added),
            ("changed", difference.documents_changed),
            ("removed", difference.documents_removed),
        )
    ]
    return Changes(
        parent=number,
        documents=documents,
        num_references_added=len(difference.references_added),
        num_references_removed=len(difference.references_removed),
        references_added=sample_references(bank, difference.references_added, seed),
        references_removed=sample_references(parent, difference.references_removed, seed),
        settings=difference.config,
        fingerprint=difference.fingerprint,
    )


def sample_references(bank: Bank, ref_ids: pa.Array, seed: int) -> list[ReferenceSample]:
    """Returns some references of a version, drawn by a seed, with their texts.

    Raises:
        BankFormatError: a table is missing or damaged.
    """
    if not len(ref_ids):
        return []
    rows = np.random.default_rng(seed).choice(len(ref_ids), min(NUM_SAMPLES, len(ref_ids)), replace=False)
    drawn = ref_ids.take(pa.array(np.sort(rows))).to_pylist()
    texts = bank.read_references(drawn, ["text"])["text"].to_pylist()
    places = bank.read_rows("occurrences", "ref_id", drawn, ["ref_id", "doc_id"])
    document_of: dict[str, str] = {}
    for ref_id, doc_id in zip(places["ref_id"].to_pylist(), places["doc_id"].to_pylist(), strict=True):
        document_of.setdefault(ref_id, doc_id)
    return [
        ReferenceSample(ref_id=ref_id, doc_id=document_of.get(ref_id, ""), text=text)
        for ref_id, text in zip(drawn, texts, strict=True)
    ]
