"""Loading a model as a writer from plain settings: what flows hand to the workers of a job, and what readers use."""

from model.checkpoint import load_checkpoint
from model.locating import SHIPPED_MODEL
from model.selecting import SelectionConfig
from model.writing import ReferenceWriter


def load_writer(
    name: str = SHIPPED_MODEL,
    *,
    device: str = "cpu",
    compute_dtype: str = "float32",
    dtype: str = "bfloat16",
    num_slots: int = 8,
    score: str = "softmax",
    num_threads: int | None = None,
) -> ReferenceWriter:
    """Loads a checkpoint and joins it with a selection rule.

    Args:
        name: ``memory3-tiny`` or the folder of a checkpoint.
        device: where to compute.
        compute_dtype: the type to compute in.
        dtype: the type in which key-values are stored.
        num_slots: tokens kept a KV head.
        score: how tokens are scored, see :class:`model.selecting.SelectionConfig`.
        num_threads: threads PyTorch may use for each thread that writes.

    Raises:
        InputError: the checkpoint cannot be loaded, or a setting is out of bounds.
    """
    checkpoint = load_checkpoint(name, device=device, dtype=compute_dtype)
    selection = SelectionConfig(num_slots=num_slots, score=score)
    return ReferenceWriter(checkpoint, selection, dtype=dtype, num_threads=num_threads)
