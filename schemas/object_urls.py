"""Object stores by URL: who is asked, with which credentials, and what an error of theirs means in one sentence.

Shared by what reads corpora (``pipelines/storage.py``) and what keeps banks (:mod:`schemas.object_store`). Everything
goes through obstore, which is loaded only when a store is used and takes credentials, region and endpoint from the
usual environment variables (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ``AWS_ALLOW_HTTP`` ...; ``GOOGLE_*`` and
``AZURE_*`` for the other two).
"""

import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from schemas.errors import BankError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "az")
VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION (AWS_SKIP_SIGNATURE=true for a public bucket)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
"""Where each kind of store finds who asks."""

ENVIRONMENT_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_")
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
PASSING_FAULT = re.compile(r"HTTP error|status code: (408|429|5\d\d)")
"""What obstore says, after its own retries, of a store that is out of reach, slow or overloaded."""

METADATA_SERVICES = ("/latest/api/token", "/latest/meta-data", "/computeMetadata/", "/metadata/identity")
"""Asked for credentials by obstore on machines that are given none."""

MAX_REASON_CHARS = 200

MAX_RETRIES = 3
RETRY_TIMEOUT = timedelta(seconds=30)
"""A store that is silent is given up after a minute: obstore waits 5 s for a connection and 30 s for an answer."""


def is_object_url(path: str) -> bool:
    """Tells whether a path is the URL of an object, a folder or a pattern in an object store."""
    return path.partition("://")[0] in SCHEMES and "://" in path


def is_folder_mark(name: str, size_bytes: int) -> bool:
    """Tells whether an object only marks a folder, as consoles make them: it is empty and has no suffix."""
    return not size_bytes and "." not in name.rpartition("/")[2]


@contextmanager
def explain_errors(url: str, kind: type[BankError], *, action: str = "read") -> Iterator[None]:
    """Turns what obstore raises within into one sentence that says what to do.

    Args:
        url: what is asked for.
        kind: the error to raise.
        action: what was to be done with it, as a participle.

    Raises:
        BankError: of ``kind``, marked where it may pass. A ``FileNotFoundError`` is left as it is, unless it is the
            bucket that does not exist.
    """
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

    scheme, _, place = url.partition("://")
    bucket = f"{scheme}://{place.partition('/')[0]}"
    no_bucket = f"{bucket} does not exist; check the name of the bucket and the endpoint"
    refused = f"{url} may not be {action} with these credentials; check {VARIABLES[scheme]}, and what they are allowed"
    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise kind(refused) from error
    except FileNotFoundError as error:
        if _names_no_bucket(str(error)):
            raise kind(no_bucket) from error
        raise
    except (BaseError, ValueError) as error:
        reason = str(error)
        if _names_no_bucket(reason):
            raise kind(no_bucket) from error
        if any(service in reason for service in METADATA_SERVICES):
            raise kind(f"no credentials were found for {bucket}; set {VARIABLES[scheme]}") from error
        if "status code: 403" in reason or "status code: 401" in reason:  # of a listing obstore does not tell it apart
            raise kind(refused) from error
        if "builder error" in reason:
            raise kind(f"{bucket}: the endpoint is plain http; set AWS_ALLOW_HTTP=true to allow that") from error
        if "HTTP error" in reason:
            explained = kind(f"{bucket} cannot be reached ({_shorten(error)}); check the network and AWS_ENDPOINT_URL")
        else:
            explained = kind(f"{url} cannot be {action}: {_shorten(error)}")
        explained.may_pass = bool(PASSING_FAULT.search(reason))
        raise explained from error


def _names_no_bucket(reason: str) -> bool:
    return "NoSuchBucket" in reason or "ContainerNotFound" in reason or "bucket does not exist" in reason


def _shorten(error: Exception) -> str:
    """Returns the first line of an error of obstore; the rest is its inner state."""
    return str(error).partition("\n")[0][:MAX_REASON_CHARS].strip()


def find_store(url: str, kind: type[BankError]) -> "tuple[ObjectStore, str]":
    """Returns the client of a URL's bucket and the key in it, "" for the whole bucket; nothing is asked of it yet.

    Raises:
        BankError: of ``kind``: the URL or the environment cannot be used.
    """
    from obstore.exceptions import BaseError

    scheme, _, place = url.partition("://")
    bucket, _, key = place.partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]+", bucket):
        raise kind(f"{url} names no bucket that can be; write it as {scheme}://BUCKET/PREFIX")
    environment = {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT_PREFIXES)}
    for name in ENDPOINTS:
        value = environment.get(name)
        if value and not (urlsplit(value).scheme in ("http", "https") and urlsplit(value).hostname):
            raise kind(f"{name} is {value!r}, must be a URL such as https://s3.example.com")
    try:
        return _make_store(scheme, bucket, tuple(sorted(environment.items()))), key.strip("/")
    except (BaseError, ValueError) as error:
        raise kind(f"{scheme}://{bucket} cannot be opened: {_shorten(error)}; check {VARIABLES[scheme]}") from error


@functools.lru_cache(maxsize=16)
def _make_store(scheme: str, bucket: str, environment: tuple[tuple[str, str], ...]) -> "ObjectStore":
    """Makes the client of a bucket; it reads the environment itself, which is here only to tell two apart."""
    from obstore.store import AzureStore, GCSStore, S3Store

    makers: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
    store: ObjectStore = makers[scheme](
        bucket,
        retry_config={"max_retries": MAX_RETRIES, "retry_timeout": RETRY_TIMEOUT},
    )
    return store
