"""The playground's citations in a browser: what the server says of each memory, by its chunk, and after going back."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, Browser
from tests.servers import RunningServer, build_bank, run_server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

PROMPT = "The assert statement is a convenient way"

CARDS = "[...document.querySelectorAll('#with .read')]"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    bank = build_bank(tmp_path_factory.mktemp("citing"))
    with run_server(Path(bank), tmp_path_factory.mktemp("log") / "log", "--explore") as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


def list_verdicts(browser: Browser) -> list[list[list[str]]]:
    found: list[list[list[str]]] = browser.evaluate(
        f"{CARDS}.map(card => [...card.querySelectorAll('.memories > li')].map(item =>"
        " [item.dataset.refId, item.querySelector('.verdict').textContent, item.querySelector('a').pathname]))"
    )
    return found


def test_each_memory_of_a_generated_chunk_has_its_verdict(browser: Browser, server: RunningServer) -> None:
    browser.open(f"{server.url}/explore/playground?max_tokens=66&temperature=0&seed=3&cite=1")
    browser.wait_for("document.getElementById('bank-version').textContent !== ''")
    assert browser.evaluate("document.getElementById('cite').checked")
    browser.evaluate(f"document.getElementById('prompt').value = '{PROMPT}'")
    browser.evaluate("document.getElementById('ask').requestSubmit()")
    browser.wait_for("document.getElementById('progress').textContent === 'Done.'")
    options = {"trace": True, "cite": True, "repetition_penalty": 1.2}
    body = {"model": "memory3-tiny", "prompt": PROMPT, "max_tokens": 66, "temperature": 0, "memory3": options}
    with server.open_client() as client:
        told = client.post("/v1/completions", json=body).json()["choices"][0]["memory3"]
    of_prompt, *generated = list_verdicts(browser)
    assert [verdict for _, verdict, _ in of_prompt] == [""] * 5
    assert len(generated) == len(told["citations"]) == 2
    for card, part in zip(generated, told["citations"], strict=True):
        expected = {one["ref_id"]: one for one in part["citations"]}
        assert {ref_id for ref_id, _, _ in card} == set(expected)
        for ref_id, verdict, path in card:
            support = expected[ref_id]["support"]
            word = "less likely" if support < 0 else "likelier"
            assert verdict == f"{expected[ref_id]['verdict']}: {abs(support):.2f} nats {word}"
            assert path == f"/explore/references/{ref_id}"
    shown = browser.evaluate(
        "[...document.querySelectorAll('.read .all')].map(one => one.hidden ? '' : one.textContent)"
    )
    assert shown[0] == ""
    assert all(
        f"{abs(part['support']):.2f} nats" in text for part, text in zip(told["citations"], shown[1:], strict=True)
    )
    # To a reference and back: the verdicts are there again, without another generation.
    before = list_verdicts(browser)
    browser.evaluate("document.querySelector('.memories a').click()")
    browser.wait_for("location.pathname.includes('/references/') && !document.getElementById('shown').hidden")
    browser.evaluate("history.back()")
    browser.wait_for(f"location.pathname.endsWith('/playground') && {CARDS}.length === 3")
    assert list_verdicts(browser) == before
    assert browser.evaluate("location.search").endswith("cite=1")
    assert browser.complaints == []


def test_without_being_asked_nothing_is_checked(browser: Browser, server: RunningServer) -> None:
    browser.open(f"{server.url}/explore/playground?max_tokens=4&temperature=0&seed=3")
    browser.wait_for("document.getElementById('bank-version').textContent !== ''")
    assert not browser.evaluate("document.getElementById('cite').checked")
    assert browser.evaluate("document.getElementById('cite').labels[0].textContent.trim()") == "Check citations"
    browser.evaluate("document.getElementById('ask').requestSubmit()")
    browser.wait_for("document.getElementById('progress').textContent === 'Done.'")
    assert {verdict for card in list_verdicts(browser) for _, verdict, _ in card} == {""}
    assert browser.evaluate("[...document.querySelectorAll('.verdict, .read .all')].every(one => one.hidden)")
    assert browser.complaints == []


def test_a_chunk_of_one_token_is_cited_too(browser: Browser, server: RunningServer) -> None:
    browser.open(f"{server.url}/explore/playground?max_tokens=1&temperature=0&seed=3&cite=1")
    browser.wait_for("document.getElementById('bank-version').textContent !== ''")
    browser.evaluate("document.getElementById('ask').requestSubmit()")
    browser.wait_for("document.getElementById('progress').textContent === 'Done.'")
    *_, last = list_verdicts(browser)
    assert len(last) == 5
    assert all("nats" in verdict for _, verdict, _ in last)
    assert browser.complaints == []
