"""Which documents are held out of training, everywhere in this project: one in twenty, by a hash of the id.

A page that exists in several versions, such as ``reference/7.4/Get-Item.md`` or a law with its date, is held out with
all of them: its other versions would give it away.
"""

import hashlib
import re

VERSION = re.compile(r"/\d+(?:\.\d+)+(?=/)|\(\d{4}-\d{2}-\d{2}\)")
"""A folder named by a version number, or a date in brackets."""


def find_family(doc_id: str) -> str:
    """Returns what all versions of a document have in common: its id without versions and dates."""
    return VERSION.sub("", doc_id)


def is_held_out(doc_id: str) -> bool:
    """Tells whether a document belongs to the twentieth that no stage of the shipped model's training has seen."""
    return hashlib.blake2b(find_family(doc_id).encode(), digest_size=8).digest()[0] % 20 == 0
