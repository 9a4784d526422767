"""A transformers checkpoint seen as a Memory³ model: what writes memories and what reads them.

Any RoPE decoder of transformers will do; explicit memory adds no parameters. The memory layers are the first half,
as in the paper, unless the configuration says otherwise (``num_memory_layers`` or ``memory_layers``).
"""

import dataclasses
import hashlib
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from model.attention import IMPLEMENTATION, register_attention
from model.locating import REFERENCE_TOKENS, SHIPPED_MODEL, find_checkpoint
from model.rotary import Rotary, describe_rope, find_rotaries, read_scalings
from model.selecting import SelectionConfig
from model.tokenizing import CheckpointTokenizer, load_tokenizer
from schemas.errors import InputError
from schemas.protocols import Fingerprint
from schemas.records import RecordLayout

PREFIX_TEXT = "Reference:"
"""What follows ``<s>`` in the modified BOS that precedes every reference (method section 4)."""

ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "hidden_act",
    "hidden_activation",
    "query_pre_attn_scalar",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "vocab_size",
)
"""The settings, beside those of RoPE, that enter keys and values; most architectures have some of them only."""

UNSUPPORTED_SETTINGS = {
    "attn_logit_softcapping": "caps its attention scores",
    "final_logit_softcapping": "caps its logits",
    "use_bidirectional_attention": "lets tokens see those after them",
}
"""Settings of some architectures that change what attention or the output head computes."""

SAMPLES_PER_TENSOR = 16
"""Numbers of each tensor, at least this many where there are, that are looked at to see whether it has changed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model with what memory needs to know about it.

    Attributes:
        model: the transformers causal language model.
        tokenizer: its tokenizer.
        bos_token_ids: what a context begins with: one token, or none.
        prefix_token_ids: the modified BOS ``<s>Reference:``, (prefix,) int64.
        memory_layers: indices of the layers that write and read, ascending.
        rotaries: the rotary embedding of each layer; the same object for all layers that rotate alike.
        max_reference_tokens: longest reference, and length of the references' interval of positions.
    """

    model: nn.Module
    tokenizer: CheckpointTokenizer
    bos_token_ids: tuple[int, ...]
    prefix_token_ids: torch.Tensor
    memory_layers: tuple[int, ...]
    rotaries: tuple[Rotary, ...]
    max_reference_tokens: int = REFERENCE_TOKENS

    @property
    def decoder(self) -> nn.Module:
        """The model without its output head."""
        return self.model.get_submodule("model")

    @property
    def head(self) -> nn.Module:
        """The map from hidden states to logits."""
        return self.model.get_submodule("lm_head")

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type the model computes in."""
        return next(self.model.parameters()).dtype

    @property
    def head_dim(self) -> int:
        """Size of a key or value vector."""
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads a layer."""
        return int(self.config.num_key_value_heads)

    @property
    def attention_scaling(self) -> float:
        """Factor on the products of queries and keys."""
        return float(self.decoder.layers[0].self_attn.scaling)  # type: ignore[index,union-attr]

    @property
    def memory_rotaries(self) -> tuple[Rotary, ...]:
        """The rotary embedding of each memory layer."""
        return tuple(self.rotaries[layer] for layer in self.memory_layers)

    @property
    def context_start(self) -> int:
        """Position of the first context token: past the prefix and the interval of the references."""
        return len(self.prefix_token_ids) + self.max_reference_tokens

    def make_fingerprint(self, selection: SelectionConfig, layout: RecordLayout) -> Fingerprint:
        """Returns what determines the memories this model writes under a selection rule and stores in a layout.

        An adapter that is merged into the weights counts by the weights it leaves: one that changes no bit of them
        changes nothing. An adapter that runs beside them counts as other weights, even if its product is zero today.
        """
        config = self.config.to_dict()
        return Fingerprint(
            weights=_hash_weights(self.decoder, self.memory_layers[-1]),
            tokenizer=self.tokenizer.tokenizer_id,
            architecture={**{name: config[name] for name in ARCHITECTURE if name in config}, "head_dim": self.head_dim},
            rope=describe_rope(self.decoder.get_submodule("rotary_emb"), self.config),
            prefix_token_ids=self.prefix_token_ids.tolist(),
            memory_layers=list(self.memory_layers),
            selection=selection.to_json(),
            compute_dtype=str(self.dtype).removeprefix("torch."),
            storage=layout.to_json(),
        )


class FingerprintState:
    """Tells cheaply whether a model may have another fingerprint than when it was last asked.

    Nothing tells of every change: a tensor's version counter does not see a change through ``.data``, as merging an
    adapter makes it, and an address is used again. So each tensor is known by its address, version, shape and type
    and by some of its numbers, and is kept alive until the next look so that its address stays its own. What this
    cannot see are single numbers changed through ``.data``, and code that runs in place of a module's own.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Watches a model."""
        self._checkpoint = checkpoint
        self._known: tuple[list[Any], dict[tuple[torch.device, torch.dtype], list[torch.Tensor]]] = ([], {})

    def read(self) -> tuple[Any, ...]:
        """Returns a value that is equal as long as the model is: what it is made of, as it is now."""
        checkpoint = self._checkpoint
        decoder, tensors = checkpoint.decoder, list[torch.Tensor]()
        for name, module in decoder.named_children():
            if name == "layers":
                for layer in range(checkpoint.memory_layers[-1] + 1):
                    _list_tensors(module.get_submodule(str(layer)), tensors)
            elif name != "norm":
                _list_tensors(module, tensors)
        places = [
            (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.shape, tensor.dtype)
            for tensor in tensors
        ]
        known, samples = self._known
        if places != known:
            samples = {}
            for tensor in tensors:
                samples.setdefault((tensor.device, tensor.dtype), []).append(_sample(tensor.detach()))
            self._known = places, samples
        joined = [
            torch.cat([view if view.ndim == 1 else view.flatten() for view in views]) for views in samples.values()
        ]
        numbers = [values.cpu().view(torch.uint8).numpy().tobytes() for values in joined]
        config, rotary = checkpoint.config, decoder.get_submodule("rotary_emb")
        names = (*ARCHITECTURE, "head_dim", "rope_parameters", "layer_types")
        settings = [getattr(config, name, None) for name in names]
        return (
            places,
            numbers,
            repr(settings),
            read_scalings(rotary),
            checkpoint.prefix_token_ids.tolist(),
            checkpoint.tokenizer.tokenizer_id,
        )


