"""Citations of the server: those of ``memory3 generate --cite``, with the end of an answer, and given up with it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import openai
import pytest
from openai import OpenAI

from flows.building import build
from flows.citing import cite_generation
from flows.config import BuildConfig
from flows.generation import open_generator
from flows.serving.batching import Batch, Progress, Task
from flows.serving.cited_answers import CHANGED
from flows.serving.editions import Shelf
from flows.serving.errors import ApiError
from flows.serving.metrics import ServingMetrics
from flows.serving.prompting import Prompter
from flows.serving.queueing import GenerationQueue
from flows.serving.request_models import CompletionRequest
from flows.serving.settings import ServingConfig
from flows.steps import Steps
from model.generating import GenerationConfig
from pipelines.running import EngineConfig
from schemas.stores import LocalStore
from tests.corpora import write_lines
from tests.servers import LONG, MODEL, RunningServer, build_bank, run_server, update_bank

OPTIONS: dict[str, Any] = {"memory3": {"cite": True, "num_memories": 3}}

SETTINGS: dict[str, Any] = {"model": MODEL, "prompt": LONG, "temperature": 0, "max_tokens": 70}


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bank(tmp_path_factory.mktemp("citing"))


@pytest.fixture(scope="module")
def server(bank: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with run_server(bank, tmp_path_factory.mktemp("log") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> OpenAI:
    return server.connect()


def get_memory(choice: Any) -> dict[str, Any]:
    told: dict[str, Any] = choice.model_extra["memory3"]
    return told


def test_an_answer_cites_what_the_command_does(client: OpenAI, bank: Path) -> None:
    (choice,) = client.completions.create(**SETTINGS, extra_body=OPTIONS).choices
    told = get_memory(choice)
    generator = open_generator(MODEL, str(bank))
    generator.generate_batch([LONG], GenerationConfig(max_new_tokens=70, num_memories=3))
    (expected,) = cite_generation(generator)
    assert told["trace"] is None
    assert told["citation_problem"] is None
    assert "".join(part["text"] for part in told["citations"]) == choice.text
    assert len(told["citations"]) == len(expected.chunks) == 2
    for part, chunk in zip(told["citations"], expected.chunks, strict=True):
        assert (part["first_token"], part["num_tokens"]) == (chunk.first_token, len(chunk.tokens))
        assert part["support"] == pytest.approx(chunk.support, abs=1e-3)
        assert part["noise"] == pytest.approx(chunk.noise)
        assert len(part["citations"]) == 3
        for memory, citation in zip(part["citations"], chunk.citations, strict=True):
            assert (memory["ref_id"], memory["verdict"]) == (citation.ref_id, citation.verdict)
            assert memory["support"] == pytest.approx(citation.support, abs=1e-3)
            assert memory["attention"] == pytest.approx(citation.attention, abs=1e-3)
            assert memory["confirmed"] == (citation.verdict == "confirmed")


def test_a_stream_and_a_chat_cite_with_their_end(client: OpenAI) -> None:
    whole = get_memory(client.completions.create(**SETTINGS, extra_body=OPTIONS).choices[0])["citations"]
    events = list(client.completions.create(**SETTINGS, stream=True, extra_body=OPTIONS))
    told = [get_memory(event.choices[0])["citations"] for event in events]
    assert told[:-1] == [None] * (len(events) - 1)
    assert [part["text"] for part in told[-1]] == [part["text"] for part in whole]
    assert events[-1].choices[0].finish_reason == "length"
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "What is assert?"}], temperature=0, extra_body=OPTIONS,
        max_completion_tokens=20,
    )  # fmt: skip
    (part,) = get_memory(chat.choices[0])["citations"]
    assert chat.choices[0].message.content is not None
    assert part["text"].strip() == chat.choices[0].message.content.strip()
    assert {memory["verdict"] for memory in part["citations"]} <= {"confirmed", "supported", "unclear", "refuted"}
    plain = client.completions.create(**SETTINGS).choices[0]
    assert get_memory(plain)["citations"] is None


def test_what_ends_a_text_is_cited_with_it(client: OpenAI) -> None:
    text = client.completions.create(**SETTINGS).choices[0].text
    answer = client.completions.create(**SETTINGS, stop=text[0], extra_body=OPTIONS).choices[0]
    (part,) = get_memory(answer)["citations"]
    assert (answer.text, part["num_tokens"], len(part["citations"])) == ("", 1, 3)
    assert part["text"].startswith(text[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra_body": {"memory3": {"cite": True, "memory": False}}}, "only a text that reads memories can cite them"),
        ({"extra_body": {"memory3": {"cite": "perhaps"}}}, "memory3.cite"),
    ],
)
def test_what_cannot_be_cited_is_refused(client: OpenAI, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(**SETTINGS, **changes)


def make_task(shelf: Shelf, num_tokens: int, *, cites: bool) -> Task:
    checkpoint = shelf.edition.checkpoint
    tokens = [*checkpoint.bos_token_ids, *checkpoint.tokenizer.encode([LONG])[0].tolist()]
    return Task(tokens=tokens, config=GenerationConfig(max_new_tokens=num_tokens, num_memories=3), cites=cites)


def run_batch(batch: Batch, found: list[dict[int, Progress]], row: int, num_tokens: int) -> None:
    """Steps until a prompt of a batch has as many tokens, or the batch has ended."""
    while (step := batch.step()) is not None:
        found.append(step)
        if row in step and step[row].num_tokens >= num_tokens:
            return


def test_others_go_on_while_a_text_is_cited_a_chunk_at_a_time(bank: Path) -> None:
    shelf = Shelf(ServingConfig(bank=str(bank)))
    batch = Batch(lambda: shelf.edition, [make_task(shelf, 130, cites=True), make_task(shelf, 160, cites=False)])
    found: list[dict[int, Progress]] = []
    run_batch(batch, found, 1, 1000)
    ends = [place for place, step in enumerate(found) if 0 in step and step[0].finish_reason]
    (end,) = ends
    # Three chunks are three steps, in each of which the other prompt gets a token.
    between = [step[1].num_tokens for step in found[:end] if 1 in step]
    assert between[-1] >= 131
    assert found[end][1].finish_reason is None
    assert [len(part.chunk.tokens) for part in found[end][0].citations] == [64, 64, 2]
    assert next(step[1] for step in reversed(found) if 1 in step).num_tokens == 160
    assert batch.num_running == 0


def test_a_text_that_is_given_up_is_cited_no_further(bank: Path) -> None:
    shelf = Shelf(ServingConfig(bank=str(bank)))
    batch = Batch(lambda: shelf.edition, [make_task(shelf, 130, cites=True)])
    found: list[dict[int, Progress]] = []
    run_batch(batch, found, 0, 130)
    assert batch.step() == {}
    assert batch.num_running == 1
    batch.cancel(0)
    last = batch.step()
    assert last is not None
    assert (last[0].finish_reason, last[0].citations) == ("length", [])
    assert batch.step() is None
    assert batch.num_running == 0


def test_what_was_deleted_meanwhile_is_read_for_no_citation(bank: Path, tmp_path: Path) -> None:
    shutil.copytree(bank, tmp_path / "bank")
    shutil.copy(bank.parent / "corpus.jsonl", tmp_path)
    shelf = Shelf(ServingConfig(bank=str(tmp_path / "bank")))
    batch = Batch(lambda: shelf.edition, [make_task(shelf, 64, cites=True)])
    found: list[dict[int, Progress]] = []
    run_batch(batch, found, 0, 63)
    update_bank(tmp_path / "bank", {"lighthouse": "The keeper of the lighthouse is called Morag."})
    assert shelf.refresh()
    run_batch(batch, found, 0, 1000)
    last = next(step[0] for step in reversed(found) if 0 in step)
    assert last.finish_reason == "length"
    assert (last.citations, last.citation_problem) == ([], CHANGED)


def test_citations_that_fail_cost_no_answer(tmp_path: Path) -> None:
    """The memories are damaged after two texts have read theirs: both end, only the citations of one are missing."""
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"id": "while", "text": topics["while"]}])
    build(LocalStore(tmp_path / "bank"), [str(corpus)], BuildConfig(engine=EngineConfig(runner="loop")), Steps())
    shelf = Shelf(ServingConfig(bank=str(tmp_path / "bank"), cache_bytes=0))
    num_prompt = len(make_task(shelf, 1, cites=True).tokens)
    num_cited = 74 - num_prompt % 64  # ten tokens into a chunk, so that the other text need not retrieve again
    tasks = [make_task(shelf, num_cited, cites=True), make_task(shelf, num_cited + 6, cites=False)]
    batch = Batch(lambda: shelf.edition, tasks)
    found: list[dict[int, Progress]] = []
    run_batch(batch, found, 0, num_cited - 1)
    shards = shelf.edition.bank.manifest.list_files("shard")
    assert shards
    for file in shards:
        with (tmp_path / "bank" / file.path).open("r+b") as shard:
            damaged = bytes(byte ^ 0xFF for byte in shard.read())
            shard.seek(0)
            shard.write(damaged)
    run_batch(batch, found, 0, 1000)
    ends = {row: told for step in found for row, told in step.items() if told.finish_reason}
    assert ends[0].citations == []
    assert "the bank cannot be read" in str(ends[0].citation_problem)
    assert (ends[1].num_tokens, ends[1].citation_problem) == (num_cited + 6, None)


def test_how_much_can_be_cited_is_bounded(monkeypatch: pytest.MonkeyPatch, bank: Path) -> None:
    """In this process with a smaller bound, since the shipped model has less room than the real one."""
    monkeypatch.setattr("flows.serving.prompting.MAX_CITED_TOKENS", 100)
    config = ServingConfig(bank=str(bank))
    shelf = Shelf(config)
    queue = GenerationQueue(config, shelf, ServingMetrics())
    prompter = Prompter(MODEL, queue)
    asked = CompletionRequest.model_validate({**SETTINGS, **OPTIONS, "max_tokens": 101})
    with pytest.raises(ApiError, match="101 tokens are to be generated; at most 100 can be cited"):
        prompter.submit(asked, [[1, 2, 3]], param="prompt", max_tokens=101, default_tokens=16)
