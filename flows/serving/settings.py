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
class ServingConfig:
    """How the server works.

    Attributes:
        bank: folder or URL of the bank.
        model: ``memory3-tiny`` or the folder of a checkpoint.
        at: version to serve, see :func:`schemas.tags.find_version`; a tag is followed, None is the newest.
        host: address to listen at.
        port: port to listen at; 0 takes a free one.
        api_key: what clients have to say; None asks for nothing.
        no_key: says that everybody may use a server that others can reach.
        max_batch: sequences that are generated at a time.
        max_queue: sequences that wait, at most.
        timeout_seconds: time for a request, from its arrival to its last token.
        max_request_bytes: size of a request's body.
        watch_seconds: time between two looks for a new version.
        grace_seconds: time for requests under way when the server is told to end.
        num_threads: threads that compute; None for PyTorch's choice.
        device: where to compute; None for where the bank was written.
        cache_bytes: RAM for memories that were read.
        explore: whether there is a page to look into the bank with, and what it asks.
    """

    bank: str
    model: str = "memory3-tiny"
    at: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = dataclasses.field(default=None, repr=False)
    no_key: bool = False
    max_batch: int = 16
    max_queue: int = 64
    timeout_seconds: float = 120.0
    max_request_bytes: int = 1 << 20
    watch_seconds: float = 5.0
    grace_seconds: float = 30.0
    num_threads: int | None = None
    device: str | None = None
    cache_bytes: int = 256 << 20
    explore: bool = False

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a value is out of its bounds, or others could reach a server that asks for no key.
        """
        if not 0 <= self.port <= 65535:
            raise InputError(f"serving: port is {self.port}, must be 0 to 65535")
        for name in ("max_batch", "max_queue", "max_request_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"serving: {name} is {getattr(self, name)}, must be at least 1")
        for name in ("timeout_seconds", "watch_seconds"):
            if not getattr(self, name) > 0:
                raise InputError(f"serving: {name} is {getattr(self, name)}, must be more than 0")
        for name in ("grace_seconds", "cache_bytes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"serving: {name} is {getattr(self, name)}, must be at least 0, and finite")
        if self.num_threads is not None and self.num_threads < 1:
            raise InputError(f"serving: num_threads is {self.num_threads}, must be at least 1")
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