def _list_tensors(module: nn.Module, tensors: list[torch.Tensor]) -> None:
    """Appends the parameters and buffers of a module; torch's own walk takes ten times as long."""
    for held in (module._parameters, module._buffers):
        if held:
            tensors += [tensor for tensor in held.values() if tensor is not None]
    for child in module._modules.values():
        if child is not None:
            _list_tensors(child, tensors)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a view of some numbers of a tensor: of a matrix on its diagonal, so from many rows and columns."""
    line = tensor.diagonal(dim1=-2, dim2=-1) if tensor.ndim >= 2 else tensor.reshape(-1) if tensor.ndim == 0 else tensor
    return line[..., :: max(1, line.shape[-1] // SAMPLES_PER_TENSOR)]


def _hash_weights(decoder: nn.Module, last_layer: int) -> str:
    """Digests every tensor up to the last memory layer, adapters merged into those layers included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(decoder.state_dict().items()):
        parts = name.split(".")
        if parts[0] == "norm" or (parts[0] == "layers" and int(parts[1]) > last_layer):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def find_memory_layers(config: Any) -> tuple[int, ...]:
    """Returns the indices of the memory layers: as configured, else the first half (the paper's choice).

    Raises:
        InputError: the configuration names layers that the model does not have.
    """
    listed = getattr(config, "memory_layers", None)
    num_layers = int(config.num_hidden_layers)
    if listed is None:
        listed = range(getattr(config, "num_memory_layers", None) or max(1, num_layers // 2))
    layers = tuple(sorted({int(layer) for layer in listed}))
    if not layers or layers[0] < 0 or layers[-1] >= num_layers:
        raise InputError(f"memory layers are {list(layers)}; the model has layers 0..{num_layers - 1}")
    return layers


def find_bos_token_id(config: Any) -> int | None:
    """Returns the token a text begins with: where a model names none, the one that ends it; None for neither."""
    found = config.eos_token_id if config.bos_token_id is None else config.bos_token_id
    # Of several that end a text the first is that of texts; those after it end answers.
    first = found[0] if isinstance(found, list) else found
    return None if first is None else int(first)


def wrap_model(model: nn.Module, tokenizer: CheckpointTokenizer, *, bos_token_id: int | None) -> Checkpoint:
    """Makes a checkpoint of a model in memory and sets its attention to ``"memory3"``.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        bos_token_id: the token a text begins with, or None where the model knows none.

    Raises:
        InputError: the architecture cannot write or read memories.
    """
    register_attention()
    name = type(model).__name__
    if not hasattr(model, "model"):
        raise InputError(f"{name} is not a RoPE decoder of transformers; use Llama, Qwen2, Qwen3, Mistral or alike")
    if not hasattr(model.config, "num_hidden_layers"):
        raise InputError(f"{name} is more than a language model; save its text model alone, such as Gemma3ForCausalLM")
    for setting, effect in UNSUPPORTED_SETTINGS.items():
        if getattr(model.config, setting, None):
            raise InputError(f"{name} {effect} ({setting}), which memory3 does not compute; use another architecture")
    model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
    bos = () if bos_token_id is None else (int(bos_token_id),)
    prefix = [*bos, *tokenizer.encode([PREFIX_TEXT])[0].tolist()]
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        bos_token_ids=bos,
        prefix_token_ids=torch.tensor(prefix, dtype=torch.int64),
        memory_layers=find_memory_layers(model.config),
        rotaries=find_rotaries(model.get_submodule("model")),
    )


def load_checkpoint(name: str = SHIPPED_MODEL, *, device: str = "cpu", dtype: str = "float32") -> Checkpoint:
    """Loads a local checkpoint for inference.

    Args:
        name: ``memory3-tiny``, or a folder with ``config.json``, weights in safetensors and ``tokenizer.json``.
        device: where to compute.
        dtype: the type to compute in.

    Raises:
        InputError: the folder is not a checkpoint, or its architecture cannot use memories.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = find_checkpoint(name)
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is not a checkpoint: it has no config.json; give the folder of a transformers model")
    tokenizer = load_tokenizer(path)
    register_attention()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=IMPLEMENTATION, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path} cannot be loaded as a causal language model: {error}") from error
    model.requires_grad_(False).eval()
    try:
        nn.Module.to(model, device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"the model cannot be put on the device {device!r}: {error}") from error
    return wrap_model(model, tokenizer, bos_token_id=find_bos_token_id(model.config))
