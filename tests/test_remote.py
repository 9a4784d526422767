"""A bank on a server, read by clients that have the model: real processes, compared with the same bank at hand."""

import dataclasses
import gc
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from pydoc_data.topics import topics
from typing import ClassVar

import httpx
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flows.building import build, update
from flows.cli import app
from flows.codec_training import CodecRequest, train_on_bank
from flows.generation import open_generator, open_writer
from flows.remote.client import BankConnection, RemoteBank, open_remote_generator
from flows.remote.holdings import LOOK_SECONDS, MAX_OPEN_VERSIONS, Holdings
from flows.remote.wire import MAX_HITS, MAX_MEMORIES, MAX_QUERIES
from flows.searching import open_retriever
from flows.steps import Steps
from model.bank_records import BankRecords
from model.embedding import load_embedder
from model.fetching import BankMemories, FetchedMemories
from model.generating import GenerationConfig, Generator
from schemas.bank import Bank
from schemas.errors import BankError, BankFormatError, InputError, WrongModelError
from schemas.manifest import commit_manifest, make_manifest_name
from schemas.stores import LocalStore, StoreError
from tests.bank_contents import list_live
from tests.servers import MODEL, RunningServer, run_server, wait_until
from tests.servers import build_bank as build_cold_bank
from tests.test_equality import change_word, make_config, write_corpus

DOCUMENTS = {name: topics[name] for name in ("assert", "del", "pass", "class", "import")}

CHANGED = {**DOCUMENTS, "del": change_word(topics["del"], 20)}

PROMPT = (
    "The assert statement is a convenient way to insert debugging assertions into a program, and the del statement " * 3
)
"""More than one chunk of 64 tokens."""

KEY = "a-key-of-more-than-sixteen-characters"


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """A bank of two versions; the second has another text of one document."""
    folder = tmp_path_factory.mktemp("remote")
    config = make_config({"memory": {"references_per_shard": 16}})
    build(LocalStore(folder / "bank"), [str(write_corpus(folder, DOCUMENTS))], config, Steps())
    update(LocalStore(folder / "bank"), [str(write_corpus(folder, CHANGED))], {}, Steps())
    return Bank.open(folder / "bank")


