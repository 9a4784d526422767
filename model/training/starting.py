"""Where a training starts and what it leaves: a model to train, and a checkpoint folder that everything else can load.

A preset's name starts from random weights, a folder from those of any transformers checkpoint. Training is in float32
states whatever the type of the files.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from model.checkpoint import Checkpoint, find_bos_token_id, wrap_model
from model.locating import PRESET_NAMES, find_checkpoint
from model.tokenizing import load_tokenizer
from model.training.saving import list_weights
from schemas.atomic import replace_folder
from schemas.errors import InputError

if TYPE_CHECKING:
    from transformers import LlamaConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

CONFIG_FILE = "config.json"

SAVED_DTYPES = ("float32", "bfloat16")


def start_model(name: "str | LlamaConfig", *, tokenizer: str | None = None, seed: int = 0) -> Checkpoint:
    """Returns a model to train, all parameters in float32.

    Args:
        name: one of ``PRESET_NAMES`` or a configuration for random weights of that shape, else ``memory3-tiny`` or a
            folder.
        tokenizer: the folder with the tokenizer of a preset; checkpoints bring their own.
        seed: seed of random weights.

    Raises:
        InputError: a preset without a tokenizer or with one that is too large for it, or the folder is no checkpoint.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from model.presets import PRESETS

    logging.disable_progress_bar()
    if isinstance(name, LlamaConfig) or name in PRESET_NAMES:
        if tokenizer is None:
            raise InputError(
                f"{name if isinstance(name, str) else 'a shape'} starts from random weights and needs a tokenizer; "
                "give a folder with tokenizer.json"
            )
        folder = Path(find_checkpoint(tokenizer))
        config = name if isinstance(name, LlamaConfig) else PRESETS[name]()
        _set_special_tokens(config, folder)
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config).float()
    else:
        folder = find_checkpoint(name)
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{name} is neither a preset ({', '.join(PRESET_NAMES)}) nor a checkpoint: it has no config.json"
            )
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{folder} cannot be loaded as a causal language model: {error}") from error
    return wrap_model(model, load_tokenizer(folder), bos_token_id=find_bos_token_id(model.config))


@torch.no_grad()
def average_models(names: Sequence[str]) -> Checkpoint:
    """Returns a model whose weights are the mean of those of several models of one shape.

    Runs from common weights that have learnt different things keep most of both in their mean (Wortsman et al.,
    arXiv 2203.05482).

    Args:
        names: as in :func:`start_model`; the first has the tokenizer.

    Raises:
        InputError: fewer than two, or of different shapes.
    """
    if len(names) < 2:
        raise InputError(f"average: {len(names)} models, must be at least 2")
    mean, *others = (start_model(name) for name in names)
    weights = dict(list_weights(mean.model))
    for number, (name, other) in enumerate(zip(names[1:], others, strict=True), start=2):
        added = dict(list_weights(other.model))
        if {key: value.shape for key, value in added.items()} != {key: value.shape for key, value in weights.items()}:
            raise InputError(f"average: {name} has another shape than {names[0]}")
        for key, value in weights.items():
            value.lerp_(added[key], 1 / number)
    return mean


def check_length(checkpoint: Checkpoint, sequence_tokens: int) -> None:
    """Makes sure that a model has positions for sequences behind the interval of the references.

    Raises:
        InputError: it has not.
    """
    limit = getattr(checkpoint.config, "max_position_embeddings", None)
    longest = checkpoint.context_start + sequence_tokens
    if limit is not None and longest > limit:
        raise InputError(
            f"sequences of {sequence_tokens} tokens need {longest} positions, the model has {limit}; give at most "
            f"{limit - checkpoint.context_start} tokens"
        )


def check_saved_dtype(dtype: str) -> None:
    """Makes sure that weights can be stored in a type.

    Raises:
        InputError: they cannot.
    """
    if dtype not in SAVED_DTYPES:
        raise InputError(f"saved_dtype is {dtype!r}, must be one of {', '.join(SAVED_DTYPES)}")


def _set_special_tokens(config: Any, folder: Path) -> None:
    """Gives a configuration the special tokens of a tokenizer.

    Raises:
        InputError: the tokenizer cannot be read, has no ``<s>`` token, or has more words than the model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no tokenizer: {error}") from error
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"the tokenizer in {folder} has {len(tokenizer)} words, the model {config.vocab_size}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    if config.bos_token_id is None:
        raise InputError(f"the tokenizer in {folder} names no bos_token; a context begins with it")


def save_model(checkpoint: Checkpoint, target: Path, *, tokenizer: str, dtype: str = "float32") -> None:
    """Writes a checkpoint folder with weights and tokenizer, whole or not at all.

    Args:
        checkpoint: the model.
        target: the folder; what stands there is replaced.
        tokenizer: name or folder of the checkpoint or tokenizer that the tokenizer's files are copied from.
        dtype: the type the weights are stored in.

    Raises:
        InputError: another type.
    """
    check_saved_dtype(dtype)
    wanted = getattr(torch, dtype)
    model: Any = checkpoint.model
    # Weights that stand in two places are stored once; whoever loads the model ties them again.
    state = {name: tensor.detach().to("cpu", wanted) for name, tensor in list_weights(model)}
    with replace_folder(target) as temporary:
        model.save_pretrained(temporary, state_dict=state)
        # transformers writes the type that the model has in memory, not that of the weights it was given.
        settings = json.loads((temporary / CONFIG_FILE).read_bytes())
        (temporary / CONFIG_FILE).write_text(json.dumps({**settings, "dtype": dtype}, indent=2, sort_keys=True) + "\n")
        for name in TOKENIZER_FILES:
            source = find_checkpoint(tokenizer) / name
            if source.is_file():
                shutil.copyfile(source, temporary / name)
