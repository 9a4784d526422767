"""Which documents are held out of training, everywhere in this project: one in twenty, by a hash of the id."""

import hashlib


def is_held_out(doc_id: str) -> bool:
    """Tells whether a document belongs to the twentieth that no stage of the shipped model's training has seen."""
    return hashlib.blake2b(doc_id.encode(), digest_size=8).digest()[0] % 20 == 0
