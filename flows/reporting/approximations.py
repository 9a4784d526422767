"""What the bank's approximations cost: the codec's error in what is read, and the recall of its indexes.

Both are measured on a sample of the version's own references, the same for the same seed.
"""

import dataclasses

import torch

from flows.codec_training import compute_snr_db, encode_sample, read_neighbours, sample_references
from flows.generation import open_writer
from flows.progress import show_stage
from flows.reporting.contents import CodecError
from flows.searching import open_retriever
from model.codec_error import measure_attention_error
from model.fetching import check_fingerprint
from model.recall import IndexRecall, measure_recall
from model.writing import ReferenceWriter
from schemas.bank import Bank
from schemas.codec_names import NONE


def measure_codec(bank: Bank, model: str, *, num_references: int, seed: int) -> CodecError:
    """Encodes a sample of references again, exactly, and compares what is read from it with and without the codec.

    Args:
        bank: the version.
        model: the model that wrote it, ``memory3-tiny`` or the folder of a checkpoint.
        num_references: references in the sample, of a small bank a fifth of its references.
        seed: of the sample.

    Raises:
        InputError: the model cannot be loaded, or the bank has too few references, or too short ones.
        WrongModelError: the bank was written by another model.
        StoppedError: a stop was asked for.
    """
    with show_stage("models"):
        stored = open_writer(bank, model)
        check_fingerprint(bank.url, bank.manifest.fingerprint, stored)
    layout, checkpoint = bank.manifest.layout, stored.checkpoint
    exact = ReferenceWriter(checkpoint, stored.selection, dtype="float32")
    _, chosen = sample_references(bank, 0, seed, num_held_out=num_references)
    sample = encode_sample(bank, exact, chosen, "encode")
    keys_NLHSD = sample.memories.keys_LBHSD.transpose(0, 1)
    values_NLHSD = sample.memories.values_LBHSD.transpose(0, 1)
    with show_stage("codec"):
        found_keys, found_values = stored.codec.decode(stored.codec.encode(keys_NLHSD, values_NLHSD), torch.float32)
        error = measure_attention_error(checkpoint, read_neighbours(checkpoint, sample), found_keys, found_values)
    return CodecError(
        model=model,
        num_references=len(chosen),
        key_bytes=layout.key_bytes,
        value_bytes=layout.value_bytes,
        factor=dataclasses.replace(layout, codec=NONE).payload_bytes / layout.payload_bytes,
        key_snr_db=compute_snr_db(keys_NLHSD, found_keys),
        value_snr_db=compute_snr_db(values_NLHSD, found_values),
        attention_error=error,
    )


def measure_index(bank: Bank, *, num_queries: int, seed: int) -> IndexRecall:
    """Looks for the neighbours of a sample of embeddings by the indexes and by comparing all.

    Raises:
        BankError: see :func:`model.recall.measure_recall`, or the embedding model cannot be loaded.
    """
    with show_stage("index"):
        return measure_recall(bank, open_retriever(bank), num_queries=num_queries, seed=seed)
