"""``memory3 serve`` as its clients see it: a real process, and the openai client."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from flows.generation import open_generator
from flows.showing import describe_reference
from model.answering import answer_prompts
from model.generating import GenerationConfig, Generator
from model.training.chat import load_chat_template
from schemas.bank import Bank
from tests.servers import DOCUMENTS, LONG, MODEL, RunningServer, build_bank, run_server

SAMPLED: dict[str, Any] = {"model": MODEL, "temperature": 0.8, "seed": 11, "max_tokens": 24}


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bank(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def server(bank: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with run_server(bank, tmp_path_factory.mktemp("log") / "log", "--max-batch", "4") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> OpenAI:
    return server.connect()


@pytest.fixture(scope="module")
def generator(bank: Path) -> Generator:
    """The same model and bank in this process."""
    return open_generator(MODEL, str(bank))


def generate(generator: Generator, prompt: str, num_tokens: int, **settings: Any) -> str:
    config = GenerationConfig(max_new_tokens=num_tokens, **settings)
    (tokens,) = generator.generate_batch([prompt], config)
    return generator.checkpoint.tokenizer.decode(tokens)


def test_the_start_says_what_is_served_and_where(server: RunningServer, bank: Path) -> None:
    assert server.announcement == f"memory3 serves {MODEL} with {bank} version 1 at {server.url}; Ctrl-C ends it\n"
    health = httpx.get(f"{server.url}/healthz", timeout=60).json()
    assert health["status"] == "ok"
    assert (health["version"], health["problem"], health["bank"]) == (1, None, str(bank))
    assert httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200


def test_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "memory3"


def test_a_completion_is_what_the_generator_says(client: OpenAI, generator: Generator) -> None:
    answer = client.completions.create(model=MODEL, prompt=LONG, temperature=0, max_tokens=70)
    (choice,) = answer.choices
    assert choice.text == generate(generator, LONG, 70)
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 70, 74)
    assert answer.model_extra is not None
    assert answer.model_extra["memory3"]["version"] == 1
    assert answer.object == "text_completion"


def test_memories_can_be_left_out_or_be_fewer(client: OpenAI, bank: Path, generator: Generator) -> None:
    plain = client.completions.create(
        model=MODEL, prompt=LONG, temperature=0, max_tokens=24, extra_body={"memory3": {"memory": False}}
    )
    assert plain.choices[0].text == generate(open_generator(MODEL, None, knowledge="none"), LONG, 24)
    few = client.completions.create(
        model=MODEL, prompt=LONG, temperature=0, max_tokens=24, extra_body={"memory3": {"num_memories": 2}}
    )
    assert few.choices[0].text == generate(generator, LONG, 24, num_memories=2)


def test_the_trace_says_what_each_chunk_has_read(client: OpenAI, generator: Generator) -> None:
    options = {"memory3": {"trace": True, "repetition_penalty": 1.2}}
    answer = client.completions.create(model=MODEL, prompt=LONG, temperature=0, max_tokens=66, extra_body=options)
    text = generate(generator, LONG, 66, repetition_penalty=1.2)
    assert answer.choices[0].text == text
    assert answer.choices[0].model_extra is not None
    trace = answer.choices[0].model_extra["memory3"]["trace"]
    assert [chunk["first_token"] for chunk in trace] == [chunk.first_token for chunk in generator.traces]
    assert len(trace) >= 2
    for told, chunk in zip(trace, generator.traces, strict=True):
        assert [memory["ref_id"] for memory in told["memories"]] == [hit.ref_id for hit in chunk.hits]
        assert [memory["attention"] for memory in told["memories"]] == pytest.approx(chunk.attention, abs=1e-3)


def test_a_stream_tells_of_a_chunk_as_soon_as_it_has_ended(client: OpenAI) -> None:
    prompt = 12 * "The assert statement is a convenient way. "
    settings: dict[str, Any] = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 70}
    options = {"memory3": {"trace": True}}
    whole = client.completions.create(**settings, extra_body=options).choices[0]
    assert whole.model_extra is not None
    trace = whole.model_extra["memory3"]["trace"]
    assert "".join(chunk["text"] for chunk in trace) == prompt + whole.text
    assert [chunk["num_tokens"] for chunk in trace[-2:]] == [64, 6]
    first_tokens = [chunk["first_token"] for chunk in trace]
    assert [chunk["first_token"] + chunk["num_tokens"] for chunk in trace[:-1]] == first_tokens[1:]
    told, ends, counts = [], [], []
    for event in client.completions.create(**settings, stream=True, extra_body=options):
        assert event.choices[0].model_extra is not None
        of_event = event.choices[0].model_extra["memory3"]
        counts.append(of_event["num_tokens"])
        if of_event["trace"]:
            told += of_event["trace"]
            ends += [counts[-1]] * len(of_event["trace"])
    assert [(chunk["text"], [one["ref_id"] for one in chunk["memories"]]) for chunk in told] == [
        (chunk["text"], [one["ref_id"] for one in chunk["memories"]]) for chunk in trace
    ]
    # Those of the prompt come with its first token, the first generated one with its last.
    assert ends == [1] * (len(trace) - 2) + [64, 70]
    assert counts == sorted(counts)


def test_a_stream_joins_to_the_whole_answer(client: OpenAI, server: RunningServer) -> None:
    whole = client.completions.create(prompt=LONG, **SAMPLED)
    events = list(
        client.completions.create(prompt=LONG, stream=True, stream_options={"include_usage": True}, **SAMPLED)
    )
    assert "".join(event.choices[0].text for event in events[:-1]) == whole.choices[0].text
    assert [event.choices[0].finish_reason for event in events[:-1]] == [None] * (len(events) - 2) + ["length"]
    assert events[-1].choices == []
    assert events[-1].usage == whole.usage
    assert len(events) > 12
    with (
        server.open_client() as plain,
        plain.stream("POST", "/v1/completions", json={**SAMPLED, "prompt": LONG, "stream": True}) as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line[6:])["memory3"]["version"] == 1 for line in lines[:-1])


def test_prompts_may_be_several_and_tokens(client: OpenAI, generator: Generator) -> None:
    """A seed says what is sampled, whether a prompt is alone or with others."""
    prompts = [LONG, "for x in", "Lambda"]
    together = client.completions.create(prompt=prompts, **SAMPLED)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    tokens = [ids.tolist() for ids in generator.checkpoint.tokenizer.encode(prompts)]
    as_tokens = client.completions.create(prompt=tokens, **SAMPLED)
    assert [choice.text for choice in as_tokens.choices] == [choice.text for choice in together.choices]
    for row, prompt in enumerate(prompts):
        alone = client.completions.create(prompt=prompt, **{**SAMPLED, "seed": 11 + row})
        assert alone.choices[0].text == together.choices[row].text
    one = client.completions.create(prompt=tokens[0], **SAMPLED)
    assert one.choices[0].text == together.choices[0].text
    assert together.usage is not None
    assert together.usage.prompt_tokens == sum(len(ids) + 1 for ids in tokens)
    streamed = {0: "", 1: "", 2: ""}
    for event in client.completions.create(prompt=prompts, stream=True, **SAMPLED):
        streamed[event.choices[0].index] += event.choices[0].text
    assert list(streamed.values()) == [choice.text for choice in together.choices]


def test_a_seed_that_is_drawn_is_told(client: OpenAI) -> None:
    first = client.completions.create(model=MODEL, prompt=LONG, max_tokens=12, temperature=1.5)
    assert first.model_extra is not None
    seed = first.model_extra["memory3"]["seed"]
    again = client.completions.create(model=MODEL, prompt=LONG, max_tokens=12, temperature=1.5, seed=seed)
    assert again.choices[0].text == first.choices[0].text
    other = client.completions.create(model=MODEL, prompt=LONG, max_tokens=12, temperature=1.5, seed=seed + 1)
    assert other.choices[0].text != first.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_ends_the_text_before_it(client: OpenAI, stream: bool) -> None:
    settings: dict[str, Any] = {"model": MODEL, "prompt": LONG, "temperature": 0, "max_tokens": 40}
    whole = client.completions.create(**settings).choices[0].text
    stop = whole[20:26]
    if stream:
        events = list(client.completions.create(stop=stop, stream=True, **settings))
        text, reason = "".join(event.choices[0].text for event in events), events[-1].choices[0].finish_reason
    else:
        answer = client.completions.create(stop=["never said", stop], **settings)
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"


def test_a_chat_is_what_the_template_and_the_generator_say(client: OpenAI, generator: Generator) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is assert?"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_completion_tokens=20)
    chat = load_chat_template(MODEL, generator.checkpoint)
    prompt = chat.render_question("What is assert?", "Be short.")
    (expected,) = answer_prompts(generator, chat, [prompt], GenerationConfig(max_new_tokens=20))
    (choice,) = answer.choices
    assert choice.message.content is not None
    assert choice.message.content.strip() == expected
    assert choice.message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    events = list(
        client.chat.completions.create(
            model=MODEL,
            messages=messages,
            temperature=0,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [event.choices[0].delta for event in events if event.choices]
    assert "".join(piece.content or "" for piece in pieces) == choice.message.content
    assert [piece.role for piece in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
    assert events[-1].usage == answer.usage
    assert events[-2].choices[0].finish_reason == choice.finish_reason
    # What was answered can be sent back as it came, and content as parts.
    further: list[Any] = [
        *messages,
        choice.message.model_dump() | {"content": "It checks."},
        {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "del?"}]},
    ]
    longer = client.chat.completions.create(model=MODEL, messages=further, max_tokens=4)
    assert longer.usage is not None
    assert longer.usage.prompt_tokens > answer.usage.prompt_tokens


def test_search_finds_references_with_their_sources(server: RunningServer, bank: Path) -> None:
    with server.open_client() as plain:
        found = plain.post("/v1/search", json={"query": "delete a name from the namespace", "num_hits": 3}).json()
        assert found["version"] == 1
        assert len(found["hits"]) == 3
        scores = [hit["score"] for hit in found["hits"]]
        assert scores == sorted(scores, reverse=True)
        for hit in found["hits"]:
            (source, *_) = hit["sources"]
            assert hit["num_sources"] == len(hit["sources"])
            text = DOCUMENTS[source["doc_id"]]
            assert text[source["start_char"] : source["end_char"]] == hit["text"]
            assert source["title"] == f"About {source['doc_id'][:1]}"
        assert "del" in {hit["sources"][0]["doc_id"] for hit in found["hits"]}
        many = plain.post("/v1/search", json={"query": "the", "num_hits": 100}).json()["hits"]
        assert len(many) == len({hit["ref_id"] for hit in many}) >= 5


def test_a_memory_shows_what_each_head_keeps(server: RunningServer, bank: Path) -> None:
    opened = Bank.open(bank)
    with server.open_client() as plain:
        hit = plain.post("/v1/search", json={"query": "assert"}).json()["hits"][0]
        told = plain.get(f"/v1/memories/{hit['ref_id']}").json()
        assert "".join(told["tokens"]) == told["text"] == hit["text"]
        shown = describe_reference(opened, hit["ref_id"])
        assert [token.text for token in shown.tokens] == told["tokens"]
        layout = opened.manifest.layout
        assert len(told["kept"]) == layout.num_layers * layout.num_kv_heads == shown.num_heads
        for head in told["kept"]:
            assert len(set(head["tokens"])) == min(layout.num_slots, told["num_tokens"])
            assert max(head["tokens"]) < told["num_tokens"]
        assert (told["is_live"], told["kept_for"], told["sources"]) == (True, None, hit["sources"])
        assert plain.get(f"/v1/memories/{'0' * 32}").status_code == 404
        assert plain.get("/v1/memories/0123").status_code == 400


CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}

COMPLETION = {"model": MODEL, "prompt": "a"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        ("completions", COMPLETION | {"echo": True}, 400, "echo", "echo: "),
        ("completions", COMPLETION | {"logprobs": 3}, 400, "logprobs", "logprobs: "),
        ("completions", COMPLETION | {"n": 2}, 400, "n", "n: "),
        ("completions", COMPLETION | {"frequency_penalty": 0.5}, 400, "frequency_penalty", "frequency_penalty: "),
        ("completions", COMPLETION | {"guided_json": {}}, 400, "guided_json", "guided_json is not supported"),
        ("completions", COMPLETION | {"\ud800": 1}, 400, None, "unicode"),
        ("completions", COMPLETION | {"model": "gpt-4"}, 404, "model", "no model 'gpt-4'"),
        ("completions", {"model": MODEL}, 400, "prompt", "prompt: Field required"),
        ("completions", COMPLETION | {"prompt": ""}, 400, None, "prompt"),
        ("completions", COMPLETION | {"prompt": []}, 400, None, "prompt"),
        ("completions", COMPLETION | {"prompt": [9999]}, 400, "prompt", "token 9999 is none of the model's"),
        ("completions", COMPLETION | {"prompt": "\ud800"}, 400, None, "prompt"),
        ("completions", COMPLETION | {"prompt": "word " * 2000}, 400, "prompt", "the model has room for"),
        ("completions", COMPLETION | {"max_tokens": 5000}, 400, "prompt", "the model has room for"),
        ("completions", COMPLETION | {"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ("completions", COMPLETION | {"temperature": 3}, 400, "temperature", "less than or equal to 2"),
        ("completions", COMPLETION | {"stop": ["a"] * 5}, 400, "stop", "at most 4"),
        ("completions", COMPLETION | {"memory3": {"num_memories": 0}}, 400, "memory3.num_memories", "num_memories"),
        ("completions", COMPLETION | {"memory3": {"memories": 5}}, 400, "memory3.memories", "is not supported"),
        ("chat/completions", CHAT | {"tools": [{"type": "function"}]}, 400, "tools", "tools"),
        (
            "chat/completions",
            CHAT | {"response_format": {"type": "json_object"}},
            400,
            "response_format.type",
            "'text'",
        ),
        ("chat/completions", CHAT | {"messages": []}, 400, "messages", "at least 1"),
        ("chat/completions", CHAT | {"max_tokens": 1, "max_completion_tokens": 2}, 400, "max_tokens", "give one of"),
        (
            "chat/completions",
            CHAT | {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            400,
            "messages",
            "the last message is not the user's",
        ),
        (
            "chat/completions",
            CHAT | {"messages": [{"role": "user", "content": "<|end|>"}]},
            400,
            "messages",
            "spells the special token",
        ),
        ("search", {"query": " "}, 400, "query", "query: is empty"),
        ("search", {"query": "a", "num_hits": 0}, 400, "num_hits", "num_hits"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(
    server: RunningServer, path: str, body: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    with server.open_client() as plain:
        content = json.dumps(body).encode()
        response = plain.post(f"/v1/{path}", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert error["param"] == param or param is None


def test_what_changes_nothing_may_be_said(client: OpenAI) -> None:
    settings: dict[str, Any] = {"model": MODEL, "max_tokens": 2, "n": 1, "user": "me", "presence_penalty": 0}
    [completed] = client.completions.create(prompt="a", echo=False, best_of=1, logit_bias={}, **settings).choices
    assert completed.finish_reason in ("stop", "length")
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "a"}]
    answered = client.chat.completions.create(
        messages=messages, logprobs=False, tools=[], response_format={"type": "text"}, tool_choice="none", **settings
    )
    assert answered.choices[0].message.role == "assistant"
    assert not answered.choices[0].message.tool_calls


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b'{"prompt": NaN}', b"[" * 5000, b"\xff\xfe"])
def test_a_body_that_is_no_request_is_refused(server: RunningServer, content: bytes) -> None:
    with server.open_client() as plain:
        for path in ("completions", "chat/completions", "search"):
            response = plain.post(f"/v1/{path}", content=content, headers={"Content-Type": "application/json"})
            assert response.status_code == 400
            assert response.json()["error"]["message"]


def test_the_openai_client_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.completions.create(model="another", prompt="a")
    with pytest.raises(openai.BadRequestError, match="the model has room for"):
        client.completions.create(model=MODEL, prompt="a", max_tokens=4000)


def test_unknown_paths_and_hosts_are_refused(server: RunningServer) -> None:
    with server.open_client() as plain:
        # The page to look into the bank is not there unless it is asked for.
        assert [plain.get(path).status_code for path in ("/", "/explore/", "/v1/explore/bank")] == [404, 404, 404]
        assert plain.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
        assert plain.get("/v1/completions").status_code == 405
        stranger = plain.get("/healthz", headers={"Host": "example.com"})
        assert stranger.status_code == 400
        assert "name of another host" in stranger.json()["error"]["message"]
        assert plain.get("/healthz", headers={"Host": "localhost:1"}).status_code == 200


def test_32_clients_are_served_together(server: RunningServer) -> None:
    """Each gets the text that it would get alone; all are seen in the metrics."""
    before = server.read_metric("memory3_generated_tokens_total")
    client = server.connect()

    def ask(number: int) -> str:
        settings = SAMPLED | {"seed": number % 4, "max_tokens": 8 + number % 4}
        if number % 2:
            events = client.completions.create(prompt=LONG, stream=True, **settings)
            return "".join(event.choices[0].text for event in events)
        return client.completions.create(prompt=LONG, **settings).choices[0].text

    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(ask, range(32)))
    assert texts == [texts[number % 4] for number in range(32)]
    assert texts[:4] == [ask(number) for number in range(4)]
    # Every one of them was generated whole, and with others.
    assert server.read_metric("memory3_generated_tokens_total") - before >= sum(8 + n % 4 for n in range(32)) - 32
    assert server.read_metric('memory3_batch_size_bucket{le="4.0"}') >= 8
    assert server.read_metric("memory3_batch_size_sum") > server.read_metric("memory3_batch_size_count")
    assert server.read_metric("memory3_queue_length") == server.read_metric("memory3_running") == 0
    assert server.read_metric("memory3_retrievals_total") >= 32
    assert server.read_metric('memory3_memories_total{origin="cached"}') > 0
    assert server.read_metric("memory3_bank_version") == 1
    assert server.read_metric('memory3_requests_total{route="/v1/completions",status="200"}') >= 32
    assert server.read_metric("memory3_first_token_seconds_count") >= 32
