"""Fine-tuning on conversations: what a batch reads is what generation reads, and how exchanges are drawn."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.checkpoint import Checkpoint
from model.fetching import BankMemories
from model.generating import GenerationConfig, Generator
from model.reading import CHUNK_TOKENS
from model.retrieving import Retriever
from model.training.batches import IGNORED, TrainingBatch
from model.training.chat import ChatTemplate, Exchange
from model.training.conversations import (
    BankObjective,
    ConversationConfig,
    ConversationSource,
    freeze_writing,
)
from model.training.exchanges import (
    ReadExchange,
    list_queries,
    load_references,
    make_exchange_batch,
    place_chunks,
    retrieve_references,
)
from model.training.messages import Message
from model.training.objective import LanguageObjective
from model.writing import ReferenceWriter
from schemas.bank import Bank
from schemas.errors import InputError, WrongModelError
from schemas.identifiers import make_ref_id
from schemas.protocols import IntArray
from tests.banks import get_embedder, make_bank
from tests.chats import make_chat_checkpoint

QUESTIONS = ("How is the with statement executed?", "What does a lambda expression yield?", "Name the operators.")


@dataclasses.dataclass
class World:
    checkpoint: Checkpoint
    chat: ChatTemplate
    bank: Bank
    search: Retriever

    def open_memories(self) -> BankMemories:
        return BankMemories(self.bank, ReferenceWriter(self.checkpoint, dtype="float32"))

    def prepare(self, exchanges: Sequence[Exchange]) -> tuple[list[ReadExchange], dict[str, IntArray]]:
        rows = retrieve_references(exchanges, self.checkpoint.tokenizer, self.search, 5)
        return rows, load_references(rows, self.bank)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    checkpoint, chat = make_chat_checkpoint()
    bank = make_bank(tmp_path_factory.mktemp("bank"), ReferenceWriter(checkpoint, dtype="float32"))
    return World(checkpoint, chat, bank, Retriever(bank, get_embedder()))


@pytest.fixture(scope="module")
def exchanges(world: World) -> list[Exchange]:
    pairs = [(question, question[::-1] * (place + 1)) for place, question in enumerate(QUESTIONS * 3)]
    asked = [[Message(role="user", content=left), Message(role="assistant", content=right)] for left, right in pairs]
    return [world.chat.make_exchange(messages) for messages in asked]


@pytest.mark.parametrize("num_words", [20, 70])
def test_training_reads_what_generation_reads(world: World, num_words: int) -> None:
    """The generator's own answer of more than two chunks, read again: the same references, places and logits."""
    generator = Generator(world.checkpoint, world.search, world.open_memories())
    prompt = world.chat.render_question(" ".join(["with", "lambda", "assert"] * num_words)[: num_words * 5])
    seen: list[torch.Tensor] = []
    handle = world.checkpoint.head.register_forward_hook(lambda _, __, logits: seen.append(logits.reshape(-1, 512)))
    config = GenerationConfig(max_new_tokens=2 * CHUNK_TOKENS + 5, stop_at_end=False)
    (answer,) = generator.generate_tokens([prompt], config)
    handle.remove()

    exchange = Exchange(prompt_ids=np.array(prompt, np.int32), answer_ids=np.array(answer, np.int32))
    (row,), references = world.prepare([exchange])
    num_prompt_chunks = -(-len(prompt) // CHUNK_TOKENS)
    assert (num_prompt_chunks > 1) == (num_words == 70)
    read = [tuple(hit.ref_id for hit in trace.hits) for trace in generator.traces]
    assert read[num_prompt_chunks] == read[num_prompt_chunks - 1]  # inherited
    del read[num_prompt_chunks]
    assert row.ref_ids == tuple(read)
    assert len(set(read)) == len(read)

    batch = make_exchange_batch([row], references, 5)
    for objective in (LanguageObjective(world.checkpoint), BankObjective(world.open_memories())):
        with torch.inference_mode():
            logits = world.checkpoint.head(objective.read(batch))[0, len(prompt) - 1 :]
        torch.testing.assert_close(logits, torch.cat(seen), rtol=1e-3, atol=1e-3)
        assert logits.argmax(-1).tolist() == answer


@given(st.integers(2, 200), st.integers(1, 200))
def test_chunks_are_those_of_a_slow_count(num_prompt: int, num_answer: int) -> None:
    expected, chunk = [], -1
    for place in range(num_prompt):
        chunk += place % CHUNK_TOKENS == 0
        expected.append(chunk)
    for num_generated in range(1, num_answer):
        chunk += num_generated % CHUNK_TOKENS == 0
        expected.append(chunk)
    assert place_chunks(num_prompt, num_answer).tolist() == expected
    tokens = np.arange(num_prompt + num_answer, dtype=np.int32)
    queries = list_queries(Exchange(prompt_ids=tokens[:num_prompt], answer_ids=tokens[num_prompt:]))
    assert len(queries) == chunk + 1
    for number, query in enumerate(queries):
        inside = np.flatnonzero(np.array(expected) == number)
        assert len(query) <= CHUNK_TOKENS
        assert (np.diff(query) == 1).all()
        if inside[0] < num_prompt:  # ends with the last token of the prompt that reads what is found
            assert query[-1] == min(inside[-1], num_prompt - 1)
            assert len(query) == min(CHUNK_TOKENS, query[-1] + 1)
        else:  # ends with the first token that does
            assert query[-1] == inside[0]
            assert len(query) == CHUNK_TOKENS


def test_only_answers_are_targets(world: World, exchanges: list[Exchange]) -> None:
    batch = make_exchange_batch(*world.prepare(exchanges), 5)
    assert batch.num_targets == sum(len(exchange.answer_ids) for exchange in exchanges)
    for row, exchange in enumerate(exchanges):
        whole = [*exchange.prompt_ids.tolist(), *exchange.answer_ids.tolist()]
        for place, target in enumerate(batch.targets_BT[row].tolist()):
            is_answer = len(exchange.prompt_ids) <= place + 1 < len(whole)
            assert target == (whole[place + 1] if is_answer else IGNORED)
            assert (batch.chunk_of_token_BT[row, place] >= 0) == (place + 1 < len(whole))


def test_a_padded_batch_has_the_losses_of_single_exchanges(world: World, exchanges: list[Exchange]) -> None:
    rows, references = world.prepare(exchanges)
    objective = LanguageObjective(world.checkpoint)
    with torch.inference_mode():
        together = objective(make_exchange_batch(rows, references, 5))
        single = [objective(make_exchange_batch([row], references, 5)) for row in rows]
    assert together.item() == pytest.approx(sum(loss.item() for loss in single), rel=1e-5)


def make_source(world: World, exchanges: list[Exchange], **changes: Any) -> ConversationSource:
    rows, references = world.prepare(exchanges)
    answer = world.chat.encode_answer("I do not know.")
    return ConversationSource(rows, references, ConversationConfig(**changes), unread_answer=answer)


def list_rows(batches: Sequence[TrainingBatch]) -> list[tuple[list[int], list[list[bytes]]]]:
    """Each row of batches: its tokens without padding, and what its chunks read."""
    rows = []
    for batch in batches:
        named = [tokens.tobytes() for tokens in batch.references]
        for tokens, chunks, index in zip(batch.tokens_BT, batch.chunk_of_token_BT, batch.index_BCM, strict=True):
            read = [[named[place] for place in of_chunk if place >= 0] for of_chunk in index.tolist()]
            rows.append((tokens[chunks >= 0].tolist(), read[: int(chunks.max()) + 1]))
    return rows


def test_a_step_does_not_depend_on_the_number_of_processes(world: World, exchanges: list[Exchange]) -> None:
    changes = {
        "batch_size": 8,
        "micro_batch_size": 3,
        "distractor_share": 0.5,
        "dropped_share": 0.2,
        "unread_share": 0.3,
    }
    alone = make_source(world, exchanges, **changes)
    for step in range(4):
        expected = sorted(list_rows(alone.draw(step, 0, 1)))
        for num_ranks in (2, 4):
            drawn = [make_source(world, exchanges, **changes).draw(step, rank, num_ranks) for rank in range(num_ranks)]
            assert sorted(row for batches in drawn for row in list_rows(batches)) == expected
            assert {len(batches) for batches in drawn} == {-(-8 // num_ranks // 3)}
    with pytest.raises(InputError, match="multiple of the 3 processes"):
        alone.draw(0, 0, 3)


@given(st.integers(1, 4), st.integers(0, 5), st.booleans())
def test_every_epoch_draws_every_exchange_once(batch_size: int, seed: int, shuffled: bool) -> None:
    rows = [
        ReadExchange.without_references(Exchange(prompt_ids=np.array([1, 10 + place]), answer_ids=np.array([5])))
        for place in range(5)
    ]
    config = ConversationConfig(batch_size=batch_size, shuffled=shuffled, seed=seed)
    source = ConversationSource(rows, {}, config)
    drawn = [tokens[1] - 10 for step in range(20) for tokens, _ in list_rows(source.draw(step, 0, 1))]
    for start in range(0, len(drawn) - 4, 5):
        assert sorted(drawn[start : start + 5]) == list(range(5))
    if not shuffled:
        assert drawn[:10] == [0, 1, 2, 3, 4] * 2
    assert ConversationSource(rows, {}, config).source_id == source.source_id
    assert ConversationSource(rows[:4], {}, config).source_id != source.source_id


def test_distractors_stand_in_the_place_of_all_but_the_nearest(world: World, exchanges: list[Exchange]) -> None:
    rows, references = world.prepare(exchanges)
    plain = list_rows(make_source(world, exchanges, batch_size=9, shuffled=False).draw(0, 0, 1))
    changed = list_rows(make_source(world, exchanges, batch_size=9, shuffled=False, distractor_share=1.0).draw(0, 0, 1))
    pool = {tokens.tobytes() for tokens in references.values()}
    num_new = 0
    for (tokens, before), (same_tokens, after) in zip(plain, changed, strict=True):
        assert tokens == same_tokens
        for old, new in zip(before, after, strict=True):
            assert new[0] == old[0]
            assert len(set(new)) == 5
            assert set(new) <= pool
            num_new += len(set(new) - set(old))
    assert num_new >= 2 * len(rows)


def test_dropped_and_unread_references_are_not_there(world: World, exchanges: list[Exchange]) -> None:
    dropped = list_rows(make_source(world, exchanges, batch_size=9, dropped_share=1.0).draw(0, 0, 1))
    assert all(of_chunk == [] for _, read in dropped for of_chunk in read)
    (unread,) = make_source(world, exchanges, batch_size=8, unread_share=1.0).draw(0, 0, 1)
    answer = world.chat.encode_answer("I do not know.").tolist()
    assert unread.references == []
    assert unread.with_prefix
    for targets in unread.targets_BT.tolist():
        assert [target for target in targets if target != IGNORED] == answer
    halves = [
        list_rows(make_source(world, exchanges, batch_size=8, unread_share=0.5).draw(step, 0, 1)) for step in range(8)
    ]
    num_unread = sum(all(of_chunk == [] for of_chunk in read) for rows in halves for _, read in rows)
    assert 20 <= num_unread <= 44


def test_a_bank_stays_valid_if_what_writes_it_is_frozen(
    world: World, exchanges: list[Exchange], tmp_path: Path
) -> None:
    checkpoint, chat = make_chat_checkpoint()
    bank = make_bank(tmp_path / "bank", ReferenceWriter(checkpoint, dtype="float32"))
    own = World(checkpoint, chat, bank, Retriever(bank, get_embedder()))
    rows, references = own.prepare(exchanges)
    batch = make_exchange_batch(rows, references, 5)
    assert {make_ref_id(tokens, checkpoint.tokenizer.tokenizer_id) for tokens in batch.references} == set(references)
    objective = BankObjective(own.open_memories())

    def step() -> float:
        parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        loss = objective(batch)
        loss.backward()
        torch.optim.SGD(parameters, lr=1e-4).step()
        return loss.item()

    checkpoint.model.requires_grad_(True)
    freeze_writing(checkpoint)
    trained = {name for name, parameter in checkpoint.decoder.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[1] for name in trained if name.startswith("layers")} == {"2", "3"}
    assert "norm.weight" in trained
    assert not any(name.startswith("embed") for name in trained)
    first = step()
    assert objective(batch).item() < first
    BankMemories(bank, ReferenceWriter(checkpoint, dtype="float32"))
    checkpoint.model.requires_grad_(True)
    step()
    with pytest.raises(WrongModelError):
        objective(batch)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 0}, {"num_memories": 0}, {"unread_share": 1.1}, {"dropped_share": -0.1}]
)
def test_values_out_of_bounds_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        ConversationConfig(**changes)


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(InputError, match="nothing to train on"):
        ConversationSource([], {}, ConversationConfig())
