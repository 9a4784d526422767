"""Memories that keep their context: a document is encoded as one text, and its key-values are cut into references.

Source: Remark 3 of the paper (method section 9), which leaves it as future work. A memory of the bank comes from its
reference alone; here a reference's tokens have seen the references that stand before it. Which tokens are kept follows
the same rule as for references alone: attention within the reference. A document is read in windows of a few
references, as long as the sequences a model was trained on, and a reference is cut from the window that it stands in.
The cost is that of the same tokens read alone, but for attention, which grows with the window.

Shape letters: B references, T tokens, L memory layers, H KV heads, G query heads a KV head, N = H x G, S slots,
D head dimension.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from model.attention import WritingTap
from model.checkpoint import Checkpoint
from model.fresh_memories import join_memories, read_tokens, take_memories
from model.selecting import SelectionConfig, choose_tokens, gather_slots
from model.writing import Memories, read_behind_prefix
from schemas.bank import Bank
from schemas.protocols import IntArray

WINDOW_REFERENCES = 4
"""References that are read as one text: 512 tokens of references of 128."""


@torch.inference_mode()
def encode_window(
    checkpoint: Checkpoint, references: Sequence[IntArray], wanted: Sequence[int], selection: SelectionConfig
) -> Memories:
    """Encodes references that follow each other as one text, and cuts some of them out.

    Args:
        checkpoint: the model.
        references: tokens of each, at least one.
        wanted: which of them memories are returned of, at least one.
        selection: which tokens of each are kept.

    Returns:
        a memory of each wanted reference, in their order; offsets count from the beginning of the reference.
    """
    tokens_T = torch.from_numpy(np.concatenate(references).astype(np.int64)).to(checkpoint.device)
    first = len(checkpoint.prefix_token_ids)
    positions_T = torch.arange(first, first + len(tokens_T), device=checkpoint.device)
    tap = WritingTap(memory_layers=checkpoint.memory_layers)
    read_behind_prefix(checkpoint, tokens_T[None], tap)
    # Cell t of reference b is token rows_BT[b, t] of the window; cells past its end have any token.
    lengths = torch.tensor([len(ids) for ids in references], device=checkpoint.device)
    starts = (lengths.cumsum(0) - lengths)[list(wanted)]
    lengths = lengths[list(wanted)]
    places_T = torch.arange(int(lengths.max()), device=checkpoint.device)
    valid_BT = places_T < lengths[:, None]
    rows_BT = torch.where(valid_BT, starts[:, None] + places_T, 0)
    keys, values, offsets = [], [], []
    for layer, (query, key, value) in zip(checkpoint.memory_layers, tap.kept, strict=True):
        rotary = checkpoint.rotaries[layer]
        angles = rotary.reverse_angles(query, positions_T)
        query_NTD, key_HTD = (part[0] for part in rotary.unrotate_pair(query[:, :, first:], key[:, :, first:], angles))
        query_BNTD, key_BHTD, value_BHTD = (
            part[:, rows_BT].movedim(1, 0) for part in (query_NTD, key_HTD, value[0, :, first:])
        )
        query_BHGTD = query_BNTD.unflatten(1, (key_BHTD.shape[1], -1))
        scaling = checkpoint.attention_scaling
        kept_BHS = choose_tokens(query_BHGTD, key_BHTD, valid_BT, scaling=scaling, selection=selection)
        keys.append(gather_slots(key_BHTD, kept_BHS))
        values.append(gather_slots(value_BHTD, kept_BHS))
        offsets.append(kept_BHS)
    return Memories(keys_LBHSD=torch.stack(keys), values_LBHSD=torch.stack(values), offsets_LBHS=torch.stack(offsets))


class ContextualWriter:
    """Writes the memories of a bank's references within their documents.

    A reference that stands in several places is read where it stands first, by id of the document; a near-duplicate
    that was dropped is read as the reference that was kept in its place.
    """

    def __init__(
        self,
        bank: Bank,
        checkpoint: Checkpoint,
        selection: SelectionConfig,
        *,
        num_references: int = WINDOW_REFERENCES,
    ) -> None:
        """Reads where references stand.

        Args:
            bank: the bank.
            checkpoint: the model.
            selection: which tokens are kept.
            num_references: references of a window.

        Raises:
            BankFormatError: a table is missing or damaged.
        """
        self._bank, self._checkpoint, self._selection = bank, checkpoint, selection
        duplicates = bank.read_table("duplicates", ["ref_id", "kept_ref_id"])
        kept = dict(zip(duplicates["ref_id"].to_pylist(), duplicates["kept_ref_id"].to_pylist(), strict=True))
        table = bank.read_table("occurrences", ["doc_id", "ordinal", "ref_id"])
        ref_ids = [kept.get(ref_id, ref_id) for ref_id in table["ref_id"].to_pylist()]
        table = table.set_column(table.schema.get_field_index("ref_id"), "ref_id", pa.array(ref_ids, pa.string()))
        # What was dropped for another reason than being a duplicate has no text here.
        live = bank.read_table("references", ["ref_id"])["ref_id"].combine_chunks()
        table = table.filter(pc.is_in(table["ref_id"], live))
        table = table.sort_by([("doc_id", "ascending"), ("ordinal", "ascending")])
        self._ref_ids: list[str] = table["ref_id"].to_pylist()
        self._windows = number_windows(table, num_references)
        self._places: dict[str, int] = {}
        for place, ref_id in enumerate(self._ref_ids):
            self._places.setdefault(ref_id, place)

    def write(self, ref_ids: Sequence[str]) -> Memories:
        """Returns the memories of live references, at least one, in their order."""
        windows: dict[int, list[int]] = {}
        for row, ref_id in enumerate(ref_ids):
            windows.setdefault(int(self._windows[self._places[ref_id]]), []).append(row)
        parts: list[Memories] = []
        order: list[int] = []
        for window, rows in windows.items():
            first, end = np.searchsorted(self._windows, [window, window + 1])
            tokens = read_tokens(self._bank, self._ref_ids[first:end])
            wanted = [self._places[ref_ids[row]] - int(first) for row in rows]
            parts.append(encode_window(self._checkpoint, tokens, wanted, self._selection))
            order += rows
        return take_memories(join_memories(parts), np.argsort(order).tolist())


def number_windows(occurrences: pa.Table, num_references: int) -> IntArray:
    """Returns for each row the number of its window, ascending: so many rows of one document at most.

    Args:
        occurrences: columns ``doc_id`` and ``ordinal``, sorted by both.
        num_references: rows of a window.
    """
    documents = pc.dictionary_encode(occurrences["doc_id"].combine_chunks()).indices.to_numpy().astype(np.int64)
    rows = np.arange(len(documents))
    begins = np.diff(documents, prepend=-1) != 0
    place = rows - np.maximum.accumulate(np.where(begins, rows, 0))
    numbers: IntArray = np.cumsum(place % num_references == 0).astype(np.int32)
    return numbers
