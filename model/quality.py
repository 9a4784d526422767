"""A quality score a text, by any sequence classification checkpoint of transformers.

The paper grades texts from 0 to 5 by a small BERT fine-tuned on the grades of a large model and keeps the best part
(method section 3). What to keep is chosen in ``pipelines``; here a text becomes a number, the higher the better:

- one output (regression): the output itself;
- two labels: the probability of the last, the positive one;
- more labels: the expected index of the label, so that labels 0 to 5 give the expected grade.

A long text is judged by its beginning. Texts run in batches of similar length, and scores are rounded to 1e-4, so that
what else is in a batch changes ties and cuts only for a score at the very edge between two roundings.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from schemas.errors import InputError
from schemas.identifiers import hash_json
from schemas.protocols import FloatArray

CHARS_PER_TOKEN = 64
"""Characters of a text that are tokenized for each token that is read: the rest of a book would be thrown away."""

MAX_TOKENS = 512

ROUNDING_DECIMALS = 4

VOLATILE_SETTINGS = frozenset({"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"})
"""Settings of a checkpoint that do not change a score."""


def tokenize_beginnings(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Returns the tokens that texts are judged by: their first ones, special tokens included.

    Args:
        tokenizer: a tokenizer of transformers.
        texts: the texts.
        max_tokens: tokens of a text, at most.
    """
    if not texts:
        return []
    num_chars = max_tokens * CHARS_PER_TOKEN
    encoded = tokenizer(
        [text[:num_chars] for text in texts],
        truncation=True,
        max_length=max_tokens,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        # A text that spells a special token is the text it is: a corpus must not be able to end a sequence.
        split_special_tokens=True,
    )
    return list(encoded["input_ids"])


class QualityScorer:
    """A sequence classification model that scores texts; a :class:`schemas.protocols.TextScorer`."""

    def __init__(self, model: nn.Module, tokenizer: Any, *, batch_size: int, max_tokens: int, num_threads: int) -> None:
        """Takes a loaded model, in float32 and ready to infer, and its tokenizer; use :func:`load_scorer`."""
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._max_tokens = max_tokens
        self._num_threads = num_threads
        self._id = _make_scorer_id(model, tokenizer, max_tokens)

    @property
    def scorer_id(self) -> str:
        """The model's type and a digest of its weights, settings and tokenizer and of the bound on tokens."""
        return self._id

    def score(self, texts: Sequence[str]) -> FloatArray:
        """Returns a score a text in their order, (texts,) float32.

        A text is judged by its first ``max_tokens`` tokens, special tokens included. A text without any token, which
        only a tokenizer that adds no special ones can give, scores not a number.
        """
        torch.set_num_threads(self._num_threads)
        token_ids = tokenize_beginnings(self._tokenizer, texts, self._max_tokens)
        lengths = np.fromiter(map(len, token_ids), np.int64, len(token_ids))
        order = np.argsort(lengths, kind="stable")
        scores = np.full(len(texts), np.nan, np.float32)
        start = int(np.searchsorted(lengths[order], 1))
        while start < len(order):
            end = min(start + self._batch_size, len(order))
            if self._tokenizer.pad_token_id is None:
                # Nothing to pad with: only texts of equal length share a batch.
                end = min(end, int(np.searchsorted(lengths[order], lengths[order[start]], side="right")))
            rows = order[start:end]
            scores[rows] = self._score_batch([token_ids[row] for row in rows])
            start = end
        return np.round(scores, ROUNDING_DECIMALS)

    @torch.inference_mode()
    def _score_batch(self, token_ids: list[list[int]]) -> FloatArray:
        lengths = torch.tensor(list(map(len, token_ids)))
        longest = int(lengths.max())
        padding = self._tokenizer.pad_token_id or 0
        input_ids = torch.tensor([[*ids, *[padding] * (longest - len(ids))] for ids in token_ids])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        device = next(self._model.parameters()).device
        logits = self._model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits.float()
        if logits.shape[1] == 1:
            values = logits[:, 0]
        else:
            shares = logits.softmax(1)
            # Of two labels, the expected index is the probability of the last.
            values = shares @ torch.arange(shares.shape[1], dtype=shares.dtype, device=device)
        return np.asarray(values.cpu().numpy(), np.float32)


def load_scorer(
    checkpoint: str | Path,
    device: str = "cpu",
    batch_size: int = 32,
    max_tokens: int | None = None,
    num_threads: int = 1,
) -> QualityScorer:
    """Loads a local sequence classification checkpoint.

    Args:
        checkpoint: a folder with ``config.json``, weights in safetensors and a tokenizer.
        device: where to compute.
        batch_size: texts a forward pass.
        max_tokens: tokens of a text that are read, at most what the model takes; by default 512, or what it takes if
            that is less.
        num_threads: threads PyTorch may use.

    Raises:
        InputError: the folder holds no such checkpoint, or a setting is out of bounds.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens), ("num_threads", num_threads)):
        if value is not None and value < 1:
            raise InputError(f"quality: {name} is {value}, must be at least 1")
    path = Path(checkpoint)
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is not a checkpoint: it has no config.json; give the folder of a classifier")
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be loaded as a sequence classifier: {reason}") from error
    if loading["missing_keys"]:
        names = ", ".join(sorted(loading["missing_keys"])[:3])
        raise InputError(f"{path} is no trained sequence classifier: it has no weights for {names}")
    if model.config.problem_type == "multi_label_classification":
        raise InputError(f"{path} gives several labels to a text; a quality score needs one output or exclusive labels")
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS)
    max_tokens = max_tokens or min(MAX_TOKENS, limit)
    if max_tokens > limit:
        raise InputError(f"quality: max_tokens is {max_tokens}, must be at most {limit} for {path}")
    # Decoders look for the last token that is not padding, and refuse a batch if they know of none.
    padding = -1 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = padding
    try:
        model.requires_grad_(False).eval().to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"the model cannot be put on the device {device!r}: {error}") from error
    return QualityScorer(model, tokenizer, batch_size=batch_size, max_tokens=max_tokens, num_threads=num_threads)


def _make_scorer_id(model: nn.Module, tokenizer: Any, max_tokens: int) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[operator,union-attr]
    parts = {
        "weights": digest.hexdigest(),
        "config": {name: value for name, value in config.items() if name not in VOLATILE_SETTINGS},
        "tokenizer": _describe_tokenizer(tokenizer),
        "max_tokens": max_tokens,
    }
    return f"{config['model_type']}:{hash_json(parts)}"


def _describe_tokenizer(tokenizer: Any) -> Any:
    """Returns what determines the tokens: a fast tokenizer's whole definition, else its words and special tokens."""
    if tokenizer.is_fast:
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        return {name: part for name, part in definition.items() if name not in ("truncation", "padding")}
    return [type(tokenizer).__name__, tokenizer.get_vocab(), sorted(map(str, tokenizer.all_special_tokens))]
