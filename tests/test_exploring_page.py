"""The page of ``memory3 explore`` in a browser: everything a person does with it, by mouse and by keyboard alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from schemas.bank import Bank
from tests.browser import CHROMIUM, Browser
from tests.explored import KEY, SCRIPT, build_explored_bank
from tests.servers import RunningServer, run_server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

QUERY = "how are debugging assertions inserted into a program"

LOADED = "document.getElementById('bank-version').textContent !== ''"

SHOWN = "!document.getElementById('shown').hidden"

MARKS = "[...document.querySelectorAll('#tokens span')].map(span => Number(span.dataset.kept))"


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return Bank.open(build_explored_bank(tmp_path_factory.mktemp("page")))


@pytest.fixture(scope="module")
def server(bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("log") / "log"
    with run_server(Path(bank.url), log, "--explore", key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def tab(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser that has given the key."""
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.open(f"{server.url}/explore/")
        browser.wait_for("document.getElementById('key-dialog').open")
        assert not browser.evaluate(LOADED)
        browser.type("not-the-key-of-this-server")
        browser.press("Enter")
        browser.wait_for("document.getElementById('key-problem').textContent.includes('not accepted')")
        browser.type(KEY)
        browser.press("Enter")
        browser.wait_for(LOADED)
        assert not browser.evaluate("document.getElementById('key-dialog').open")
        yield browser


@pytest.fixture
def browser(tab: Browser, server: RunningServer) -> Iterator[Browser]:
    """The same; after each test nothing was complained of, and nobody but the server was asked."""
    tab.complaints.clear()
    yield tab
    assert tab.complaints == []
    hosts = {urlsplit(url).netloc for url in tab.requests if not url.startswith("data:")}
    assert hosts == {urlsplit(server.url).netloc}
    assert tab.evaluate("document.title") != "taken"


def count_kept(server: RunningServer, ref_id: str, layer: int | None = None, head: int | None = None) -> list[int]:
    """Returns how many of the chosen heads keep each token, as the API tells it."""
    with server.open_client() as client:
        told: dict[str, Any] = client.get(f"/v1/memories/{ref_id}").json()
    counts = [0] * len(told["tokens"])
    for kept in told["kept"]:
        if layer in (None, kept["layer"]) and head in (None, kept["head"]):
            for token in kept["tokens"]:
                counts[token] += 1
    return counts


def choose(browser: Browser, selector: str, value: str) -> None:
    browser.evaluate(
        f"(() => {{ const one = document.getElementById('{selector}'); one.value = '{value}';"
        " one.dispatchEvent(new Event('change')); })()"
    )


def test_from_the_search_to_what_a_head_keeps(browser: Browser, server: RunningServer) -> None:
    """With the keyboard alone, up to the selectors."""
    browser.open(f"{server.url}/explore/")
    browser.wait_for("document.querySelectorAll('#examples li').length === 6")
    assert browser.evaluate("document.activeElement.id") == "query"
    browser.type(QUERY)
    browser.press("Enter")
    browser.wait_for("document.querySelectorAll('#hits li').length > 3")
    assert "q=how+are+debugging" in browser.evaluate("location.search")
    browser.press("/")
    assert browser.evaluate("document.activeElement.id") == "query"
    browser.press("ArrowDown")
    text = browser.evaluate("document.activeElement.closest('.hit').querySelector('blockquote').textContent")
    assert "debugging assertions" in text.replace("\n", " ")
    outline = browser.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    browser.press("Enter")
    browser.wait_for(SHOWN)
    ref_id = browser.evaluate("location.pathname").rpartition("/")[2]
    assert browser.evaluate("document.getElementById('tokens').textContent") == text
    assert browser.evaluate("document.getElementById('state').textContent") == "live"
    everywhere = browser.evaluate(MARKS)
    assert everywhere == count_kept(server, ref_id)
    seen = [everywhere]
    for layer, head in ((1, None), (1, 4), (None, 4), (3, 0)):
        choose(browser, "layer", "all" if layer is None else str(layer))
        choose(browser, "head", "all" if head is None else str(head))
        marks = browser.evaluate(MARKS)
        assert marks == count_kept(server, ref_id, layer, head)
        visible = browser.evaluate("document.querySelectorAll('#tokens .kept').length")
        assert visible == sum(times > 0 for times in marks)
        assert marks not in seen
        seen.append(marks)
    assert browser.evaluate("location.search") == "?layer=3&head=0"
    # The address leads to the same marks, a row of the map to others, and back is the search.
    browser.call("Page.reload")
    browser.wait_for(f"{SHOWN} && {MARKS}.length > 0 && document.getElementById('layer').value === '3'")
    assert browser.evaluate(MARKS) == seen[-1]
    browser.evaluate('document.querySelector(\'#map button[data-layer="2"][data-head="5"]\').click()')
    assert browser.evaluate(MARKS) == count_kept(server, ref_id, 2, 5)
    assert browser.evaluate("document.getElementById('kept-note').textContent").startswith("Head 5 of layer 2 keeps")
    browser.evaluate("history.back()")
    browser.wait_for("location.pathname === '/explore/' && document.querySelectorAll('#hits li').length > 3")
    assert browser.evaluate("document.getElementById('query').value") == QUERY


