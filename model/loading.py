"""Loading a model as a writer from plain settings: what flows hand to the workers of a job, and what readers use."""

from pathlib import Path

from model.checkpoint import load_checkpoint
from model.coding import KeyValueCodec, load_codec
from model.locating import SHIPPED_MODEL
from model.selecting import find_selection
from model.writing import ReferenceWriter
from schemas.bank import Bank
from schemas.codec_names import NONE
from schemas.errors import BankFormatError, InputError
from schemas.manifest import CODEC_KIND


def load_writer(
    name: str = SHIPPED_MODEL,
    *,
    device: str = "cpu",
    compute_dtype: str = "float32",
    dtype: str = "bfloat16",
    num_slots: int | None = None,
    score: str | None = None,
    refit: bool | None = None,
    codec: str = NONE,
    codec_file: Path | None = None,
    num_threads: int | None = None,
) -> ReferenceWriter:
    """Loads a checkpoint and joins it with a selection rule and a codec.

    Args:
        name: ``memory3-tiny`` or the folder of a checkpoint.
        device: where to compute.
        compute_dtype: the type to compute in.
        dtype: the type in which key-values are stored.
        num_slots: tokens kept a KV head; None, as for the two others, is what the model was trained with.
        score: how tokens are scored, see :class:`model.selecting.SelectionConfig`.
        refit: whether values are fitted, see :mod:`model.refitting`.
        codec: how vectors are stored: a name of :mod:`schemas.codec_names`, with its digest if it is trained.
        codec_file: the parameters of a trained codec.
        num_threads: threads PyTorch may use for each thread that writes.

    Raises:
        InputError: the checkpoint or the codec cannot be loaded, or a setting is out of bounds.
        BankFormatError: the file is damaged, or that of another codec.
    """
    checkpoint = load_checkpoint(name, device=device, dtype=compute_dtype)
    selection = find_selection(checkpoint.config, num_slots=num_slots, score=score, refit=refit)
    loaded = load_codec(
        str(codec_file or codec),
        num_layers=len(checkpoint.memory_layers),
        num_kv_heads=checkpoint.num_kv_heads,
        num_slots=selection.num_slots,
        head_dim=checkpoint.head_dim,
        dtype=dtype,
        device=checkpoint.device,
    )
    if loaded.name != codec:
        raise BankFormatError(f"{codec_file} has the parameters of {loaded.name}, not of {codec}; restore the file")
    return ReferenceWriter(checkpoint, selection, dtype=dtype, codec=loaded, num_threads=num_threads)


def load_bank_codec(bank: Bank) -> KeyValueCodec:
    """Loads the codec of a version, with the parameters that stand in the bank.

    Raises:
        BankFormatError: their file is missing or damaged, or that of another codec or of another shape.
    """
    layout, path = bank.manifest.layout, bank.locate_codec()
    place = f"{bank.url}/{bank.manifest.list_files(CODEC_KIND)[0].path}" if path else bank.url
    try:
        codec = load_codec(
            layout.codec if path is None else str(path),
            num_layers=layout.num_layers,
            num_kv_heads=layout.num_kv_heads,
            num_slots=layout.num_slots,
            head_dim=layout.head_dim,
            dtype=layout.dtype,
        )
    except InputError as error:
        raise BankFormatError(f"{place} is no codec for this bank: {error}; run memory3 verify") from error
    if codec.name != layout.codec:
        raise BankFormatError(
            f"{place} has the parameters of {codec.name}, the bank that of {layout.codec}; run memory3 verify"
        )
    return codec
