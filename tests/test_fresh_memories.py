"""Memories written when asked for: those of a bank, in any order, through a codec, and within their documents."""

from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from model.baseline_searches import EmptySearch, RandomSearch, RememberedSearch
from model.checkpoint import Checkpoint
from model.coding import load_codec
from model.contextual_writing import ContextualWriter, encode_window
from model.fetching import BankMemories
from model.fresh_memories import CodedMemories, FreshMemories, read_tokens, write_alone
from model.overlap_filter import FilteredSearch
from model.retrieving import Retriever
from model.selecting import SelectionConfig
from model.writing import Memories, ReferenceWriter
from schemas.bank import Bank
from schemas.records import EMPTY_SLOT
from tests.banks import get_embedder, make_bank
from tests.models import make_checkpoint
from tests.servers import build_bank

ARCHITECTURES = ("llama", "llama-rope-scaled", "qwen3")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return make_checkpoint("llama")


@pytest.fixture(scope="module")
def writer(checkpoint: Checkpoint) -> ReferenceWriter:
    return ReferenceWriter(checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def bank(writer: ReferenceWriter, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("bank"), writer)


def list_ids(bank: Bank) -> list[str]:
    ids: list[str] = bank.read_table("references", ["ref_id"])["ref_id"].to_pylist()
    return ids


def assert_same(found: Memories, wanted: Memories, tolerance: float = 1e-5) -> None:
    assert torch.equal(found.offsets_LBHS, wanted.offsets_LBHS)
    torch.testing.assert_close(found.keys_LBHSD, wanted.keys_LBHSD, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.values_LBHSD, wanted.values_LBHSD, atol=tolerance, rtol=tolerance)


def test_fresh_memories_are_those_of_the_bank(bank: Bank, writer: ReferenceWriter) -> None:
    ids = list_ids(bank)[::-1]
    ids = [*ids[5:12], ids[0], ids[6], *ids[1:4]]
    fresh = FreshMemories(lambda some: write_alone(bank, writer.checkpoint, writer.selection, some))
    assert_same(fresh.fetch(ids), BankMemories(bank, writer).fetch(ids))


def test_what_is_kept_is_not_written_again_and_little_room_changes_nothing(bank: Bank, writer: ReferenceWriter) -> None:
    ids, asked = list_ids(bank)[:6], list[str]()

    def write(some: Sequence[str]) -> Memories:
        asked.extend(some)
        return write_alone(bank, writer.checkpoint, writer.selection, some)

    wanted = BankMemories(bank, writer).fetch(ids)
    roomy = FreshMemories(write)
    roomy.fetch(ids[:4])
    assert_same(roomy.fetch(ids), wanted)
    assert asked == ids
    asked.clear()
    cramped = FreshMemories(write, kept_bytes=1)
    cramped.fetch(ids[:4])
    assert_same(cramped.fetch(ids), wanted)
    assert asked == [*ids[:4], *ids]


def test_a_codec_loses_what_it_loses_in_a_bank(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shape = {"num_layers": 2, "num_kv_heads": 2, "num_slots": 8, "head_dim": 16, "dtype": "float32"}
    codec = load_codec("int8", **shape)  # type: ignore[arg-type]
    coding = ReferenceWriter(checkpoint, dtype="float32", codec=codec)
    stored = make_bank(tmp_path / "bank", coding)
    ids = list_ids(stored)[:9]
    fresh = FreshMemories(lambda some: write_alone(stored, checkpoint, coding.selection, some))
    found = CodedMemories(fresh, codec).fetch(ids)
    assert_same(found, BankMemories(stored, coding).fetch(ids))
    assert not torch.equal(found.keys_LBHSD, fresh.fetch(ids).keys_LBHSD)


# In context -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_window_of_one_reference_is_the_reference_alone(architecture: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(architecture)
    writer = ReferenceWriter(checkpoint, dtype="float32")
    bank = make_bank(tmp_path / "bank", writer, num_references=4)
    ids = list_ids(bank)
    alone = write_alone(bank, checkpoint, writer.selection, ids)
    for row, tokens in enumerate(read_tokens(bank, ids)):
        found = encode_window(checkpoint, [tokens], [0], writer.selection)
        part = Memories(
            keys_LBHSD=alone.keys_LBHSD[:, [row]],
            values_LBHSD=alone.values_LBHSD[:, [row]],
            offsets_LBHS=alone.offsets_LBHS[:, [row]],
        )
        assert_same(found, part, 1e-4)


def test_values_are_cut_out_of_the_whole_text(checkpoint: Checkpoint, bank: Bank) -> None:
    """With every token kept, the values of a reference are those of its tokens in one plain pass over the window."""
    tokens = [part for part in read_tokens(bank, list_ids(bank)) if len(part) > 20][:3]
    every = SelectionConfig(num_slots=128)
    found = encode_window(checkpoint, tokens, [0, 1, 2], every)
    whole = torch.tensor(
        [*checkpoint.prefix_token_ids.tolist(), *(token for part in tokens for token in part.tolist())]
    )
    hidden = checkpoint.model.model(whole[None], output_hidden_states=True).hidden_states
    start = len(checkpoint.prefix_token_ids)
    for place, layer in enumerate(checkpoint.memory_layers):
        block = checkpoint.decoder.get_submodule(f"layers.{layer}")
        projected = block.self_attn.v_proj(block.input_layernorm(hidden[layer]))  # type: ignore[operator, union-attr]
        values_HTD = projected[0].unflatten(-1, (checkpoint.num_kv_heads, -1)).movedim(1, 0)
        row = start
        for number, part in enumerate(tokens):
            kept = found.offsets_LBHS[place, number, 0] != EMPTY_SLOT
            assert int(kept.sum()) == len(part)
            wanted = values_HTD[:, row : row + len(part)]
            torch.testing.assert_close(found.values_LBHSD[place, number, :, kept], wanted, atol=1e-4, rtol=1e-4)
            row += len(part)


def test_later_references_have_seen_the_earlier_ones(checkpoint: Checkpoint, bank: Bank) -> None:
    tokens = read_tokens(bank, list_ids(bank)[:3])
    rule = SelectionConfig(num_slots=128)
    together = encode_window(checkpoint, tokens, [0, 2], rule)
    first, last = encode_window(checkpoint, tokens[:1], [0], rule), encode_window(checkpoint, tokens[2:], [0], rule)
    length = len(tokens[0])
    torch.testing.assert_close(
        together.values_LBHSD[:, 0, :, :length], first.values_LBHSD[:, 0, :, :length], atol=1e-4, rtol=1e-4
    )
    moved = (together.values_LBHSD[1:, 1] - last.values_LBHSD[1:, 0]).abs().max()
    assert moved > 1e-2


def test_a_bank_is_read_document_by_document(tmp_path: Path) -> None:
    """References of real documents, cut from windows of two."""
    from flows.generation import open_writer

    bank = Bank.open(build_bank(tmp_path, {name: topics[name] for name in ("assert", "del", "import")}))
    writer = open_writer(bank, "memory3-tiny")
    table = bank.read_table("occurrences", ["doc_id", "ordinal", "ref_id"]).to_pylist()
    rows = sorted(table, key=lambda row: (row["doc_id"], row["ordinal"]))
    contextual = ContextualWriter(bank, writer.checkpoint, writer.selection, num_references=2)
    asked = [row["ref_id"] for row in rows][::-1]
    found = contextual.write(asked)
    for place, ref_id in enumerate(asked):
        at = next(row for row in rows if row["ref_id"] == ref_id)
        partner = [row for row in rows if row["doc_id"] == at["doc_id"] and row["ordinal"] // 2 == at["ordinal"] // 2]
        tokens = read_tokens(bank, [row["ref_id"] for row in partner])
        wanted = encode_window(writer.checkpoint, tokens, [at["ordinal"] % 2], writer.selection)
        torch.testing.assert_close(found.values_LBHSD[:, [place]], wanted.values_LBHSD, atol=1e-4, rtol=1e-4)


# Searches -------------------------------------------------------------------------------------------------------------


def test_random_references_depend_on_the_text_and_continue_fewer() -> None:
    ids = [f"{number:032x}" for number in range(50)]
    search = RandomSearch(ids)
    one, other, same = search.search(["one", "other", "one"], 7)
    assert one == same
    assert one != other
    assert search.search(["one"], 3)[0] == one[:3]
    assert len({hit.ref_id for hit in search.search(["one"], 80)[0]}) == 50


def test_a_remembered_search_finds_the_same_and_asks_once(bank: Bank) -> None:
    inner = FilteredSearch(bank, Retriever(bank, get_embedder()))
    search = RememberedSearch(inner, 6)
    texts = ["the loop ends", "a class", "the loop ends"]
    direct = FilteredSearch(bank, Retriever(bank, get_embedder())).search(texts, [()] * 3, 4)
    assert search.search(texts, [()] * 3, 4) == direct
    counted = inner.counts.num_searches
    assert search.search(texts, [()] * 3, 6)[0][:4] == direct[0]
    assert inner.counts.num_searches == counted
    with pytest.raises(ValueError, match="remembered"):
        search.search(texts, [()] * 3, 7)


def test_an_empty_search_finds_nothing() -> None:
    assert EmptySearch().search(["a", "b"], [(), ()], 5) == [[], []]