def test_places_and_near_duplicates_of_a_reference(browser: Browser, server: RunningServer, bank: Bank) -> None:
    row = bank.read_table("duplicates").to_pylist()[0]
    browser.open(f"{server.url}/explore/references/{row['ref_id']}")
    browser.wait_for("document.querySelectorAll('#pairs .pair').length === 1")
    assert browser.evaluate("document.getElementById('state').textContent") == "near-duplicate"
    assert browser.evaluate("document.querySelectorAll('#tokens .kept').length") == 0
    words = browser.evaluate("[...document.querySelectorAll('#pairs mark')].map(mark => mark.textContent)")
    assert sorted(words) == ["convenient", "handy"]
    browser.evaluate("document.querySelector('#pairs a').click()")
    browser.wait_for(f"location.pathname.endsWith('{row['kept_ref_id']}') && {SHOWN}")
    browser.wait_for("document.querySelectorAll('#places tbody tr').length > 0")
    browser.evaluate("document.getElementById('raw-details').open = true")
    browser.wait_for("document.getElementById('raw-json').textContent !== ''")
    assert browser.evaluate("JSON.parse(document.getElementById('raw-json').textContent).ref_id") == row["kept_ref_id"]


def test_hostile_texts_are_texts(browser: Browser, server: RunningServer, bank: Bank) -> None:
    places = bank.read_table("occurrences").to_pylist()
    ref_ids = [place["ref_id"] for place in places if place["doc_id"] == f"hostile/{SCRIPT}"]
    shown = ""
    for ref_id in ref_ids:
        browser.open(f"{server.url}/explore/references/{ref_id}")
        browser.wait_for(f"{SHOWN} && document.querySelectorAll('#places tbody tr').length === 1")
        shown += browser.evaluate("document.getElementById('tokens').textContent")
        assert SCRIPT in browser.evaluate("document.getElementById('places').textContent")
        assert browser.evaluate("document.querySelectorAll('main img, main script').length") == 0
    assert SCRIPT in shown
    assert "[U+202E]txet\u2407\u2400\ufffd\ufffd" in shown
    assert "כל בני האדם" in shown
    browser.open(f"{server.url}/explore/?q=script+image+error")
    browser.wait_for("document.querySelectorAll('#hits li').length > 0")
    assert "<script>" in browser.evaluate("document.getElementById('hits').textContent")
    assert browser.evaluate("document.querySelectorAll('main img, main script').length") == 0
    browser.open(f"{server.url}/explore/playground?prompt=%3Cimg+src%3Dx+onerror%3Dalert(1)%3E&max_tokens=2")
    browser.wait_for(LOADED)
    assert browser.evaluate("document.getElementById('prompt').value") == "<img src=x onerror=alert(1)>"


def test_from_the_versions_to_a_reference_that_is_gone(browser: Browser, server: RunningServer) -> None:
    browser.open(f"{server.url}/explore/versions")
    browser.wait_for("document.querySelectorAll('#versions tbody tr').length === 3")
    assert "3 served" in browser.evaluate("document.querySelector('#versions tbody th').textContent")
    browser.evaluate("document.getElementById('before').value = '2'; document.getElementById('after').value = '3'")
    browser.evaluate("document.getElementById('compare').requestSubmit()")
    browser.wait_for(f"location.pathname === '/explore/versions/2/3' && {SHOWN}")
    assert "1 removed" in browser.evaluate("document.getElementById('documents').textContent")
    assert "lighthouse" in browser.evaluate("document.getElementById('documents').textContent")
    assert "Morag" in browser.evaluate("document.getElementById('references').textContent")
    browser.evaluate("document.querySelector('.sample a').click()")
    browser.wait_for(f"location.pathname.includes('/references/') && {SHOWN}")
    assert "Morag" in browser.evaluate("document.getElementById('tokens').textContent")
    assert browser.evaluate("location.search").startswith("?version=2")
    assert "version 2 (served is version 3)" in browser.evaluate("document.getElementById('facts').textContent")
    assert sum(browser.evaluate(MARKS)) > 0


