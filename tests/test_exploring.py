"""What ``memory3 explore`` tells of a bank, compared with slow and obvious readings of its tables."""

import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.exploring.pages import HEADERS, STATIC, TEMPLATES, VIEWS, render_views
from flows.reporting.page import STYLE_SHEET
from flows.reporting.page import TEMPLATES as REPORT_TEMPLATES
from flows.showing import describe_reference
from schemas.bank import Bank
from schemas.records import EMPTY_SLOT
from tests.bank_contents import list_live, read_parted
from tests.explored import FIRST, KEY, SECOND, THIRD, build_explored_bank
from tests.servers import MODEL, RunningServer, run_server, wait_until

NOBODY = "0" * 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exploring")
    build_explored_bank(folder)
    return folder


@pytest.fixture(scope="module")
def versions(folder: Path) -> dict[int, Bank]:
    return {number: Bank.open(folder / "bank", number) for number in (1, 2, 3)}


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    """The command itself, with a browser that writes down what it is to open."""
    browser = folder / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {folder}/opened\n')
    browser.chmod(browser.stat().st_mode | stat.S_IXUSR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BROWSER", str(browser))
        with run_server(folder / "bank", folder / "log", key=KEY, command_name="explore") as running:
            yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with server.open_client() as client:
        yield client


def ask(client: httpx.Client, path: str, **parameters: Any) -> Any:
    response = client.get(f"/v1/explore/{path}", params=parameters)
    assert response.status_code == 200, response.text
    return response.json()


def list_rows(bank: Bank, kind: str) -> list[dict[str, Any]]:
    return bank.read_table(kind).to_pylist() if bank.manifest.list_files(kind) else []


def test_the_command_opens_the_page_and_says_where_it_is(server: RunningServer, folder: Path) -> None:
    assert f"with a page at {server.url}/explore/; Ctrl-C ends it" in server.announcement
    wait_until(lambda: (folder / "opened").is_file() and (folder / "opened").read_text().endswith("\n"))
    assert (folder / "opened").read_text() == f"{server.url}/explore/\n"
    root = httpx.get(server.url)
    assert (root.status_code, root.headers["location"]) == (307, "/explore/")


def test_the_bank_is_described(client: httpx.Client, versions: dict[int, Bank]) -> None:
    told, bank = ask(client, "bank"), versions[3]
    live = list_live(bank)
    assert (told["bank"], told["version"], told["model"]) == (bank.url, 3, MODEL)
    assert told["num_documents"] == len(list_rows(bank, "documents")) == len(THIRD)
    assert told["num_references"] == len(live)
    layout = bank.manifest.layout
    assert len(told["memory_layers"]) == layout.num_layers
    assert (told["num_heads"], told["num_slots"]) == (layout.num_kv_heads, layout.num_slots)
    assert told["memory_bytes"] == layout.payload_bytes
    assert {one["ref_id"] for one in told["examples"]} <= live
    assert len(told["examples"]) == 6


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_marks_are_what_the_records_say(client: httpx.Client, versions: dict[int, Bank], number: int) -> None:
    """In the version that is served, read from shards with their checksums, and in older ones."""
    bank = versions[number]
    offsets = {row["ref_id"]: row["offsets"] for row in list_rows(bank, "memories")}
    layout = bank.manifest.layout
    for ref_id in sorted(list_live(bank)):
        told = ask(client, f"references/{ref_id}", version=number)
        assert (told["version"], told["served_version"], told["state"]) == (number, 3, "live")
        assert told["memory_bytes"] == layout.payload_bytes
        assert "".join(told["tokens"]) == told["text"]
        slots = iter(offsets[ref_id])
        expected = [
            {"layer": layer, "head": head, "tokens": sorted(set(kept) - {EMPTY_SLOT})}
            for layer in told["memory_layers"]
            for head in range(layout.num_kv_heads)
            if (kept := [next(slots) for _ in range(layout.num_slots)])
        ]
        assert told["kept"] == expected
        shown = describe_reference(bank, ref_id)
        counts = [sum(place in head["tokens"] for head in told["kept"]) for place in range(len(told["tokens"]))]
        assert [(token.text, token.num_heads) for token in shown.tokens] == list(
            zip(told["tokens"], counts, strict=True)
        )


def test_every_stored_reference_says_what_it_is(client: httpx.Client, versions: dict[int, Bank]) -> None:
    bank = versions[3]
    live = list_live(bank)
    duplicates = {row["ref_id"]: row for row in list_rows(bank, "duplicates")}
    deleted = {row["ref_id"] for row in list_rows(bank, "tombstones")}
    assert duplicates
    assert deleted
    found = set()
    for row in read_parted(bank, "references").to_pylist():
        ref_id = row["ref_id"]
        told = ask(client, f"references/{ref_id}")
        found.add(told["state"])
        if ref_id in deleted:
            assert told["state"] == "deleted"
        elif ref_id in duplicates:
            assert told["state"] == "near_duplicate"
            assert told["kept_ref_id"] == duplicates[ref_id]["kept_ref_id"]
            assert told["jaccard"] == duplicates[ref_id]["jaccard"]
        else:
            assert told["state"] == "live"
            assert ref_id in live
        assert (told["state"] == "live") == bool(told["kept"]) == (told["memory_bytes"] > 0)
        assert (told["text"], told["num_tokens"]) == (row["text"], row["num_tokens"])
    assert found == {"live", "near_duplicate", "deleted"}


def test_places_are_those_of_the_documents(client: httpx.Client, versions: dict[int, Bank]) -> None:
    places = list_rows(versions[2], "occurrences")
    at = {(place["doc_id"], place["ordinal"]): place["ref_id"] for place in places}
    for row in read_parted(versions[2], "references").to_pylist():
        told = ask(client, f"references/{row['ref_id']}/places", version=2)
        expected = [place for place in places if place["ref_id"] == row["ref_id"]]
        assert told["total"] == len(expected)
        assert [(place["doc_id"], place["ordinal"]) for place in told["places"]] == [
            (place["doc_id"], place["ordinal"]) for place in expected
        ]
        for place in told["places"]:
            text = SECOND[place["doc_id"]]
            assert text[place["start_char"] : place["end_char"]] == row["text"]
            assert text.encode()[place["start_byte"] : place["end_byte"]] == row["text"].encode()
            for name, step in (("previous_ref_id", -1), ("next_ref_id", 1)):
                assert place[name] == at.get((place["doc_id"], place["ordinal"] + step))
            assert place["num_references"] == sum(doc_id == place["doc_id"] for doc_id, _ in at)
            assert place["title"] == f"About {place['doc_id']}"


def test_lists_come_in_pages(client: httpx.Client, versions: dict[int, Bank]) -> None:
    (ref_id,) = {place["ref_id"] for place in list_rows(versions[3], "occurrences") if place["doc_id"] == "copy/pass"}
    pages = [ask(client, f"references/{ref_id}/places", start=start, limit=1) for start in range(3)]
    assert [page["total"] for page in pages] == [2, 2, 2]
    assert [[place["doc_id"] for place in page["places"]] for page in pages] == [["copy/pass"], ["topic/pass"], []]
    lines = [ask(client, "versions", start=start, limit=2)["versions"] for start in (0, 2, 4)]
    assert [[line["version"] for line in page] for page in lines] == [[3, 2], [1], []]


def test_near_duplicates_stand_side_by_side(client: httpx.Client, versions: dict[int, Bank]) -> None:
    texts = {row["ref_id"]: row["text"] for row in read_parted(versions[3], "references").to_pylist()}
    rows = list_rows(versions[3], "duplicates")
    for row in rows:
        for own, other, is_kept in (
            (row["ref_id"], row["kept_ref_id"], True),
            (row["kept_ref_id"], row["ref_id"], False),
        ):
            told = ask(client, f"references/{own}/duplicates")
            (pair,) = [pair for pair in told["pairs"] if pair["ref_id"] == other]
            assert (pair["is_kept"], pair["jaccard"]) == (is_kept, row["jaccard"])
            assert told["total"] == sum(own in (one["ref_id"], one["kept_ref_id"]) for one in rows)
            for side, ref_id in (("own", own), ("other", other)):
                assert "".join(stretch["text"] for stretch in pair[side]) == texts[ref_id]
    marked = {stretch["text"] for side in ("own", "other") for stretch in pair[side] if stretch["differs"]}
    assert marked == {"convenient", "handy"}


def test_snippets_come_in_the_order_asked_for(client: httpx.Client, versions: dict[int, Bank]) -> None:
    rows = read_parted(versions[1], "references").to_pylist()[:5][::-1]
    told = ask(client, "references", ref_id=[NOBODY, *(row["ref_id"] for row in rows)], version=1)
    assert [(one["ref_id"], one["text"]) for one in told["references"]] == [(r["ref_id"], r["text"]) for r in rows]
    for one in told["references"]:
        assert one["text"] in FIRST[one["doc_id"]]


def test_versions_are_listed(client: httpx.Client, versions: dict[int, Bank]) -> None:
    told = ask(client, "versions")
    assert (told["served_version"], told["total"]) == (3, 3)
    known: set[str] = set()
    for line in told["versions"][::-1]:
        bank = versions[line["version"]]
        files = {file.path: file.size_bytes for file in bank.manifest.files}
        assert line["size_bytes"] == sum(files.values())
        assert line["new_size_bytes"] == sum(size for path, size in files.items() if path not in known)
        known |= set(files)
        assert line["num_references"] == len(list_live(bank))
        assert line["parent"] == (line["version"] - 1 or None)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (3, 1), (2, 2)])
