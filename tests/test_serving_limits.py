"""What the server refuses: no key, too much, too many, too long; and who went away."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from typer.testing import CliRunner

from flows.cli import app
from flows.serving.editions import SMALL_MODEL_PARAMETERS, choose_num_threads
from flows.serving.settings import ServingConfig, read_api_key
from schemas.errors import InputError
from tests.models import make_checkpoint
from tests.servers import LONG, MODEL, RunningServer, build_bank, run_server, wait_until

KEY = "a-key-of-at-least-16-letters"

TIMEOUT_SECONDS = 15

MAX_QUEUE = 8

ENDLESS: dict[str, Any] = {"model": MODEL, "prompt": [LONG] * MAX_QUEUE, "temperature": 0, "max_tokens": 850}
"""Takes longer than the server allows: it generates one prompt after the other."""


def test_small_models_compute_with_one_thread() -> None:
    small, wide = make_checkpoint("llama"), make_checkpoint("llama")
    wide.model.lm_head = torch.nn.Linear(1, SMALL_MODEL_PARAMETERS, bias=False, device="meta")
    assert choose_num_threads(small) == 1
    assert choose_num_threads(wide) is None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("limits")
    options = (
        "--max-batch",
        "1",
        "--max-queue",
        str(MAX_QUEUE),
        "--timeout",
        str(TIMEOUT_SECONDS),
        "--max-request-kb",
        "64",
    )
    with run_server(build_bank(folder), folder / "log", *options, key=KEY) as running:
        yield running


def is_idle(server: RunningServer) -> bool:
    return server.read_metric("memory3_running") == server.read_metric("memory3_queue_length") == 0


def test_without_the_key_nothing_is_answered(server: RunningServer) -> None:
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        server.connect("another-key-of-16-letters").models.list()
    for headers in ({}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}, {"Authorization": f"Bearer {KEY}x"}):
        for path in ("/v1/models", "/v1/nothing", f"/v1/memories/{'0' * 32}"):
            response = httpx.get(f"{server.url}{path}", headers=headers, timeout=60)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
    assert [model.id for model in server.connect().models.list()] == [MODEL]
    # Who has no key may ask how the server is, and is told nothing of where the bank lies.
    health = httpx.get(f"{server.url}/healthz", timeout=60)
    assert (health.status_code, health.json()["bank"]) == (200, None)
    folder = str(server.log.parent)
    assert folder in server.announcement
    assert folder not in health.text
    assert folder not in httpx.get(f"{server.url}/metrics", timeout=60).text
    # With a key, any name of the machine will do.
    with server.open_client() as plain:
        assert plain.get("/v1/models", headers={"Host": "example.com"}).status_code == 200


def test_too_large_a_request_is_refused_unread(server: RunningServer) -> None:
    with pytest.raises(openai.APIStatusError, match="larger than 65,536 bytes") as caught:
        server.connect().completions.create(model=MODEL, prompt="word " * 200_000)
    assert caught.value.status_code == 413

    def send_pieces() -> Iterator[bytes]:
        for _ in range(80):
            yield b"x" * 1000

    with server.open_client() as plain:
        response = plain.post("/v1/completions", content=send_pieces(), headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1}).encode()
        padded = body + b" " * (65536 - len(body))
        fits = plain.post("/v1/completions", content=padded, headers={"Content-Type": "application/json"})
        assert fits.status_code == 200
        over = plain.post("/v1/completions", content=padded + b" ", headers={"Content-Type": "application/json"})
        assert over.status_code == 413


def test_a_full_queue_says_when_to_come_back_and_clients_that_leave_make_room(server: RunningServer) -> None:
    """One prompt is generated, eight wait, the next is refused; when all have left, nothing is generated any more."""
    gone = 'memory3_cancelled_total{reason="gone"}'
    before, generated = server.read_metric(gone), server.read_metric("memory3_generated_tokens_total")
    client = server.connect()
    stream = client.completions.create(**ENDLESS, stream=True)
    next(iter(stream))
    address = server.url.removeprefix("http://").split(":")
    body = json.dumps({"model": MODEL, "prompt": "a"}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    )
    with socket.create_connection((address[0], int(address[1]))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: server.read_metric("memory3_queue_length") == MAX_QUEUE)
        assert httpx.get(f"{server.url}/readyz", timeout=60).status_code == 503
        with pytest.raises(openai.RateLimitError, match="8 prompts wait") as caught:
            client.completions.create(model=MODEL, prompt="a")
        assert int(caught.value.response.headers["retry-after"]) >= 1
    wait_until(lambda: server.read_metric("memory3_queue_length") == MAX_QUEUE - 1)
    stream.close()
    wait_until(lambda: is_idle(server))
    assert server.read_metric(gone) - before == MAX_QUEUE + 1
    assert server.read_metric("memory3_generated_tokens_total") - generated < ENDLESS["max_tokens"]
    assert httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200
    with pytest.raises(openai.BadRequestError, match="9 prompts are too many"):
        client.completions.create(model=MODEL, prompt=["a"] * (MAX_QUEUE + 1))


def test_what_takes_too_long_ends(server: RunningServer) -> None:
    """A stream that has begun ends with an error event; a request that waits is answered 504; others go on."""
    before = server.read_metric('memory3_cancelled_total{reason="timeout"}')
    client = server.connect()
    stream = client.completions.create(**ENDLESS, stream=True)
    next(iter(stream))
    found: list[Exception] = []

    def ask() -> None:
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(**{**ENDLESS, "prompt": LONG})
        found.append(caught.value)

    waiting = threading.Thread(target=ask)
    waiting.start()
    with pytest.raises(openai.APIError, match="the time for this request is over"):
        list(stream)
    waiting.join()
    (error,) = found
    assert isinstance(error, openai.APIStatusError)
    assert error.status_code == 504
    wait_until(lambda: is_idle(server))
    assert server.read_metric('memory3_cancelled_total{reason="timeout"}') - before >= 2
    assert len(client.completions.create(model=MODEL, prompt="a", max_tokens=1).choices) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": "0.0.0.0"}, "no API key is set"),
        ({"host": "::"}, "no API key is set"),
        ({"host": "example.com"}, "no API key is set"),
        ({"api_key": "short"}, "at least 16"),
        ({"port": 70000}, "port is 70000"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_queue": 0}, "max_queue is 0"),
        ({"timeout_seconds": 0.0}, "timeout_seconds is 0"),
        ({"watch_seconds": float("nan")}, "watch_seconds is nan"),
        ({"grace_seconds": -1.0}, "grace_seconds is -1"),
        ({"num_threads": 0}, "num_threads is 0"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ServingConfig(bank="b", **changes)


def test_others_may_come_in_with_a_key_or_if_that_is_said() -> None:
    for changes in ({"api_key": KEY}, {"no_key": True}):
        assert ServingConfig(bank="b", host="0.0.0.0", **changes).host == "0.0.0.0"  # type: ignore[arg-type]
    assert KEY not in repr(ServingConfig(bank="b", api_key=KEY))


def test_the_key_is_that_of_the_file_or_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMORY3_API_KEY", KEY)
    assert read_api_key(None) == KEY
    (tmp_path / "key").write_text("of-a-file-with-16-letters\n")
    assert read_api_key(tmp_path / "key") == "of-a-file-with-16-letters"
    (tmp_path / "empty").write_text(" \n")
    for name, message in (("empty", "is empty"), ("missing", "cannot be read")):
        with pytest.raises(InputError, match=message):
            read_api_key(tmp_path / name)
    monkeypatch.delenv("MEMORY3_API_KEY")
    assert read_api_key(None) is None


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cases = {
            "no API key is set": ("--host", "0.0.0.0"),
            "cannot be listened at": ("--port", str(taken.getsockname()[1])),
            "does not exist": ("--port", "0"),
        }
        for message, options in cases.items():
            result = CliRunner().invoke(app, ["serve", "--bank", str(tmp_path / "none"), *options])
            assert result.exit_code == 1
            assert message in str(result.exception)