@pytest.fixture(scope="module")
def server(bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with run_server(Path(bank.url), tmp_path_factory.mktemp("log") / "log", command_name="serve-bank") as running:
        yield running


@pytest.fixture(scope="module")
def remote(server: RunningServer) -> RemoteBank:
    return RemoteBank(BankConnection(server.url))


def generate(generator: Generator, **settings: int) -> tuple[list[list[int]], list[list[tuple[str, float]]]]:
    """Returns what is generated, and what each chunk has read."""
    tokens = generator.generate_batch([PROMPT, "To delete"], GenerationConfig(max_new_tokens=70, **settings))
    chunks = [chunk for of_sequence in generator.trace.chunks for chunk in of_sequence]
    return tokens, [[(hit.ref_id, hit.score) for hit in chunk.hits] for chunk in chunks]


def test_a_client_generates_what_the_bank_at_hand_says(server: RunningServer, bank: Bank) -> None:
    expected = generate(open_generator(MODEL, bank.url))
    assert len(expected[1]) >= 4
    assert generate(open_generator(MODEL, server.url)) == expected
    assert generate(open_generator(MODEL, server.url, cache_bytes=0)) == expected
    assert generate(open_generator(MODEL, server.url), prefetch_tokens=0) == expected


def test_a_client_has_nothing_of_the_bank(server: RunningServer, bank: Bank, tmp_path: Path) -> None:
    """The client's process opens no file of the bank, and loads no index."""
    script = (
        "import sys\n"
        "from flows.generation import open_generator\n"
        "from model.generating import GenerationConfig\n"
        "generator = open_generator('memory3-tiny', sys.argv[1])\n"
        "generator.generate_batch(['The assert statement'], GenerationConfig(max_new_tokens=2))\n"
        "assert generator.traces[0].hits and generator.statistics.num_read == 5\n"
        "print(int('duckdb' in sys.modules), int('apache_beam' in sys.modules), int('fastapi' in sys.modules))\n"
    )
    trace = tmp_path / "opened"
    variables = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    audit = (
        f"import sys\nout = open({str(trace)!r}, 'w')\n"
        "sys.addaudithook(lambda event, args: event == 'open' and print(args[0], file=out, flush=True))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", audit + script, server.url], env=variables, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["0", "0", "0"]
    assert trace.read_text()
    assert bank.url not in trace.read_text()


def test_records_and_hits_are_those_of_the_bank(remote: RemoteBank, bank: Bank) -> None:
    ref_ids = sorted(list_live(bank))
    assert len(ref_ids) > 10
    expected = BankRecords(bank).read(ref_ids).records
    found = remote.read(ref_ids).records
    assert list(found) == ref_ids
    assert all(np.array_equal(found[ref_id], expected[ref_id]) for ref_id in ref_ids)
    assert remote.description.num_references == len(ref_ids)

    texts = [topics[name][:300] for name in sorted(topics)][: MAX_QUERIES + 5]
    queries = load_embedder("static").embed(texts)
    assert remote.find(queries, 5) == open_retriever(bank).search(texts, 5)
    assert remote.find(queries[:0], 5) == []
    assert remote.read([]).records == {}


def test_more_hits_than_references_are_as_many_as_there_are(remote: RemoteBank, bank: Bank) -> None:
    (hits,) = remote.find(load_embedder("static").embed(["del"]), MAX_HITS)
    assert [hit.ref_id for hit in hits] == [hit.ref_id for hit in open_retriever(bank).search(["del"], MAX_HITS)[0]]
    assert {hit.ref_id for hit in hits} == list_live(bank)


def test_many_memories_are_asked_for_in_parts(tmp_path: Path, remote: RemoteBank, bank: Bank) -> None:
    ref_ids = sorted(list_live(bank))
    asked: list[int] = []

    class Counting(BankConnection):
        def ask(self, method: str, path: str, **settings: object) -> bytes:
            asked.append(len(settings.get("body") or b"") // 32)  # type: ignore[arg-type]
            return super().ask(method, path, **settings)  # type: ignore[arg-type]

    parted = RemoteBank(Counting(remote.url))
    unknown = [f"{number:032x}" for number in range(MAX_MEMORIES + 1)]
    with pytest.raises(BankFormatError, match="has no memory for"):
        parted.read(unknown)
    assert asked == [0, MAX_MEMORIES]
    assert list(parted.read(ref_ids).records) == ref_ids


def test_a_client_keeps_its_version_and_the_next_one_has_the_new(tmp_path: Path, bank: Bank) -> None:
    folder = tmp_path / "bank"
    shutil.copytree(bank.url, folder)
    texts = ["The del statement otherwise"]
    queries = load_embedder("static").embed(texts)
    with run_server(folder, tmp_path / "log", command_name="serve-bank") as server:
        before = RemoteBank(BankConnection(server.url))
        first = RemoteBank(BankConnection(server.url), "1")
        update(LocalStore(folder), [str(write_corpus(tmp_path, {**CHANGED, "with": topics["with"]}))], {}, Steps())
        after = RemoteBank(BankConnection(server.url))
        assert [of.description.version for of in (first, before, after)] == [1, 2, 3]
        for of in (first, before, after):
            opened = Bank.open(folder, of.description.version)
            assert of.find(queries, 9) == open_retriever(opened).search(texts, 9)
        new = sorted(list_live(Bank.open(folder, 3)) - list_live(Bank.open(folder, 2)))
        assert after.read(new).records.keys() == set(new)
        with pytest.raises(BankFormatError, match=f"has no memory for {new[0]}"):
            before.read(new)
        gone = sorted(list_live(Bank.open(folder, 1)) - list_live(Bank.open(folder, 3)))
        assert first.read(gone).records.keys() == set(gone)
        with pytest.raises(InputError, match="is not live in version 3"):
            after.read(gone)
        assert server.log.read_text() == ""


def test_a_version_that_is_removed_is_not_handed_out_any_more(tmp_path: Path, bank: Bank) -> None:
    folder = tmp_path / "bank"
    shutil.copytree(bank.url, folder)
    ref_ids = sorted(list_live(bank))
    with run_server(folder, tmp_path / "log", command_name="serve-bank") as server:
        remote = RemoteBank(BankConnection(server.url))
        assert remote.read(ref_ids).records.keys() == set(ref_ids)
        for number in (1, 2):
            (folder / make_manifest_name(number)).unlink()

        def is_gone() -> bool:
            try:
                found = remote.read(ref_ids).records
            except BankFormatError:
                return True
            return not found

        wait_until(is_gone, LOOK_SECONDS + 30)
        with pytest.raises(BankFormatError, match="has no version 2, or not any more"):
            remote.read(ref_ids)
        with pytest.raises(BankError, match="holds no committed version"):
            RemoteBank(BankConnection(server.url))


def count_open_files() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_versions_that_nobody_reads_leave_no_file_open(tmp_path: Path, bank: Bank) -> None:
    folder = tmp_path / "bank"
    shutil.copytree(bank.url, folder)
    holdings = Holdings(str(folder))
    ref_ids = sorted(list_live(bank))
    assert holdings.get(2).records.read(ref_ids).records.keys() == set(ref_ids)
    after = []
    for number in range(3, 3 + 3 * MAX_OPEN_VERSIONS):
        commit_manifest(folder, dataclasses.replace(bank.manifest, version=number, parent=2))
        holdings.find(None)
        after.append(count_open_files())
    assert len(set(after[MAX_OPEN_VERSIONS:])) == 1


def test_the_codec_is_handed_out_once(tmp_path: Path, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    codec = tmp_path / "codec.safetensors"
    train_on_bank(bank, CodecRequest(name="lloyd4", out=codec))
    config = make_config({"memory": {"codec": str(codec), "references_per_shard": 16}})
    documents = {"assert": topics["assert"], "pass": topics["pass"]}
    build(LocalStore(tmp_path / "bank"), [str(write_corpus(tmp_path, documents))], config, Steps())
    trained = Bank.open(tmp_path / "bank")
    ref_ids = sorted(list_live(trained))
    expected = BankMemories(trained, open_writer(trained, MODEL)).fetch(ref_ids)
    with run_server(Path(trained.url), tmp_path / "log", command_name="serve-bank") as server:
        remote = RemoteBank(BankConnection(server.url))
        path = remote.locate_codec()
        assert path is not None
        assert path.read_bytes() == codec.read_bytes()
        found = FetchedMemories(remote, open_writer(trained, MODEL)).fetch(ref_ids)
        assert (found.keys_LBHSD == expected.keys_LBHSD).all()
        assert (found.values_LBHSD == expected.values_LBHSD).all()
        far = open_remote_generator(MODEL, server.url)
        assert generate(far) == generate(open_generator(MODEL, trained.url))
        asked = server.read_metric('memory3_requests_total{route="/v1/bank/{version}/codec",status="200"}')
        path.write_bytes(b"damaged")
        assert remote.locate_codec() == path
        assert path.read_bytes() == codec.read_bytes()
        again = server.read_metric('memory3_requests_total{route="/v1/bank/{version}/codec",status="200"}')
        assert (asked, again) == (1.0, 2.0)


def test_another_model_is_refused(server: RunningServer, bank: Bank) -> None:
    writer = open_writer(bank, MODEL)
    with torch.no_grad():
        writer.checkpoint.model.get_input_embeddings().weight[0] += 1.0
    with pytest.raises(WrongModelError, match="weights differ"):
        FetchedMemories(RemoteBank(BankConnection(server.url)), writer)


def test_a_key_is_wanted(tmp_path: Path, bank: Bank) -> None:
    with run_server(Path(bank.url), tmp_path / "log", command_name="serve-bank", key=KEY) as server:
        with pytest.raises(InputError, match="wants its API key; set MEMORY3_API_KEY"):
            RemoteBank(BankConnection(server.url))
        assert RemoteBank(BankConnection(server.url, KEY)).description.version == 2


def test_a_cold_bank_and_texts_are_refused(tmp_path: Path, server: RunningServer) -> None:
    cold = build_cold_bank(tmp_path, {"pass": topics["pass"]})
    refused = CliRunner().invoke(app, ["serve-bank", "--bank", str(cold), "--port", "0"])
    assert isinstance(refused.exception, InputError)
    assert "is cold: its memories are encoded by a model when they are first read" in str(refused.exception)
    with pytest.raises(InputError, match="hands out memories, not texts"):
        open_generator(MODEL, server.url, knowledge="text")


def test_the_ordinary_model_needs_no_memory(server: RunningServer) -> None:
    plain = open_generator(MODEL, server.url, knowledge="none")
    assert generate(plain) == generate(open_generator(MODEL, None, knowledge="none"))


def test_requests_that_make_no_sense_get_a_sentence(server: RunningServer) -> None:
    client = server.open_client()
    vector = load_embedder("static").embed(["del"]).tobytes()
    refused = [
        ("/v1/bank/2/search?num_hits=5", b"", 400, "send vectors of 128 little endian float32"),
        ("/v1/bank/2/search?num_hits=5", vector[:-1], 400, "send vectors of 128"),
        ("/v1/bank/2/search?num_hits=5", b"\xff" * len(vector), 400, "no number"),
        ("/v1/bank/2/search?num_hits=5", vector * (MAX_QUERIES + 1), 400, "too many"),
        ("/v1/bank/2/search?num_hits=0", vector, 400, "num_hits"),
        (f"/v1/bank/2/search?num_hits={MAX_HITS + 1}", vector, 400, "num_hits"),
        ("/v1/bank/2/memories", b"", 400, "send ids of 32"),
        ("/v1/bank/2/memories", b"x" * 32, 400, "send ids of 32"),
        ("/v1/bank/2/memories", b"0" * 33, 400, "send ids of 32"),
        ("/v1/bank/2/memories", b"0" * 64, 400, "twice"),
        ("/v1/bank/2/memories", b"0" * (2 << 20), 413, "larger than"),
        ("/v1/bank/99/memories", b"0" * 32, 404, "has no version 99"),
        (f"/v1/bank/{1 << 31}/memories", b"0" * 32, 400, "version"),
        ("/v1/bank/0/memories", b"0" * 32, 400, "version"),
    ]
    for path, body, status, message in refused:
        answer = client.post(path, content=body)
        assert answer.status_code == status, (path, answer.text)
        assert message in answer.json()["error"]["message"]
    assert client.get("/v1/bank", params={"at": "no-such-tag"}).status_code == 400
    assert client.get("/v1/bank/2/codec").status_code == 404
    assert httpx.get(f"{server.url}/healthz", timeout=60).json() == {"status": "ok"}
    assert server.log.read_text() == ""


class Meddling(BaseHTTPRequestHandler):
    """Stands between a client and a server, and spoils what comes back."""

    target = ""
    spoil: ClassVar[dict[str, str]] = {}

    def log_message(self, *_arguments: object) -> None:
        """Says nothing."""

    def _pass_on(self, body: bytes | None) -> None:
        answer = httpx.request(self.command, f"{self.target}{self.path}", content=body, timeout=60)
        content = bytearray(answer.content)
        how = next((how for part, how in self.spoil.items() if part in self.path), "")
        if how == "flip":
            content[len(content) // 2] ^= 1
        elif how == "swap":
            middle = len(content) // 2
            content = content[middle:] + content[:middle]
        elif how == "cut":
            content = content[:-1]
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self._pass_on(None)

    def do_POST(self) -> None:
        self._pass_on(self.rfile.read(int(self.headers["Content-Length"])))


@pytest.mark.parametrize("how", ["flip", "swap", "cut"])
def test_what_is_damaged_on_the_way_is_not_read(how: str, server: RunningServer, bank: Bank) -> None:
    handler = type("Handler", (Meddling,), {"target": server.url, "spoil": {"/memories": how}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as between:
        threading.Thread(target=between.serve_forever, daemon=True).start()
        remote = RemoteBank(BankConnection(f"http://127.0.0.1:{between.server_port}"))
        with pytest.raises(BankFormatError):
            remote.read(sorted(list_live(bank))[:2])
        between.shutdown()


def test_a_server_that_comes_back_is_asked_again(tmp_path: Path, bank: Bank) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    ref_ids = sorted(list_live(bank))[:2]
    with run_server(Path(bank.url), tmp_path / "log", "--port", str(port), command_name="serve-bank") as server:
        remote = RemoteBank(BankConnection(server.url))
        remote.read(ref_ids)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    with pytest.raises(StoreError, match=r"cannot be reached .*; is it running\?") as failure:
        remote.read(ref_ids)
    assert failure.value.may_pass
    with run_server(Path(bank.url), tmp_path / "log", "--port", str(port), command_name="serve-bank"):
        assert remote.read(ref_ids).records.keys() == set(ref_ids)


def test_other_servers_are_told_apart(tmp_path: Path) -> None:
    handler = type("Plain", (BaseHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(InputError, match="is no bank server of memory3: it answered 501"):
            RemoteBank(BankConnection(f"http://127.0.0.1:{other.server_port}"))
        other.shutdown()
    with pytest.raises(InputError, match="is no address of a server"):
        RemoteBank(BankConnection("http://exa mple:x"))


def test_the_command_line_takes_an_address_for_a_bank(server: RunningServer, bank: Bank) -> None:
    command = ["generate", "--prompt", "The assert statement", "--max-new-tokens", "8", "--trace", "--bank"]
    far = CliRunner().invoke(app, [*command, server.url])
    near = CliRunner().invoke(app, [*command, bank.url])
    assert (far.exit_code, near.exit_code) == (0, 0), far.output
    assert far.output == near.output
    assert re.search(r"5 from the bank", far.output)
    old = CliRunner().invoke(app, [*command, server.url, "--at", "1"])
    assert old.exit_code == 0
