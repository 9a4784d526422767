"""``memory3 generate``: a model and a bank joined to a generator."""

from model.checkpoint import load_checkpoint
from model.fetching import BankMemories
from model.generating import Generator
from model.loading import load_writer
from model.writing import ReferenceWriter
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.stores import open_store
from schemas.tags import find_version


def open_writer(bank: Bank, model: str) -> ReferenceWriter:
    """Loads a model with the selection rule and types that a bank was written with."""
    memory = bank.manifest.config["memory"]
    names = ("device", "compute_dtype", "dtype", "num_slots", "score")
    return load_writer(model, **{name: memory[name] for name in names})


def open_generator(model: str, bank: str | None, version: str | None = None, *, needs_bank: bool = True) -> Generator:
    """Loads a model, and a bank for it to read.

    Raises:
        InputError: memory is wanted but no bank is given.
        WrongModelError: the bank was written by another model.
    """
    if bank is None:
        if needs_bank:
            raise InputError("give the bank to read with --bank, or --no-memory for the ordinary model")
        return Generator(load_checkpoint(model))
    from flows.searching import open_retriever

    store = open_store(bank)
    opened = Bank.open(store, find_version(store, version))
    memories = BankMemories(opened, open_writer(opened, model))
    return Generator(memories.checkpoint, open_retriever(opened), memories)
