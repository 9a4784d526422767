"""Settings of the server, and who may reach it.

They come from the command line, are checked before anything is loaded, and are handed to all other modules here.
"""

import dataclasses
import ipaddress
import math
import os
from pathlib import Path

from schemas.errors import InputError

KEY_VARIABLE = "MEMORY3_API_KEY"

PAGES_PATH = "/explore"
"""Where the page of :mod:`flows.exploring` is, if it is served."""

MIN_KEY_CHARS = 16
"""A shorter key can be guessed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListeningConfig:
    """Who may reach a server, and with what.

    Attributes:
        host: address to listen at.
        port: port to listen at; 0 takes a free one.
        api_key: what clients have to say; None asks for nothing.
        no_key: says that everybody may use a server that others can reach.
        max_queue: requests that wait, at most; of prompts each counts.
        timeout_seconds: time for a request, from its arrival to the end of its answer.
        max_request_bytes: size of a request's body.
        grace_seconds: time for requests under way when the server is told to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = dataclasses.field(default=None, repr=False)
    no_key: bool = False
    max_queue: int = 64
    timeout_seconds: float = 120.0
    max_request_bytes: int = 1 << 20
    grace_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a value is out of its bounds, or others could reach a server that asks for no key.
        """
        if not 0 <= self.port <= 65535:
            raise InputError(f"serving: port is {self.port}, must be 0 to 65535")
        for name in ("max_queue", "max_request_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"serving: {name} is {getattr(self, name)}, must be at least 1")
        if not self.timeout_seconds > 0:
            raise InputError(f"serving: timeout_seconds is {self.timeout_seconds}, must be more than 0")
        if not 0 <= self.grace_seconds < math.inf:
            raise InputError(f"serving: grace_seconds is {self.grace_seconds}, must be at least 0, and finite")
        if self.api_key is not None and (len(self.api_key) < MIN_KEY_CHARS or not self.api_key.isascii()):
            raise InputError(
                f"the API key has {len(self.api_key)} characters, must be at least {MIN_KEY_CHARS} of ASCII; make one "
                "with: openssl rand -hex 32"
            )
        if self.api_key is None and not self.no_key and not is_loopback(self.host):
            raise InputError(
                f"{self.host} can be reached by others and no API key is set; set {KEY_VARIABLE}, or say --no-key to "
                "let everybody in"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingConfig(ListeningConfig):
    """How the server of a model works.

    Attributes:
        bank: folder or URL of the bank.
        model: ``memory3-tiny`` or the folder of a checkpoint.
        at: version to serve, see :func:`schemas.tags.find_version`; a tag is followed, None is the newest.
        max_batch: sequences that are generated at a time.
        watch_seconds: time between two looks for a new version.
        num_threads: threads that compute; None for one if the model is small, else PyTorch's choice.
        device: where to compute; None for where the bank was written.
        cache_bytes: RAM for memories that were read.
        explore: whether there is a page to look into the bank with, and what it asks.
    """

    bank: str
    model: str = "memory3-tiny"
    at: str | None = None
    max_batch: int = 16
    watch_seconds: float = 5.0
    num_threads: int | None = None
    device: str | None = None
    cache_bytes: int = 256 << 20
    explore: bool = False

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: as :meth:`ListeningConfig.__post_init__`.
        """
        super().__post_init__()
        if self.max_batch < 1:
            raise InputError(f"serving: max_batch is {self.max_batch}, must be at least 1")
        if not self.watch_seconds > 0:
            raise InputError(f"serving: watch_seconds is {self.watch_seconds}, must be more than 0")
        if self.cache_bytes < 0:
            raise InputError(f"serving: cache_bytes is {self.cache_bytes}, must be at least 0")
        if self.num_threads is not None and self.num_threads < 1:
            raise InputError(f"serving: num_threads is {self.num_threads}, must be at least 1")

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return Path(self.model).name or Path(self.model).resolve().name


def is_loopback(host: str) -> bool:
    """Tells whether an address is one that only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_api_key(path: Path | None) -> str | None:
    """Returns the API key: of a file if one is given, else of the environment, else None.

    Raises:
        InputError: the file cannot be read, or holds nothing.
    """
    if path is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the key file {path} cannot be read: {error}") from error
    if not key:
        raise InputError(f"the key file {path} is empty; write the key into it")
    return key
