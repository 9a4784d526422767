"""The client's side: a bank that is on a server, read as if it were here.

What is here is the model, the embedding model that makes vectors of questions, and the codec's decoder. What goes over
the wire is vectors and ids in one direction, ids, similarities and compressed memories in the other.
"""

import hashlib
import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import httpx
from pydantic import ValidationError

from flows.generation import join_writer
from flows.remote.wire import (
    BYTES_TYPE,
    MAX_BODY_BYTES,
    MAX_MEMORIES,
    MAX_QUERIES,
    BankDescription,
    pack_ids,
    pack_vectors,
    unpack_hits,
    unpack_records,
)
from flows.serving.error_models import UNREADABLE, ErrorResponse
from flows.serving.settings import KEY_VARIABLE
from model.checkpoint import load_checkpoint
from model.embedding import SHIPPED_EMBEDDERS, load_embedder
from model.fetching import DEFAULT_CACHE_BYTES, FetchedMemories
from model.generating import Generator
from model.retrieving import Hit, check_embedder
from schemas.atomic import write_bytes_atomically
from schemas.errors import BankError, BankFormatError, InputError
from schemas.manifest import MAX_CODEC_BYTES
from schemas.protocols import Embedder, Fingerprint, FloatArray, FoundRecords
from schemas.records import Bytes, RecordLayout
from schemas.stores import StoreError, find_cache_folder

TIMEOUT = httpx.Timeout(60.0, connect=5.0)

PAUSES_SECONDS = (0.2, 1.0, 3.0)
"""Before a question is asked again that got no answer, or one that may be better a little later."""

PASSING = frozenset({429, 502, 503, 504})

T = TypeVar("T")


def _split(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (values[start : start + size] for start in range(0, len(values), size))


class BankConnection:
    """Requests to a bank server, with what its errors mean; safe to use from several threads.

    Attributes:
        url: address of the server.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Takes the address of a server; nothing is asked of it yet.

        Args:
            url: such as ``http://127.0.0.1:8100``.
            api_key: what the server wants to be told; None for nothing.

        Raises:
            InputError: it is no address.
        """
        self.url = url.rstrip("/")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        try:
            self._client = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT, trust_env=False)
        except httpx.InvalidURL as error:
            raise InputError(f"{url} is no address of a server: {error}") from error

    def ask(
        self, method: str, path: str, *, body: bytes | None = None, parameters: Mapping[str, str | int] | None = None
    ) -> bytes:
        """Returns the body of an answer.

        Raises:
            InputError: the server does not accept what was asked.
            BankFormatError: it does not have what was asked for.
            StoreError: it cannot be reached, or cannot answer now.
        """
        headers = {} if body is None else {"Content-Type": BYTES_TYPE}
        for pause in itertools.chain(PAUSES_SECONDS, [None]):
            try:
                answer = self._client.request(
                    method, path, content=body, params=dict(parameters or {}), headers=headers
                )
            except httpx.HTTPError as error:
                failure: BankError = StoreError(
                    f"the bank server {self.url} cannot be reached ({error or type(error).__name__}); is it running?"
                )
                failure.may_pass = True
            else:
                if answer.is_success:
                    return answer.content
                failure = self._explain(answer)
            if pause is None or not failure.may_pass:
                raise failure
            time.sleep(pause)
        raise AssertionError("not reached")

    def _explain(self, answer: httpx.Response) -> BankError:
        try:
            error = ErrorResponse.model_validate_json(answer.content).error
        except ValidationError:
            return InputError(f"{self.url} is no bank server of memory3: it answered {answer.status_code}")
        if answer.status_code == 401:
            return InputError(f"the bank server {self.url} wants its API key; set {KEY_VARIABLE}")
        if error.code == UNREADABLE or answer.status_code == 404:
            return BankFormatError(f"{self.url}: {error.message}")
        if answer.status_code in PASSING:
            failure = StoreError(f"{self.url}: {error.message}")
            failure.may_pass = True
            return failure
        return InputError(f"{self.url}: {error.message}")


