"""Rotary position embedding applied and undone, the way each transformers architecture does it.

Memories are stored before RoPE and rotated on load (method section 4), but an attention function is handed queries and
keys after RoPE. A rotation is orthogonal, so turning a key back by the same angle recovers it exactly.
"""

import sys
from collections.abc import Callable

import torch
from torch import nn

from schemas.errors import InputError

LENGTH_DEPENDENT_ROPE_TYPES = frozenset({"dynamic", "longrope"})
"""RoPE scalings whose angles depend on the length of the input: a stored key has no fixed rotation under them."""


class Rotary:
    """The rotation of one model.

    Raises:
        InputError: at construction, if the model has no rotation that can be undone.
    """

    def __init__(self, decoder: nn.Module) -> None:
        """Takes the rotation from a decoder such as ``LlamaModel``, and checks that it can be undone."""
        name = type(decoder).__name__
        rotary = getattr(decoder, "rotary_emb", None)
        layers = getattr(decoder, "layers", None)
        if rotary is None or layers is None or not hasattr(layers[0], "self_attn"):
            raise InputError(f"{name} is not a RoPE decoder of transformers; use Llama, Qwen2, Qwen3, Mistral or alike")
        if not isinstance(getattr(rotary, "rope_type", "default"), str):
            raise InputError(f"{name} has several rotations; this architecture is not supported")
        if getattr(rotary, "rope_type", "default") in LENGTH_DEPENDENT_ROPE_TYPES:
            raise InputError(f"{name} uses {rotary.rope_type} RoPE, whose angles depend on the length of the input")
        module = sys.modules[type(layers[0].self_attn).__module__]
        apply = getattr(module, "apply_rotary_pos_emb", None)
        if apply is None:
            raise InputError(f"{name} has no apply_rotary_pos_emb; this architecture is not supported")
        self._rotary: nn.Module = rotary
        self._apply: Callable[..., tuple[torch.Tensor, torch.Tensor]] = apply
        self._scaling = float(getattr(rotary, "attention_scaling", 1.0))
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
        cos, sin = self._rotary(like, position_ids=positions.view(1, -1))
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
