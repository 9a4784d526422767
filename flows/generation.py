"""``memory3 generate``: a model and a bank joined to a generator."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.checkpoint import load_checkpoint
from model.fetching import DEFAULT_CACHE_BYTES, BankMemories
from model.generating import Generator
from model.loading import load_bank_codec, load_writer
from model.text_references import ReferenceTexts
from model.writing import ReferenceWriter
from schemas.bank import Bank
from schemas.errors import InputError, WrongModelError
from schemas.protocols import Fingerprint
from schemas.records import RecordLayout
from schemas.stores import open_store
from schemas.tags import find_version


def is_server_url(bank: str) -> bool:
    """Tells whether what a user gave as a bank is the address of a bank server."""
    return bank.startswith(("http://", "https://"))


def open_writer(bank: Bank, model: str, *, device: str | None = None) -> ReferenceWriter:
    """Loads a model with the selection rule, types and codec that a bank was written with.

    Args:
        bank: the bank.
        model: ``memory3-tiny`` or the folder of a checkpoint.
        device: where to compute; None for where the bank was written.

    Raises:
        BankFormatError: the bank's codec is missing or damaged.
        InputError: the model cannot be loaded.
    """
    load_bank_codec(bank)  # a codec that is not for the bank is to be told from one that is not for this model
    manifest = bank.manifest
    return join_writer(
        model, manifest.config["memory"], manifest.fingerprint, manifest.layout, bank.locate_codec(), device=device
    )


def join_writer(
    model: str,
    memory: Mapping[str, Any],
    fingerprint: Fingerprint,
    layout: RecordLayout,
    codec_file: Path | None,
    *,
    device: str | None = None,
) -> ReferenceWriter:
    """:func:`open_writer` for what is known of a bank.

    Args:
        model: ``memory3-tiny`` or the folder of a checkpoint.
        memory: settings of its memories, of which device and types are used.
        fingerprint: what wrote them.
        layout: their shape and codec.
        codec_file: the parameters of a trained codec.
        device: where to compute; None for where the bank was written.

    Raises:
        BankFormatError: the codec's file is damaged.
        InputError: the model cannot be loaded.
    """
    settings = {name: memory[name] for name in ("device", "compute_dtype", "dtype") if name in memory}
    if device is not None:
        settings["device"] = device
    # The settings may leave the rule to the model, whose mind may have changed since.
    settings |= {"refit": False, **fingerprint.selection}
    return load_writer(model, **settings, codec=layout.codec, codec_file=codec_file)


def open_generator(
    model: str,
    bank: str | None,
    version: str | None = None,
    *,
    knowledge: str = "memory",
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    device: str | None = None,
    embedder: str | None = None,
) -> Generator:
    """Loads a model, and a bank for it to read.

    Args:
        model: ``memory3-tiny`` or the folder of a checkpoint.
        bank: the bank, or the address of a bank server; it may be None if ``knowledge`` is ``none``, else the model
            computes as for this bank.
        version: as :func:`schemas.tags.find_version`.
        knowledge: ``memory``, ``text`` for references in the prompt, or ``none`` for the ordinary model.
        cache_bytes: RAM for memories that were read.
        device: where to compute; None for where the bank was written.
        embedder: the embedding model of a bank on a server, if it is not one that comes with this project.

    Raises:
        InputError: a bank is needed but not given.
        WrongModelError: the bank was written by another model.
    """
    if knowledge == "none" and bank is None:
        return Generator(load_checkpoint(model, device=device or "cpu"))
    if bank is None:
        raise InputError("give the bank to read with --bank, or --no-memory for the ordinary model")
    if is_server_url(bank):
        from flows.remote.client import open_remote_generator

        return open_remote_generator(
            model, bank, version, knowledge=knowledge, cache_bytes=cache_bytes, device=device, embedder=embedder
        )
    from flows.searching import open_retriever

    store = open_store(bank)
    opened = Bank.open(store, find_version(store, version))
    if knowledge != "memory":
        memory = opened.manifest.config["memory"]
        checkpoint = load_checkpoint(model, device=device or memory["device"], dtype=memory["compute_dtype"])
        if knowledge == "none":
            return Generator(checkpoint)
        if checkpoint.tokenizer.tokenizer_id != opened.manifest.fingerprint.tokenizer:
            raise WrongModelError(f"bank {opened.url} was cut by another tokenizer than that of {model}")
        return Generator(checkpoint, texts=ReferenceTexts(checkpoint, opened, open_retriever(opened)))
    memories = BankMemories(opened, open_writer(opened, model, device=device), cache_bytes=cache_bytes)
    return Generator(memories.checkpoint, open_retriever(opened), memories)
