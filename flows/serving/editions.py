"""The version of the bank that is served, and its exchange for a newer one while requests are answered.

An **edition** is a version opened for a model: its bank, its search, its memories. Whoever retrieves takes the edition
of the moment, so that what is deleted is not read by the next chunk, though the answer began before; the shards of an
old one stay open until nobody reads them any more.
"""

import asyncio
import dataclasses
import logging
import threading
from collections.abc import Sequence

from flows.generation import open_writer
from flows.searching import open_retriever
from flows.serving.settings import ServingConfig
from model.checkpoint import Checkpoint
from model.fetching import BankMemories
from model.generating import GenerationConfig, Generator
from model.knowledge import Knowledge, KnowledgeSource
from model.retrieving import Hit, Retriever
from model.writing import ReferenceWriter
from schemas.bank import Bank
from schemas.errors import BankError, BankFormatError
from schemas.stores import BankStore, open_store
from schemas.tags import find_version

_LOGGER = logging.getLogger(__name__)

SMALL_MODEL_PARAMETERS = 50_000_000
"""Up to this size one thread computes: the operations of a step are so short that others would mostly be waited for.

On a machine of two cores that other work also wanted, two threads answered an eighth of what one did."""


class SharedSearch:
    """A retriever that several threads use, one at a time: embedding models do not promise more."""

    def __init__(self, retriever: Retriever) -> None:
        """Stands before a retriever."""
        self._retriever = retriever
        self._lock = threading.Lock()

    def search(self, texts: Sequence[str], num_hits: int) -> list[list[Hit]]:
        """Returns the best references for each text, best first."""
        with self._lock:
            return self._retriever.search(texts, num_hits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edition:
    """A version of the bank, opened for a model.

    Attributes:
        bank: the version.
        writer: the model that writes and reads its memories.
        memories: the memories.
        search: finds them.
    """

    bank: Bank
    writer: ReferenceWriter
    memories: BankMemories
    search: SharedSearch

    @property
    def version(self) -> int:
        """Number of the version."""
        return self.bank.manifest.version

    @property
    def checkpoint(self) -> Checkpoint:
        """The model."""
        return self.writer.checkpoint

    @property
    def knowledge(self) -> Knowledge:
        """What chunks retrieve from."""
        return Knowledge(retriever=self.search, memories=self.memories, version=self.version)

    def make_generator(self, *, with_memory: bool, renew: KnowledgeSource | None = None) -> Generator:
        """Returns a generator that reads this version, or the ordinary model.

        Args:
            with_memory: whether memories are read.
            renew: says before each retrieval what it is made from; None for this version.
        """
        if not with_memory:
            return Generator(self.checkpoint)
        return Generator(self.checkpoint, self.search, self.memories, renew=renew)


def choose_num_threads(checkpoint: Checkpoint) -> int | None:
    """Returns how many threads should compute for a model where nobody says; None for PyTorch's choice."""
    num_parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    is_small = checkpoint.device.type == "cpu" and num_parameters <= SMALL_MODEL_PARAMETERS
    return 1 if is_small else None


def open_edition(bank: Bank, config: ServingConfig, previous: Edition | None = None) -> Edition:
    """Opens a version for the model; the model itself is loaded only if the one at hand cannot read this version.

    Args:
        bank: the version.
        config: which model, and where it computes.
        previous: what is served so far.

    Raises:
        WrongModelError: the version was written by another model.
        BankFormatError: a file is missing or damaged.
    """
    if not bank.is_complete():
        raise BankFormatError(
            f"version {bank.manifest.version} of bank {bank.url} lacks files, or has some of another size; "
            f"run memory3 verify --bank {bank.url}"
        )
    found = bank.manifest
    if (
        previous is not None
        and previous.bank.manifest.fingerprint == found.fingerprint
        and previous.bank.manifest.layout == found.layout
    ):
        writer = previous.writer
    else:
        writer = open_writer(bank, config.model, device=config.device)
    memories = BankMemories(bank, writer, cache_bytes=config.cache_bytes)
    memories.hold_shards()
    return Edition(bank=bank, writer=writer, memories=memories, search=SharedSearch(open_retriever(bank)))


class Shelf:
    """Holds the edition of the moment, and looks for newer versions.

    Attributes:
        edition: what is served.
        problem: why the version that should be served is not; None if it is.
        num_exchanges: how often a version was exchanged for another.
        num_failures: how often that failed.
    """

    def __init__(self, config: ServingConfig) -> None:
        """Opens the version that the settings name.

        Raises:
            BankError: it cannot be opened.
        """
        self._config = config
        self._store: BankStore = open_store(config.bank)
        self.edition = open_edition(self._open_wanted(), config)
        self.problem: str | None = None
        self.num_exchanges = 0
        self.num_failures = 0

    def _open_wanted(self) -> Bank:
        return Bank.open(self._store, find_version(self._store, self._config.at))

    def refresh(self) -> bool:
        """Looks for another version and opens it; if that fails, the old one stays and ``problem`` says why.

        Returns:
            Whether the version was exchanged.
        """
        previous = self.edition
        try:
            wanted = self._open_wanted()
            if wanted.manifest.version == previous.version:
                self.problem = None
                return False
            edition = open_edition(wanted, self._config, previous)
        except Exception as error:
            # The server answers with the old version, whatever a new one is like.
            problem = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, BankError) and problem != self.problem:
                _LOGGER.exception("a newer version cannot be opened")
            if problem != self.problem:
                _LOGGER.error("version %d stays, since a newer one cannot be opened: %s", previous.version, problem)
                self.num_failures += 1
            self.problem = problem
            return False
        self.edition, self.problem = edition, None
        self.num_exchanges += 1
        _LOGGER.info("version %d is served in the place of version %d", edition.version, previous.version)
        return True

    async def watch(self) -> None:
        """Looks again and again, in a thread of its own."""
        while True:
            await asyncio.sleep(self._config.watch_seconds)
            await asyncio.to_thread(self.refresh)


def warm_up(edition: Edition) -> None:
    """Generates a token, so that what is wrong with a model shows before anybody asks, and the first answer is fast.

    Raises:
        BankError: a memory cannot be read, or the model does not read it.
    """
    list(edition.make_generator(with_memory=True).generate("The", GenerationConfig(max_new_tokens=2)))
