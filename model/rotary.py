"""Rotary position embedding applied and undone, the way each transformers architecture does it.

Memories are stored before RoPE and rotated on load (method section 4), but an attention function is handed queries and
keys after RoPE. A rotation is orthogonal, so turning a key back by the same angle recovers it exactly.

Most models turn all layers alike. Some, such as Gemma3, have a rotation for each kind of layer (those that see all and
those that see a window): each kind is a :class:`Rotary` of its own, and :func:`find_rotaries` deals them out to layers.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from schemas.errors import InputError

LENGTH_DEPENDENT_ROPE_TYPES = frozenset({"dynamic", "longrope"})
"""RoPE scalings whose angles depend on the length of the input: a stored key has no fixed rotation under them."""


class Rotary:
    """The rotation of one model, or of the layers of one kind.

    Raises:
        InputError: at construction, if the model has no rotation that can be undone.
    """

    def __init__(self, decoder: nn.Module, layer_type: str | None = None) -> None:
        """Takes the rotation from a decoder such as ``LlamaModel``, and checks that it can be undone.

        Args:
            decoder: the model without its output head.
            layer_type: the kind of layer, where the model has a rotation for each kind; None where it has only one.
        """
        name = type(decoder).__name__
        rotary = getattr(decoder, "rotary_emb", None)
        layers = getattr(decoder, "layers", None)
        if rotary is None or layers is None or not hasattr(layers[0], "self_attn"):
            raise InputError(f"{name} is not a RoPE decoder of transformers; use Llama, Qwen2, Qwen3, Mistral or alike")
        rope_type = getattr(rotary, "rope_type", "default")
        if isinstance(rope_type, dict) and layer_type is not None:
            rope_type = rope_type.get(layer_type)
        if not isinstance(rope_type, str):
            raise InputError(f"{name} has no rotation for layers of type {layer_type}; use another model")
        if rope_type in LENGTH_DEPENDENT_ROPE_TYPES:
            raise InputError(f"{name} uses {rope_type} RoPE, whose angles depend on the length of the input")
        module = sys.modules[type(layers[0].self_attn).__module__]
        apply = getattr(module, "apply_rotary_pos_emb", None)
        if apply is None:
            raise InputError(f"{name} has no apply_rotary_pos_emb; this architecture is not supported")
        self._rotary: nn.Module = rotary
        self._apply: Callable[..., tuple[torch.Tensor, torch.Tensor]] = apply
        self._layer_type = () if layer_type is None else (layer_type,)
        scaling = "attention_scaling" if layer_type is None else f"{layer_type}_attention_scaling"
        self._scaling = float(getattr(rotary, scaling, 1.0))
        self._check(name, int(layers[0].self_attn.head_dim))

    def _check(self, name: str, head_dim: int) -> None:
        device = next(iter(self._rotary.buffers())).device
        if device.type == "meta":
            return  # a model without storage has its shape looked at and is never run
        probe = torch.linspace(-1, 1, 4 * head_dim, device=device).view(1, 1, 4, head_dim)
        positions = torch.tensor([0, 1, 7, 131], device=device)
        try:
            error = (self.unrotate(self.rotate(probe, positions), positions) - probe).abs().max().item()
        except (TypeError, ValueError, RuntimeError, AttributeError) as cause:
            raise InputError(
                f"{name} rotates in a way of its own ({cause}); this architecture is not supported"
            ) from cause
        if error > 1e-4:
            raise InputError(f"{name} rotates in a way that cannot be undone; this architecture is not supported")

    def _angles(self, like: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self._rotary(like, positions.view(1, -1), *self._layer_type)
        return cos, sin

    def rotate(self, vectors_HTD: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """Rotates vectors (..., heads, T, D) to positions (T,), as attention would."""
        cos, sin = self._angles(vectors_HTD, positions_T)
        return self._apply(vectors_HTD, vectors_HTD, cos, sin)[0]

    def unrotate(self, vectors_HTD: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """Undoes :meth:`rotate`, the scaling of YaRN-like variants included."""
        return self.unrotate_pair(vectors_HTD, vectors_HTD, self.reverse_angles(vectors_HTD, positions_T))[0]

    def reverse_angles(self, like: torch.Tensor, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what :meth:`unrotate_pair` turns vectors at positions (T,) back with, once for all layers.

        Args:
            like: any tensor of the type and on the device of the vectors.
            positions_T: positions the vectors were rotated to.
        """
        cos, sin = self._angles(like, positions_T)
        factor = self._scaling**2
        return cos / factor, -sin / factor

    def unrotate_pair(
        self, queries_NTD: torch.Tensor, keys_HTD: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Undoes :meth:`rotate` of queries (..., N, T, D) and keys (..., H, T, D) by :meth:`reverse_angles`."""
        return self._apply(queries_NTD, keys_HTD, *angles)

    def rotate_each(self, vectors_ND: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Rotates N single vectors (N, D), each to a position of its own (N,)."""
        return self.rotate(vectors_ND[None, None], positions_N)[0, 0]


def find_rotaries(decoder: nn.Module) -> tuple[Rotary, ...]:
    """Returns the rotation of each layer of a decoder; layers of one kind share one.

    Raises:
        InputError: a layer has no rotation that can be undone.
    """
    rope_type = getattr(getattr(decoder, "rotary_emb", None), "rope_type", None)
    if not isinstance(rope_type, dict):
        return (Rotary(decoder),) * len(getattr(decoder, "layers", ()))
    config: Any = decoder.config
    layer_types: Sequence[str] = config.layer_types
    rotaries = {layer_type: Rotary(decoder, layer_type) for layer_type in dict.fromkeys(layer_types)}
    return tuple(rotaries[layer_type] for layer_type in layer_types)


def read_scalings(rotary: nn.Module) -> dict[str, float]:
    """Returns the factors on rotated vectors by name; one for each kind of layer where there are several kinds."""
    return {name: float(value) for name, value in sorted(vars(rotary).items()) if name.endswith("attention_scaling")}


def _read_frequencies(rotary: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the frequencies by name, float32; those of each kind of layer where there are several kinds."""
    names = [name for name, _ in rotary.named_buffers() if name.endswith("inv_freq") and "original" not in name]
    return {name: rotary.get_buffer(name).float().cpu() for name in sorted(names)}


def describe_rope(rotary: nn.Module, config: Any) -> dict[str, Any]:
    """Returns the rotary settings, and the frequencies too if they are not those that the settings give.

    Args:
        rotary: the module that makes the angles, such as ``LlamaRotaryEmbedding``.
        config: the configuration of the model.
    """
    described: dict[str, Any] = copy.deepcopy(dict(getattr(config, "rope_parameters", None) or {}))
    if isinstance(getattr(rotary, "rope_type", None), dict):
        described["layer_types"] = list(config.layer_types)
    fresh = type(rotary)(rotary.config)
    found, expected = _read_frequencies(rotary), _read_frequencies(fresh)
    scalings = read_scalings(rotary)
    is_as_configured = scalings == read_scalings(fresh) and all(
        frequencies.shape == expected[name].shape and torch.allclose(frequencies, expected[name], rtol=1e-4)
        for name, frequencies in found.items()
    )
    if not is_as_configured:
        for name, frequencies in found.items():
            # Rounded, since the last bit of a frequency depends on the device that computed it.
            described[name] = [float(f"{value:.4g}") for value in frequencies.tolist()]
        described["scaling"] = next(iter(scalings.values()), 1.0) if len(found) == 1 else scalings
    return described