def test_the_playground_shows_both_texts_and_what_was_read(browser: Browser, server: RunningServer) -> None:
    prompt = "The assert statement is a convenient way. " * 12
    settings = {"max_tokens": 70, "temperature": 0, "seed": 3}
    browser.open(f"{server.url}/explore/playground?max_tokens=70&temperature=0&seed=3")
    browser.wait_for(LOADED)
    browser.evaluate("document.getElementById('prompt').value = ''; document.getElementById('prompt').focus()")
    browser.type(prompt)
    browser.evaluate("document.getElementById('generate').focus()")
    browser.press("Enter")
    browser.wait_for("document.getElementById('progress').textContent === 'Done.'")
    with server.open_client() as client:
        options = {"memory": True, "trace": True, "repetition_penalty": 1.2}
        body = {"model": "memory3-tiny", "prompt": prompt, **settings, "memory3": options}
        read = client.post("/v1/completions", json=body).json()["choices"][0]
        body["memory3"] = {"memory": False, "repetition_penalty": 1.2}
        plain = client.post("/v1/completions", json=body).json()["choices"][0]
    chunks = [chunk for chunk in read["memory3"]["trace"] if chunk["num_tokens"]]
    assert len(chunks) >= 3
    assert browser.evaluate("document.querySelector('#with .output').textContent") == prompt + read["text"]
    assert browser.evaluate("document.querySelector('#without .output').textContent") == prompt + plain["text"]
    texts = browser.evaluate("[...document.querySelectorAll('#with .chunk')].map(chunk => chunk.textContent)")
    assert texts == [chunk["text"] for chunk in chunks]
    cards = "[...document.querySelectorAll('#with .read')]"
    browser.wait_for(f"{cards}.every(card => [...card.querySelectorAll('p')].every(p => p.textContent !== ''))")
    told = browser.evaluate(
        f"{cards}.map(card => [...card.querySelectorAll('.memories > li')].map(item =>"
        " [item.querySelector('a').pathname, parseFloat(item.querySelector('.n').textContent)]))"
    )
    for card, chunk in zip(told, chunks, strict=True):
        assert [path for path, _ in card] == [f"/explore/references/{one['ref_id']}" for one in chunk["memories"]]
        shares = [100 * one["attention"] for one in chunk["memories"]]
        assert [share for _, share in card] == pytest.approx(shares, abs=0.51)
    widths = browser.evaluate("[...document.querySelectorAll('.read .bar > span')].map(bar => bar.offsetWidth)")
    assert len(widths) == 5 * len(chunks)
    assert min(widths) > 0
    # Moving to a chunk marks what it has read.
    browser.evaluate("document.querySelectorAll('#with .chunk')[1].focus()")
    assert browser.evaluate(f"{cards}.map(card => card.classList.contains('meant'))") == [
        number == 1 for number in range(len(chunks))
    ]
    # To a reference and back: the texts are there again, without another generation.
    browser.evaluate("document.querySelector('.memories a').click()")
    browser.wait_for(f"location.pathname.includes('/references/') && {SHOWN}")
    browser.evaluate("history.back()")
    browser.wait_for(f"location.pathname.endsWith('/playground') && {cards}.length === {len(chunks)}")
    assert browser.evaluate("document.querySelector('#with .output').textContent") == prompt + read["text"]
    assert browser.evaluate("document.getElementById('prompt').value") == prompt


def test_errors_are_said_where_they_are_heard(browser: Browser, server: RunningServer) -> None:
    browser.open(f"{server.url}/explore/references/{'0' * 32}")
    problem = "document.getElementById('problem').textContent"
    browser.wait_for(f"{problem}.includes('has no reference')")
    assert browser.evaluate("document.getElementById('problem').getAttribute('role')") == "alert"
    browser.open(f"{server.url}/explore/playground")
    browser.wait_for(LOADED)
    browser.evaluate("document.getElementById('prompt').value = 'word '.repeat(5000)")
    browser.evaluate("document.getElementById('ask').requestSubmit()")
    browser.wait_for(f"{problem}.includes('the model has room for')")
    # A browser writes down every answer that is an error by itself.
    assert all("Failed to load resource" in line for line in browser.complaints)
    browser.complaints.clear()


@pytest.mark.parametrize("width", [400, 1400])
def test_every_view_fits_and_can_be_told_apart_by_ear(browser: Browser, server: RunningServer, width: int) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    with server.open_client() as client:
        ref_id = client.post("/v1/search", json={"query": QUERY}).json()["hits"][0]["ref_id"]
    titles = set()
    for view in ("", "?q=assert", f"references/{ref_id}", "versions", "versions/1/2", "playground"):
        browser.open(f"{server.url}/explore/{view}")
        browser.wait_for(LOADED)
        browser.wait_for("document.querySelectorAll('main h1').length === 1")
        if view.startswith(("references", "versions/")):
            browser.wait_for(SHOWN)
        titles.add(browser.evaluate("document.title"))
        hidden = browser.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert hidden == 0, view
        unnamed = browser.evaluate(
            "[...document.querySelectorAll('input, select, textarea')].filter(one => !one.labels.length).length"
        )
        assert unnamed == 0, view
        assert browser.evaluate("document.querySelectorAll('header, nav, main, footer').length") >= 4
        browser.evaluate("document.activeElement.blur()")
        grounds = []
        for scheme in ("light", "dark"):
            browser.prefer(scheme)
            grounds.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert grounds == ["rgb(255, 255, 255)", "rgb(20, 23, 28)"]
    assert len(titles) == 6
