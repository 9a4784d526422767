"""Ctrl-C and SIGTERM end the server in order: what is under way is finished, for as long as that may take."""

import signal
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.servers import LONG, MODEL, build_bank, run_server

ENDLESS: dict[str, Any] = {"model": MODEL, "prompt": LONG, "temperature": 0, "max_tokens": 850, "stream": True}


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bank(tmp_path_factory.mktemp("end"))


def test_what_is_under_way_is_finished_at_ctrl_c(bank: Path, tmp_path: Path) -> None:
    with run_server(bank, tmp_path / "log") as server:
        settings = {**ENDLESS, "max_tokens": 120}
        stream = server.connect().completions.create(**settings)
        next(iter(stream))
        server.process.send_signal(signal.SIGINT)
        events = list(stream)
        assert events[-1].choices[0].finish_reason == "length"
        assert server.process.wait(timeout=60) == 0
        assert server.log.read_text() == ""
        with pytest.raises(openai.APIConnectionError):
            server.connect().models.list()


def test_what_takes_longer_than_the_grace_is_ended(bank: Path, tmp_path: Path) -> None:
    with run_server(bank, tmp_path / "log", "--grace-seconds", "1") as server:
        stream = server.connect().completions.create(**ENDLESS)
        next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises((openai.APIError, httpx.TransportError)):
            list(stream)
        assert server.process.wait(timeout=60) == 0