def test_two_versions_are_compared(client: httpx.Client, versions: dict[int, Bank], before: int, after: int) -> None:
    told = ask(client, f"differences/{before}/{after}")
    corpora = {1: FIRST, 2: SECOND, 3: THIRD}
    old, new = corpora[before], corpora[after]
    changed = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
    for what, names in (("added", new.keys() - old.keys()), ("removed", old.keys() - new.keys()), ("changed", changed)):
        assert told[f"documents_{what}"] == {"count": len(names), "doc_ids": sorted(names)}
    live = {number: list_live(versions[number]) for number in (before, after)}
    for what, ref_ids, number in (
        ("added", live[after] - live[before], after),
        ("removed", live[before] - live[after], before),
    ):
        listed = told[f"references_{what}"]
        assert listed["count"] == len(ref_ids)
        assert len(listed["samples"]) == min(5, len(ref_ids))
        for sample in listed["samples"]:
            assert sample["ref_id"] in ref_ids
            assert sample["text"] in corpora[number][sample["doc_id"]]
    assert told["settings"] == told["fingerprint"] == []


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        (f"references/{NOBODY}", 404, f"version 3 of the bank has no reference {NOBODY}"),
        (f"references/{NOBODY}/places?version=2", 404, "version 2 of the bank has no reference"),
        (f"references/{NOBODY}/duplicates", 404, "has no reference"),
        (f"references/{NOBODY}?version=9", 404, "the bank has no version 9"),
        ("references/abc", 400, "ref_id"),
        ("references", 400, "ref_id"),
        ("references?ref_id=abc", 400, "ref_id"),
        ("references?" + "&".join(101 * [f"ref_id={NOBODY}"]), 400, "ref_id"),
        ("versions?limit=0", 400, "limit"),
        ("versions?start=-1", 400, "start"),
        ("differences/1/9", 404, "the bank has no version 9"),
        ("differences/1/x", 400, "after"),
        ("nothing", 404, "Not Found"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(client: httpx.Client, path: str, status: int, words: str) -> None:
    response = client.get(f"/v1/explore/{path}")
    assert response.status_code == status, response.text
    message = response.json()["error"]["message"]
    assert words in message
    assert "\n" not in message


def test_the_page_needs_no_key_and_everything_it_shows_does(server: RunningServer) -> None:
    for path in ("bank", "versions", f"references/{NOBODY}", "differences/1/2"):
        assert httpx.get(f"{server.url}/v1/explore/{path}", timeout=60).status_code == 401
    document = httpx.get(f"{server.url}/explore/", timeout=60)
    assert document.status_code == 200
    assert "Morag" not in document.text
    assert "bank</bdi>" not in document.text


def test_every_response_of_the_page_has_the_policy(client: httpx.Client) -> None:
    files = [f"static/{path.name}" for path in STATIC.iterdir()] + [f"static/{STYLE_SHEET}"]
    views = ["", f"references/{NOBODY}", "versions", "versions/1/2", "playground"]
    assert len(views) == len(VIEWS)
    for path in [*files, *views, "nothing", "static/nothing.js", "static/../pages.py"]:
        response = client.get(f"/explore/{path}")
        assert response.status_code == (404 if "nothing" in path or ".." in path else 200), path
        assert {name: response.headers[name] for name in HEADERS} == HEADERS
        kind = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}.get(Path(path).suffix)
        if response.status_code == 200 and kind:
            assert response.headers["content-type"].partition(";")[0] == kind
    policy = HEADERS["Content-Security-Policy"]
    for rule in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"):
        assert rule in policy
    assert "unsafe" not in policy