class RemoteBank:
    """A version of a bank on a server; a :class:`schemas.protocols.RecordSource`.

    Attributes:
        description: what the server says of it.
    """

    def __init__(self, connection: BankConnection, version: str | None = None) -> None:
        """Asks for a version.

        Raises:
            BankError: the server cannot be reached, has no such version, or is of another release.
        """
        self._connection = connection
        answer = connection.ask("GET", "/v1/bank", parameters={} if version is None else {"at": version})
        try:
            self.description = BankDescription.model_validate_json(answer)
            self._fingerprint = self.description.read_fingerprint()
        except (ValidationError, TypeError) as error:
            raise BankFormatError(f"{connection.url} is no bank server of this release of memory3") from error
        self._layout = self.description.read_layout()
        self._path = f"/v1/bank/{self.description.version}"

    @property
    def url(self) -> str:
        """Address of the server."""
        return self._connection.url

    @property
    def fingerprint(self) -> Fingerprint:
        """What wrote the records."""
        return self._fingerprint

    @property
    def layout(self) -> RecordLayout:
        """Their shape and type."""
        return self._layout

    def read(self, ref_ids: Sequence[str]) -> FoundRecords:
        """Returns the records of distinct references; see :class:`schemas.protocols.RecordSource`."""
        found = FoundRecords(records={})
        for wanted in _split(ref_ids, MAX_MEMORIES):
            body = self._connection.ask("POST", f"{self._path}/memories", body=pack_ids(wanted))
            records = self._unpack(body, wanted)
            found.records.update(zip(wanted, records, strict=True))
        return found

    def _unpack(self, body: bytes, ref_ids: Sequence[str]) -> Bytes:
        try:
            records = unpack_records(body, len(ref_ids), self._layout)
        except ValueError as error:
            raise BankFormatError(f"{self.url} answered {len(body):,} bytes for {len(ref_ids)} memories") from error
        self._layout.check_records(records, ref_ids, origin=self.url)
        return records

    def find(self, queries: FloatArray, num_hits: int) -> list[list[Hit]]:
        """Returns the best references for each unit vector, best first.

        Args:
            queries: float32 (queries, dimension).
            num_hits: hits wanted.

        Raises:
            BankError: see :meth:`BankConnection.ask`.
        """
        if not self.description.num_references:
            return [[] for _ in queries]
        hits: list[list[Hit]] = []
        step = max(1, min(MAX_QUERIES, MAX_BODY_BYTES // max(1, queries.itemsize * queries.shape[1])))
        for start in range(0, len(queries), step):
            wanted = queries[start : start + step]
            body = self._connection.ask(
                "POST", f"{self._path}/search", body=pack_vectors(wanted), parameters={"num_hits": num_hits}
            )
            try:
                hits += unpack_hits(body, len(wanted), num_hits)
            except ValueError as error:
                raise BankFormatError(f"{self.url} answered {len(body):,} bytes for {len(wanted)} queries") from error
        return hits

    def locate_codec(self) -> Path | None:
        """Returns a file of this machine with the parameters of the codec, None if it has none.

        Raises:
            BankFormatError: what the server hands out is not that file.
        """
        codec = self.description.codec
        if codec is None:
            return None
        if codec.size_bytes > MAX_CODEC_BYTES:
            raise BankFormatError(f"{self.url} has a codec of {codec.size_bytes:,} bytes, which is none")
        path = find_cache_folder("codec", codec.sha256) / "codec.safetensors"
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != codec.sha256:
            body = self._connection.ask("GET", f"{self._path}/codec")
            if hashlib.sha256(body).hexdigest() != codec.sha256:
                raise BankFormatError(f"{self.url} handed out a codec that is not the one of its bank")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomically(path, body)
        return path


class RemoteRetriever:
    """Finds references of a bank on a server; a :class:`model.retrieving.MemorySearch`."""

    def __init__(self, bank: RemoteBank, embedder: Embedder) -> None:
        """Joins a bank with the model that makes vectors of questions.

        Raises:
            WrongModelError: its references were embedded by another one.
        """
        check_embedder(bank.url, bank.description.embedder_id, embedder)
        self._bank, self._embedder = bank, embedder

    def search(self, texts: Sequence[str], num_hits: int) -> list[list[Hit]]:
        """Returns the best references for each text, best first."""
        return self._bank.find(self._embedder.embed(texts), num_hits)


def open_remote_generator(
    model: str,
    url: str,
    version: str | None = None,
    *,
    knowledge: str = "memory",
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    device: str | None = None,
    embedder: str | None = None,
) -> Generator:
    """Loads a model that reads a bank on a server; see :func:`flows.generation.open_generator`.

    Args:
        model: ``memory3-tiny`` or the folder of a checkpoint.
        url: address of the server.
        version: the version to read, None for the one of the moment.
        knowledge: ``memory``, or ``none`` for the ordinary model.
        cache_bytes: RAM for memories that were read.
        device: where to compute; None for where the bank was written.
        embedder: the embedding model of the bank, if it is not one that comes with this project.

    Raises:
        InputError: references as text are asked for, of which a bank server has none; or the bank was embedded by a
            model that has to be named.
        BankError: the server cannot be reached, or its bank was written by another model.
    """
    if knowledge == "text":
        raise InputError(f"{url} hands out memories, not texts; give the folder or the store of the bank for --rag")
    bank = RemoteBank(BankConnection(url, os.environ.get(KEY_VARIABLE) or None), version)
    memory = bank.description.memory
    if knowledge == "none":
        return Generator(
            load_checkpoint(model, device=device or str(memory["device"]), dtype=str(memory["compute_dtype"]))
        )
    writer = join_writer(model, memory, bank.fingerprint, bank.layout, bank.locate_codec(), device=device)
    memories = FetchedMemories(bank, writer, cache_bytes=cache_bytes)
    # A server does not say what is downloaded or loaded here.
    name = embedder or bank.description.embedder
    if embedder is None and name not in SHIPPED_EMBEDDERS:
        raise InputError(f"the bank of {url} was embedded by {name!r}; say where that model is here, with --embedder")
    loaded = load_embedder(name, device=str(writer.checkpoint.device))
    return Generator(writer.checkpoint, RemoteRetriever(bank, loaded), memories)
