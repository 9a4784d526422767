"""``memory3 show``: one reference with the words its memory kept, where it stands, and what it stands for."""

import dataclasses
from typing import Any

import numpy as np
import pyarrow.compute as pc

from model.tokenizing import CheckpointTokenizer, load_tokenizer
from schemas.bank import Bank
from schemas.errors import BankFormatError, InputError, WrongModelError
from schemas.identifiers import ID_LENGTH
from schemas.records import EMPTY_SLOT


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownToken:
    """A token of a reference.

    Attributes:
        text: its text.
        num_heads: heads of all memory layers that kept it.
    """

    text: str
    num_heads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownReference:
    """A reference as a person wants to see it.

    Attributes:
        ref_id: its id.
        num_tokens: its length.
        tokens: its tokens in order; their texts join to its text.
        num_heads: memory layers x KV heads: how many heads could have kept a token.
        kept_for: the reference it was dropped for as a near-duplicate, or None.
        contaminated: the test text it gives away and by which overlap, or None; it is live if this and the last are.
        occurrences: where it stands: doc_id, ordinal, start_char, end_char.
        duplicates: near-duplicates dropped for it: ref_id and jaccard.
    """

    ref_id: str
    num_tokens: int
    tokens: list[ShownToken]
    num_heads: int
    kept_for: dict[str, Any] | None
    contaminated: dict[str, Any] | None
    occurrences: list[dict[str, Any]]
    duplicates: list[dict[str, Any]]


def _select(bank: Bank, kind: str, column: str, value: str, columns: list[str]) -> list[dict[str, Any]]:
    return bank.read_rows(kind, column, [value], columns).to_pylist()  # type: ignore[no-any-return]


def complete_ref_id(bank: Bank, beginning: str) -> str:
    """Returns the id that begins so.

    Raises:
        InputError: the text is no beginning of an id, or of several.
        BankFormatError: no reference of the bank begins so.
    """
    if len(beginning) == ID_LENGTH:
        return beginning
    if len(beginning) < 4 or not set(beginning) <= set("0123456789abcdef"):
        raise InputError(f"{beginning!r} is no reference id; give its 32 hexadecimal digits, or at least the first 4")
    ids = bank.read_table("references", ["ref_id"])["ref_id"]
    found = ids.filter(pc.starts_with(ids, beginning)).to_pylist()
    if not found:
        raise BankFormatError(f"bank {bank.url} has no reference that begins with {beginning}")
    if len(found) > 1:
        raise InputError(f"{len(found)} references begin with {beginning}; give more digits, for instance {found[0]}")
    return str(found[0])


def _count_heads(bank: Bank, ref_id: str, num_tokens: int) -> np.ndarray:
    counts = np.zeros(num_tokens, dtype=np.int64)
    if bank.manifest.cold:
        return counts
    for row in _select(bank, "memories", "ref_id", ref_id, ["offsets"]):
        offsets = np.asarray(row["offsets"])
        np.add.at(counts, offsets[offsets != EMPTY_SLOT], 1)
    return counts


def cut_tokens(tokenizer: CheckpointTokenizer, text: str) -> list[str]:
    """Returns the texts of a text's tokens, which join to it; one more where text follows the last token."""
    parts, end = [], 0
    for _, stop in tokenizer.find_spans(text):
        parts.append(text[end:stop])
        end = max(end, stop)
    return [*parts, text[end:]] if end < len(text) else parts


def describe_reference(bank: Bank, beginning: str) -> ShownReference:
    """Collects what a bank knows of one reference.

    Args:
        bank: the version to look into.
        beginning: the reference's id, or its first digits.

    Raises:
        BankFormatError: there is no such reference.
        WrongModelError: the bank's tokenizer is not at hand any more.
    """
    ref_id = complete_ref_id(bank, beginning)
    rows = _select(bank, "references", "ref_id", ref_id, ["text", "num_tokens"])
    if not rows:
        raise BankFormatError(f"bank {bank.url} has no reference {ref_id}; find one with: memory3 search")
    text, num_tokens = rows[0]["text"], rows[0]["num_tokens"]
    tokenizer = load_tokenizer(bank.manifest.config["memory"]["model"])
    if tokenizer.tokenizer_id != bank.manifest.fingerprint.tokenizer:
        model = bank.manifest.config["memory"]["model"]
        raise WrongModelError(
            f"bank {bank.url} was built with another tokenizer than that of {model}; "
            "restore the model it was built with, or build the bank again"
        )
    heads = _count_heads(bank, ref_id, num_tokens).tolist()
    texts = cut_tokens(tokenizer, text)
    tokens = [
        ShownToken(text=part, num_heads=num_heads)
        for part, num_heads in zip(texts, [*heads, 0][: len(texts)], strict=True)
    ]
    contaminated = _select(bank, "contaminated", "ref_id", ref_id, ["matched_doc_id", "overlap"])
    kept_for = _select(bank, "duplicates", "ref_id", ref_id, ["kept_ref_id", "jaccard"])
    layout = bank.manifest.layout
    return ShownReference(
        ref_id=ref_id,
        num_tokens=num_tokens,
        tokens=tokens,
        num_heads=layout.num_layers * layout.num_kv_heads,
        kept_for=kept_for[0] if kept_for else None,
        contaminated=contaminated[0] if contaminated else None,
        occurrences=_select(bank, "occurrences", "ref_id", ref_id, ["doc_id", "ordinal", "start_char", "end_char"]),
        duplicates=_select(bank, "duplicates", "kept_ref_id", ref_id, ["ref_id", "jaccard"]),
    )