def test_nothing_is_inline_and_nothing_is_from_elsewhere() -> None:
    for name, document in render_views().items():
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:|https?://", document), name
        for script in re.findall(r"<script[^>]*>", document):
            assert script.startswith('<script type="module" src="/explore/static/'), name
    for path in [*STATIC.iterdir(), *TEMPLATES.iterdir(), REPORT_TEMPLATES / STYLE_SHEET]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(inner|outer)HTML|insertAdjacent|document\.write|\beval\(|new Function|@import", text), (
            path
        )
        elsewhere = set(
            re.findall(r"(?:https?:)?//[a-z][^\s\"'`)]*", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
        )
        assert elsewhere <= {"http://www.w3.org/2000/svg"}, path


def measure_contrast(one: str, other: str) -> float:
    """Returns the contrast of two colours as the guidelines for accessibility define it, 1 to 21."""

    def get_luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((get_luminance(one), get_luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_can_be_read_in_the_light_and_in_the_dark(scheme: int) -> None:
    style = (REPORT_TEMPLATES / STYLE_SHEET).read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", blocks[scheme]))
    grounds = [("text", "page"), ("text", "panel"), ("muted", "page"), ("muted", "panel"), ("accent", "page")]
    grounds += [("accent", "panel"), ("good", "page"), ("bad", "page"), ("bad", "panel"), ("page", "accent")]
    # A mark is between the panel and its own colour, by how often a token is kept.
    grounds += [("mark-text", "mark"), ("mark-text", "panel")]
    for text, ground in grounds:
        assert measure_contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert measure_contrast(colours["bar"], colours["panel"]) >= 3


def test_the_routes_are_in_the_schema(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    paths = {path: route["get"] for path, route in schema["paths"].items() if path.startswith("/v1/explore/")}
    assert len(paths) == 7
    for route in paths.values():
        content = route["responses"]["200"]["content"]["application/json"]["schema"]
        assert content["$ref"].removeprefix("#/components/schemas/") in schema["components"]["schemas"]
        assert {"400", "401", "404", "504"} <= set(route["responses"])
