"""Names of versions, and what a user may write for a version.

A tag is a file ``tags/<name>.json`` that holds the number of a version. Unlike everything else in a bank it may be
changed, and it belongs to no version.
"""

import contextlib
import json
import re
from pathlib import PurePosixPath

from schemas.bank import TAGS_FOLDER
from schemas.errors import BankFormatError, InputError
from schemas.manifest import list_versions
from schemas.stores import BankStore

TAG_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

NUMBER = re.compile(r"v?([0-9]+)")
"""How the number of a version is written; so no tag may be written like this."""

MAX_DIGITS = 18
"""Digits of a number that may be a version's."""


def make_tag_name(name: str) -> str:
    """Returns the name of a tag's file below the bank.

    Raises:
        InputError: the text cannot be the name of a tag.
    """
    if not TAG_NAME.fullmatch(name):
        raise InputError(
            f"tag is {name!r}, must be 1 to 100 letters, digits, '.', '_' or '-', and begin with a letter or digit"
        )
    if NUMBER.fullmatch(name):
        raise InputError(f"tag is {name!r}, which reads as the number of a version; choose a name that does not")
    return f"{TAGS_FOLDER}/{name}.json"


def _read_tag(store: BankStore, file: str) -> int:
    """Returns the version a tag's file holds."""
    try:
        value = json.loads(store.read(file))
        version = value["version"]
        if type(version) is not int:
            raise TypeError(f"version is {version!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        name = PurePosixPath(file).stem
        raise BankFormatError(
            f"the tag {store.url}/{file} is damaged; set it again: memory3 tag --bank {store.url} --move {name} VERSION"
        ) from error
    return version


def list_tags(store: BankStore) -> dict[str, int]:
    """Returns the version each tag names, by the name of the tag, sorted; that version may be gone.

    Raises:
        BankFormatError: a tag's file is damaged.
    """
    tags = {}
    for file in store.list_files(TAGS_FOLDER):
        name = PurePosixPath(file).name.removesuffix(".json")
        if file == f"{TAGS_FOLDER}/{name}.json" and TAG_NAME.fullmatch(name):
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                tags[name] = _read_tag(store, file)
    return dict(sorted(tags.items()))


def set_tag(store: BankStore, name: str, version: int, *, move: bool = False) -> None:
    """Gives a version a name; nothing happens if it has it already.

    Args:
        store: the bank.
        name: the tag.
        version: a committed version.
        move: take the name from the version that has it now.

    Raises:
        InputError: not a name, no such version, or another version has the name and ``move`` is false.
    """
    file = make_tag_name(name)
    _check_version(store, version)
    content = (json.dumps({"version": version}) + "\n").encode()
    if move:
        store.replace(file, content)
        return
    try:
        store.create(file, content)
    except FileExistsError as error:
        tagged = _read_tag(store, file)
        if tagged != version:
            raise InputError(f"tag {name!r} names version {tagged}; give --move to let it name {version}") from error


def remove_tag(store: BankStore, name: str) -> None:
    """Takes a name away; the version stays.

    Raises:
        InputError: there is no such tag.
    """
    file = make_tag_name(name)
    if store.get_size(file) is None:
        raise InputError(f"bank {store.url} has no tag {name!r}; {_list_known(store)}")
    store.remove([file])


def find_version(store: BankStore, text: str | int | None) -> int | None:
    """Returns the number of the version that a user means, None for None: the newest.

    Args:
        store: the bank.
        text: a number, also as ``v3``; a tag; or, counted from the newest, ``-1`` for the version before it.

    Raises:
        InputError: there is no such version or tag.
    """
    if text is None:
        return None
    written = str(text)
    number = NUMBER.fullmatch(written)
    if number and len(number[1]) <= MAX_DIGITS:
        return _check_version(store, int(number[1]))
    if re.fullmatch(f"-[0-9]{{1,{MAX_DIGITS}}}", written):
        versions = list_versions(store)
        place = len(versions) - 1 + int(written)
        if place < 0:
            raise InputError(f"bank {store.url} has no version {written} from the newest; {_list_known(store)}")
        return versions[place]
    try:
        version = _read_tag(store, make_tag_name(written))
    except (FileNotFoundError, InputError) as error:
        raise InputError(f"bank {store.url} has no version or tag {written!r}; {_list_known(store)}") from error
    return _check_version(store, version)


def _check_version(store: BankStore, version: int) -> int:
    """Returns a version's number if it is committed."""
    if version not in list_versions(store):
        raise InputError(f"bank {store.url} has no version {version}; {_list_known(store)}")
    return version


def _list_known(store: BankStore) -> str:
    """Returns the end of an error after which the user can name a version."""
    versions = ", ".join(map(str, list_versions(store))) or "none"
    names = sorted(PurePosixPath(file).stem for file in store.list_files(TAGS_FOLDER) if file.endswith(".json"))
    return f"its versions are: {versions}; its tags are: {', '.join(names) or 'none'}"
